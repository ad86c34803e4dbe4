"""One attempt at a stage: its optimiser, its steps and epochs, and the scores that an epoch is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .averaging import RunningAverage, trained_tensors
from .classifier import Classifier
from .contract import Contract
from .errors import ModelError
from .evaluation import Score, score
from .features import FeatureSource, StageData
from .gradients import Batch, Gradients
from .linear import check_linear, lbfgs_epoch
from .memory import Portion, ready, sent
from .mixing import check_mixing, draw_mix
from .order import epoch_order
from .points import Point, put
from .recipe import Stage
from .runtime import Runtime, prefetch
from .schedule import batches_of_epoch, learning_rate, make_optimizer, views_of_epoch

# Training pictures scored in evaluation mode each epoch: enough for a +-6 point interval. Where layers run for them,
# no more than there are validation pictures, which they are compared with, but these at least.
TRAIN_SCORE_LIMIT, TRAIN_SCORE_LEAST = 256, 100


class Attempt:
    """The state of one attempt; see `train.fit` for what comes before it and after."""

    def __init__(
        self,
        model: Classifier,
        data: StageData,
        stage: Stage,
        *,
        lr: float,
        seed: int,
        runtime: Runtime,
        portion: Portion,
    ) -> None:
        self.model, self.data, self.stage, self.lr, self.seed, self.runtime = model, data, stage, lr, seed, runtime
        self.optimizer = make_optimizer(model, stage, lr=lr)
        self.contract = Contract(model, self.optimizer)
        self.average = RunningAverage(model, stage.ema) if stage.ema else None
        self.gradients = Gradients(model, data.train, stage, runtime=runtime, portion=portion)
        self._refuse_small_batches()
        check_mixing(stage, model.freeze_line)
        check_linear(model, data, stage)
        n = len(data.train.labels)
        self.train_subset = torch.from_numpy(epoch_order(n, seed=0, epoch=0)[: self._train_scored()])
        self.steps_per_epoch = -(-len(self._batches(epoch=1)) // stage.accumulate)
        self.steps = self.steps_per_epoch * stage.epochs
        self.step = self.pictures = 0
        self.is_through = False  # no further epoch would change anything
        # Within an epoch: the batches that are done, the loss they came to, and what they weigh.
        self._done, self._loss, self._weight = 0, torch.zeros((), device=runtime.device), 0.0

    def _refuse_small_batches(self) -> None:
        """BatchNorm in training mode has no variance to take from one picture; every process needs one."""
        batch, world = min(self.stage.batch_pictures, len(self.data.train.labels)), self.runtime.world
        if self.gradients.portion.least > batch:
            raise ModelError(
                f"stage {self.stage.name!r}: BatchNorm cannot learn its statistics from batches of one picture."
                " Take a batch size of 2 or more, and at least two training pictures."
            )
        if batch < world:
            raise ModelError(
                f"stage {self.stage.name!r}: {world} processes cannot share batches of {batch} pictures: each needs"
                f" one. Take a batch size of {world} or more, at least as many training pictures, or fewer processes."
            )

    def _batches(self, epoch: int) -> list[Tensor]:
        labels, least = self.data.train.labels, max(2, self.runtime.world)
        return batches_of_epoch(len(labels), labels, self.stage, seed=self.seed, epoch=epoch, least=least)

    def _train_scored(self) -> int:
        if isinstance(self.data.train, FeatureSource):
            return TRAIN_SCORE_LIMIT
        return min(TRAIN_SCORE_LIMIT, max(TRAIN_SCORE_LEAST, len(self.data.val.labels)))

    def epoch(self, epoch: int, *, pool: ThreadPoolExecutor, after_step: Callable[[], None]) -> float:
        """Train one epoch (from 1) and return the mean training loss, weights and smoothing included."""
        model, runtime, stage = self.model, self.runtime, self.stage
        train = self.data.train
        if isinstance(train, FeatureSource) and stage.optimizer == "lbfgs":
            loss, self.is_through = lbfgs_epoch(
                self.optimizer, model, train, self.gradients.mean_loss, weight_decay=stage.weight_decay
            )
            self.step, self.pictures = self.step + self.steps_per_epoch, self.pictures + len(train.labels)
            after_step()
            return loss
        batches = self._batches(epoch)
        model.train()
        if not self._done:  # else the run goes on in the middle of an epoch, with the random numbers it had there
            # Dropout and drop-path draw from a state that depends on (seed, epoch, rank) alone.
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, runtime.rank]).generate_state(1)[0]))
            self._loss, self._weight = torch.zeros((), device=runtime.device), 0.0
        shares = [runtime.share(batch) for batch in batches[self._done :]]

        def prepare(indices: Tensor) -> Tensor:
            views = views_of_epoch(indices, train.num_views, epoch=epoch)
            return ready(train.batch(indices.tolist(), views.tolist()), runtime.device)

        inputs = prefetch(prepare, shares, pool=pool if train.in_background else None, ahead=runtime.workers + 1)
        for first in range(self._done, len(batches), stage.accumulate):
            group = range(first, min(first + stage.accumulate, len(batches)))
            # One divisor for the whole step, however it is cut into batches and processes.
            weight = sum(self.gradients.weight(train.labels[batches[i]]) for i in group)
            drawn = [self._batch(next(inputs), batches[i], seed=(self.seed, epoch, 2, i, 0)) for i in group]
            self._loss += self.gradients.add([batch for batch in drawn if len(batch.labels)], weight)
            self.pictures += sum(len(batches[i]) for i in group)
            self._weight += weight
            self._done = group.stop
            self._optimizer_step()
            self.step += 1
            after_step()
        self._done = 0
        # The sum of per-step means times weights, over all weights: exact also with a short last batch.
        return self._sum_over_processes(self._loss) / self._weight

    def _batch(self, inputs: Tensor, rows: Tensor, *, seed: Sequence[int]) -> Batch:
        """This process's share of the batch of these rows, whose inputs it has, mixed as the whole batch is."""
        runtime, labels = self.runtime, self.data.train.labels[rows]
        mix = draw_mix(len(rows), mixup=self.stage.mixup, cutmix=self.stage.cutmix, seed=seed)
        if mix is None or runtime.world == 1:
            return Batch(inputs, runtime.share(labels), mix)
        # Partners may be another process's; to be given their inputs costs less than to make them again.
        whole = Batch(runtime.gather(sent(inputs, runtime.device), len(rows)), labels)
        return Batch(inputs, runtime.share(labels), replace(mix, partners=runtime.share(mix.partners)), whole)

    def _optimizer_step(self) -> None:
        stage = self.stage
        rate = learning_rate(self.step, steps=self.steps, lr=self.lr, schedule=stage.schedule, warmup=stage.warmup)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.runtime.sum_gradients(held)
        if stage.clip_norm:
            nn.utils.clip_grad_norm_(held, stage.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
            if group["decay"]:
                with torch.no_grad():
                    torch._foreach_mul_(group["params"], 1.0 - group["lr"] * group["decay"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()

    def point(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Where this attempt stands between two steps: values and tensors, of which `go_on` makes the same again."""
        values = {
            "step": self.step, "pictures": self.pictures, "through": self.is_through, "batches": self._done,
            "weight": self._weight, "updates": self.average.updates if self.average else 0,
            "portion": self.gradients.portion.size, "events": list(self.gradients.portion.events),
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
        }  # fmt: skip
        tensors = {f"trained/{name}": t for name, t in trained_tensors(self.model).items()}
        tensors |= {"loss": self._loss, "random/cpu": torch.get_rng_state()}
        for device in self.runtime.generators:
            tensors["random/cuda"] = torch.cuda.get_rng_state(device)
        for i, held in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}": t for key, t in held.items() if isinstance(t, Tensor)}
        if self.average:
            tensors |= {f"average/{name}": t for name, t in self.average.held().items()}
        return values, tensors

    def go_on(self, point: Point) -> None:
        """Put everything where it was at a point."""
        values = point.values["attempt"]
        put(trained_tensors(self.model), point, "trained")
        self.step, self.pictures, self.is_through = values["step"], values["pictures"], values["through"]
        self._done, self._weight = values["batches"], values["weight"]
        self._loss = point.tensors["loss"].clone().to(self.runtime.device)
        self.gradients.portion.size = values["portion"]
        self.gradients.portion.events = list(values["events"])
        if self.average:
            self.average.updates = values["updates"]
            put(self.average.held(), point, "average")
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in point.under("optimizer").items():
            number, _, key = name.partition("/")
            like = held[int(number)]
            # In the weights' own memory layout, by whose places fused optimisers pair the two.
            own = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
            state.setdefault(int(number), {})[key] = own
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(point.tensors["random/cpu"])
        for device in self.runtime.generators:
            if "random/cuda" in point.tensors:
                torch.cuda.set_rng_state(point.tensors["random/cuda"], device)

    def in_shown_state(self) -> AbstractContextManager[None]:
        """With a running average, the model holds it inside; an epoch is judged by it. Training goes on without it."""
        return self.average.applied() if self.average else nullcontext()

    def is_finite(self) -> bool:
        """Whether all trained weights are; the loss does not tell, where a convolution's ReLU makes zeros of NaN."""
        trained = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        return math.isfinite(float(nn.utils.get_total_norm(trained)))

    def _sum_over_processes(self, value: Tensor) -> float:
        if self.runtime.world > 1:
            torch.distributed.all_reduce(value)
        return float(value)

    def score_val(self, limit: int | None = None) -> Score:
        """Score the validation split, or a fixed random part of it."""
        n = len(self.data.val.labels)
        # In float32, as the final scores are, so that a state is chosen by the very figure it is reported with.
        chosen = (
            torch.arange(n)
            if limit is None or n <= limit
            else torch.from_numpy(epoch_order(n, seed=0, epoch=0)[:limit])
        )
        return score(self.model, self.data.val, indices=chosen, runtime=replace(self.runtime, dtype=torch.float32))

    def score_train(self) -> Score:
        """Score a fixed part of the training split as the validation split is scored, so that both compare."""
        return score(self.model, self.data.train, indices=self.train_subset, runtime=self.runtime)
