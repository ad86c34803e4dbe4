"""A stage held to its freeze line: what is frozen stays as it is, bit for bit; what is trained is what was meant."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .classifier import Classifier
from .errors import ModelError


def tensors_digest(items: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in items:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


class Contract:
    """Holds a stage to its freeze line: checks at the start, watches cheaply in between, checks again at the end.

    The model's freeze line is set and the optimiser built before; both must then stay as they are.

    Raises:
        ModelError: at the start, when nothing is trained, or when what is trainable is not exactly what the
            optimiser holds, once each.
    """

    def __init__(self, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._line = model.freeze_line
        model.check_modules()
        self._trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        if not any(self._trainable.values()):
            raise ModelError(
                "This stage would train nothing. Move the freeze line back: set_freeze_line(model, 'head')."
            )
        self._check_optimizer(dict(model.named_parameters()))
        self._check_line()
        self._frozen = dict(fixed_tensors(model))
        self._versions = {n: t._version for n, t in self._frozen.items()}
        self._digests = {n: (tensors_digest([(n, t)]), _size(t)) for n, t in self._frozen.items()}

    def watch(self) -> None:
        """Compare flags, identities and tensor versions with the start; no tensor is read, so it costs little.

        Raises:
            ModelError: naming what was changed behind the stage's back.
        """
        if self.model.freeze_line is not self._line:
            raise ModelError("The freeze line was moved during the stage. End the stage first, then set the line.")
        parameters = dict(self.model.named_parameters())  # one walk through a large network for all that ask
        changed = [n for n, p in parameters.items() if self._trainable.get(n) is not p.requires_grad]
        if changed:
            raise ModelError(
                f"requires_grad was changed after the optimiser was built: {_listed(changed)}. The optimiser does not "
                "follow it. Set the freeze line before the stage starts, and leave requires_grad alone during it."
            )
        self._check_optimizer(parameters)
        now = dict(fixed_tensors(self.model, parameters))
        replaced = [
            n
            for n in (*self._frozen, *(n for n in now if n not in self._frozen))
            if now.get(n) is not self._frozen.get(n)
        ]
        if replaced:
            raise ModelError(f"Frozen tensors were replaced during the stage: {_listed(replaced)}.")
        written = [n for n, t in now.items() if t._version != self._versions[n]]
        if written:
            raise ModelError(f"Frozen tensors were written to during the stage: {_listed(written)}.")
        self.model.check_modules()
        self.model.keep_frozen()

    def finish(self) -> None:
        """Hash every frozen parameter and buffer again.

        Raises:
            ModelError: naming what changed, with its size before and after.
        """
        now = dict(fixed_tensors(self.model))
        changed = []
        for name, (digest, size) in self._digests.items():
            if name not in now:
                changed.append(f"{name} (gone)")
            elif tensors_digest([(name, now[name])]) != digest:
                changed.append(f"{name} (norm {size:.9g} -> {_size(now[name]):.9g})")
        if changed:
            raise ModelError(f"Frozen tensors changed during the stage: {_listed(changed)}.")

    def _check_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> None:
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        count = Counter(held)
        all_of_them = parameters.items()
        foreign = len(set(held) - {id(p) for p in parameters.values()})
        problems = {
            "trainable but not in the optimiser": [n for n, p in all_of_them if p.requires_grad and not count[id(p)]],
            "in the optimiser but not trainable": [n for n, p in all_of_them if count[id(p)] and not p.requires_grad],
            "in the optimiser more than once": [n for n, p in all_of_them if count[id(p)] > 1],
            "in the optimiser but of no part of the model": [f"{foreign} tensors"] * bool(foreign),
        }
        wrong = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
        if wrong:
            raise ModelError(f"What is trainable is not what the optimiser holds. {'; '.join(wrong)}.")

    def _check_line(self) -> None:
        """By hand, less may be trained than stands behind the line, but nothing in front of it."""
        front = set(self._line.frozen) if self._line else set()
        wrong = [
            n
            for n, p in self.model.backbone.named_parameters()
            if p.requires_grad and (n in front or n.rpartition(".")[0] in front)
        ]
        if wrong:
            raise ModelError(
                f"{_listed(f'backbone.{n}' for n in wrong)} would be trained in front of the freeze line "
                f"({self._line.where}). Move the line instead of requires_grad."
            )


def fixed_tensors(
    model: Classifier, parameters: Mapping[str, nn.Parameter] | None = None
) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters that are not trainable, and buffers of modules that stay in evaluation mode.

    Args:
        parameters: the model's, by name, where they are known.
    """
    kept = {id(m) for m in model.kept_in_eval}
    for name, parameter in (dict(model.named_parameters()) if parameters is None else parameters).items():
        if not parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        if id(module) in kept:
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{prefix}.{name}" if prefix else name, buffer


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().norm()) if tensor.numel() else 0.0


def _listed(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
