"""States of what is trained, and means of them: copies, the running average (EMA), mixtures with the start (WiSE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .classifier import Classifier
from .contract import fixed_tensors
from .evaluation import Score

State = dict[str, Tensor]

WISE_SHARES = (0.25, 0.5, 0.75)  # 0, the start, and 1, the trained weights, have their scores already


def trained_tensors(model: Classifier) -> State:
    """Everything training may change: trainable parameters, and buffers of modules that run in training mode."""
    fixed = {name for name, _ in fixed_tensors(model)}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in fixed}


def snapshot(model: Classifier) -> State:
    """Copies of everything training may change; what is fixed is left out, so that putting it back hides nothing."""
    return {name: tensor.clone() for name, tensor in trained_tensors(model).items()}


def restore(model: Classifier, state: State) -> None:
    """Put a `snapshot` back, in place."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in state.items():
            tensors[name].copy_(value)


def mixture(start: State, end: State, share: float) -> State:
    """`start` moved by `share` of the way to `end`; counters, which are whole numbers, are those of `end`.

    What is the same in both stays so, infinite values (a mask's) included.
    """

    def between(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a == b, b, torch.lerp(a, b, share))

    return {name: between(start[name], value) if value.is_floating_point() else value for name, value in end.items()}


@dataclass(frozen=True)
class Candidate:
    """A state with its validation score; `share` of the way from the stage's start to the weights after `epoch`."""

    state: State
    val: Score
    epoch: int
    share: float = 1.0


def best_mixture(
    model: Classifier,
    start: Candidate,
    ends: Sequence[Candidate],
    *,
    score: Callable[[], Score],
    is_better: Callable[[Score, Score], bool],
) -> Candidate:
    """The best of the start, the trained states and what lies between (WiSE); the model is left in any of them.

    Fine-tuned weights are often better, on new kinds of pictures above all, when they are moved part of the way back
    to where fine-tuning began. Statistics of BatchNorm that were learned are moved with the weights.

    Args:
        ends: trained states, the one to prefer among equals first.
        score: of the model as it is, on validation.
    Reference: Wortsman et al. 2022, arXiv 2109.01903.
    """
    best = start
    for end in ends:
        tried = [end]
        for share in WISE_SHARES:
            state = mixture(start.state, end.state, share)
            restore(model, state)
            tried.append(Candidate(state, score(), end.epoch, share))
        for candidate in tried:
            if is_better(candidate.val, best.val):
                best = candidate
    return best


class RunningAverage:
    """Exponential moving average of everything that is trained, learned statistics included; the rest is not held.

    Update t (from 1) moves the average by 1 - min(decay, (1 + t) / (10 + t)) of the way to the weights, so that it
    does not hang on to where it started. What stays the same is the same to the bit in the average.

    Args:
        decay: in (0, 1); the average spans about 1 / (1 - decay) steps.
    Reference: Polyak and Juditsky 1992; the decay's start is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.decay, self.updates = decay, 0
        floats = {name: t for name, t in trained_tensors(model).items() if t.is_floating_point()}
        self._names, self._tensors = list(floats), list(floats.values())
        self._averages = [t.clone() for t in self._tensors]
        buffers = dict(model.named_buffers())
        pairs = zip(floats.items(), self._averages, strict=True)
        self._buffers = [(t, average) for (name, t), average in pairs if name in buffers]

    def update(self) -> None:
        """Take the weights of one more optimiser step in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._tensors, 1 - decay)
        for now, average in self._buffers:  # of infinite values, a mask's, that makes NaN; found without asking a GPU
            average.copy_(torch.where(now.isinf(), now, average))

    def held(self) -> State:
        """The averages themselves, by name."""
        return dict(zip(self._names, self._averages, strict=True))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages inside, and again the weights that training goes on from outside."""
        raw = [t.clone() for t in self._tensors]
        torch._foreach_copy_(self._tensors, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._tensors, raw)
