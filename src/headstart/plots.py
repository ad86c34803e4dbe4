"""The report's pictures as matplotlib axes, for notebooks, and the preview sheet.

Nothing here touches pyplot: without `ax` a figure of its own is made, `axes.figure` shows or saves it, and it goes
when nobody holds it any more. Pass `ax=plt.gca()` to draw into a pyplot figure.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dataset import ImageTable
from .errors import DataError, near_matches
from .files import write_atomic
from .recipe import AugmentSpec
from .run import RunRecord, read_run
from .verdicts import Record, axis_range, figure, kept_record, stage_attempts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .dataspec import DataSpec

_TRAIN, _VAL = "#c2570c", "#0b6e78"
_QUANTITIES = {"loss": "loss (nats)", "accuracy": "accuracy", "top5": "top-5 accuracy"}
_FORMATS = ("png", "jpg", "jpeg", "pdf", "svg")
_SHEET = 9  # pictures, and augmentations of the first of them
_PLAIN_PX = 224


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    return ax if ax is not None else _figure(width, height).add_subplot()


def _words(text: object) -> str:
    """Text that matplotlib can draw: bytes of a file name that are no valid Unicode become question marks."""
    return str(text).encode("utf-8", "replace").decode()


# ---- pictures --------------------------------------------------------------------------------------------------


def show_batch(
    images: ImageTable | ArrayLike | Sequence[Any],
    labels: Sequence[Any] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    n: int = _SHEET,
    spec: DataSpec | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw pictures with their class names into one axes.

    Args:
        images: a table, of which `n` pictures spread over the classes are drawn at random; or the pictures
            themselves, of which the first `n` are drawn: uint8 [N, 3, H, W] or [N, H, W, 3], an array or a tensor,
            or a list of single ones (PIL images too).
        labels: what to write under each picture, or class numbers where `class_names` are given.
        spec: with a table, show the pictures as a network with this preprocessing sees them.
        seed: which pictures of a table are drawn.
    Raises:
        DataError: no picture, a picture that cannot be read, or an array that is no picture.
    """
    if isinstance(images, ImageTable):
        chosen = spread_indices(images, n, seed=seed)
        tiles = [_table_tile(images, i, spec) for i in chosen]
        titles = [images.class_names[images.labels[i]] for i in chosen]
    else:
        tiles = [_tile(image) for image in list(images)[:n]]  # type: ignore[arg-type]
        names = list(labels)[: len(tiles)] if labels is not None else [""] * len(tiles)
        titles = [class_names[int(k)] if class_names is not None else str(k) for k in names]
    if not tiles:
        raise DataError("show_batch: no picture to draw (0 of 0). Give a table or a batch that holds some.")
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    return _mosaic(_axes(ax, 2.2 * columns, 2.4 * rows), tiles, titles, columns)


def spread_indices(table: ImageTable, n: int, *, seed: int = 0) -> list[int]:
    """`n` picture numbers of a table, drawn at random but class by class in turn, so that small classes are seen."""
    rng = np.random.default_rng(seed)
    queues = [rng.permutation(np.flatnonzero(table.labels == c)).tolist() for c in range(len(table.class_names))]
    queues = [queues[c] for c in rng.permutation(len(queues)) if queues[c]]
    chosen: list[int] = []
    while queues and len(chosen) < n:
        chosen += [int(queue.pop()) for queue in queues[: n - len(chosen)]]
        queues = [queue for queue in queues if queue]
    return chosen


def _table_tile(table: ImageTable, index: int, spec: DataSpec | None) -> NDArray[np.uint8]:
    from .dataset import open_image

    if spec is not None:
        from .transforms import load_view

        return _tile(load_view(table.paths[index], spec))
    image = open_image(table.paths[index])
    image.thumbnail((_PLAIN_PX, _PLAIN_PX))
    return np.asarray(image)


def _tile(image: Any) -> NDArray[np.uint8]:
    """One picture as uint8 [H, W, 3], from PIL, or an array or tensor with the channels first or last."""
    if hasattr(image, "convert"):  # by the rules for files
        from .decode import to_rgb

        image = to_rgb(image)
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise DataError(
            f"show_batch: a picture of shape {list(pixels.shape)} and type {pixels.dtype}; expected uint8 [H, W, 3] or "
            "[3, H, W] from 0 to 255, before any normalisation."
        )
    return pixels


def _mosaic(ax: Axes, tiles: Sequence[NDArray[np.uint8]], titles: Sequence[str], columns: int) -> Axes:
    """Tiles in rows, each in a unit square of the axes, with its title under it."""
    rows, step = math.ceil(len(tiles) / columns), 1.16 if any(titles) else 1.04
    for i, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        x, y = (i % columns) * 1.04, (i // columns) * step
        height, width = (side / max(tile.shape[:2]) for side in tile.shape[:2])
        left, top = x + (1 - width) / 2, y + 1 - height
        ax.imshow(tile, extent=(left, left + width, top + height, top), interpolation="antialiased")
        words = _words(title) if len(title) <= 24 else _words(title[:23]) + "\u2026"
        ax.text(x + 0.5, y + 1.03, words, ha="center", va="top", fontsize=9, parse_math=False)
    ax.set(xlim=(0, columns * 1.04 - 0.04), ylim=(rows * step - (0.0 if any(titles) else 0.04), 0), aspect="equal")
    ax.axis("off")
    return ax


def preview_sheet(
    table: ImageTable,
    spec: DataSpec,
    augment: str | AugmentSpec | Callable[[Any], Any],
    out_path: str | Path,
    seed: int = 0,
) -> Path:
    """Write one picture: nine labelled pictures as the network sees them, and nine augmentations of the first.

    Args:
        augment: a policy's name, an `AugmentSpec`, or any torchvision v2 transform.
        out_path: where to write; the ending (png, jpg, pdf, svg) decides the format.
        seed: which pictures, and the augmentations' random numbers.
    Raises:
        DataError: the table is empty, the ending is unknown, or a picture cannot be read.
        RecipeError: `augment` is none of these.
    """
    from .augment import as_augment, augmented_view
    from .dataset import open_image
    from .transforms import working_image

    path, ending = _picture_path("Preview", out_path)
    chosen = spread_indices(table, _SHEET, seed=seed)
    if not chosen:
        raise DataError(f"Preview {path}: the table holds no picture (0). Give a folder with pictures.")
    policy = as_augment(augment)
    first = working_image(open_image(table.paths[chosen[0]]), spec)
    copies = [augmented_view(first, spec, policy, seed=seed, index=chosen[0], view=v) for v in range(1, _SHEET + 1)]
    sheet = _figure(14.0, 7.6)
    left, right = sheet.subplots(1, 2)
    titles = [table.class_names[table.labels[i]] for i in chosen]
    _mosaic(left, [_table_tile(table, i, spec) for i in chosen], titles, 3)
    left.set_title(f"{len(chosen)} pictures as the network sees them ({spec.image_size} px)", fontsize=11)
    _mosaic(right, [_tile(copy) for copy in copies], [f"view {v}" for v in range(1, _SHEET + 1)], 3)
    kind = f"policy {augment!r}" if isinstance(augment, str) else "training only"
    right.set_title(f"{len(copies)} augmentations of the first ({kind})", fontsize=11)
    write_atomic(path, _rendered(sheet, ending))
    return path


def _rendered(sheet: Figure, ending: str) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes, which is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        sheet.savefig(buffer, format=ending, dpi=110)
    return buffer.getvalue()


# ---- figures of a run ------------------------------------------------------------------------------------------


def plot_history(
    run: str | Path | RunRecord | Sequence[Record] | Any, quantity: str = "loss", *, ax: Axes | None = None
) -> Axes:
    """Draw the training and validation curve of one quantity over all stages, the freeze line's moves marked.

    Both curves are scored in evaluation mode on plain pictures. The axis shows the trained states well; an untrained
    start may run out of it. Attempts that were rolled back are drawn pale, the
    state that was kept has a ring.

    Args:
        run: a run folder, a `RunRecord`, what `fine_tune` returned, or the history's records.
        quantity: `loss`, `accuracy` or `top5`.
    Raises:
        DataError: the history is empty or holds no such quantity.
    """
    if quantity not in _QUANTITIES:
        raise DataError(
            f"plot_history: quantity is {quantity!r}; allowed: {', '.join(_QUANTITIES)}."
            f"{near_matches(quantity, tuple(_QUANTITIES))}"
        )
    history, lines = _history_of(run)
    if not any(math.isfinite(figure(r, s, quantity)) for r in history for s in ("train", "val")):
        raise DataError(
            f"plot_history: none of the {len(history)} records holds a {quantity}. Train first, or choose another."
        )
    from matplotlib.ticker import MaxNLocator

    ax, kept, start = _axes(ax, 7.0, 4.2), kept_record(history), 0
    stages = stage_attempts(history)
    for number, attempts in enumerate(stages):
        for attempt in attempts:
            _plot_attempt(ax, attempt, quantity, start, counts=attempt is attempts[-1], kept=kept, label=number == 0)
        line = f", line at {lines[number]}" if number < len(lines) else ""
        name = _words(attempts[0][0].get("stage", number + 1)) + line
        if number:
            ax.axvline(start, color="0.3", linestyle=":", linewidth=1.5)
        where = ax.get_xaxis_transform()
        ax.text(start, 1.02, f" {name}", transform=where, fontsize=9, parse_math=False)
        start += max(1, *(int(r.get("epoch", 0)) for attempt in attempts for r in attempt))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axis_range(stages, quantity)
    ax.set(xlabel="epoch", ylabel=_QUANTITIES[quantity], ylim=(low, high + 0.02 * (high - low)))
    ax.legend(frameon=False)
    return ax


def _plot_attempt(
    ax: Axes, attempt: Sequence[Record], quantity: str, start: int, *, counts: bool, kept: Record | None, label: bool
) -> None:
    epochs = [start + int(r.get("epoch", 0)) for r in attempt]
    for split, color, style in (("train", _TRAIN, "--"), ("val", _VAL, "-")):
        values = [figure(r, split, quantity) for r in attempt]
        words = {"train": "training", "val": "validation"}[split] if label and counts else None
        ax.plot(epochs, values, style, color=color, marker=".", alpha=1.0 if counts else 0.35, label=words)
    for epoch, record in zip(epochs, attempt, strict=True):
        if record is kept:
            value = figure(record, "val", quantity)
            ax.plot([epoch], [value], "o", markersize=11, markerfacecolor="none", markeredgecolor="0.15", label="kept")


def _history_of(run: Any) -> tuple[Sequence[Record], list[str]]:
    """Records and freeze lines, from whatever holds them."""
    if isinstance(run, (str, Path)):
        run = read_run(run)
    if isinstance(run, RunRecord):
        return run.history, [str(stage.get("freeze_line")) for stage in run.recipe.get("stages") or []]
    if hasattr(run, "history"):
        stages = getattr(getattr(run, "recipe", None), "stages", ())
        return run.history, [stage.freeze_line for stage in stages]
    return list(run), []


def plot_confusion(
    metrics: str | Path | Mapping[str, Any] | ArrayLike | Any,
    class_names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw a confusion matrix as a heat map with a logarithmic scale: right answers in one hue, mistakes in another.

    Up to 20 classes the cells carry their counts, or their shares.

    Args:
        metrics: figures of one split as `evaluate_probs` returns them, an `Evaluation`, a whole `metrics.json` or a
            run folder (the test split is drawn), or the counts [C, C] with a row for each true class, or their shares
            from 0 to 1 (a normalised matrix).
        class_names: C names; taken from the figures where they hold them.
    Raises:
        DataError: no confusion matrix in what was given, or names that do not fit it.
    """
    counts, names = _confusion_of(metrics, class_names)
    classes = len(counts)
    side = min(14.0, max(4.0, 0.5 * classes if classes <= 20 else 0.11 * classes + 2))
    ax = _axes(ax, side + 1, side)
    from matplotlib.colors import LogNorm

    shares = counts.dtype != np.int64
    norm = LogNorm(vmin=0.005, vmax=1.0) if shares else LogNorm(vmin=0.5, vmax=max(2.0, float(counts.max())))
    diagonal = np.eye(classes, dtype=bool)
    for hidden, colors in ((~diagonal, "GnBu"), (diagonal, "Oranges")):
        ax.imshow(np.ma.masked_where(hidden | (counts == 0), counts), norm=norm, cmap=colors, interpolation="nearest")
    if classes <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            strong = norm(counts[row, column]) > 0.65
            ax.text(
                column,
                row,
                f"{counts[row, column]:.2f}" if shares else str(counts[row, column]),
                ha="center",
                va="center",
                color="white" if strong else "black",
                fontsize=8,
            )
    size = min(9.0, 0.72 * 72 * side / classes)  # points; a row has 72 * side / classes of them
    words = [_words(name) for name in names]
    ax.set_xticks(range(classes), labels=words, fontsize=size, parse_math=False, rotation=90)
    ax.set_yticks(range(classes), labels=words, fontsize=size, parse_math=False)
    ax.set(xlabel="predicted", ylabel="true")
    return ax


def _confusion_of(given: Any, class_names: Sequence[str] | None) -> tuple[NDArray[Any], list[str]]:
    """Counts, int64, or shares, float64, [C, C], and the names."""
    if isinstance(given, (str, Path)):
        given = read_run(given)
    if hasattr(given, "metrics"):
        given = given.metrics
    if isinstance(given, Mapping):
        scored = given if "confusion" in given else given.get("test") or given.get("val")
        if not scored:
            raise DataError("plot_confusion: these figures hold no confusion matrix. Evaluate the model first.")
        given = scored["confusion"]
        class_names = class_names or [row["name"] for row in scored["per_class"]]
    counts = np.asarray(given)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise DataError(f"plot_confusion: counts of shape {list(counts.shape)}; expected a square [C, C].")
    counts = counts.astype(np.float64)
    whole = bool((counts == np.floor(counts)).all())
    if not bool((counts >= 0).all()) or not (whole or counts.max() <= 1):  # NaN is refused, too
        raise DataError("plot_confusion: a value is no count; it takes whole numbers, or shares from 0 to 1.")
    counts = counts.astype(np.int64) if whole else counts
    names = list(class_names) if class_names is not None else [str(c) for c in range(len(counts))]
    if len(names) != len(counts):
        raise DataError(f"plot_confusion: {len(names)} class names for {len(counts)} classes; give one for each.")
    return counts, names


def plot_rates(curve: Mapping[str, Any], out_path: str | Path) -> Path:
    """Write loss against learning rate as a picture, with the suggested rates marked.

    Args:
        curve: rates, losses, valley, steepest, minimum_tenth, stage and freeze_line, as a `RateCurve` has them.
        out_path: the ending (png, jpg, pdf, svg) decides the format.
    Raises:
        DataError: the ending is unknown.
    """
    path, ending = _picture_path("Curve", out_path)
    sheet = _figure(7.0, 4.2)
    ax = sheet.add_subplot()
    rates, losses = np.array(curve["rates"]), np.array(curve["losses"])
    ax.plot(rates, losses, color=_VAL)
    marks = (("valley", "o", _TRAIN), ("steepest", "s", "0.45"), ("minimum_tenth", "^", "0.45"))
    for name, marker, color in marks:
        words = {"minimum_tenth": "a tenth of the minimum's"}.get(name, name)
        at = float(curve[name])
        value = float(np.interp(np.log(at), np.log(rates), losses))
        ax.plot([at], [value], marker, color=color, markersize=8, linestyle="", label=f"{words}: {at:.2g}")
    low, high = float(losses.min()), float(losses[: max(2, len(losses) // 3)].max())
    ax.set(xscale="log", xlabel="learning rate of the stage", ylabel="training loss, smoothed (nats)")
    ax.set_ylim(max(0.0, low - 0.08 * (high - low)), high + 0.35 * (high - low) + 1e-6)
    ax.set_title(_words(f"Stage {curve['stage']}, freeze line {curve['freeze_line']}"), fontsize=11, parse_math=False)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    write_atomic(path, _rendered(sheet, ending))
    return path


def _picture_path(what: str, out_path: str | Path) -> tuple[Path, str]:
    """The path and its format."""
    path = Path(out_path)
    ending = path.suffix.lower().lstrip(".") or "png"
    if ending not in _FORMATS:
        raise DataError(
            f"{what} {path}: the ending is {path.suffix!r}; allowed: {', '.join(_FORMATS)}."
            f"{near_matches(ending, _FORMATS)}"
        )
    return path, ending


TICKS_APART = 0.04  # of the height of an axis: a line of words


def plot_parallel(rows: Sequence[Mapping[str, Any]], out_path: str | Path) -> Path:
    """Write trials as lines across one axis per parameter; the last column colours them, low is good.

    Args:
        rows: one mapping per trial, all with the same names; the last one is the score. Numbers spread over more than
            a factor of 20 get a logarithmic axis (0 stands at its foot), words stand in their order of appearance.
    """
    path, ending = _picture_path("Sweep", out_path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.append(names.pop(names.index(list(rows[0])[-1])))
    sheet = _figure(2.2 + 1.7 * len(names), 4.4)
    ax = sheet.add_subplot()
    columns = [_column([row.get(name) for row in rows]) for name in names]
    score = columns[-1][0]
    from matplotlib import colormaps

    shade = colormaps["viridis"]
    for i in np.argsort(-score):
        heights = [column[0][i] for column in columns]
        ax.plot(range(len(names)), heights, color=shade(0.9 * score[i]), alpha=0.85, linewidth=1.6)
    best = int(score.argmin())
    ax.plot(range(len(names)), [c[0][best] for c in columns], color=_TRAIN, linewidth=2.8, marker="o", label="best")
    for x, (_, ticks) in enumerate(columns):
        ax.axvline(x, color="0.75", linewidth=1, zorder=0)
        for at, words in ticks:
            ax.text(x + 0.03, at, _words(words), fontsize=8, va="center", parse_math=False, zorder=5)
    ax.set_xticks(range(len(names)), labels=[_words(name.replace("_", " ")) for name in names], parse_math=False)
    ax.set(ylim=(-0.06, 1.06), xlim=(-0.15, len(names) - 0.5), yticks=[])
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.1))
    write_atomic(path, _rendered(sheet, ending))
    return path


def _column(values: Sequence[Any]) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """Heights 0 to 1 of one parameter's values, and its tick marks as (height, words)."""
    if not all(isinstance(value, (int, float)) for value in values):
        words = list(dict.fromkeys(map(str, values)))
        places = {word: i / max(1, len(words) - 1) for i, word in enumerate(words)}
        return np.array([places[str(value)] for value in values]), [(at, word) for word, at in places.items()]
    numbers = np.array(values, dtype=np.float64)
    positive = numbers[numbers > 0]
    if len(positive) and positive.max() > 20 * positive.min():
        foot = np.log10(positive.min()) - (0.5 if (numbers <= 0).any() else 0.0)
        scaled = np.where(numbers > 0, np.log10(np.maximum(numbers, positive.min())), foot)
    else:
        scaled = numbers
    low, span = scaled.min(), max(float(np.ptp(scaled)), 1e-12)
    heights = (scaled - low) / span
    ticks = {f"{numbers[i]:.3g}": float(heights[i]) for i in np.argsort(numbers)}
    shown = list(ticks.items())
    if len(shown) > 6:
        shown = [shown[round(k * (len(shown) - 1) / 5)] for k in range(6)]
    apart: list[tuple[float, str]] = []
    for text, at in shown:  # of numbers so close that their words would lie on each other the lowest is told
        if not apart or at - apart[-1][0] >= TICKS_APART:
            apart.append((at, text))
    return heights, apart
