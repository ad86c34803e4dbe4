"""Recipes side by side: shared splits and head stages, figures that agree with the runs, differences told with care."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from conftest import make_photos
from headstart import (
    Budget,
    CheckpointError,
    Interrupted,
    ModelError,
    Recipe,
    RecipeError,
    compare,
    fine_tune,
    load_images,
    metrics,
    read_run,
    recipes,
    split,
)
from headstart.cli import main
from headstart.comparison import named_recipe, pair_sentence, run_name
from headstart.comparison_page import _curve_chart, _forest, render_comparison
from headstart.groundwork import make_bench
from headstart.metrics import holm, judge_pairs, paired_difference
from headstart.points import read_point
from headstart.recipe import RECIPES, load_recipe
from headstart.report_page import duration
from headstart.run import Run
from headstart.runtime import make_runtime

MACHINE: dict[str, Any] = {
    "backbone": "test_resnet", "weights": "none", "device": "cpu", "precision": "fp32", "workers": 1,
    "spec_overrides": {"image_size": 32},
}  # fmt: skip
BUDGETS = {"scratch": Budget((1,), 24), "head": Budget((2,)), "last:3": Budget((2, 1))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos", 10)


@pytest.fixture(scope="module")
def compared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("out") / "compare"
    return compare(folder, recipes=("scratch", "head", "last:3"), budgets=BUDGETS, seeds=(0, 1), out=out, **MACHINE)


def test_every_recipe_and_seed_has_its_run_on_the_same_splits(compared: Any) -> None:
    results = json.loads((compared.path / "compare.json").read_text())
    assert results == json.loads(json.dumps(compared.results))
    assert [e["name"] for e in results["recipes"]] == ["scratch", "head", "last:3"]
    runs = {run: read_run(compared.path / run) for e in results["recipes"] for run in e["runs"]}
    assert set(runs) == {f"{name}-seed{seed}" for name in ("scratch", "head", "last-3") for seed in (0, 1)}
    splits = [run.splits for run in runs.values()]
    assert all(one == splits[0] for one in splits)
    assert {run.recipe["seed"] for run in runs.values()} == {0, 1}
    assert [runs[n].model["preprocessing"]["image_size"] for n in ("scratch-seed0", "head-seed0")] == [24, 32]
    assert runs["last-3-seed0"].recipe["stages"][-1]["freeze_line"] == "last:3"
    assert [len(runs["last-3-seed1"].recipe["stages"]), runs["last-3-seed1"].recipe["stages"][1]["epochs"]] == [2, 1]


def test_pictures_are_looked_at_unless_told_not_to(compared: Any, folder: Path, tmp_path: Path) -> None:
    assert (compared.path / "head-seed0" / "audit.json").is_file()
    options = ["--recipes", "head", "--budget", "head=1", "--image-size", "32", "--quiet", "--no-audit"]
    machine = ["--backbone", "test_resnet", "--weights", "none", "--device", "cpu", "--precision", "fp32"]
    assert main(["compare", str(folder), "--out", str(tmp_path / "out"), *options, *machine]) == 0
    assert (tmp_path / "out" / "head-seed0" / "metrics.json").is_file()
    assert not (tmp_path / "out" / "head-seed0" / "audit.json").exists()


def test_runs_from_an_earlier_run_s_weights_are_found_again_in_its_picture_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine_tune(folder, recipe="head", out=tmp_path / "base", **MACHINE)
    call = {**MACHINE, "weights": tmp_path / "base", "spec_overrides": None, "progress": True}
    budgets = {"head": Budget((1,)), "scratch": Budget((1,), 32)}
    seeds = np.arange(1)
    for again in (False, True):
        found = compare(folder, recipes=("scratch", "head"), budgets=budgets, seeds=seeds, out=tmp_path / "out", **call)
        assert capsys.readouterr().err.count("done before; read from its folder") == 2 * again
    assert [entry["budget"]["image_size"] for entry in found.results["recipes"]] == [32, 32]


@pytest.mark.parametrize("seeds", [(), (0, 0), (0.5,), (-1,), 3, "ab"])
def test_seeds_that_are_none_are_told(seeds: Any, folder: Path) -> None:
    with pytest.raises(RecipeError, match="different whole numbers"):
        compare(folder, seeds=seeds, **MACHINE)


def test_test_pictures_under_another_root_are_compared(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    parts = split(load_images(folder), test=0)
    test = load_images(tmp_path / "elsewhere", class_names=parts.class_names)
    splits = replace(parts, test=test.select(range(0, len(test), 3)))
    found = compare(splits, recipes=("head",), budgets={"head": Budget((1,))}, out=tmp_path / "out", **MACHINE)
    assert found.results["recipes"][0]["test"]["n"] == len(splits.test)


def test_figures_are_the_runs_own(compared: Any) -> None:
    for entry in compared.results["recipes"]:
        runs = [read_run(compared.path / run) for run in entry["runs"]]
        for part in ("val", "test"):
            for key in ("accuracy", "log_loss", "weighted_precision", "weighted_recall"):
                assert entry[part][key] == pytest.approx(np.mean([r.metrics[part][key] for r in runs]))
        low, high = entry["test"]["accuracy_ci95"]
        assert low <= entry["test"]["accuracy"] <= high
        assert [v["question"] for v in entry["verdicts"]][2] == "Does it overfit?"
        assert all(seconds > 0 for seconds in entry["seconds"])


def test_the_head_stage_is_trained_once_per_seed(compared: Any) -> None:
    for seed in (0, 1):
        head, tuned = (read_run(compared.path / f"{name}-seed{seed}") for name in ("head", "last-3"))
        assert head.metrics["stages"][0]["shared_seconds"] == 0
        assert tuned.metrics["stages"][0]["shared_seconds"] > 0
        ours = [r["val"] for r in tuned.history if r["stage"] == "head"]
        assert ours == [r["val"] for r in head.history]
    entry = compared.results["recipes"][2]
    own = read_run(compared.path / entry["runs"][0]).metrics["stages"]
    assert entry["seconds"][0] == pytest.approx(sum(s["seconds"] + s["shared_seconds"] for s in own))


def test_what_a_seed_stored_is_dropped_before_the_next(folder: Path, tmp_path: Path) -> None:
    bench = make_bench(folder, runtime=make_runtime(device="cpu", precision="fp32", workers=1), cache=False)
    call: dict[str, Any] = {"recipes": ("head",), "budgets": {"head": Budget((1,))}}
    machine = {name: MACHINE[name] for name in ("backbone", "weights", "spec_overrides")}
    compare(bench, seeds=(0,), out=tmp_path / "one", **call, **machine)
    held = len(bench._sources)
    assert held
    compare(bench, seeds=(0, 1), out=tmp_path / "two", **call, **machine)
    assert len(bench._sources) == held


def test_pairs_count_the_pictures_that_one_alone_gets_right(compared: Any) -> None:
    assert len(compared.results["pairs"]) == 3
    for pair in compared.results["pairs"]:
        hits = {}
        for name in (pair["a"], pair["b"]):
            rows = [read_run(compared.path / run_name(name, seed)).predictions for seed in (0, 1)]
            hits[name] = [[r["pred"] == r["label"] for r in of if r["split"] == "test"] for of in rows]
        difference = np.mean(hits[pair["a"]]) - np.mean(hits[pair["b"]])
        assert pair["difference"] == pytest.approx(difference)
        assert pair["sentence"].startswith(("No difference", "Not shown")) == (not pair["shown"])


def test_an_interval_that_leaves_0_out_where_nothing_is_shown_says_why() -> None:
    pair = {"a": "x", "b": "y", "difference": -0.16, "low": -0.3, "high": -0.02, "n": 30, "shown": False}
    ahead = "y is ahead of x by 16.0 points on the same 30 test pictures (95 % interval +2.0 to +30.0 points; "
    assert pair_sentence({**pair, "p": 0.03, "p_adjusted": 0.3}, 10) == (
        f"Not shown once the number of comparisons is taken into account: {ahead}p = 0.03 alone, 0.3 among 10 pairs)."
    )
    for pairs in (1, 3):
        told = pair_sentence({**pair, "p": 0.061, "p_adjusted": 0.061 * pairs}, pairs)
        assert told == f"Not shown by the paired test: {ahead}p = 0.061)."
    assert pair_sentence({**pair, "high": 0.02, "p": 0.3, "p_adjusted": 0.3}, 10) == (
        "No difference between x and y that these 30 pictures can show: -16.0 points"
        " (95 % interval -30.0 to +2.0 points)."
    )


def test_a_difference_is_shown_where_test_and_interval_agree() -> None:
    # Six pictures that one of three trainings gets right more often: a small p, an interval that takes 0 in.
    three = np.zeros((3, 400))
    three[0, :6] = 1
    few, many = paired_difference(three, 0 * three), paired_difference(np.ones(40), np.arange(40) % 4 > 0)
    assert few["p"] < 0.05
    assert few["low"] < 0
    pairs: list[dict[str, Any]] = [dict(few), dict(many), {**many, "p": 0.04}]
    judge_pairs(pairs)
    assert [pair["shown"] for pair in pairs] == [False, True, False]
    assert pairs[2]["p_adjusted"] == pytest.approx(2 * few["p"])


class Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        values = dict(attrs)
        self.loads += [str(v) for k, v in attrs if k == "src"]
        self.links += [str(values["href"])] if tag == "a" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(compared: Any) -> None:
    text = compared.page_path.read_text(encoding="utf-8")
    parser = Parser()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads == []
    assert all((compared.path / link).is_file() for link in parser.links)
    assert len(parser.links) == 3
    for entry in compared.results["recipes"]:
        assert all(verdict["sentence"].split("&")[0][:20] in text for verdict in entry["verdicts"])
    assert all(pair["sentence"] in text for pair in compared.results["pairs"])
    runs = [read_run(compared.path / run) for entry in compared.results["recipes"] for run in entry["runs"]]
    spent = sum(stage["seconds"] for run in runs for stage in run.metrics["stages"])
    waited = {**compared.results, "wall_seconds": 3600.0}  # of the last call, which may have read its runs
    page = render_comparison(waited, {e["name"]: [r.history for r in runs[:2]] for e in waited["recipes"]})
    assert f"<dt>Training, all runs</dt><dd>{duration(spent)}</dd>" in page
    assert "1 h" not in page


def test_every_seed_lies_in_the_drawing() -> None:
    scores = {"accuracy": 0.9, "accuracy_ci95": [0.88, 0.92], "accuracy_per_seed": [0.75, 0.9, 0.99]}
    drawn = _forest([{"name": "head", "test": scores}, {"name": "scratch", "test": scores}], 0.2)
    for width, left in ((860, 150), (400, 96)):
        figure = next(part for part in drawn.split("<figure") if f'viewBox="0 0 {width} ' in part)
        places = [float(x) for x in re.findall(r'<circle cx="([\d.-]+)"', figure)]
        assert len(places) == 8
        assert left <= min(places) < max(places) <= width - 70


def test_the_same_call_goes_on_and_other_settings_are_refused(compared: Any, folder: Path) -> None:
    before = (compared.path / "head-seed0" / "model.safetensors").stat().st_mtime_ns
    older = compared.path / "head-seed0" / "recipe.json"  # by a version that had no momentum
    older.write_text("".join(line for line in older.read_text().splitlines(True) if '"momentum"' not in line))
    call = {"recipes": ("scratch", "head"), "budgets": {k: BUDGETS[k] for k in ("scratch", "head")}, "seeds": (0, 1)}
    again = compare(folder, out=compared.path, **call, **MACHINE)
    assert (compared.path / "head-seed0" / "model.safetensors").stat().st_mtime_ns == before
    assert [e["test"] for e in again.results["recipes"]] == [e["test"] for e in compared.results["recipes"][:2]]
    with pytest.raises(CheckpointError, match="another data"):
        compare(folder, out=compared.path, **call, test=0.3, **MACHINE)
    elsewhere = compared.path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match=r"holds no compare\.json"):
        compare(folder, out=elsewhere, overwrite=True, **call, **MACHINE)
    assert (elsewhere / "mine.txt").exists()


def test_pictures_that_were_changed_meanwhile_are_not_compared(folder: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(folder, tmp_path / "photos"))
    call = {"recipes": "head", "budgets": {"head": Budget((1,))}, "out": tmp_path / "out", **MACHINE}
    compare(photos, **call)
    with Image.open(photos / "red/red0.jpg") as picture:
        picture.save(photos / "red/red0.jpg", quality=50)
    with pytest.raises(CheckpointError, match="another contents of the pictures"):
        compare(photos, **call)


def test_an_interrupt_while_a_run_is_written_ends_the_comparison_behind_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import report

    write = report.write_report

    def interrupted(run: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return write(run)

    call = {"recipes": ("head", "last:3"), "budgets": {k: BUDGETS[k] for k in ("head", "last:3")}, **MACHINE}
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", interrupted)
        with pytest.raises(Interrupted, match="goes on behind the runs that are done"):
            compare(folder, out=tmp_path / "out", **call)
    assert (tmp_path / "out/head-seed0/report.html").is_file()
    assert not (tmp_path / "out/last-3-seed0").exists()
    torn = tmp_path / "out/head-seed0"  # as if killed while it wrote its report
    (torn / "report.html").unlink()
    (torn / "point-a.json").write_text("{}")
    compare(folder, out=tmp_path / "out", **call)
    assert (torn / "report.html").is_file()
    assert not (torn / "point-a.json").exists()


def test_a_complete_run_of_another_budget_is_kept_unless_asked(folder: Path, tmp_path: Path) -> None:
    call = {"recipes": "head", "out": tmp_path / "out", **MACHINE}
    compare(folder, budgets={"head": Budget((1,))}, **call)
    model = tmp_path / "out/head-seed0/model.safetensors"
    before = model.read_bytes()
    with pytest.raises(CheckpointError, match=r"is complete, of another recipe, budget .* --overwrite to replace it"):
        compare(folder, budgets={"head": Budget((2,))}, **call)
    assert model.read_bytes() == before
    found = compare(folder, budgets={"head": Budget((2,))}, overwrite=True, **call)
    assert found.results["recipes"][0]["budget"]["epochs"] == [2]
    metrics = tmp_path / "out/head-seed0/metrics.json"
    metrics.write_text("{")  # nothing says that it is complete: it is trained anew
    compare(folder, budgets={"head": Budget((2,))}, **call)
    assert json.loads(metrics.read_text())["test"]


def test_a_comparison_that_is_stopped_says_that_the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.comparison.fine_tune", mock.Mock(side_effect=Interrupted("go on from that run")))
    with pytest.raises(
        Interrupted, match=r"^Stopped by hand\. The same command goes on behind the runs that are done\.$"
    ):
        compare(folder, recipes=("head",), out=tmp_path / "out", **MACHINE)


def test_a_run_that_was_stopped_within_is_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, run_stage, stages = Run.append_history, recipes.run_stage, list[str]()

    def stop(self: Run, record: dict[str, Any]) -> None:
        append(self, record)
        if record["stage_index"] == 1 and record["epoch"] == 1:
            raise KeyboardInterrupt

    def noted(model: Any, trainset: Any, valset: Any, stage: Any, *rest: Any) -> Any:
        stages.append(stage.name)
        return run_stage(model, trainset, valset, stage, *rest)

    call = {"recipes": ("last:3",), "budgets": {"last:3": Budget((2, 2))}, **MACHINE}
    whole = compare(folder, out=tmp_path / "whole", **call)
    monkeypatch.setattr(recipes, "run_stage", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_history", stop)
        with pytest.raises(Interrupted, match="The same command goes on"):
            compare(folder, out=tmp_path / "out", **call)
    again = compare(folder, out=tmp_path / "out", **call)
    assert stages == ["head", "fine-tune", "fine-tune"]
    assert again.results["recipes"][0]["test"] == whole.results["recipes"][0]["test"]
    name = "last-3-seed0/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_history", stop)
        with pytest.raises(Interrupted):
            compare(folder, out=tmp_path / "two", **call | {"budgets": {"last:3": Budget((2, 3))}})
    compare(folder, out=tmp_path / "two", **call | {"budgets": {"last:3": Budget((2, 1))}})
    assert stages[3:] == ["head", "fine-tune"] * 2  # of another recipe it is begun again


@pytest.mark.parametrize("left", ["no point", "torn"])
def test_a_run_that_was_killed_before_its_first_point_starts_over_in_its_place(
    left: str, folder: Path, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def killed(at: int) -> None:
        written, append = [0], Run.append_history

        def note(self: Run, record: dict[str, Any]) -> None:
            append(self, record)
            written[0] += 1
            if written[0] == at:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "append_history", note)
            with pytest.raises(Killed):
                compare(folder, out=out, **call)

    call = {"recipes": ("last:3",), "budgets": {"last:3": Budget((2, 1))}, **MACHINE}
    out, run = tmp_path / "out", tmp_path / "out/last-3-seed0"
    killed(1)
    if left == "torn":
        for path in run.iterdir():
            path.unlink()
        (run / ".recipe.json.0123456789ab.tmp").write_text("{")
    killed(4)  # in its second stage
    assert read_point(run)
    assert [path.name for path in out.iterdir() if path.is_dir()] == [run.name]
    compare(folder, out=out, **call)
    assert [path.name for path in out.iterdir() if path.is_dir()] == [run.name]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"recipes": ("head", "head")}, RecipeError, "a name of its own"),
        ({"recipes": ("head",), "budgets": {"scratch": Budget((1,))}}, RecipeError, "not compared"),
        ({"recipes": ("head",), "budgets": {"head": Budget((1, 2))}}, RecipeError, "2 numbers of epochs for 1"),
        ({"recipes": "head", "budgets": {"head": 1}}, RecipeError, r"Budget of 'head' is 1; it takes a Budget"),
        ({"recipes": ("head",), "seeds": (1, 1)}, RecipeError, "different"),
        ({"recipes": "head", "seeds": 1}, RecipeError, "seeds are 1; give one or more"),
        ({"recipes": "last:900"}, ModelError, "900"),
        ({"recipes": "fin-tune"}, ModelError, r"no recipe either .*Did you mean: fine-tune"),
        ({"recipes": ("head",), "test": 0.0}, RecipeError, "--test"),
    ],
)
def test_what_cannot_be_compared_is_told_before_training(
    call: dict[str, Any], error: type[Exception], words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        compare(folder, out=tmp_path / "out", **call, **MACHINE)
    assert not (tmp_path / "out").exists()


def test_the_seed_in_a_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps(Recipe(seed=7).to_dict()))
    assert named_recipe(str(tmp_path / "found.json")) == Recipe(name="found")


def test_a_word_that_is_no_recipe_is_a_freeze_line() -> None:
    assert named_recipe("joint") == RECIPES["joint"]
    line = named_recipe("layer4")
    assert (line.name, [s.freeze_line for s in line.stages]) == ("layer4", ["head", "layer4"])
    assert line.stages[0] == RECIPES["fine-tune"].stages[0]


@pytest.mark.parametrize(
    ("text", "epochs", "size"), [("10", (10,), None), ("30,8", (30, 8), None), ("10@96", (10,), 96), ("@96", (), 96)]
)
def test_budgets_are_read(text: str, epochs: tuple[int, ...], size: int | None) -> None:
    assert Budget.parse(text) == Budget(epochs, size)
    with pytest.raises(RecipeError, match="epochs is 10; it takes whole numbers"):
        Budget(10)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="takes epochs"):
        Budget.parse(text + "x")


def test_the_command_prints_the_tables(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipes", "head", "--budget", "head=1@32", "--backbone", "test_resnet", "--weights", "none"]
    machine = ["--device", "cpu", "--precision", "fp32", "--workers", "1", "--quiet"]
    own = ["--lr", "0.02", "--augment", "light", "--hidden", "8:relu", "--head-dropout", "0.1"]
    assert main(["compare", str(folder), "--out", str(tmp_path / "out"), *arguments, *own, *machine]) == 0
    out = capsys.readouterr().out
    recipe = load_recipe(tmp_path / "out" / "head-seed0" / "recipe.json")
    assert (recipe.lr, recipe.augment, recipe.head.dropout) == (0.02, "light", 0.1)
    assert [layer.width for layer in recipe.head.hidden] == [8]
    assert "1 epochs at 32 px" in out
    assert (tmp_path / "out" / "compare.html").is_file()


def test_a_mixture_is_no_epoch_of_the_compared_curves() -> None:
    def record(index: int, epoch: int, kind: str = "") -> dict[str, Any]:
        score = {"loss": 1.0 / (1 + epoch), "accuracy": 0.8}
        event = {"kind": kind, "message": ""} if kind else None
        return {"stage_index": index, "epoch": epoch, "train": score, "val": score, "best": True, "event": event}

    def curve(*more: dict[str, Any]) -> ElementTree.Element:
        history = [*(record(0, e) for e in range(7)), *(record(1, e) for e in range(4))]
        return ElementTree.fromstring(_curve_chart(["one"], {"one": [[*history, *more]]}, "loss"))

    plain, mixed = curve(), curve(record(1, 4, "wise"))
    for tag in ("polyline", "text"):
        assert [(e.attrib, e.text) for e in mixed.iter(tag)] == [(e.attrib, e.text) for e in plain.iter(tag)]
    rings = [[e.get("cx") for e in svg.iter("circle") if e.get("class") == "ring"] for svg in (plain, mixed)]
    assert rings[0] == rings[1] != []


# ---- paired figures --------------------------------------------------------------------------------------------


def test_one_training_each_is_mcnemars_exact_test() -> None:
    rng = np.random.default_rng(0)
    for n, p, q in ((40, 0.5, 0.9), (40, 0.9, 0.9), (300, 0.8, 0.85)):
        a, b = rng.random(n) < p, rng.random(n) < q
        found = paired_difference(a, b)
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        assert found["p"] == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
        assert found["difference"] == pytest.approx(a.mean() - b.mean())
        assert found["low"] < found["difference"] < found["high"]


def test_many_differing_pictures_take_neither_time_nor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.arange(12_000) < 5_900
    started = time.perf_counter()
    assert paired_difference(a, ~a)["p"] == pytest.approx(binomtest(5_900, 12_000).pvalue, rel=1e-9)
    assert time.perf_counter() - started < 3
    rng = np.random.default_rng(0)
    right = rng.random((2, 3, 2_000)) < 0.6
    tracemalloc.start()
    found = paired_difference(*right)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert 0.01 < found["p"] < 0.99
    for at_once in (1, 20_000, 10**9):  # the same draws in whatever pieces
        monkeypatch.setattr(metrics, "FLIPPED_AT_ONCE", at_once)
        assert paired_difference(*right) == found


def test_nothing_different_still_has_an_interval() -> None:
    right = np.ones(20)
    found = paired_difference(right, right)
    assert found["p"] == 1
    assert str(found["b_only"]) == "0.0"  # not -0.0
    assert found["low"] < 0 < found["high"]


def test_paired_intervals_cover_and_false_alarms_are_rare() -> None:
    rng = np.random.default_rng(1)
    covered, alarms, draws = 0, 0, 400
    for _ in range(draws):
        hard = rng.random(120)  # pictures that are hard for one are hard for the other
        chance = 0.95 - 0.5 * hard
        a, b = (rng.random((2, 120)) < chance for _ in range(2))
        found = paired_difference(a, b)
        covered += found["low"] <= 0 <= found["high"]
        alarms += found["p"] < 0.05
    assert covered / draws > 0.92
    assert alarms / draws < 0.08


def test_holm_is_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
