"""Stored weights: read a file or an earlier run without running code from it, and load them strictly."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dataspec import DataSpec
from .errors import CheckpointError, HeadstartError, near_matches
from .modelfile import check_archive, read_header, read_json

Adapt = Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]]

_NESTINGS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
_PICKLES = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class StoredWeights:
    """Named tensors of a backbone, where they came from, and the preprocessing where it came with them."""

    tensors: dict[str, torch.Tensor]
    source: Path
    spec: DataSpec | None = None


def find_weights(weights: str | Path, name: str) -> StoredWeights | None:
    """What `weights` points to for the backbone `name`; None for `hub` and `none`, which point to no file.

    Raises:
        CheckpointError: there is nothing, it cannot be read, or the run's backbone is another one.
    """
    if str(weights) in ("hub", "none"):
        return None
    path = Path(weights)
    if path.is_dir():
        return _read_run(path, name)
    if not path.is_file():
        raise CheckpointError(
            f"Weights {str(weights)!r}: no such file or folder. Allowed: hub, none, a .safetensors, .pth or .pt file, "
            f"or a run folder.{near_matches(str(weights), ('hub', 'none'))}"
        )
    return StoredWeights(read_weights(path), path)


def contents_of(weights: str | Path) -> str:
    """Some letters that tell what stands in a weights file, or in a run's, apart from what stood there before.

    Empty for `hub`, `none`, and where there is no such file.
    """
    path = Path(weights) / "model.safetensors" if Path(weights).is_dir() else Path(weights)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    except OSError:
        return ""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a `.safetensors`, `.pth` or `.pt` file; pickled code is never run.

    Common nestings (`state_dict`, `model`, ...; averaged weights only where there are no others) and wrapper prefixes
    (`module.`, `_orig_mod.`) are taken off.

    Raises:
        CheckpointError: another kind of file, a damaged one, or one that holds more than tensors.
    """
    if path.suffix not in (".safetensors", *_PICKLES):
        kind = f"files of type {path.suffix}" if path.suffix else "files without a suffix"
        raise CheckpointError(f"Weights {path}: {kind} are not read. Allowed: .safetensors, {', '.join(_PICKLES)}.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            read_header(path)
            return _named_tensors(load_file(path), path)
        except (CheckpointError, SafetensorError, OSError) as error:
            raise CheckpointError(f"Weights {path}: not a readable safetensors file ({error}).") from error
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols, which are not the user's to choose
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive may raise anything
        raise CheckpointError(
            f"Weights {path}: refused by PyTorch's weights-only reader ({_reason(error)}). The file is damaged, or "
            "holds Python objects besides tensors, and reading those could run code of whoever wrote it. Where you "
            "trust it, load it once yourself and save model.state_dict() as .safetensors."
        ) from error
    return _named_tensors(stored, path)


def _reason(error: Exception) -> str:
    """Our own words: PyTorch's message goes on to say how to run the code all the same."""
    if isinstance(error, CheckpointError):
        return str(error)
    found = re.search(r"GLOBAL:? (?:GLOBAL )?([\w.]+)", str(error))
    return f"it holds {found[1]}, which is no tensor" if found else "it is cut off, or was not written by torch.save"


def _named_tensors(stored: Any, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(stored, Mapping):
        inner = next((n for n in _NESTINGS if isinstance(stored.get(n), Mapping)), None)
        if inner is None:
            break
        stored = stored[inner]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, torch.Tensor) for v in stored.values()):
        raise CheckpointError(
            f"Weights {path}: no named tensors in it (expected a state_dict, alone or under {', '.join(_NESTINGS)})."
        )
    odd = [str(k) for k, v in stored.items() if not _is_whole(v)]
    if odd:
        raise CheckpointError(f"Weights {path}: not plain tensors with all their numbers in the file: {_listed(odd)}.")
    tensors = {str(k): v for k, v in stored.items()}
    for prefix in _WRAPPERS:
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _is_whole(tensor: torch.Tensor) -> bool:
    """A dense tensor on the CPU with a number of its own in the file for each element.

    A stride of 0 or the meta device make shapes of any size out of nothing, and what copies them fills the memory.
    """
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _read_run(path: Path, name: str) -> StoredWeights:
    """The backbone of an earlier run, with the preprocessing it was trained with."""
    try:
        card = read_json(path / "model.json")
        backbone, spec = card["backbone"], DataSpec.from_dict(card["preprocessing"])
        own_name = None if backbone is None else str(backbone["name"])
    except FileNotFoundError:
        raise CheckpointError(f"Weights {path}: this folder is no run of headstart (it has no model.json).") from None
    except (KeyError, TypeError, HeadstartError) as error:
        raise CheckpointError(f"Weights {path}: model.json does not describe a model ({error!r}).") from error
    if own_name is None:
        raise CheckpointError(
            f"Weights {path}: the run's backbone is a module of its maker's own, not {name}. Load it with "
            "headstart.load(run, backbone=module) and pass model.backbone to create_classifier."
        )
    if own_name.partition(".")[0] != name.partition(".")[0]:
        raise CheckpointError(f"Weights {path}: the run's backbone is {own_name}, not {name}. Ask for {own_name}.")
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(f"Weights {path}: the run has no model.safetensors; it was not finished.")
    tensors = read_weights(path / "model.safetensors")
    prefix = "backbone."
    return StoredWeights({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path, spec)


def fits(net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether every tensor of the network is there under its own name and with its own shape."""
    own = net.state_dict()
    return all(k in tensors and tensors[k].shape == own[k].shape for k in own if not _may_miss(k))


def adapted(stored: StoredWeights, net: nn.Module, adapt: Adapt) -> dict[str, torch.Tensor] | None:
    """The tensors under the whole network's names and for its input size, as timm does it for what it downloads.

    None where timm's function for this architecture can make nothing of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # remarks about speed, from where timm interpolates
            return dict(adapt(dict(stored.tensors), net))
    except Exception:  # written for files of this architecture; with another anything may go wrong
        return None


def load_strictly(
    net: nn.Module, tensors: Mapping[str, torch.Tensor], *, also_known: set[str], name: str, source: Path
) -> None:
    """Load into what the network has left.

    Args:
        also_known: tensors the whole network has besides (its classifier, what was removed); they are left out.
    Raises:
        CheckpointError: listing what is missing, unexpected or of another shape.
    """
    own = net.state_dict()
    problems = {
        "missing": [k for k in own if k not in tensors and not _may_miss(k)],
        "unexpected": [k for k in tensors if k not in own and k not in also_known and not _may_miss(k)],
        "of another shape": [
            f"{k} ({tuple(tensors[k].shape)}, expected {tuple(own[k].shape)})"
            for k in own
            if k in tensors and tensors[k].shape != own[k].shape
        ],
    }
    wrong = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys]
    if wrong:
        raise CheckpointError(f"Weights {source} do not fit {name}. Outside the classifier, {'; '.join(wrong)}.")
    refuse_not_finite({k: tensors[k] for k in own if k in tensors}, source)
    net.load_state_dict({k: tensors.get(k, own[k]) for k in own})


def refuse_not_finite(tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """No weight may be NaN or infinite, and no variance negative.

    A ReLU that its convolution does makes zeros of NaN (see `fastconv`), so that outputs would look sound.

    Raises:
        CheckpointError: naming the tensors.
    """
    wrong = [name for name, values in tensors.items() if values.is_floating_point() and not values.isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"{source} holds weights that are NaN or infinite: {_listed(wrong)}. The file is damaged, or the training"
            " that wrote it went wrong; get it again, or take another one."
        )
    negative = [name for name, values in tensors.items() if name.endswith("running_var") and bool((values < 0).any())]
    if negative:
        raise CheckpointError(f"{source} holds variances below 0: {_listed(negative)}. The file is damaged.")


def _may_miss(key: str) -> bool:
    """BatchNorm's step counter, which files from before PyTorch 0.4.1 and other programs do not have."""
    return key.endswith("num_batches_tracked")


def _listed(keys: list[str], limit: int = 20) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def from_hub_cache(name: str) -> dict[str, Any] | None:
    """Point timm to the file in the Hugging Face cache, so that no request is made for what is already there."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    config: Any = timm.get_pretrained_cfg(name)
    if not config.hf_hub_id or config.custom_load or config.hf_hub_filename:
        return None
    for file in ("model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(config.hf_hub_id, file)
        if isinstance(path, str):
            return {"file": path}
    return None


def reach_hub() -> None:
    """Ask the hub once, since its client would otherwise try for most of a minute before it gives up."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=10)
