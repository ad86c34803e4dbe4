"""Run folders, read: which files they hold, and what these say; parts that a run did not reach are empty."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import read_csv

RUN_FILES = (
    "model.safetensors",
    "model.json",
    "recipe.json",
    "environment.json",
    "splits.csv",
    "earlier_pictures.csv",
    "audit.json",
    "history.jsonl",
    "metrics.json",
    "predictions.csv",
    "report.html",
    "familiar.safetensors",
)
POINT_FILES = ("point-a.json", "point-a.safetensors", "point-b.json", "point-b.safetensors")  # while a run is made
EVALUATION_FILES = ("metrics.json", "predictions.csv", "report.html")
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file browsers leave in a folder they have shown
_PACKAGES = (
    "headstart",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "scikit-learn",
    "matplotlib",
)


def is_torn(path: Path) -> bool:
    """Whether it is what `write_atomic` leaves of a file where the process is killed."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def mend_last_line(path: Path) -> None:
    """End the last line if it is whole, cut it off if a crash tore it."""
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return
    cut = data.rfind(b"\n") + 1
    with path.open("rb+") as file:
        try:
            json.loads(data[cut:])
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        except ValueError:
            file.truncate(cut)


@dataclass(frozen=True)
class RunRecord:
    """A run folder as it was read. Parts that an interrupted run did not reach are empty."""

    path: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    model: dict[str, Any]

    @cached_property
    def predictions(self) -> list[dict[str, str]]:
        """Rows of predictions.csv, read on first use; all values are text."""
        return read_csv(self.path / "predictions.csv")

    @cached_property
    def answers(self) -> list[dict[str, str]]:
        """The same, but of the columns `p:CLASS` only that of the row's own label: with a thousand classes a fit on a
        hundred thousand pictures writes half a gigabyte of them."""
        return read_csv(
            self.path / "predictions.csv",
            columns=lambda row: ("path", "split", "label", "pred", "prob", f"p:{row.get('label')}"),
        )

    @cached_property
    def audit(self) -> dict[str, Any]:
        """What audit.json holds, read on first use; empty where the pictures were not looked at."""
        return read_object(self.path / "audit.json")

    @cached_property
    def splits(self) -> list[dict[str, str]]:
        """Rows of splits.csv (path, split, label), read on first use."""
        return read_csv(self.path / "splits.csv")


def is_run(path: str | Path) -> bool:
    """Whether the folder holds a `recipe.json` of ours: an object whose stages each have a freeze line."""
    try:
        recipe = json.loads((Path(path) / "recipe.json").read_bytes())
    except (OSError, ValueError):
        return False
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    return isinstance(stages, list) and bool(stages) and all(isinstance(s, dict) and "freeze_line" in s for s in stages)


def is_complete(path: str | Path) -> bool:
    """Whether a run has come to its end: scored, not stopped by hand, with its report, and nothing to go on from."""
    path = Path(path)
    metrics = object_or_nothing(path / "metrics.json")
    is_scored = bool(metrics) and not metrics.get("interrupted") and (path / "report.html").is_file()
    return is_scored and not any((path / name).exists() for name in POINT_FILES if name.endswith(".json"))


def read_run(path: str | Path) -> RunRecord:
    """Read a run folder; only recipe.json must be there, since an interrupted run may have written no more.

    Returns:
        An object with `path`, what the JSON files hold (`recipe`, `environment`, `history`, `metrics`, `model`,
        `audit`) and the rows of the tables, all text (`splits`, `predictions`).
    Raises:
        CheckpointError: not a run folder, or a file in it that cannot be read.
    """
    path = Path(path)
    if not is_run(path):
        why = "it has no recipe.json of a run" if path.is_dir() else "there is no such folder"
        raise CheckpointError(f"Run {path}: {why}. Give a folder that `headstart fit --out` has written.")
    return RunRecord(
        path,
        recipe=read_object(path / "recipe.json"),
        environment=read_object(path / "environment.json"),
        history=read_history(path / "history.jsonl"),
        metrics=read_object(path / "metrics.json"),
        model=read_object(path / "model.json"),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a run holds; an empty one where there is no file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Restore the file or fit again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def object_or_nothing(path: Path) -> dict[str, Any]:
    """The same, but what cannot be read says nothing: a damaged run may be replaced, or gone on with."""
    try:
        return read_object(path)
    except CheckpointError:
        return {}


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Records of a history.jsonl, none where there is no file; a last line torn by a crash is left out.

    Raises:
        CheckpointError: a line other than the last is no JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    lines = [line for line in lines if line.strip()]
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(f"{path}, line {number} of {len(lines)}: not a JSON record ({error}).") from None
    return records


def environment() -> dict[str, Any]:
    """Time, machine and the versions of everything that can change a result, as plain JSON values."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "versions": versions,
    }
