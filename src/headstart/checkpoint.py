"""Model files: safetensors for the tensors, JSON of a closed schema for the rest; never a pickle."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from .backbones import create_backbone
from .classifier import Classifier, as_classifier, create_classifier
from .dataspec import DataSpec
from .errors import CheckpointError, HeadstartError
from .files import to_json, write_atomic
from .heads import create_head
from .modelfile import read_header, read_json
from .recipe import HeadSpec
from .runtime import find_device
from .settings import own_settings
from .weights import refuse_not_finite

FORMAT, VERSION = "headstart-model", 1
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
_KEYS = {"format", "version", "backbone", "head", "pool", "class_names", "preprocessing", "versions"}
_LATER_KEYS = {"num_features"}  # files of earlier versions lack them

_ARGS: dict[str, tuple[type, ...]] = {
    "pool": (str,), "features_from": (str, type(None)), "drop_rate": (int, float), "drop_path_rate": (int, float),
    "image_size": (int,),
}  # fmt: skip


@own_settings()
def save(model: Classifier, folder: str | Path) -> Path:
    """Write `model.safetensors` and `model.json` into `folder` (made if absent), each replaced in one step.

    The tensors are those of `model.state_dict()`; where the head or the backbone is a module of the user's, the
    JSON holds null for it, and `load` asks for the module.

    Raises:
        CheckpointError: see `check_savable`; a folder that cannot be made.
    """
    model = as_classifier(model)
    card = _card(model)
    _check_card(model, card)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"No model can be written to {folder}: {error.strerror}. Name another folder.") from None
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    # Through bytes: safetensors' own writer makes files that nobody but the user may read.
    write_atomic(folder / "model.safetensors", to_safetensors(tensors, metadata={"format": "pt"}))
    write_atomic(folder / "model.json", to_json(card, indent=1) + b"\n")
    return folder


def _card(model: Classifier) -> dict[str, Any]:
    """What `model.json` holds."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "backbone": None if model.backbone_name is None else {"name": model.backbone_name, "args": model.backbone_args},
        "head": None if model.head_spec is None else model.head_spec.to_dict(),
        "pool": model.pool,
        "num_features": model.num_features,
        "class_names": list(model.class_names),
        "preprocessing": asdict(model.spec),
        "versions": {name: version(name) for name in ("headstart", "torch", "timm")},
    }


def check_savable(model: Classifier) -> None:
    """Refuse a model of which `load` would make another one, before it is trained for hours.

    Raises:
        CheckpointError: its tensors are of no kind that is written; it was changed by hand since it was made from a
            name or a spec, which is all that the files hold.
    """
    _check_card(model, _card(model))


def _check_card(model: Classifier, card: dict[str, Any]) -> None:
    state: dict[str, Any] = model.state_dict()
    odd = [n for n, t in state.items() if not isinstance(t, torch.Tensor) or t.dtype not in _DTYPES]
    if odd:
        raise CheckpointError(
            f"This model cannot be saved: {', '.join(odd[:3])} is no tensor of floats, whole numbers of 32 or 64 bits,"
            " bytes or flags. Keep it in another form."
        )
    with torch.device("meta"):
        if model.backbone_name is not None:
            net, _ = create_backbone(model.backbone_name, weights="none", **model.backbone_args)
            advice = "make a classifier of the changed network: create_classifier(network, class_names, data_spec=...)"
            _require_same("backbone", model.backbone, net, advice)
        if model.head_spec is not None:
            try:
                head = create_head(model.head_spec, model.num_features, len(model.class_names))
            except HeadstartError as error:  # names changed by hand
                raise CheckpointError(f"This model cannot be saved: its head fits it no more. {error}") from None
            advice = "put the head on as a module: new_head(model, class_names, head=module)"
            _require_same("head", model.head, head, advice)


def _require_same(part: str, own: nn.Module, made: nn.Module, advice: str) -> None:
    """The part has the modules and tensors of one that is made anew."""
    now, then = _described(own), _described(made)
    changed = [name for name in (*now, *(n for n in then if n not in now)) if now.get(name) != then.get(name)]
    if changed:
        one = changed[0]
        raise CheckpointError(
            f"The {part} is another than its name or spec makes, which is all that the files hold: {one or 'it'} is"
            f" {now.get(one, 'not there')}, was {then.get(one, 'not there')}. To keep it, {advice}."
        )


def _described(part: nn.Module) -> dict[str, str]:
    """The kind of each module, and shape and format of each tensor; a BatchNorm over several processes is one."""
    kinds = {name: type(module).__name__ for name, module in part.named_modules()}
    plain = dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"), "BatchNorm")
    plain |= {"SyncBatchNormAct": "BatchNormAct2d"}
    tensors = {n: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for n, t in part.state_dict().items()}
    return {name: plain.get(kind, kind) for name, kind in kinds.items()} | tensors


@own_settings()
def load(
    folder: str | Path,
    *,
    backbone: nn.Module | None = None,
    head: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Rebuild the classifier that `save` wrote; every tensor is checked for name, shape and type before it is read.

    The architecture is first built on the meta device, which takes no memory, and compared with the tensor file's
    header: a description that asks for more than the file holds allocates nothing.

    Args:
        folder: a run folder, or any folder `save` wrote to.
        backbone, head: the user's own modules, where the model was made with them; their weights are overwritten.
        device: as in `make_runtime`.
    Raises:
        SetupError: no such device here.
        CheckpointError: no model there, a module of the user's not given, an unknown key, a missing, unexpected or
            misshapen tensor.
    """
    folder, device = Path(folder), find_device(str(device))
    card = read_card(folder)
    for part, given in (("backbone", backbone), ("head", head)):
        if given is not None and card[part] is not None:
            raise CheckpointError(
                f"{folder / 'model.json'} describes the model's {part}, so {part}= would change nothing. Leave it out;"
                " to put another head on its backbone there is new_head."
            )
    tensors = folder / "model.safetensors"
    try:
        if card["backbone"] is not None:
            with torch.device("meta"):
                plan = _rebuild(card, backbone=backbone, head=head)
            _check_tensors(plan, tensors)
        model = _rebuild(card, backbone=backbone, head=head)
    except _UnfitFile:
        raise
    except (HeadstartError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'model.json'}: this model cannot be rebuilt: {error}") from error
    _check_tensors(model, tensors)
    _read_tensors(model, tensors)
    return model.to(device).eval()


def _rebuild(card: dict[str, Any], *, backbone: nn.Module | None, head: nn.Module | None) -> Classifier:
    spec = DataSpec.from_dict(card["preprocessing"])
    part: HeadSpec | nn.Module
    if card["head"] is not None:
        part = HeadSpec.from_dict(card["head"])
    elif head is None:
        raise _own_module("head")
    else:
        part = head
    if card["backbone"] is None:
        if backbone is None:
            raise _own_module("backbone")
        pool = None if isinstance(part, HeadSpec) else card["pool"]
        return create_classifier(backbone, card["class_names"], head=part, data_spec=spec, pool=pool)
    name, args = card["backbone"]["name"], dict(card["backbone"]["args"])
    if isinstance(part, HeadSpec):
        del args["pool"], args["features_from"]  # the spec holds them
    return create_classifier(
        name,
        card["class_names"],
        head=part,
        weights="none",
        data_spec=spec,
        num_features=card.get("num_features"),
        **args,
    )


def _own_module(part: str) -> CheckpointError:
    return CheckpointError(
        f"the {part} is a module of the user's own, which the files do not hold. Load it from Python with the module:"
        f" headstart.load(folder, {part}=module)."
    )


class _UnfitFile(CheckpointError):
    """The tensor file is broken or another model's."""


def _check_tensors(model: Classifier, path: Path) -> None:
    """Compare names, shapes and types in the file's header with the model."""
    try:
        header = read_header(path)
    except (OSError, CheckpointError) as error:
        raise _UnfitFile(f"{path}: cannot be read as safetensors ({error}).") from None
    wanted = model.state_dict()
    found = {name: (info.shape, info.dtype) for name, info in header.items()}
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in wanted]
    for name, tensor in wanted.items():
        expected = (tuple(tensor.shape), _DTYPES.get(tensor.dtype, str(tensor.dtype)))
        if name in found and found[name] != expected:
            problems.append(f"{name}: {found[name]} in the file, {expected} in the model")
    if problems:
        raise _UnfitFile(f"{path}: the tensors do not fit the model. {'; '.join(problems[:10])}.")


def _read_tensors(model: Classifier, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in model.state_dict()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}).") from None
    weights = {n for n, _ in model.named_parameters()}
    refuse_not_finite({n: t for n, t in tensors.items() if n in weights or "running_" in n}, path)
    model.load_state_dict(tensors)


def read_card(folder: Path) -> dict[str, Any]:
    """`model.json` as a dict, its format, version and keys checked."""
    path = folder / "model.json"
    if not path.is_file():
        raise CheckpointError(
            f"No model in {folder}: {path.name} is missing. Expected a run folder, as `fit` leaves it."
        )
    try:
        card = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no model description: {error}.") from None
    if card.get("format") != FORMAT or card.get("version") != VERSION:
        raise CheckpointError(f"{path}: not a model description of this program (format {FORMAT}, version {VERSION}).")
    odd = sorted((set(card) - _LATER_KEYS) ^ _KEYS)
    if odd:
        raise CheckpointError(f"{path}: missing or unknown keys: {', '.join(odd)}.")
    _check_backbone(card["backbone"], path)
    names = card["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: class_names is {names!r:.100}; it takes a list of names.")
    width = card.get("num_features")
    if width is not None and (type(width) is not int or width < 1):
        raise CheckpointError(f"{path}: num_features is {width!r:.100}; it takes a whole number from 1.")
    return card


def _check_backbone(part: Any, path: Path) -> None:
    if part is None:
        return
    is_known = isinstance(part, dict) and set(part) == {"name", "args"} and isinstance(part["name"], str)
    args = part["args"] if is_known else None
    if not isinstance(args, dict) or set(args) != set(_ARGS):
        raise CheckpointError(
            f"{path}: backbone takes a name and args of {', '.join(_ARGS)}, and nothing else; it is {part!r:.200}."
        )
    wrong = [key for key, value in args.items() if isinstance(value, bool) or not isinstance(value, _ARGS[key])]
    if wrong:
        raise CheckpointError(f"{path}: backbone args have a wrong type: {', '.join(wrong)}.")
