"""Points of a run, in its folder: where it stands between two optimiser steps, so that it can go on after a kill.

A point is two files: tensors, then the JSON that holds their hash and its own. Two points take turns, so that one of
them is whole whenever the process ends. Nothing in them is run, and nothing is taken from one that does not verify.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .errors import CheckpointError, in_words
from .files import to_json, write_atomic
from .memory import is_out_of_memory
from .modelfile import read_header, read_json
from .run_record import POINT_FILES
from .terminal import say

FORMAT, VERSION = "headstart-point", 1
# Written no more often than this, and so seldom that it takes no more than this share of the time.
EVERY_SECONDS, SHARE = 30.0, 0.02
_KEYS = {"format", "version", "serial", "values", "tensors", "sha256"}


@dataclass(frozen=True)
class Point:
    """Where a run stands: plain values and tensors, by name; `serial` counts the points of a run from 1."""

    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    serial: int = 0

    def under(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `name/`, by the rest of their names."""
        return {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}


class Points:
    """Writes a run's points.

    Args:
        folder: the run's; None where another process writes, or none does.
        serial: of the last point that is there.
    """

    def __init__(self, folder: Path | None, *, serial: int = 0) -> None:
        self.folder, self._serial = folder, serial
        self._last, self._cost, self._told = time.monotonic(), 0.0, False

    @property
    def is_due(self) -> bool:
        """Whether the last one was written so long ago that another is worth its time."""
        waited = time.monotonic() - self._last
        return self.folder is not None and waited >= max(EVERY_SECONDS, self._cost / SHARE)

    def write(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a point; where that fails, as on a full disk, the run goes on, and a line says so."""
        if self.folder is None:
            return
        started = time.monotonic()
        try:
            write_point(self.folder, Point(dict(values), dict(tensors), self._serial + 1))
            self._serial += 1
        except (OSError, CheckpointError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            say(
                f"Where the run stands could not be written down ({in_words(error)}); it goes on.",
                enabled=not self._told,
            )
            self._told = True
        self._last = time.monotonic()
        self._cost = self._last - started


@dataclass
class Keeper:
    """The points of a run as one of its stages sees them.

    about: what stands in each of them beside what the stage says: values and tensors of the run.
    begun: where the stage goes on, at its first attempt; None at its beginning. records: what its history has by then.
    budget: what the stage's stored activations may take, which decides where it is fed from; see `Placement`.
    """

    points: Points
    about: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    begun: Point | None = None
    records: Sequence[dict[str, Any]] = ()
    budget: int = 0

    @property
    def is_due(self) -> bool:
        """See `Points.is_due`."""
        return self.points.is_due

    def write(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep where the stage stands."""
        run_values, run_tensors = self.about()
        self.points.write({**run_values, **values, "budget": self.budget}, {**run_tensors, **tensors})


def _names(serial: int) -> tuple[str, str]:
    """The files of a point: JSON, tensors."""
    return POINT_FILES[:2] if serial % 2 else POINT_FILES[2:]


def write_point(folder: Path, point: Point) -> None:
    """Write a point in place of the last but one."""
    card_name, tensors_name = _names(point.serial)
    tensors: dict[str, Tensor] = {}
    places = set[int]()
    for name, tensor in point.tensors.items():
        own = tensor.detach().cpu().contiguous()
        tensors[name] = own.clone() if own.data_ptr() in places else own  # safetensors takes each memory once
        places.add(own.data_ptr())
    data = to_safetensors(tensors)
    write_atomic(folder / tensors_name, data)
    card = {
        "format": FORMAT, "version": VERSION, "serial": point.serial, "values": point.values,
        "tensors": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    write_atomic(folder / card_name, to_json({**card, "sha256": _digest(card)}) + b"\n")


def read_point(folder: Path) -> Point | None:
    """The newest point that verifies, or None where none does."""
    found = [_read(folder, serial) for serial in (1, 2)]
    return max((point for point in found if point), key=lambda point: point.serial, default=None)


def has_points(folder: Path) -> bool:
    """Whether there is a point's description, of whatever worth."""
    return any((folder / _names(serial)[0]).is_file() for serial in (1, 2))


def _read(folder: Path, turn: int) -> Point | None:
    card_name, tensors_name = _names(turn)
    try:
        card = read_json(folder / card_name)
        if set(card) != _KEYS or (card["format"], card["version"]) != (FORMAT, VERSION):
            return None
        own = card.pop("sha256")
        if own != _digest(card) or not isinstance(card["values"], dict) or type(card["serial"]) is not int:
            return None
        data = (folder / tensors_name).read_bytes()
        if hashlib.sha256(data).hexdigest() != card["tensors"]:
            return None
        read_header(folder / tensors_name)
        return Point(card["values"], from_safetensors(data), card["serial"])
    except (OSError, CheckpointError, SafetensorError, ValueError):
        return None


def _digest(card: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(dict(sorted(card.items())))).hexdigest()


def put(tensors: Mapping[str, Tensor], point: Point, name: str) -> None:
    """Put what a point holds under `name` into these tensors, in their own layout.

    Raises:
        CheckpointError: it holds others, or of other shapes.
    """
    held = point.under(name)
    odd = [key for key, t in held.items() if key not in tensors or tensors[key].shape != t.shape]
    if odd:
        raise CheckpointError(f"{odd[0]} is not as it was when the run was begun. Begin another one with --out.")
    with torch.no_grad():
        for key, tensor in held.items():
            tensors[key].copy_(tensor)
