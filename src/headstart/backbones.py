"""Pretrained networks by their timm name, without their classifier; timm is the registry.

`create_backbone` gives the timm module itself, so names and block patterns are timm's (`layer4`, `blocks.6`). What
stands behind the point where the features are taken is removed, so that nothing is counted, saved or trained that is
never used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dataspec import DataSpec
from .errors import CheckpointError, ModelError, RecipeError, SetupError, near_matches
from .recipe import POOLS
from .tracing import evaluation_mode, trace
from .weights import Adapt, adapted, find_weights, fits, from_hub_cache, load_strictly, reach_hub

_FIT_OF_CROP_MODE = {"center": "crop", "squash": "squash", "border": "letterbox"}
OVERRIDES = tuple(f.name for f in fields(DataSpec))
_LOCK = threading.Lock()


class PassThrough(nn.Module):
    """Stands where a block was removed: gives its first input back, whatever else the block was called with."""

    def forward(self, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return x


def create_backbone(
    name: str,
    *,
    weights: str | Path = "hub",
    pool: str = "backbone",
    features_from: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    image_size: int | None = None,
    seed: int | None = None,
) -> tuple[nn.Module, DataSpec]:
    """A timm network without its classifier, and the preprocessing its weights expect.

    Args:
        name: a timm model, with or without a weights tag (`resnet50`, `resnet50.a1_in1k`).
        weights: `hub` (through timm's cache), `none` (random), a `.safetensors`, `.pth` or `.pt` file, or a run
            folder. Files are loaded strictly: only the classifier may be missing from or left over in a file.
        pool: `backbone` keeps what the network does before its classifier; `avg`, `max` and `flatten` act on the
            feature map, and everything behind it is removed (VGG's fully connected layers).
        features_from: an earlier block to take the feature map from; everything behind it is removed.
        drop_rate, drop_path_rate: dropout and stochastic depth of the network while it is trained; 0 leaves timm's
            default alone. Most networks drop where they pool: with another `pool` there is none.
        image_size: side of the square input in pixels; None is the weights' own. Position embeddings are resampled.
        seed: seeds the random initialisation; None draws from the global generator.
    Returns:
        The module, in training mode, and its DataSpec: of the run folder where the weights come from one, otherwise
        timm's training configuration of the name (its larger test size is not used).
    Raises:
        ModelError: an unknown name or block, or an option that the network does not take.
        CheckpointError: a file or run folder that cannot be read or does not fit.
        SetupError: hub weights are neither in the cache nor to be had.
    """
    if pool not in POOLS:
        raise ModelError(f"pool is {pool!r}; allowed: {', '.join(POOLS)}.{near_matches(pool, POOLS)}")
    _check_name(name)
    stored = find_weights(weights, name)
    spec = stored.spec if stored and stored.spec else _timm_spec(name)
    spec = override_spec(spec, image_size=image_size)
    options = {k: v for k, v in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)) if v}
    with seeded(seed):
        net, adapt = _build(name, options, spec.image_size, hub=str(weights) == "hub")
    known = _remove_classifier(net)
    tensors = None
    if stored:
        known |= set(net.state_dict())
        tensors = adapted(stored, net, adapt)  # while the network is whole
    if pool != "backbone" or features_from:
        _remove_behind(net, spec.image_size, features_from, name)
    if stored:
        # What fits as it is stays so: some adaptations take a network without its head for another program's.
        if tensors is None or fits(net, stored.tensors):
            tensors = stored.tensors
        load_strictly(net, tensors, also_known=known, name=name, source=stored.source)
    return net, spec


def spec_of(name: str, weights: str | Path = "hub", *, data_spec: DataSpec | None = None, **changes: Any) -> DataSpec:
    """The preprocessing that `create_classifier` would give, which takes the same `data_spec` and changes.

    Nothing is built.

    Raises:
        ModelError, CheckpointError: as there. RecipeError: a change of something else.
    """
    check_overrides(changes)
    _check_name(name)
    stored = find_weights(weights, name) if Path(weights).is_dir() else None
    spec = data_spec or (stored.spec if stored and stored.spec else _timm_spec(name))
    return override_spec(spec, **changes)


def check_overrides(changes: Mapping[str, Any]) -> None:
    """Whether `override_spec` takes all of these names.

    Raises:
        RecipeError: a name that it does not know.
    """
    for name in changes:
        if name not in OVERRIDES:
            raise RecipeError(
                f"spec_overrides: unknown key {name!r}. Known: {', '.join(OVERRIDES)}.{near_matches(name, OVERRIDES)}"
            )


def override_spec(
    spec: DataSpec,
    *,
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    fit: str | None = None,
) -> DataSpec:
    """The preprocessing with every value that is not None put in place of its own."""
    given: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std, "interpolation": interpolation}
    given |= {"crop_pct": crop_pct, "fit": fit}
    return replace(spec, **{k: v for k, v in given.items() if v is not None})


# ---------------------------------------------------------------- names and preprocessing


def _check_name(name: str) -> None:
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ModelError(
            f"No timm model is called {name!r}.{near_matches(base, timm.list_models())} "
            "timm.list_models('*part*') lists the names."
        )
    tags = [n.partition(".")[2] for n in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ModelError(
            f"timm has no weights {tag!r} for {base}. It has: {', '.join(tags) or 'none'}.{near_matches(tag, tags)}"
        )


def _timm_spec(name: str) -> DataSpec:
    import timm
    from timm.data.config import resolve_data_config

    config: Any = timm.get_pretrained_cfg(name)
    resolve: Any = resolve_data_config
    values = resolve(pretrained_cfg=config.to_dict() if config else {}, args={})
    channels, height, width = values["input_size"]
    if channels != 3 or height != width:
        raise ModelError(f"{name} takes {channels} x {height} x {width}; only square colour pictures are supported.")
    interpolation = values["interpolation"]
    return DataSpec(
        image_size=int(height),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_pct=min(1.0, float(values["crop_pct"])),
        fit=_FIT_OF_CROP_MODE.get(values["crop_mode"], "crop"),
    )


# ---------------------------------------------------------------- building


def _build(name: str, options: dict[str, float], image_size: int, *, hub: bool) -> tuple[nn.Module, Adapt]:
    """The timm module with its classifier, and timm's own adaptation of stored weights to it."""
    import timm

    args: dict[str, Any] = dict(options)
    if _has_fixed_size(name):
        args["img_size"] = image_size
    try:
        if hub:
            return _from_hub(name, args), _as_it_is
        with _weights_left_out() as found:
            net = timm.create_model(name, pretrained=True, **args)
        return net, found.get("adapt") or _as_it_is
    except TypeError as error:
        refused = [o for o in args if o in str(error)]
        if not refused:
            raise
        raise ModelError(f"{name} takes no {refused[0]} ({args[refused[0]]} was given). Leave it at 0.") from error
    except (AssertionError, ValueError) as error:
        raise ModelError(f"{name} cannot be built with {args}: {error}.") from error


def _has_fixed_size(name: str) -> bool:
    import timm

    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def _as_it_is(tensors: dict[str, torch.Tensor], _net: nn.Module) -> dict[str, torch.Tensor]:
    return tensors


@contextmanager
def _weights_left_out() -> Iterator[dict[str, Any]]:
    """Have timm build a network without fetching weights, and learn how it would have adapted them.

    Each architecture hands its own function (torchvision's names, other patch sizes, resampled position embeddings)
    to timm's builder and nowhere else; there is no public way to ask for it.
    """
    from timm.models import _builder as builder

    _builder: Any = builder
    found: dict[str, Any] = {}

    def take_note(_model: nn.Module, *_args: Any, filter_fn: Any = None, **_kwargs: Any) -> None:
        def adapt(tensors: dict[str, torch.Tensor], net: nn.Module) -> dict[str, torch.Tensor]:
            try:
                return filter_fn(tensors, net)  # type: ignore[no-any-return]
            except TypeError:  # older ones take the tensors alone
                return filter_fn(tensors)  # type: ignore[no-any-return]

        found["adapt"] = adapt if filter_fn else None

    with _LOCK:
        load_pretrained = _builder.load_pretrained
        _builder.load_pretrained = take_note
        try:
            yield found
        finally:
            _builder.load_pretrained = load_pretrained


def _from_hub(name: str, args: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.models.is_model_pretrained(name):
        raise ModelError(f"timm has no pretrained weights for {name}. Pass --weights FILE, --weights RUN or none.")
    overlay = from_hub_cache(name)
    try:
        if not overlay:
            reach_hub()
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    except (TypeError, AssertionError):
        raise
    except Exception as error:  # the hub's client, its HTTP library and the socket all raise their own
        if "state_dict" in str(error):
            raise CheckpointError(f"The hub's weights do not fit {name}: {error}") from error
        reason = str(error).strip().splitlines()
        raise SetupError(
            f"The weights of {name} are not in the Hugging Face cache and could not be fetched "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Without network: pass "
            "--weights FILE (.safetensors or .pth), --weights RUN (an earlier run folder), --weights none (random), "
            "or put the weights into the cache (HF_HOME) on a machine that has network."
        ) from error


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]) if seed is not None else nullcontext():
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach for GPUs, too
        yield


# ---------------------------------------------------------------- removing what is not used


def _remove_classifier(net: nn.Module) -> set[str]:
    """Take the classifier off; returns the names of the tensors that went, and of any the checkpoint may have."""
    if not all(callable(getattr(net, n, None)) for n in ("reset_classifier", "forward_features", "forward_head")):
        raise ModelError(f"{type(net).__name__} is not a classification network: it has no classifier to take off.")
    before = set(net.state_dict())
    config = getattr(net, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    net.reset_classifier(0)  # type: ignore[operator]
    prefixes = (names,) if isinstance(names, str) else tuple(names)
    return before - set(net.state_dict()) | {f"{p}.{n}" for p in prefixes for n in ("weight", "bias")}


def _remove_behind(net: nn.Module, image_size: int, features_from: str | None, name: str) -> None:
    """Replace everything that does not act on the feature map (of the named block) by `PassThrough`."""
    shape = (1, 3, image_size, image_size)
    seen = trace(net, lambda n, x: n.forward_features(x), shape)
    if features_from is None:
        used = set(seen.first_use)
        _cut_out(net, {n for n, m in net.named_modules() if n and _owns(m) and not _any_used(n, m, used)})
        return
    block = block_aliases(net).get(features_from, (features_from,))[-1]
    calls = seen.first_calls()
    if block not in calls:
        names = (*block_aliases(net), *(n for n in calls if n))
        raise ModelError(f"{name} has no block {features_from!r}.{near_matches(features_from, names)}")
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = _block_output(net, block, x)
    behind = {n for n, call in calls.items() if call.start > calls[block].end}
    unused = {n for n, m in net.named_modules() if n and _owns(m) and n not in calls and not within(n, set(calls))}
    _cut_out(net, behind | unused)
    if not _same_output(net, expected, x):
        raise ModelError(
            f"Features cannot be taken from {features_from!r} of {name}: the network goes on around it (it stands "
            "inside a residual or parallel branch). Name a whole block, for example "
            f"{_whole_blocks(net, block, calls)}."
        )


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _any_used(name: str, module: nn.Module, used: set[str]) -> bool:
    return any(f"{name}.{n}" in used for n, _ in (*module.named_parameters(), *module.named_buffers()))


def within(name: str, names: Set[str]) -> bool:
    """Whether one of the modules named stands above this one."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in names for i in range(1, len(parts)))


def _cut_out(net: nn.Module, names: set[str]) -> None:
    for name in names:
        if not within(name, names):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, PassThrough())


def _block_output(net: nn.Module, block: str, x: torch.Tensor) -> torch.Tensor | None:
    found: list[torch.Tensor | None] = []
    # A copy, since the next activation may work in place.
    hook = net.get_submodule(block).register_forward_hook(
        lambda _m, _a, out: found.append(out.clone() if isinstance(out, torch.Tensor) else None)
    )
    try:
        with evaluation_mode(net), torch.no_grad():
            net.forward_features(x.to(_device(net)))  # type: ignore[operator]
    finally:
        hook.remove()
    return found[0] if found else None


def _same_output(net: nn.Module, expected: torch.Tensor | None, x: torch.Tensor) -> bool:
    if expected is None:
        return False
    try:
        with evaluation_mode(net), torch.no_grad():
            got = net.forward_features(x.to(_device(net)))  # type: ignore[operator]
    except (RuntimeError, TypeError, AttributeError, ValueError, AssertionError, IndexError):
        return False
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return False
    return got.is_meta or torch.equal(got, expected)


def _device(net: nn.Module) -> torch.device:
    return next((p.device for p in net.parameters()), torch.device("cpu"))


def _whole_blocks(net: nn.Module, block: str, calls: Mapping[str, Any]) -> str:
    parts = block.split(".")
    parents = [n for n in (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)) if n in calls]
    ends: Any = getattr(net, "feature_info", None) or []
    return ", ".join(dict.fromkeys([*parents, *(str(end["module"]) for end in ends if isinstance(end, dict))][:6]))


def block_aliases(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """VGG's blocks as the tutorials call them: `block1`..`block5` -> the modules of each, its pooling included."""
    features = getattr(net, "features", None)
    if type(net).__name__ != "VGG" or not isinstance(features, nn.Sequential):
        return {}
    blocks: list[list[str]] = [[]]
    for index, module in features.named_children():
        blocks[-1].append(f"features.{index}")
        if isinstance(module, nn.MaxPool2d):
            blocks.append([])
    return {f"block{i}": tuple(b) for i, b in enumerate(blocks, 1) if b}


# ---------------------------------------------------------------- features


def backbone_map(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The feature map [N, C, H, W] for normalised pictures [N, 3, S, S], whatever the network's own layout.

    Channels-last maps (Swin) are permuted; tokens [N, T, C] (ViT) lose their class and register tokens and are laid
    out on their grid.
    """
    return _as_map(net, backbone_output(net, x, "avg"))


def _as_map(net: nn.Module, out: Any) -> torch.Tensor:
    if not isinstance(out, torch.Tensor) or out.ndim not in (3, 4):
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ModelError(
            f"{type(net).__name__} gives {got}, not a feature map [N, C, H, W]; pooling it is not possible. "
            "Use pool='backbone'."
        )
    if out.ndim == 4:
        channels_last = "NHWC" in str(getattr(net, "output_fmt", "") or "")
        return out.permute(0, 3, 1, 2) if channels_last else out
    tokens = out[:, int(getattr(net, "num_prefix_tokens", 0) or 0) :]
    n, count, channels = tokens.shape
    side = round(count**0.5)
    if side * side != count:
        raise ModelError(f"{type(net).__name__} gives {count} tokens, which fill no square grid. Use pool='backbone'.")
    return tokens.transpose(1, 2).reshape(n, channels, side, side)


def backbone_features(net: nn.Module, x: torch.Tensor, pool: str) -> torch.Tensor:
    """Features [N, D] for normalised pictures [N, 3, S, S], pooled as asked; see `HeadSpec.pool`."""
    return pool_output(net, backbone_output(net, x, pool), pool)


def backbone_output(net: nn.Module, x: torch.Tensor, pool: str) -> Any:
    """What the network itself computes, before `pool_output`: its features for `backbone`, else its feature map.

    Nothing is checked here: a check of a value would keep this from being recorded as a graph.
    """
    if pool == "backbone" and hasattr(net, "forward_features") and hasattr(net, "forward_head"):
        return net.forward_head(net.forward_features(x), pre_logits=True)  # type: ignore[operator]
    return net(x) if pool == "backbone" else getattr(net, "forward_features", net)(x)


def pool_output(net: nn.Module, out: Any, pool: str) -> torch.Tensor:
    """Features [N, D] from a `backbone_output` for the same `pool`."""
    if pool == "backbone":
        if not isinstance(out, torch.Tensor) or out.ndim != 2:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ModelError(
                f"{type(net).__name__} gives {got}, not features [N, D]. Use pool='avg', 'max' or 'flatten'."
            )
        return out
    feature_map = _as_map(net, out)
    if pool == "avg":
        return feature_map.mean((2, 3))
    if pool == "max":
        return feature_map.amax((2, 3))
    return feature_map.flatten(1)
