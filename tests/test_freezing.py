"""The freeze line: where it stands, that it holds over training steps in every family, and that breaking it is seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from headstart.classifier import Classifier, create_classifier
from headstart.contract import Contract
from headstart.dataspec import DataSpec
from headstart.errors import ModelError
from headstart.freezing import (
    backbone_layers,
    count_statistics,
    is_batchnorm,
    set_freeze_line,
)
from headstart.handover import new_head
from headstart.rates import param_groups
from headstart.recipe import HeadSpec, HiddenLayer
from tiny import SPEC, TinyNet

NAMES = ("cat", "dog", "owl")
HEAD = HeadSpec(batchnorm=True, hidden=(HiddenLayer(8),), dropout=0.1)


def tiny(net: nn.Module | None = None, names: tuple[str, ...] = NAMES, **options: Any) -> Classifier:
    return create_classifier(net or TinyNet(), names, data_spec=SPEC, **options)


class Tied(nn.Module):
    """Two convolutions with one weight, the one registered last called first or the other way round."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        for name in names:
            self.add_module(name, nn.Conv2d(4, 4, 1))
        self.mid = nn.Conv2d(4, 4, 1)
        self.early.weight = self.late.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(self.mid(self.early(self.stem(x)))).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("names", [("early", "late"), ("late", "early")])
def test_a_weight_that_lies_on_both_sides_of_the_line_is_refused(names: tuple[str, str]) -> None:
    model = tiny(Tied(names))
    weight = model.backbone.early.weight
    for where, is_trained in (("early", True), ("all", True), ("head", False)):
        set_freeze_line(model, where)
        assert weight.requires_grad == is_trained
    with pytest.raises(ModelError, match=r"early\.weight and late\.weight are one parameter"):
        set_freeze_line(model, "late")
    assert not weight.requires_grad


def test_a_norm_that_is_not_trained_may_be_shared_across_the_line() -> None:
    class SharedScale(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.BatchNorm2d(8)
            self.second.weight = self.norm.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.block(torch.relu(self.norm(self.stem(x))))).mean((2, 3))  # type: ignore[no-any-return]

    model = tiny(SharedScale())
    set_freeze_line(model, "block", batchnorm="frozen")
    with pytest.raises(ModelError, match="one parameter"):
        set_freeze_line(model, "block")


def named(name: str, pool: str = "backbone", size: int = 64, **options: Any) -> Classifier:
    head = HeadSpec(pool=pool, batchnorm=True)
    return create_classifier(name, NAMES, head=head, weights="none", image_size=size, **options)


def shapes_only(name: str, pool: str = "backbone") -> Classifier:
    """Large networks in no time: enough to place a line."""
    with torch.device("meta"):
        return named(name, pool)


def pixels(n: int = 4, size: int = SPEC.image_size, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def randomise(model: Classifier) -> None:
    """Statistics, scales and shifts as if trained: fresh ones (zero last scales) make tests pass vacuously."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.backbone.modules():
            scale, shift = getattr(module, "weight", None), getattr(module, "bias", None)
            if "norm" in type(module).__name__.lower() and scale is not None:
                scale.uniform_(0.5, 1.5, generator=generator)
                shift.uniform_(-0.2, 0.2, generator=generator)
            if is_batchnorm(module):
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in model.backbone.named_parameters():
            if name.endswith("gamma"):  # ConvNeXt's layer scale starts at 1e-6
                parameter.uniform_(0.5, 1.5, generator=generator)


def train_two_steps(model: Classifier, *, lr: float = 0.05) -> dict[str, torch.Tensor | None]:
    """Two steps of plain SGD under the contract; returns the gradients of the second."""
    optimizer = torch.optim.SGD(param_groups(model, lr=lr), lr=lr)
    contract = Contract(model, optimizer)
    labels = torch.arange(4) % 3
    for step in range(2):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels(4, model.spec.image_size, seed=step)), labels).backward()
        optimizer.step()
        contract.watch()
    contract.finish()
    return {n: p.grad for n, p in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


# ---------------------------------------------------------------- the contract, family by family


@dataclass(frozen=True)
class Family:
    """line: a block in the middle. front, behind: prefixes of parameters that lie on either side of it."""

    name: str
    line: str
    front: str
    behind: str
    pool: str = "backbone"
    size: int = 64
    slow: bool = False


FAMILIES = (
    Family("vgg16", "block5", "features.21.", "features.24.", pool="avg"),
    Family("vgg16", "block5", "features.21.", "pre_logits.fc2.", slow=True),
    Family("resnet18", "layer4", "layer3.1.bn2.", "layer4.0.downsample.1."),
    Family("resnet34", "layer4", "layer3.5.bn2.", "layer4.0.downsample.1.", slow=True),
    Family("resnet50", "layer4", "layer3.5.bn3.", "layer4.0.bn3.", slow=True),
    Family("resnetv2_50", "stages.3", "stages.2.blocks.5.norm3.", "norm.", slow=True),
    Family("resnetv2_18", "stages.3", "stages.2.blocks.1.norm2.", "norm."),
    Family("resnetv2_34", "stages.3", "stages.2.blocks.5.norm2.", "norm.", slow=True),
    Family("efficientnet_b0", "blocks.5*", "blocks.4.2.bn3.", "bn2."),
    Family("tf_efficientnet_b1", "blocks.6*", "blocks.5.4.bn3.", "bn2.", slow=True),
    Family("mobilenetv2_100", "blocks.5", "blocks.4.2.bn3.", "conv_head."),
    Family("mobilenetv3_small_100", "blocks.4", "blocks.3.1.bn3.", "conv_head."),
    Family("mobilenetv3_large_100", "blocks.6", "blocks.5.2.bn3.", "conv_head.", slow=True),
    Family("convnext_atto", "stages.3", "stages.2.blocks.5.gamma", "head.norm."),
    Family("vit_tiny_patch16_224", "blocks.9*", "cls_token", "blocks.10."),
    Family("swin_tiny_patch4_window7_224", "layers.3", "layers.2.blocks.5.", "layers.3.downsample.", slow=True),
    Family("densenet121", "features.denseblock4", "features.transition3.", "features.norm5.", slow=True),
)
ALL = [pytest.param(f, id=f"{f.name}-{f.pool}", marks=[pytest.mark.slow] if f.slow else []) for f in FAMILIES]


def test_every_family_is_there() -> None:
    wanted = ("vgg", "resnet18", "resnet34", "resnet50", "resnetv2", "efficientnet", "mobilenetv2", "mobilenetv3")
    for family in (*wanted, "convnext", "vit", "swin", "densenet"):
        assert any(f.name.startswith(family) for f in FAMILIES)
    assert len(ALL) == len(FAMILIES) > 15


@pytest.mark.parametrize("family", ALL)
def test_contract(family: Family) -> None:
    model = named(family.name, family.pool, family.size)
    randomise(model)
    assert model.eval().features(pixels(2, family.size)).shape == (2, model.num_features)

    # Whole backbone frozen: bit-equal, statistics too; the head learns, its own BatchNorm's statistics included.
    line = set_freeze_line(model, "head")
    assert len(line.frozen) > 10
    assert line.trained == ()
    before = state_of(model)
    gradients = train_two_steps(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone."), name
    assert all((g is None) == n.startswith("backbone.") for n, g in gradients.items())
    assert model.backbone_is_frozen

    # The line in the middle: bit-equal in front, moved behind, statistics fixed everywhere.
    line = set_freeze_line(model, family.line)
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    frozen = {n for n, _ in model.backbone.named_parameters()} - trained
    assert [n for n in frozen if n.startswith(family.front)]
    assert [n for n in trained if n.startswith(family.behind)]
    assert not [n for n in trained if n.startswith(family.front)]
    assert line.trainable_parameters + line.frozen_parameters == sum(p.numel() for p in model.parameters())
    before = state_of(model.backbone)
    gradients = train_two_steps(model)
    after = model.backbone.state_dict()
    moved = [n for n in trained if not torch.equal(after[n], before[n])]
    assert all(torch.equal(after[n], before[n]) for n in frozen)
    assert all(torch.equal(after[n], before[n]) for n in after if is_statistic(n))
    assert all((gradients[f"backbone.{n}"] is None) == (n in frozen) for n in frozen | trained)
    assert len(moved) > 0.9 * len(trained)
    assert [n for n in moved if n.startswith(family.behind)]

    # Modes survive eval() and train(): everything in front and every norm with statistics stays in evaluation mode.
    model.train()
    modes = {n: m.training for n, m in model.backbone.named_modules()}
    model.eval()
    model.train()
    assert modes == {n: m.training for n, m in model.backbone.named_modules()}
    for name, module in model.backbone.named_modules():
        owns = [f"{name}.{n}" for n, _ in module.named_parameters()]
        if is_batchnorm(module) or (owns and frozen.issuperset(owns)):
            assert not module.training, name
        elif owns and trained.issuperset(owns):
            assert module.training, name

    # Every trainable parameter is in one group, once.
    groups = param_groups(model, lr=1.0)
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


WITH_BATCHNORM = ("resnet18", "resnetv2_18", "efficientnet_b0", "mobilenetv3_small_100", "densenet121")


@pytest.mark.parametrize("family", [p for p in ALL if p.values[0].name in WITH_BATCHNORM])
def test_batchnorm_modes_behind_the_line(family: Family) -> None:
    model = named(family.name)
    randomise(model)
    norms = {n: m for n, m in model.backbone.named_modules() if is_batchnorm(m)}
    line = set_freeze_line(model, family.line, batchnorm="train")
    behind = {n for n in norms if n in line.trained}
    assert 0 < len(behind) < len(norms)
    before = state_of(model.backbone)
    train_two_steps(model)
    after = model.backbone.state_dict()
    for n in norms:
        assert torch.equal(after[f"{n}.running_mean"], before[f"{n}.running_mean"]) == (n not in behind), n
        assert torch.equal(after[f"{n}.num_batches_tracked"], before[f"{n}.num_batches_tracked"]) == (n not in behind)

    line = set_freeze_line(model, family.line, batchnorm="frozen")
    before = state_of(model.backbone)
    train_two_steps(model)
    after = model.backbone.state_dict()
    of_norms = [k for k in after if k.rpartition(".")[0] in norms]
    assert len(of_norms) == 5 * len(norms)
    assert all(torch.equal(after[k], before[k]) for k in of_norms)
    assert not all(torch.equal(after[k], before[k]) for k in after)


@pytest.mark.parametrize("index", [*range(4), *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 8))])
def test_efficientnet_b0_to_b7_take_a_line(index: int) -> None:
    model = shapes_only(f"efficientnet_b{index}")
    line = set_freeze_line(model, "blocks.6*")
    assert line.trained[0] == "blocks.6.0.conv_pw"
    assert line.trained[-2:] == ("conv_head", "bn2")
    assert line.frozen[0] == "conv_stem"
    assert len(line.frozen) > 3 * len(line.trained)


# ---------------------------------------------------------------- where the line stands


def test_layers_in_order_of_execution() -> None:
    layers = backbone_layers(shapes_only("resnet18"))
    assert layers[:3] == ("conv1", "bn1", "layer1.0.conv1")
    assert layers[-1] == "layer4.1.bn2"
    at = layers.index("layer4.0.conv1")
    names = ("conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1")
    assert layers[at : at + 6] == tuple(f"layer4.0.{n}" for n in names)


def test_order_is_that_of_execution_not_of_registration() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 4)
            self.gain = nn.Parameter(torch.ones(4))
            self.never = nn.Linear(4, 4)
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).mean((2, 3))
            assert self.gain.shape == (4,)
            return self.last(x) * self.gain

    model = tiny(Turned())
    assert backbone_layers(model) == ("first", "last", "gain")
    line = set_freeze_line(model, "last:2")
    assert line.trained == ("last", "gain")
    assert not model.backbone.never.weight.requires_grad
    assert line.frozen_parameters == sum(
        p.numel() for m in (model.backbone.first, model.backbone.never) for p in m.parameters()
    )


def test_parameters_that_a_block_holds_itself_are_layers() -> None:
    vit = backbone_layers(shapes_only("vit_tiny_patch16_224"))
    assert vit[:3] == ("patch_embed.proj", "cls_token", "pos_embed")
    convnext = backbone_layers(shapes_only("convnext_atto"))
    assert convnext[-2:] == ("stages.3.blocks.1.gamma", "head.norm")


def test_vgg_last_three_is_block5() -> None:
    """What Keras's `layers[:-4]` leaves trainable: three convolutions, and a pooling layer with nothing to train."""
    model = shapes_only("vgg16", pool="avg")
    by_count, by_name = set_freeze_line(model, "last:3"), set_freeze_line(model, "block5")
    assert by_count.trained == by_name.trained == ("features.24", "features.26", "features.28")
    assert by_name.trainable_parameters == 3 * 2_359_808 + sum(p.numel() for p in model.head.parameters())
    assert set_freeze_line(model, "block1").frozen == ()
    assert set_freeze_line(model, "block[45]").trained[0] == "features.17"


@pytest.mark.parametrize(("where", "first"), [
    ("all", "conv1"),
    ("last:1", "layer4.1.bn2"),
    ("last:40", "conv1"),
    ("layer4", "layer4.0.conv1"),
    ("layer4.1", "layer4.1.conv1"),
    ("layer*", "layer1.0.conv1"),
    ("*.downsample*", "layer2.0.downsample.0"),
    ("layer[34].0.bn2", "layer3.0.bn2"),
    ("*", "conv1"),
])  # fmt: skip
def test_where_the_line_stands(where: str, first: str) -> None:
    model = shapes_only("resnet18")
    layers = backbone_layers(model)
    line = set_freeze_line(model, where)
    assert line.trained == layers[layers.index(first) :]
    assert line.frozen == layers[: layers.index(first)]
    assert line.where == where
    assert model.freeze_line is line


@pytest.mark.parametrize(("where", "message"), [
    ("layer5", r"'layer5' selects nothing: no layer or block .* Did you mean: layer\d.*Allowed: head, all, last:N"),
    ("layer5*", "Did you mean: layer"),
    ("blocks.6*", r"last:N \(1 to 40\)"),
    ("maxpool", "it has no parameters"),
    ("last:0", r"0 is not a number from 1 to 40"),
    ("last:41", r"41 is not a number from 1 to 40"),
    ("last:-1", r"-1 is not a number"),
    ("last:", r"nothing is not a number"),
    ("last:two", r"two is not a number"),
    ("", "selects nothing"),
    (3, "3; it takes a name: head, all, last:N or a block"),
])  # fmt: skip
def test_lines_that_select_nothing(where: str, message: str) -> None:
    model = shapes_only("resnet18")
    with pytest.raises(ModelError, match=message):
        set_freeze_line(model, where)
    assert model.freeze_line is None


def test_unknown_batchnorm_mode() -> None:
    with pytest.raises(ModelError, match=r"batchnorm is 'freeze'; allowed: fixed, frozen, train. Did you mean: frozen"):
        set_freeze_line(tiny(), "head", batchnorm="freeze")


def test_nothing_to_train_is_an_error() -> None:
    model = create_classifier(nn.Conv2d(3, 3, 3), NAMES, head=nn.Identity(), pool="avg", data_spec=SPEC)
    with pytest.raises(ModelError, match="nothing would be trained"):
        set_freeze_line(model, "head")
    assert set_freeze_line(model, "all").trained == ("",)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_without_statistics_of_their_own_are_refused(affine: bool) -> None:
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3))
    with pytest.raises(ModelError, match=r"1 of the backbone \(BatchNorm2d\) keeps no running statistics"):
        tiny(net, head=HeadSpec(pool="avg"))
    with pytest.raises(ModelError, match=r"0 of the head \(BatchNorm1d\) keeps no running statistics"):
        tiny(head=nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)))


def test_modules_exchanged_behind_the_line_s_back_are_told_at_the_next_pass() -> None:
    model = tiny()
    set_freeze_line(model, "head")
    old = model.backbone.norm
    model.backbone.norm = nn.BatchNorm2d(8)
    model.backbone.norm.weight, model.backbone.norm.bias = old.weight, old.bias  # as convert_sync_batchnorm does
    model.train()
    with pytest.raises(ModelError, match=r"1 of the backbone's modules \(norm\) were exchanged .* set_freeze_line"):
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ModelError, match="were exchanged"):
        Contract(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    set_freeze_line(model, "head")
    model.train()
    assert not model.backbone.norm.training
    copied = copy.deepcopy(model)
    copied(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert not copied.backbone.norm.training


def test_with_the_line_at_all_what_runs_before_the_first_weight_acts_too() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Dropout2d(0.5), nn.Conv2d(3, 4, 3))
    model = tiny(net, head=HeadSpec(pool="avg"))
    set_freeze_line(model, "all", batchnorm="train")
    model.train()
    assert [module.training for module in net] == [True, True, True]
    set_freeze_line(model, "head")
    assert [module.training for module in net] == [False, False, False]


def test_what_the_author_has_fixed_stays_fixed_wherever_the_line_stands() -> None:
    net, head = TinyNet(), nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 3))
    net.places = nn.Parameter(torch.zeros(2), requires_grad=False)
    net.stem.register_forward_hook(lambda module, given, out: out + net.places.sum())
    head[0].requires_grad_(False)
    model = tiny(net, head=head)
    for where in ("all", "head", "all"):
        set_freeze_line(model, where)
        assert not net.places.requires_grad
        assert [p.requires_grad for p in head.parameters()] == [False, False, True, True]
    other = new_head(model, NAMES)
    set_freeze_line(other, "all")
    assert not net.places.requires_grad
    assert net.stem.weight.requires_grad


def test_whole_numbers_among_the_parameters_are_left_alone() -> None:
    head = nn.Linear(8, 3)
    head.counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    set_freeze_line(tiny(head=head), "all")
    assert not head.counts.requires_grad


def test_a_wrapped_classifier_is_found_and_anything_else_refused() -> None:
    model = tiny()
    assert set_freeze_line(nn.DataParallel(model), "head") is model.freeze_line
    with pytest.raises(ModelError, match=r"takes a Classifier, .* it was given TinyNet"):
        set_freeze_line(TinyNet(), "head")


def test_a_share_of_the_layers_is_one_of_a_wrapped_network_too() -> None:
    plain = tiny(timm.create_model("resnet18", num_classes=0))
    wrapped = tiny(nn.Sequential(nn.Sequential(timm.create_model("resnet18", num_classes=0)), nn.Flatten()))
    shares = [len(set_freeze_line(model, "last:20%").trained) for model in (plain, wrapped)]
    assert 0 < shares[1] < 20
    assert len({group["name"] for group in param_groups(wrapped, lr=1.0, layer_decay=0.5)}) > 3


def test_numbers_per_channel_are_not_decayed_in_any_shape_and_one_row_of_weights_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    net.scale = nn.Parameter(torch.ones(4, 1, 1))
    net[1].register_forward_hook(lambda module, given, out: out * net.scale)
    model = tiny(net, head=HeadSpec(pool="avg", output="sigmoid"), names=NAMES[:2])
    set_freeze_line(model, "all")
    groups = param_groups(model, lr=1.0, weight_decay=0.1)
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert id(net.scale) in spared
    assert id(model.head.classifier.weight) not in spared


def test_moving_the_line_back_and_forth() -> None:
    model = tiny()
    for where in ("head", "all", "last:1", "head"):
        line = set_freeze_line(model, where)
        trained = {n.rpartition(".")[0] for n, p in model.backbone.named_parameters() if p.requires_grad}
        assert trained == set(line.trained)
    assert line.head == ("classifier",)


def test_counts_and_words() -> None:
    model = tiny(head=HEAD)
    head = sum(p.numel() for p in model.head.parameters())
    line = set_freeze_line(model, "block", batchnorm="fixed")
    assert (line.trainable_parameters, line.frozen_parameters) == (head + 584, 224 + 16)
    assert line.statistics == count_statistics(model) == 2 * 8 + 2 * 8  # the backbone's and the head's
    assert line.describe() == (
        f"training the head and 1 of 3 backbone layers, from block on ({head + 584:,} parameters trained, 240 frozen; "
        "BatchNorm behind the line: statistics fixed, scale and shift trained)"
    )
    assert "the whole backbone is frozen" in set_freeze_line(model, "head").describe()
    assert "the whole backbone and the head" in set_freeze_line(model, "all").describe()


# ---------------------------------------------------------------- training mode is another thing than trainable


def outputs(model: Classifier, n: int = 6) -> list[torch.Tensor]:
    """The same pictures, with other random numbers each time."""
    found = []
    with torch.no_grad():
        for seed in range(n):
            torch.manual_seed(seed)
            found.append(model.features(pixels(2, model.spec.image_size)))
    return found


def all_equal(tensors: list[torch.Tensor]) -> bool:
    return all(torch.equal(t, tensors[0]) for t in tensors)


@pytest.mark.parametrize(("name", "line", "last_in_front"), [
    ("efficientnet_b0", "blocks.5", "blocks.4"),
    ("convnext_atto", "stages.3", "stages.2"),
    ("mobilenetv2_100", "blocks.4", "blocks.3"),
])  # fmt: skip
def test_drop_path_acts_behind_the_line_only(name: str, line: str, last_in_front: str) -> None:
    model = named(name, drop_path_rate=0.5)
    randomise(model)
    prefix: list[torch.Tensor] = []
    model.backbone.get_submodule(last_in_front).register_forward_hook(lambda _m, _a, out: prefix.append(out.clone()))
    set_freeze_line(model, line, batchnorm="fixed")
    model.train()
    assert not all_equal(outputs(model))
    assert len(prefix) == 6
    assert all_equal(prefix)
    set_freeze_line(model, "head")
    model.train()
    model.backbone.train()
    assert all_equal(outputs(model))
    set_freeze_line(model, "all")
    prefix.clear()
    model.train()
    outputs(model)
    assert not all_equal(prefix)
    model.eval()
    assert all_equal(outputs(model))


def test_dropout_acts_behind_the_line_only() -> None:
    """EfficientNet applies its dropout as a function of the network's own training flag."""
    model = named("efficientnet_b0", drop_rate=0.5)
    set_freeze_line(model, "last:1")
    model.train()
    assert not all_equal(outputs(model))
    set_freeze_line(model, "head")
    model.train()
    assert all_equal(outputs(model))


class DropsItself(nn.Module):
    """Drops values as a function of its own flag, in front of one layer or behind it."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.early = early

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.early:
            return self.second(nn.functional.dropout(x, 0.5, self.training)).mean((2, 3))
        return nn.functional.dropout(self.second(x), 0.5, self.training).mean((2, 3))


@pytest.mark.parametrize("early", [True, False])
def test_a_module_around_the_line_drops_values_behind_it_only(early: bool) -> None:
    model = tiny(nn.Sequential(DropsItself(early)))
    set_freeze_line(model, "0.second")
    model.train()
    assert all_equal(outputs(model)) == early
    assert model.backbone[0].second.training
    set_freeze_line(model, "all")
    model.train()
    assert not all_equal(outputs(model))


class Dropping(nn.Module):
    """One module that drops values behind the second layer, and in front of it too where it is shared."""

    def __init__(self, drop: nn.Module, shared: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.drop = drop
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.drop(x) if self.shared else x
        return self.drop(self.second(x)).mean((2, 3))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("drop", [nn.Dropout, DropPath])
def test_a_module_used_on_both_sides_is_frozen(drop: type[nn.Module], shared: bool) -> None:
    model = tiny(Dropping(drop(0.5), shared))
    set_freeze_line(model, "second")
    model.train()
    assert all_equal(outputs(model)) == shared


def test_weights_used_on_both_sides_are_frozen() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(self.second(self.first(x))).mean((2, 3))

    model = tiny(Twice())
    assert set_freeze_line(model, "second").trained == ("second",)
    before = state_of(model.backbone)
    train_two_steps(model)
    moved = {n for n, t in model.backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"second.weight", "second.bias"}


def TrackingInstanceNorm(channels: int) -> nn.Module:  # noqa: N802
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, TrackingInstanceNorm])
def test_what_counts_as_batchnorm(norm: Any) -> None:
    model = create_classifier(
        nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)), NAMES, head=HeadSpec(pool="avg"), data_spec=SPEC
    )
    set_freeze_line(model, "all", batchnorm="fixed")
    model.train()
    assert not model.backbone[1].training
    set_freeze_line(model, "all", batchnorm="train")
    model.train()
    assert model.backbone[1].training


def test_frozen_governs_batchnorm_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    model = create_classifier(net, NAMES, head=HeadSpec(pool="avg", batchnorm=True), data_spec=SPEC)
    set_freeze_line(model, "all", batchnorm="frozen")
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False] * 2
    assert all(p.requires_grad for p in model.head.parameters())
    model.train()
    assert model.head.norm.training


@pytest.mark.parametrize(("where", "batchnorm"), [("head", "fixed"), ("block", "fixed"), ("all", "frozen")])
def test_the_heads_own_batchnorm_always_learns(where: str, batchnorm: str) -> None:
    model = tiny(head=HEAD)
    set_freeze_line(model, where, batchnorm=batchnorm)
    before = state_of(model)
    train_two_steps(model)
    after = model.state_dict()
    statistics = [n for n in after if is_statistic(n)]
    assert len(statistics) == 6
    assert {n for n in statistics if not torch.equal(after[n], before[n])} == {n for n in statistics if "head." in n}


# ---------------------------------------------------------------- parameter groups


def test_groups_and_their_rates() -> None:
    model = tiny(head=HEAD)
    set_freeze_line(model, "all")
    groups = param_groups(model, lr=0.1, head_lr_multiplier=10, weight_decay=0.01)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("backbone", 0.1, 0.01),
        ("backbone, no decay", 0.1, 0.0),
        ("head", 1.0, 0.01),
        ("head, no decay", 1.0, 0.0),
    ]
    names = {id(p): n for n, p in model.named_parameters()}
    held = [[names[id(p)] for p in g["params"]] for g in groups]
    assert held[0] == ["backbone.stem.weight", "backbone.block.weight"]
    assert held[2] == ["head.hidden1.weight", "head.classifier.weight"]
    assert sorted(n for group in held for n in group) == sorted(names.values())
    assert all("norm" in n or n.endswith("bias") for n in held[1] + held[3])


def test_groups_leave_out_what_is_frozen() -> None:
    model = tiny()
    set_freeze_line(model, "head")
    assert [g["name"] for g in param_groups(model, lr=1.0)] == ["head", "head, no decay"]


def test_groups_ask_the_network_what_not_to_decay() -> None:
    model = named("vit_tiny_patch16_224", size=32)
    set_freeze_line(model, "all")
    groups = {g["name"]: {id(p) for p in g["params"]} for g in param_groups(model, lr=1.0, weight_decay=0.1)}
    vit = model.backbone
    assert {id(vit.pos_embed), id(vit.cls_token)} <= groups["backbone, no decay"]
    assert id(vit.blocks[0].attn.qkv.weight) in groups["backbone"]
    assert id(vit.norm.weight) in groups["backbone, no decay"]


def test_norms_of_more_than_one_dimension_are_not_decayed() -> None:
    model = tiny(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 14, 14)), nn.Flatten()))
    set_freeze_line(model, "all")
    groups = {g["name"]: g["params"] for g in param_groups(model, lr=1.0, weight_decay=0.1)}
    assert [p.ndim for p in groups["backbone"]] == [4]
    assert [p.ndim for p in groups["backbone, no decay"]] == [1, 3, 3]


def test_groups_know_both_ways_of_exempting() -> None:
    class Particular(TinyNet):
        def no_weight_decay(self) -> set[str]:
            return {"stem.weight"}

        def no_weight_decay_keywords(self) -> set[str]:
            return {"block"}

    for net, decayed in ((TinyNet(), 2), (Particular(), 0)):
        model = tiny(net)
        set_freeze_line(model, "all")
        groups = {g["name"]: g["params"] for g in param_groups(model, lr=1.0, weight_decay=0.1)}
        assert len(groups.get("backbone", [])) == decayed
        assert len(groups["backbone, no decay"]) == 6 - decayed


def test_groups_follow_a_module_put_in_place_of_another() -> None:
    model = tiny()
    set_freeze_line(model, "head")
    model.backbone.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    assert set_freeze_line(model, "last:1").trained == ("block.1",)
    assert len(param_groups(model, lr=1.0)[0]["params"]) == 1


def test_groups_without_anything_trainable() -> None:
    with pytest.raises(ModelError, match="Nothing is trainable"):
        param_groups(tiny().requires_grad_(False), lr=1.0)


@pytest.mark.parametrize("shared", ["module", "tensor"])
def test_what_has_two_names_is_placed_by_the_first_and_stays_whole(shared: str) -> None:
    net = TinyNet()
    if shared == "module":
        net.alias = net.stem
    else:
        net.alias = nn.Conv2d(net.stem.in_channels, net.stem.out_channels, net.stem.kernel_size)
        net.alias.weight = net.stem.weight
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    model = tiny(net)
    assert set_freeze_line(model, "block").frozen[0] == "stem"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.named_parameters())


def test_spec_of_the_tests_is_what_the_nets_take() -> None:
    assert isinstance(SPEC, DataSpec)
    assert len(backbone_layers(tiny())) == 3
