"""Predict and score: every picture in evaluation mode, from its plain view, or from several where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .arrays import Pictures, pictures_of
from .checkpoint import load
from .classifier import Classifier, as_classifier
from .dataset import ImageTable
from .errors import DataError, RecipeError
from .familiar import Known, check_share, known_of
from .features import Source
from .memory import in_portions
from .metrics import evaluate_probs, softmax
from .once import Advance, fast_kernels
from .pixels import Pixels
from .recipe import POLICIES
from .runtime import Runtime, make_runtime
from .settings import own_settings
from .stock import is_stock
from .terminal import ProgressBar
from .threads import alone_with
from .tracing import evaluation_mode

MOST_VIEWS = 100
PREDICTED_AT_ONCE = 8192


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the N labelled pictures of `table`.

    probs: float64 [N, C], each row sums to 1. metrics: the figures, as `evaluate_run` returns them.
    """

    table: ImageTable
    probs: np.ndarray
    metrics: dict[str, Any]

    @classmethod
    def from_logits(cls, logits: Tensor, table: ImageTable) -> Self:
        """Score logits [N, C], in the order of the table."""
        return cls.from_probs(softmax(logits.numpy()), table)

    @classmethod
    def from_probs(cls, probs: np.ndarray, table: ImageTable) -> Self:
        """Score probabilities [N, C], in the order of the table."""
        return cls(table, probs, evaluate_probs(probs, table.labels, table.class_names))

    def only(self, mask: np.ndarray) -> dict[str, Any] | None:
        """The metrics on the pictures of a mask [N]; None where it takes none."""
        if not mask.any():
            return None
        return evaluate_probs(self.probs[mask], self.table.labels[mask], self.table.class_names)

    @property
    def preds(self) -> np.ndarray:
        """The most probable class id of each picture, [N]."""
        return np.asarray(self.probs.argmax(axis=1))


@own_settings()
def predict_logits(
    model: Classifier,
    pixels: Pixels,
    *,
    runtime: Runtime | None = None,
    advance: Advance | None = None,
    view: int = 0,
    mirrored: bool = False,
) -> Tensor:
    """Logits [N, C] in float32, in the order of the table; the last short batch is included.

    Args:
        pixels: the pictures, prepared for the model: `headstart.pixels.Pixels(table, model.spec)`.
        runtime: None computes in float32 on what `make_runtime` finds.
        advance: called with the number of pictures done.
        view: which view of each picture is looked at; 0 is the plain one.
        mirrored: left and right are swapped.
    Raises:
        DataError: a file cannot be read. ModelError: pictures of a size that the backbone does not take.
        SetupError: memory runs out with a single picture.
    """
    runtime = runtime or make_runtime(precision="fp32")
    return _rows(model, pixels, runtime, advance=advance, view=view, mirrored=mirrored)


@own_settings()
def predict_features(
    model: Classifier, pixels: Pixels, *, runtime: Runtime | None = None, advance: Advance | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [N, C] of the plain views, and the pooled features [N, D] from which the head makes them; float32.

    Args and raises: as in `predict_logits`.
    """
    runtime = runtime or make_runtime(precision="fp32")
    rows = _rows(model, pixels, runtime, advance=advance, features=True)
    logits, features = rows.split([len(model.class_names), model.num_features], dim=1)
    return logits.contiguous(), features.contiguous()


def _rows(
    model: Classifier,
    pixels: Pixels,
    runtime: Runtime,
    *,
    advance: Advance | None,
    view: int = 0,
    mirrored: bool = False,
    features: bool = False,
) -> Tensor:
    mine = runtime.share(torch.arange(len(pixels)))
    batches = (pixels.batch(part.tolist(), [view] * len(part)) for part in mine.split(runtime.batch_size))
    with scoring(model, runtime, features=features) as logits_of:
        rows = logits_of(batches, mirrored=mirrored, advance=advance)
    return runtime.gather(rows, len(pixels)).cpu()


class LogitsOf(Protocol):
    """Logits [N, C] in float32, on the device, of batches of pictures, uint8 [B, 3, S, S]; see `predict_logits`."""

    def __call__(
        self, batches: Iterable[Tensor], *, mirrored: bool = False, advance: Advance | None = None
    ) -> Tensor: ...


@contextmanager
def scoring(model: Classifier, runtime: Runtime, *, features: bool = False) -> Iterator[LogitsOf]:
    """The model made ready to be asked, which may take longer than an answer: what is yielded answers any number.

    With `features` each row goes on behind its logits: [N, C + D], with the D pooled features.

    In several threads one model is used by one after the other, since kernels and modes are changed in it: it is this
    thread's alone until the end.
    """
    fills = is_stock(model)

    def logits_of(batches: Iterable[Tensor], *, mirrored: bool = False, advance: Advance | None = None) -> Tensor:
        def compute(batch: Tensor) -> Tensor:
            batch = batch.to(runtime.device)
            batch = batch.flip(-1) if mirrored else batch
            if not features:
                logits: Tensor = model(batch)
                return logits.float()
            pooled = model.features(batch)
            return torch.cat([model.head(pooled).float(), pooled.float()], dim=1)

        rows = []
        with torch.inference_mode(), runtime.autocast():
            for batch in batches:
                rows.append(_scored(compute, batch, runtime, fills=fills))
                if advance:
                    advance(len(batch))
        width = len(model.class_names) + (model.num_features if features else 0)
        return torch.cat(rows) if rows else torch.zeros(0, width, device=runtime.device)

    with alone_with(model):
        model.to(runtime.device)
        with evaluation_mode(model), fast_kernels(model, runtime):
            yield logits_of


def tta_views(tta: str | int) -> list[tuple[int, bool]]:
    """The (view, mirrored) that are averaged: `none` is the plain view, `flip` also mirrors it, N is N views.

    Raises:
        RecipeError: anything else.
    """
    if tta == "none":
        return [(0, False)]
    if tta == "flip":
        return [(0, False), (0, True)]
    text = str(tta)
    if not text.isdecimal() or not 2 <= int(text) <= MOST_VIEWS:
        raise RecipeError(
            f"tta is {tta!r}; it takes none, flip (the picture and its mirror image) or a number of views from 2 to"
            f" {MOST_VIEWS}, the plain one included."
        )
    return [(view, False) for view in range(int(text))]


def predict_probs(
    model: Classifier,
    pixels: Pixels,
    *,
    tta: str | int = "none",
    runtime: Runtime | None = None,
    advance: Advance | None = None,
    features: list[Tensor] | None = None,
) -> np.ndarray:
    """Probabilities [N, C]; with `tta` the mean over several views of each picture (test-time augmentation).

    Args:
        tta: see `tta_views`; the views of a number are the plain one and crops and flips of policy `light`, the same
            ones for every picture, so that a prediction does not depend on what stands beside it.
        advance: called with the number of pictures done, for each view.
        features: a list to which the pooled features [N, D] of the plain view are added.
    """
    views = tta_views(tta)
    pixels = pixels.with_views(POLICIES["light"], alike=True) if len(views) > 1 else pixels
    sums = np.zeros((len(pixels), len(model.class_names)))
    for view, mirrored in views:
        if features is not None and (view, mirrored) == (0, False):
            logits, pooled = predict_features(model, pixels, runtime=runtime, advance=advance)
            features.append(pooled)
        else:
            logits = predict_logits(model, pixels, runtime=runtime, advance=advance, view=view, mirrored=mirrored)
        sums += softmax(logits.numpy())
    return sums / len(views)


@own_settings()
def evaluate(
    model: Classifier,
    table: ImageTable,
    *,
    tta: str | int = "none",
    runtime: Runtime | None = None,
    advance: Advance | None = None,
) -> Evaluation:
    """Score the model on labelled pictures.

    Args:
        tta: views over which the probabilities are averaged: `none` is the plain one, `flip` that and its mirror image,
            N (2 to 100) that and N - 1 crops and flips of policy `light`, the same ones for every picture.
        runtime: None computes in float32 on what `make_runtime` finds.
        advance: called with the number of pictures done, for each view.
    Raises:
        DataError: the table's classes are not the model's; a file cannot be read. RecipeError: another `tta`.
    """
    if not isinstance(table, ImageTable):
        raise DataError(
            f"evaluate takes an ImageTable, such as load_images(folder) or splits.test; this is {type(table).__name__}."
            " evaluate_run scores a folder."
        )
    require_classes(model, table.class_names)
    runtime = runtime or make_runtime(precision="fp32")
    pixels = Pixels(table, model.spec, workers=runtime.workers, cache_bytes=0)
    return Evaluation.from_probs(predict_probs(model, pixels, tta=tta, runtime=runtime, advance=advance), table)


def require_classes(model: Classifier, class_names: Sequence[str]) -> None:
    """Refuse pictures whose classes are not the model's, in its order.

    Raises:
        DataError: they are not.
    """
    if tuple(class_names) != model.class_names:
        raise DataError(
            f"The pictures' classes ({', '.join(class_names)}) are not the model's ({', '.join(model.class_names)})."
            " Load them with load_images(folder, class_names=model.class_names)."
        )


def predict_files(
    run: str | Path | Classifier,
    paths: str | Path | Iterable[str | Path] | Pictures,
    *,
    tta: str | int = "none",
    unknown: float | None = None,
    device: str = "auto",
    precision: str = "fp32",
    workers: int | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Predict pictures with a saved model.

    Args:
        run: a run folder, or a model that `load` has read once.
        paths: files, or pictures in memory as `images_from_arrays` takes them, whose `path` is then their number.
        tta: as in `evaluate`.
        unknown: call a picture unknown that is less familiar than all but this share of the run's validation pictures,
            such as 0.05; the run must have learnt by `learn_familiar` what is familiar.
        device, precision, workers: as in `make_runtime`.
        progress: a bar on standard error.
    Returns:
        One dict per picture in the order given: `path`, `pred`, `prob`, and `probs` {class name: probability}; with
        `unknown` also `familiar`, the share of validation pictures that are no more familiar, and `unknown`, whether
        that is at most the share asked for. What `pred` names is then the class that it would be.
    Raises:
        DataError: a file cannot be read; there is none. RecipeError: another `tta`; a share that is none, or that so
            few validation pictures cannot tell; `unknown` of a model in memory.
        CheckpointError: no model in `run`, or nothing familiar.
    """
    tta_views(tta)  # a wrong one is told before the machine is looked at
    if unknown is not None:
        check_share(unknown)
    runtime = make_runtime(device=device, precision=precision, workers=workers)
    model = load(run, device=runtime.device) if isinstance(run, (str, os.PathLike)) else as_classifier(run)
    known = None if unknown is None else known_of(run, model, unknown)
    return list(predictions(model, paths, tta=tta, runtime=runtime, progress=progress, known=known))


@own_settings()
def predictions(
    model: Classifier,
    paths: str | Path | Iterable[str | Path] | Pictures,
    *,
    tta: str | int,
    runtime: Runtime,
    progress: bool,
    known: Known | None = None,
) -> Iterator[dict[str, Any]]:
    """What `predict_files` returns, a part of the pictures at a time as they are taken: with many classes the
    probabilities [N, C] of all are large, and far larger as dictionaries.

    What is wrong with the arguments is told now, what is wrong with a picture when its part comes.
    """
    views = len(tta_views(tta))
    items = _items(paths)
    if not items:
        raise DataError("There is no picture to predict: the list is empty.")
    in_memory = not all(isinstance(item, (str, os.PathLike)) for item in items)
    names = list(map(str, range(len(items)) if in_memory else map(os.fspath, items)))

    def told() -> Iterator[dict[str, Any]]:
        with ExitStack() as stack:
            files = [Path(name) for name in names]
            if in_memory:  # through bytes, too, as in training
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="headstart-")))
                files = [folder / f"{name}.png" for name in names]
                for picture, file in zip(pictures_of(items), files, strict=True):
                    picture.save(file)
            bar = stack.enter_context(ProgressBar(len(names) * views, "Predicting", enabled=progress))
            for start in range(0, len(names), PREDICTED_AT_ONCE):
                part = files[start : start + PREDICTED_AT_ONCE]
                pixels = Pixels(unlabelled(part, model), model.spec, workers=runtime.workers, cache_bytes=0)
                met: list[Tensor] | None = None if known is None else []
                probs = predict_probs(model, pixels, tta=tta, runtime=runtime, advance=bar.advance, features=met)
                more = known.tell(met[0]) if known and met else repeat({}, len(part))
                for name, row, told in zip(names[start : start + PREDICTED_AT_ONCE], probs, more, strict=True):
                    yield {"path": name} | named_probs(row, model.class_names) | told

    return told()


def named_probs(row: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """One picture's probabilities [C] with their names: `pred`, `prob`, and `probs` {class name: probability}."""
    return {
        "pred": class_names[int(row.argmax())],
        "prob": float(row.max()),
        "probs": dict(zip(class_names, row.tolist(), strict=True)),
    }


def _items(paths: Any) -> list[Any]:
    """One path or picture as a list of one; an array [H, W, 3 or 4] is one picture."""
    one = isinstance(paths, (str, os.PathLike, Image.Image))
    one |= isinstance(paths, np.ndarray) and paths.ndim == 3 and paths.shape[2] in (3, 4)
    if isinstance(paths, bytes) or not (one or hasattr(paths, "__iter__") or hasattr(paths, "__getitem__")):
        raise DataError(
            f"Pictures are given as {type(paths).__name__}; it takes files, or pictures in memory, arrays or PIL"
            " pictures."
        )
    return [paths] if one else list(paths)


def unlabelled(files: Sequence[Path], model: Classifier) -> ImageTable:
    """Files as a table for `model`, whose labels say nothing."""
    return ImageTable(
        root=Path.cwd(),
        paths=tuple(files),
        labels=np.zeros(len(files), dtype=np.int64),
        class_names=model.class_names,
        split_names=("",) * len(files),
    )


def _scored(compute: Callable[[Tensor], Tensor], batch: Tensor, runtime: Runtime, *, fills: bool) -> Tensor:
    size = runtime.filled(len(batch), runtime.batch_size) if fills else 0
    return in_portions(compute, batch, runtime.portion, doing="while scoring", size=size)


@dataclass(frozen=True)
class Score:
    """Plain cross-entropy and accuracies of one pass, the figures that choose between states.

    right: which of the n pictures are right, in their order; None where that is not known.
    """

    loss: float
    accuracy: float
    top5: float | None
    n: int
    right: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "accuracy": self.accuracy, "top5": self.top5, "n": self.n}


def score(model: Classifier, source: Source, *, indices: Tensor, runtime: Runtime) -> Score:
    """Plain cross-entropy (nats), accuracy and top-5 accuracy of these pictures, in evaluation mode, plain views."""
    logits = source_logits(model, source, indices=indices, runtime=runtime)
    labels = source.labels[indices]
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    top5 = (ranks < 5).double().mean().item() if logits.shape[1] > 5 else None
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    right = logits.argmax(1) == labels
    return Score(loss, right.double().mean().item(), top5, len(indices), right.numpy())


def source_logits(model: Classifier, source: Source, *, indices: Tensor, runtime: Runtime) -> Tensor:
    """Logits [len(indices), C], float32 on the CPU, of these pictures in their plain views, in evaluation mode."""
    mine = runtime.share(indices)
    rows, fills = [], is_stock(model)

    def compute(inputs: Tensor) -> Tensor:
        return source.forward(model, inputs.to(runtime.device)).float()

    with evaluation_mode(model), torch.inference_mode(), runtime.autocast():
        for part in mine.split(runtime.batch_size):
            inputs = source.batch(part.tolist(), [0] * len(part))
            rows.append(_scored(compute, inputs, runtime, fills=fills))
    logits = torch.cat(rows) if rows else torch.zeros(0, len(model.class_names), device=runtime.device)
    return runtime.gather(logits, len(indices)).cpu()
