"""The report's pictures as matplotlib axes, for notebooks, and those of rates and sweeps.

Nothing here touches pyplot: without `ax` a figure of its own is made, `axes.figure` shows or saves it, and it goes
when nobody holds it any more. Pass `ax=plt.gca()` to draw into a pyplot figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .drawing import axes_or_new, drawable, new_figure, picture_path, rendered
from .errors import DataError, near_matches
from .files import write_atomic
from .run_record import RunRecord, read_run
from .verdicts import Record, axis_range, drawn_epoch, epoch_records, figure, kept_record, stage_attempts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_TRAIN, _VAL = "#c2570c", "#0b6e78"
_QUANTITIES = {"loss": "loss (nats)", "accuracy": "accuracy", "top5": "top-5 accuracy"}


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

    ax, kept, start = axes_or_new(ax, 7.0, 4.2), kept_record(history), 0
    stages = stage_attempts(history)
    for number, attempts in enumerate(stages):
        for attempt in attempts:
            _plot_attempt(ax, attempt, quantity, start, counts=attempt is attempts[-1], kept=kept, label=number == 0)
        line = f", line at {lines[number]}" if number < len(lines) else ""
        name = drawable(attempts[0][0].get("stage", number + 1)) + line
        if number:
            ax.axvline(start, color="0.3", linestyle=":", linewidth=1.5)
        where = ax.get_xaxis_transform()
        ax.text(start, 1.02, f" {name}", transform=where, fontsize=9, parse_math=False)
        start += max(1, *(drawn_epoch(r) for attempt in attempts for r in attempt))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axis_range(stages, quantity)
    ax.set(xlabel="epoch", ylabel=_QUANTITIES[quantity], ylim=(low, high + 0.02 * (high - low)))
    ax.legend(frameon=False)
    return ax


def _plot_attempt(
    ax: Axes, attempt: Sequence[Record], quantity: str, start: int, *, counts: bool, kept: Record | None, label: bool
) -> None:
    trained = epoch_records(attempt)
    epochs = [start + drawn_epoch(r) for r in trained]
    for split, color, style in (("train", _TRAIN, "--"), ("val", _VAL, "-")):
        values = [figure(r, split, quantity) for r in trained]
        words = {"train": "training", "val": "validation"}[split] if label and counts else None
        ax.plot(epochs, values, style, color=color, marker=".", alpha=1.0 if counts else 0.35, label=words)
    for record in attempt:
        if record is kept:
            epoch, value = start + drawn_epoch(record), figure(record, "val", quantity)
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
    ax = axes_or_new(ax, side + 1, side)
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
    words = [drawable(name) for name in names]
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
    path, ending = picture_path("Curve", out_path)
    sheet = new_figure(7.0, 4.2)
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
    ax.set_title(drawable(f"Stage {curve['stage']}, freeze line {curve['freeze_line']}"), fontsize=11, parse_math=False)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    write_atomic(path, rendered(sheet, ending))
    return path


TICKS_APART = 0.04  # of the height of an axis: a line of words


def plot_parallel(rows: Sequence[Mapping[str, Any]], out_path: str | Path) -> Path:
    """Write trials as lines across one axis per parameter; the last column colours them, low is good.

    Args:
        rows: one mapping per trial, all with the same names; the last one is the score. Numbers spread over more than
            a factor of 20 get a logarithmic axis (0 stands at its foot), words stand in their order of appearance.
    """
    path, ending = picture_path("Sweep", out_path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.append(names.pop(names.index(list(rows[0])[-1])))
    sheet = new_figure(2.2 + 1.7 * len(names), 4.4)
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
            ax.text(x + 0.03, at, drawable(words), fontsize=8, va="center", parse_math=False, zorder=5)
    ax.set_xticks(range(len(names)), labels=[drawable(name.replace("_", " ")) for name in names], parse_math=False)
    ax.set(ylim=(-0.06, 1.06), xlim=(-0.15, len(names) - 0.5), yticks=[])
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.1))
    write_atomic(path, rendered(sheet, ending))
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
