"""A classifier is a backbone followed by a head: pixels on the 0-255 scale in, logits out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from .backbones import backbone_features, backbone_map, create_backbone, override_spec, pool_output, seeded
from .dataspec import DataSpec
from .errors import HeadstartError, ModelError
from .heads import create_head
from .recipe import HeadSpec
from .settings import own_settings
from .tracing import Trace, evaluation_mode, trace
from .transforms import normalise

BY_DESIGN = 0.1  # share of a backbone up to which weights that take no gradient are taken for its own design

_traces: dict[str, Trace] = {}  # names and shapes alone, some kilobytes for each backbone that was built by name


class Classifier(nn.Module):
    """Backbone, pooling and head, with the preprocessing and the class names that belong to them.

    Pixels are `uint8` or float on the 0-255 scale, [N, 3, S, S]; the classifier normalises at its own door, so that
    no caller can do it twice or forget it.

    Attributes:
        backbone, head: the two parts; `head` takes features [N, D].
        spec: the preprocessing of the pictures.
        class_names: one name per logit.
        pool: how the feature map becomes features; see `HeadSpec.pool`.
        head_spec: what `create_head` was given; None for a module of the user's.
        backbone_name, backbone_args: what `create_backbone` was given; None and {} for a module of the user's.
        num_features: D; where it is not given, one pass of the backbone is watched for it.
        fixed: parameters that take no gradient wherever the line stands, since whoever made the module wanted it so.
        freeze_line: where `set_freeze_line` last put the line; None while everything is trainable.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        spec: DataSpec,
        class_names: Sequence[str],
        *,
        pool: str = "backbone",
        head_spec: HeadSpec | None = None,
        backbone_name: str | None = None,
        backbone_args: dict[str, Any] | None = None,
        num_features: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.spec, self.pool = backbone, head, spec, pool
        self.class_names = tuple(class_names)
        self.head_spec, self.backbone_name, self.backbone_args = head_spec, backbone_name, dict(backbone_args or {})
        self.freeze_line: Any = None
        self._kept_in_eval: tuple[nn.Module, ...] = ()
        self.fixed: tuple[nn.Parameter, ...] = ()
        self._placed: tuple[nn.Module, ...] = ()  # the backbone's modules when the freeze line was placed
        self._traced: tuple[Any, Trace] | None = None
        # The same name and arguments make the same network, as when a saved one is built twice to be checked.
        same = backbone_name and repr((backbone_name, self.backbone_args, spec.image_size, pool))
        if same in _traces:
            self._traced = (self._trace_key(), _traces[same])
        if num_features is None:
            shape = self.backbone_trace().output_shape
            if same and self._traced:
                _traces[same] = self._traced[1]
            assert shape is not None
            num_features = shape[1]
        self.num_features = num_features

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [N, C] for pixels [N, 3, S, S] on the 0-255 scale."""
        return self.head(self.features(pixels))  # type: ignore[no-any-return]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pooled features [N, D], what the head takes."""
        x = self.enter(pixels)
        if x.shape[-1] == self.spec.image_size:
            return backbone_features(self.backbone, x, self.pool)
        try:
            out = backbone_features(self.backbone, x, self.pool)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise self._wrong_size(x, str(error)) from error
        if out.shape[1] != self.num_features:
            raise self._wrong_size(x, f"{out.shape[1]} features instead of {self.num_features}")
        return out

    def finish(self, output: Any) -> torch.Tensor:
        """Logits [N, C] from what the backbone computes of normalised pictures (`backbones.backbone_output`)."""
        return self.head(pool_output(self.backbone, output, self.pool))  # type: ignore[no-any-return]

    def feature_map(self, pixels: torch.Tensor) -> torch.Tensor:
        """The backbone's feature map [N, C, H, W] before pooling, whatever layout the network itself uses."""
        return backbone_map(self.backbone, self.enter(pixels))

    def backbone_trace(self) -> Trace:
        """What one pass through the backbone to its features does; watched again only when its modules change.

        Raises:
            ModelError: the backbone does not run on pictures of the spec's size, or gives no features.
        """
        key = self._trace_key()
        if self._traced is None or self._traced[0] != key:
            self._traced = (key, _trace_features(self.backbone, self.spec.image_size, self.pool))
        return self._traced[1]

    def _trace_key(self) -> tuple[Any, ...]:
        return self.spec.image_size, self.pool, tuple((n, id(m)) for n, m in self.backbone.named_modules())

    def train(self, mode: bool = True) -> Self:
        """Training mode for everything behind the freeze line; what stands in front stays in evaluation mode."""
        modules = list(self.modules())
        if any(type(module).train is not nn.Module.train for module in modules[1:]):
            super().train(mode)  # a module of the user's own may do more than note the mode
            self.keep_frozen()
            return self
        # Modes are changed before and after every scoring: only where they differ, and no frozen one back and forth.
        kept = {id(module) for module in self._kept_in_eval}
        for module in modules:
            wanted = mode and id(module) not in kept
            if module.training is not wanted:
                module.training = wanted
        return self

    def keep_frozen(self) -> None:
        """Put what must not run in training mode back into evaluation mode; every forward pass does so itself."""
        for module in self._kept_in_eval:
            if module.training:
                module.training = False

    def check_modules(self) -> None:
        """See that the backbone's modules are those that the freeze line was placed among.

        Raises:
            ModelError: some were exchanged since, and nobody knows their mode.
        """
        known = {id(module) for module in self._placed}
        if known and any(id(module) not in known for module in self.backbone.modules()):
            new = [name for name, module in self.backbone.named_modules() if id(module) not in known]
            raise ModelError(
                f"{len(new)} of the backbone's modules ({', '.join(new[:3])}) were exchanged after the freeze line was"
                " placed, as by convert_sync_batchnorm; what is frozen would not stay fixed. Place it again:"
                f" set_freeze_line(model, {self.freeze_line.where!r}, batchnorm={self.freeze_line.batchnorm!r})."
            )

    def plan_modes(self, kept_in_eval: Sequence[nn.Module]) -> None:
        """Keep exactly these modules (each without its children) in evaluation mode from now on."""
        mode = self.training
        self._kept_in_eval = tuple(kept_in_eval)
        self._placed = tuple(self.backbone.modules()) if kept_in_eval else ()
        self.train(mode)

    @property
    def kept_in_eval(self) -> tuple[nn.Module, ...]:
        """The modules that stay in evaluation mode, each without its children."""
        return self._kept_in_eval

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether nothing of the backbone is trained and nothing of it is in training mode."""
        kept = {id(m) for m in self._kept_in_eval}
        return not any(p.requires_grad for p in self.backbone.parameters()) and all(
            id(m) in kept for m in self.backbone.modules()
        )

    def enter(self, pixels: torch.Tensor, *, are_ours: bool = False) -> torch.Tensor:
        """Normalised pictures from pixels [N, 3, S, S] on the 0-255 scale: the classifier's door.

        Args:
            are_ours: they are known to be on that scale, and no value is looked at, for which a GPU would be waited.
        Raises:
            ModelError: no tensor, another shape, or pixels that were normalised before.
        """
        self.keep_frozen()
        if not are_ours:  # a stage asks once for each of its epochs
            self.check_modules()
        if not isinstance(pixels, torch.Tensor):
            raise ModelError(
                f"The classifier takes pixels as a tensor; it was given {type(pixels).__name__}. torch.from_numpy makes"
                " one of an array."
            )
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ModelError(f"The classifier takes pixels [N, 3, S, S]; it was given {tuple(pixels.shape)}.")
        if not are_ours and _looks_normalised(pixels):
            raise ModelError(
                "The classifier takes pixels on the 0-255 scale and normalises them itself; it was given values from "
                f"{float(pixels.min()):.3g} to {float(pixels.max()):.3g}. Leave out the scaling before it."
            )
        made = normalise(pixels, self.spec)
        own = next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), torch.float32)
        return made if own == torch.float32 else made.to(own)

    def _wrong_size(self, x: torch.Tensor, reason: str) -> ModelError:
        first = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        return ModelError(
            f"{self.backbone_name or type(self.backbone).__name__} was made for {self.spec.image_size} px pictures and "
            f"does not take {x.shape[-2]} x {x.shape[-1]} ({first}). Create it with image_size={x.shape[-1]}."
        )


def _fixed_by_design(part: nn.Module, most: float) -> list[nn.Parameter]:
    """The parameters that take no gradient, where they are less than this share of all."""
    off = [p for p in part.parameters() if not p.requires_grad]
    return off if sum(p.numel() for p in off) < most * sum(p.numel() for p in part.parameters()) else []


def as_classifier(given: Any) -> Classifier:
    """The classifier, also where torch.compile or DataParallel has wrapped it.

    Raises:
        ModelError: it is something else.
    """
    for inside in (given, getattr(given, "_orig_mod", None), getattr(given, "module", None)):
        if isinstance(inside, Classifier):
            return inside
    raise ModelError(
        f"This takes a Classifier, as create_classifier and load make it; it was given {type(given).__name__}. Make one"
        " of a network of your own: create_classifier(network, class_names, data_spec=...)."
    )


@own_settings()
def create_classifier(
    backbone: str | nn.Module,
    class_names: Sequence[str],
    *,
    head: HeadSpec | nn.Module | None = None,
    weights: str | Path = "hub",
    data_spec: DataSpec | None = None,
    pool: str | None = None,
    features_from: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    seed: int = 0,
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    fit: str | None = None,
    num_features: int | None = None,
) -> Classifier:
    """Put a new head on a backbone; nothing is frozen until `set_freeze_line` says so.

    Args:
        backbone: a timm name, with or without a weights tag (`resnet50.a1_in1k`), or any module that takes normalised
            pictures [N, 3, S, S] and gives features [N, D] or a feature map [N, C, H, W].
        head: a spec, or any module that takes features [N, D] and gives logits [N, C]; None is one Linear.
        weights: `hub` (through timm's cache), `none` (random), a `.safetensors`, `.pth` or `.pt` file, or a run folder.
        data_spec: the preprocessing; needed with a module, with a name it replaces the weights' own.
        pool, features_from: for a head that is a module; a spec says it itself.
        drop_rate, drop_path_rate: dropout and stochastic depth of a backbone by name while it is trained; 0 leaves
            timm's default alone. Most networks drop where they pool: with another `pool` there is none.
        seed: seeds the head, and the backbone where it starts from random weights.
        image_size, ..., fit: single values of the preprocessing put in place of the weights' own.
        num_features: what the backbone gives, where that is known (a saved model): its pass is then not watched for it.
    Raises:
        ModelError: an unknown name or block, an option that the network does not take, parts that do not fit together.
        CheckpointError: a weights file or run folder that cannot be read or does not fit.
        SetupError: hub weights are neither in the cache nor to be had.
    """
    if isinstance(backbone, Classifier):
        raise ModelError(
            "The backbone is a whole classifier already, which normalises and has a head. For a fresh head on it use"
            " new_head(model, class_names), to add or drop classes change_classes(model, class_names)."
        )
    names = checked_names(class_names)
    head = HeadSpec() if head is None else head
    check_head_kind(head)
    if isinstance(head, HeadSpec):
        if pool is not None or features_from is not None:
            raise ModelError("pool and features_from are part of the head's spec; give them there: HeadSpec(pool=...).")
        pool, features_from = head.pool, head.features_from
    pool = pool or "backbone"
    changes: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation}
    changes |= {"image_size": image_size, "crop_pct": crop_pct, "fit": fit}
    name: str | None = None
    args: dict[str, Any] = {}
    if isinstance(backbone, str):
        size = image_size if image_size is not None else data_spec.image_size if data_spec else None
        args = {"pool": pool, "features_from": features_from, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        net, spec = create_backbone(backbone, weights=weights, image_size=size, seed=seed, **args)
        name, args = backbone, {**args, "image_size": spec.image_size}
        spec = data_spec or spec
    else:
        if str(weights) not in ("hub", "none"):
            raise ModelError(
                f"weights={str(weights)!r} is for backbones by name; load them into your own module first."
            )
        if isinstance(backbone, torch.jit.ScriptModule):
            raise ModelError(
                f"The backbone is TorchScript ({backbone.original_name}), whose layers can be neither watched nor"
                " frozen one by one. Give the module that it was made of."
            )
        net, spec = backbone, _spec_for_module(data_spec, features_from, drop_rate, drop_path_rate)
    spec = override_spec(spec, **changes)
    # An earlier block has nothing of the network's own head behind it, so its map is averaged.
    pool = "avg" if features_from and pool == "backbone" else pool
    model = Classifier(
        net, nn.Identity(), spec, names, pool=pool, backbone_name=name, backbone_args=args, num_features=num_features
    )
    _refuse_batch_norms(model.backbone, "backbone")
    if isinstance(head, HeadSpec):
        model.head_spec = head
        with seeded(seed):
            model.head = create_head(head, model.num_features, len(names))
    else:
        model.head = head
        _refuse_batch_norms(head, "head")
        _check_head(head, model.num_features, len(names))
    model.fixed = (*_fixed_by_design(model.backbone, BY_DESIGN), *_fixed_by_design(model.head, 1.0))
    # Convolutions run faster so, and one layout everywhere gives the same bits everywhere.
    return model.to(memory_format=torch.channels_last)


def checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """The class names as text.

    Raises:
        ModelError: no list of two or more different ones.
    """
    names = tuple(map(str, class_names)) if isinstance(class_names, Iterable) else ()
    if isinstance(class_names, str) or len(names) < 2 or len(set(names)) != len(names):
        raise ModelError(f"class_names is {class_names!r}; it takes two or more different names.")
    return names


def _spec_for_module(
    data_spec: DataSpec | None, features_from: str | None, drop_rate: float, drop_path_rate: float
) -> DataSpec:
    if data_spec is None:
        raise ModelError(
            "A backbone of your own needs data_spec: the size, mean, std, interpolation and crop its weights expect."
        )
    for option, value in (
        ("features_from", features_from),
        ("drop_rate", drop_rate),
        ("drop_path_rate", drop_path_rate),
    ):
        if value:
            raise ModelError(f"{option}={value!r} is for backbones by name; build your own module with it instead.")
    return data_spec


def _looks_normalised(pixels: torch.Tensor) -> bool:
    """Float pixels with values no 0-255 picture has: below 0, or a whole batch within 0-1.5 that is not constant."""
    if not pixels.is_floating_point() or pixels.is_meta or pixels.numel() == 0 or torch.compiler.is_compiling():
        return False
    low, high = (float(v) for v in pixels.detach().aminmax())
    return low < 0 or (high <= 1.5 and high > low)


def _trace_features(backbone: nn.Module, size: int, pool: str) -> Trace:
    try:
        return trace(backbone, lambda net, x: backbone_features(net, x, pool), (1, 3, size, size))
    except HeadstartError:
        raise
    except Exception as error:  # a module of the user's may raise anything
        raise ModelError(f"{type(backbone).__name__} does not run on pictures of {size} x {size}: {error}") from error


def check_head_kind(head: object) -> None:
    """Refuse what is no head, before anything is read.

    Raises:
        ModelError: neither a spec nor a module.
    """
    if not isinstance(head, (HeadSpec, nn.Module)):
        raise ModelError(
            f"head is {head!r}; it takes a HeadSpec, such as HeadSpec(hidden=(HiddenLayer(256),)), or a module that"
            " takes features [N, D] and gives logits [N, C]; of a list of layers make nn.Sequential(*layers)."
        )


def _refuse_batch_norms(part: nn.Module, what: str) -> None:
    for name, module in part.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{name or type(part).__name__} of the {what} ({type(module).__name__}) keeps no running statistics:"
                " what is said of a picture would depend on those beside it, and of one alone nothing could be said."
                " Build it with track_running_stats=True."
            )


def _check_head(head: nn.Module, num_features: int, num_classes: int) -> None:
    try:
        shape = trace(head, lambda h, x: h(x), (2, num_features)).output_shape
    except Exception as error:
        raise ModelError(f"The head does not run on features [N, {num_features}]: {error}") from error
    if shape != (2, num_classes):
        raise ModelError(
            f"The head gives {shape} for two pictures with {num_features} features; expected (2, {num_classes}), one "
            "logit per class."
        )
    squashed = _gives_probabilities(head, num_features)
    if squashed:
        raise ModelError(
            f"The head gives probabilities; expected logits, of which the loss takes the softmax itself: after two"
            f" of them no class could be sure. Leave the {squashed} at its end out."
        )


def _gives_probabilities(head: nn.Module, num_features: int) -> str:
    """What a head seems to end in, by what it gives of some random features; empty where that is no probabilities."""
    first = next(head.parameters(), torch.empty(0))
    if first.is_meta or not first.is_floating_point():
        return ""
    noise = torch.randn(16, num_features, generator=torch.Generator().manual_seed(0))
    x = torch.cat([noise, 100 * noise]).to(first.device, first.dtype)
    try:
        with evaluation_mode(head), torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = head(x).float()
    except Exception:  # one that takes no such features has just run on others
        return ""
    if not bool(((out >= 0) & (out <= 1)).all()) or out.max() == out.min():
        return ""
    return "softmax" if bool((out.sum(1) - 1).abs().max() < 1e-3) else "sigmoid"
