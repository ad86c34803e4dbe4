"""Learning rates by depth: as timm has them, whatever the line, and what they do to the weights."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from torch import nn

from headstart import ModelError, Recipe, Stage, create_classifier, fine_tune, set_freeze_line
from headstart.blocks import block_name, network_depths
from headstart.classifier import Classifier
from headstart.features import FeatureSource, StageData
from headstart.rates import layer_depths, param_groups
from headstart.schedule import learning_rate
from headstart.train import fit
from test_train import CPU
from tiny import SPEC, TinyNet


def named(name: str) -> Classifier:
    model = create_classifier(name, ["a", "b"], weights="none", image_size=32)
    set_freeze_line(model, "all")
    return model


def tiny(net: nn.Module | None = None, where: str = "all") -> Classifier:
    model = create_classifier(net or TinyNet(), ["a", "b"], data_spec=SPEC)
    set_freeze_line(model, where)
    return model


def rates(model: Classifier, **options: float) -> dict[str, float]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: g["lr"] for g in param_groups(model, lr=1.0, **options) for p in g["params"]}


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035", "vit_tiny_patch16_224", "convnext_atto"])
def test_rates_are_those_of_timm(name: str) -> None:
    model = named(name)
    mine = rates(model, layer_decay=0.7, weight_decay=0.1)
    names = {id(p): f"backbone.{n}" for n, p in model.backbone.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(model.backbone, layer_decay=0.7)
    theirs = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert len(theirs) > 20
    assert {n: mine[n] for n in theirs} == pytest.approx(theirs)
    assert {rate for n, rate in mine.items() if n.startswith("head.")} == {1.0}
    assert min(mine.values()) < 0.3


def test_depths_of_a_module_of_ones_own_follow_its_blocks_in_order_of_execution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
            self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)])
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return self.late(x).mean((2, 3))  # type: ignore[no-any-return]

    depths = layer_depths(tiny(Net()))
    expected = {"stem": 0, "layers.0.0": 1, "layers.0.1": 1, "layers.1.0": 2, "layers.1.1": 2, "late.0": 3, "late.1": 4}
    assert {name.rpartition(".")[0]: depth for name, depth in depths.items()} == expected


def test_every_trainable_parameter_has_one_group_and_the_line_moves_no_rate() -> None:
    whole = rates(tiny(), layer_decay=0.5)
    assert whole["backbone.stem.weight"] == 0.25
    assert whole["backbone.norm.weight"] == 0.5
    assert whole["backbone.block.weight"] == whole["head.classifier.weight"] == 1.0
    model = tiny(where="norm")
    part = rates(model, layer_decay=0.5, head_lr_multiplier=10.0)
    assert set(part) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(part[n] == (10.0 if n.startswith("head") else whole[n]) for n in part)
    groups = param_groups(tiny(), lr=1.0, layer_decay=0.5, weight_decay=0.1)
    assert [g["name"] for g in groups] == [
        "backbone, depth 0 of 2", "backbone, depth 0 of 2, no decay", "backbone, depth 1 of 2, no decay",
        "backbone, depth 2 of 2", "backbone, depth 2 of 2, no decay", "head", "head, no decay",
    ]  # fmt: skip
    assert [g["weight_decay"] for g in groups] == [0.1, 0, 0, 0.1, 0, 0.1, 0]


def test_a_parameter_without_depth_is_named() -> None:
    net = TinyNet()
    net.spare = nn.Linear(2, 2)
    model = tiny(net)
    net.spare.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"spare\.weight of the backbone has no depth.*layer_decay 1"):
        param_groups(model, lr=1.0, layer_decay=0.5)
    assert param_groups(model, lr=1.0)


def test_early_layers_move_less_and_keep_their_share_through_the_schedule() -> None:
    class Pictures(FeatureSource):
        def forward(self, model: Classifier, inputs: torch.Tensor) -> torch.Tensor:
            return model(inputs)  # type: ignore[no-any-return]

    source = Pictures(torch.randint(0, 255, (8, 1, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 2)
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = Stage(
        name="all", freeze_line="all", epochs=1, batch_size=8, layer_decay=0.1, weight_decay=0.0, schedule="constant"
    )
    moved: dict[str, float] = {}

    def measure(_: object) -> None:
        moved.update({n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()})

    fit(model, StageData(source, source), stage, lr=1e-3, runtime=CPU, report=measure)
    # Adam's first step is as long as the rate.
    assert moved["backbone.stem.weight"] == pytest.approx(1e-5, rel=0.05)
    assert moved["backbone.block.weight"] == pytest.approx(1e-3, rel=0.05)


def test_gradual_unfreezing_trains_more_in_each_stage(photos: object) -> None:
    stages = tuple(
        Stage(name=where, freeze_line=where, epochs=1, batch_size=16, lr_scale=0.01)
        for where in ("head", "last:25%", "last:50%", "all")
    )
    result = fine_tune(photos, backbone=TinyNet(), data_spec=SPEC, recipe=Recipe(stages=stages, augment="none"))  # type: ignore[arg-type]
    assert [s["trained"] for s in result.metrics["stages"]] == [
        [], ["block"], ["norm", "block"], ["stem", "norm", "block"],
    ]  # fmt: skip


@pytest.mark.parametrize(("where", "count"), [("last:1%", 1), ("last:34%", 2), ("last:100%", 3), ("last:67%", 3)])
def test_a_share_of_the_layers_is_rounded_up(where: str, count: int) -> None:
    assert len(set_freeze_line(tiny(), where).trained) == count


@pytest.mark.parametrize(
    "name", ["mobilenetv2_100", "resnet18", "vgg11", "convnext_atto", "vit_tiny_patch16_224", "densenet121"]
)
@pytest.mark.parametrize("where", ["last:80%", "last:33%"])
def test_a_share_of_the_layers_divides_no_block(name: str, where: str) -> None:
    model = create_classifier(name, ("a", "b"), weights="none", image_size=None if name.startswith("vit") else 64)
    line = set_freeze_line(model, where)
    depths = network_depths(model.backbone)
    assert depths is not None
    trained = {depths[n] for n, p in model.backbone.named_parameters() if p.requires_grad}
    frozen = {depths[n] for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert trained
    assert frozen
    assert not trained & frozen
    whole = set_freeze_line(model, "all")
    assert len(line.trained) >= len(whole.trained) * float(where[5:-1]) / 100


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("blocks.2.0.conv_pw", "blocks.2"), ("layer4.1.conv1", "layer4.1"), ("stages.2.norm", "stages.2"),
        ("features.12", "features.12"), ("stem.conv", "stem.conv"), ("head", "head"),
        ("features.denseblock4.denselayer5.conv1", "features.denseblock4"), ("features.norm5", "features.norm5"),
    ],
)  # fmt: skip
def test_blocks_by_name(layer: str, block: str) -> None:
    assert block_name(layer) == block


@pytest.mark.parametrize("where", ["last:0%", "last:101%", "last:%", "last:4"])
def test_a_share_out_of_range_is_refused(where: str) -> None:
    with pytest.raises(ModelError, match=r"not a number from 1 to 3.*share of them from 1% to 100%"):
        set_freeze_line(tiny(), where)


def test_one_cycle_is_that_of_torch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=1000, cycle_momentum=False)
    theirs = []
    for _ in range(1000):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    mine = [learning_rate(s, steps=1000, lr=0.5, schedule="one-cycle", warmup=0.0) for s in range(1000)]
    assert mine == pytest.approx(theirs, abs=0.003)
