"""What a stage came to, and what it tells as it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .evaluation import Score
from .recipe import Stage

Record = dict[str, Any]
Log = Callable[[Record], None]
Report = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """Where a stage is, for a progress bar: steps done of `steps`, pictures seen, the last validation score."""

    stage: str
    epoch: int
    step: int
    steps: int
    pictures: int
    val: Score | None


@dataclass
class StageResult:
    """What a stage came to; the model holds the best state when `fit` returns.

    lr: the rate it was trained at, lower than asked for where it was rolled back. best: loss, accuracy, top5 and n of
    the state that was kept, on validation. best_epoch: the epoch of that state; 0 is the state that the stage started
    from. epochs: those that were trained. history: the records of history.jsonl. events: what happened besides, such as
    a roll-back.
    """

    stage: Stage
    lr: float
    best: Score
    best_epoch: int
    epochs: int
    seconds: float
    history: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
