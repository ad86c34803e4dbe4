"""The learning-rate finder and the sweep on tiny pictures: what they restore, share, resume and never touch."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import headstart
from headstart import (
    Interrupted,
    ModelError,
    Recipe,
    RecipeError,
    SetupError,
    Space,
    Stage,
    find_lr,
    fine_tune,
    load_images,
    split,
    sweep,
)
from headstart.bench import Bench
from headstart.cli import main
from headstart.errors import HeadstartError
from headstart.features import make_source
from headstart.lr_finder import RateCurve, describe, option_for, range_test, smoothed, suggestions
from headstart.owners import is_gone, this_process
from headstart.recipe import HeadSpec, load_recipe
from headstart.runtime import make_runtime
from headstart.space import COURSE, COURSE_SPACE, parse_point, parse_values, point_key, trial_recipe
from headstart.tuned import tuned_on, write_tuned
from tiny import SPEC, TinyNet

NET: dict[str, Any] = {"backbone": "test_resnet", "weights": "none", "spec_overrides": {"image_size": 32}}
MACHINE: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 1}
PLAN = Recipe(
    name="tiny",
    stages=(
        Stage(epochs=2, views=2, batch_size=8),
        Stage(name="fine-tune", freeze_line="all", epochs=1, batch_size=8, lr_scale=0.01),
    ),
    lr=0.01,
)
HEAD = Recipe(name="tiny-head", stages=PLAN.stages[:1], lr=0.01)
ARGUMENTS = ["--backbone", "test_resnet", "--weights", "none", "--image-size", "32", "--device", "cpu", "--precision",
             "fp32", "--workers", "1", "--quiet"]  # fmt: skip


def bench_of(photos: Path) -> Bench:
    return Bench(split(load_images(photos)), make_runtime(**MACHINE), share=True)


# ---- the finder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["head", "all"])
def test_the_test_leaves_no_trace(photos: Path, line: str) -> None:
    bench = bench_of(photos)
    names = bench.splits.class_names
    model = headstart.create_classifier(TinyNet(dropout=0.2), names, data_spec=SPEC, head=HeadSpec(batchnorm=True))
    stage = Stage(freeze_line=line, batchnorm="train" if line == "all" else "fixed", batch_size=8)
    headstart.set_freeze_line(model, line, batchnorm=stage.batchnorm)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    train, val = bench.pixels("train", model.spec), bench.pixels("val", model.spec)
    data = make_source(train, val, model, views=1, runtime=bench.runtime)
    curve = range_test(model, data, stage, runtime=bench.runtime, steps=40, low=1e-5, high=1e3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert curve.rates[0] == pytest.approx(1e-5)
    assert all(b > a for a, b in zip(curve.rates, curve.rates[1:], strict=False))


def test_a_loss_that_runs_away_ends_the_test(photos: Path) -> None:
    curve = find_lr(photos, recipe=HEAD, high=1e9, steps=60, cache=False, **NET, **MACHINE)
    assert curve.diverged
    assert curve.rates[-1] < 1e9
    assert min(curve.rates) < curve.suggestion < max(curve.rates)


def test_before_and_after_the_head_and_from_a_run(photos: Path, tmp_path: Path) -> None:
    bench = bench_of(photos)
    call: dict[str, Any] = {"recipe": PLAN, "steps": 30, "high": 1.0, **NET}
    first = find_lr(bench, out=tmp_path / "lr.png", **call)
    assert (first.stage, first.freeze_line) == ("head", "head")
    assert first.option == f"--lr {first.suggestion:.2g}"
    assert first.picture is not None
    assert first.picture.read_bytes().startswith(b"\x89PNG")
    after = find_lr(bench, after_head=True, **call)
    assert (after.stage, after.freeze_line) == ("fine-tune", "all")
    assert after.option == f"--lr-scale ,{after.suggestion / PLAN.lr:.2g}"
    assert after.losses[0] < first.losses[0]  # the head has learned meanwhile
    run = fine_tune(bench, recipe=PLAN, out=tmp_path / "run", **NET).run_path
    again = find_lr(bench, run=run, steps=30, high=1.0)
    assert again.stage == "fine-tune"
    with pytest.raises(RecipeError, match="one of the two"):
        find_lr(bench, run=run, after_head=True)
    with pytest.raises(RecipeError, match="one stage"):
        find_lr(bench, recipe=HEAD, after_head=True, **NET)


def test_suggestions_of_a_curve_with_a_known_shape() -> None:
    rates = np.geomspace(1e-6, 10, 101)
    x = np.log10(rates)
    # Level until 1e-4, a fall that is steepest at 1e-2.5, least at 1e-1, then away.
    losses = 2 - 1.6 / (1 + np.exp(-4 * (x + 2.5))) + np.where(x > -1, 3 * (x + 1) ** 2, 0)
    steepest, valley, tenth = suggestions(rates, losses)
    assert steepest == pytest.approx(10**-2.5, rel=0.1)
    assert tenth == pytest.approx(10**-2, rel=0.3)
    assert 1e-4 < valley < 1e-1
    losses[0] += 0.2  # the mean of one batch
    assert suggestions(rates, losses)[0] == steepest
    losses[0] = 0.0  # or low by chance
    assert suggestions(rates, losses)[::2] == (steepest, tenth)


def fastai_valley(rates: Any, losses: Any) -> float:
    """As in fastai 2.8, callback/schedule.py, `valley`, with its own words."""
    n = len(losses)
    max_start, max_end = 0, 0
    lds = [1] * n
    for i in range(1, n):
        for j in range(i):
            if losses[i] < losses[j] and lds[i] < lds[j] + 1:
                lds[i] = lds[j] + 1
            if lds[max_end] < lds[i]:
                max_end = i
                max_start = max_end - lds[max_end]
    sections = (max_end - max_start) / 3
    return float(rates[max_start + int(sections) + int(sections / 2)])


@pytest.mark.parametrize("seed", range(5))
def test_the_valley_is_fastais(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates = np.geomspace(1e-6, 10, 101)
    losses = 2 - 1.6 / (1 + np.exp(-4 * (np.log10(rates) + 2.5))) + rng.normal(0, 0.05, 101)
    assert suggestions(rates, losses)[1] == fastai_valley(rates, losses)


def test_a_curve_that_does_not_fall_suggests_nothing(photos: Path) -> None:
    call: dict[str, Any] = {"recipe": replace(HEAD, stages=(replace(HEAD.stages[0], batch_size=4),)), **NET, **MACHINE}
    flat = find_lr(photos, low=1e-9, high=1e-7, **call)
    assert not flat.falls
    assert "no suggestion: no rate here lowers the loss" in describe(flat)
    assert "suggestion: --lr" not in describe(flat)
    fell = find_lr(photos, **call)
    assert fell.falls
    assert describe(fell).endswith(f"suggestion: {fell.option}")
    with pytest.raises(RecipeError, match="L-BFGS finds the length of its steps itself"):
        find_lr(photos, **call | {"recipe": Recipe(stages=(Stage(optimizer="lbfgs"),))})


@pytest.mark.parametrize("change", [{"class_weights": (1.0, 50.0, 1.0)}, {"clip_norm": 1e-3, "optimizer": "sgd"}])
def test_weights_and_clipping_are_in_the_curve(change: dict[str, Any], photos: Path) -> None:
    plain = replace(HEAD.stages[0], **{name: value for name, value in change.items() if name == "optimizer"})
    call: dict[str, Any] = {"steps": 30, **NET, **MACHINE}
    before = find_lr(photos, recipe=Recipe(stages=(plain,)), **call)
    assert find_lr(photos, recipe=Recipe(stages=(replace(plain, **change),)), **call).losses != before.losses


def test_smoothing_begins_without_bias_and_stops_where_it_runs_away() -> None:
    assert smoothed([2.0] * 30) == (pytest.approx([2.0] * 30), False)
    losses, diverged = smoothed([1.0] * 20 + [1e6] * 5)
    assert (len(losses), diverged) == (20, True)
    assert smoothed([1.0, float("nan"), 1.0]) == ([1.0], True)


def test_lr_on_the_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curve.svg"
    arguments = ["--recipe", "head", "--steps", "20", "--out", str(out)]
    assert main(["lr", str(photos), *arguments, *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    assert "suggestion: --lr " in printed
    assert out.read_text().lstrip().startswith("<?xml")
    assert main(["lr", str(photos), "--run", "somewhere", *ARGUMENTS]) == 2
    capsys.readouterr()
    assert main(["lr", str(photos), "--run", "somewhere", "--image-size", "64", "--epochs", "2", "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert all(flag in said for flag in ("--image-size", "--epochs", "--seed"))
    assert "the run has its own" in said
    bench = bench_of(photos)
    run = fine_tune(bench, recipe=HEAD, out=tmp_path / "run", **NET).run_path
    arguments = ["--run", str(run), "--steps", "20", "--out", str(out), "--device", "cpu", "--quiet"]
    assert main(["lr", str(photos), *arguments]) == 0
    assert "suggestion: --lr " in capsys.readouterr().out  # the one stage of its recipe


@pytest.mark.parametrize("out", ["lr.bmp", "nowhere/lr.png"])
def test_a_curve_that_could_not_be_drawn_is_refused_before_pictures_are_looked_for(
    out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("lr", "preview"):
        assert main([command, "no-photos", "--out", out, "--backbone", "test_resnet"]) == 2
        said = capsys.readouterr().err
        assert ("the ending is '.bmp'" if out == "lr.bmp" else "there is no folder nowhere") in said
    with pytest.raises(HeadstartError, match=r"ending is '\.bmp'|no folder nowhere"):
        find_lr("no-photos", out=out, **NET, **MACHINE)


def test_lr_prints_what_it_found_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    def found(*_: object, out: Path | None = None, **__: object) -> RateCurve:
        curve = RateCurve("head", "head", (1e-3, 1e-2), (1.0, 0.5), 1e-3, 2e-3, 3e-3, False, "--lr 0.002")
        return curve if out is None else replace(curve, picture=full())

    monkeypatch.setattr("headstart.plots.plot_rates", full)
    monkeypatch.setattr("headstart.lr_finder.find_lr", found)
    assert main(["lr", "photos", "--out", str(tmp_path / "lr.png"), *ARGUMENTS]) == 2
    printed = capsys.readouterr()
    assert "suggestion: --lr 0.002" in printed.out
    assert "No space left" in printed.err


# ---- the sweep -------------------------------------------------------------------------------------------------

GRID = Space(values={"lr": (0.001, 0.01), "weight_decay": (0.0, 0.1)})


def test_a_sweep_never_opens_a_test_picture(photos: Path, tmp_path: Path) -> None:
    splits = split(load_images(photos))
    for path in splits.test.paths:
        path.unlink()  # whatever would read one now fails
    result = sweep(splits, space=GRID, recipe=HEAD, out=tmp_path / "out", cache=False, **NET, **MACHINE)
    assert len(result.results["trials"]) == 4
    assert "test" not in json.dumps(result.results["trials"])


def test_trials_share_features_and_the_best_by_validation_is_kept(photos: Path, tmp_path: Path) -> None:
    result = sweep(bench_of(photos), space=GRID, recipe=HEAD, prune=False, out=tmp_path / "out", **NET)
    trials = result.results["trials"]
    assert [t["values"] for t in trials] == GRID.grid()
    assert [t["shared_seconds"] > 0 for t in trials] == [False, True, True, True]
    best = min(trials, key=lambda t: t["val"]["log_loss"])
    assert result.results["best"] == best["number"]
    saved = load_recipe(tmp_path / "out" / "best.json")
    assert saved == result.best
    assert saved.lr == best["values"]["lr"]
    assert {stage.weight_decay for stage in saved.stages} == {best["values"]["weight_decay"]}
    alone = fine_tune(bench_of(photos), recipe=saved, **NET)
    assert alone.metrics["val"]["log_loss"] == pytest.approx(best["val"]["log_loss"], abs=1e-9)
    assert (tmp_path / "out" / "parallel.png").is_file()


def test_the_same_call_goes_on_and_adds_nothing_when_done(photos: Path, tmp_path: Path) -> None:
    bench, call = bench_of(photos), {"recipe": HEAD, "out": tmp_path / "out", **NET}
    some = sweep(bench, space=GRID, trials=2, **call)
    assert len(some.results["trials"]) == 2
    whole = sweep(bench, space=GRID, **call)
    assert whole.results["trials"][:2] == some.results["trials"]
    assert [t["values"] for t in whole.results["trials"]] == GRID.grid()
    assert sweep(bench, space=GRID, **call).results["trials"] == whole.results["trials"]


def test_a_sweep_that_is_stopped_keeps_what_its_trials_found(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, call, done = bench_of(photos), {"recipe": HEAD, "out": tmp_path / "out", **NET}, []

    def stopped(*args: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return fine_tune(*args, **options)

    monkeypatch.setattr("headstart.sweeps.fine_tune", stopped)
    with pytest.raises(
        Interrupted, match=r"1 trial is done, the best of them in .*best\.json; the same command goes on"
    ):
        sweep(bench, space=GRID, prune=False, **call)
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [trial["values"] for trial in kept["trials"]] == GRID.grid()[:1]
    assert kept["settings"]["precision"] == "float32"
    assert load_recipe(tmp_path / "out" / "best.json").lr == GRID.grid()[0]["lr"]
    del kept["settings"]["precision"]  # as an earlier version left it
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(kept))
    whole = sweep(bench, space=GRID, prune=False, **call)
    assert sorted(json.dumps(t["values"]) for t in whole.results["trials"]) == sorted(map(json.dumps, GRID.grid()))


def test_sweeps_that_share_a_storage_keep_to_their_own_trials(photos: Path, tmp_path: Path) -> None:
    bench, call = bench_of(photos), {"storage": tmp_path / "all.log", **NET}
    longer = replace(HEAD, stages=tuple(replace(stage, epochs=stage.epochs + 1) for stage in HEAD.stages))
    found = [sweep(bench, space=GRID, trials=1, recipe=recipe, out=tmp_path / out / "sweep", **call).results["trials"]
             for recipe, out in ((HEAD, "a"), (longer, "b"))]  # fmt: skip
    assert [len(trials) for trials in found] == [1, 1]
    assert found[0][0]["seconds"] != found[1][0]["seconds"]  # not the one for the other
    again = sweep(bench, space=GRID, trials=1, recipe=HEAD, out=tmp_path / "a" / "sweep", overwrite=True, **call)
    assert again.results["trials"][0]["seconds"] not in {trials[0]["seconds"] for trials in found}


def test_a_trial_that_fails_is_tried_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, call = bench_of(photos), {"recipe": HEAD, "out": tmp_path / "out", **NET}
    with monkeypatch.context() as broken:
        broken.setattr("headstart.sweeps.fine_tune", mock.Mock(side_effect=ValueError("no such thing")))
        with pytest.raises(ValueError, match="no such thing"):
            sweep(bench, space=GRID, **call)
    assert len(sweep(bench, space=GRID, **call).results["trials"]) == len(GRID.grid())


def test_a_trial_that_cannot_be_had_is_left_out_with_its_reason(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, call = bench_of(photos), {"recipe": HEAD, "out": tmp_path / "out", **NET}
    space = Space(values={"lr": (1e-3, 1e-2, 1e-1)})

    def fails(bench: Any, *, recipe: Recipe, **options: Any) -> Any:
        if recipe.lr == 1e-2:
            raise SetupError("no network")
        if recipe.lr == 1e-1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return fine_tune(bench, recipe=recipe, **options)

    with monkeypatch.context() as broken:
        broken.setattr("headstart.sweeps.fine_tune", fails)
        found = sweep(bench, space=space, **call)
        assert [row["values"] for row in found.results["trials"]] == [{"lr": 1e-3}]
        assert [one["values"] for one in found.results["failed"]] == [{"lr": 1e-2}, {"lr": 1e-1}]
        assert found.best == load_recipe(tmp_path / "out/best.json")
        assert "lr 0.01: failed: no network" in capsys.readouterr().err
        broken.setattr("headstart.sweeps.fine_tune", mock.Mock(side_effect=SetupError("no network")))
        with pytest.raises(RecipeError, match=r"No trial came to its end\. lr 0\.001: no network"):
            sweep(bench, space=space, **call | {"out": tmp_path / "none"})
        with pytest.raises(RecipeError, match="No trial came to its end"):
            sweep(bench, space=space, method="tpe", trials=2, **call | {"out": tmp_path / "tpe"})
    again = sweep(bench, space=space, **call)
    assert (len(again.results["trials"]), again.results["failed"]) == (3, [])


@pytest.mark.parametrize("budget", [{"trials": 0}, {"trials": -1}, {"minutes": float("nan")}, {"minutes": -3.0}])
def test_a_sweep_of_nothing_is_refused(budget: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one or more trials"):
        sweep(tmp_path, space=GRID, out=tmp_path / "out", **budget)


def test_a_later_stage_s_rate_has_its_place_among_all_stages() -> None:
    places = [option_for(1e-4, nominal=1e-2, stage=Stage(), place=place, stages=4) for place in range(4)]
    assert places == ["--lr 0.0001", "--lr-scale ,0.01,,", "--lr-scale ,,0.01,", "--lr-scale ,,,0.01"]


def test_a_run_s_own_options_are_not_given_beside_it(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="weights, backbone would change nothing"):
        find_lr(photos, run=tmp_path, backbone="resnet18", weights="none")


def test_tpe_draws_from_ranges_and_lines(photos: Path, tmp_path: Path) -> None:
    space = Space(values={"lr": (1e-4, 1e-1), "freeze_line": ("head", "last:2"), "head_dropout": (0.0, 0.5)})
    bench = bench_of(photos)
    call: dict[str, Any] = {"space": space, "method": "tpe", "recipe": HEAD, "prune": False, **NET}
    stored = {"out": tmp_path / "out", "storage": f"sqlite:///{tmp_path / 'study.db'}"}
    trials = sweep(bench, trials=3, **call, **stored).results["trials"]
    assert len(trials) == 3
    assert all(1e-4 <= t["values"]["lr"] <= 1e-1 and t["values"]["freeze_line"] in ("head", "last:2") for t in trials)
    assert (tmp_path / "study.db").is_file()
    # What a later call or another process draws is new, and what one call would have drawn.
    more = [t["values"] for t in sweep(bench, trials=5, **call, **stored).results["trials"]]
    assert len({json.dumps(values) for values in more}) == 5
    assert more == [t["values"] for t in sweep(bench, trials=5, **call, out=tmp_path / "at once").results["trials"]]


def test_tpe_says_where_choices_changed(photos: Path, tmp_path: Path) -> None:
    bench = bench_of(photos)
    call: dict[str, Any] = {"method": "tpe", "recipe": HEAD, "out": tmp_path / "out", **NET}
    sweep(bench, trials=1, space=Space(values={"freeze_line": ("head", "last:2")}), **call)
    with pytest.raises(RecipeError, match=r"chose freeze_line in another way than from head, last:3,"):
        sweep(bench, trials=2, space=Space(values={"freeze_line": ("head", "last:3")}), **call)
    again = sweep(bench, trials=2, space=Space(values={"freeze_line": ("head", "last:2")}), **call)
    assert len(again.results["trials"]) == 2, "the trial that was not drawn counts for nothing"


def test_a_value_out_of_range_is_found_before_any_trial(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"lr is -1.0"):
        sweep(bench_of(photos), space=Space(values={"lr": (1e-3, -1.0)}), recipe=HEAD, out=tmp_path / "out", **NET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["foo://bar", "folder", "picture.jpg", "text.txt", "note.txt", "text.txt/journal.log"])
def test_a_storage_that_is_none_is_told_and_stays_as_it_is(kind: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    shutil.copy(next(photos.rglob("*.jpg")), tmp_path / "picture.jpg")
    (tmp_path / "text.txt").write_text("[1]\n")
    (tmp_path / "note.txt").write_text("one line")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
    storage = kind if "://" in kind else str(tmp_path / kind)
    with pytest.raises(RecipeError, match=rf"storage {re.escape(storage)} cannot be opened"):
        sweep(bench_of(photos), space=GRID, recipe=HEAD, out=tmp_path / "out", storage=storage, **NET)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}


@pytest.mark.parametrize("left", [5, 100, -20, -1])
def test_a_study_whose_last_line_is_torn_is_gone_on_with(left: int, photos: Path, tmp_path: Path) -> None:
    bench, call = bench_of(photos), {"recipe": HEAD, "out": tmp_path / "out", **NET}
    sweep(bench, space=GRID, trials=2, **call)
    journal = tmp_path / "out/journal.log"
    killed = journal.read_bytes().replace(b'"pid":%d' % os.getpid(), b'"pid":%d' % (2**22 + 1))  # no such process
    journal.write_bytes(killed[:left])
    for _ in range(2):  # what was added is read again
        done = sweep(bench, space=GRID, **call).results["trials"]
        assert sorted(point_key(t["values"]) for t in done) == sorted(map(point_key, GRID.grid()))


def test_a_disk_that_is_full_for_a_moment_leaves_a_study_that_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, call = bench_of(photos), {"recipe": HEAD, "out": tmp_path / "out", **NET}

    def full(self: JournalFileBackend, logs: list[Any]) -> None:
        with (tmp_path / "out/journal.log").open("ab") as file:
            file.write(json.dumps(logs[0]).encode()[:30])
        raise OSError(28, "No space left on device")

    sweep(bench, space=GRID, trials=2, **call)
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(headstart.CheckpointError, match=r"Cannot write .*journal\.log: No space left .* Make room"):
            sweep(bench, space=GRID, **call)
    done = sweep(bench, space=GRID, **call).results["trials"]
    assert [t["values"] for t in done] == GRID.grid()


def test_weights_made_anew_in_their_place_are_not_those_of_earlier_trials(photos: Path, tmp_path: Path) -> None:
    bench, run = bench_of(photos), tmp_path / "run"
    net = {**NET, "weights": run}
    for seed in (0, 1):
        fine_tune(bench, recipe=replace(HEAD, seed=seed), out=run, overwrite=True, **NET)
        if not seed:
            sweep(bench, space=GRID, trials=1, recipe=HEAD, out=tmp_path / "out", **net)
    with pytest.raises(headstart.CheckpointError, match="made with another contents of the weights"):
        sweep(bench, space=GRID, trials=1, recipe=HEAD, out=tmp_path / "out", **net)


@pytest.mark.parametrize("wrong", [{"steps": "50"}, {"steps": 5}, {"low": "1"}, {"low": 0}, {"high": 1e-9}])
def test_a_range_that_is_none_is_told(wrong: dict[str, Any], photos: Path) -> None:
    with pytest.raises(RecipeError, match=f"find_lr: {next(iter(wrong))} is"):
        find_lr(photos, **wrong)


def test_random_weights_go_to_every_backbone_and_a_wrong_line_is_found_before_any_trial(
    photos: Path, tmp_path: Path
) -> None:
    bench = bench_of(photos)
    space = Space(values={"backbone": ("test_resnet", "test_vit")})
    quick = replace(HEAD, stages=(replace(HEAD.stages[0], epochs=1),))
    found = sweep(bench, space=space, recipe=quick, out=tmp_path / "out", **NET)  # of weights none
    assert [t["state"] for t in found.results["trials"]] == ["complete", "complete"]
    assert tuned_on(tmp_path / "out" / "best.json")["weights"] == "none"
    lines = Space(values={"freeze_line": ("head", "nowhere")})
    with pytest.raises(ModelError, match="'nowhere' selects nothing"):
        sweep(bench, space=lines, recipe=quick, out=tmp_path / "wrong", **NET)
    assert not (tmp_path / "wrong").exists()


def test_a_hopeless_trial_is_ended_early(photos: Path, tmp_path: Path) -> None:
    recipe = Recipe(stages=(Stage(epochs=8, batch_size=8, views=1, schedule="constant"),), lr=0.01)
    space = Space(points=({"lr": 0.01}, {"lr": 0.012}, {"lr": 0.008}, {"lr": 0.011}, {"lr": 1e-7}))
    result = sweep(bench_of(photos), space=space, recipe=recipe, out=tmp_path / "out", **NET)
    assert [t["state"] for t in result.results["trials"]] == ["complete"] * 4 + ["pruned"]


def test_a_killed_trial_leaves_its_point_to_others_at_once(photos: Path, tmp_path: Path) -> None:
    bench, call = bench_of(photos), {"recipe": HEAD, "out": tmp_path / "out", **NET}
    sweep(bench, space=GRID, trials=1, **call)
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    study = optuna.load_study(
        study_name="out", storage=JournalStorage(JournalFileBackend(str(tmp_path / "out" / "journal.log")))
    )
    for point, owner in zip(GRID.grid()[1:3], ({"pid": dead.pid}, {}), strict=True):
        trial = study.ask()
        trial.set_user_attr("process", {**this_process(), **owner})  # the second one is in hand, by this process
        trial.set_user_attr("asked", point)
    done = sweep(bench, space=GRID, **call).results["trials"]
    assert [t["values"] for t in done] == [GRID.grid()[i] for i in (0, 1, 3)]


def test_only_a_process_known_to_have_ended_is_gone() -> None:
    mine = this_process()
    assert not is_gone(mine)
    assert is_gone({**mine, "started": "another process of that number"}) == bool(mine["started"])
    assert not is_gone({**mine, "host": "elsewhere", "pid": 2**22 + 1})
    assert is_gone({**mine, "pid": 2**22 + 1})  # beyond the largest number of a process
    assert not is_gone({})


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no process says its state on this system")
def test_a_process_that_has_ended_is_gone_before_its_parent_asks() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {**this_process(), "pid": child.pid, "started": ""}
    assert not is_gone(owner)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(owner)
    child.communicate()


def test_fit_repeats_what_was_tuned_with_its_backbone_weights_and_pictures(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = fine_tune(bench_of(photos), recipe=HEAD, out=tmp_path / "base", **NET).run_path
    overrides = {"image_size": 32, "mean": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    space = Space(points=({"lr": 0.02},))
    result = sweep(
        photos, space=space, recipe=HEAD, backbone="test_resnet", weights=base, spec_overrides=overrides,
        out=tmp_path / "out", **MACHINE,
    )  # fmt: skip
    best = tmp_path / "out" / "best.json"
    assert load_recipe(best) == result.best
    assert tuned_on(best) == {"backbone": "test_resnet", "weights": str(base), "spec_overrides": overrides}
    machine = ["--device", "cpu", "--precision", "fp32", "--workers", "1"]
    assert main(["fit", str(photos), "--recipe", str(best), "--out", str(tmp_path / "run"), *machine]) == 0
    assert f"backbone test_resnet, weights {base}" in capsys.readouterr().err
    run = headstart.read_run(tmp_path / "run")
    assert run.metrics["val"]["log_loss"] == pytest.approx(result.results["trials"][0]["val"]["log_loss"], abs=1e-6)
    assert run.model["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
    other = ["--backbone", "test_vit", "--weights", "none", "--epochs", "1"]
    assert main(["fit", str(photos), "--recipe", str(best), "--out", str(tmp_path / "vit"), *other, *machine]) == 0
    assert "was found on test_resnet; here it trains test_vit" in capsys.readouterr().err


def test_compare_and_shootout_say_what_a_recipe_was_found_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, backbone, side in (("a", "test_resnet", 32), ("b", "test_resnet", 48), ("c", "test_vit", 32)):
        write_tuned(f"{name}.json", HEAD, backbone=backbone, weights="none", pictures={"image_size": side})
    machine = ["--device", "cpu", "--precision", "fp32", "--workers", "1", "--quiet", "--epochs", "1"]
    compare = ["compare", str(photos), *machine[:-2], "--no-audit"]
    for others, option in (("a.json,c.json", "--backbone"), ("a.json,b.json", "--image-size")):
        assert main([*compare, "--recipes", others]) == 2
        assert f"Say which with {option}." in capsys.readouterr().err
    assert main([*compare, "--recipes", "a.json,b.json,head", "--image-size", "32", "--budget", "a=1", "--budget",
                 "b=1", "--budget", "head=1", "--out", "out"]) == 0  # fmt: skip
    settings = json.loads((tmp_path / "out" / "compare.json").read_text())["settings"]
    assert (settings["backbone"], settings["weights"], settings["pictures"]) == (
        "test_resnet", "none", {"image_size": 32}
    )  # fmt: skip
    capsys.readouterr()
    assert main(["shootout", str(photos), "--backbones", "test_vit=none", "--recipe", "a.json", "--image-size", "32",
                 "--finalists", "1", "--out", "shot", *machine]) == 0  # fmt: skip
    assert "a.json was found on test_resnet; here each backbone trains it." in capsys.readouterr().err


def test_what_a_recipe_was_found_on_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    assert tuned_on("head") == {}
    for missing in (tmp_path / "nope.json", "nope"):
        with pytest.raises(RecipeError, match="neither a known recipe"):
            tuned_on(missing)
    for wrong in ([], {"net": "resnet"}, {"backbone": 1}, {"pictures": {"size": 3}}):
        file.write_text(json.dumps({**HEAD.to_dict(), "tuned_on": wrong}))
        with pytest.raises(RecipeError, match="tuned_on is"):
            tuned_on(file)


def _one_process(photos: Path, out: Path) -> None:
    sweep(photos, space=GRID, recipe=HEAD, out=out, cache=False, **NET, **MACHINE)


@pytest.mark.slow
def test_processes_share_one_study(photos: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_one_process, args=(photos, tmp_path / "out")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    trials = sweep(photos, space=GRID, recipe=HEAD, out=tmp_path / "out", cache=False, **NET, **MACHINE)
    asked = [json.dumps(t["values"]) for t in trials.results["trials"]]
    assert set(asked) == {json.dumps(point) for point in GRID.grid()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["lr", "--epochs", "2"],
            "--epochs would change nothing: nothing is trained before the test. Give --after-head",
        ),
        (["sweep", "--values", "lr=0.001", "--lr", "0.01"], "--lr would change nothing: every trial has its own"),
        (["sweep", "--preset", "course", "--lr", "0.01"], "--lr would change nothing: every trial has its own"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arguments[0], str(tmp_path), *arguments[1:], *ARGUMENTS]) == 2
    assert words in capsys.readouterr().err


def test_the_course_preset_stands_beside_its_published_figures(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", str(photos), "--preset", "course", "--epochs", "1", "--out", str(out), *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    for _, _, figure in COURSE:
        assert f"{figure:.4f}" in printed
    trials = json.loads((out / "sweep.json").read_text())["trials"]
    assert [(t["values"]["lr"], t["values"]["weight_decay"], t["published"]) for t in trials] == list(COURSE)
    assert (
        main(["fit", str(photos), "--recipe", str(out / "best.json"), "--out", str(tmp_path / "run"), *ARGUMENTS]) == 0
    )


def test_values_are_read_and_wrong_ones_refused() -> None:
    assert parse_values(["lr=1e-4,1e-2", "freeze_line=head,last:3"]) == {
        "lr": (1e-4, 1e-2), "freeze_line": ("head", "last:3"),
    }  # fmt: skip
    assert parse_point("lr=0.01,weight_decay=none") == {"lr": 0.01, "weight_decay": 0.0}
    for wrong in (["rate=1"], ["lr"], ["lr=fast"]):
        with pytest.raises(RecipeError):
            parse_values(wrong)
    for twice in (lambda: parse_values(["lr=1e-3", "lr=1e-2"]), lambda: parse_point("lr=1e-3,lr=1e-2")):
        with pytest.raises(RecipeError, match="lr is given twice"):
            twice()
    with pytest.raises(RecipeError, match="either"):
        Space()
    for values in ({"lr": 1e-3}, {"freeze_line": "head"}, {"lr": ()}, ["lr"]):
        with pytest.raises(RecipeError, match="values of"):
            Space(values=values)  # type: ignore[arg-type]
    for space in (
        {"values": {"lr": ("fast",)}}, {"values": {"head_dropout": (True,)}}, {"values": {"freeze_line": (3,)}},
        {"points": ({"lr": "1e-3"},)},
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=r"it takes (numbers|words)"):
            Space(**space)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="1 published figures for 2 trials"):
        Space(points=({"lr": 1e-3}, {"lr": 1e-2}), published=(0.5,))
    with pytest.raises(RecipeError, match="values by parameter"):
        Space(points=(1e-3,))  # type: ignore[arg-type]
    assert Space(values={"lr": np.array([1e-3, 1e-2])}).values == {"lr": (1e-3, 1e-2)}
    with pytest.raises(RecipeError, match=r"space is .*it takes a Space"):
        sweep("photos", space={"lr": (1e-3,)})  # type: ignore[arg-type]
    assert len(COURSE_SPACE.grid()) == 5


def test_a_trials_values_go_to_their_places() -> None:
    recipe = trial_recipe(PLAN, {"lr": 1.0, "weight_decay": 0.5, "head_dropout": 0.3, "freeze_line": "last:2"})
    assert (recipe.lr, recipe.head.dropout) == (1.0, 0.3)
    assert [(s.weight_decay, s.freeze_line) for s in recipe.stages] == [(0.5, "head"), (0.5, "last:2")]


def test_a_file_of_weights_is_named_by_its_path_and_a_word_stays_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hub", "none", "weights.safetensors"):
        (tmp_path / name).mkdir()  # a folder of that name changes nothing about the word
        write_tuned(f"{name}.json", HEAD, backbone="test_resnet", weights=name, pictures={})
    assert [tuned_on(f"{name}.json")["weights"] for name in ("hub", "none")] == ["hub", "none"]
    assert tuned_on("weights.safetensors.json")["weights"] == str(tmp_path / "weights.safetensors")
