"""A run that is killed and goes on ends in the bits of one that nobody stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from numpy.random import default_rng
from torch import Tensor, nn

import headstart
from conftest import make_photos
from headstart import (
    CheckpointError,
    FitResult,
    HeadSpec,
    HiddenLayer,
    Interrupted,
    ModelError,
    Recipe,
    RecipeError,
    Stage,
    fine_tune,
    points,
)
from headstart.cli import main
from headstart.owners import this_process
from headstart.points import Point, read_point, write_point
from headstart.run_record import POINT_FILES

TINY: dict[str, Any] = {
    "backbone": "test_resnet", "weights": "none", "spec_overrides": {"image_size": 32}, "precision": "fp32",
    "device": "cpu", "workers": 1,
}  # fmt: skip
HEAD = Stage(epochs=3, views=2, batch_size=8)
ALL = Stage(name="all", freeze_line="all", epochs=3, batch_size=8, lr_scale=0.1)
RECIPES = {
    "dropout, averages": Recipe(stages=(HEAD, replace(ALL, ema=0.9, wise=True)), head=HeadSpec(dropout=0.3), lr=0.01),
    "activations": Recipe(stages=(replace(ALL, freeze_line="layer3", views=2, early_stop=1, epochs=6),), lr=0.1),
    "statistics": Recipe(stages=(replace(ALL, batchnorm="train", accumulate=2, batch_size=4),), lr=0.01),
    "momentum": Recipe(stages=(HEAD, replace(ALL, optimizer="sgd", mixup=0.2)), lr=0.01, augment="light"),
    "rmsprop": Recipe(stages=(replace(ALL, optimizer="rmsprop", clip_norm=1.0, schedule="one-cycle"),), lr=1e-3),
    "ridge, two layers": Recipe(
        stages=(Stage(epochs=3, views=2, optimizer="lbfgs", warm_start="ridge"), replace(ALL, head_lr_multiplier=10.0)),
        lr=0.01,
    ),
    "own layers": Recipe(
        stages=(HEAD, replace(ALL, layer_decay=0.8)), head=HeadSpec(hidden=(HiddenLayer(8),), batchnorm=True), lr=0.01
    ),
    "rolled back": Recipe(stages=(HEAD, replace(ALL, lr_scale=1.0, collapse_margin=0.0)), lr=0.5),
    "start kept": Recipe(
        stages=(replace(HEAD, epochs=2), replace(ALL, epochs=2, lr_scale=100.0, on_collapse="ignore", wise=True)),
        lr=0.01,
    ),
}  # fmt: skip


def ending(run: Path) -> dict[str, Any]:
    """What a run left, without the seconds that it took."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("seconds", "phases", "shared_seconds")}
        return [plain(v) for v in value] if isinstance(value, list) else value

    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return {
        "files": sorted(path.name for path in run.iterdir()),
        "model": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
        "predictions": (run / "predictions.csv").read_text(),
        "history": plain(history),
        "metrics": plain(json.loads((run / "metrics.json").read_bytes())),
        "audit": plain(json.loads((run / "audit.json").read_bytes())),
        "splits": (run / "splits.csv").read_text(),
    }


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(points, "SHARE", 1e9)


def killed(at: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[], FitResult]) -> list[Path]:
    """The run folder `at` as it was after each point of a run, as if it had been killed there."""
    write, folders = points.write_point, list[Path]()

    def copied(folder: Path, point: Point) -> None:
        write(folder, point)
        folders.append(kept / f"{point.serial:03}")
        shutil.copytree(at, folders[-1])
        card = json.loads((folders[-1] / "environment.json").read_text())
        card["process"]["started"] = "long ago"
        (folders[-1] / "environment.json").write_text(json.dumps(card))

    with monkeypatch.context() as patch:
        patch.setattr(points, "write_point", copied)
        start()
    return folders


def spread(folders: list[Path], n: int) -> list[Path]:
    """The first, the last, and some between."""
    return [folders[round(i * (len(folders) - 1) / (n - 1))] for i in range(n)] if len(folders) > n else folders


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_goes_on_ends_in_the_same_bits(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def start(resume: bool = False) -> FitResult:
        return fine_tune(photos, out=out, recipe=RECIPES[name], resume=resume, **TINY)

    folders = killed(out, tmp_path / "killed", monkeypatch, start)
    whole = ending(out)
    assert len(folders) > 6
    assert not [path for path in out.iterdir() if path.name in POINT_FILES]
    if name == "rolled back":
        assert any("Rolled back" in (record["event"] or {}).get("message", "") for record in whole["history"])
    if name == "start kept":
        assert (whole["history"][-1]["event"]["epoch"], whole["history"][-1]["best"]) == (0, False)
    for folder in spread(folders, 5):
        shutil.rmtree(out)
        shutil.copytree(folder, out)
        result = start(resume=True)
        assert ending(out) == whole, folder.name
        assert [record["epoch"] for record in result.history] == [record["epoch"] for record in whole["history"]]


@pytest.mark.usefixtures("every_step")
def test_what_is_trained_again_is_what_came_after_the_point(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    plan = RECIPES["dropout, averages"]
    folders = killed(out, tmp_path / "killed", monkeypatch, lambda: fine_tune(photos, out=out, recipe=plan, **TINY))
    steps: list[int] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *given: (steps.append(1), step(self, *given))[1])
    taken = []
    for folder in (folders[0], folders[len(folders) // 2], folders[-1]):
        steps.clear()
        fine_tune(photos, out=folder, recipe=plan, resume=True, **TINY)
        taken.append(len(steps))
    assert taken[0] > taken[1] > taken[2] == 0


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `photos`, a run `whole`, and a `half` of it, killed within its last stage, with two points."""
    folder = tmp_path_factory.mktemp("half-done")
    photos = make_photos(folder / "photos", 12, ("red", "green", "blue"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "EVERY_SECONDS", 0.0)
        patch.setattr(points, "SHARE", 1e9)
        folders = killed(
            folder / "whole", folder / "killed", patch,
            lambda: fine_tune(photos, out=folder / "whole", recipe=RECIPES["momentum"], **TINY),
        )  # fmt: skip
    shutil.copytree(folders[-4], folder / "half")
    return folder


@pytest.fixture
def half(half_done: Path, tmp_path: Path) -> Path:
    """A copy of the half-done run, to do with as one likes."""
    return Path(shutil.copytree(half_done / "half", tmp_path / "half"))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[int(default_rng(len(data)).integers(len(data)))] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flipped,
    "zeros": lambda path: path.write_bytes(bytes(64) + path.read_bytes()[64:]),
    "gone": lambda path: path.unlink(),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04K\x01."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_point_is_not_gone_on_from(
    damage: str, half: Path, half_done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = read_point(half)
    assert newest
    serials = set()
    for name in POINT_FILES:
        hurt = Path(shutil.copytree(half, tmp_path / name))
        DAMAGES[damage](hurt / name)
        found = read_point(hurt)
        assert found
        serials.add(found.serial)
    assert serials == {newest.serial, newest.serial - 1}
    for name in POINT_FILES[:: 1 if damage == "cut" else 2]:
        DAMAGES[damage](half / name)
    assert read_point(half) is None
    if damage == "cut":
        fine_tune(half_done / "photos", out=half, recipe=RECIPES["momentum"], resume=True, progress=True, **TINY)
        assert "it starts over" in capsys.readouterr().err
        assert ending(half) == ending(half_done / "whole")


def test_points_of_two_runs_do_not_mix(half: Path, tmp_path: Path) -> None:
    point = read_point(half)
    assert point
    tensors = {name: t + 1 if t.is_floating_point() else t for name, t in point.tensors.items()}
    for serial in (point.serial, point.serial + 1):
        write_point(tmp_path, replace(point, tensors=tensors, serial=serial))
    for name in POINT_FILES[1::2]:
        shutil.copy(tmp_path / name, half / name)
    assert read_point(half) is None


def test_a_run_goes_on_with_what_it_was_begun_with_alone(half: Path, half_done: Path, tmp_path: Path) -> None:
    plan, photos = RECIPES["momentum"], half_done / "photos"

    def held() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in half.iterdir() if path.name != "environment.json"}

    def refused(words: str, pictures: Path = photos, **changed: Any) -> None:
        before = held()
        with pytest.raises(CheckpointError, match=f"was begun otherwise: {words}[.] Give the same command"):
            fine_tune(pictures, out=half, resume=True, **({"recipe": plan} | TINY | changed))
        assert held() == before

    refused(r"recipe \(lr\)", recipe=replace(plan, lr=0.02))
    refused(r"recipe \(seed\), pictures, weights", recipe=replace(plan, seed=1))
    refused("preprocessing", spec_overrides={"image_size": 40})
    refused("backbone", backbone="test_resnet.r160_in1k")
    refused("augmentation", augment="none")
    other = Path(shutil.copytree(photos, tmp_path / "other"))
    (other / "red/red3.jpg").write_bytes((other / "red/red4.jpg").read_bytes())
    refused("pictures", other)
    fine_tune(photos, out=half, resume=True, recipe=plan, **TINY)
    assert ending(half) == ending(half_done / "whole")


@pytest.mark.usefixtures("every_step")
def test_a_head_of_the_users_own_is_as_it_was(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width = headstart.create_classifier("test_resnet", ("a", "b"), weights="none").num_features

    class Projected(nn.Module):
        """A fixed random projection, and a layer on it; another one in each process."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("projection", torch.randn(width, 8))
            self.layer = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x @ self.projection)

    def start(seed: int, out: Path, *, resume: bool = False) -> FitResult:
        torch.manual_seed(seed)
        return fine_tune(photos, out=out, recipe=RECIPES["momentum"], head=Projected(), resume=resume, **TINY)

    whole = tmp_path / "run"
    folders = killed(whole, tmp_path / "killed", monkeypatch, lambda: start(0, whole))
    for folder in spread(folders, 3):
        start(1, folder, resume=True)
        assert ending(folder)["model"] == ending(whole)["model"]


def test_where_there_is_nothing_to_go_on_with(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = Recipe(stages=(replace(HEAD, epochs=1),)), tmp_path / "run"
    with pytest.raises(RecipeError, match="out names the run's folder"):
        fine_tune(photos, recipe=plan, resume=True, **TINY)
    with pytest.raises(RecipeError, match="to overwrite it is to begin anew"):
        fine_tune(photos, out=out, recipe=plan, resume=True, overwrite=True, **TINY)
    fine_tune(photos, out=out, recipe=plan, resume=True, **TINY)  # a new one: for a command that a queue repeats
    whole = ending(out)
    with pytest.raises(CheckpointError, match=r"is complete: there is nothing to go on with"):
        fine_tune(photos, out=out, recipe=plan, resume=True, **TINY)
    assert main(["fit", str(photos), "--out", str(out), "--resume", "--overwrite"]) == 2
    assert "to overwrite it is to begin anew" in capsys.readouterr().err
    assert ending(out) == whole
    for name in ("metrics.json", "model.safetensors", "model.json", "predictions.csv", "report.html"):
        (out / name).unlink()  # as if it had been killed before its first point
    fine_tune(photos, out=out, recipe=plan, resume=True, **TINY)
    assert ending(out) == whole
    with pytest.raises(CheckpointError, match="a folder that is not empty is there"):
        fine_tune(photos, out=photos, recipe=plan, resume=True, **TINY)
    for name in ("metrics.json", "model.safetensors"):
        (out / name).unlink()
    card = json.loads((out / "environment.json").read_text())

    def owned_by(pid: int) -> None:
        owner = this_process() | {"pid": pid, "started": ""}
        (out / "environment.json").write_text(json.dumps(card | {"process": owner}))

    owned_by(os.getppid())
    with pytest.raises(CheckpointError, match=f"process {os.getppid()} has it in hand"):
        fine_tune(photos, out=out, recipe=plan, resume=True, **TINY)
    assert json.loads((out / "environment.json").read_text())["process"]["pid"] == os.getppid()
    owned_by(2**22 + 1)  # no such process
    fine_tune(photos, out=out, recipe=plan, resume=True, **TINY)
    assert ending(out) == whole
    (out / "environment.json").write_text("{")
    fine_tune(photos, out=out, recipe=plan, overwrite=True, **TINY)
    assert ending(out) == whole
    torn = tmp_path / "torn"  # killed while it wrote its first file
    torn.mkdir()
    (torn / ".recipe.json.0123456789ab.tmp").write_text("{")
    fine_tune(photos, out=torn, recipe=plan, resume=True, **TINY)
    assert ending(torn) == whole


def test_a_run_that_was_stopped_by_hand_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = RECIPES["dropout, averages"]
    fine_tune(photos, out=tmp_path / "whole", recipe=plan, **TINY)
    append = headstart.run.Run.append_history

    def stop(self: headstart.run.Run, record: dict[str, Any]) -> None:
        append(self, record)
        if record["stage"] == "all" and record["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(headstart.run.Run, "append_history", stop)
    with pytest.raises(Interrupted, match=r"Go on:       the same command with --out .*run --resume"):
        fine_tune(photos, out=tmp_path / "run", recipe=plan, **TINY)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run/metrics.json").read_text())["interrupted"]
    fine_tune(photos, out=tmp_path / "run", recipe=plan, resume=True, progress=True, **TINY)
    told = capsys.readouterr().err
    assert "Going on with run: 1 of 2 stages done." in told
    assert "Stage head" not in told
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ZeroDivisionError("a dashboard that is down")]
)
def test_what_the_first_stage_ends_in_leaves_where_it_stood(
    error: Exception, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out, is_full = RECIPES["activations"], tmp_path / "run", isinstance(error, OSError)
    fine_tune(photos, out=tmp_path / "whole", recipe=plan, **TINY)
    whole, opened = ending(tmp_path / "whole"), Path.open
    for resume in (False, True):
        times: list[int] = []

        def fail(record: dict[str, Any], times: list[int] = times) -> None:
            times.append(record["epoch"])
            if len(times) == 2:
                raise error

        def full(self: Path, mode: str = "r", *given: Any, fail: Callable[[Any], None] = fail, **named: Any) -> Any:
            if self.name == "history.jsonl" and mode == "ab":
                fail({"epoch": 0})
            return opened(self, mode, *given, **named)

        log = None if is_full else fail
        with monkeypatch.context() as patch:
            if is_full:
                patch.setattr(Path, "open", full)
            with pytest.raises(CheckpointError if is_full else ZeroDivisionError) as caught:
                fine_tune(photos, out=out, recipe=plan, resume=resume, log=log, progress=True, **TINY)
        told = str(caught.value) if is_full else capsys.readouterr().err
        assert f"Go on:       the same command with --out {out} --resume" in told
        assert not is_full or f"Cannot write {out}/history.jsonl: No space left on device" in told
        assert read_point(out)
    fine_tune(photos, out=out, recipe=plan, resume=True, **TINY)
    assert ending(out) == whole


@pytest.mark.usefixtures("every_step")
def test_a_disk_that_is_full_for_good_is_told_with_how_to_go_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("No space left on device.")

    append, out = headstart.run.Run.append_history, tmp_path / "run"
    monkeypatch.setattr("headstart.closing.save", full)
    monkeypatch.setattr(
        headstart.run.Run, "append_history", lambda run, record: full() if record["epoch"] == 3 else append(run, record)
    )
    with pytest.raises(CheckpointError, match=r"(?s)The state so far could not be saved: No .*\nGo on: .*--resume$"):
        fine_tune(photos, out=out, recipe=RECIPES["activations"], **TINY)
    assert read_point(out)


def test_a_model_is_not_erased_unasked(
    half: Path, half_done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, whole = half_done / "photos", Path(shutil.copytree(half_done / "whole", tmp_path / "whole"))

    def refused(run: Path, words: str, recipe: Recipe = RECIPES["momentum"], **changed: Any) -> None:
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        with pytest.raises(CheckpointError, match=words):
            fine_tune(photos, out=run, recipe=recipe, resume=True, **(TINY | changed))
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    (whole / "report.html").unlink()
    refused(
        whole, r"its report\.html alone is missing\. .* erase its model\.safetensors and metrics\.json\. .*--overwrite"
    )
    refused(whole, r"its report\.html alone is missing", RECIPES["activations"])
    assert main(["fit", str(photos), "--out", str(whole), "--resume"]) == 2
    assert "would erase its model.safetensors" in capsys.readouterr().err
    (whole / "metrics.json").unlink()
    refused(whole, r"no file says where it stood\. .* erase its model\.safetensors\.")
    # Stopped by hand, and both of its points damaged since.
    shutil.copy(whole / "model.safetensors", half)
    (half / "metrics.json").write_text(json.dumps({"interrupted": True, "stages": []}))
    for name in POINT_FILES[::2]:
        DAMAGES["cut"](half / name)
    refused(half, r"the files that say where it stood are damaged\. .* erase its model\.safetensors and metrics")
    # Killed before its first point: there is no model, but it is begun anew by the same command alone.
    (whole / "model.safetensors").unlink()
    refused(whole, r"begun otherwise: recipe \(lr\)\. Give the same", replace(RECIPES["momentum"], lr=0.02))
    refused(whole, r"begun otherwise: pictures\. Give the same", limit=30)
    DAMAGES["cut"](whole / "splits.csv")
    fine_tune(photos, out=whole, recipe=RECIPES["momentum"], resume=True, **TINY)
    assert ending(whole) == ending(half_done / "whole")


def test_of_two_that_read_pictures_at_once_one_goes_on(
    half: Path, half_done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, plan, read = half_done / "photos", RECIPES["momentum"], headstart.recipes.split_rows
    card = json.loads((half / "environment.json").read_text())
    other = card | {"process": this_process() | {"pid": os.getppid(), "started": ""}}

    def meanwhile(work: Callable[[], object]) -> None:
        def rows(bench: Any) -> Any:
            monkeypatch.setattr("headstart.recipes.split_rows", read)
            work()
            return read(bench)

        monkeypatch.setattr("headstart.recipes.split_rows", rows)

    meanwhile(lambda: (half / "environment.json").write_text(json.dumps(other)))
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.name != "environment.json"}
    with pytest.raises(CheckpointError, match=f"process {os.getppid()} has it in hand"):
        fine_tune(photos, out=half, recipe=plan, resume=True, **TINY)
    assert json.loads((half / "environment.json").read_text()) == other
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.name != "environment.json"} == before

    (half / "environment.json").write_text(json.dumps(card))
    meanwhile(lambda: fine_tune(photos, out=half, recipe=plan, resume=True, **TINY))
    with pytest.raises(CheckpointError, match=r"another process has gone on with it\. Give the same command again"):
        fine_tune(photos, out=half, recipe=plan, resume=True, **TINY)
    assert ending(half) == ending(half_done / "whole")


def test_a_run_is_let_go_by_the_process_that_has_it(tmp_path: Path) -> None:
    run = headstart.run.Run(tmp_path, tmp_path)
    for owner, stays in ((this_process(), False), (this_process() | {"pid": os.getppid()}, True)):
        run.write_json("environment.json", {"process": owner})
        run.let_go()
        assert ("process" in json.loads((tmp_path / "environment.json").read_text())) == stays


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *product(("splits.csv", "environment.json"), ("cut", "empty", "gone")),
        *product(("audit.json",), ("cut", "empty")),
    ],
)
def test_a_damaged_file_beside_the_point_is_written_again(name: str, damage: str, half: Path, half_done: Path) -> None:
    DAMAGES[damage](half / name)
    fine_tune(half_done / "photos", out=half, recipe=RECIPES["momentum"], resume=True, **TINY)
    left, whole = ending(half), ending(half_done / "whole")
    if name == "audit.json":  # the labels are not looked at again
        for one in (left, whole):
            one["audit"] = one["audit"]["counts"]
            one["metrics"]["data"].pop("doubtful_labels")
    assert left == whole
    assert json.loads((half / "environment.json").read_text())["versions"]["headstart"]


def test_a_damaged_audit_is_removed_where_there_is_no_other(half: Path, half_done: Path) -> None:
    DAMAGES["cut"](half / "audit.json")
    fine_tune(half_done / "photos", out=half, recipe=RECIPES["momentum"], resume=True, audit=False, **TINY)
    assert not (half / "audit.json").exists()
    assert (half / "report.html").is_file()


def test_a_point_that_lacks_something_is_refused(half: Path, half_done: Path) -> None:
    point = read_point(half)
    assert point
    values = {key: value for key, value in point.values["run"].items() if key != "phases"}
    write_point(half, replace(point, values=point.values | {"run": values}, serial=point.serial + 1))
    with pytest.raises(CheckpointError, match="another version of headstart has written where it stood"):
        fine_tune(half_done / "photos", out=half, recipe=RECIPES["momentum"], resume=True, **TINY)


def test_a_complete_run_is_found_below_home_and_rid_of_what_a_kill_left(
    half: Path, half_done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photos = Path(shutil.copytree(half_done / "whole", tmp_path / "whole")), half_done / "photos"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    left = [name for name in POINT_FILES if name.endswith(".safetensors")]
    for name in left:
        shutil.copy(half / name, run / name)
    (run / ".environment.json.0123456789ab.tmp").write_text("{")
    assert main(["fit", str(photos), "--out", "~/whole", "--resume"]) == 0
    assert "~/whole is complete." in capsys.readouterr().err
    assert ending(run) == ending(half_done / "whole")
    for name in left:
        shutil.copy(half / name, run / name)
    with pytest.raises(CheckpointError, match="is complete: there is nothing to go on with"):
        fine_tune(photos, out=run, recipe=RECIPES["momentum"], resume=True, **TINY)
    assert ending(run) == ending(half_done / "whole")


@pytest.mark.parametrize("compile", ["auto", "off"])
def test_a_run_that_goes_on_otherwise_compiled_says_so(
    compile: str, half: Path, half_done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = RECIPES["momentum"]
    fine_tune(half_done / "photos", out=half, recipe=plan, resume=True, compile=compile, progress=True, **TINY)
    told = "not to the same bits: it was begun with compile auto, now off." in capsys.readouterr().err
    assert told == (compile == "off")


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize(("before", "now", "same"), [(1 << 20, 100_000, False), (100_000, 1 << 20, True)])
def test_a_stage_goes_on_from_what_it_was_fed_with(
    before: int, now: int, same: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plan = replace(RECIPES["activations"], stages=(replace(RECIPES["activations"].stages[0], epochs=2),))
    out, call = tmp_path / "run", {"recipe": plan, "cache": False, "progress": True, **TINY}  # of 166 kB
    monkeypatch.setattr("headstart.features.STORE_BYTES", before)
    folders = killed(out, tmp_path / "killed", monkeypatch, lambda: fine_tune(photos, out=out, **call))
    monkeypatch.setattr("headstart.features.STORE_BYTES", now)
    capsys.readouterr()
    fine_tune(photos, out=folders[3], resume=True, **call)
    assert (ending(folders[3]) == ending(out)) == same
    told = "not to the same bits: 166 kB of activations were stored, and 100 kB may be now" in capsys.readouterr().err
    assert told != same


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("no such thing")])
def test_what_stops_a_run_before_it_goes_on_leaves_it_as_it_was(
    error: Any, half: Path, half_done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.name != "environment.json"}
    with monkeypatch.context() as patch:
        patch.setattr("headstart.bench.make_source", mock.Mock(side_effect=error))
        with pytest.raises((Interrupted, ModelError)) as caught:
            fine_tune(half_done / "photos", out=half, recipe=RECIPES["momentum"], resume=True, **TINY)
    if isinstance(caught.value, Interrupted):
        assert str(caught.value) == f"Stopped before another epoch was done. {half} goes on with --resume."
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.name != "environment.json"} == before
    assert "process" not in json.loads((half / "environment.json").read_text())  # nobody has it in hand
    fine_tune(half_done / "photos", out=half, recipe=RECIPES["momentum"], resume=True, **TINY)
    assert ending(half) == ending(half_done / "whole")


def test_a_run_without_a_point_starts_over_where_it_is(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, append = RECIPES["activations"], headstart.run.Run.append_history
    fine_tune(photos, out=tmp_path / "whole", recipe=plan, **TINY)

    def stop(self: headstart.run.Run, record: dict[str, Any]) -> None:
        append(self, record)
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    monkeypatch.setattr(headstart.run.Run, "append_history", stop)
    for resume in (False, True):
        with pytest.raises(Interrupted, match="holds the best state so far"):
            fine_tune(photos, out=tmp_path / "run", recipe=plan, resume=resume, **TINY)
        assert "process" not in json.loads((tmp_path / "run/environment.json").read_text())
    (tmp_path / "run/job.log").write_text("mine")
    monkeypatch.undo()
    fine_tune(photos, out=tmp_path / "run", recipe=plan, resume=True, **TINY)
    assert not list(tmp_path.glob("*.new-*"))
    assert (tmp_path / "run/job.log").read_text() == "mine"
    (tmp_path / "run/job.log").unlink()
    assert ending(tmp_path / "run") == ending(tmp_path / "whole")


@pytest.mark.usefixtures("every_step")
def test_classes_and_transforms_of_the_users_own_are_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.transforms import v2

    plan, flip = RECIPES["activations"], v2.RandomHorizontalFlip(0.5)

    def start(out: Path, names: tuple[str, ...], augment: Any = flip, resume: bool = False) -> FitResult:
        table = headstart.load_images(photos, class_names=names)
        return fine_tune(table, out=out, recipe=plan, augment=augment, resume=resume, **TINY)

    names = ("blue", "green", "red")
    folders = killed(tmp_path / "run", tmp_path / "killed", monkeypatch, lambda: start(tmp_path / "run", names))
    with pytest.raises(CheckpointError, match=r"otherwise: .*classes"):
        start(folders[2], names[::-1], resume=True)
    with pytest.raises(CheckpointError, match="otherwise: augmentation"):
        start(folders[2], names, v2.RandomVerticalFlip(0.5), resume=True)
    start(folders[2], names, v2.RandomHorizontalFlip(0.5), resume=True)
    assert ending(folders[2]) == ending(tmp_path / "run")


@pytest.mark.usefixtures("every_step")
def test_a_point_that_cannot_be_written_stops_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path, point: Point) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(points, "write_point", full)
    result = fine_tune(photos, out=tmp_path / "run", recipe=RECIPES["momentum"], **TINY)
    assert result.metrics["test"]["n"] == 6
    assert capsys.readouterr().err.count("could not be written down (OSError") == 1


def test_points_are_written_seldom(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = points.write_point
    monkeypatch.setattr(points, "write_point", lambda f, p: (written.append(p.values["run"]["done"]), write(f, p)))
    fine_tune(photos, out=tmp_path / "run", recipe=RECIPES["momentum"], **TINY)
    assert written == [1, 2]  # at the end of each stage; half a minute has not gone by
    clock = [0.0]
    monkeypatch.setattr(points.time, "monotonic", lambda: clock[0])

    def slow(folder: Path, point: Point) -> None:
        clock[0] += 10.0

    monkeypatch.setattr(points, "write_point", slow)
    at = points.Points(tmp_path)
    for now, due in ((29.0, False), (30.0, True)):
        clock[0] = now
        assert at.is_due == due
    at.write({}, {})
    for now, due in ((71.0, False), (539.0, False), (541.0, True)):  # of ten seconds' work, once in five hundred
        clock[0] = now
        assert at.is_due == due
    assert not points.Points(None).is_due


def test_a_point_reads_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"a/b": torch.randn(3, 2).to(memory_format=torch.contiguous_format), "right": torch.tensor([True, False])}
    for serial in (1, 2, 3):
        write_point(tmp_path, Point({"run": {"n": serial, "x": 0.1}}, tensors, serial))
    point = read_point(tmp_path)
    assert point
    assert (point.serial, point.values) == (3, {"run": {"n": 3, "x": 0.1}})
    assert torch.equal(point.under("a")["b"], tensors["a/b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(POINT_FILES)
    with pytest.raises(CheckpointError, match="b is not as it was when the run was begun"):
        points.put({"b": torch.zeros(2, 2)}, point, "a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes to be killed are forked")
def test_a_fit_that_is_killed_again_and_again_ends_in_the_same_bits() -> None:
    """A sample of tools/kills.py; the whole one is a part of `make soak`."""
    tool = Path(__file__).parents[1] / "tools" / "kills.py"
    command = [sys.executable, str(tool), "--n", "10", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout[:9]) == (0, "10 kills "), done.stdout + done.stderr
    assert "\n0 failures" in done.stdout
