"""The page of a shoot-out: one self-contained HTML file from shootout.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import write_atomic
from .report_page import NONE, duration, esc, facts, number, page, percent, section, span, table
from .svg import nice_ticks, svg, tag, text

Row = Mapping[str, Any]

WORSE = 1.1  # a probe's penalty is chosen on the pictures that score it: so much better it may look by that alone

_STYLE = """
.lead{font-size:1.35rem;line-height:1.35;margin:10px 0 4px;font-weight:600;max-width:46ch}
svg circle.probe{fill:var(--paper);stroke:var(--val);stroke-width:2.2}
svg circle.tuned{fill:var(--train)} svg .rise{stroke:var(--train);stroke-width:1.6}
svg polyline.front{stroke:var(--val);stroke-width:1.6;stroke-dasharray:5 4;opacity:.7}
.wide + .note{margin-top:12px} svg .chosen{font-weight:700}
.pairs li{margin:0 0 6px;max-width:86ch} .pairs{padding-left:1.1em}
a{color:var(--val)} .charts figcaption{font-size:1rem}
"""


def write_shootout(folder: str | Path) -> Path:
    """Write shootout.html into the folder of a shoot-out and return its path.

    Raises:
        CheckpointError: no shootout.json of a finished one.
    """
    folder = Path(folder)
    try:
        results = json.loads((folder / "shootout.json").read_bytes())
        html = render_shootout(results)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: not the folder of a finished shoot-out ({error}).") from None
    path = folder / "shootout.html"
    write_atomic(path, html.encode("utf-8", errors="replace"))
    return path


def render_shootout(results: Mapping[str, Any]) -> str:
    """The page as HTML text, from the content of shootout.json."""
    name = Path(results["root"]).name or "pictures"
    content = (
        _head(results, name),
        _pictures(results),
        _figures(results),
        _pairs(results),
        _how(results),
        "<footer>Written by headstart. This file loads nothing from anywhere.</footer>",
    )
    return page(f"{name}: headstart shoot-out", "\n".join(content), style=_STYLE)


def ranked(results: Mapping[str, Any]) -> list[Row]:
    """The chosen one first, then those fine-tuned and those only probed by validation loss, then the others."""

    def key(row: Row) -> tuple[int, float]:
        if "fine_tuned" in row:
            return 0, row["fine_tuned"]["log_loss"]
        return (1, row["probe"]["log_loss"]) if "probe" in row else (2, 0.0)

    return sorted(results["entrants"], key=key)


def seen_words(row: Row) -> str:
    """What to know of a run folder that has met the pictures which score it here; empty where it has not."""
    seen = row.get("seen") or {}
    met = [f"{n:,} {words}" for part, words in (("val", "validation"), ("test", "test")) if (n := seen.get(part, 0))]
    what = f"{' and '.join(met)} picture{'s' * (sum(seen.values()) > 1)}"
    return f"{what} trained this run or chose its state: its figures here are too good." if met else ""


def doubts(results: Mapping[str, Any]) -> list[str]:
    """Sentences on what speaks against the choice: guessing is as good, or fine-tuning has made a backbone worse."""
    test, found = results["test"] or {}, []
    if "majority_baseline" in test and test["accuracy_ci95"][0] <= test["majority_baseline"]:
        found.append(
            f"{results['chosen']} is not shown to be better than always answering the most frequent class, which gives"
            f" {100 * test['majority_baseline']:.1f} % of the test pictures."
        )
    for row in results["entrants"]:
        tuned, probe = (row.get(key, {}).get("log_loss", 0.0) for key in ("fine_tuned", "probe"))
        if tuned > WORSE * probe > 0:
            found.append(
                f"{row['label']} is worse fine-tuned than its probe on frozen features (validation loss {tuned:.3f},"
                f" {probe:.3f}): the recipe may be too short for it, or its rate too high."
            )
    return found


def _head(results: Mapping[str, Any], name: str) -> str:
    chosen = next(row for row in results["entrants"] if row["label"] == results["chosen"])
    n, test = results["n"], results["test"]
    if test:
        score = (
            f"it gets {percent(test['accuracy'])} of {n['test']:,} test pictures right ({span(test['accuracy_ci95'])})"
        )
        lead = f"{esc(chosen['label'])}: fine-tuned, it has the least validation loss; {score}."
    elif "fine_tuned" in chosen:
        lead = (
            f"{esc(chosen['label'])} has the least validation loss, fine-tuned. There is no test split to score it on."
        )
    else:
        lead = f"{esc(chosen['label'])} has the best probe. There was no time to fine-tune any backbone."
    earlier = results.get("earlier_seconds")  # of the fine-tuned runs that were read and not trained
    pairs = [
        ("Backbones", f"{len(results['entrants']):,}"),
        ("Classes", f"{len(results['class_names']):,}"),
        ("Pictures", f"{n['train']:,} train, {n['val']:,} validation, {n['test']:,} test"),
        ("Fine-tuned by recipe", esc(results["recipe"])),
        (
            "Time",
            f"{duration(results['wall_seconds'])} of {results['minutes']:g} min"
            + (f", and {duration(earlier)} of training in earlier calls" if earlier else ""),
        ),
    ]
    return f"<header><h1>headstart shoot-out: {esc(name)}</h1><p class='lead'>{lead}</p>{facts(pairs)}</header>"


# ---- drawings --------------------------------------------------------------------------------------------------


def _pictures(results: Mapping[str, Any]) -> str:
    rows = [row for row in results["entrants"] if "probe" in row]
    drawn = [
        f"<figure><figcaption>{title}</figcaption>{_scatter(rows, cost, kind, unit, results['chosen'])}</figure>"
        for cost, kind, unit, title in (
            ("ms_per_picture", "time", "ms a picture, on this machine", "Validation accuracy against time"),
            ("megabytes", "size", "MB of weights", "Validation accuracy against size"),
        )
    ]
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 34 12">{sign}</svg>{words}</span>'
        for sign, words in (
            (tag("circle", cx=17, cy=6, r=5, class_="probe"), "linear probe"),
            (tag("circle", cx=17, cy=6, r=5, class_="tuned"), "fine-tuned"),
            (tag("polyline", points="0,6 34,6", class_="front"), "best probe at this cost or less"),
        )
    )
    note = (
        "<p class='note'>Left and up is better. The dashed line joins the probes that no cheaper backbone matches (the"
        " Pareto front); time is the network's alone, in float32 and batches of 16.</p>"
    )
    return section(
        "What accuracy costs", f'<p class="keys note">{keys}</p>', f'<div class="charts">{"".join(drawn)}</div>', note
    )


def _scatter(rows: Sequence[Row], cost: str, kind: str, unit: str, chosen: str) -> str:
    left, top, width, height, foot = 56.0, 12.0, 560.0, 340.0, 44.0
    bottom, right = height - foot, width - 16
    shares = [r[k]["accuracy"] for r in rows for k in ("probe", "fine_tuned") if k in r]
    low, high = max(0.0, min(shares) - 0.04), min(1.0, max(shares) + 0.06 * (max(shares) - min(shares)) + 0.02)
    logs = [math.log10(max(r[cost], 1e-6)) for r in rows]
    first, last = min(logs) - 0.2, max(logs) + 0.2

    def x(value: float) -> float:
        return left + (right - left) * (math.log10(max(value, 1e-6)) - first) / (last - first)

    def y(share: float) -> float:
        return float(bottom - (bottom - top) * (share - low) / (high - low))

    parts = []
    for tick in nice_ticks(low, high):
        parts.append(tag("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(text(left - 7, y(tick) + 4, f"{100 * tick:g} %", text_anchor="end"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    for tick in _log_ticks(10**first, 10**last):
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(text(x(tick), bottom + 17, f"{tick:g}", text_anchor="middle"))
    parts.append(text((left + right) / 2, height - 6, unit, text_anchor="middle", class_="small"))
    parts.append(_front(rows, cost, kind, x, y, right))
    for row in rows:
        parts.append(_mark(row, x(row[cost]), y))
    parts += _names(rows, cost, x, y, chosen, (left + right) / 2)
    words = "; ".join(f"{r['label']} {r[cost]:.3g}, {100 * r['probe']['accuracy']:.1f} %" for r in rows)
    return svg(width, height, "".join(parts), f"Accuracy of the probe against {unit}: {words}")


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def _front(rows: Sequence[Row], cost: str, kind: str, x: Any, y: Any, right: float) -> str:
    """Steps: at each cost the best accuracy to be had for it."""
    points, before = [], None
    for row in sorted((r for r in rows if r["front"][kind]), key=lambda r: float(r[cost])):
        at, share = x(row[cost]), y(row["probe"]["accuracy"])
        if before is not None:
            points.append(f"{at:.1f},{before:.1f}")
        points.append(f"{at:.1f},{share:.1f}")
        before = share
    points.append(f"{right:.1f},{before:.1f}")
    return tag("polyline", points=" ".join(points), class_="front")


def _mark(row: Row, at: float, y: Any) -> str:
    probe = y(row["probe"]["accuracy"])
    if "fine_tuned" not in row:
        return tag("circle", cx=at, cy=probe, r=5.0, class_="probe")
    tuned = y(row["fine_tuned"]["accuracy"])
    return (
        tag("line", x1=at, x2=at, y1=probe, y2=tuned, class_="rise")
        + tag("circle", cx=at, cy=probe, r=5.0, class_="probe")
        + tag("circle", cx=at, cy=tuned, r=5.5, class_="tuned")
    )


def _names(rows: Sequence[Row], cost: str, x: Any, y: Any, chosen: str, middle: float) -> list[str]:
    """The labels above their marks, to the side where there is room, moved down where they would cover anything."""
    placed: list[tuple[float, float]] = []
    marks = [
        (x(row[cost]), y(row[kind]["accuracy"])) for row in rows for kind in ("probe", "fine_tuned") if kind in row
    ]
    parts = []
    for row in sorted(rows, key=lambda r: y(_final(r))):
        at, height = x(row[cost]), y(_final(row)) - 9
        wide = 6.5 * len(row["label"])
        begins = at + 7 - wide if at > middle else at - 5
        while any(abs(height - other) < 14 and abs(at - near) < 170 for near, other in placed) or any(
            abs(height - 4 - other) < 10 and begins - 6 < near < begins + wide + 6 for near, other in marks
        ):
            height += 3
        placed.append((at, height))
        anchor = {"text_anchor": "end"} if at > middle else {}
        style = {"class_": "chosen"} if row["label"] == chosen else {}
        parts.append(text(at + (7 if at > middle else -5), height, row["label"], **anchor, **style))
    return parts


def _final(row: Row) -> float:
    return float(row.get("fine_tuned", row["probe"])["accuracy"])


# ---- tables and words ------------------------------------------------------------------------------------------


def _figures(results: Mapping[str, Any]) -> str:
    header = ("Backbone", "Input", "Parameters", "MB", "ms a picture", "Probe: loss", "accuracy", "Front",
              "Fine-tuned: loss", "accuracy", "95\u00a0% interval", "Time")  # fmt: skip
    rows = [_cells(row, row["label"] == results["chosen"]) for row in ranked(results)]
    test = results["test"]
    below = ""
    if test:
        below = (
            f"<p class='note'>All figures of the table are of validation pictures. The test pictures were scored once,"
            f" with {esc(results['chosen'])} alone: {percent(test['accuracy'])} ({span(test['accuracy_ci95'])}), loss"
            f" {number(test['log_loss'])}.</p>"
        )
    return section(
        "Cost and validation score", table(header, rows, label="backbones", numbers=(1, 2, 3, 4, 5, 6, 8, 9, 10, 11)),
        below,
    )  # fmt: skip


def _cells(row: Row, is_chosen: bool) -> tuple[str, ...]:
    name = esc(row["label"])
    if is_chosen:
        name = f"<strong>{name}</strong> (chosen)"
    if "why_not" in row:
        name += (
            f"<br><span class='soft'>{'not fine-tuned' if 'probe' in row else 'left out'}: {esc(row['why_not'])}</span>"
        )
    if seen_words(row):
        name += f"<br><span class='soft'>{esc(seen_words(row))}</span>"
    if "probe" not in row:
        return (name, *([NONE] * 11))
    probe, tuned = row["probe"], row.get("fine_tuned")
    front = " and ".join(kind for kind in ("time", "size") if row["front"][kind]) or NONE
    scores = [NONE] * 4
    if tuned:
        name = f'{name}<br><a href="{esc(row["run"])}/report.html">report</a>'
        scores = [number(tuned["log_loss"]), percent(tuned["accuracy"]), span(tuned["accuracy_ci95"]),
                  duration(tuned["seconds"])]  # fmt: skip
    return (
        name, f"{row['image_size']} px", f"{row['parameters']:,}", f"{row['megabytes']:.1f}",
        f"{row['ms_per_picture']:.1f}", number(probe["log_loss"]), percent(probe["accuracy"]), front, *scores,
    )  # fmt: skip


def _pairs(results: Mapping[str, Any]) -> str:
    lists = (
        ("Which differences are real", [pair["sentence"] for pair in results["pairs"]]),
        ("What speaks against the choice", doubts(results)),
    )
    return "".join(
        section(title, f'<ul class="pairs">{"".join(f"<li>{esc(one)}</li>" for one in sentences)}</ul>')
        for title, sentences in lists
        if sentences
    )


def _how(results: Mapping[str, Any]) -> str:
    most = results["n_probed"]
    return section(
        "How this was done",
        f"<p>Each backbone's frozen features of {most:,} training pictures were computed once, and a ridge classifier"
        " fitted to them in closed form; its penalty, and the ranking, are by the loss on the validation pictures. In"
        f" the order of the ranking backbones were then fine-tuned by the recipe {esc(results['recipe'])}, as many as"
        " the time allowed, and the one with the least validation loss was chosen. Parameters, size and time are the"
        " backbone's, without a head. The test pictures took no part in any choice.</p>",
    )
