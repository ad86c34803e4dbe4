"""What an attempt at a stage has come to, between two steps, as a point of the run holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .alarm import Alarm, make_alarm
from .averaging import Candidate, State
from .evaluation import Score
from .points import Point
from .recipe import Stage


@dataclass
class Course:
    """The states that an attempt chooses from, how far it is, and what the stage's attempts before it have left.

    start: what the stage started from. entry: what this attempt did, which a warm start may have moved. epoch: the
    epochs that are done. over: no further one follows. lr, watch, number, loss_before: see `train.fit`.
    """

    start: State
    entry: Candidate
    best: Candidate
    last: Candidate
    alarm: Alarm | None
    lr: float
    watch: bool
    number: int
    loss_before: float
    epoch: int = 0
    over: bool = False
    seconds: float = 0.0

    def point(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Values and tensors, of which `course_of` makes the same again."""
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}

        def keep(name: str, state: State) -> str:
            if id(state) not in names:
                names[id(state)] = name
                tensors.update({f"{name}/{key}": t for key, t in state.items()})
            return names[id(state)]

        candidates = {}
        for name, one in (("entry", self.entry), ("best", self.best), ("last", self.last)):
            candidates[name] = {"state": keep(name, one.state), "epoch": one.epoch, "share": one.share}
            tensors |= _of_score(name, one.val)
        if self.alarm:
            tensors |= _of_score("whole", self.alarm.whole) | _of_score("part", self.alarm.part)
        values = {
            "lr": self.lr, "watch": self.watch, "number": self.number, "epoch": self.epoch, "over": self.over,
            "loss_before": self.loss_before if math.isfinite(self.loss_before) else None, "seconds": self.seconds,
            "alarm": self.alarm is not None, "start": keep("start", self.start), "candidates": candidates,
        }  # fmt: skip
        return {"course": values}, tensors


def course_of(
    point: Point, stage: Stage, *, device: torch.device, steps_per_epoch: int, training: int, validation: int
) -> Course:
    """The course that made this point."""
    values = point.values["course"]
    states: dict[str, State] = {}

    def state(name: str) -> State:
        return states.setdefault(name, {key: t.to(device) for key, t in point.under(name).items()})

    found = {
        name: Candidate(state(of["state"]), _score(point, name), of["epoch"], of["share"])
        for name, of in values["candidates"].items()
    }
    alarm = None
    if values["alarm"]:
        alarm = make_alarm(
            stage, values["lr"], _score(point, "whole"), lambda _: _score(point, "part"),
            steps_per_epoch=steps_per_epoch, training=training, validation=validation,
        )  # fmt: skip
    before = values["loss_before"]
    return Course(
        state(values["start"]), found["entry"], found["best"], found["last"], alarm, values["lr"], values["watch"],
        values["number"], math.inf if before is None else before, values["epoch"], values["over"], values["seconds"],
    )  # fmt: skip


def _of_score(name: str, score: Score) -> dict[str, Tensor]:
    """A score as tensors: its loss may be no number that JSON knows."""
    top5 = math.nan if score.top5 is None else score.top5
    tensors = {f"score/{name}": torch.tensor([score.loss, score.accuracy, top5, score.n], dtype=torch.float64)}
    return tensors if score.right is None else tensors | {f"right/{name}": torch.from_numpy(score.right)}


def _score(point: Point, name: str) -> Score:
    loss, accuracy, top5, n = point.tensors[f"score/{name}"].tolist()
    right = point.tensors.get(f"right/{name}")
    return Score(loss, accuracy, None if math.isnan(top5) else top5, int(n), None if right is None else right.numpy())
