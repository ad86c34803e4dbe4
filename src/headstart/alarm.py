"""The alarm for a rate that wrecks a trained head: validation is scored early, beside what it was before the stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .evaluation import Score
from .recipe import Stage

# Some pictures are looked at so often within an epoch, and all of them at its end, in so many epochs; after the first
# epoch only where one trains so many times as many pictures that looking costs nothing.
LOOKS, EPOCHS, PICTURES, TIMES = 3, 2, 100, 10


class CollapseError(Exception):
    """The first steps wrecked what the stage started from; `loss` is the validation loss they led to."""

    def __init__(self, message: str, loss: float) -> None:
        super().__init__(message)
        self.loss = loss


@dataclass(frozen=True)
class Alarm:
    """Raises where the loss is far above that of the same pictures before the stage.

    Attributes:
        whole, part: validation as it was before, all of it and a fixed random part.
        pictures: how many that part has; None where it is all of them.
        steps_per_epoch, looks: steps of an epoch, and those of them, counted from 1, after which the part is scored.
        epochs: how many epochs are looked into.
    """

    stage: Stage
    lr: float
    whole: Score
    part: Score
    pictures: int | None
    steps_per_epoch: int
    looks: frozenset[int]
    epochs: int

    def within(self, epoch: int, step: int, score: Callable[[int | None], Score]) -> None:
        """After a step, counted over all epochs: score some pictures, if it is time to."""
        if epoch <= self.epochs and step - (epoch - 1) * self.steps_per_epoch in self.looks:
            self._compare(score(self.pictures), self.part, step)

    def at_end(self, epoch: int, step: int, now: Score) -> None:
        """At the end of an epoch, which has scored all of validation."""
        if epoch <= EPOCHS:
            self._compare(now, self.whole, step)

    def _compare(self, now: Score, before: Score, step: int) -> None:
        limit = max(before.loss * self.stage.collapse_ratio, before.loss + self.stage.collapse_margin)
        if not now.loss <= limit:
            raise CollapseError(
                f"A learning rate of {self.lr:g} wrecked the trained head: validation loss {now.loss:.3f} after"
                f" {step} step{'' if step == 1 else 's'}, {before.loss:.3f} before.",
                now.loss,
            )


def make_alarm(
    stage: Stage, lr: float, whole: Score, score: Callable[[int | None], Score],
    *, training: int, validation: int, steps_per_epoch: int,
) -> Alarm:  # fmt: skip
    """The alarm of a stage that begins with the score `whole`; `score(n)` scores n of validation."""
    pictures = PICTURES if validation > PICTURES else None
    looks = {steps_per_epoch * i // (LOOKS + 1) for i in range(1, LOOKS + 1)} - {0}
    many = training >= TIMES * min(PICTURES, validation)
    part = score(pictures) if pictures else whole
    return Alarm(stage, lr, whole, part, pictures, steps_per_epoch, frozenset(looks), EPOCHS if many else 1)
