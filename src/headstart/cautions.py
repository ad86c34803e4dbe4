"""What else a reader of a run should mind: sentences on figures that are easily misread, none where all is well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .trends import clear_fall
from .verdicts import Record, difference_interval, epoch_records, figure, stage_attempts

FEW_PICTURES = 5  # training pictures of a class
LISTED = 5
BY_CHANCE = 0.05  # p of the exact test on the pictures that a stage changed


def cautions(history: Sequence[Record], metrics: Mapping[str, Any]) -> list[str]:
    """Sentences on this run, in the order in which things happened.

    Args:
        history: records of history.jsonl.
        metrics: what metrics.json holds.
    """
    data = metrics.get("data") or {}
    return [
        *_thin_classes(data.get("class_counts") or {}),
        *_untrained_head(metrics),
        *_cut_short(history),
        *_within_noise(metrics),
    ]


def untrained_head(name: str, layers: int, lines: Sequence[str]) -> str:
    """That the first of several stages trains backbone layers behind a new head, which costs what they have learned.

    Args:
        name: of that stage. layers: of the backbone, how many it trains. lines: the freeze lines of all stages.
    """
    return (
        f"Stage {name!r} trains {layers:,} backbone {'layers' if layers > 1 else 'layer'} together with a head"
        " that is still untrained, which can cost what they have learned. One value of --freeze-line moves the line of"
        f" every stage; the head is trained first with --freeze-line {','.join(['head', *lines[1:]])}."
    )


def _untrained_head(metrics: Mapping[str, Any]) -> list[str]:
    stages = metrics.get("stages") or []
    is_new = metrics.get("from_run") is None and metrics.get("weights") != "none"
    trained = stages[0].get("trained") if len(stages) > 1 and is_new else None
    if not trained:
        return []
    return [untrained_head(stages[0]["name"], len(trained), [stage["freeze_line"] for stage in stages])]


def _thin_classes(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    found = []
    few = [f"{name} ({n})" for name, n in counts.get("train", {}).items() if n < FEW_PICTURES]
    if few:
        found.append(
            f"Fewer than {FEW_PICTURES} training pictures: {_listed(few)}. No recipe learns a class from so few, and"
            " its figures say next to nothing."
        )
    for split_name in ("val", "test"):
        of_split = counts.get(split_name, {})
        absent = [name for name, n in of_split.items() if not n]
        if absent and len(absent) < len(of_split):
            found.append(
                f"No picture in the {split_name} split: {_listed(absent)}. How well it does there is not known."
            )
    return found


def _cut_short(history: Sequence[Record]) -> list[str]:
    """Stages before the last that were still learning when they ended.

    Of one that went flat as its rate ran down nobody can say so, and the next stage goes on from it: no caution.
    """
    found = []
    for attempts in stage_attempts(history)[:-1]:
        epochs = epoch_records(attempts[-1])
        drop = clear_fall(np.array([figure(record, "val", "loss") for record in epochs]))
        if drop is not None:
            found.append(
                f"Stage {epochs[-1].get('stage', '')!r} was still learning when the next one began (its validation loss"
                f" fell by {drop:.3f} over its last third): give it more epochs before more is unfrozen."
            )
    return found


def _within_noise(metrics: Mapping[str, Any]) -> list[str]:
    """Gains from stage to stage that chance explains, by the pictures that only one of both states gets right."""
    n = (metrics.get("data") or {}).get("n_val") or 0
    found = []
    for before, after in pairwise(metrics.get("stages") or []):
        first, second = before["best_val_accuracy"], after["best_val_accuracy"]
        if not n or first == second:
            continue
        words = f"Stage {after['name']!r} changed the validation accuracy by {100 * (second - first):+.1f} points"
        change = after.get("val_change")
        if change:
            if change["p"] >= BY_CHANCE:
                found.append(
                    f"{words}: of {n:,} pictures {change['a_only']:.0f} are right only after it and"
                    f" {change['b_only']:.0f} only before, which chance explains (p = {change['p']:.2f})."
                )
            continue
        # A run of an earlier version: its stages' answers are not known, so that their accuracies can only be taken for
        # those of two samples. That is too careful.
        chance = difference_interval(first, n, second, n)
        if abs(second - first) <= chance:
            found.append(
                f"{words}; of two samples of {n:,} pictures chance alone explains {100 * chance:.1f}, on the same"
                " pictures less."
            )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
