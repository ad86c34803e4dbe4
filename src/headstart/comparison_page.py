"""The page of a comparison: one self-contained HTML file, from compare.json and the run folders beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import write_atomic
from .report_charts import freeze_strip
from .report_page import NONE, duration, esc, facts, number, page, percent, section, span, table
from .run_record import read_run
from .svg import nice_ticks, svg, tag, text
from .verdicts import Record, axis_range, drawn_epoch, figure, is_mixture, kept_record, stage_attempts

Entry = Mapping[str, Any]

_ARROW = " \u2192 "
_LIGHT = ("#0b6e78", "#c2570c", "#6a4fb3", "#2b6cb0", "#9d2a7d", "#4d7c0f", "#8a6100", "#b3261e")
_DARK = ("#4cc3cd", "#f0954a", "#b5a1f5", "#7db6f0", "#ee8fd0", "#a3cf5f", "#e3b341", "#ff8a80")


def _style() -> str:
    rules = []
    for i, color in enumerate(_LIGHT):
        rules.append(f":root{{--r{i}:{color}}} .r{i}{{--c:var(--r{i})}}")
    dark = "".join(f"--r{i}:{color};" for i, color in enumerate(_DARK))
    rules.append(f"@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}")
    rules.append(
        "svg .series polyline{stroke:var(--c)} svg .series circle,svg .series rect{fill:var(--c)}"
        "svg .series polyline.t{stroke-width:1.3;stroke-dasharray:5 4;opacity:.6}"
        "svg .series polyline.other{stroke-width:1.1;opacity:.35}"
        "svg .series circle.ring{fill:var(--paper);stroke:var(--c);stroke-width:2.2}"
        "svg .series .moved{stroke:var(--c);stroke-width:2.2} svg .series rect.span{opacity:.3}"
        "svg .series text{font-weight:600}"
        ".swatch{display:inline-block;width:.8em;height:.8em;border-radius:2px;background:var(--c);"
        "margin-right:.5em;vertical-align:-.05em}"
        ".lead{font-size:1.35rem;line-height:1.35;margin:10px 0 4px;font-weight:600;max-width:46ch}"
        ".cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:28px 36px}"
        "@media (min-width:721px){.cards.two{grid-template-columns:repeat(2,minmax(0,1fr))}} a{color:var(--val)}"
        ".cards h3{margin:0 0 2px;border-top:3px solid var(--c);padding-top:8px}"
        ".cards .soft{font-size:.88rem;margin:0 0 8px} .cards p{font-size:.93rem;margin:0 0 8px}"
        ".cards .answer{font-weight:650} .pairs li{margin:0 0 6px;max-width:86ch} .pairs{padding-left:1.1em}"
        ".charts figcaption{font-size:1rem}"
        "@media (min-width:561px){.narrow{display:none}} @media (max-width:560px){.broadly{display:none}}"
    )
    return "\n".join(rules)


def write_comparison(folder: str | Path) -> Path:
    """Write compare.html into the folder of a comparison and return its path.

    Raises:
        CheckpointError: no compare.json of ours, or a run of it that cannot be read.
    """
    folder = Path(folder)
    try:
        results = json.loads((folder / "compare.json").read_bytes())
        entries = results["recipes"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: not the folder of a finished comparison ({error}).") from None
    histories = {e["name"]: [read_run(folder / run).history for run in e["runs"]] for e in entries}
    path = folder / "compare.html"
    write_atomic(path, render_comparison(results, histories).encode("utf-8", errors="replace"))
    return path


def render_comparison(results: Mapping[str, Any], histories: Mapping[str, Sequence[Sequence[Record]]]) -> str:
    """The page as HTML text.

    Args:
        histories: by recipe, the history records of each of its runs, in the order of the seeds.
    """
    content = (
        _head(results),
        _words(results),
        _curves(results, histories),
        _figures(results),
        _pairs(results),
        _how(results),
        "<footer>Written by headstart. This file loads nothing from anywhere.</footer>",
    )
    name = Path(results["root"]).name or "pictures"
    return page(f"{name}: headstart comparison", "\n".join(content), style=_style())


def _head(results: Mapping[str, Any]) -> str:
    entries, n = results["recipes"], results["n"]
    chosen = next(e for e in entries if e["name"] == results["chosen"])
    others = [p for p in results["pairs"] if results["chosen"] in (p["a"], p["b"])]
    behind = [p for p in others if p["shown"] and (p["difference"] > 0) == (p["a"] == results["chosen"])]
    ahead = [p for p in others if p["shown"] and p not in behind]
    alike = [p for p in others if not p["shown"]]

    def names(pairs: Sequence[Mapping[str, Any]]) -> str:
        return _listed([p["b"] if p["a"] == results["chosen"] else p["a"] for p in pairs])

    words = f"{esc(chosen['name'])} has the best validation loss and gets {percent(chosen['test']['accuracy'])} of the "
    words += "test pictures right"
    parts = [f"better than {names(behind)}"] if behind else []
    parts += [f"worse than {names(ahead)}"] if ahead else []
    parts += [f"no different from {names(alike)} as far as {n['test']:,} pictures can show"] if alike else []
    lead = f"{words}{': ' + '; '.join(parts) if parts else ''}."
    pairs = [
        ("Backbone", esc(results["settings"]["backbone"])),
        ("Classes", f"{len(results['class_names']):,}"),
        ("Pictures", f"{n['train']:,} train, {n['val']:,} validation, {n['test']:,} test"),
        ("Seeds", _listed([str(s) for s in results["seeds"]])),
        ("Training, all runs", duration(_spent(entries))),
    ]
    name = Path(results["root"]).name or "pictures"
    return (
        f"<header><h1>headstart comparison: {esc(name)}</h1><p class='lead'>{lead}</p>"
        f"{_forest(entries, results['majority_baseline'])}{facts(pairs)}</header>"
    )


def _spent(entries: Sequence[Entry]) -> float:
    """Seconds that training all runs has taken, in whichever call; what several runs share counts once."""
    return float(sum(sum(e["seconds"]) - sum(e["shared_seconds"]) for e in entries))


def _listed(names: Sequence[str]) -> str:
    return esc(", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names))


def _color(i: int) -> str:
    return f"r{i % len(_LIGHT)}"


# ---- drawings --------------------------------------------------------------------------------------------------


def _forest(entries: Sequence[Entry], baseline: float) -> str:
    """Test accuracy of each recipe with its interval, drawn for a page and for a phone; the page shows what fits."""
    broad = _forest_of(entries, baseline, width=860, left=150, letters=20, ticks=6, class_="broadly")
    return broad + _forest_of(entries, baseline, width=400, left=96, letters=11, ticks=3, class_="narrow")


def _forest_of(
    entries: Sequence[Entry], baseline: float, *, width: float, left: float, letters: int, ticks: int, class_: str
) -> str:
    """One row for each recipe, on one axis that the intervals and the seeds fill."""
    right, row = 70.0, 30.0
    drawn = [share for e in entries for share in (*e["test"]["accuracy_ci95"], *e["test"]["accuracy_per_seed"])]
    low, high = min(drawn), max(drawn)
    low, high = max(0.0, low - 0.03), min(1.0, high + 0.02)
    bottom = 12 + row * len(entries)

    def x(share: float) -> float:
        return float(left + (width - left - right) * (share - low) / (high - low))

    parts = []
    for tick in nice_ticks(low, high, ticks):
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=8.0, y2=bottom, class_="grid"))
        parts.append(text(x(tick), bottom + 17, f"{100 * tick:g} %", text_anchor="middle"))
    if low < baseline < high:
        parts.append(tag("line", x1=x(baseline), x2=x(baseline), y1=8.0, y2=bottom, class_="level"))
        parts.append(text(x(baseline), bottom + 33, "largest class", text_anchor="middle", class_="small"))
    for i, e in enumerate(entries):
        y = 12 + row * (i + 0.5)
        a, b = e["test"]["accuracy_ci95"]
        value = e["test"]["accuracy"]
        bar = tag("rect", x=x(a), y=y - 6, width=max(2.0, x(b) - x(a)), height=12.0, rx=3, class_="span")
        dot = tag("circle", cx=x(value), cy=y, r=5.5)
        seeds = "".join(tag("circle", cx=x(v), cy=y, r=1.8) for v in e["test"]["accuracy_per_seed"])
        label = text(left - 12, y + 4, _short(e["name"], letters), text_anchor="end")
        figure_ = text(width - right + 10, y + 4, f"{100 * value:.1f} %")
        parts.append(tag("g", bar + seeds + dot + label + figure_, class_=f"series {_color(i)}"))
    title = "Test accuracy with 95 % interval: " + "; ".join(
        f"{e['name']} {100 * e['test']['accuracy']:.1f} %" for e in entries
    )
    height = bottom + (38 if low < baseline < high else 24)
    return f'<figure class="{class_}">{svg(width, height, "".join(parts), title)}</figure>'


def _short(words: str, letters: int) -> str:
    return words if len(words) <= letters else words[: letters - 1] + "\u2026"


def _curves(results: Mapping[str, Any], histories: Mapping[str, Sequence[Sequence[Record]]]) -> str:
    names = [e["name"] for e in results["recipes"]]
    drawn = [
        f"<figure><figcaption>{title}</figcaption>{_curve_chart(names, histories, quantity)}</figure>"
        for quantity, title in (("loss", "Loss (nats)"), ("accuracy", "Accuracy"))
    ]
    keys = "".join(
        f'<span class="{_color(i)}"><i class="swatch"></i>{esc(name)}</span>' for i, name in enumerate(names)
    )
    others = " Pale lines: the other seeds." if len(results["seeds"]) > 1 else ""
    note = (
        "<p class='note'>Validation pictures, solid; training pictures, dashed; both scored in evaluation mode on "
        "plain pictures. A ring marks the state that was kept, a vertical stroke the place where the next stage begins "
        f"and the freeze line moves.{others} Recipes with one head stage share its line; one that leaves the frame "
        "starts or ends beyond it.</p>"
    )
    return section(
        "How they learned", f'<p class="keys note">{keys}</p><div class="charts">{"".join(drawn)}</div>', note
    )


def _curve_chart(names: Sequence[str], histories: Mapping[str, Sequence[Sequence[Record]]], quantity: str) -> str:
    left, top, width, height, foot = 50.0, 10.0, 560.0, 330.0, 40.0
    stages = [stage for name in names for history in histories[name] for stage in stage_attempts(history)]
    low, high = axis_range(stages, quantity)
    epochs = max(sum(_length(s) for s in stage_attempts(h)) for name in names for h in histories[name])
    bottom, right = height - foot, width - 12

    def x(epoch: float) -> float:
        return left + (right - left) * epoch / max(1, epochs)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = []
    for tick in nice_ticks(low, high):
        parts.append(tag("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        words = f"{100 * tick:g} %" if quantity == "accuracy" else f"{tick:g}"
        parts.append(text(left - 7, y(tick) + 4, words, text_anchor="end"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    for tick in nice_ticks(0, epochs, 8, whole=True):
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(text(x(tick), bottom + 17, f"{tick:g}", text_anchor="middle"))
    parts.append(text((left + right) / 2, height - 4, "epoch", text_anchor="middle", class_="small"))
    clip = f"compare-{quantity}"
    box = tag("rect", x=left - 3, y=top - 4, width=right - left + 8, height=bottom - top + 5)
    parts.append(tag("defs", tag("clipPath", box, id=clip)))
    lines = []
    for i, name in enumerate(names):
        drawn = [_series(history, quantity, x, y, first=k == 0) for k, history in enumerate(histories[name])]
        lines.append(tag("g", "".join(reversed(drawn)), class_=f"series {_color(i)}"))
    parts.append(tag("g", "".join(lines), clip_path=f"url(#{clip})"))
    return svg(width, height, "".join(parts), f"{quantity} after each epoch of {', '.join(names)}")


def _length(attempts: Sequence[Sequence[Record]]) -> int:
    return max(map(drawn_epoch, attempts[-1]))


def _series(history: Sequence[Record], quantity: str, x: Any, y: Any, *, first: bool) -> str:
    """One run: its validation and training curve, stage after stage, with the moves of the line and the kept state."""
    parts, start, kept = [], 0, kept_record(history)
    points: dict[str, list[str]] = {"train": [], "val": []}
    marks = ""
    for attempts in stage_attempts(history):
        for record in attempts[-1]:
            at = start + drawn_epoch(record)
            for split in () if is_mixture(record) else points:
                value = figure(record, split, quantity)
                if math.isfinite(value):
                    points[split].append(f"{x(at):.1f},{y(value):.1f}")
            value = figure(record, "val", quantity)
            if record is kept and math.isfinite(value):
                marks += tag("circle", cx=x(at), cy=y(value), r=5.0, class_="ring")
            if start and record is attempts[-1][0] and math.isfinite(value):
                marks += tag("line", x1=x(at), x2=x(at), y1=y(value) - 7, y2=y(value) + 7, class_="moved")
        start += _length(attempts)
    for split, kind in (("train", "t"), ("val", "v")):
        if first or split == "val":
            parts.append(tag("polyline", points=" ".join(points[split]), class_=kind if first else "other"))
    return "".join(parts) + (marks if first else "")


# ---- tables and words ------------------------------------------------------------------------------------------


def budget_words(entry: Entry) -> str:
    """`30 + 8 epochs at 224 px`."""
    epochs, size = entry["budget"]["epochs"], entry["budget"]["image_size"]
    return f"{' + '.join(map(str, epochs))} epochs at {size} px"


def _swatch(i: int, name: str) -> str:
    return f'<span class="{_color(i)}"><i class="swatch"></i>{esc(name)}</span>'


def _figures(results: Mapping[str, Any]) -> str:
    entries = results["recipes"]
    cost = [
        (
            _swatch(i, e["name"]),
            esc(budget_words(e)),
            f"<code>{esc(_ARROW.join(e['freeze_lines']))}</code>",
            f"{freeze_strip(e['frozen_parameters'], e['trained_parameters'])}<br><span class='soft'>"
            f"{e['trained_parameters']:,} of {e['frozen_parameters'] + e['trained_parameters']:,}</span>",
            duration(sum(e["seconds"]) / len(e["seconds"])),
            f'<a href="{esc(e["runs"][0])}/report.html">report</a>',
        )
        for i, e in enumerate(entries)
    ]
    scores = [
        (
            _swatch(i, e["name"]),
            number(e["val"]["log_loss"]),
            percent(e["val"]["accuracy"]),
            number(e["test"]["log_loss"]),
            percent(e["test"]["accuracy"]),
            span(e["test"]["accuracy_ci95"]),
            percent(e["test"]["top5"]) if e["test"]["top5"] is not None else NONE,
            percent(e["test"]["weighted_precision"]),
            percent(e["test"]["weighted_recall"]),
        )
        for i, e in enumerate(entries)
    ]
    header = ("Recipe", "Validation loss", "Validation accuracy", "Test loss", "Test accuracy", "95\u00a0% interval",
              "Test top-5", "Weighted precision", "Weighted recall")  # fmt: skip
    events = [f"<li><strong>{esc(e['name'])}</strong>: {esc(m)}</li>" for e in entries for m in e["events"]]
    mean = " Figures are means over the seeds." if len(results["seeds"]) > 1 else ""
    return section(
        "What it cost and what it gave",
        table(
            ("Recipe", "Budget", "Freeze line", "Frozen | trained parameters", "Time, alone", ""),
            cost,
            label="cost of each recipe",
            numbers=(4,),
        ),
        "<h3>Scores</h3>",
        table(header, scores, label="scores of each recipe", numbers=range(1, len(header))),
        "<p class='note'>Time, alone: what a run takes by itself; here equal parts were computed once. Features that"
        f" the cache had from earlier calls are not counted.{mean}</p>",
        f"<h3>Events</h3><ul>{''.join(events)}</ul>" if events else "",
    )


def _words(results: Mapping[str, Any]) -> str:
    cards = []
    for i, e in enumerate(results["recipes"]):
        lines = "".join(map(_verdict_line, e["verdicts"]))
        cards.append(
            f'<div class="{_color(i)}"><h3>{esc(e["name"])}</h3><p class="soft">{esc(budget_words(e))}, '
            f"{e['trained_parameters']:,} parameters trained</p>{lines}</div>"
        )
    two = " two" if len(cards) in (2, 4) else ""
    return section("In words", f'<div class="cards{two}">{"".join(cards)}</div>')


def _verdict_line(verdict: Mapping[str, Any]) -> str:
    kind = {True: "good", False: "bad", None: "open"}[verdict["good"]]
    of = f' <span class="soft">({esc(verdict["of"])})</span>' if verdict["of"] else ""
    answer = f'<span class="answer">{esc(verdict["answer"].capitalize())}.</span>'
    return f'<p class="{kind}"><strong>{esc(verdict["question"])}</strong> {answer} {esc(verdict["sentence"])}{of}</p>'


def _pairs(results: Mapping[str, Any]) -> str:
    if not results["pairs"]:
        return ""
    items = "".join(f"<li>{esc(p['sentence'])}</li>" for p in results["pairs"])
    rows = [
        (
            f"{esc(p['a'])} against {esc(p['b'])}",
            f"{p['a_only']:.1f} | {p['b_only']:.1f}".replace(".0", ""),
            f"{100 * p['difference']:+.1f}",
            f"{100 * p['low']:+.1f} to {100 * p['high']:+.1f}",
            f"{p['p_adjusted']:.3f}",
            "yes" if p["shown"] else "no",
        )
        for p in results["pairs"]
    ]
    header = ("Pair", "Right in one only", "Points", "95\u00a0% interval", "p, adjusted", "Shown")
    return section(
        "Which differences are real",
        f"<ul class='pairs'>{items}</ul>",
        table(header, rows, label="pairs of recipes", numbers=range(1, 5)),
        "<p class='note'>Both recipes answer the same test pictures, so only those count that one of them alone gets "
        "right: McNemar's exact test for one seed, turning signs at random for the mean of several; p adjusted for the "
        "number of pairs (Holm). Shown: p is below 0.05 and the interval leaves 0 out. It tells how far other pictures "
        "could change the answer, not other trainings.</p>",
    )


def _how(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    return section(
        "How it was measured",
        "<p>All runs share one split; the seeds move first weights, order and augmentation. The validation split "
        "chooses each run's best state and the recipe named at the top; the test split is scored once per run.</p>",
        facts([(esc(key), esc(value)) for key, value in settings.items()]),
    )
