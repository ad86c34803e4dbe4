"""Runs on one bench share pictures, features and equal first stages, and come out as they would alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headstart import (
    CheckpointError,
    DataError,
    Recipe,
    RecipeError,
    Stage,
    create_classifier,
    evaluate,
    fine_tune,
    fit,
    load_images,
    split,
)
from headstart.bench import Bench, settle
from headstart.groundwork import make_bench
from headstart.metrics import paired_difference
from headstart.recipe import POLICIES
from headstart.runtime import make_runtime
from tiny import SPEC, TinyNet

TINY: dict[str, Any] = {"backbone": "test_resnet", "weights": "none", "spec_overrides": {"image_size": 32}}
HEAD = Stage(epochs=2, views=2, batch_size=8)
PLAN = Recipe(stages=(HEAD, Stage(name="fine-tune", freeze_line="all", epochs=1, batch_size=8, lr_scale=0.01)), lr=0.01)


def bench_of(photos: Path, *, share: bool) -> Bench:
    return Bench(split(load_images(photos)), make_runtime(device="cpu", precision="fp32", workers=1), share=share)


def weights(result: Any) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def test_what_a_stage_changed_is_told_picture_by_picture(photos: Path) -> None:
    bench = bench_of(photos, share=True)
    slow = replace(HEAD, epochs=1, lr_scale=1e-6)
    plan = replace(PLAN, stages=(slow, replace(HEAD, name="again", lr_scale=10.0)))
    head = fine_tune(bench, recipe=replace(plan, stages=(slow,)), **TINY)
    both = fine_tune(bench, recipe=plan, **TINY)  # whose head stage is recalled
    val = bench.splits.val
    after, before = (evaluate(run.model, val).preds == val.labels for run in (both, head))
    assert (after != before).any()
    assert [stage["val_change"] for stage in both.metrics["stages"]] == [None, paired_difference(after, before)]


def test_a_shared_head_stage_changes_no_bit_and_is_told(photos: Path) -> None:
    bench = bench_of(photos, share=True)
    first = fine_tune(bench, recipe=replace(PLAN, stages=(HEAD,), name="head"), **TINY)
    shared = fine_tune(bench, recipe=PLAN, **TINY)
    alone = fine_tune(bench_of(photos, share=False), recipe=PLAN, **TINY)
    assert first.metrics["stages"][0]["shared_seconds"] == 0
    assert shared.metrics["stages"][0]["shared_seconds"] > 0
    assert shared.metrics["stages"][1]["shared_seconds"] == 0
    assert shared.metrics["test"] == alone.metrics["test"]
    assert all(torch.equal(mine, weights(alone)[name]) for name, mine in weights(shared).items())

    def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**record, "seconds": None} for record in history]

    assert without_time(shared.history) == without_time(alone.history)


def test_what_differs_is_not_shared(photos: Path) -> None:
    bench = bench_of(photos, share=True)
    plan = replace(PLAN, stages=(HEAD,))
    first = fine_tune(bench, recipe=plan, **TINY)
    for other, features_shared in (
        (replace(plan, lr=0.02), True),
        (replace(plan, stages=(replace(HEAD, weight_decay=0.5),)), True),
        (replace(plan, seed=1), False),
        (replace(plan, augment="light"), False),
        (replace(plan, stages=(replace(HEAD, views=3),)), False),
    ):
        result = fine_tune(bench, recipe=other, **TINY)
        alone = fine_tune(bench_of(photos, share=False), recipe=other, **TINY)
        stage = result.metrics["stages"][0]
        assert (stage["shared_seconds"] > 0) == features_shared, other
        assert all(torch.equal(mine, weights(alone)[name]) for name, mine in weights(result).items())
        assert any(not torch.equal(mine, weights(first)[name]) for name, mine in weights(result).items())


def test_shared_activations_train_the_later_runs_own_layers(photos: Path) -> None:
    bench = bench_of(photos, share=True)
    middle = replace(PLAN, stages=(replace(HEAD, freeze_line="layer3"),))
    first = fine_tune(bench, recipe=middle, **TINY)
    kept = {name: tensor.clone() for name, tensor in weights(first).items()}
    other = replace(middle, lr=0.02)
    shared, alone = (
        fine_tune(bench, recipe=other, **TINY),
        fine_tune(bench_of(photos, share=False), recipe=other, **TINY),
    )
    assert shared.metrics["stages"][0]["shared_seconds"] > 0
    assert shared.metrics["stages"][0]["views"] == 2
    assert all(torch.equal(mine, weights(alone)[name]) for name, mine in weights(shared).items())
    assert all(torch.equal(mine, kept[name]) for name, mine in weights(first).items())
    assert any(not torch.equal(mine, kept[name]) for name, mine in weights(shared).items())


def test_an_augmentation_is_a_policys_name_ranges_or_one_transform(photos: Path) -> None:
    bench = bench_of(photos, share=False)
    assert bench.pixels("train", SPEC, augment="strong").augment == POLICIES["strong"]
    for wrong, message in (("stong", "Did you mean: strong"), ([torch.flip], "one transform"), ({}, "one transform")):
        with pytest.raises(RecipeError, match=rf"augment is .*{message}"):
            bench.pixels("train", SPEC, augment=wrong)  # type: ignore[arg-type]
    model = create_classifier(TinyNet(), bench.splits.class_names, data_spec=SPEC)
    with pytest.raises(RecipeError, match="Did you mean: photo"):
        fit(model, bench.splits, augment="foto", runtime=bench.runtime)


def test_what_data_cannot_be_is_told_with_what_to_do(photos: Path) -> None:
    class DataFrame:
        pass

    folder = SimpleNamespace(root=str(photos))
    files = [str(path) for path in sorted(photos.rglob("*.jpg"))]
    for data, words in (
        (DataFrame(), "given as a DataFrame; it takes a folder, .* CSV file with columns path and label"),
        (files, "given as a list; .*ImageTable.*write_manifest"),
        ({"red": files}, "given as a dict; .*write_manifest"),
        (folder, f"Give the folder that it reads: '{photos}'"),
        (SimpleNamespace(dataset=folder), f"Give the folder that it reads: '{photos}'"),
        ((files, ["red"] * len(files)), "picture 0 is a path .*write_manifest"),
        ((files,), "a tuple of 1; it takes two"),
    ):
        with pytest.raises(DataError, match=words):
            fine_tune(data, **TINY)  # type: ignore[arg-type]


def test_bad_files_of_a_table_are_left_out_and_of_splits_refused(photos: Path) -> None:
    (photos / "red" / "bad.jpg").write_bytes(b"no picture")
    machine = make_runtime(device="cpu", workers=1)
    table = load_images(photos, check=False)
    for cache in (True, False):
        bench = make_bench(table, runtime=machine, bad_files="skip", check=False, cache=cache, audit=False, spec=SPEC)
        assert [path.name for path, _ in bench.splits.train.bad_files] == ["bad.jpg"]
        assert sum(map(len, bench.splits.named().values())) == len(table) - 1
    with pytest.raises(DataError, match="bad_files is 'skp'"):
        make_bench(table, runtime=machine, bad_files="skp", cache=False)
    with pytest.raises(RecipeError, match="bad_files: without effect on a Splits"):
        make_bench(split(table), runtime=machine, bad_files="skip")


def test_too_few_pictures_for_a_limit_name_it(photos: Path) -> None:
    for given, words in ((photos, "Raise the limit, 7"), (load_images(photos).select([0, 1, 12, 24]), "Add pictures")):
        with pytest.raises(DataError, match=f"has [12][;,].* {words}"):
            make_bench(given, runtime=make_runtime(device="cpu", workers=1), limit=7, cache=False, audit=False)


def test_a_folder_of_several_runs_that_is_just_being_begun_is_begun(tmp_path: Path) -> None:
    """By another process at this moment, or by one that was killed as it wrote the first file."""
    (tmp_path / ".sweep.json.0123456789ab.tmp").write_text("{")
    assert settle(tmp_path, "sweep.json", {"a": 1}) == tmp_path
    with pytest.raises(CheckpointError, match="another a"):
        settle(tmp_path, "sweep.json", {"a": 2})
