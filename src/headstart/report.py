"""The report: one HTML file that shows what a run did and how far its result can be trusted.

Reads the run folder only, and the pictures of the worst mistakes where the data are still in their place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cautions import cautions
from .files import write_atomic
from .report_audit import audit_section
from .report_charts import curves, freeze_strip, interval_scale, is_drawn_event
from .report_page import (
    NONE,
    details,
    duration,
    esc,
    facts,
    long_path,
    number,
    page,
    percent,
    section,
    sentence,
    span,
    table,
)
from .report_results import SPLITS, confusion_section, data_section, mistakes_section, per_class_section
from .run_record import RunRecord, environment, read_run
from .verdicts import Verdict, is_mixture, verdicts

__all__ = ["Verdict", "verdicts", "write_report"]


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path; an interrupted run gets a report of what there is.

    Raises:
        CheckpointError: not a run folder, or a file in it that cannot be read.
    """
    run = read_run(run_folder)
    path = run.path / "report.html"
    write_atomic(path, render_report(run).encode("utf-8", errors="replace"))
    return path


def write_evaluation_report(folder: str | Path) -> Path:
    """Write `report.html` of an evaluation (see `closing.write_evaluation`) and return its path."""
    folder = Path(folder)
    metrics = json.loads((folder / "metrics.json").read_bytes())
    record = RunRecord(folder, recipe={}, environment=environment(), history=[], metrics=metrics, model={})
    scored = metrics["test"]
    seen = ""
    if metrics["seen"]:
        pictures = f"{metrics['seen']:,} of these {scored['n']:,} pictures"
        words = f"{pictures} were trained on or chose the model: the figures are too good."
        seen = f'<p class="banner" role="note">{words}</p>'
    sections = (
        _headline(record, scored, "test"),
        seen,
        confusion_section(scored, "test"),
        per_class_section(scored, "test"),
        mistakes_section(record, "test"),
        data_section(record),
        _footer(record),
    )
    text = page(f"{_data_name(record)} ({percent(scored['accuracy'])}): headstart evaluation", "\n".join(sections))
    write_atomic(folder / "report.html", text.encode("utf-8", errors="replace"))
    return folder / "report.html"


def render_report(run: RunRecord) -> str:
    """The report as HTML text."""
    split = "test" if run.metrics.get("test") else "val"
    scored = run.metrics.get(split) or {}
    sections = (
        _headline(run, scored, split),
        _verdicts(run),
        _curves(run),
        _stages(run),
        confusion_section(scored, split),
        per_class_section(scored, split),
        mistakes_section(run, split),
        audit_section(run),
        data_section(run),
        _time(run),
        _recipe(run),
        _footer(run),
    )
    name = _data_name(run)
    figure = f" ({percent(scored['accuracy'])})" if scored else ""
    return page(f"{name}{figure}: headstart report", "\n".join(s for s in sections if s))


def _data_name(run: RunRecord) -> str:
    root = (run.metrics.get("data") or {}).get("root")
    return Path(root).name or str(root) if root else "run"


# ---- headline and verdicts -------------------------------------------------------------------------------------


def _headline(run: RunRecord, scored: Mapping[str, Any], split: str) -> str:
    parts = [f"<h1>headstart report: {esc(_data_name(run))}</h1>"]
    if run.metrics.get("interrupted") or not run.metrics:
        parts.append(
            '<p class="banner" role="note">This run was stopped before its end. The model is the best state up to '
            "then, by its validation score; what was not reached is missing below.</p>"
        )
    if scored:
        right, n = round(scored["accuracy"] * scored["n"]), scored["n"]
        interval = span(scored["accuracy_ci95"])
        expect = f"On more pictures of the same kind expect {interval} (95\u00a0% interval)."
        known = "These pictures chose the state that was kept" if split == "val" else ""
        known = "The model knows some of these pictures" if run.metrics.get("seen") else known
        if known:
            expect = f"95\u00a0% interval: {interval}. {known}: expect somewhat less on new ones."
        words = (
            f"<p><strong>{SPLITS[split].capitalize()} accuracy</strong>: {right:,} of {n:,} pictures right. "
            f"{expect}</p>"
            f'<p class="soft">Always answering the most frequent class: {percent(scored["majority_baseline"])}.</p>'
        )
        scale = interval_scale(scored["accuracy"], scored["accuracy_ci95"], scored["majority_baseline"])
        figure = f"{100 * scored['accuracy']:.1f}<small>\u00a0%</small>"
        parts.append(f'<div class="headline"><div><p class="big">{figure}</p>{words}</div><div>{scale}</div></div>')
        parts.append(_figures(scored))
    parts.append(_facts(run))
    return f"<header>{''.join(parts)}</header>"


def _figures(scored: Mapping[str, Any]) -> str:
    pairs = [
        ("Balanced accuracy", percent(scored["balanced_accuracy"])),
        ("Top-5 accuracy", percent(scored["top5"])) if scored.get("top5") is not None else None,
        ("Log loss", f"{scored['log_loss']:.3f}"),
        ("Weighted precision", percent(scored["weighted_precision"])),
        ("Weighted recall", percent(scored["weighted_recall"])),
        ("Weighted F1", percent(scored["weighted_f1"])),
    ]
    return facts([pair for pair in pairs if pair])


def _facts(run: RunRecord) -> str:
    data, stages = run.metrics.get("data") or {}, run.metrics.get("stages") or []
    names = _class_names(run)
    counts = [f"{data[key]:,} {words}" for key, words in _COUNTS if data.get(key)]
    seconds = sum(p["seconds"] for p in run.metrics.get("phases") or [])
    created = str(run.environment.get("begun", run.environment.get("created", ""))).replace("T", " ")
    created = f"{created[:16]} UTC" if created.endswith("+00:00") else created
    pairs = [
        ("Model", long_path(run.metrics["evaluated"])) if run.metrics.get("evaluated") else None,
        ("Backbone", esc(run.metrics["backbone"])) if run.metrics.get("backbone") else None,
        ("Weights", long_path(run.metrics["weights"])) if run.metrics.get("weights") else None,
        ("Classes", f"{len(names):,}") if names else None,
        ("Pictures", ", ".join(counts)) if counts else None,
        ("Stages", ", ".join(esc(s["name"]) for s in stages)) if stages else None,
        ("Time", duration(seconds)) if seconds else None,
        ("Written" if run.metrics.get("evaluated") else "Started", esc(created)) if created else None,
    ]
    return facts([pair for pair in pairs if pair])


_COUNTS = (("n_train", "train"), ("n_val", "validation"), ("n_test", "test"))


def _class_names(run: RunRecord) -> list[str]:
    for split in ("test", "val"):
        if run.metrics.get(split):
            return [row["name"] for row in run.metrics[split]["per_class"]]
    counts = (run.metrics.get("data") or {}).get("class_counts") or {}
    return list(counts.get("train") or {})


def _verdicts(run: RunRecord) -> str:
    items = []
    for verdict in verdicts(run.history, run.metrics):
        kind = {True: "good", False: "bad", None: "open"}[verdict.good]
        items.append(
            f'<li class="{kind}"><h3>{esc(verdict.question)}</h3><p><span class="answer">'
            f"{esc(verdict.answer.capitalize())}.</span>{sentence(verdict.sentence)}</p></li>"
        )
    mind = "".join(f"<li>{sentence(words)}</li>" for words in cautions(run.history, run.metrics))
    note = f'<h3>Mind</h3><ul class="cautions">{mind}</ul>' if mind else ""
    return section("In words", f'<ul class="verdicts">{"".join(items)}</ul>{note}')


# ---- training --------------------------------------------------------------------------------------------------


def _curves(run: RunRecord) -> str:
    lines = [str(stage.get("freeze_line", "")) for stage in run.recipe.get("stages") or []]
    baseline = (run.metrics.get("val") or {}).get("majority_baseline")
    drawn = [
        (
            title,
            curves(run.history, quantity, freeze_lines=lines, baseline=baseline if quantity == "accuracy" else None),
        )
        for quantity, title in (("loss", "Loss"), ("accuracy", "Accuracy"), ("top5", "Top-5 accuracy"))
    ]
    figures = [f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in drawn if svg]
    if not figures:
        return ""
    key = '<svg class="key" viewBox="0 0 34 12" aria-hidden="true">{}</svg>'
    keys = (
        f'<p class="keys note"><span>{key.format(_KEY_LINE.format("train"))}training pictures</span> '
        f"<span>{key.format(_KEY_LINE.format('val'))}validation pictures</span> "
        f"<span>{key.format(_KEY_RING)}the state that was kept</span> "
        f"<span>{key.format(_KEY_MOVE)}the freeze line moves</span></p>"
    )
    note = (
        '<p class="note">Both curves are scored alike: in evaluation mode, on plain pictures without augmentation, by '
        "plain cross-entropy in nats. Epoch 0 is the state a stage starts from. A line that leaves the frame starts "
        f"or ends beyond it; a pale line was rolled back.{_events_in_words(run)}</p>"
    )
    if len(figures) % 2:  # two in a row: the note fills the free place
        figures.append(f"<div>{note}</div>")
        note = ""
    return section("How it learned", keys, f'<div class="charts">{"".join(figures)}</div>', note)


def _events_in_words(run: RunRecord) -> str:
    """What the upright lines over the curves are, where there is one."""
    drawn = [record for record in run.history if is_drawn_event(record)]
    words = " An upright red line marks an event, which is told in full below."
    if any(map(is_mixture, drawn)):
        words += " Mixed: the weights that were kept lie between those a stage began with and those it came to."
    return words if drawn else ""


_KEY_LINE = '<polyline class="{}" points="0,6 34,6"/>'
_KEY_RING = '<circle class="kept" cx="17" cy="6" r="5"/>'
_KEY_MOVE = '<line class="move" x1="17" x2="17" y1="0" y2="12"/>'


def _stages(run: RunRecord) -> str:
    stages = run.metrics.get("stages") or []
    header = ("Stage", "Frozen | trained parameters", "Freeze line", "Rate", "Views", "Best epoch", "Validation loss",
              "Validation accuracy", "Time")  # fmt: skip
    rows = []
    for s in stages:
        frozen, trained = int(s.get("frozen_parameters") or 0), int(s.get("trainable_parameters") or 0)
        rows.append(
            (
                esc(s.get("name", "")),
                f"{freeze_strip(frozen, trained)}<br><span class='soft'>{trained:,} of {frozen + trained:,}</span>",
                f"<code>{esc(s.get('freeze_line', ''))}</code><br>"
                f"<span class='soft'>BatchNorm {esc(s.get('batchnorm', ''))}</span>",
                f"{s['lr']:g}" if s.get("lr") is not None else NONE,
                str(s.get("views") or NONE),
                f"{s.get('best_epoch', NONE)} of {s.get('epochs', NONE)}",
                number(s.get("best_val_loss")),
                percent(s["best_val_accuracy"]) if s.get("best_val_accuracy") is not None else NONE,
                duration(s.get("seconds")),
            )
        )
    return section(
        "What was trained when",
        table(header, rows, label="stages", numbers=range(3, len(header))) if stages else "",
        _events(run),
        *(
            details(
                f"Layers trained in stage {esc(s.get('name', ''))}",
                f"<p><code>{', '.join(map(esc, s['trained']))}</code></p>",
            )
            for s in stages
            if s.get("trained")
        ),
    )


def _events(run: RunRecord) -> str:
    items = [
        f"<li><strong>{esc(record.get('stage', ''))}</strong>: {esc(_short(record['event'].get('message')))}</li>"
        for record in run.history
        if record.get("event")
    ]
    return f"<h3>Events</h3><ul>{''.join(items)}</ul>" if items else ""


# ---- time and recipe ----------------------------------------------------------------------------------------


def _time(run: RunRecord) -> str:
    phases = run.metrics.get("phases") or []
    total = sum(p["seconds"] for p in phases)
    if not total:
        return ""
    rows = [
        (
            esc(p["name"]),
            duration(p["seconds"]),
            f"{100 * p['seconds'] / total:.0f}\u00a0%",
            _time_bar(p["seconds"] / total),
        )
        for p in phases
    ]
    foot = ("all", duration(total), "100\u00a0%", "")
    return section(
        "Time", table(("Phase", "Time", "Share", ""), rows, label="time per phase", numbers=(1, 2), foot=foot)
    )


def _time_bar(share: float) -> str:
    bar = f'<rect class="interval" style="opacity:.7" x="0" y="2" width="{max(0.5, 120 * share):.1f}" height="10"/>'
    return f'<svg class="bar" viewBox="0 0 120 14" aria-hidden="true">{bar}</svg>'


def _recipe(run: RunRecord) -> str:
    recipe = {key: value for key, value in run.recipe.items() if key != "stages"}
    stages = {stage.get("name", str(i)): stage for i, stage in enumerate(run.recipe.get("stages") or [])}
    keys = list(dict.fromkeys(key for stage in stages.values() for key in stage if key != "name"))
    rows = [(f"<code>{esc(key)}</code>", *(esc(_short(stage.get(key))) for stage in stages.values())) for key in keys]
    versions = run.environment.get("versions") or {}
    machine = {**{k: v for k, v in run.environment.items() if k not in ("versions", "created", "process")}, **versions}
    return section(
        "Recipe and environment",
        facts([(esc(key), esc(_short(value))) for key, value in recipe.items()]),
        "<h3>Stages</h3>",
        table(("Option", *map(esc, stages)), rows, label="stage options"),
        details(
            "Environment",
            table(("What", "Value"), [(esc(k), esc(_short(v))) for k, v in machine.items()], label="environment"),
        ),
        details("recipe.json", f"<pre>{esc(json.dumps(run.recipe, indent=1, ensure_ascii=False))}</pre>"),
    )


def _short(value: object) -> str:
    if value is None:
        return NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _footer(run: RunRecord) -> str:
    version = (run.environment.get("versions") or {}).get("headstart")
    return f"<footer>Written by headstart {esc(version or '')}. This file loads nothing from anywhere.</footer>"
