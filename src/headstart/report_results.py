"""The report's sections about the result and the data: confusion, classes, worst mistakes, pictures per split."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError, DataError
from .report_charts import confusion_map, interval_bar, shade_legend
from .report_page import NONE, details, esc, percent, section, span, table, wide
from .run_record import RunRecord
from .sizes import small_pictures_sentence

MISTAKES = 24
THUMBNAIL_PX = 180
MANY_CLASSES = 30  # beyond this, long tables open on a click
DRAWN_CLASSES, DRAWN_OF_MORE = 100, 60  # a map of a thousand classes is nearly all white, and metres wide
SPLITS = {"train": "training", "val": "validation", "test": "test"}


def confusion_section(scored: Mapping[str, Any], split: str) -> str:
    """Heat map and most frequent mistakes of one split; empty where it was not scored."""
    if not scored:
        return ""
    confusion, names = np.array(scored["confusion"], dtype=np.int64), [row["name"] for row in scored["per_class"]]
    pairs = [(int(confusion[r, c]), names[r], names[c]) for r, c in zip(*np.nonzero(confusion), strict=True) if r != c]
    pairs.sort(key=lambda pair: -pair[0])
    left_out = ""
    if len(names) > DRAWN_CLASSES:
        place = {name: i for i, name in enumerate(names)}
        asked = dict.fromkeys(place[name] for pair in pairs for name in pair[1:])  # the most frequent mistakes first
        drawn = np.sort(np.array(list(asked)[:DRAWN_OF_MORE] or range(DRAWN_OF_MORE)))
        left_out = (
            f" Of {len(names):,} classes the {len(drawn)} of the most frequent mistakes;"
            " <code>metrics.json</code> has all."
        )
        confusion, names = confusion[np.ix_(drawn, drawn)], [names[i] for i in drawn]
    legend = shade_legend(confusion, wrong=False) + (shade_legend(confusion, wrong=True) if pairs else "")
    rows = [(esc(true), esc(pred), f"{n:,}") for n, true, pred in pairs[:10]]
    chart = wide(f"<figure>{confusion_map(confusion, names)}</figure>", label="confusion matrix")
    if len(names) > 40:
        chart = f'<div class="broad">{chart}</div>'
    chart += f"<div>{legend}</div>"
    often = ""
    if len(names) > 2 and rows:
        often = "<h3>Most frequent mistakes</h3>"
        often += table(("True class", "Taken for", "Pictures"), rows, label="mistakes", numbers=(2,))
    side_by_side = often and len(names) <= 12
    return section(
        "What is taken for what",
        f'<p class="note">Pictures of the {SPLITS[split]} split: a row for each true class, a column for each '
        "answer. The shade grows with the logarithm of the count, so that single mistakes stay visible."
        f"{left_out}</p>",
        f'<div class="pair"><div>{chart}</div><div>{often}</div></div>' if side_by_side else chart + often,
    )


def per_class_section(scored: Mapping[str, Any], split: str) -> str:
    """Recall with its interval, precision and F1 of each class, weakest first."""
    if not scored:
        return ""
    header = ("Class", "Pictures", "Recall", "95 % interval", "Precision", "F1")
    ranked = sorted(scored["per_class"], key=lambda row: (row["n"] == 0, row["recall"]))
    rows = [_class_row(row) for row in ranked]
    foot = (
        "weighted mean", f"{scored['n']:,}", percent(scored["weighted_recall"]), "",
        percent(scored["weighted_precision"]), percent(scored["weighted_f1"]),
    )  # fmt: skip
    numbers = (1, 2, 4, 5)
    note = (
        '<p class="note">Weakest first. Recall: share of a class that is recognised. Precision: share of an answer '
        f"that is right. Scored on the {SPLITS[split]} split.</p>"
    )
    if len(rows) <= MANY_CLASSES:
        return section("Class by class", note, table(header, rows, label="classes", numbers=numbers, foot=foot))
    rest = table(header, rows, label="all classes", numbers=numbers, foot=foot)
    return section(
        "Class by class",
        note,
        table(header, rows[:12], label="weakest classes", numbers=numbers),
        details(f"All {len(rows)} classes", rest),
    )


def _class_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["n"] == 0:
        return esc(row["name"]), "0", NONE, "no picture", NONE, NONE
    return (
        esc(row["name"]),
        f"{row['n']:,}",
        percent(row["recall"]),
        f"{interval_bar(row['recall'], row['recall_ci95'])} {span(row['recall_ci95'])}",
        percent(row["precision"]),
        percent(row["f1"]),
    )


def mistakes_section(run: RunRecord, split: str) -> str:
    """The wrong answers of a split that were furthest off, with their pictures.

    Raises:
        CheckpointError: predictions.csv holds no probabilities where they should stand.
    """
    rows = [row for row in run.answers if row.get("split") == split]
    if not rows:
        return ""
    try:
        wrong = [(float(row[f"p:{row['label']}"]), row) for row in rows if row["label"] != row["pred"]]
        wrong.sort(key=lambda pair: (pair[0], pair[1]["path"]))
        root = (run.metrics.get("data") or {}).get("root")
        items = [_mistake(row, true_prob, Path(root) if root else None) for true_prob, row in wrong[:MISTAKES]]
    except (KeyError, TypeError, ValueError) as error:
        file = run.path / "predictions.csv"
        raise CheckpointError(f"{file}: a row of it cannot be read ({error!r}). Evaluate the model again.") from None
    if not wrong:
        return section("Worst mistakes", f"<p>None: all {len(rows):,} {SPLITS[split]} pictures are right.</p>")
    which = f"{len(items)} of {len(wrong):,}" if len(items) < len(wrong) else f"All {len(wrong):,}"
    gone = ""
    if root and not Path(root).is_dir():
        gone = f" The pictures are no longer at <code>{esc(root)}</code>, so only their names are shown."
    note = (
        f'<p class="note">{which} wrong answers, those first that gave the true class the least probability (in '
        f"brackets). Some may be labels that are wrong.{gone}</p>"
    )
    return section("Worst mistakes", note, f'<ul class="mistakes">{"".join(items)}</ul>')


def _mistake(row: Mapping[str, str], true_prob: float, root: Path | None) -> str:
    data = picture_address(root, row["path"], 2 * THUMBNAIL_PX) if root else None
    image = '<div class="gone">picture not found</div>'
    if data:
        words = esc(f"{row['label']}, taken for {row['pred']}")
        image = f'<img src="{data}" alt="{words}" loading="lazy">'
    return (
        f"<li>{image}<strong>{esc(row['label'])}</strong> ({percent(true_prob)})<br>taken for "
        f"<strong>{esc(row['pred'])}</strong> ({percent(float(row['prob']))})"
        f'<div class="path">{esc(row["path"])}</div></li>'
    )


def picture_address(root: Path, relative: str, px: int) -> str | None:
    """A JPEG of at most px x px as a data address; None where the picture is gone, unreadable or outside the root."""
    from .dataset import open_image

    path = Path(os.path.normpath(root / relative))
    if not path.is_relative_to(os.path.normpath(root)) or not path.is_file():
        return None
    try:
        image = open_image(path)
    except (DataError, OSError):
        return None
    image.thumbnail((px, px))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def data_section(run: RunRecord) -> str:
    """Pictures per class and split, and the files that were left out."""
    data = run.metrics.get("data") or {}
    counts: Mapping[str, Mapping[str, int]] = data.get("class_counts") or {}
    splits = [split for split in ("train", "val", "test") if split in counts]
    if not splits:
        return ""
    names = list(counts[splits[0]])
    several = len(splits) > 1
    numbers = [[counts[s].get(n, 0) for s in splits] for n in names]
    numbers = [[*row, sum(row)] if several else row for row in numbers]
    rows = [(esc(n), *(f"{number:,}" for number in row)) for n, row in zip(names, numbers, strict=True)]
    foot = ("all", *(f"{sum(column):,}" for column in zip(*numbers, strict=True)))
    header = ("Class", *(SPLITS[s].capitalize() for s in splits), *(("All",) if several else ()))
    body = table(header, rows, label="pictures per class and split", numbers=range(1, len(header)), foot=foot)
    if len(names) > MANY_CLASSES:
        total = table(header, [foot], label="pictures per split", numbers=range(1, len(header)))
        body = total + details(f"All {len(names)} classes", body)
    skipped = _left_out(data.get("bad_files") or [], "unreadable file")
    dropped = _left_out(
        data.get("dropped") or [], "picture that the manifest drops", "pictures that the manifest drops"
    )
    shared = data.get("shared_groups") or {}
    small = small_pictures_sentence(data.get("sizes") or {})
    leak = f"<p>{len(shared):,} groups of pictures stand in several splits: the scores are too good.</p>"
    what = (
        "<p>The training split is learned from, the validation split chooses the state that is kept, the test split is "
        "scored once, at the end.</p>"
    )
    return section(
        "Data",
        f'{what if "train" in splits else ""}<p class="note">Read from <code>{esc(data.get("root", ""))}</code>.</p>',
        f"<p>{esc(small)}</p>" if small else "",
        body,
        skipped or '<p class="note">No file was left out as unreadable.</p>',
        dropped,
        leak if shared else "",
    )


def _left_out(files: Sequence[tuple[str, str]], one: str, many: str = "") -> str:
    """A folded list of files and why each was left out; empty where there is none."""
    if not files:
        return ""
    listed = "".join(f"<li><code>{esc(path)}</code>: {esc(reason or 'no reason given')}</li>" for path, reason in files)
    counted = f"1 {one} was" if len(files) == 1 else f"{len(files):,} {many or one + 's'} were"
    return details(f"{counted} left out", f"<ul>{listed}</ul>")
