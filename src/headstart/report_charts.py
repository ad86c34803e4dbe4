"""The report's drawings as inline SVG: coloured by the page's style sheet, so they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from .svg import nice_ticks
from .svg import svg as _svg
from .svg import tag as _tag
from .svg import text as _text
from .verdicts import (
    Record,
    axis_range,
    drawn_epoch,
    epoch_records,
    figure,
    is_mixture,
    kept_record,
    stage_attempts,
)

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 44.0, 42.0
_WIDTH, _HEIGHT = 520.0, 316.0
_GAP = 34.0  # between two stages: room for the line that marks the freeze line's move


# ---- curves ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Where epochs and values land in the drawing: one panel per stage, all with the same vertical axis."""

    panels: tuple[tuple[float, float], ...]  # left and right edge of each stage
    epochs: tuple[int, ...]  # last epoch of each stage
    low: float
    high: float

    @property
    def bottom(self) -> float:
        return _HEIGHT - _BOTTOM

    def x(self, stage: int, epoch: float) -> float:
        left, right = self.panels[stage]
        return left + (right - left) * epoch / max(1, self.epochs[stage])

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - _TOP) * (value - self.low) / (self.high - self.low)


def curves(
    history: Sequence[Record], quantity: str, *, freeze_lines: Sequence[str] = (), baseline: float | None = None
) -> str:
    """Train and validation curve of one quantity over the stages, with the freeze line's moves marked.

    Args:
        quantity: `loss` (nats, axis from 0), `accuracy` or `top5` (percent).
        freeze_lines: where the line stood in each stage.
        baseline: a level to compare with, drawn where it falls inside the axis.
    Returns:
        An SVG element; empty when the history holds no figure of this kind.
    """
    stages = stage_attempts(history)
    values = [figure(r, s, quantity) for r in history for s in ("train", "val")]
    if not np.isfinite(values).any():
        return ""
    frame = _frame(stages, quantity)
    parts = [_axes(frame, share=quantity != "loss")]
    parts += [_stage_label(frame, i, stages[i][0][0], freeze_lines) for i in range(len(stages))]
    if baseline is not None and frame.low < baseline < frame.high:
        left, right = frame.panels[0][0], frame.panels[-1][1]
        parts.append(_tag("line", x1=left, x2=right, y1=frame.y(baseline), y2=frame.y(baseline), class_="level"))
        parts.append(_text(right, frame.y(baseline) - 4, "always the largest class", class_="small", text_anchor="end"))
    clip = f"clip-{quantity}"
    box = _tag("rect", x=_LEFT, y=_TOP - 9, width=_WIDTH - _LEFT, height=frame.bottom - _TOP + 13)
    parts.append(_tag("defs", _tag("clipPath", box, id=clip)))
    lines = [_stage_lines(frame, i, attempts, quantity) for i, attempts in enumerate(stages)]
    parts.append(_tag("g", "".join(lines) + _kept_mark(frame, stages, history, quantity), clip_path=f"url(#{clip})"))
    title = f"{_NAMES[quantity]} of training and validation pictures after each epoch"
    return _svg(_WIDTH, _HEIGHT, "".join(parts), title)


_NAMES = {"loss": "Loss", "accuracy": "Accuracy", "top5": "Top-5 accuracy"}


def _frame(stages: Sequence[Sequence[Sequence[Record]]], quantity: str) -> _Frame:
    epochs = tuple(max(1, *(drawn_epoch(r) for a in attempts for r in a)) for attempts in stages)
    room = _WIDTH - _LEFT - _RIGHT - _GAP * (len(stages) - 1)
    # The square root keeps a short stage readable beside a long one.
    weights = np.sqrt(np.array(epochs, dtype=float) + 1)
    widths = room * weights / weights.sum()
    lefts = _LEFT + np.concatenate([[0.0], np.cumsum(widths[:-1] + _GAP)])
    low, high = axis_range(stages, quantity)
    return _Frame(tuple((float(a), float(a + w)) for a, w in zip(lefts, widths, strict=True)), epochs, low, high)


def _axes(frame: _Frame, *, share: bool) -> str:
    parts = []
    right = frame.panels[-1][1]
    ticks = nice_ticks(frame.low, frame.high)
    digits = next((d for d in range(4) if all(abs(t - round(t, d)) < 1e-9 for t in ticks)), 4)
    for tick in ticks:
        y = frame.y(tick)
        parts.append(_tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
        words = f"{100 * tick:g} %" if share else f"{tick:.{digits}f}"
        parts.append(_text(_LEFT - 6, y + 4, words, text_anchor="end"))
    for stage, (left, edge) in enumerate(frame.panels):
        parts.append(_tag("line", x1=left, x2=edge, y1=frame.bottom, y2=frame.bottom, class_="axis"))
        count = max(1, min(8, int((edge - left) / 40)))
        for tick in nice_ticks(0, frame.epochs[stage], count, whole=True):
            x = frame.x(stage, tick)
            parts.append(_tag("line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4, class_="axis"))
            parts.append(_text(x, frame.bottom + 17, f"{tick:g}", text_anchor="middle"))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 3, "epoch of the stage", text_anchor="middle", class_="small"))
    return "".join(parts)


def _shorten(words: str, room: float) -> str:
    """Cut to about `room` pixels at the small size."""
    letters = max(4, int(room / 6.2))
    return words if len(words) <= letters else words[: letters - 1] + "…"


def _stage_label(frame: _Frame, stage: int, first: Record, freeze_lines: Sequence[str]) -> str:
    left, right = frame.panels[stage]
    parts = [_text(left, 13, _shorten(str(first.get("stage", stage + 1)), right - left), class_="name")]
    if stage < len(freeze_lines):
        long, short = (f"{words}: {freeze_lines[stage]}" for words in ("freeze line", "line"))
        words = long if _shorten(long, right - left) == long else _shorten(short, right - left)
        parts.append(_text(left, 29, words, class_="small"))
    if stage:
        x = left - _GAP / 2
        moved = stage < len(freeze_lines) and freeze_lines[stage] != freeze_lines[stage - 1]
        words = (
            f"The freeze line moves from {freeze_lines[stage - 1]} to {freeze_lines[stage]}" if moved else "Next stage"
        )
        kind = "move" if moved else "grid"
        line = _tag("line", x1=x, x2=x, y1=4.0, y2=frame.bottom, class_=kind)
        parts.append(_tag("g", _tag("title", escape(words)) + line))
    return "".join(parts)


def _stage_lines(frame: _Frame, stage: int, attempts: Sequence[Sequence[Record]], quantity: str) -> str:
    parts = []
    for number, attempt in enumerate(attempts):
        counts = number == len(attempts) - 1
        for split in ("train", "val"):
            epochs = epoch_records(attempt)
            points = [(frame.x(stage, drawn_epoch(r)), figure(r, split, quantity), r) for r in epochs]
            points = [(x, v, r) for x, v, r in points if math.isfinite(v)]
            path = " ".join(f"{x:.1f},{frame.y(v):.1f}" for x, v, _ in points)
            if len(points) > 1:
                parts.append(_tag("polyline", points=path, class_=f"{split}{'' if counts else ' undone'}"))
            radius = 2.6 if len(points) <= 40 else 1.4
            for x, v, r in points if counts else ():
                words = f"{_SPLITS[split]}, epoch {r.get('epoch')}: {v:.4g}"
                dot = _tag("circle", _tag("title", escape(words)), cx=x, cy=frame.y(v), r=radius, class_=f"{split} dot")
                parts.append(dot)
        named: Counter[int] = Counter()  # the names of several events of one epoch stand one above the other
        for record in attempt:
            if is_drawn_event(record):
                epoch = drawn_epoch(record)
                parts.append(_event_mark(frame, stage, record, low=quantity != "loss", line=named[epoch]))
                named[epoch] += 1
    return "".join(parts)


_SPLITS = {"train": "training", "val": "validation"}
_EVENTS = {
    "collapse": "collapse",
    "rollback": "rolled back",
    "early-stop": "early stop",
    "interrupted": "stopped",
    "wise": "mixed",
    "warm-start": "ridge",
    "out-of-memory": "smaller batches",
    "batch-size": "batch size",
}


def is_drawn_event(record: Record) -> bool:
    """Whether something happened that the curves mark; a look at mixtures that kept the start or an epoch is none."""
    event = record.get("event") or {}
    return bool(event) and not (is_mixture(record) and event.get("alpha") in (0, 1))


def _event_mark(frame: _Frame, stage: int, record: Record, *, low: bool, line: int) -> str:
    event = record["event"]
    x, words = frame.x(stage, drawn_epoch(record)), _EVENTS.get(event.get("kind"), str(event.get("kind")))
    room_right = frame.panels[stage][1] - x
    anchor, dx = ("start", 5) if room_right > 70 else ("end", -5)
    mark = _tag("line", x1=x, x2=x, y1=_TOP, y2=frame.bottom, class_="event")
    y = frame.bottom - 6 - 12 * line if low else _TOP + 9 + 12 * line  # where the curves are not
    label = _text(x + dx, y, words, class_="small eventname", text_anchor=anchor)
    return _tag("g", _tag("title", escape(str(event.get("message", words)))) + mark + label)


def _kept_mark(
    frame: _Frame, stages: Sequence[Sequence[Sequence[Record]]], history: Sequence[Record], quantity: str
) -> str:
    kept = kept_record(history)
    for stage, attempts in enumerate(stages):
        if kept is not None and any(record is kept for attempt in attempts for record in attempt):
            value = figure(kept, "val", quantity)
            if math.isfinite(value):
                words = _tag("title", "the state that was kept")
                return _tag(
                    "circle", words, cx=frame.x(stage, drawn_epoch(kept)), cy=frame.y(value), r=7.0, class_="kept"
                )
    return ""


# ---- intervals -------------------------------------------------------------------------------------------------


def interval_scale(value: float, interval: Sequence[float], baseline: float) -> str:
    """The headline figure on a scale from 0 to 100 %: its 95 % interval, and what guessing would reach."""
    width, height, pad = 520.0, 74.0, 12.0

    def x(share: float) -> float:
        return pad + (width - 2 * pad) * share

    low, high = interval
    # The label may not stick out of the drawing where the baseline lies near an end.
    anchor = "start" if baseline < 0.15 else "end" if baseline > 0.85 else "middle"
    parts = [
        _tag("line", x1=x(0), x2=x(1), y1=36.0, y2=36.0, class_="axis"),
        *(_text(x(t), 62, f"{100 * t:g} %", text_anchor="middle") for t in (0.25, 0.5, 0.75)),
        _text(x(0), 62, "0 %"),
        _text(x(1), 62, "100 %", text_anchor="end"),
        *(_tag("line", x1=x(t), x2=x(t), y1=36.0, y2=42.0, class_="axis") for t in (0.0, 0.25, 0.5, 0.75, 1.0)),
        _tag("rect", x=x(low), y=28.0, width=max(3.0, x(high) - x(low)), height=16.0, rx=3, class_="interval"),
        _tag("line", x1=x(baseline), x2=x(baseline), y1=20.0, y2=46.0, class_="level"),
        _text(x(baseline), 13, "largest class", class_="small", text_anchor=anchor),
        _tag("circle", cx=x(value), cy=36.0, r=6.0, class_="val dot"),
    ]
    low, high, value, baseline = (100 * share for share in (low, high, value, baseline))
    title = f"{value:.1f} %, 95 % interval {low:.1f} to {high:.1f} %, largest class {baseline:.1f} %"
    return _svg(width, height, "".join(parts), title)


def interval_bar(value: float, interval: Sequence[float]) -> str:
    """A small interval from 0 to 1 for a table row, in a drawing of 120 x 14."""
    low, high = (4 + 112 * v for v in interval)
    line = _tag("line", x1=4, x2=116, y1=7, y2=7, class_="grid")
    bar = _tag("rect", x=low, y=4.0, width=max(1.5, high - low), height=6.0, rx=2, class_="interval")
    dot = _tag("circle", cx=4 + 112 * value, cy=7, r=3.5, class_="val dot")
    return f'<svg class="bar" viewBox="0 0 120 14" aria-hidden="true">{line}{bar}{dot}</svg>'


def freeze_strip(frozen: int, trained: int) -> str:
    """Frozen and trained share of the parameters, input side left, with the freeze line between them.

    A trained head of a few thousand among millions would vanish: each present part gets at least 4 % of the width.
    """
    total = max(1, frozen + trained)
    share = frozen / total
    if frozen and trained:
        share = min(0.96, max(0.04, share))
    x = 2 + 196 * share
    parts = [
        _tag("rect", x=2.0, y=3.0, width=x - 2, height=10.0, class_="frozen") if frozen else "",
        _tag("rect", x=x, y=3.0, width=198 - x, height=10.0, class_="trained") if trained else "",
        _tag("line", x1=x, x2=x, y1=0.0, y2=16.0, class_="line"),
    ]
    words = f"{frozen:,} parameters frozen, {trained:,} trained"
    return f'<svg class="strip" viewBox="0 0 200 16" role="img" aria-label="{words}">{"".join(parts)}</svg>'


# ---- confusion -------------------------------------------------------------------------------------------------


def confusion_map(confusion: NDArray[np.int64], class_names: Sequence[str]) -> str:
    """Confusion matrix as a heat map with a logarithmic scale: the diagonal in one hue, mistakes in another.

    Up to 20 classes the cells carry their counts; beyond that the pattern is what can be read, and the counts
    are in each cell's tooltip.
    """
    classes = len(class_names)
    cell = max(9.0, min(84.0, 620 / classes))
    size = min(13.0, cell * 0.92)
    letters = 22
    names = [name if len(name) <= letters else name[: letters - 1] + "…" for name in class_names]
    label = 10 + size * 0.6 * max(map(len, names), default=1)
    steep = classes > 6 or size * 0.6 * max(map(len, names)) > cell - 4
    left, top = label + 20, (label * 0.95 if steep else size + 8) + 22
    angle = -60 if classes <= 30 else -90  # turned less, the names of narrow columns would overlap
    width = left + cell * classes + (label * 0.5 if steep and angle > -90 else 0) + 4
    height = top + cell * classes + 6
    shade = log_shades(confusion)
    parts = [_text(left, 12, "predicted →", class_="small"), _text(0, top - 6, "true ↓", class_="small")]
    parts += [_cell(confusion, shade, r, c, left, top, cell, class_names) for r, c in _cells(confusion)]
    if classes <= 20:
        parts += [_count(confusion, shade, r, c, left, top, cell) for r, c in _cells(confusion)]
    for i, name in enumerate(names):
        middle = cell * (i + 0.5)
        parts.append(
            _text(left - 6, top + middle + size * 0.35, name, text_anchor="end", style=f"font-size:{size:.1f}px")
        )
        x, y = left + middle, top - 6
        turned = x + size * 0.33
        turn = {"transform": f"rotate({angle} {turned:.1f} {y:.1f})", "x": turned} if steep else {"x": x}
        anchor = "start" if steep else "middle"
        parts.append(_tag("text", escape(name), y=y, text_anchor=anchor, style=f"font-size:{size:.1f}px", **turn))
    frame = _tag("rect", x=left, y=top, width=cell * classes, height=cell * classes, class_="outline")
    title = (
        f"Confusion matrix of {classes} classes: {int(np.trace(confusion))} of {int(confusion.sum())} on the diagonal"
    )
    svg = _svg(width, height, "".join(parts) + frame, title, class_="chart confusion")
    return svg.replace(
        'style="max-width', f'style="min-width:{width * (0.85 if classes > 40 else 0.62):.0f}px;max-width'
    )


def log_shades(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shade of each cell, 0 for none to 1 for the largest count, by log(1 + count): one mistake stays visible."""
    top = max(1, int(confusion.max(initial=0)))
    return np.asarray(np.log1p(confusion) / math.log1p(top), dtype=np.float64)


def _cells(confusion: NDArray[np.int64]) -> list[tuple[int, int]]:
    return [(int(r), int(c)) for r, c in zip(*np.nonzero(confusion), strict=True)]


def _cell(
    confusion: NDArray[np.int64], shade: NDArray[np.float64], r: int, c: int, left: float, top: float, cell: float,
    names: Sequence[str],
) -> str:  # fmt: skip
    words = f"{names[r]} taken for {names[c]}: {confusion[r, c]}" if r != c else f"{names[r]}: {confusion[r, c]} right"
    return _tag(
        "rect",
        _tag("title", escape(words)),
        x=left + cell * c,
        y=top + cell * r,
        width=cell,
        height=cell,
        class_="right" if r == c else "wrong",
        fill_opacity=0.12 + 0.88 * float(shade[r, c]),
    )


def _count(
    confusion: NDArray[np.int64], shade: NDArray[np.float64], r: int, c: int, left: float, top: float, cell: float
) -> str:
    strong = 0.12 + 0.88 * shade[r, c] > 0.6
    size = min(14.0, cell * 0.42)
    x, y = left + cell * (c + 0.5), top + cell * (r + 0.5) + size * 0.35
    kind = "count strong" if strong else "count"
    return _text(x, y, str(confusion[r, c]), text_anchor="middle", style=f"font-size:{size:.1f}px", class_=kind)


def shade_legend(confusion: NDArray[np.int64], *, wrong: bool) -> str:
    """The shades of a few counts, to read the heat map by."""
    top = max(1, int(confusion.max(initial=0)))
    counts = sorted({1, *(10**p for p in range(1, 9) if 10**p < top), top})
    kind, words = ("wrong", "mistakes") if wrong else ("right", "right")
    parts = []
    for i, count in enumerate(counts):
        opacity = 0.12 + 0.88 * math.log1p(count) / math.log1p(top)
        parts.append(_tag("rect", x=46.0 * i, y=0.0, width=46.0, height=14.0, class_=kind, fill_opacity=opacity))
        parts.append(_text(46 * i + 23, 27, f"{count:,}", text_anchor="middle", class_="small"))
    parts.append(_text(46 * len(counts) + 8, 12, words, class_="small"))
    return f'<svg class="legend" width="{46 * len(counts) + 80}" height="30" aria-hidden="true">{"".join(parts)}</svg>'
