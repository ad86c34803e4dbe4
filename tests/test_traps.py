"""The traps of docs/traps.md: each row that can occur has its test, here or where the thing itself is tested."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import headstart
from headstart import (
    AugmentSpec,
    DataError,
    ModelError,
    Recipe,
    Splits,
    Stage,
    create_classifier,
    fine_tune,
    load_images,
    make_runtime,
    set_freeze_line,
    split,
)
from headstart.cautions import cautions
from headstart.cli import main
from headstart.cli_transforms import costs_table
from headstart.dataset import open_image
from headstart.harm import single_changes, transform_costs
from headstart.metrics import paired_difference
from headstart.order import epoch_order
from headstart.recipe import POLICIES
from headstart.report import write_report
from headstart.terminal import closing_table
from test_verdicts import FALLING, FLAT, made_history, scored
from tiny import SPEC, TinyNet

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "traps.md"
CPU = make_runtime(device="cpu", precision="fp32")


def rows() -> list[list[str]]:
    """Cells of the table: number, mistake, what becomes of it, how, test."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_thirty_rows_and_its_tests_exist() -> None:
    assert [row[0] for row in rows()] == [str(i) for i in range(1, 31)]
    assert all(row[2] in ("impossible", "told", "absent") and row[3] for row in rows())
    for number, _, kind, _, test in rows():
        if not test:
            assert kind == "absent", f"row {number} has no test"
            continue
        file, *names = test.strip("`").split("::")
        body: Any = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        for name in names:
            found = [node for node in body.body if getattr(node, "name", None) == name]
            assert found, f"row {number}: {file} has no {name}"
            body = found[0]


def test_every_test_of_this_file_has_its_row() -> None:
    named = " ".join(row[4] for row in rows())
    numbered = [name for name in globals() if re.match(r"test_\d\d_", name)]
    assert len(numbered) > 10
    assert [name for name in numbered if name not in named] == []


@pytest.fixture
def splits(photos: Path) -> Splits:
    return split(load_images(photos, check=False), seed=0)


def classifier(splits: Splits, seed: int = 0) -> headstart.Classifier:
    return create_classifier(TinyNet(seed=seed), splits.class_names, data_spec=SPEC)


def test_01_frozen_statistics_stay(splits: Splits) -> None:
    model = classifier(splits)
    set_freeze_line(model, "head")
    before = model.backbone.norm.running_mean.clone()
    model.train()
    headstart.fit(model, splits, Stage(epochs=2, batch_size=8), lr=0.1, runtime=CPU)
    model.train()(torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8))
    assert torch.equal(before, model.backbone.norm.running_mean)


def test_02_features_are_the_same_in_both_modes(splits: Splits) -> None:
    model = classifier(splits)
    x = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    set_freeze_line(model, "head")
    with torch.no_grad():
        assert torch.equal(model.train().features(x), model.eval().features(x))
    set_freeze_line(model, "all")  # its statistics are fixed behind the line, too
    with torch.no_grad():
        assert torch.equal(model.train().features(x), model.eval().features(x))


def test_06_a_head_cut_short_is_told() -> None:
    short = made_history(FALLING, stage="head") + made_history(FLAT, index=1)
    (sentence,) = cautions(short, {})
    assert "Stage 'head' was still learning when the next one began" in sentence
    assert cautions(made_history(FLAT, stage="head") + made_history(FALLING, index=1), {}) == []


def test_an_untrained_head_beside_backbone_layers_is_told() -> None:
    def stages(first: Sequence[str]) -> list[dict[str, Any]]:
        facts = {"best_val_accuracy": 0.5}
        one = {"name": "head", "freeze_line": "last:2" if first else "head", "trained": list(first)}
        return [facts | one, facts | {"name": "fine-tune", "freeze_line": "all", "trained": ["a", "b", "c"]}]

    (sentence,) = cautions([], {"stages": stages(["b", "c"]), "weights": "hub", "from_run": None})
    assert "Stage 'head' trains 2 backbone layers together with a head that is still untrained" in sentence
    assert "--freeze-line head,all" in sentence
    of_one_stage = {"stages": stages(["b", "c"])[:1], "weights": "hub"}
    for meant in (of_one_stage, {"stages": stages([])}, {"stages": stages(["c"]), "weights": "none"}):
        assert cautions([], meant) == []
    assert cautions([], {"stages": stages(["c"]), "weights": "runs/first", "from_run": {"kept": ["a"]}}) == []


@pytest.mark.parametrize(("line", "weights", "told"), [("block", None, 1), ("head", None, 0), ("block", "none", 0)])
def test_a_run_tells_of_an_untrained_head_beside_backbone_layers_before_it_trains(
    line: str, weights: str | None, told: int, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (
        Stage(epochs=1, batch_size=16, views=1, freeze_line=line),
        Stage(name="top", freeze_line="all", epochs=1, batch_size=16),
    )
    how: dict[str, Any] = {"data_spec": SPEC, "audit": False, "cache": False, "augment": "none", "progress": True}
    result = fine_tune(photos, backbone=TinyNet(), weights=weights, recipe=Recipe(stages=stages), **how)
    said = capsys.readouterr().err
    assert said.count("Stage 'head' trains 1 backbone layer together with a head that is still untrained") == told
    assert said.find("--freeze-line head,all") < said.find("best epoch")
    assert sum("still untrained" in sentence for sentence in cautions(result.history, result.metrics)) == told
    if told:  # the same on a model that goes on: its head is trained
        fine_tune(photos, from_run=result.model, recipe=Recipe(stages=stages), **(how | {"data_spec": None}))
        assert "still untrained" not in capsys.readouterr().err


def test_07_a_block_cut_in_two_is_named() -> None:
    model = create_classifier("resnet18", ("a", "b"), weights="none", image_size=32)
    assert set_freeze_line(model, "last:2").cut_block == "layer4.1"  # the second convolution of the block and its norm
    assert "cuts layer4.1 in two" in model.freeze_line.describe()
    for whole in ("layer4", "layer4.1", "layer3.0", "head", "all"):
        line = set_freeze_line(model, whole)
        assert line.cut_block is None
        assert "in two" not in line.describe()


def test_09_the_door_takes_0_to_255_in_rgb(splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="0-255 scale"):
        classifier(splits)(torch.rand(2, 3, 16, 16))
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "red.png")
    assert open_image(tmp_path / "red.png").getpixel((0, 0)) == (255, 0, 0)
    assert headstart.load_view(tmp_path / "red.png", SPEC)[:, 0, 0].tolist() == [255, 0, 0]


def test_12_the_test_split_chooses_nothing(photos: Path, splits: Splits) -> None:
    def trained(test: headstart.ImageTable) -> list[torch.Tensor]:
        parts = Splits(train=splits.train, val=splits.val, test=test)
        recipe = Recipe(stages=(Stage(epochs=2, batch_size=8),))
        how: dict[str, Any] = {"recipe": recipe, "precision": "fp32", "device": "cpu", "cache": False}
        return list(fine_tune(parts, backbone=TinyNet(), data_spec=SPEC, **how).model.state_dict().values())

    other = splits.test.select([0])
    assert all(torch.equal(a, b) for a, b in zip(trained(splits.test), trained(other), strict=True))
    for name in ("train", "val"):
        (photos.parent / "sets" / name).mkdir(parents=True)
        for folder in photos.iterdir():
            (photos.parent / "sets" / name / folder.name).symlink_to(folder)
    with pytest.raises(DataError, match="val and test are the same folder"):
        load_images(photos.parent / "sets", val_folder="val", test_folder="val")


def test_13_scoring_twice_gives_the_same_bits(splits: Splits) -> None:
    model = create_classifier(TinyNet(dropout=0.5), splits.class_names, data_spec=SPEC).train()
    first, second = (headstart.evaluate(model, splits.train, runtime=CPU).probs for _ in range(2))
    assert np.array_equal(first, second)
    assert model.training  # left as it was


@pytest.mark.parametrize("n", [1, 31, 32, 33])
def test_14_every_picture_is_scored(n: int, photos: Path) -> None:
    table = load_images(photos, check=False).select(range(n))
    result = headstart.evaluate(create_classifier(TinyNet(), table.class_names, data_spec=SPEC), table, runtime=CPU)
    assert result.metrics["n"] == len(result.probs) == n


def test_17_thin_and_absent_classes_are_told() -> None:
    counts = {"train": {"a": 40, "b": 4}, "val": {"a": 5, "b": 1}, "test": {"a": 5, "b": 0}}
    few, absent = cautions([], {"data": {"class_counts": counts}})
    assert "Fewer than 5 training pictures: b (4)" in few
    assert "No picture in the test split: b" in absent
    whole = {"train": {"a": 5, "b": 5}, "val": {"a": 1, "b": 1}, "test": {"a": 0, "b": 0}}
    assert cautions([], {"data": {"class_counts": whole}}) == []  # no test split is no class's fault


def test_18_labels_that_come_in_runs_are_shuffled() -> None:
    labels = np.repeat(np.arange(4), 100)
    for epoch in range(3):
        seen = labels[epoch_order(400, seed=0, epoch=epoch)]
        changes = int((seen[1:] != seen[:-1]).sum())
        assert 260 < changes < 340  # of 399; by chance 300, in runs 3


class Top(nn.Module):
    """Features that tell where in the picture the bright half is: up and down count, left and right do not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[2] // 2
        return torch.stack([x[:, :, :half].mean((1, 2, 3)), x[:, :, half:].mean((1, 2, 3))], dim=1)


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Two classes: pictures bright in their upper and in their lower half."""
    rng = np.random.default_rng(0)
    for name in ("lower", "upper"):
        (tmp_path / "halves" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 60, (16, 16, 3))
            pixels[8:] += 150 * (name == "lower")
            pixels[:8] += 150 * (name == "upper")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "halves" / name / f"{i}.png")
    return tmp_path / "halves"


def test_20_a_change_that_harms_is_named(halves: Path) -> None:
    table = load_images(halves, check=False)
    model = create_classifier(Top(), table.class_names, head=nn.Linear(2, 2), data_spec=SPEC)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        model.head.bias.zero_()
    augment = AugmentSpec(hflip=0.5, vflip=0.5, brightness=0.2)
    costs = transform_costs(model, table, augment, runtime=CPU)
    assert [(row["change"], row["setting"]) for row in costs] == [
        ("hflip", "always"), ("vflip", "always"), ("brightness", 0.2),
    ]  # fmt: skip
    assert [row["accuracy"] for row in costs] == [1.0, 0.0, 1.0]
    assert [row["harms"] for row in costs] == [False, True, False]
    assert "More is lost than chance explains with vflip:" in costs_table(costs)
    assert costs == transform_costs(model, table, augment, runtime=CPU)
    with pytest.raises(DataError, match="changes nothing"):
        transform_costs(model, table, AugmentSpec(), runtime=CPU)


def test_each_change_of_every_policy_is_tried_alone() -> None:
    for augment in POLICIES.values():
        changes = single_changes(augment)
        assert bool(changes) != augment.is_identity
        assert all(list(single_changes(one)) == [name] for name, one in changes.items())


def test_the_command_prints_the_costs(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(stages=(Stage(epochs=1, batch_size=8),), augment="light")
    how: dict[str, Any] = {"spec_overrides": {"image_size": 32}, "precision": "fp32", "device": "cpu", "cache": False}
    fine_tune(photos, backbone="test_resnet", weights="none", out=tmp_path / "run", recipe=recipe, **how)
    assert main(["evaluate", str(tmp_path / "run"), str(photos), "--transforms"]) == 0
    assert re.findall(r"^(\w+) +(?:always|[\[(])", capsys.readouterr().out, flags=re.MULTILINE) == [
        "crop_scale",
        "hflip",
    ]
    assert main(["evaluate", str(tmp_path / "run"), str(photos), "--transforms", "overhead", "--json"]) == 0
    assert '"change": "vflip"' in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), str(photos), "--transforms", "none"]) == 2


def test_24_the_majority_stands_beside_the_accuracy() -> None:
    metrics = scored([1.0, 0.0], n=[90, 10])
    assert (metrics["accuracy"], metrics["majority_baseline"], metrics["balanced_accuracy"]) == (0.9, 0.9, 0.5)
    table = closing_table({"stages": [], "test": metrics})
    assert "majority" in table
    assert "balanced" in table


def stages(*accuracies: float) -> list[dict[str, Any]]:
    return [{"name": f"stage {i}", "best_val_accuracy": value} for i, value in enumerate(accuracies)]


def changed(only_after: int, only_before: int) -> dict[str, Any]:
    """Two stages on 100 validation pictures, of which the first gets 80 right."""
    before, after = np.arange(100) < 80, (np.arange(100) < 80 + only_after) & (np.arange(100) >= only_before)
    both = stages(0.80, float(after.mean()))
    both[1]["val_change"] = paired_difference(after, before)
    return {"stages": both, "data": {"n_val": 100}}


def test_25_a_gain_that_chance_explains_is_told() -> None:
    (sentence,) = cautions([], changed(7, 3))
    assert sentence.startswith("Stage 'stage 1' changed the validation accuracy by +4.0 points: of 100 pictures 7 are")
    assert sentence.endswith("right only after it and 3 only before, which chance explains (p = 0.34).")
    # As two samples of 100 these 8 points would be chance; on the same pictures all changes go one way.
    assert cautions([], changed(8, 0)) == []
    assert cautions([], changed(0, 0)) == []


def test_of_older_runs_the_accuracies_of_stages_are_compared() -> None:
    (sentence,) = cautions([], {"stages": stages(0.90, 0.92), "data": {"n_val": 100}})
    assert sentence.startswith("Stage 'stage 1' changed the validation accuracy by +2.0 points; of two samples of 100")
    assert sentence.endswith("on the same pictures less.")
    assert cautions([], {"stages": stages(0.60, 0.92), "data": {"n_val": 100}}) == []
    assert cautions([], {"stages": stages(0.90, 0.92), "data": {"n_val": 10_000}}) == []


def test_27_the_training_score_is_taken_in_evaluation_mode(splits: Splits) -> None:
    model = create_classifier(TinyNet(dropout=0.9), splits.class_names, data_spec=SPEC)
    set_freeze_line(model, "all")
    stage = Stage(freeze_line="all", epochs=1, batch_size=8)
    start = headstart.evaluate(model, splits.train, runtime=CPU).metrics
    history = headstart.fit(model, splits, stage, lr=1e-6, augment="strong", runtime=CPU).history
    assert history[0]["train"]["n"] == len(splits.train)
    assert history[0]["train"]["loss"] == pytest.approx(start["log_loss"], rel=1e-4)


def test_notes_stand_in_the_report_and_in_the_terminal(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list((photos / "red").iterdir())[6:]:
        path.unlink()
    options = ["--weights", "none", "--backbone", "test_resnet", "--image-size", "32", "--epochs", "1", "--quiet"]
    assert main(["fit", str(photos), "--recipe", "head", "--out", str(tmp_path / "run"), *options]) == 0
    note = "Fewer than 5 training pictures: red (4)"
    assert f"\nnote    {note}" in capsys.readouterr().out
    assert note in write_report(tmp_path / "run").read_text(encoding="utf-8")
