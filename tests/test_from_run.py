"""Going on from a finished run: its head by class name, its preprocessing, and what it has seen is told."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import make_picture
from headstart import (
    HeadSpec,
    Recipe,
    RecipeError,
    Stage,
    create_classifier,
    evaluate,
    evaluate_run,
    fine_tune,
    fit,
    load,
    load_images,
    set_freeze_line,
    split,
)
from headstart.checkpoint import read_card
from headstart.cli import main
from headstart.cli_options import default_run_path
from headstart.run_record import read_run

MACHINE: dict[str, Any] = {"precision": "fp32", "device": "cpu"}
NET: dict[str, Any] = {"backbone": "test_resnet", "weights": "none", "spec_overrides": {"image_size": 32}}
HEAD = Recipe(stages=(Stage(epochs=6, batch_size=8, views=1),), lr=0.02, augment="none", head=HeadSpec(batchnorm=True))

# As the default recipe fine-tunes: from stored activations, a running average, mixed with the start.
TUNED = replace(
    HEAD,
    augment="light",
    stages=(
        replace(HEAD.stages[0], views=2),
        Stage(name="tune", freeze_line="layer3", epochs=2, batch_size=8, views=2, lr_scale=0.1, ema=0.9, wise=True),
    ),
)


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Path:
    result = fine_tune(photos, out=tmp_path / "run", recipe=HEAD, **NET, **MACHINE)
    assert result.run_path is not None
    return result.run_path


def add_class(photos: Path, name: str, count: int = 12) -> None:
    (photos / name).mkdir()
    rng = np.random.default_rng(9)
    for i in range(count):
        picture = np.asarray(make_picture(rng, 0)).copy()
        picture[::2] = 0  # striped: told apart from the others
        Image.fromarray(picture).save(photos / name / f"{name}{i}.png")


def test_the_same_classes_go_on_from_the_very_state(photos: Path, run: Path) -> None:
    earlier = read_run(run)
    again = fine_tune(photos, from_run=run, recipe=replace(HEAD, head=HeadSpec()), **MACHINE)
    first, kept = again.history[0]["val"], earlier.metrics["val"]
    assert first["accuracy"] == pytest.approx(kept["accuracy"])
    assert first["loss"] == pytest.approx(kept["log_loss"], abs=1e-5)
    assert again.metrics["val"]["log_loss"] <= kept["log_loss"] + 1e-6
    assert again.recipe.head == HEAD.head  # the run's own, and so it is written down
    assert again.model.spec == load(run).spec
    assert again.metrics["from_run"] == {"kept": again.model.class_names, "new": (), "left_out": ()}


def test_the_finished_run_fitted_again_is_the_same_run(photos: Path, tmp_path: Path) -> None:
    """What the first call left in the cache folder changes nothing, nor does the run that is replaced."""
    out = tmp_path / "run"
    files = ("predictions.csv", "splits.csv", "recipe.json", "model.json", "model.safetensors")
    kept = []
    for overwrite in (False, True):
        fine_tune(photos, out=out, recipe=TUNED, overwrite=overwrite, **NET, **MACHINE)
        kept.append([(out / name).read_bytes() for name in files])
        kept[-1] += [[{**record, "seconds": 0} for record in read_run(out).history]]
    assert kept[0] == kept[1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["photos", "run"]  # nothing of the older one is left


def test_a_fine_tuned_model_fine_tuned_again_starts_from_where_it_ended(photos: Path, tmp_path: Path) -> None:
    plan = replace(TUNED, head=HeadSpec())  # the run brings its own head
    earlier = fine_tune(photos, out=tmp_path / "0", recipe=TUNED, **NET, **MACHINE)
    for number in (1, 2):
        again = fine_tune(
            photos, from_run=tmp_path / str(number - 1), out=tmp_path / str(number), recipe=plan, **MACHINE
        )
        before, after = earlier.metrics["val"], again.metrics["val"]
        assert again.history[0]["val"]["loss"] == pytest.approx(before["log_loss"], abs=1e-5)
        assert after["log_loss"] <= before["log_loss"] + 1e-5
        assert (again.splits.test.paths, again.splits.val.paths) == (
            earlier.splits.test.paths,
            earlier.splits.val.paths,
        )
        assert again.metrics["data"]["leaked"] == []  # the same seed holds out the same test pictures
        earlier = again


def test_features_stored_before_a_fine_tuning_are_not_taken_for_those_after_it(photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier("test_resnet", splits.class_names, weights="none", image_size=32)
    head = replace(HEAD.stages[0], epochs=1)
    everything = Stage(name="all", freeze_line="all", batchnorm="train", epochs=1, batch_size=8, on_collapse="ignore")
    for stage in (head, everything, head, replace(everything, freeze_line="layer3"), head):
        set_freeze_line(model, stage.freeze_line, batchnorm=stage.batchnorm)
        before = evaluate(model, splits.val).metrics
        result = fit(model, splits, stage, lr=0.01, augment="none", starts_trained=stage.name == "all")
        assert result.history[0]["val"]["loss"] == pytest.approx(before["log_loss"], abs=1e-5)
        assert evaluate(model, splits.val).metrics["log_loss"] == pytest.approx(result.best.loss, abs=1e-5)


def test_a_class_is_added_and_the_old_ones_are_still_known(photos: Path, run: Path, tmp_path: Path) -> None:
    add_class(photos, "striped")
    splits = split(load_images(photos))
    result = fine_tune(splits, from_run=run, recipe=replace(HEAD, head=HeadSpec()), out=tmp_path / "more", **MACHINE)
    assert result.metrics["from_run"]["new"] == ("striped",)
    fresh = fine_tune(splits, recipe=HEAD, **NET, **MACHINE)
    assert result.history[0]["val"]["accuracy"] > fresh.history[0]["val"]["accuracy"] + 0.2
    assert result.history[1]["val"]["loss"] < fresh.history[1]["val"]["loss"]
    assert read_card(tmp_path / "more")["class_names"] == ["blue", "green", "red", "striped"]
    assert load(tmp_path / "more").class_names == result.model.class_names


def test_a_class_without_pictures_is_left_out_and_told(
    photos: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(photos / "green")
    result = fine_tune(photos, from_run=run, recipe=replace(HEAD, head=HeadSpec()), progress=True, **MACHINE)
    assert result.model.class_names == ("blue", "red")
    err = capsys.readouterr().err
    assert f"Going on from {run}: the head keeps 2 classes; left out, since no picture is of them: green." in err


def test_test_pictures_the_earlier_run_knows_are_told_and_left_out_of_a_second_score(
    photos: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = replace(HEAD, head=HeadSpec(), stages=(replace(HEAD.stages[0], epochs=1),))
    same = fine_tune(photos, from_run=run, recipe=quick, **MACHINE)  # the same seed: the same test pictures
    assert same.metrics["data"]["leaked"] == []
    for options in ({"from_run": run}, {"weights": run, "backbone": "test_resnet"}):
        other = fine_tune(photos, recipe=replace(quick, seed=5), progress=True, **options, **MACHINE)
        leaked = other.metrics["data"]["leaked"]
        used = {row["path"] for row in read_run(run).splits if row["split"] != "test"}
        tested = set(other.splits.test.relative_paths)
        assert set(leaked) == tested & used
        assert leaked
        assert f"{len(leaked)} of the {len(tested)} test pictures were trained on" in capsys.readouterr().err


def test_what_a_run_before_the_earlier_one_was_trained_on_is_told_too(
    photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = replace(HEAD, seed=5, head=HeadSpec(), stages=(replace(HEAD.stages[0], epochs=1),))
    second = fine_tune(photos, recipe=quick, from_run=run, out=tmp_path / "second", **MACHINE)
    leaked = second.metrics["data"]["leaked"]
    assert leaked
    for options in ({"from_run": tmp_path / "second"}, {"weights": tmp_path / "second", "backbone": "test_resnet"}):
        third = fine_tune(photos, recipe=quick, out=tmp_path / "third", overwrite=True, **options, **MACHINE)
        assert third.metrics["data"]["leaked"] == leaked  # the same seed, and so the same test pictures
    capsys.readouterr()
    evaluate_run(tmp_path / "third", photos, device="cpu")
    everything = len(third.splits.train) + len(third.splits.val) + len(leaked)
    assert capsys.readouterr().err.startswith(f"{everything} of these")


def test_a_run_folder_called_none_is_not_what_random_weights_come_from(
    photos: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    quick = replace(HEAD, seed=5, stages=(replace(HEAD.stages[0], epochs=1),))
    result = fine_tune(photos, recipe=quick, out=tmp_path / "out", **NET, **MACHINE)
    assert result.metrics["data"]["leaked"] == []
    assert not (tmp_path / "out" / "earlier_pictures.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "none"}, "weights: without effect beside from_run"),
        ({"head": HeadSpec()}, "head: without effect beside from_run"),
        ({"spec_overrides": {"image_size": 64}}, "spec_overrides: without effect"),
        ({"recipe": "scratch"}, "starts from random weights, but from_run is given"),
        ({"recipe": replace(HEAD, head=HeadSpec(dropout=0.3))}, "head is HeadSpec.*from_run was built with"),
        ({"recipe": replace(HEAD, drop_rate=0.2)}, r"drop_rate is 0\.2, but from_run was built with 0\.0"),
    ],
)
def test_what_contradicts_the_run_is_refused(options: dict[str, Any], message: str, photos: Path, run: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        fine_tune(photos, from_run=run, **options, **MACHINE)


def test_the_command_goes_on_into_a_folder_of_its_own(
    photos: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (run / "metrics.json").read_bytes()
    words = ["fit", str(photos), "--from-run", str(run), "--recipe", "head", "--epochs", "1", "--quiet"]
    words += ["--precision", "fp32", "--device", "cpu"]
    assert main(words) == 0
    assert (tmp_path / "runs" / "photos-from-run" / "report.html").is_file()
    assert (run / "metrics.json").read_bytes() == before
    assert default_run_path(str(photos), "from-run") == Path("runs/photos-from-run-2")
    capsys.readouterr()
    for beside in (["--backbone", "resnet18"], ["--head-dropout", "0.2"], ["--image-size", "64"]):
        assert main([*words, *beside]) == 2
        assert f"{beside[0]} cannot be had: --from-run {run} brings its own" in capsys.readouterr().err
    assert main([*words, "--out", str(run)]) == 2  # the run it goes on from is not overwritten unasked
    assert "--overwrite" in capsys.readouterr().err
    assert (run / "metrics.json").read_bytes() == before
