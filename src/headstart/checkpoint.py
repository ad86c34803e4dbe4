"""Model files: safetensors for the tensors, JSON of a closed schema for the rest; never a pickle."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from .classifier import Classifier, create_classifier
from .errors import CheckpointError, HeadstartError
from .recipe import HeadSpec
from .run import to_json, write_atomic
from .transforms import DataSpec

FORMAT, VERSION = "headstart-model", 1
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
_KEYS = {"format", "version", "backbone", "head", "pool", "class_names", "preprocessing", "versions"}


def save(model: Classifier, folder: str | Path) -> Path:
    """Write `model.safetensors` and `model.json` into `folder` (made if absent), each replaced in one step.

    The tensors are those of `model.state_dict()`; where the head or the backbone is a module of the user's, the
    JSON holds null for it, and `load` asks for the module.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": None if model.backbone_name is None else {"name": model.backbone_name, "args": model.backbone_args},
        "head": None if model.head_spec is None else model.head_spec.to_dict(),
        "pool": model.pool,
        "class_names": list(model.class_names),
        "preprocessing": asdict(model.spec),
        "versions": {name: version(name) for name in ("headstart", "torch", "timm")},
    }
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    # Through bytes: safetensors' own writer makes files that nobody but the user may read.
    write_atomic(folder / "model.safetensors", to_safetensors(tensors, metadata={"format": "pt"}))
    write_atomic(folder / "model.json", to_json(card, indent=1) + b"\n")
    return folder


def load(
    folder: str | Path,
    *,
    backbone: nn.Module | None = None,
    head: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Rebuild the classifier that `save` wrote; every tensor is checked for name, shape and type before it is read.

    Args:
        folder: a run folder, or any folder `save` wrote to.
        backbone, head: the user's own modules, where the model was made with them; their weights are overwritten.
    Raises:
        CheckpointError: no model there, a module of the user's not given, an unknown key, a missing, unexpected or
            misshapen tensor.
    """
    folder = Path(folder)
    card = read_card(folder)
    try:
        model = _rebuild(card, backbone=backbone, head=head)
    except (HeadstartError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'model.json'}: this model cannot be rebuilt: {error}") from error
    _read_tensors(model, folder / "model.safetensors")
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
    return create_classifier(name, card["class_names"], head=part, weights="none", data_spec=spec, **args)


def _own_module(part: str) -> CheckpointError:
    return CheckpointError(
        f"the {part} is a module of the user's own, which the files do not hold. Load it from Python with the module:"
        f" headstart.load(folder, {part}=module)."
    )


def _read_tensors(model: Classifier, path: Path) -> None:
    """Compare names, shapes and types in the file's header with the model, then read."""
    wanted = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            problems = [f"missing: {name}" for name in wanted if name not in found]
            problems += [f"unexpected: {name}" for name in found if name not in wanted]
            for name, tensor in wanted.items():
                expected = (tuple(tensor.shape), _DTYPES[tensor.dtype])
                if name in found and found[name] != expected:
                    problems.append(f"{name}: {found[name]} in the file, {expected} in the model")
            if problems:
                raise CheckpointError(f"{path}: the tensors do not fit the model. {'; '.join(problems[:10])}.")
            model.load_state_dict({name: file.get_tensor(name) for name in wanted})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}).") from None


def read_card(folder: Path) -> dict[str, Any]:
    """`model.json` as a dict, its format, version and keys checked."""
    path = folder / "model.json"
    if not path.is_file():
        raise CheckpointError(
            f"No model in {folder}: {path.name} is missing. Expected a run folder, as `fit` leaves it."
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error}).") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT or card.get("version") != VERSION:
        raise CheckpointError(f"{path}: not a model description of this program (format {FORMAT}, version {VERSION}).")
    if set(card) != _KEYS:
        odd = sorted(set(card) ^ _KEYS)
        raise CheckpointError(f"{path}: missing or unknown keys: {', '.join(odd)}.")
    return card
