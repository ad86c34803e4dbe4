"""What a run keeps of a picture, made in the process that decodes it: each new picture is decoded once, there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import crews, isolate
from .dataspec import DataSpec, PixelArray, working_image_by_pillow
from .decode import file_bytes, picture_of
from .errors import DataError, SetupError
from .hashes import content_hash
from .inspection import look_of_bytes, pack
from .isolate import Answer
from .portable import evaluation_view

PARTS = ("view", "working", "look")
FULL = "full"  # in place of the working image: the picture itself, where PyTorch, which no worker needs, shrinks it


@dataclass(frozen=True)
class Made:
    """What became of a file: why it does not decode, or parts, uint8 arrays by name.

    digest: hash of the bytes that were decoded; empty where none could be read, or a limit was in the way. parts:
    `view` [3, S, S], `working` or `full` [h, w, 3], `look` [bytes]; see `PixelStore`.
    """

    reason: str | None
    digest: str
    parts: dict[str, PixelArray]


def make(
    paths: Sequence[Path],
    parts: Sequence[str],
    spec: DataSpec | None,
    *,
    workers: int,
    take: Callable[[int, Made], None],
    progress: Callable[[int, int], None] | None = None,
) -> list[str | None]:
    """Decode files in limited processes (see `isolate`), which also make of them what is to be kept.

    Args:
        parts: of `PARTS`. spec: needed for all but `look`.
        take: is given (position, what was made) of each file, from several threads.
    Returns:
        Per file why it does not decode, or None; see `crews.ask_all`.
    """
    settings = {"parts": list(parts), "spec": spec.to_dict() if spec else None}
    allowed = {*parts, FULL}
    return crews.ask_all(
        paths, workers=workers, progress=progress, room="intake", settings=settings, files_each=8,
        take=lambda position, answer: take(position, _made(answer, allowed)),
    )  # fmt: skip


def _made(answer: Answer, allowed: set[str]) -> Made:
    found = {}
    for (name, shape), blob in zip(answer.told.get("arrays", ()), answer.blobs, strict=True):
        if name not in allowed or math.prod(shape) != len(blob):
            raise SetupError(f"A process that decodes pictures answers with {len(blob):,} bytes for {name} {shape}.")
        found[name] = np.frombuffer(blob, dtype=np.uint8).reshape(shape)
    return Made(answer.reason, str(answer.told.get("digest", "")), found)


class Viewers:
    """Limited processes that make evaluation views of files' bytes, which come one by one from several threads.

    Args:
        number: how many processes.
    Raises:
        SetupError: as `crews.Crew`.
    """

    def __init__(self, spec: DataSpec, number: int) -> None:
        self._crew = crews.Crew(number, room="intake", settings={"parts": ["view"], "spec": spec.to_dict()})

    def view(self, data: bytes) -> PixelArray | str:
        """The evaluation view, uint8 [3, S, S], as `load_view` makes it, or why there is none, in bare words."""
        answer = self._crew.ask(data)
        return _made(answer, {"view"}).parts["view"] if answer.reason is None else answer.reason

    def close(self) -> None:
        """End the processes."""
        self._crew.close()


# ---- the worker's side -----------------------------------------------------------------------------------------


def serve() -> None:
    """Runs in the worker."""
    isolate.serve(_work)


def _work(settings: dict[str, Any]) -> isolate.Work:
    spec = DataSpec.from_dict(settings["spec"]) if settings["spec"] else None
    parts = settings["parts"]

    def answer(source: Path | bytes, decoded: Callable[[], None]) -> Answer:
        told: dict[str, Any] = {}
        try:
            data = source if isinstance(source, bytes) else file_bytes(source)
            told["digest"] = content_hash(data)
            image = picture_of(data)
        except DataError as error:
            return Answer(str(error), told)
        decoded()  # what comes now is our own, and takes no longer for one file than for another of its size
        arrays = dict(_array(part, image, data, spec) for part in parts)
        told["arrays"] = [[name, array.shape] for name, array in arrays.items()]
        return Answer(None, told, [np.ascontiguousarray(array).reshape(-1).data for array in arrays.values()])

    return answer


def _array(part: str, image: Image.Image, data: bytes, spec: DataSpec | None) -> tuple[str, PixelArray]:
    if part == "look":
        return part, pack(look_of_bytes(image, data))
    assert spec is not None
    if part == "view":
        return part, evaluation_view(image, spec).transpose(2, 0, 1)
    made = working_image_by_pillow(image, spec)
    return (FULL, np.asarray(image)) if made is None else (part, made)
