"""The gradients of one optimiser step, computed on as many pictures at once as memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .averaging import restore, snapshot
from .backbones import backbone_output
from .checkpointing import segments
from .classifier import Classifier
from .features import ActivationSource, FeatureSource, PixelSource, Source
from .memory import Portion, is_out_of_memory, peak_bytes
from .mixing import Mix, mix_inputs
from .recipe import Stage
from .runtime import Runtime, free_memory_bytes
from .schedule import class_weight_vector, views_of_epoch

# A step may take this share of the free memory, by a measurement that leaves out the kernels' scratch space.
MEMORY_SHARE = 0.6

Forward = Callable[[Classifier, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs [B, ...] as their source gave them, their class ids [B], and how they are mixed among themselves."""

    inputs: Tensor
    labels: Tensor
    mix: Mix | None = None


class Gradients:
    """The stage's training loss of some batches, and its gradients.

    Args:
        portion: how many pictures at once; smaller once memory has run out.
    """

    def __init__(
        self, model: Classifier, source: Source, stage: Stage, *, runtime: Runtime, portion: Portion | None = None
    ) -> None:
        self.model, self.source, self.stage, self.runtime = model, source, stage, runtime
        self.portion = portion or Portion()
        self._forward: Forward = source.forward
        if stage.checkpointing:
            found = checkpointed(source, model)
            if isinstance(found, str):
                self.portion.note("checkpointing", f"All activations are kept: {found}.")
            else:
                self._forward = found
        weights = class_weight_vector(stage, source.labels, len(model.class_names))
        self.class_weights = None if weights is None else weights.to(runtime.device)

    def weight(self, labels: Tensor) -> float:
        """What these pictures weigh in a mean loss."""
        if self.class_weights is None:
            return float(len(labels))
        return float(self.class_weights.cpu()[labels].sum())

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The training loss of logits [N, C], class weights and smoothing included."""
        return self._loss(logits, labels) / self.weight(labels.cpu())

    def add(self, batches: Sequence[Batch], weight: float) -> Tensor:
        """Add the gradients of the summed loss over `weight` to `.grad`; returns the summed loss, detached.

        No gradient may be there before: where memory runs out, all that has been computed is thrown away and done
        again in parts half as large. Gradients are then the same within rounding, but for what looks at a whole
        batch or draws random numbers: BatchNorm that learns, dropout.

        Raises:
            SetupError: memory runs out with the smallest part, too.
        """
        while True:
            try:
                total = torch.zeros((), device=self.runtime.device)
                for batch in batches:
                    total += self._backward(batch, weight)
                return total
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.model.zero_grad(set_to_none=True)
                largest = max(len(batch.labels) for batch in batches)
                self.portion.halve(largest, error, doing=f"in stage {self.stage.name!r}")

    def _backward(self, batch: Batch, weight: float) -> Tensor:
        inputs, share = batch.inputs.to(self.runtime.device, non_blocking=True), 1.0
        partners = batch.labels
        if batch.mix:  # before the batch is parted, so that the pictures are mixed as they would have been
            inputs, share = mix_inputs(inputs, batch.mix)
            partners = batch.labels[batch.mix.partners]
        sizes = self.portion.parts(len(batch.labels))
        total = torch.zeros((), device=self.runtime.device)
        for part, labels, others in zip(
            inputs.split(sizes), batch.labels.split(sizes), partners.split(sizes), strict=True
        ):
            with self.runtime.autocast():
                logits = self._forward(self.model, part)
            loss = self._loss(logits, labels)
            if batch.mix:
                loss = share * loss + (1 - share) * self._loss(logits, others)
            (loss / weight).backward()
            total += loss.detach()
        return total

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            logits.float(),
            labels.to(logits.device),
            weight=self.class_weights,
            label_smoothing=self.stage.label_smoothing,
            reduction="sum",
        )

    def step_bytes(self, n: int) -> int:
        """Memory that the gradients of n pictures take at their peak, measured; nothing is changed by it."""
        state, was_training = snapshot(self.model), self.model.training
        indices = torch.arange(n) % len(self.source.labels)
        views = views_of_epoch(indices, self.source.num_views, epoch=1)
        batch = Batch(self.source.batch(indices.tolist(), views.tolist()), self.source.labels[indices])
        self.model.train()
        try:
            with torch.random.fork_rng(devices=[]):
                return peak_bytes(lambda: self._backward(batch, float(n)), self.runtime.device)
        finally:
            self.model.zero_grad(set_to_none=True)
            restore(self.model, state)
            self.model.train(was_training)

    def fit_to_memory(self, free_bytes: int | None = None) -> None:
        """Compute as large a power of two of pictures at once as memory holds, up to the stage's batch.

        Steps of two and of four pictures are measured, which tells what each further picture takes.

        Args:
            free_bytes: None asks the machine.
        """
        if isinstance(self.source, FeatureSource):  # a head on stored features takes next to nothing
            return
        free = free_bytes if free_bytes is not None else self._free_bytes()
        two, four = self.step_bytes(2), self.step_bytes(4)
        each = max(1, (four - two) // 2)
        batch = min(self.stage.batch_pictures, len(self.source.labels))
        room = int(free * MEMORY_SHARE) - max(0, two - 2 * each) - self._optimizer_bytes()
        most = 2 ** int(math.log2(max(1, room // each)))
        self.portion.size = None if most >= batch else max(self.portion.least, most)
        at_once = "all" if self.portion.size is None else str(self.portion.size)
        self.portion.note(
            "batch-size",
            f"Batches of {batch} pictures, {at_once} at once: one takes {each / 1e6:.1f} MB in a step,"
            f" {free / 1e9:.1f} GB are free.",
        )

    def _free_bytes(self) -> int:
        if self.runtime.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.runtime.device)[0])
        return free_memory_bytes()

    def _optimizer_bytes(self) -> int:
        """Adam's two averages and the running average of the weights."""
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        return trained * (2 + (self.stage.ema > 0))


def checkpointed(source: Source, model: Classifier) -> Forward | str:
    """The source's forward pass with activations computed again instead of kept, or why that cannot be."""
    if isinstance(source, ActivationSource):
        parts = segments(source.cut.suffix.train_graph, example_shape=source.cut.shape)
    elif isinstance(source, PixelSource):
        parts = segments(
            model.backbone,
            example_shape=(3, model.spec.image_size, model.spec.image_size),
            forward=partial(backbone_output, pool=model.pool),
            kept_in_eval=model.kept_in_eval,
        )
    else:
        return source.forward  # a head alone keeps next to nothing
    if isinstance(parts, str):
        return parts

    def forward(model: Classifier, inputs: Tensor) -> Tensor:
        if isinstance(source, ActivationSource):
            model.keep_frozen()
            return model.finish(parts(inputs))
        return model.finish(parts(model.enter(inputs)))

    return forward
