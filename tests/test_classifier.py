"""The classifier: its own door for pixels, heads and backbones of every kind, and frozen modes that stay."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from headstart.backbones import backbone_features
from headstart.classifier import Classifier, create_classifier
from headstart.dataspec import DataSpec
from headstart.errors import ModelError
from headstart.freezing import set_freeze_line
from headstart.handover import change_classes, new_head
from headstart.recipe import HeadSpec, HiddenLayer
from headstart.tracing import evaluation_mode, trace
from headstart.transforms import normalise
from tiny import SPEC, TinyNet

NAMES = ("cat", "dog", "owl")
SMALL = "mobilenetv3_small_050"


def tiny(**options: object) -> Classifier:
    return create_classifier(TinyNet(), NAMES, data_spec=SPEC, **options)  # type: ignore[arg-type]


def pixels(n: int = 4, size: int = SPEC.image_size) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- the door


def test_forward_is_normalise_backbone_head() -> None:
    model = tiny().eval()
    x = pixels()
    features = model.backbone(normalise(x, SPEC))
    assert torch.equal(model.features(x), features)
    assert torch.equal(model(x), model.head(features))
    assert model(x).shape == (4, 3)


def test_float_pixels_are_the_same_as_bytes() -> None:
    model = tiny().eval()
    assert torch.equal(model(pixels().float()), model(pixels()))


@pytest.mark.parametrize(("scaled", "span"), [
    (lambda x: (x / 255 - 0.5) / 0.25, "from -2 to 2"),
    (lambda x: x / 255, "from 0 to 1"),
])  # fmt: skip
def test_pixels_that_were_normalised_before(scaled: object, span: str) -> None:
    with pytest.raises(ModelError, match=f"takes pixels on the 0-255 scale .* {span}"):
        tiny()(scaled(pixels().float()))  # type: ignore[operator]


def test_dark_pictures_are_pixels_all_the_same() -> None:
    model = tiny().eval()
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert model(torch.ones(2, 3, 16, 16)).shape == (2, 3)
    assert model(pixels() // 200).shape == (4, 3)  # bytes are never taken for anything else


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 16, 16, 3)])
def test_pixels_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"takes pixels \[N, 3, S, S\]; it was given \(" + ", ".join(map(str, shape))):
        tiny()(torch.zeros(shape, dtype=torch.uint8))


def test_another_size_where_the_backbone_takes_it() -> None:
    assert tiny().eval()(pixels(2, 24)).shape == (2, 3)


def test_another_size_where_it_does_not() -> None:
    vit = create_classifier("vit_tiny_patch16_224", NAMES, weights="none", image_size=32)
    with pytest.raises(ModelError, match=r"made for 32 px pictures and does not take 48 x 48 .*image_size=48"):
        vit(pixels(1, 48))
    flat = create_classifier(nn.Conv2d(3, 2, 3), NAMES, head=HeadSpec(pool="flatten"), data_spec=SPEC)
    assert flat(pixels()).shape == (4, 3)
    with pytest.raises(ModelError, match="968 features instead of 392"):
        flat(pixels(1, 24))


# ---------------------------------------------------------------- putting it together


def test_class_names_are_two_or_more_different_ones() -> None:
    for names in ((), ("cat",), ("cat", "cat"), "cat", 5):
        with pytest.raises(ModelError, match="two or more different names"):
            create_classifier(TinyNet(), names, data_spec=SPEC)


def test_own_backbone_needs_its_preprocessing() -> None:
    with pytest.raises(ModelError, match="needs data_spec"):
        create_classifier(TinyNet(), NAMES)


@pytest.mark.parametrize("option", [{"drop_rate": 0.1}, {"drop_path_rate": 0.1}])
def test_options_of_named_backbones_only(option: dict[str, float]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(option))}=0.1 is for backbones by name"):
        tiny(**option)
    with pytest.raises(ModelError, match="features_from='block'"):
        tiny(head=HeadSpec(features_from="block"))


def test_a_spec_says_the_pooling_itself() -> None:
    with pytest.raises(ModelError, match=r"HeadSpec\(pool=...\)"):
        tiny(head=HeadSpec(), pool="avg")


def test_own_backbone_that_does_not_run() -> None:
    with pytest.raises(ModelError, match="Linear does not run on pictures of 16 x 16"):
        create_classifier(nn.Linear(5, 5), NAMES, data_spec=SPEC)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_script_is_no_backbone() -> None:
    script = torch.jit.trace(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ModelError, match=r"TorchScript .Conv2d.*Give the module that it was made of"):
        create_classifier(script, NAMES, data_spec=SPEC)


def test_own_head() -> None:
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 3))
    model = tiny(head=head)
    assert model.head is head
    assert model.head_spec is None
    with pytest.raises(ModelError, match=r"does not run on features \[N, 8\]"):
        tiny(head=nn.Linear(9, 3))
    with pytest.raises(ModelError, match=r"gives \(2, 4\) for two pictures .* expected \(2, 3\)"):
        tiny(head=nn.Linear(8, 4))


def test_head_spec_is_kept() -> None:
    spec = HeadSpec(batchnorm=True, hidden=(HiddenLayer(4),))
    model = tiny(head=spec)
    assert model.head_spec == spec
    assert [n for n, _ in model.head.named_children()] == ["norm", "hidden1", "hidden1_relu", "classifier"]
    assert (model.num_features, model.class_names, model.pool) == (8, NAMES, "backbone")


def test_seed_decides_the_head_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    first = tiny(seed=1).head.classifier.weight
    drawn = torch.rand(1)
    assert torch.equal(first, tiny(seed=1).head.classifier.weight)
    assert not torch.equal(first, tiny(seed=2).head.classifier.weight)
    torch.manual_seed(3)
    tiny(seed=9)
    assert torch.equal(torch.rand(1), drawn)


def test_named_backbone_and_what_rebuilds_it() -> None:
    head = HeadSpec(features_from="blocks.2")
    model = create_classifier(
        SMALL, NAMES, head=head, weights="none", drop_path_rate=0.1, image_size=48, interpolation="bilinear"
    )
    assert (model.spec.image_size, model.spec.interpolation) == (48, "bilinear")
    assert model.backbone_name == SMALL
    assert model.backbone_args == {
        "pool": "backbone", "features_from": "blocks.2", "drop_rate": 0.0, "drop_path_rate": 0.1, "image_size": 48,
    }  # fmt: skip
    assert model.pool == "avg"  # what the network does behind the block is gone
    again = create_classifier(SMALL, NAMES, head=head, weights="none", drop_path_rate=0.1, data_spec=model.spec, seed=4)
    again.load_state_dict(model.state_dict())
    x = pixels(2, 48)
    assert again.spec == model.spec
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_head_is_new_also_when_the_class_count_is_the_weights_own() -> None:
    classes = [str(i) for i in range(1000)]
    model = create_classifier(SMALL, classes, weights="none", image_size=32)
    whole = timm.create_model(SMALL)
    assert model.head.classifier.weight.shape == whole.classifier.weight.shape
    assert "backbone.classifier.weight" not in model.state_dict()
    assert not model.head.classifier.bias.any()


def test_feature_map_of_every_layout() -> None:
    model = create_classifier("vit_tiny_patch16_224", NAMES, weights="none", image_size=32)
    assert model.feature_map(pixels(2, 32)).shape == (2, 192, 2, 2)
    with pytest.raises(ModelError, match="not a feature map"):
        tiny().feature_map(pixels())


def test_timm_module_of_ones_own_with_its_classifier_on() -> None:
    net = timm.create_model(SMALL, num_classes=7)
    model = create_classifier(net, NAMES, data_spec=DataSpec(32))
    assert model.num_features == 1024
    assert model.eval()(pixels(2, 32)).shape == (2, 3)
    set_freeze_line(model, "all")
    assert not net.classifier.weight.requires_grad  # the pass never reads it, so it is not trained


# ---------------------------------------------------------------- modes


def modes(model: nn.Module) -> dict[str, bool]:
    return {n: m.training for n, m in model.named_modules()}


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    model = tiny()
    set_freeze_line(model, "head")
    model.train()
    expected = {n: not n.startswith("backbone") for n in modes(model)}
    assert modes(model) == expected
    model.eval()
    assert not any(modes(model).values())
    model.train()
    assert modes(model) == expected
    model.backbone.train()  # behind our back: put right at the door
    model(pixels())
    assert modes(model) == expected


class Told(nn.Linear):
    """Does something of its own when the mode changes."""

    told: tuple[bool, ...] = ()

    def train(self, mode: bool = True) -> Told:
        self.told += (mode,)
        return super().train(mode)


def test_a_head_that_does_more_than_note_the_mode_is_asked_to() -> None:
    model = create_classifier(TinyNet(), NAMES, head=Told(8, 3), data_spec=SPEC)
    set_freeze_line(model, "head")
    model.head.told = ()
    model.train()
    model.eval()
    assert model.head.told == (True, False)
    model.train()
    assert [n for n, training in modes(model).items() if training] == ["", "head"]


@pytest.mark.parametrize("entry", ["forward", "features", "feature_map"])
def test_every_way_in_keeps_frozen_statistics(entry: str) -> None:
    model = create_classifier(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), NAMES, head=HeadSpec(pool="avg"), data_spec=SPEC
    )
    set_freeze_line(model, "head")
    before = model.backbone[1].running_mean.clone()
    model.backbone.train()
    getattr(model, entry)(pixels())
    assert torch.equal(model.backbone[1].running_mean, before)
    set_freeze_line(model, "all", batchnorm="train")
    model.train()
    getattr(model, entry)(pixels())
    assert not torch.equal(model.backbone[1].running_mean, before)


def test_a_copy_keeps_its_own_modules_frozen() -> None:
    model = tiny()
    set_freeze_line(model, "head")
    twin = copy.deepcopy(model)
    twin.backbone.train()
    twin(pixels())
    assert not twin.backbone.norm.training
    assert twin.backbone_is_frozen


def test_pixels_that_are_no_tensor_are_told() -> None:
    with pytest.raises(ModelError, match=r"takes pixels as a tensor; it was given ndarray\. torch\.from_numpy"):
        tiny()(np.zeros((1, 3, 32, 32), np.uint8))  # type: ignore[arg-type]


def test_backbone_is_frozen() -> None:
    model = tiny()
    assert not model.backbone_is_frozen
    set_freeze_line(model, "head")
    assert model.backbone_is_frozen
    set_freeze_line(model, "last:1")
    assert not model.backbone_is_frozen
    set_freeze_line(model, "head")
    model.backbone.block.weight.requires_grad_(True)
    assert not model.backbone_is_frozen


# ---------------------------------------------------------------- tracing


def test_trace_leaves_no_mark() -> None:
    net = TinyNet().train()
    net.block.eval()
    before, state = modes(net), copy.deepcopy(net.state_dict())
    seen = trace(net, lambda n, x: n(x), (1, 3, 16, 16))
    assert seen.output_shape == (1, 8)
    assert modes(net) == before
    assert all(torch.equal(t, state[n]) and not t.is_meta for n, t in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert [c.name for c in seen.calls] == ["", "stem", "norm", "block", "dropout"]
    assert seen.first_use["stem.weight"] < seen.first_use["norm.running_mean"] < seen.first_use["block.weight"]


class ReadsValues(nn.Module):
    """Cannot run on shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3)) * (2.0 if x.sum().item() > 0 else 1.0)


def test_trace_of_a_module_that_needs_values() -> None:
    model = create_classifier(ReadsValues(), NAMES, data_spec=SPEC)
    assert model.num_features == 6
    assert set_freeze_line(model, "conv").trained == ("conv",)


def test_evaluation_mode_is_undone_after_an_error() -> None:
    net = TinyNet().train()
    inside = {}

    def fail() -> None:
        inside.update(modes(net))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), evaluation_mode(net):
        fail()
    assert not any(inside.values())
    assert len(inside) == 5
    assert all(modes(net).values())


# ---------------------------------------------------------------- real weights in modules of ones own


def test_own_modules_with_real_weights(shared: Path) -> None:
    from safetensors.torch import load_file
    from timm.models.efficientnet import _gen_mobilenet_v1
    from torchvision.models import squeezenet1_1

    net = _gen_mobilenet_v1("mobilenetv1_100", 0.25, pad_type="same", bn_eps=1e-3, num_classes=0)
    net.load_state_dict(load_file(shared / "weights" / "mobilenetv1_025_keras.safetensors"))
    half = DataSpec(96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = create_classifier(net, NAMES, data_spec=half).eval()
    assert model.num_features == 256
    assert torch.equal(
        model.features(pixels(2, 96)), backbone_features(net, normalise(pixels(2, 96), half), "backbone")
    )

    squeeze = squeezenet1_1()
    squeeze.load_state_dict(load_file(shared / "weights" / "squeezenet1_1_torchvision.safetensors"))
    model = create_classifier(squeeze.features, NAMES, head=HeadSpec(pool="avg"), data_spec=DataSpec(96)).eval()
    assert model.num_features == 512
    assert model.features(pixels(2, 96)).std() > 0.1


def test_weights_for_a_module_of_the_users_own_are_refused_not_ignored() -> None:
    from tiny import SPEC, TinyNet

    with pytest.raises(ModelError, match=r"weights='best\.safetensors' is for backbones by name"):
        create_classifier(TinyNet(), ("a", "b"), data_spec=SPEC, weights="best.safetensors")


class Squash(nn.Module):
    """A head that ends in a function, not in a module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.soft, self.last, self.kind = nn.Softmax(1), nn.Linear(8, 3), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.last(x)
        return out if self.kind == "none" else out.softmax(1) if self.kind == "softmax" else out.sigmoid()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "none"])
def test_probabilities_are_told_by_what_the_head_gives_not_by_its_modules(kind: str) -> None:
    if kind == "none":  # a softmax that is registered, and is no end
        assert create_classifier(TinyNet(), ("a", "b", "c"), head=Squash(kind), data_spec=SPEC).head.kind == kind
        return
    with pytest.raises(ModelError, match=rf"The head gives probabilities; .* Leave the {kind} at its end out"):
        create_classifier(TinyNet(), ("a", "b", "c"), head=Squash(kind), data_spec=SPEC)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_number_format_takes_the_same_pixels(dtype: torch.dtype) -> None:
    model = tiny().eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(pixels)
        found = model.to(dtype)(pixels)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_classes_are_checked_when_they_are_changed_as_when_they_are_made() -> None:
    model = create_classifier(TinyNet(), [0, 1, 2], data_spec=SPEC)  # type: ignore[list-item]
    assert change_classes(model, [0, 1, 2, 3])[0].class_names == ("0", "1", "2", "3")  # type: ignore[list-item]
    with pytest.raises(ModelError, match="class_names is 'abc'"):
        change_classes(model, "abc")


def test_a_new_head_is_behind_no_line() -> None:
    model = tiny()
    set_freeze_line(model, "head")
    model.train()
    assert new_head(model, ("x", "y")).train().backbone.norm.training
