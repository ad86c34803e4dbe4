"""How familiar a picture is to a model: near to pictures that it was trained on, or like none of them.

How near is told by the five nearest training pictures among the pooled features (after Sun et al. 2022,
"Out-of-distribution detection with deep nearest neighbors"), and as a share: that of held-out pictures of the same
kind that are no nearer. Of pictures of that kind as many as s in a hundred come to a share of s % or less, whatever the
model is (split conformal prediction: Vovk et al. 2005, "Algorithmic learning in a random world").
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn.functional import normalize

from .classifier import Classifier
from .contract import tensors_digest
from .errors import CheckpointError, RecipeError
from .files import to_json, write_atomic
from .modelfile import read_header

FILE = "familiar.safetensors"
NEIGHBOURS = 5
_AT_ONCE = 1024  # pictures whose distances to all are computed at once
_ROUNDING = 1e-5  # of a cosine


@dataclass(frozen=True)
class Familiar:
    """What a model has met.

    met: the features of training pictures, float16 [M, D], each of length 1. held_out: mean cosine of each
    held-out picture to its five nearest of these, float32 [V], the least first. model: what tells the model.
    """

    met: Tensor = field(repr=False)
    held_out: Tensor = field(repr=False)
    model: bytes

    @classmethod
    def of(cls, model: Classifier, trained: Tensor, held_out: Tensor) -> Familiar:
        """From features of training pictures [M, D] and of held-out ones [V, D]."""
        met = normalize(trained.float(), dim=1).half()
        return cls(met, _nearness(held_out, met.float()).sort().values, _name_of(model))

    def shares(self, features: Tensor) -> NDArray[np.float64]:
        """Of each picture, from its features [N, D], how familiar it is: [N], from 1 / (V + 1) to 1.

        A held-out picture that is nearer by no more than rounding counts as no nearer: in another batch the same
        picture has features of other last bits.
        """
        near = _nearness(features, self._met).nan_to_num(nan=-1.0) + _ROUNDING
        return (1 + torch.searchsorted(self.held_out, near, right=True).numpy()) / (len(self.held_out) + 1)

    @cached_property
    def _met(self) -> Tensor:
        return self.met.float()

    @property
    def least(self) -> float:
        """The least share that is ever told, that of a picture which is farther than all that were held out."""
        return 1 / (len(self.held_out) + 1)

    def write(self, folder: Path) -> Path:
        """Write `familiar.safetensors` into the folder, in one step; returns its path."""
        name = torch.tensor(list(self.model), dtype=torch.uint8)
        tensors = {"met": self.met, "held_out": self.held_out, "model": name}
        write_atomic(folder / FILE, to_safetensors(tensors))
        return folder / FILE


def read_familiar(folder: Path, model: Classifier) -> Familiar:
    """What `Familiar.write` left in the folder of this model.

    Raises:
        CheckpointError: there is none, it is damaged, or it was made with another model.
    """
    path, again = folder / FILE, f"Make it: headstart familiar {quote(str(folder))}"
    if not path.is_file():
        raise CheckpointError(f"{folder} does not hold what its model has met ({FILE}). {again}")
    try:
        header = read_header(path)
        found = {name: (info.dtype, info.shape) for name, info in header.items()}
        m, v = (found[name][1][0] if name in found and found[name][1] else 0 for name in ("met", "held_out"))
        wanted = {"met": ("F16", (m, model.num_features)), "held_out": ("F32", (v,)), "model": ("U8", (32,))}
        if found != wanted or m < NEIGHBOURS or v < 1:
            raise CheckpointError("its tensors are others")
        tensors = from_safetensors(path.read_bytes())
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}). {again}") from None
    if bytes(tensors["model"].tolist()) != _name_of(model):
        raise CheckpointError(f"{path} was made with another model than the one beside it. {again}")
    if not all(torch.isfinite(tensors[name]).all() for name in ("met", "held_out")):
        raise CheckpointError(f"{path} holds a number that is none. {again}")
    return Familiar(tensors["met"], tensors["held_out"].sort().values, _name_of(model))


@dataclass(frozen=True)
class Known:
    """What is familiar, and the share up to which a picture is called unknown."""

    familiar: Familiar
    share: float

    def tell(self, features: Tensor) -> list[dict[str, Any]]:
        """`familiar` and `unknown` of each picture, from its features [N, D]."""
        shares = self.familiar.shares(features).tolist()
        return [{"familiar": share, "unknown": share <= self.share} for share in shares]


def check_share(share: object) -> None:
    """Raises: RecipeError: it is no share."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) < 1:
        raise RecipeError(
            f"unknown is {share!r}; it takes a share between 0 and 1, such as 0.05: one in twenty pictures of the kind"
            " that the model was trained on is called unknown then, and more of others."
        )


def known_of(run: object, model: Classifier, share: float) -> Known:
    """What is familiar to the model of a run folder.

    Raises:
        RecipeError: no share, or a smaller one than its pictures can tell; no folder. CheckpointError: see
            `read_familiar`.
    """
    check_share(share)
    if not isinstance(run, (str, os.PathLike)):
        raise RecipeError("unknown: without effect on a model in memory; name the run folder, which holds what it met.")
    familiar = read_familiar(Path(run), model)
    if share < familiar.least:
        raise RecipeError(
            f"unknown is {share:g}, and {len(familiar.held_out):,} validation pictures can tell no less than"
            f" {math.ceil(familiar.least * 1e4) / 1e4:g}. Give that or more, or train with more of them: --val."
        )
    return Known(familiar, share)


def spread(n: int, most: int) -> Sequence[int]:
    """At most `most` of n places, evenly over all."""
    return [int(place) for place in np.linspace(0, n - 1, min(n, most))]


def _nearness(features: Tensor, met: Tensor) -> Tensor:
    """Mean cosine to the five nearest of those met, float32 [M, D]: float32 [N]."""
    others = met.T
    parts = normalize(features.float(), dim=1).split(_AT_ONCE)
    return torch.cat([(part @ others).topk(NEIGHBOURS, dim=1).values.mean(1) for part in parts])


def _name_of(model: Classifier) -> bytes:
    """SHA-256 over all that the features depend on."""
    what = {
        "tensors": tensors_digest(model.state_dict().items()), "pool": model.pool, "spec": model.spec.to_dict(),
        "backbone": model.backbone_name, "args": model.backbone_args,
    }  # fmt: skip
    return hashlib.sha256(to_json(what)).digest()
