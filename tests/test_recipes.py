"""The user's verbs from a folder of pictures to a run folder, with a network small enough to train here."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

import headstart
from headstart import (
    CheckpointError,
    DataError,
    Interrupted,
    ModelError,
    Recipe,
    RecipeError,
    Stage,
    create_classifier,
    evaluation,
    fine_tune,
    fit,
    load,
    load_images,
    predict_files,
    set_freeze_line,
    split,
)
from headstart.closing import trained_on
from headstart.recipe import RECIPES
from headstart.runtime import Runtime
from tiny import SPEC, TinyNet

TINY = {
    "backbone": "test_resnet",
    "weights": "none",
    "spec_overrides": {"image_size": 32},
    "precision": "fp32",
    "device": "cpu",
}
SHORT = Recipe(
    stages=(
        Stage(epochs=3, views=2, batch_size=8),
        Stage(name="fine-tune", freeze_line="all", epochs=2, batch_size=8, lr_scale=0.01),
    ),
    lr=0.01,
)

DROPOUT = headstart.HeadSpec(dropout=0.5)


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> headstart.FitResult:
    return fine_tune(photos, out=tmp_path / "run", recipe=SHORT, **TINY)


@pytest.mark.parametrize("told", [False, True])
def test_processes_agree_on_the_run_folder_whether_or_not_they_are_told_of_it(
    told: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "agrees", lambda runtime, flag: False)  # as where the main process failed
    read = mock.Mock()
    monkeypatch.setattr("headstart.recipes.find_data", read)
    with pytest.raises(CheckpointError, match="The main process cannot make"):
        fine_tune(photos, out=tmp_path / "again" if told else None, recipe=SHORT, **TINY)
    read.assert_not_called()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_holds_what_it_should_and_agrees_with_scikit_learn(
    run: headstart.FitResult, photos: Path, tmp_path: Path
) -> None:
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "model.safetensors", "model.json", "recipe.json", "environment.json", "splits.csv", "history.jsonl",
        "metrics.json", "predictions.csv", "report.html", "audit.json",
    }  # fmt: skip
    assert Recipe.from_dict(json.loads((tmp_path / "run/recipe.json").read_text())) == SHORT
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["test"] == json.loads(json.dumps(run.metrics["test"]))
    assert [s["name"] for s in metrics["stages"]] == ["head", "fine-tune"]
    predictions = rows_of(tmp_path / "run/predictions.csv")
    assert {p["split"] for p in predictions} == {"val", "test"}
    for name in ("val", "test"):
        mine = [p for p in predictions if p["split"] == name]
        labels, preds = [p["label"] for p in mine], [p["pred"] for p in mine]
        probs = np.array([[float(p[f"p:{c}"]) for c in ("blue", "green", "red")] for p in mine])
        assert metrics[name]["n"] == len(mine)
        assert metrics[name]["accuracy"] == pytest.approx(sk.accuracy_score(labels, preds))
        assert metrics[name]["log_loss"] == pytest.approx(sk.log_loss(labels, probs, labels=["blue", "green", "red"]))
        assert metrics[name]["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, preds))
        expected = sk.precision_recall_fscore_support(labels, preds, average="weighted", zero_division=0)
        assert metrics[name]["weighted_precision"] == pytest.approx(expected[0])
        assert metrics[name]["weighted_recall"] == pytest.approx(expected[1])
    splits = rows_of(tmp_path / "run/splits.csv")
    assert len({r["path"] for r in splits}) == len(splits) == 36
    assert all((photos / r["path"]).parent.name == r["label"] for r in splits)


def test_the_history_is_complete_and_the_later_stage_starts_from_the_best_head(
    run: headstart.FitResult, tmp_path: Path
) -> None:
    history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["epoch"]) for r in history] == [("head", e) for e in range(4)] + [
        ("fine-tune", e) for e in range(3)
    ]
    best_head = min(r["val"]["loss"] for r in history if r["stage"] == "head")
    assert history[4]["val"]["loss"] == pytest.approx(best_head, rel=1e-4)
    assert run.metrics["val"]["log_loss"] <= best_head * (1 + 1e-4)
    assert run.metrics["stages"][1]["lr"] == pytest.approx(run.metrics["stages"][0]["lr"] / 100)


def test_a_reloaded_run_predicts_what_the_run_wrote_down(
    run: headstart.FitResult, photos: Path, tmp_path: Path
) -> None:
    written = [r for r in rows_of(tmp_path / "run/predictions.csv") if r["split"] == "test"]
    again = predict_files(tmp_path / "run", [photos / r["path"] for r in written], device="cpu")
    for old, new in zip(written, again, strict=True):
        assert new["pred"] == old["pred"]
        assert new["prob"] == float(old["prob"])  # to the bit: same function, same batches
    x = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "run")(x), run.model.eval()(x))


def test_evaluate_run_scores_a_labelled_folder_with_the_models_class_map(
    run: headstart.FitResult, photos: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    (part / "red").mkdir(parents=True)
    for path in sorted((photos / "red").iterdir())[:5]:
        (part / "red" / path.name).write_bytes(path.read_bytes())
    metrics = headstart.evaluate_run(tmp_path / "run", part, device="cpu")
    assert metrics["n"] == 5
    assert sum(metrics["confusion"][2]) == 5
    (part / "purple").mkdir()
    (part / "purple/x.jpg").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="purple"):
        headstart.evaluate_run(tmp_path / "run", part, device="cpu")


def test_an_evaluation_leaves_a_report_and_replaces_nothing_unasked(
    run: headstart.FitResult, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "scored"
    metrics = headstart.evaluate_run(tmp_path / "run", photos, device="cpu", out=out)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "predictions.csv", "report.html"]
    written = json.loads((out / "metrics.json").read_bytes())
    assert written["test"]["confusion"] == metrics["confusion"]
    seen = len(run.splits.train) + len(run.splits.val)
    assert (written["seen"], written["evaluated"]) == (seen, str(tmp_path / "run"))
    rows = rows_of(out / "predictions.csv")
    assert [row["pred"] == row["label"] for row in rows].count(True) == round(metrics["accuracy"] * metrics["n"])
    again = {row["path"]: row for row in rows_of(tmp_path / "run/predictions.csv") if row["split"] == "test"}
    assert again
    now = {row["path"]: row for row in rows}
    assert all(now[path]["pred"] == row["pred"] for path, row in again.items())
    assert all(float(now[path]["p:red"]) == pytest.approx(float(row["p:red"]), abs=1e-6) for path, row in again.items())
    report = (out / "report.html").read_text(encoding="utf-8")
    assert f"{seen:,} of these {len(rows):,} pictures were trained on" in report
    for heading in ("What is taken for what", "Class by class", "Worst mistakes", "Data"):
        assert f">{heading}</h2>" in report
    for other in (
        "How it learned",
        "Recipe and environment",
        "The training split is learned from",
        "stopped before its end",
    ):
        assert other not in report

    with pytest.raises(CheckpointError, match=r"an earlier evaluation.*--overwrite"):
        headstart.evaluate_run(tmp_path / "run", photos, device="cpu", out=out)
    (out / "report.html").write_text("old")
    headstart.evaluate_run(tmp_path / "run", photos, device="cpu", out=out, overwrite=True)
    assert (out / "report.html").read_text(encoding="utf-8") == report
    with pytest.raises(CheckpointError, match=r"audit\.json, .* Choose another folder with --out\.$"):
        headstart.evaluate_run(tmp_path / "run", photos, device="cpu", out=tmp_path / "run", overwrite=True)
    assert "expect somewhat less on new ones" in report
    assert "On more pictures of the same kind expect" not in report
    (out / ".metrics.json.0123.tmp").write_text("of one that was killed")
    headstart.evaluate_run(tmp_path / "run", photos, device="cpu", out=out, overwrite=True)
    (tmp_path / "mine").mkdir()
    for left in ("left", "mine"):
        with pytest.raises(DataError):
            headstart.evaluate_run(tmp_path / "run", tmp_path / "nowhere", device="cpu", out=tmp_path / left)
        assert (tmp_path / left).exists() == (left == "mine")
    with pytest.raises(CheckpointError, match=r"lies in .* and would be taken for pictures"):
        headstart.evaluate_run(tmp_path / "run", photos, device="cpu", out=photos / "scored" / "one")
    assert not (photos / "scored").exists()
    with pytest.raises(RecipeError, match="overwrite: without effect"):
        headstart.evaluate_run(tmp_path / "run", photos, device="cpu", overwrite=True)


def test_a_run_is_not_written_where_it_would_be_a_class(photos: Path, tmp_path: Path) -> None:
    plan = Recipe(stages=(Stage(epochs=1, views=1),))
    one = (tmp_path / "split" / "train" / "run", tmp_path / "split")
    shutil.copytree(photos, one[1] / "train")
    for out, data in ((photos / "run", photos), (photos / "runs" / "one", str(photos)), one):
        with pytest.raises(CheckpointError, match=r"lies in .* and would be taken for pictures"):
            fine_tune(data, out=out, recipe=plan, audit=False, **TINY)
        assert not out.exists()
    shutil.copytree(photos, tmp_path / "wrapped" / "photos")
    with pytest.raises(DataError, match=r"its only folder, 'photos'.*Pass .*photos"):  # what is wrong first
        fine_tune(tmp_path / "wrapped", out=tmp_path / "wrapped" / "run", recipe=plan, **TINY)
    # Beside the folders of splits, and in a hidden folder, it is in nobody's way.
    for out, data in ((one[1] / "run", one[1]), (photos / ".runs" / "one", photos)):
        fine_tune(data, out=out, recipe=plan, audit=False, test=0, **TINY)
        assert headstart.load_images(data).class_names == ("blue", "green", "red")
    for verb, how in ((headstart.compare, {"recipes": ["head"]}), (headstart.shootout, {"backbones": "test_resnet"})):
        with pytest.raises(CheckpointError, match=r"lies in .* and would be taken for pictures"):
            verb(photos, out=photos / "several", **how)
    with pytest.raises(CheckpointError, match=r"lies in .* and would be taken for pictures"):
        headstart.sweep(
            one[1],
            out=one[1] / "sweep",
            space=headstart.Space(values={"lr": (0.01,)}),
            backbone="test_resnet",
            weights="none",
        )


def test_an_earlier_run_lends_its_backbone_to_a_new_task(
    run: headstart.FitResult, photos: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    for name in ("green", "red"):
        (two / name).mkdir(parents=True)
        for path in (photos / name).iterdir():
            (two / name / path.name).write_bytes(path.read_bytes())
    head_only = replace(SHORT, stages=SHORT.stages[:1])
    result = fine_tune(two, out=tmp_path / "run2", recipe=head_only, **(TINY | {"weights": tmp_path / "run"}))
    old, new = run.model.backbone.state_dict(), result.model.backbone.state_dict()
    assert old
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert result.model.class_names == ("green", "red")


def test_an_existing_run_is_kept_unless_asked(run: headstart.FitResult, photos: Path, tmp_path: Path) -> None:
    before = (tmp_path / "run/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="overwrite"):
        fine_tune(photos, out=tmp_path / "run", recipe=SHORT, **TINY)
    with pytest.raises(ModelError):
        fine_tune(photos, out=tmp_path / "run", recipe=SHORT, overwrite=True, **(TINY | {"backbone": "no_such_net"}))
    assert (tmp_path / "run/model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "run"]
    fine_tune(photos, out=tmp_path / "run", recipe=replace(SHORT, seed=9), overwrite=True, **TINY)
    assert (tmp_path / "run/model.safetensors").read_bytes() != before


def test_what_is_wrong_is_found_before_training_and_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lost = replace(SHORT, stages=(SHORT.stages[0], replace(SHORT.stages[1], freeze_line="layer9")))
    with pytest.raises(ModelError, match="layer9"):
        fine_tune(photos, out=out, recipe=lost, **TINY)
    assert not out.exists()
    (photos / "red/red0.jpg").write_bytes((photos / "red/red0.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match=r"red0\.jpg"):
        fine_tune(photos, out=out, recipe=SHORT, **TINY)
    assert not out.exists()
    result = fine_tune(photos, out=out, recipe=SHORT, bad_files="skip", **TINY)
    assert [Path(path).name for path, _ in result.metrics["data"]["bad_files"]] == ["red0.jpg"]
    assert "red0.jpg" in (out / "report.html").read_text()
    with pytest.raises(RecipeError, match="random weights"):
        fine_tune(photos, recipe="scratch", **(TINY | {"weights": out}))


def test_an_interrupt_leaves_a_usable_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart import run as run_room

    write = run_room.Run.append_history

    def stop_in_fine_tuning(self: run_room.Run, record: dict[str, object]) -> None:
        write(self, record)
        if record["stage"] == "fine-tune" and record["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_room.Run, "append_history", stop_in_fine_tuning)
    with pytest.raises(Interrupted, match=r"(?s)best state so far.*headstart evaluate .*headstart fit"):
        fine_tune(photos, out=tmp_path / "run", recipe=SHORT, **TINY)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["interrupted"] is True
    assert [s["name"] for s in metrics["stages"]] == ["head"]
    assert len(predict_files(tmp_path / "run", [photos / "red/red1.jpg"], device="cpu")) == 1
    assert (tmp_path / "run/report.html").stat().st_size > 1000
    # The older run is not given up for an unfinished one.
    fine = tmp_path / "fine"
    fine.mkdir()
    monkeypatch.undo()
    fine_tune(photos, out=fine, recipe=SHORT, **TINY)
    whole = (fine / "metrics.json").read_bytes()
    monkeypatch.setattr(run_room.Run, "append_history", stop_in_fine_tuning)
    with pytest.raises(
        Interrupted, match=r"fine\.new-1 holds the best state(?s:.*)older run .*fine is as it was"
    ) as caught:
        fine_tune(photos, out=fine, recipe=SHORT, overwrite=True, **TINY)
    assert (fine / "metrics.json").read_bytes() == whole
    assert isinstance(caught.value.model, headstart.Classifier)
    assert f"headstart fit PHOTOS --from-run {fine}" in str(caught.value)


@pytest.mark.parametrize("place", ["headstart.recipes.write_plan", "headstart.bench.make_source"])
def test_an_interrupt_before_anything_is_trained_leaves_nothing(
    place: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(Interrupted, match=r"^Stopped before anything was trained; nothing was written\.$"):
        fine_tune(photos, out=tmp_path / "run", recipe=SHORT, **TINY)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_scored_is_written_whatever_interrupts(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import report

    write = report.write_report

    def interrupted(folder: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        return write(folder)

    monkeypatch.setattr(report, "write_report", interrupted)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as on the command line
    try:
        result = fine_tune(photos, out=tmp_path / "run", recipe=SHORT, **TINY)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.stopped  # so that those who train one run after the other begin no other
    assert result.report_path == tmp_path / "run/report.html"
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"]["n"] == 6


def test_a_disk_that_is_full_at_the_end_is_told_with_the_file(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: object, folder: Path) -> None:
        raise CheckpointError(f"Cannot write {folder}/model.safetensors: No space left on device.")

    monkeypatch.setattr("headstart.closing.save", full)
    with pytest.raises(
        CheckpointError, match=r"(?s)^Cannot write .*model\.safetensors.*\nThe state so far could not be"
    ):
        fine_tune(photos, out=tmp_path / "run", recipe=SHORT, **TINY)
    monkeypatch.undo()
    result = fine_tune(photos, out=tmp_path / "run", recipe=SHORT, resume=True, **TINY)  # nothing is trained again
    assert result.metrics["test"]["n"] == 6


def test_an_error_in_training_leaves_what_was_trained_or_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import train

    loop = train.fit

    def fails(stage: str) -> None:
        def fit_or_fail(model: object, data: object, at: Stage, **options: object) -> object:
            if at.name == stage:
                raise ModelError("the rate is too high")
            return loop(model, data, at, **options)

        monkeypatch.setattr(train, "fit", fit_or_fail)

    fails("head")
    with pytest.raises(ModelError, match=r"^the rate is too high$"):
        fine_tune(photos, out=tmp_path / "run", recipe=SHORT, **TINY)
    assert not (tmp_path / "run").exists()
    fails("fine-tune")
    with pytest.raises(ModelError, match=r"(?s)the rate is too high.*late holds the best state so far"):
        fine_tune(photos, out=tmp_path / "late", recipe=SHORT, **TINY)
    assert load(tmp_path / "late").class_names == ("blue", "green", "red")
    with pytest.raises(ModelError, match=r"^the rate is too high$"):
        fine_tune(photos, recipe=SHORT, **TINY)


def test_a_transform_of_the_users_own_with_dropout_gives_the_same_bits_twice(photos: Path) -> None:
    from torchvision.transforms import v2

    splits = split(load_images(photos))

    def train() -> torch.Tensor:
        model = create_classifier("test_resnet", splits.class_names, weights="none", image_size=32, head=DROPOUT)
        set_freeze_line(model, "all")
        stage = Stage(freeze_line="all", epochs=2, batch_size=4)
        cpu = headstart.make_runtime(device="cpu", precision="fp32", workers=2)
        fit(model, splits, stage, lr=1e-3, augment=v2.ColorJitter(0.5, 0.5), runtime=cpu)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(train(), train())


def test_options_without_effect_are_refused(photos: Path) -> None:
    splits = split(load_images(photos))
    with pytest.raises(RecipeError, match="limit: without effect on a Splits"):
        fine_tune(splits, limit=5, **TINY)
    with pytest.raises(RecipeError, match="val_folder: without effect on a ImageTable"):
        fine_tune(load_images(photos), val_folder="x", **TINY)
    with pytest.raises(RecipeError, match="random weights"):
        fine_tune(photos, recipe="scratch", **(TINY | {"weights": "hub"}))
    empty = replace(splits, val=splits.val.select([]))
    with pytest.raises(DataError, match="validation split is empty"):
        fit(create_classifier(TinyNet(), splits.class_names, data_spec=SPEC), empty)


def test_evaluating_training_pictures_is_told(
    run: headstart.FitResult, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    headstart.evaluate_run(tmp_path / "run", photos, device="cpu")
    used = len(run.splits.train) + len(run.splits.val)
    assert f"{used} of these 36 pictures were trained on" in capsys.readouterr().err
    for path in photos.rglob("*.jpg"):
        Image.open(path).rotate(90).save(path)
    photos.rename(tmp_path / "other")
    headstart.evaluate_run(tmp_path / "run", tmp_path / "other", device="cpu")
    assert "trained on" not in capsys.readouterr().err


def test_the_steps_one_by_one(photos: Path) -> None:
    splits = split(load_images(photos), seed=1)
    model = create_classifier(TinyNet(), splits.class_names, data_spec=SPEC)
    set_freeze_line(model, "head")
    cpu = headstart.make_runtime(device="cpu", precision="fp32")
    head = fit(model, splits, Stage(epochs=8, batch_size=8, views=2), lr=0.05, runtime=cpu)
    assert head.best.loss < head.history[0]["val"]["loss"]
    with pytest.raises(ModelError, match=r"set_freeze_line\(model, 'block'"):
        fit(model, splits, Stage(freeze_line="block"), runtime=cpu)
    set_freeze_line(model, "block")
    stem = model.backbone.stem.weight.detach().clone()
    block = model.backbone.block.weight.detach().clone()
    stage = Stage(freeze_line="block", epochs=2, batch_size=8)
    tuned = fit(model, splits, stage, lr=1e-3, starts_trained=True, runtime=cpu)
    assert tuned.best.loss <= head.best.loss * (1 + 1e-5)
    assert torch.equal(stem, model.backbone.stem.weight)
    assert tuned.best_epoch == 0 or not torch.equal(block, model.backbone.block.weight)
    assert headstart.evaluate(model, splits.test).metrics["n"] == len(splits.test)
    with pytest.raises(DataError, match="not the model's"):
        headstart.evaluate(model, replace(splits.test, class_names=("x", "y", "z")))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_named_recipe_trains(name: str, photos: Path) -> None:
    plan = RECIPES[name]
    plan = replace(plan, stages=tuple(replace(s, epochs=1, batch_size=8) for s in plan.stages))
    result = fine_tune(photos, recipe=plan, limit=30, **TINY)
    assert [s["name"] for s in result.metrics["stages"]] == [s.name for s in plan.stages]
    assert len(result.splits.train) + len(result.splits.val) + len(result.splits.test) == 30
    trained = result.metrics["stages"][-1]["trained"]
    assert bool(trained) == (name != "head")


def test_training_from_scratch_learns_batchnorm_statistics_and_fine_tuning_does_not(photos: Path) -> None:
    for name, moves in (("scratch", True), ("fine-tune", False)):
        plan = RECIPES[name]
        plan = replace(plan, stages=tuple(replace(s, epochs=1, batch_size=8) for s in plan.stages))
        net = TinyNet()
        before = net.norm.running_mean.clone()
        result = fine_tune(photos, backbone=net, data_spec=SPEC, recipe=plan, weights="none", precision="fp32")
        assert torch.equal(before, result.model.backbone.norm.running_mean) != moves


@pytest.mark.parametrize("head", [[torch.nn.Linear(8, 3)], "linear", 64, {"hidden": 64}, torch.nn.Linear, (256,)])
def test_what_is_no_head_is_refused(head: object, photos: Path) -> None:
    with pytest.raises(ModelError, match=r"it takes a HeadSpec.*nn\.Sequential"):
        fine_tune(photos, head=head, recipe=SHORT, **TINY)
    with pytest.raises(ModelError, match=r"it takes a HeadSpec.*nn\.Sequential"):
        create_classifier(TinyNet(), ("a", "b"), data_spec=SPEC, head=head)


def test_a_head_that_gives_probabilities_is_refused() -> None:
    head = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.Softmax(1))
    with pytest.raises(ModelError, match="Leave the softmax at its end out"):
        create_classifier(TinyNet(), ("a", "b", "c"), data_spec=SPEC, head=head)
    even = torch.nn.Linear(8, 3)
    torch.nn.init.zeros_(even.weight)
    torch.nn.init.constant_(even.bias, 1 / 3)
    for sound in (head[:1], even, torch.nn.Sequential(even, torch.nn.LogSoftmax(1))):
        create_classifier(TinyNet(), ("a", "b", "c"), data_spec=SPEC, head=sound)


def test_the_caller_s_modules_and_models_stay_as_they_are(photos: Path) -> None:
    net, head = TinyNet(), torch.nn.Linear(8, 3)
    given = {"data_spec": SPEC, "weights": "none", "precision": "fp32", "device": "cpu", "recipe": SHORT}
    runs = [fine_tune(photos, backbone=net, head=head, **given) for _ in range(2)]
    assert runs[0].metrics["test"] == runs[1].metrics["test"]
    before = [p.detach().clone() for p in runs[0].model.parameters()]
    again = fine_tune(photos, from_run=runs[0].model, recipe=SHORT, precision="fp32", device="cpu")
    assert again.model is not runs[0].model
    assert all(map(torch.equal, before, runs[0].model.parameters()))


def test_modules_of_which_a_copy_would_be_none_are_trained_themselves(photos: Path) -> None:
    given = {"data_spec": SPEC, "weights": "none", "precision": "fp32", "device": "cpu", "recipe": SHORT}
    hooked, locked, closed = TinyNet(), TinyNet(), TinyNet()
    hooked.block.register_forward_hook(lambda module, args, out: setattr(hooked, "last", out))
    locked.lock = threading.Lock()
    closed.scale = lambda x: x * closed.norm.weight.mean()
    for net in (hooked, locked, closed):
        assert fine_tune(photos, backbone=net, **given).model.backbone is net


def test_what_is_returned_answers_the_same_each_time_it_is_asked(photos: Path) -> None:
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
    given = {"data_spec": SPEC, "weights": "none", "precision": "fp32", "device": "cpu", "recipe": SHORT}
    result = fine_tune(photos, backbone=TinyNet(), head=head, **given)
    stage = Stage(freeze_line="head", epochs=1, batch_size=8)
    set_freeze_line(result.model, "head")
    for _ in range(2):
        assert not any(module.training for module in result.model.modules())
        pixels = torch.randint(0, 256, (4, 3, 16, 16)).float()
        assert torch.equal(result.model(pixels), result.model(pixels))
        fit(result.model, result.splits, stage, runtime=headstart.make_runtime(device="cpu", precision="fp32"))


def test_fit_refuses_other_classes_and_a_freeze_by_hand(photos: Path) -> None:
    splits = split(load_images(photos), seed=1)
    turned = create_classifier(TinyNet(), splits.class_names[::-1], data_spec=SPEC)
    with pytest.raises(DataError, match="not the model's"):
        fit(turned, splits)
    model = create_classifier(TinyNet(), splits.class_names, data_spec=SPEC)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match=r"6 weights.*by hand.*set_freeze_line\(model, 'head'\)"):
        fit(model, splits)
    assert model.freeze_line is None
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    cpu, short = headstart.make_runtime(device="cpu", precision="fp32"), Stage(epochs=1, batch_size=8)
    fit(model, splits, replace(short, freeze_line="head"), runtime=cpu, augment=None)
    designed = create_classifier(TinyNet(), splits.class_names, data_spec=SPEC)
    designed.backbone.norm.bias.requires_grad_(False)  # a small part, as positions that are fixed
    before = designed.backbone.norm.bias.clone()
    fit(designed, splits, replace(short, freeze_line="all"), runtime=cpu, lr=np.float32(1e-3))
    assert torch.equal(designed.backbone.norm.bias, before)
    with pytest.raises(RecipeError, match="it takes a Stage"):
        fit(model, splits, "head")
    set_freeze_line(model, "head")
    for lr in (-1, "1e-3"):
        with pytest.raises(RecipeError, match="it takes a number above 0"):
            fit(model, splits, lr=lr)


def test_going_on_from_a_run_refuses_another_backbone(run: headstart.FitResult, photos: Path) -> None:
    with pytest.raises(RecipeError, match="backbone: without effect beside from_run"):
        fine_tune(photos, from_run=run.run_path, backbone="resnet18", recipe=SHORT)


def test_pictures_are_predicted_however_they_are_given(run: headstart.FitResult, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))[:3]
    rows = predict_files(run.model, paths)
    assert predict_files(run.model, iter(paths)) == rows
    assert predict_files(run.model, str(paths[0]))[0]["probs"] == pytest.approx(rows[0]["probs"], abs=1e-6)
    pictures = [Image.open(path) for path in paths]
    assert [row["path"] for row in predict_files(run.model, np.array(list(map(str, paths))))] == list(map(str, paths))
    kept = sorted(p for p in Path(os.environ["HEADSTART_CACHE"]).rglob("*") if p.is_dir())
    for given in (pictures[0], np.asarray(pictures[0])):
        assert predict_files(run.model, given)[0]["probs"] == pytest.approx(rows[0]["probs"], abs=1e-6)
    for given in (pictures, np.stack([np.asarray(picture) for picture in pictures])):
        told = predict_files(run.model, given)
        assert [row["path"] for row in told] == ["0", "1", "2"]
        assert [row["probs"] for row in told] == [pytest.approx(row["probs"], abs=1e-6) for row in rows]
    assert kept == sorted(p for p in Path(os.environ["HEADSTART_CACHE"]).rglob("*") if p.is_dir())
    with pytest.raises(DataError, match="no picture to predict"):
        predict_files(run.model, [])
    with pytest.raises(DataError, match="picture 0"):
        predict_files(run.model, [paths[0].read_bytes()])


def test_many_pictures_are_predicted_in_parts(
    run: headstart.FitResult, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(photos.rglob("*.jpg"))[:7]
    whole, looked = predict_files(run.model, paths), []
    predict = evaluation.predict_probs
    monkeypatch.setattr(evaluation, "PREDICTED_AT_ONCE", 3)
    monkeypatch.setattr(evaluation, "predict_probs", lambda m, x, **how: looked.append(len(x)) or predict(m, x, **how))
    rows = predict_files(run.model, paths)
    assert looked == [3, 3, 1]
    assert [row["path"] for row in rows] == [row["path"] for row in whole]
    assert [row["probs"] for row in rows] == [pytest.approx(row["probs"], abs=1e-6) for row in whole]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"augment": "nope"}, RecipeError, "nope"),
        ({"recipe": {"lr": 1}}, RecipeError, r"given as a dict; it takes a name .* Recipe\.from_dict"),
        ({"spec_overrides": {"size": 96}}, RecipeError, "unknown key 'size'"),
    ],
)
def test_wrong_options_are_told_before_pictures_are_read(
    given: dict[str, object], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        fine_tune(tmp_path / "nowhere", **given)


def test_what_is_of_another_kind_is_told_in_words(run: headstart.FitResult, photos: Path) -> None:
    for given in (str(photos), run.splits):
        with pytest.raises(DataError, match="evaluate takes an ImageTable"):
            headstart.evaluate(run.model, given)
    with pytest.raises(DataError, match=r"split takes an ImageTable, such as .*; this is str"):
        split(str(photos))
    with pytest.raises(DataError, match=r"fit takes Splits, such as .*; this is str"):
        fit(run.model, str(photos))
    with pytest.raises(
        CheckpointError, match=r"evaluate_run takes a run folder; this is Classifier\. .* evaluate\(model"
    ):
        headstart.evaluate_run(run.model, photos)
    for pictures, kind in ((None, "NoneType"), (b"abc", "bytes")):
        with pytest.raises(DataError, match=f"Pictures are given as {kind}; it takes files"):
            predict_files(run.model, pictures)
    with pytest.raises(headstart.SetupError, match="Device None cannot be used here"):
        headstart.make_runtime(device=None)


def test_test_pictures_are_known_again_through_a_link(run: headstart.FitResult, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    found = trained_on(run.run_path, load_images(tmp_path / "link"))
    assert found.sum() == len(run.splits.train) + len(run.splits.val)


def test_test_pictures_are_known_again_in_a_copy_of_their_folder(
    run: headstart.FitResult, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "copy")
    for number, path in enumerate(sorted((tmp_path / "copy").rglob("*.jpg"))):
        path.rename(path.with_name(f"{number}.jpg"))
    table = load_images(tmp_path / "copy")
    assert run.run_path is not None
    assert trained_on(run.run_path, table).sum() == len(run.splits.train) + len(run.splits.val)
    headstart.evaluate_run(run.run_path, tmp_path / "copy", device="cpu")
    assert "30 of these 36 pictures were trained on or chose the model" in capsys.readouterr().err
    again = fine_tune(
        tmp_path / "copy", out=tmp_path / "next", recipe=replace(SHORT, seed=3), **TINY | {"weights": run.run_path}
    )
    seen = trained_on(run.run_path, again.splits.test).sum()
    assert again.metrics["test_without_leaks"]["n"] == len(again.splits.test) - seen < len(again.splits.test)
    for data, how in ((photos, {"cache": False}), (load_images(photos), {"audit": False})):
        other = fine_tune(data, out=tmp_path / "other", overwrite=True, recipe=SHORT, **how, **TINY)
        assert other.run_path is not None
        assert trained_on(other.run_path, table).sum() == len(other.splits.train) + len(other.splits.val)


def test_the_public_names_are_sorted_and_none_is_shadowed_by_a_room() -> None:
    import importlib
    import types

    assert headstart.__all__ == sorted(set(headstart.__all__))
    for path in Path(headstart.__file__).parent.glob("[a-z]*.py"):
        importlib.import_module(f"headstart.{path.stem}")
    for name in headstart.__all__:
        assert not isinstance(getattr(headstart, name), types.ModuleType), name
