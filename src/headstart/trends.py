"""What a curve of losses does at its end: numbers from arrays, by written thresholds that allow for the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Still learning: over the last third of the last stage (at least 4 states) the validation loss has a falling trend
# that the scatter around it does not explain (one-sided t test at 5 %), worth 5 % of the loss and 0.01 nats.
LEARNING_DROP = 0.05
LEARNING_DROP_NATS = 0.01
LEARNING_STATES = 4
# A schedule that has run down flattens any curve: where the rate ends below a fifth of the stage's highest and the best
# state is one of the last three, the last third of the states above that fifth is judged, against the way gone (epochs
# at the highest rate), by what as long a stretch at the highest rate would bring.
RUN_DOWN = 0.2
RUN_DOWN_BEST = 2
# Overfitting in time: 3 or more states after its best the validation loss lies higher by 10 %, by 0.02 nats and by 1.5
# jitters from epoch to epoch more than the best of N jittering figures lies too low by itself, sqrt(2 ln N) jitters;
# the training loss fell meanwhile. Of level, jittering losses 0.5 to 7 % pass for it.
OVERFIT_STATES = 3
OVERFIT_SCORES = 4  # fewer of a stage tell no jitter
OVERFIT_RISE = 0.10
OVERFIT_RISE_NATS = 0.02
OVERFIT_JITTERS = 1.5

# One-sided 5 % points of Student's t distribution for 1, 2, ... degrees of freedom.
_T95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)


def clear_fall(losses: NDArray[np.float64]) -> float | None:
    """By how much the last third of the losses [N] of a stage's states falls, where it falls clearly; else None.

    A fall that has not come down to what was reached before is a way back from overfitting, not learning.
    """
    tail = losses[-max(LEARNING_STATES, math.ceil(len(losses) / 3)) :]
    if len(tail) < LEARNING_STATES or not np.isfinite(tail).all() or tail.min() > np.nanmin(losses):
        return None
    drop = _falling(tail, np.arange(len(tail), dtype=np.float64)) * (len(tail) - 1)
    return drop if is_much(drop, tail) else None


def fell_until(losses: NDArray[np.float64], rates: NDArray[np.float64]) -> int | None:
    """The state up to which the losses fell, where only a rate that has run down may have stopped them; else None.

    Args:
        losses: of a stage's states, [N] in nats, one of them finite.
        rates: learning rates, [N]; NaN where they are not known.
    Returns:
        Place of the last state at a rate of `RUN_DOWN` of the highest or more.
    """
    highest, best = rates.max(initial=0.0), int(np.nanargmin(losses))
    if not rates[-1] < RUN_DOWN * highest or best < len(losses) - 1 - RUN_DOWN_BEST:  # NaN where no rates are kept
        return None
    states = max(LEARNING_STATES, math.ceil(len(losses) / 3))
    last = int(np.flatnonzero(rates >= RUN_DOWN * highest)[-1])
    way = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2)]) / highest
    part, x = losses[: last + 1][-states:], way[: last + 1][-states:]
    if not np.isfinite(part).all() or len(part) < 2:
        return None
    if len(part) < LEARNING_STATES:  # no trend can be told from jitter: each must be lower than the one before
        steady = len(part) > 2 and bool((np.diff(part) < 0).all())
        return last if steady and is_much(part[0] - part[-1], part) else None
    return last if is_much(_falling(part, x) * (states - 1), part) else None


def is_much(drop: float, losses: NDArray[np.float64]) -> bool:
    """Whether a fall by `drop` counts at the height of these losses (nats)."""
    return bool(drop > max(LEARNING_DROP * losses.mean(), LEARNING_DROP_NATS))


def _falling(values: NDArray[np.float64], at: NDArray[np.float64]) -> float:
    """Fall per unit of `at` of the straight line through `values`; 0 where their scatter explains it."""
    x = at - at.mean()
    fall = -float(x @ values / (x @ x))
    rest = values - values.mean() + fall * x
    error = math.sqrt(float(rest @ rest) / (len(values) - 2) / float(x @ x))
    return fall if fall > _T95[min(len(values) - 2, len(_T95)) - 1] * error else 0.0


@dataclass(frozen=True)
class Turn:
    """What the validation loss did after its lowest state, in nats.

    kind: `none`, no rise that counts; `overfit`, a clear one while the training loss fell; `both`, the training loss
    rose, too; `jitter`, no more than from epoch to epoch anyway; `few`, too few states to judge.
    best: place of the lowest state. rise: how far the late states lie above it. states: how many those are that rose.
    """

    kind: str
    best: int
    rise: float
    states: int


def turn_of(val: NDArray[np.float64], train: NDArray[np.float64]) -> Turn:
    """Whether the validation loss [N] of a stage's states turned upwards, and whether their training loss [N] did."""
    best = int(val.argmin())
    states = len(val) - 1 - best
    if not states:
        return Turn("none", best, 0.0, 0)
    late = slice(best + 1 + states // 2, None)
    rise = float(val[late].mean() - val[best])
    if not is_rise(rise, val[best]):  # nor may the last state lie above alone
        late, states, rise = slice(-1, None), 1, float(val[-1] - val[best])
        if not is_rise(rise, val[best]):
            return Turn("none", best, rise, states)
    alone = math.sqrt(2) if len(val[late]) == 1 else 1.0  # one state is jitter more often than a mean
    noise = (alone * OVERFIT_JITTERS + math.sqrt(2 * math.log(len(val)))) * _jitter(val)
    if train[late].mean() >= train[best]:
        return Turn("both", best, rise, states)
    if len(val) >= OVERFIT_SCORES and rise <= noise:
        return Turn("jitter", best, rise, states)
    judged = len(val) >= OVERFIT_SCORES and states >= OVERFIT_STATES
    return Turn("overfit" if judged else "few", best, rise, states)


def is_rise(rise: float, lowest: float) -> bool:
    """Whether a rise of the validation loss above its lowest counts (nats)."""
    return rise > max(OVERFIT_RISE * lowest, OVERFIT_RISE_NATS)


def _jitter(values: NDArray[np.float64]) -> float:
    """Standard deviation of a curve [N] from epoch to epoch, apart from where it is going.

    Second differences leave out any straight line and have s * sqrt(6) for a deviation s; those of the first quarter,
    where the curve bends, are left out.
    """
    bends = np.diff(values, n=2)
    bends = bends[len(bends) // 4 :]
    return float(np.sqrt(np.mean(bends**2) / 6)) if len(bends) else 0.0
