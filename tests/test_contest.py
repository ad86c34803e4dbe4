"""The shoot-out: what takes part, what is never looked at, how the time is kept, and what the page shows."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_photos
from headstart import (
    Entrant,
    ImageTable,
    RecipeError,
    SetupError,
    Shootout,
    Splits,
    fine_tune,
    load,
    load_images,
    shootout,
    split,
)
from headstart.cli import main
from headstart.cli_shootout import shootout_table
from headstart.contest import _seen, estimated_seconds, pareto_front
from headstart.recipe import HEAD_STAGE, RECIPES, Recipe, Stage
from headstart.run_record import read_run
from headstart.shootout_page import _names, render_shootout

MACHINE: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 1, "spec_overrides": {"image_size": 32}}
PLAN = Recipe(
    name="tiny",
    stages=(
        Stage(epochs=2, views=1, batch_size=8),
        Stage(name="fine-tune", freeze_line="last:2", epochs=1, batch_size=8, lr_scale=0.01, views=1),
    ),
    lr=0.01,
)
BACKBONES = ("test_resnet=none", "test_vit=none", "test_convnext=none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos", 10)


@pytest.fixture(scope="module")
def shot(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shootout:
    out = tmp_path_factory.mktemp("out") / "shootout"
    return shootout(folder, backbones=BACKBONES, recipe=PLAN, finalists=2, out=out, **MACHINE)


def test_every_backbone_is_probed_and_the_best_two_are_fine_tuned(shot: Shootout) -> None:
    results = json.loads((shot.path / "shootout.json").read_text())
    assert results == json.loads(json.dumps(shot.results))
    rows = sorted(results["entrants"], key=lambda row: row["probe"]["log_loss"])
    assert ["fine_tuned" in row for row in rows] == [True, True, False]
    assert rows[2]["why_not"] == "not among the 2 best probes"
    assert all(row["ms_per_picture"] > 0 and row["megabytes"] > 0 for row in rows)
    assert any(row["front"]["time"] for row in rows)
    assert results["chosen"] == min(rows[:2], key=lambda row: row["fine_tuned"]["log_loss"])["label"]
    assert [pair["n"] for pair in results["pairs"]] == [results["n"]["val"]]


def test_finalists_have_never_seen_the_test_pictures_and_the_chosen_one_is_scored_once(shot: Shootout) -> None:
    results = shot.results
    runs = {row["label"]: read_run(shot.path / row["run"]) for row in results["entrants"] if "fine_tuned" in row}
    assert len(runs) == 2
    for label, run in runs.items():
        assert run.metrics.get("test") is None
        assert {row["split"] for row in run.splits} == {"train", "val"}
        row = next(row for row in results["entrants"] if row["label"] == label)
        assert run.metrics["val"]["log_loss"] == row["fine_tuned"]["log_loss"]
    assert results["test"]["n"] == results["n"]["test"] > 0


def test_the_same_call_takes_finished_runs_from_the_folder(shot: Shootout, folder: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in shot.path.glob("*/model.safetensors")}
    assert len(times) == 2
    again = shootout(folder, backbones=BACKBONES, recipe=PLAN, finalists=2, out=shot.path, **MACHINE)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert again.results["chosen"] == shot.results["chosen"]
    assert again.results["test"] == shot.results["test"]
    tuned = [row["fine_tuned"] for row in shot.results["entrants"] if "fine_tuned" in row]
    assert shot.results["earlier_seconds"] == 0
    assert again.results["earlier_seconds"] == pytest.approx(sum(row["seconds"] for row in tuned)) != 0
    assert "of training in earlier calls" in again.page_path.read_text()
    assert "earlier calls" not in render_shootout(shot.results)


def test_no_time_is_no_fine_tuning(folder: Path, tmp_path: Path) -> None:
    splits = split(load_images(folder))
    found = shootout(splits, backbones=BACKBONES[:1], recipe=replace(PLAN, stages=(*PLAN.stages[:1], replace(
        PLAN.stages[1], epochs=100_000))), minutes=2, out=tmp_path / "out", **MACHINE).results  # fmt: skip
    assert "would take about" in found["entrants"][0]["why_not"]
    assert (found["test"], found["pairs"]) == (None, [])
    assert "no time to fine-tune" in (tmp_path / "out" / "shootout.html").read_text()


def test_a_backbone_that_cannot_be_had_is_left_out_with_its_reason(folder: Path, tmp_path: Path) -> None:
    found = shootout(
        folder, backbones=("test_resnet=none", "test_resnot=none"), recipe=replace(PLAN, stages=PLAN.stages[:1]),
        out=tmp_path / "out", **MACHINE,
    ).results  # fmt: skip
    assert "test_resnot" in found["entrants"][1]["why_not"]
    assert found["chosen"] == "test_resnet (random)"
    with pytest.raises(RecipeError, match="No backbone could be probed: test_resnot"):
        shootout(folder, backbones=("test_resnot=none",), recipe=PLAN, out=tmp_path / "none", **MACHINE)


def test_a_line_that_a_backbone_lacks_leaves_it_out(folder: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, stages=(PLAN.stages[0], replace(PLAN.stages[1], freeze_line="layer4")))
    found = shootout(
        folder, backbones=("test_resnet=none", "test_vit=none"), recipe=plan, out=tmp_path / "out", **MACHINE
    ).results
    assert "layer4" in found["entrants"][1]["why_not"]
    assert found["chosen"] == "test_resnet (random)"
    assert "fine_tuned" in found["entrants"][0]


def test_a_finalist_that_fails_leaves_the_others(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart import contest

    run_or_read = contest.run_or_read

    def fails(*given: Any, backbone: str, **options: Any) -> Any:
        if backbone == "test_vit":
            raise SetupError("Out of memory in stage 'fine-tune'.")
        return run_or_read(*given, backbone=backbone, **options)

    monkeypatch.setattr(contest, "run_or_read", fails)
    found = shootout(
        folder, backbones=("test_resnet=none", "test_vit=none"), recipe=PLAN, out=tmp_path / "out", **MACHINE
    ).results
    assert found["entrants"][1]["why_not"] == "Out of memory in stage 'fine-tune'."
    assert found["chosen"] == "test_resnet (random)"


def test_a_run_folder_takes_part_with_its_own_weights(shot: Shootout) -> None:
    run = next(shot.path / row["run"] for row in shot.results["entrants"] if "fine_tuned" in row)
    one = Entrant.parse(str(run))
    assert one.backbone == read_run(run).model["backbone"]["name"]
    assert one.weights == str(run)
    assert Entrant.parse("resnet18") == Entrant("resnet18", "resnet18")
    assert Entrant.parse("resnet18=none").label == "resnet18 (random)"
    assert Entrant.parse("a=x/w.pth").folder != Entrant.parse("a=y/w.pth").folder
    for wrong in ("=none", "resnet18="):
        with pytest.raises(RecipeError, match="NAME=WEIGHTS"):
            Entrant.parse(wrong)


def ours_of(table: ImageTable) -> Splits:
    return split(table, seed=PLAN.seed)


def test_a_run_folder_goes_through_a_whole_shootout_and_what_it_has_seen_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = load_images(folder)
    base = fine_tune(
        split(table, seed=5), backbone="test_resnet", weights="none", recipe=PLAN, out=tmp_path / "base",
        audit=False, **MACHINE,
    ).run_path  # fmt: skip
    assert base is not None
    found = shootout(
        folder, backbones=(str(base), "test_resnet=none"), recipe=PLAN, finalists=2, out=tmp_path / "out", **MACHINE
    )
    row, other = found.results["entrants"]
    assert row["label"] == "test_resnet (base)"
    assert row["probe"]["log_loss"] != other["probe"]["log_loss"]
    final = read_run(found.path / row["run"])
    assert final.metrics["weights"] == str(base)
    assert final.metrics["val"]["log_loss"] == row["fine_tuned"]["log_loss"]
    # What the run had in its own train and validation splits, by name.
    met = {Path(p["path"]).name for p in read_run(base).splits if p["split"] != "test"}
    ours = ours_of(table)
    assert row["seen"] == {
        part: sum(path.name in met for path in ours.named()[part].paths) for part in ("val", "test")
    }  # fmt: skip
    assert row["seen"]["test"] > 0
    assert "seen" not in other
    # A head alone was trained there: its backbone has met nothing.
    alone = fine_tune(
        split(table, seed=5), backbone="test_resnet", weights="none", recipe=replace(PLAN, stages=PLAN.stages[:1]),
        out=tmp_path / "head", audit=False, **MACHINE,
    ).run_path  # fmt: skip
    assert _seen(Entrant.parse(str(alone)), ours_of(table), False) == {}
    assert _seen(Entrant.parse(str(base)), ours_of(table), False) == {"seen": row["seen"]}
    told = f"and {row['seen']['test']} test pictures trained this run or chose its state"
    assert told in found.page_path.read_text()
    assert told in shootout_table(found.results)
    # A backbone of a run that was fine-tuned starts where that run ended, the one of random weights does not.
    tensors = load(found.path / row["run"]).backbone.state_dict(), load(base).backbone.state_dict()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items() if name.startswith("conv1"))


def test_runs_of_one_name_take_part_by_their_paths_and_one_made_anew_is_run_anew(folder: Path, tmp_path: Path) -> None:
    for place, seed in (("a", 0), ("b", 1)):
        fine_tune(
            folder, backbone="test_resnet", weights="none", recipe=replace(PLAN, seed=seed),
            out=tmp_path / place / "run", audit=False, **MACHINE,
        )  # fmt: skip
    runs = [str(tmp_path / place / "run") for place in ("a", "b")]
    found = shootout(folder, backbones=runs, recipe=PLAN, finalists=2, out=tmp_path / "out", **MACHINE)
    assert [row["label"] for row in found.results["entrants"]] == [f"test_resnet ({run})" for run in runs]
    first, second = (Entrant.parse(run) for run in runs)
    before = first.folder
    assert before != second.folder
    shutil.copy(f"{second.weights}/model.safetensors", f"{first.weights}/model.safetensors")
    assert first.folder != before


def test_wrong_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    for wrong, words in (
        ({"backbones": ()}, "one or more"),
        ({"backbones": BACKBONES[:1] * 2}, "each once"),
        ({"backbones": BACKBONES, "minutes": 0}, "more than 0"),
        ({"backbones": BACKBONES, "minutes": float("nan")}, "more than 0"),
        ({"backbones": BACKBONES, "finalists": 1.5}, "more than 0"),
        ({"backbones": BACKBONES, "recipe": RECIPES["scratch"]}, "random weights"),
    ):
        with pytest.raises(RecipeError, match=words):
            shootout(folder, out=tmp_path / "out", **{**MACHINE, **wrong})


def test_the_front_is_what_nothing_cheaper_matches() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8), (4.0, 0.9)]
    assert pareto_front(points) == [True, False, True, False, False]
    assert pareto_front([(1.0, 0.5), (1.0, 0.5)]) == [True, True]


def test_an_estimate_counts_views_and_three_passes_a_step() -> None:
    plan = Recipe(stages=(HEAD_STAGE, replace(RECIPES["fine-tune"].stages[1], epochs=5, views=4)))
    assert estimated_seconds(plan, 100, 0.01) == pytest.approx((HEAD_STAGE.views + 4 + 15) * 100 * 0.01)


def test_labels_lie_on_no_mark() -> None:
    def row(label: str, ms: float) -> dict[str, Any]:
        return {"label": label, "ms": ms, "probe": {"accuracy": 0.7}, "fine_tuned": {"accuracy": 0.5}}

    rows = [row("mobilenetv2_100 (a)", 300.0), row("mobilenetv2_100 (b)", 308.0), row("mobilenetv2_100 (c)", 303.0)]
    labels = _names(rows, "ms", float, lambda share: 400 * (1 - share), "", 200.0)
    heights = sorted(float(found) for label in labels for found in re.findall(r' y="([0-9.]+)"', label))
    assert len(heights) == 3
    assert all(abs(height - 4 - 200) >= 10 for height in heights)
    assert min(np.diff(heights)) >= 14


def test_what_speaks_against_the_choice_is_told(shot: Shootout) -> None:
    results = json.loads((shot.path / "shootout.json").read_text())
    tuned = next(row for row in results["entrants"] if "fine_tuned" in row)
    tuned["fine_tuned"]["log_loss"], tuned["probe"]["log_loss"] = 1.6, 0.7
    results["test"] |= {"accuracy_ci95": [0.3, 0.6], "majority_baseline": 1 / 3}
    told = shootout_table(results)
    assert f"{results['chosen']} is not shown to be better than always answering the most frequent class" in told
    assert f"{tuned['label']} is worse fine-tuned than its probe" in told
    assert "What speaks against the choice" in render_shootout(results)
    tuned["fine_tuned"]["log_loss"], results["test"]["accuracy_ci95"] = 0.7, [0.4, 0.6]
    others = [row for row in results["entrants"] if row is not tuned and "fine_tuned" in row]
    for row in others:
        row["fine_tuned"]["log_loss"] = row["probe"]["log_loss"]
    assert "speaks against" not in render_shootout(results)
    del results["test"]["majority_baseline"]  # by an earlier version
    assert "not shown to be better" not in shootout_table(results)


def test_the_page_is_whole_and_loads_nothing(shot: Shootout) -> None:
    page = shot.page_path.read_text()
    assert "default-src 'none'" in page
    assert page.count("<figure>") == 2
    assert page.count('class="tuned"') == 2 * 2 + 1  # two finalists on two pictures, and the key
    assert page.count('class="probe"') == 3 * 2 + 1
    for row in shot.results["entrants"]:
        assert row["label"] in page


def test_the_command_prints_the_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["--image-size", "32", "--device", "cpu", "--precision", "fp32", "--workers", "1", "--quiet"]
    arguments = ["--backbones", "test_resnet=none,test_vit=none", "--finalists", "1", "--epochs", "2,1", "--out",
                 str(tmp_path / "out")]  # fmt: skip
    assert main(["shootout", str(folder), *arguments, *machine]) == 0
    printed = capsys.readouterr().out
    assert "on the test pictures, scored once" in printed
    assert "not among the 1 best probes" in printed
    assert main(["shootout", str(folder), *machine]) == 2
