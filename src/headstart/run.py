"""The run folder, written: its files one by one, what stands in the way of a new one, who has it in hand. Torch-free.

A run that replaces an older one is written beside it, in `<name>.new-<number>`, and takes its place only in
`Run.finish()`: until then, whatever goes wrong, the older run stands untouched under its own name.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import check_folder, sync_folder, to_csv, to_json, write_atomic
from .owners import is_at_work, this_process
from .run_record import (
    EVALUATION_FILES,
    LITTER,
    POINT_FILES,
    RUN_FILES,
    environment,
    is_complete,
    is_run,
    is_torn,
    mend_last_line,
    object_or_nothing,
    read_history,
    read_object,
)
from .terminal import say


class Run:
    """A run folder being written. Made by `open_run`.

    path: where files go now. Equal to `target`, the folder asked for, except while an older run stands there; then
    `finish()` moves the new run into place and sets `path` to `target`.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.target = target
        self._history_checked = False

    def _file(self, name: str) -> Path:
        if Path(name).name != name:
            raise CheckpointError(f"Run file {name!r}: expected a plain file name, without folders.")
        return self.path / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a UTF-8 text file in one step; what is no valid Unicode becomes a question mark."""
        write_atomic(self._file(name), text.encode("utf-8", errors="replace"))
        return self._file(name)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file in one step; see `to_json` for what is allowed in it."""
        write_atomic(self._file(name), to_json(value, indent=1) + b"\n")
        return self._file(name)

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
        """Write a CSV file in one step; see `to_csv`."""
        write_atomic(self._file(name), to_csv(header, rows))
        return self._file(name)

    def write_environment(self) -> Path:
        """Write down the machine and versions that the run is made with, and the process that makes it."""
        before = object_or_nothing(self._file("environment.json"))  # of an earlier process, where the run goes on
        begun = {"begun": before.get("begun", before["created"])} if "created" in before else {}
        return self.write_json("environment.json", {**environment(), **begun, "process": this_process()})

    def take_in_hand(self) -> None:
        """Note that it is this process that goes on with the run; see `let_go`.

        Raises:
            CheckpointError: another process has it in hand; the note cannot be written.
        """
        refuse_in_hand(self.path)
        card = object_or_nothing(self._file("environment.json"))
        self.write_json("environment.json", {**card, "process": this_process()})

    def append_history(self, record: Mapping[str, Any]) -> None:
        """Add one line to history.jsonl, on disk before this returns; a line torn by a crash before it is dropped.

        Raises:
            CheckpointError: the disk is full, or the like.
        """
        path = self._file("history.jsonl")
        try:
            if not self._history_checked:
                mend_last_line(path)
                self._history_checked = True
            with path.open("ab") as file:
                file.write(to_json(record) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"Cannot write {path}: {error.strerror or error}. Make room.") from error

    def cut_history(self, n: int) -> list[dict[str, Any]]:
        """The first n records of history.jsonl, which then holds these alone.

        Raises:
            CheckpointError: it holds fewer.
        """
        path = self._file("history.jsonl")
        records = read_history(path)
        if len(records) < n:
            raise CheckpointError(f"{path} holds {len(records)} records of {n}. Restore it, or fit again.")
        if path.exists():
            write_atomic(path, b"".join(to_json(record) + b"\n" for record in records[:n]))
        return records[:n]

    def forget_points(self) -> None:
        """Remove what a stopped run would go on from, the descriptions first: without them nothing is."""
        for name in sorted(POINT_FILES, key=lambda name: not name.endswith(".json")):
            self._file(name).unlink(missing_ok=True)

    def finish(self) -> Path:
        """The run is complete: put it in place of the older one, if there is one, and remove that. Returns `path`.

        Nothing happens on a second call or when no older run stood in the way.

        Raises:
            CheckpointError: the folders could not be moved; both runs are kept and the message says where.
        """
        if self.path != self.target:
            old = _free_name(self.target, "old")
            try:
                if self.target.exists():
                    _refuse_unless_run(self.target)  # it may have changed since the run was opened
                    self.target.rename(old)
                self.path.rename(self.target)
            except OSError as error:
                raise CheckpointError(
                    f"Run {self.target}: the new run could not take its place ({error}). It is in {self.path}; "
                    f"the older run is in {old if old.exists() else self.target}. Move them by hand."
                ) from None
            self.path = self.target
            sync_folder(self.target.parent)
            shutil.rmtree(old, ignore_errors=True)
        return self.path

    def clear(self) -> None:
        """Remove what the run has written; whatever else is in its folder stays."""
        entries = list(self.path.iterdir()) if self.path.is_dir() else []
        # The recipe, which says that it is a run, goes last.
        for entry in sorted(entries, key=lambda entry: entry.name == "recipe.json"):
            if entry.name in (*RUN_FILES, *POINT_FILES) or is_torn(entry):
                entry.unlink()

    def discard(self) -> None:
        """The run came to nothing: remove what it wrote. An older run under the same name is left as it was."""
        self.clear()
        if self.path.is_dir() and not self.path.is_symlink() and not any(self.path.iterdir()):
            self.path.rmdir()

    def let_go(self) -> None:
        """This process makes the run no more; see `write_environment`. Another one's note of that stays."""
        path = self._file("environment.json")
        with suppress(OSError, CheckpointError):
            card = read_object(path)
            if card.pop("process", None) == this_process():
                write_atomic(path, to_json(card, indent=1) + b"\n")


def open_run(path: str | Path, *, overwrite: bool = False) -> Run:
    """Make the folder of a new run, or with `overwrite` prepare to replace the run that stands there.

    An older run is replaced only by `Run.finish()`. Only a folder that is itself a run of ours, and holds nothing
    else, is ever replaced.

    Raises:
        CheckpointError: a file or a non-empty folder is there and `overwrite` is not set, or is set and the folder
            is no run folder or holds other things too.
    """
    target = check_run_path(path, overwrite=overwrite)
    try:
        if not target.exists() or not any(target.iterdir()):
            target.mkdir(parents=True, exist_ok=True)
            return Run(target, target)
        staging = _free_name(target, "new")
        _say_left(target)
        staging.mkdir()
        return Run(staging, target)
    except OSError as error:
        raise CheckpointError(f"Run {path}: the folder cannot be made ({error}). Choose another with --out.") from None


def open_evaluation(path: str | Path, *, overwrite: bool = False) -> Run:
    """The folder of an evaluation, which is no run: its files are written one by one, into their place.

    Nothing is made yet: a new folder inside that of the pictures would be a class without any.

    Raises:
        CheckpointError: see `check_own_folder`.
    """
    folder = check_own_folder(path, EVALUATION_FILES, "an earlier evaluation", overwrite=overwrite)
    return Run(folder, folder)


def check_own_folder(path: str | Path, files: Collection[str], what: str, *, overwrite: bool) -> Path:
    """The folder, absolute, if these files may be written into it.

    Raises:
        CheckpointError: something else is there, or they are (`what`) and `overwrite` is not set; or nothing can be
            written there.
    """
    folder = Path(path).expanduser().absolute()
    try:
        check_folder(folder, str(path))
        there = {entry.name for entry in folder.iterdir()} - set(LITTER) if folder.exists() else set()
    except OSError as error:
        raise CheckpointError(f"{path}: the folder cannot be made ({error}). Choose another with --out.") from None
    there = {name for name in there if not is_torn(Path(name))}
    others = sorted(there - set(files))
    if others or (there and not overwrite):
        held, way = (", ".join(others[:3]), "") if others else (what, ", or pass --overwrite")
        raise CheckpointError(
            f"{str(path) or '.'} holds {held}, and is not overwritten unasked. Choose another folder with --out{way}."
        )
    return folder


def refuse_among_pictures(folder: Path, pictures: str | Path) -> None:
    """Refuse a folder to write to that would be taken for a class of these pictures.

    Raises:
        CheckpointError: it lies among them.
    """
    where, inside = Path(os.path.realpath(folder)), Path(os.path.realpath(pictures))
    if not inside.is_dir() or not where.is_relative_to(inside):
        return
    if not any(part.startswith(".") for part in where.relative_to(inside).parts):
        raise CheckpointError(
            f"{folder} lies in {pictures} and would be taken for pictures. Choose another with --out."
        )


def check_run_path(path: str | Path, *, overwrite: bool = False) -> Path:
    """The folder `open_run` would use, after the checks it makes and one that it can be written; nothing is changed."""
    path = Path(path).expanduser().absolute()
    target = path.resolve() if path.is_symlink() else path
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"Run {path}: a file of that name is there. Choose another folder with --out.")
    if not target.exists() or not any(target.iterdir()):
        check_folder(target, f"Run {path}")
        return target
    if not overwrite:
        what = "an earlier run" if is_run(target) else "a folder that is not empty"
        raise CheckpointError(
            f"Run {path}: {what} is there, and is not overwritten unasked. Choose another folder with --out"
            + (", or pass --overwrite to replace it" if is_run(target) else "")
            + (", or --resume to go on with it." if is_run(target) and not is_complete(target) else ".")
        )
    _refuse_unless_run(target)
    check_folder(target.parent, f"Run {path}")  # the new run is written beside the older one
    return target


def _free_name(target: Path, word: str) -> Path:
    """`<target>.<word>-N` for the first N that is free."""
    n = 1
    while (name := target.with_name(f"{target.name}.{word}-{n}")).exists():
        n += 1
    return name


def _say_left(target: Path) -> None:
    """Name what killed processes have left of runs that were to replace this one, which may be worth something."""
    for folder in sorted(target.parent.glob(f"{glob.escape(target.name)}.new-*")):
        if is_run(folder) and not _owner_at_work(folder):
            say(
                f"{folder} is left of a run that was to replace {target} and did not come to its end. Go on with it"
                f" (--out {folder} --resume), or remove it."
            )


def _owner_at_work(folder: Path) -> dict[str, Any] | None:
    """The other process of this machine that is still making a run."""
    owner = object_or_nothing(folder / "environment.json").get("process")
    return owner if isinstance(owner, dict) and is_at_work(owner) and not is_complete(folder) else None


def refuse_in_hand(folder: Path) -> None:
    """A run that another process of this machine is still making is left to it.

    Raises:
        CheckpointError: there is such a process.
    """
    owner = _owner_at_work(folder)
    if owner:
        raise CheckpointError(f"Run {folder}: process {owner['pid']} has it in hand. Wait for its end, or stop it.")


def refuse_to_erase(folder: Path) -> None:
    """A run that nothing can be gone on with is not begun anew where that would cost a model.

    One that was stopped by hand before its first point, which is half a minute's work, may be: a queue repeats it.

    Raises:
        CheckpointError: it holds a model, or is scored.
    """
    metrics = object_or_nothing(folder / "metrics.json")
    has_points = any((folder / name).exists() for name in POINT_FILES)
    stopped = bool(metrics.get("interrupted"))
    held = [name for name in ("model.safetensors", "metrics.json") if (folder / name).exists()]
    if not held or (stopped and not metrics.get("stages") and not has_points):
        return
    if metrics and not stopped and not (folder / "report.html").is_file():
        why = "it is scored, and its report.html alone is missing"
    else:
        why = "the files that say where it stood are damaged" if has_points else "no file says where it stood"
    raise CheckpointError(
        f"Run {folder} cannot be gone on with: {why}. To begin it anew would erase its {' and '.join(held)}. Choose"
        " another folder with --out, or pass --overwrite in place of --resume to replace it."
    )


def tidy_up(folder: Path) -> None:
    """Remove what a kill at its very end left in a complete run: points, and a file that was being written."""
    with suppress(OSError):  # in a folder that is only read it is in nobody's way
        Run(folder, folder).forget_points()
        for path in filter(is_torn, list(folder.iterdir())):
            path.unlink()


def _refuse_unless_run(folder: Path) -> None:
    if not is_run(folder):
        raise CheckpointError(
            f"Run {folder}: --overwrite replaces run folders only, and this holds no recipe.json of a run. "
            "Choose another folder with --out."
        )
    refuse_in_hand(folder)
    known = {*RUN_FILES, *POINT_FILES, *LITTER}
    other = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() or (entry.name not in known and not is_torn(entry))
    )
    if other:
        raise CheckpointError(
            f"Run {folder}: --overwrite would also remove what is not part of the run: {', '.join(other[:5])}"
            + (f" and {len(other) - 5} more" if len(other) > 5 else "")
            + ". Move it elsewhere, or choose another folder with --out."
        )
