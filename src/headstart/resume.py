"""Going on with a run that was stopped or killed: what it was begun with is compared, then it is put where it stood.

It then ends in the same bits as one that nobody stopped, on the same machine and with the same versions: orders, views
and random numbers are functions of (seed, epoch, picture), and everything else that training changes is in a point.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .averaging import trained_tensors
from .classifier import Classifier
from .closing import SPLIT_COLUMNS
from .contract import tensors_digest
from .diary import Diary
from .errors import CheckpointError, DataError
from .files import to_csv, to_json
from .findings import AuditResult, read_audit
from .points import Keeper, Point, Points, has_points, put, read_point
from .recipe import AugmentSpec, Recipe
from .run import Run, refuse_in_hand, refuse_to_erase, tidy_up
from .run_record import POINT_FILES, environment, is_complete, is_run, is_torn, read_history, read_object
from .runtime import Runtime
from .terminal import say

_KEYS = {"settings", "means", "stage", "done", "records", "stages", "phases", "trained"}  # of what a run is, in a point
_PACKAGES = ("headstart", "torch", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class Begun:
    """A run that was begun and has not come to its end: its folder, and the newest point that verifies, if any.

    stamp: when its points were written, by which it is told whether another process has gone on since.
    """

    folder: Path
    point: Point | None
    stamp: tuple[int, ...] = ()


def find_begun(out: str | Path) -> Begun | None:
    """The run to go on with in a folder; None where there is nothing yet, or something else, which is refused later.

    Raises:
        CheckpointError: the run is complete; a process of this machine has it in hand; nothing of it can be gone on
            with, and it holds a model.
    """
    folder = Path(out).expanduser().absolute()
    if not is_run(folder):
        return Begun(folder, None, _stamp(folder)) if _is_torn_alone(folder) else None
    if is_complete(folder):
        tidy_up(folder)
        raise CheckpointError(
            f"Run {out} is complete: there is nothing to go on with. Choose another folder with --out."
        )
    refuse_in_hand(folder)
    stamp, point = _stamp(folder), read_point(folder)
    if point is None:
        refuse_to_erase(folder)
        if has_points(folder):
            say(f"Run {out}: where it stood cannot be read, since the files are damaged.", enabled=True)
    elif not _is_known(point):
        raise CheckpointError(
            f"Run {out}: another version of headstart has written where it stood. Go on with that one, or begin another"
            " run with --out."
        )
    return Begun(folder, point, stamp)


def _stamp(folder: Path) -> tuple[int, ...]:
    files = [folder / name for name in POINT_FILES if name.endswith(".json")]
    return tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)


def _is_known(point: Point) -> bool:
    values = point.values.get("run")
    return isinstance(values, dict) and values.keys() >= _KEYS


def can_go_on(folder: Path, plan: Recipe, size: int) -> bool:
    """Whether a run of this recipe, on pictures of this side, was stopped here: it goes on, or starts over in place."""
    if is_complete(folder):
        return False
    point = read_point(folder)
    if point is None:
        with suppress(CheckpointError):
            refuse_to_erase(folder)
            is_same = is_run(folder) and json.loads((folder / "recipe.json").read_bytes()) == _plain(plan.to_dict())
            return is_same or _is_torn_alone(folder)
    if point is None or not _is_known(point):
        return False
    settings = point.values["run"]["settings"]
    return bool(settings["recipe"] == _plain(plan.to_dict()) and settings["preprocessing"]["image_size"] == size)


def _is_torn_alone(folder: Path) -> bool:
    """Whether the process was killed while it wrote the first file of a run."""
    return folder.is_dir() and any(folder.iterdir()) and all(map(is_torn, folder.iterdir()))


def open_again(begun: Begun, plan: Recipe, pictures: Sequence[Sequence[str]], *, show: bool) -> Run:
    """The folder of a run that goes on, or of one of which nothing can be gone on with and that starts over there.

    Raises:
        CheckpointError: another process has it in hand, or has gone on with it since it was found; it would start over
            with another recipe or other pictures.
    """
    folder = begun.folder
    run = Run(folder, folder)
    refuse_in_hand(folder)  # once more: reading the pictures may have taken long
    if _stamp(folder) != begun.stamp:
        raise CheckpointError(f"Run {folder}: another process has gone on with it. Give the same command again.")
    if begun.point:
        run.take_in_hand()
        for path in filter(is_torn, list(folder.iterdir())):
            path.unlink()
    else:
        refuse_to_erase(folder)
        if is_run(folder):
            _refuse_another(folder, plan, pictures)
        say(f"Nothing of {folder.name} can be gone on with: it starts over.", enabled=show)
        run.clear()
    return run


def _refuse_another(folder: Path, plan: Recipe, pictures: Sequence[Sequence[str]]) -> None:
    """What is known of a run that has no point is compared: its recipe and its pictures."""
    recipe, table = _changed(read_object(folder / "recipe.json"), _plain(plan.to_dict())), folder / "splits.csv"
    held = table.read_bytes() if table.is_file() else b""
    whole = b"".join(to_csv(SPLIT_COLUMNS, pictures))
    _refuse_other(folder, [*recipe, *([] if whole.startswith(held) else ["pictures"])])  # the table may have been cut


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [key for key in now if before.get(key) != now[key]]
    return [f"recipe ({', '.join(keys)})"] if keys else []


def _refuse_other(folder: Path, settings: Sequence[str]) -> None:
    if settings:
        raise CheckpointError(
            f"Run {folder} was begun otherwise: {', '.join(settings)}. Give the same command as then, or begin another"
            " run with --out."
        )


class Journey:
    """One run through its stages: where it stands, for a later process, and where an earlier one has left it.

    Args:
        model: as it is before its first stage. pictures: the rows of splits.csv. augment: the training views.
        begun: what is gone on with.

    Attributes:
        done: the stages that are behind. point: what is gone on from. audit: what the run's audit.json said then.
    Raises:
        CheckpointError: the run was begun with something else.
    """

    def __init__(
        self, model: Classifier, plan: Recipe, diary: Diary, runtime: Runtime, *, pictures: Sequence[Sequence[str]],
        augment: object, begun: Begun | None,
    ) -> None:  # fmt: skip
        self.model, self.diary = model, diary
        self.point = begun.point if begun else None
        self.audit: AuditResult | None = None
        self.done, self._stage, self._stages = 0, 0, plan.stages
        # Of a head of the user's own nobody knows how its tensors come about, those included that are never trained.
        self._trained = {name for name in _tensors(model) if name.startswith("head.")}
        self._settings: dict[str, Any] = {}
        if diary.run or self.point:
            self._settings = _plain({
                "recipe": plan.to_dict(),
                "backbone": model.backbone_name or type(model.backbone).__name__,
                "preprocessing": asdict(model.spec),
                "classes": list(model.class_names),
                "augmentation": augment.to_dict() if isinstance(augment, AugmentSpec) else _described(augment),
                "pictures": hashlib.sha256(to_json(pictures)).hexdigest(),
                "weights": tensors_digest(model.backbone.state_dict().items()),
                "head": [[name, list(tensor.shape)] for name, tensor in model.head.state_dict().items()],
                "earlier run": tensors_digest(model.head.state_dict().items()) if diary.handover else None,
            })  # fmt: skip
        self._means = _plain(_means(runtime))
        self._points = Points(diary.run.path if diary.run else None, serial=self.point.serial if self.point else 0)
        if begun and self.point:
            self._go_on(begun.folder, self.point)
        self._records, self._behind = len(diary.history), len(diary.stages)

    def _go_on(self, folder: Path, begun: Point) -> None:
        values, diary = begun.values["run"], self.diary
        other = [name for name, value in self._settings.items() if values["settings"].get(name) != value]
        _refuse_other(folder, [self._in_words(name, values) for name in other])
        means = [
            f"{name} {values['means'].get(name)}, now {value}"
            for name, value in self._means.items()
            if values["means"].get(name) != value
        ]
        if means:
            say(f"Going on, but not to the same bits: it was begun with {'; '.join(means)}.", enabled=diary.show)
        say(f"Going on with {folder.name}: {values['done']} of {len(self._stages)} stages done.", enabled=diary.show)
        put(_tensors(self.model), begun, "model")
        self.done = values["done"]
        self._trained = set(values["trained"])
        diary.stages, diary.phases = list(values["stages"]), list(values["phases"])
        diary.right = begun.tensors["right/run"].numpy() if "right/run" in begun.tensors else None
        n = values["records"]
        diary.history = diary.run.cut_history(n) if diary.run else read_history(folder / "history.jsonl")[:n]
        with suppress(DataError):  # none, or a damaged one
            self.audit = read_audit(folder / "audit.json")
        if self.audit and self.audit.doubtful is not None:
            diary.doubtful = [one.file for one in self.audit.doubtful if one.flagged]

    def _in_words(self, setting: str, begun: dict[str, Any]) -> str:
        if setting != "recipe":
            return setting
        return "".join(_changed(begun["settings"]["recipe"], self._settings["recipe"]))

    @property
    def has_moved(self) -> bool:
        """Whether anything was trained, and noted, since the point that is gone on from."""
        return len(self.diary.history) > self._records or len(self.diary.stages) > self._behind

    def keeper(self, stage: int) -> Keeper:
        """What keeps the points of a stage, and where it goes on."""
        is_here = self.point and "course" in self.point.values and self.point.values["run"]["stage"] == stage
        self._stage = stage
        records = [record for record in self.diary.history if record["stage_index"] == stage]
        return Keeper(self._points, self._about, self.point if is_here else None, records)

    def stage_done(self) -> None:
        """A stage is behind: with what it has trained, later ones go on."""
        self._trained |= set(trained_tensors(self.model))
        self.done = self._stage = self._stage + 1
        self._points.write(*self._about(within=False))

    def _about(self, *, within: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What stands in every point; `within` a stage, which adds what it trains."""
        diary = self.diary
        values = {
            "settings": self._settings, "means": self._means, "stage": self._stage, "done": self.done,
            "records": len(diary.history), "stages": diary.stages, "phases": diary.phases,
            "trained": sorted(self._trained),
        }  # fmt: skip
        everything = _tensors(self.model)
        names = self._trained - set(trained_tensors(self.model)) if within else self._trained
        tensors = {f"model/{name}": everything[name] for name in sorted(names)}
        if diary.right is not None:
            tensors["right/run"] = torch.from_numpy(diary.right)
        return {"run": values}, tensors


def _tensors(model: Classifier) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _described(transform: object) -> str:
    """A transform of the user's own by what it says of itself, unless that is its place in memory."""
    text = repr(transform)
    return repr(type(transform)) if " at 0x" in text else text


def _means(runtime: Runtime) -> dict[str, Any]:
    """What the bits of a result depend on, beside the settings."""
    versions = environment()["versions"]
    return {
        "device": runtime.device.type,
        "number format": str(runtime.dtype).removeprefix("torch."),
        "compile": runtime.compile,
        "processes": runtime.world,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        **{name: versions[name] for name in _PACKAGES},
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    found: dict[str, Any] = json.loads(to_json(values))
    return found
