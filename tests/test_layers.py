"""The table of a model agrees with known figures and with a model built by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from headstart.checkpoint import save
from headstart.classifier import create_classifier
from headstart.errors import ModelError
from headstart.freezing import count_statistics, set_freeze_line
from headstart.layers import Row, Summary, make_summary, summary
from headstart.recipe import HeadSpec, HiddenLayer
from tiny import SPEC, TinyNet

NAMES = ("cat", "dog", "owl")


def test_a_table_with_the_line_elsewhere_moves_nothing() -> None:
    model = create_classifier(TinyNet(), NAMES, data_spec=SPEC)
    line = set_freeze_line(model, "head")
    kept = model.kept_in_eval
    assert summary(model, freeze_line="all").frozen == 0
    assert model.freeze_line is line
    assert model.kept_in_eval == kept
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_one_weight_under_two_names_counts_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    net[2].weight = net[0].weight
    model = create_classifier(net, NAMES, head=HeadSpec(pool="avg"), data_spec=SPEC)
    assert summary(model).parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(ModelError, match="takes a Classifier"):
        summary(net)


# Keras's VGG16(include_top=False, input_shape=(180, 180, 3)).summary(): output [H, W, C] and parameters.
KERAS_VGG16 = (
    ("input", (180, 180, 3), 0),
    ("block1_conv1", (180, 180, 64), 1_792),
    ("block1_conv2", (180, 180, 64), 36_928),
    ("block1_pool", (90, 90, 64), 0),
    ("block2_conv1", (90, 90, 128), 73_856),
    ("block2_conv2", (90, 90, 128), 147_584),
    ("block2_pool", (45, 45, 128), 0),
    ("block3_conv1", (45, 45, 256), 295_168),
    ("block3_conv2", (45, 45, 256), 590_080),
    ("block3_conv3", (45, 45, 256), 590_080),
    ("block3_pool", (22, 22, 256), 0),
    ("block4_conv1", (22, 22, 512), 1_180_160),
    ("block4_conv2", (22, 22, 512), 2_359_808),
    ("block4_conv3", (22, 22, 512), 2_359_808),
    ("block4_pool", (11, 11, 512), 0),
    ("block5_conv1", (11, 11, 512), 2_359_808),
    ("block5_conv2", (11, 11, 512), 2_359_808),
    ("block5_conv3", (11, 11, 512), 2_359_808),
    ("block5_pool", (5, 5, 512), 0),
)


def adds_up(table: Summary) -> bool:
    return all(row.parameters == row.trainable + row.frozen for row in table.rows)


def test_vgg16_row_by_row() -> None:
    table = summary("vgg16", head=HeadSpec(pool="avg"), image_size=180, freeze_line="block5")
    assert table.parameters == 14_714_688
    *rows, pooled = table.rows
    assert pooled.output_shape == (512,)
    assert len(rows) == len(KERAS_VGG16)
    for row, (name, (high, wide, channels), parameters) in zip(rows, KERAS_VGG16, strict=True):
        assert row.output_shape == (channels, high, wide), name
        assert row.parameters == parameters, name
    assert table.line == 15
    assert table.rows[14].type == "MaxPool2d"
    assert (table.trainable, table.frozen) == (3 * 2_359_808, 14_714_688 - 3 * 2_359_808)
    assert table.statistics == 0
    assert adds_up(table)


@pytest.mark.parametrize(("name", "trainable", "statistics"), [
    ("tf_efficientnet_b0", 4_007_548, 42_016),
    ("tf_efficientnet_b4", 17_548_616, 125_200),
])  # fmt: skip
def test_efficientnet_without_top(name: str, trainable: int, statistics: int) -> None:
    """Keras's EfficientNetB0 and B4 (include_top=False); it counts 7 numbers of its input normalisation besides."""
    table = summary(name)
    assert (table.trainable, table.frozen, table.statistics) == (trainable, 0, statistics)
    assert table.line == 1  # below the input, above the first layer
    table = summary(name, freeze_line="head")
    assert (table.trainable, table.frozen, table.statistics) == (0, trainable, statistics)
    assert table.line == len(table.rows)


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "densenet121"]
)
def test_every_number_is_counted_once(name: str) -> None:
    head = HeadSpec(batchnorm=True, hidden=(HiddenLayer(16),))
    table = summary(name, head=head, num_classes=3, image_size=64, freeze_line="head")
    with torch.device("meta"):
        model = create_classifier(name, NAMES, head=head, weights="none", image_size=64)
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert table.trainable == sum(p.numel() for p in model.head.parameters())
    assert table.statistics == count_statistics(model) > 0
    assert adds_up(table)
    assert len({(row.part, row.name) for row in table.rows}) == len(table.rows)
    assert [row.name for row in table.rows if row.part == "head"] == ["norm", "hidden1", "classifier"]


def test_what_has_no_parameters_is_shown_where_it_changes_the_shape() -> None:
    rows = summary("resnet18", num_classes=3).rows
    plain = [(row.name, row.type, row.output_shape) for row in rows if not row.parameters]
    assert plain == [
        ("input", "pixels", (3, 224, 224)),
        ("maxpool", "MaxPool2d", (64, 56, 56)),
        ("global_pool", "SelectAdaptivePool2d", (512,)),
    ]


def test_spec_and_by_hand_have_the_same_counts() -> None:
    spec = HeadSpec(pool="avg", batchnorm=True, hidden=(HiddenLayer(16, batchnorm="after"),), dropout=0.2)

    def net() -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3)]
        return nn.Sequential(*layers)

    from_spec = create_classifier(net(), NAMES, head=spec, data_spec=SPEC)
    hand = nn.Sequential(
        net(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 16), nn.ReLU(),
        nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3),
    )  # fmt: skip
    head = hand[3:]
    by_hand = create_classifier(hand[:3], NAMES, head=head, data_spec=SPEC)
    tables = [make_summary(model) for model in (from_spec, by_hand)]
    for model in (from_spec, by_hand):
        set_freeze_line(model, "head")
    tables += [make_summary(model) for model in (from_spec, by_hand)]
    counts = [(t.parameters, t.trainable, t.frozen, t.statistics) for t in tables]
    assert counts[0] == counts[1] == (1431, 1431, 0, 2 * (8 + 12 + 16))
    assert counts[2] == counts[3] == (1431, 315, 1116, 72)
    assert counts[0][0] == sum(p.numel() for p in hand.parameters())


def test_what_is_never_used_is_shown() -> None:
    net = TinyNet()
    net.old_classifier = nn.Linear(8, 10)
    table = make_summary(create_classifier(net, NAMES, data_spec=SPEC))
    assert Row("(never used)", "", None, 90, 0, 90) in table.rows
    assert table.line is None


def test_text_draws_the_line() -> None:
    model = create_classifier(TinyNet(), NAMES, data_spec=SPEC)
    assert "freeze line" not in make_summary(model).text()
    set_freeze_line(model, "block", batchnorm="frozen")
    lines = [line.split() for line in make_summary(model).text().splitlines() if not line.startswith("-")]
    assert lines == [
        ["TinyNet", "at", "16", "x", "16"],
        ["layer", "type", "output", "parameters", "trained", "frozen", "statistics"],
        ["input", "pixels", "3", "x", "16", "x", "16"],
        ["stem", "Conv2d", "8", "x", "8", "x", "8", "224", "224"],
        ["norm", "BatchNorm2d", "8", "x", "8", "x", "8", "16", "16", "16"],
        ["====", "freeze", "line:", "block", "(BatchNorm", "frozen)", lines[5][-1]],
        ["block", "Conv2d", "8", "x", "4", "x", "4", "584", "584"],
        ["[head]", "classifier", "Linear", "3", "27", "27"],
        ["total", "851", "611", "240", "16"],
    ]
    assert set(lines[5][-1]) == {"="}


def test_a_model_is_left_as_it_was() -> None:
    model = create_classifier(TinyNet(), NAMES, data_spec=SPEC)
    set_freeze_line(model, "head")
    before = [(n, m.training) for n, m in model.named_modules()]
    summary(model)
    assert [(n, m.training) for n, m in model.named_modules()] == before
    assert model.freeze_line.where == "head"


def test_run_shows_the_line_of_its_last_stage(tmp_path: Path) -> None:
    model = create_classifier("mobilenetv3_small_050", NAMES, weights="none", image_size=32)
    save(model, tmp_path)
    table = summary(tmp_path)
    assert table.line == 1
    assert table.parameters == table.trainable == sum(p.numel() for p in model.parameters())
    stages = '[{"name": "a"}, {"name": "b", "freeze_line": "blocks.5", "batchnorm": "frozen"}]'
    (tmp_path / "recipe.json").write_text(f'{{"stages": {stages}}}')
    table = summary(tmp_path)
    assert table.rows[table.line or 0].name == "blocks.5.0.conv"
    assert "blocks.5 (BatchNorm frozen)" in table.text()
    assert summary(tmp_path, freeze_line="head").trainable == sum(p.numel() for p in model.head.parameters())


def test_unknown_names() -> None:
    with pytest.raises(ModelError, match=r"Did you mean: .*resnet18"):
        summary("resnet18x")
    with pytest.raises(ModelError, match="selects nothing"):
        summary("resnet18", freeze_line="layer5")
