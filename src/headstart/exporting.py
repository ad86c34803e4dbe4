"""A trained model as one file for other programs, written only where it says what the model says."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from . import portable
from .checkpoint import load
from .classifier import Classifier, as_classifier
from .dataset import list_image_files
from .decode import bad_reason
from .errors import ExportError, RecipeError, SetupError, in_words, near_matches
from .evaluation import predict_logits, unlabelled
from .files import read_csv, to_json, write_atomic
from .metrics import softmax
from .pixels import Pixels
from .run import check_own_folder, refuse_among_pictures
from .run_record import RunRecord, is_run, read_run
from .runtime import make_runtime
from .settings import own_settings
from .terminal import say

FORMATS = {"onnx": "ONNX", "pt2": "PyTorch's exported program"}
SCRIPT = "predict.py"
RECORD = "export.json"
LARGEST_DIFFERENCE = 1e-4  # of a probability; of a logit, as a share of the largest one
RECORDED_DIFFERENCE = 0.01  # of a probability that the run wrote down, perhaps on another machine
CHECKED = 64  # pictures of the run's own
MOST_BYTES = 2**31 - 2**24  # of weights in one ONNX file, which protobuf limits to 2 GiB


class _Deployed(nn.Module):
    """Pixels in, probabilities and logits out."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(pixels).float()
        return logits.softmax(1), logits


@dataclass(frozen=True)
class Export:
    """A model in another form, and how far it was found to agree.

    path: the folder; its files are `model.onnx` or `model.pt2`, `predict.py` and `export.json`.
    one_at_a_time: the file takes one picture, where others take any number at once.
    pictures: how many were asked about, by where they come from: `given`, `test`, `val`, `made`.
    same_label: on how many of them the two name the same class. recorded: how many the run had on record, too, and
    agrees about. probability, logit: the largest differences, the
    second as a share of the largest logit.
    """

    path: Path
    format: str
    one_at_a_time: bool
    pictures: Mapping[str, int]
    same_label: int
    recorded: int
    probability: float
    logit: float

    @property
    def file(self) -> Path:
        """The model itself."""
        return self.path / f"model.{self.format}"


@own_settings()
def export(
    run: str | Path | Classifier,
    out: str | Path | None = None,
    *,
    format: str = "onnx",
    pictures: str | Path | Sequence[str | Path] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Export:
    """Write a model for ONNX Runtime, or as PyTorch's exported program, and see that it says the same.

    The file takes `pixels`, uint8 [N, 3, S, S], normalises them itself, and gives `probs` and `logits`, float32
    [N, C]. Class names and preprocessing travel in it. Beside it `predict.py` goes from a picture's file to its label,
    with the very lines by which headstart reads and cuts pictures. Both are asked about pictures, from their bytes on,
    before anything is left in `out`; and what the run has on record for these is compared, too.

    Args:
        run: a run folder, or a model.
        out: the folder to write to; None is the run's with `-onnx` or `-pt2` behind it.
        format: `onnx` or `pt2`.
        pictures: files or folders to compare both on; None takes test pictures of the run, or else validation pictures,
            where they are still in their place. Some made ones of awkward kinds are looked at in any case.
        overwrite: replace an earlier export.
    Raises:
        ExportError: the network cannot be written in this form; what was written says something else than the model,
            or the model than the run has on record.
        CheckpointError: no model there; `out` holds something else. DataError: pictures that cannot be read.
        SetupError: a package is missing. RecipeError: an unknown format; a model without `out`.
    """
    _check_format(format)
    source = Path(run).absolute() if isinstance(run, (str, os.PathLike)) else None
    if out is None:
        if source is None:
            raise RecipeError("A model in memory has no folder to be written beside: give export an `out`.")
        out = source.with_name(f"{source.name}-{format}")
    names = (f"model.{format}", SCRIPT, RECORD)
    folder = check_own_folder(out, names, "an earlier export", overwrite=overwrite)
    asked: dict[str, list[Path]] = {}
    if pictures is not None:
        given = [pictures] if isinstance(pictures, (str, os.PathLike)) else pictures
        asked["given"] = list_image_files(given)
        for one in given:
            refuse_among_pictures(folder, one)
    # In single precision, in which runs are scored, whatever a model in memory computes in.
    model = (load(source) if source else deepcopy(as_classifier(run)).cpu()).float()
    recorded: dict[Path, NDArray[Any]] = {}
    if source and not asked and is_run(source):  # `save` writes the model alone
        record = read_run(source)
        root = (record.metrics.get("data") or {}).get("root")
        if root:
            refuse_among_pictures(folder, root)
            asked, recorded = _own_pictures(record, Path(os.path.normpath(root)), model.class_names)
    say(f"Writing the model as {FORMATS[format]}", enabled=progress)
    with TemporaryDirectory(prefix="headstart-") as made, _beside(folder) as temporary:
        new = Path(temporary)
        one_at_a_time = _write(model, new / names[0], format)
        asked["made"] = _made_pictures(Path(made))
        say(f"Asking both about {sum(map(len, asked.values()))} pictures", enabled=progress)
        agreement = _compare(model, new / names[0], [path for of in asked.values() for path in of], recorded)
        found = Export(folder, format, one_at_a_time, {k: len(v) for k, v in asked.items()}, **agreement)
        write_atomic(new / SCRIPT, Path(portable.__file__).read_bytes())
        write_atomic(new / RECORD, to_json(_described(model, found), indent=1) + b"\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)  # comes last: no record stands beside another model
        for name in names:
            (new / name).replace(folder / name)
    return found


def _check_format(format: str) -> None:
    if format not in FORMATS:
        hint = near_matches(format, tuple(FORMATS)) if isinstance(format, str) else ""
        raise RecipeError(f"format is {format!r}; it takes {' or '.join(FORMATS)}.{hint}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if format == "onnx" and missing:
        raise SetupError(f"ONNX needs {', '.join(missing)}. Install them: pip install 'headstart[export]'.")


def _beside(folder: Path) -> TemporaryDirectory[str]:
    """A passing folder on the same disk, so that what was found right in it is moved, not copied."""
    above = next(parent for parent in folder.parents if parent.is_dir())
    return TemporaryDirectory(prefix=f".{folder.name}-", dir=above)


# ---- writing ---------------------------------------------------------------------------------------------------


def _write(model: Classifier, path: Path, format: str) -> bool:
    """Write the model; returns whether it takes one picture at a time.

    Raises:
        ExportError: it cannot be written.
    """
    # Channels-last weights leave strides behind that not every view in a network bears, and other runtimes ignore.
    network = _Deployed(deepcopy(model).cpu().to(memory_format=torch.contiguous_format)).eval()
    if format == "onnx":  # whose converter takes attention over four dimensions alone, as a fused operation
        module: Any
        for module in network.modules():
            if getattr(module, "fused_attn", False) is True:  # timm's switch
                module.fused_attn = False
    if format == "onnx" and sum(t.nbytes for t in network.state_dict().values()) > MOST_BYTES:
        raise ExportError(
            f"The model has more than the {MOST_BYTES / 1e9:.1f} GB that one ONNX file holds. Take --format pt2."
        )
    pixels = torch.zeros((2, 3, model.spec.image_size, model.spec.image_size), dtype=torch.uint8)
    reason = ""
    for any_number in (True, False):
        batch, shapes = (pixels, {"pixels": {0: torch.export.Dim("N")}}) if any_number else (pixels[:1], None)
        try:
            with _quiet(), torch.no_grad():
                program = torch.export.export(network, (batch,), dynamic_shapes=shapes)
                data = _file(program, batch, format, _description(model, one_at_a_time=not any_number))
            break
        except Exception as error:  # whatever a network's own code, or a converter of its operations, may raise
            reason = reason or in_words(error.__cause__ or error)
    else:
        other = "pt2" if format == "onnx" else "onnx"
        raise ExportError(
            f"{model.backbone_name or type(model.backbone).__name__} cannot be written as {FORMATS[format]} by torch"
            f" {torch.__version__}: {reason}. It may be with --format {other}; the run folder itself is safetensors"
            " and JSON."
        )
    write_atomic(path, data)  # torch's own writers end the whole process where a disk is full
    return not any_number


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporters warn of what they do inside, and print a network that they cannot follow; what becomes of it
    is told in a line, and looked at."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _file(program: torch.export.ExportedProgram, batch: Tensor, format: str, description: Mapping[str, Any]) -> bytes:
    """The file's bytes."""
    text = to_json(description).decode()
    if format == "pt2":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={portable.DESCRIPTION: text})
        return buffer.getvalue()
    written = torch.onnx.export(
        program, (batch,), dynamo=True, input_names=["pixels"], output_names=["probs", "logits"], verbose=False
    )
    assert written is not None
    model = written.model
    for value in (*model.graph.inputs, *model.graph.outputs):  # torch numbers its names: s81
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape[0] = "N"
    # Where each step came from, with the paths of this machine's files.
    part: Any
    for part in (model, model.graph, *model.graph.all_nodes(), *model.functions.values()):
        part.metadata_props.clear()
        part.doc_string = None
    model.metadata_props[portable.DESCRIPTION] = text
    return bytes(written.model_proto.SerializeToString())


def _description(model: Classifier, *, one_at_a_time: bool) -> dict[str, Any]:
    """What travels in the file."""
    return {
        "class_names": list(model.class_names),
        "preprocessing": model.spec.to_dict(),
        "one_at_a_time": one_at_a_time,
        "backbone": model.backbone_name,
    }


def _described(model: Classifier, found: Export) -> dict[str, Any]:
    """What export.json holds."""
    n = 1 if found.one_at_a_time else "N"
    packages = ("headstart", "torch", "timm", *(("onnx", "onnxruntime") if found.format == "onnx" else ()))
    return {
        **_description(model, one_at_a_time=found.one_at_a_time),
        "input": {"name": "pixels", "type": "uint8", "shape": [n, 3, model.spec.image_size, model.spec.image_size]},
        "outputs": {name: {"type": "float32", "shape": [n, len(model.class_names)]} for name in ("probs", "logits")},
        "agreement": {
            "pictures": dict(found.pictures), "same_label": found.same_label, "on record": found.recorded,
            "largest_difference": {"probability": found.probability, "logit, of the largest": found.logit},
        },
        "versions": {name: version(name) for name in packages},
    }  # fmt: skip


# ---- seeing that both agree ------------------------------------------------------------------------------------


def _compare(
    model: Classifier, path: Path, files: Sequence[Path], recorded: Mapping[Path, NDArray[Any]]
) -> dict[str, Any]:
    """Ask the model and what was written about the same files, each from their bytes.

    Args:
        recorded: probabilities [C] that the run has written down, by file.
    Raises:
        ExportError: they say something else.
    """
    pixels = Pixels(unlabelled(files, model), model.spec, cache_bytes=0)
    own = predict_logits(model, pixels, runtime=make_runtime(device="cpu", precision="fp32")).numpy()
    expected = softmax(own)
    # What both share, the reading of pictures and model.json, may have changed since.
    for file, row in zip(files, expected, strict=True):
        if file in recorded and np.abs(row - recorded[file]).max() > RECORDED_DIFFERENCE:
            raise ExportError(
                f"The run has {_answer(model, recorded[file])} on record for {file.name}, and its model says"
                f" {_answer(model, row)} now: the picture, model.json or a package has changed since. Restore it, or"
                " name pictures to compare the export on, without the record, with --pictures."
            )
    try:
        probs, logits = portable.Exported(path).answers(files)
    except Exception as error:  # of another runtime
        raise ExportError(f"{path.name} was written and does not run: {in_words(error)}. Nothing is kept.") from None
    apart = {
        "probability": _largest(probs - expected, 1.0),
        "logit": _largest(logits - own, max(1.0, float(np.abs(own).max()))),
    }
    if not max(apart.values()) <= LARGEST_DIFFERENCE:  # nor where one of them is NaN
        worst = int(np.abs(probs - expected).max(1).argmax())
        raise ExportError(
            f"What was written as {path.name} is not the model: of {files[worst].name} it says"
            f" {_answer(model, probs[worst])}, and the model {_answer(model, expected[worst])}"
            f" (logits {apart['logit']:.1e} of the largest apart; allowed: {LARGEST_DIFFERENCE:g}). Nothing is kept."
        )
    return {"same_label": int((probs.argmax(1) == own.argmax(1)).sum()), "recorded": len(recorded), **apart}


def _largest(differences: NDArray[Any], unit: float) -> float:
    return float(np.abs(differences).max()) / unit


def _answer(model: Classifier, row: NDArray[Any]) -> str:
    return f"{model.class_names[row.argmax()]} with {row.max():.4f}"


def _own_pictures(
    record: RunRecord, root: Path, class_names: Sequence[str]
) -> tuple[dict[str, list[Path]], dict[Path, NDArray[Any]]]:
    """Test pictures of the run that can still be read, or else validation pictures, evenly over all; and what is on
    record for them."""
    for split in ("test", "val"):
        places = {Path(os.path.normpath(root / r["path"])): r["path"] for r in record.splits if r["split"] == split}
        there = [path for path in places if path.is_relative_to(root) and path.is_file()]
        chosen = [there[i] for i in np.linspace(0, len(there) - 1, min(CHECKED, len(there))).astype(int)]
        good = {path: places[path] for path in chosen if bad_reason(path) is None}
        if good:
            return {split: list(good)}, _on_record(record, good, class_names)
    return {}, {}


def _on_record(record: RunRecord, names: Mapping[Path, str], class_names: Sequence[str]) -> dict[Path, NDArray[Any]]:
    """The probabilities [C] that predictions.csv holds for these files."""
    wanted = {name: path for path, name in names.items()}
    rows = read_csv(  # with many classes all of it would be large
        record.path / "predictions.csv", columns=lambda row: row if row["path"] in wanted else ("path",)
    )
    columns = [f"p:{name}" for name in class_names]
    return {
        wanted[row["path"]]: np.array([float(row[column]) for column in columns])
        for row in rows
        if row["path"] in wanted and all(column in row for column in columns)
    }


def _made_pictures(folder: Path) -> list[Path]:
    """Pictures of awkward kinds: turned by their EXIF, transparent, 16 bits, four colours, tiny, very long."""
    rng = np.random.default_rng(0)

    def smooth(width: int, height: int, channels: int) -> NDArray[np.uint8]:
        small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
        more = rng.integers(0, 256, (height, width, 1), dtype=np.uint8)
        return np.concatenate([pixels, more], axis=2)[:, :, :channels]

    turned, mirrored = Image.Exif(), Image.Exif()
    turned[0x0112], mirrored[0x0112] = 6, 5
    deep = Image.fromarray(smooth(90, 120, 3)[:, :, 0].astype(np.uint16) * 257)
    cases: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "phone.jpg": (Image.fromarray(smooth(2000, 1500, 3)), {"quality": 90, "exif": turned}),
        "mirrored.jpg": (Image.fromarray(smooth(300, 200, 3)), {"exif": mirrored}),
        "grey.jpg": (Image.fromarray(smooth(250, 350, 3)).convert("L"), {}),
        "print.jpg": (Image.fromarray(smooth(320, 240, 3)).convert("CMYK"), {}),
        "transparent.png": (Image.fromarray(smooth(260, 260, 4)), {}),
        "deep.png": (deep, {}),
        "palette.gif": (Image.fromarray(smooth(200, 150, 3)).convert("P"), {}),
        "cut-out.png": (Image.fromarray(smooth(150, 200, 3)).convert("P"), {"transparency": 0}),
        "noise.webp": (Image.fromarray(rng.integers(0, 256, (333, 222, 3), dtype=np.uint8)), {"lossless": True}),
        "tiny.bmp": (Image.fromarray(smooth(7, 5, 3)), {}),
        "strip.png": (Image.fromarray(smooth(1200, 40, 3)), {}),
        "scan.tif": (Image.fromarray(smooth(180, 270, 3)), {}),
    }
    for name, (image, options) in cases.items():
        image.save(folder / name, **options)
    return [folder / name for name in cases]
