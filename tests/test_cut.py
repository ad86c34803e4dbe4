"""Cutting backbones in two: the halves together are the whole, share its weights, and keep their modes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.checkpointing import Segments, segments
from headstart.cut import Cut, cut, cut_or_reason, feature_map, features
from headstart.fastops import conv_chains

# backbone: (options, lines at the first block, in the middle of a block, at the last block)
LINES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "vgg16": ({}, ("features.5", "features.17", "features.28")),
    "resnet18": ({}, ("layer1", "layer3.0.bn1", "layer4.1.conv2")),
    "resnet50": ({}, ("layer1", "layer3.2.conv2", "layer4.2")),
    "resnetv2_50": ({}, ("stages.0", "stages.2.blocks.1.conv2", "stages.3.blocks.2")),
    "efficientnet_b0": ({}, ("blocks.0", "blocks.3.1.conv_pwl", "blocks.6")),
    "tf_efficientnet_b0": ({}, ("blocks.0", "blocks.3.1.conv_pwl", "blocks.6")),
    "mobilenetv2_100": ({}, ("blocks.0", "blocks.3.1.conv_pwl", "blocks.6")),
    "mobilenetv3_small_100": ({}, ("blocks.0", "blocks.3.1.se", "conv_head")),
    "convnext_atto": ({}, ("stages.0", "stages.2.blocks.3.mlp.fc2", "stages.3")),
    "convnext_tiny": ({}, ("stages.0", "stages.2.blocks.3.mlp.fc2", "stages.3")),
    "vit_tiny_patch16_224": ({"img_size": 64}, ("blocks.0", "blocks.5.mlp.fc1", "blocks.11")),
    "densenet121": ({}, ("features.denseblock1", "features.denseblock3.denselayer4.conv2", "features.denseblock4")),
    "swin_tiny_patch4_window7_224": ({"img_size": 64}, ("layers.0", "layers.2.blocks.3.mlp.fc1", "layers.3")),
}
SHAPE = (3, 64, 64)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


def pictures(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def behind(net: nn.Module, line: str) -> list[str]:
    """Layers with parameters from the named one on, in order of registration."""
    names = [n for n, m in net.named_modules() if any(True for _ in m.parameters(recurse=False))]
    start = next(i for i, n in enumerate(names) if n == line or n.startswith(f"{line}."))
    return names[start:]


def made(result: Cut | str) -> Cut:
    assert isinstance(result, Cut), result
    return result


@pytest.mark.parametrize("name", LINES)
def test_halves_equal_the_whole(name: str) -> None:
    options, lines = LINES[name]
    net, x = build(name, **options), pictures()
    with torch.no_grad():
        whole = features(net, x)
        for line in lines:
            parts = made(cut_or_reason(net, line, example_shape=SHAPE))
            stored = parts.prefix(x)
            before = stored.clone()
            torch.testing.assert_close(parts.suffix(stored), whole, rtol=1e-6, atol=1e-6)
            assert torch.equal(stored, before), "the suffix changed what was stored"
            assert tuple(stored.shape[1:]) == parts.shape
            assert parts.bytes_per_picture() == stored[0].numel() * 4
            assert parts.bytes_per_picture(torch.bfloat16) == stored[0].numel() * 2


@pytest.mark.parametrize(("name", "line", "at"), [
    ("xcit_nano_12_p16_224", "blocks.6", "blocks.5 (add_18)"),  # a grid's height and width, used in every block
    ("twins_svt_small", "blocks.2.4", "blocks.2.3 (add_18)"),  # how many pictures there are, used in every stage
    ("pit_ti_224", "transformers.1", "transformers.0.blocks.1 (add_4)"),
])  # fmt: skip
def test_numbers_that_are_used_all_along_are_in_nobodys_way(name: str, line: str, at: str) -> None:
    net = build(name, img_size=64)
    parts = made(cut_or_reason(net, line, example_shape=(3, 64, 64)))
    assert (parts.at, parts.frozen_between) == (at, ())
    for n in (1, 5):
        x = pictures(n)
        with torch.no_grad():
            stored, whole = parts.prefix(x), features(net, x)
            torch.testing.assert_close(parts.suffix(stored), whole, rtol=1e-6, atol=1e-6)
            parts.suffix.training = True  # its modules stay as they are
            torch.testing.assert_close(parts.suffix(stored), whole, rtol=1e-6, atol=1e-6)
            parts.suffix.training = False


def test_a_network_that_takes_pictures_in_pairs_alone_is_cut_all_the_same() -> None:
    class Pairs(Unsteady):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[0]
            y = self.stem(x).reshape(n // 2, 2, 4, 6, 6).flatten(0, 1)
            return self.block(y).mean((2, 3))  # type: ignore[no-any-return]

    found = cut_or_reason(Pairs(lambda: 1.0), "block", example_shape=(3, 8, 8), forward=nn.Module.__call__)
    assert isinstance(found, Cut), found
    assert isinstance(segments(Pairs(lambda: 1.0), example_shape=(3, 8, 8)), Segments)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"])
def test_gradients_of_the_suffix_are_those_of_the_net(name: str) -> None:
    options, (_, middle, _) = LINES[name]
    net, x = build(name, **options), pictures()
    parts = made(cut_or_reason(net, middle, example_shape=SHAPE))
    trained = dict(parts.suffix.named_parameters())
    assert trained

    def gradients(run: Callable[[], Tensor]) -> list[Tensor | None]:
        net.zero_grad()
        run().square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in trained.values()]

    whole = gradients(lambda: features(net, x))
    with torch.no_grad():
        stored = parts.prefix(x)
    half = gradients(lambda: parts.suffix(stored))
    assert any(g is not None and g.abs().max() > 0 for g in half)
    for name_, a, b in zip(trained, whole, half, strict=True):
        assert a is not None, name_
        assert b is not None, name_
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_suffix_shares_the_tensors_of_the_net() -> None:
    net = build("resnet18")
    parts = made(cut_or_reason(net, "layer4", example_shape=SHAPE))
    own = {id(p) for p in net.parameters()}
    assert {id(p) for p in parts.suffix.parameters()} <= own
    assert {id(p) for p in parts.prefix.parameters()} <= own
    assert {id(b) for b in parts.suffix.buffers()} <= {id(b) for b in net.buffers()}
    x = pictures()
    with torch.no_grad():
        net.get_submodule("layer4.1.conv2").weight.mul_(2.0)  # type: ignore[operator,union-attr]
        torch.testing.assert_close(parts.suffix(parts.prefix(x)), features(net, x))


@pytest.mark.parametrize(
    ("name", "line"),
    [("efficientnet_b0", "blocks.5"), ("convnext_atto", "stages.2"), ("mobilenetv2_100", "blocks.5")],
)
def test_drop_path_acts_in_training_only(name: str, line: str) -> None:
    net = build(name, drop_path_rate=0.2)
    parts = made(cut_or_reason(net, line, example_shape=SHAPE))
    with torch.no_grad():
        stored = parts.prefix(pictures(8))

        def twice(training: bool) -> tuple[Tensor, Tensor]:
            parts.suffix.train(training)
            for module in parts.suffix.modules():  # batch statistics would differ by themselves
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            return parts.suffix(stored), parts.suffix(stored)

        first, second = twice(True)
        assert not torch.allclose(first, second)
        first, second = twice(False)
        assert torch.equal(first, second)


class Dropping(nn.Module):
    """Dropout written as a function of the module's own mode, as timm's heads have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).mean((2, 3)))
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.last(x)


def test_functional_dropout_follows_the_suffix() -> None:
    net = Dropping().eval()
    parts = made(cut_or_reason(net, "middle", example_shape=(3, 8, 8), forward="forward"))
    stored = parts.prefix(pictures(8, 8)).detach()
    parts.suffix.train()
    assert not torch.equal(parts.suffix(stored), parts.suffix(stored))
    parts.suffix.eval()
    assert torch.equal(parts.suffix(stored), parts.suffix(stored))


def test_functional_dropout_in_front_of_the_line_is_off() -> None:
    net, x = Dropping().train(), pictures(8, 8)
    parts = made(cut_or_reason(net, "last", example_shape=(3, 8, 8), forward="forward"))
    assert torch.equal(parts.prefix(x), parts.prefix(x))
    assert parts.suffix.training


class InPlace(nn.Module):
    """The tensor before the line is written to by what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.first(x)))


def test_suffix_leaves_its_input_alone() -> None:
    net = InPlace().eval()
    parts = made(cut_or_reason(net, ("relu", "last"), example_shape=(3, 4, 4), forward="forward"))
    stored = parts.prefix(pictures(2, 4)).detach()
    parts.suffix.eval()
    before = stored.clone()
    with torch.no_grad():
        parts.suffix(stored)
    assert torch.equal(stored, before)
    assert (before < 0).any()


def test_line_given_by_many_names_lists_what_is_frozen_between() -> None:
    net = build("resnet18")
    names = behind(net, "layer4.1.conv2")
    parts = made(cut_or_reason(net, names, example_shape=SHAPE))
    assert parts.at == "layer4.0.act2"
    assert parts.frozen_between == ("layer4.1.conv1", "layer4.1.bn1")
    assert not set(parts.frozen_between) & set(names)


def test_smaller_activation_is_found_further_back() -> None:
    net, line = build("mobilenetv2_100"), "blocks.2.0.conv_dw"
    last = made(cut_or_reason(net, line, example_shape=SHAPE))
    assert last.at == "blocks.2.0.bn1"
    assert last.shape == (144, 16, 16)
    back = made(cut_or_reason(net, line, example_shape=SHAPE, max_bytes=24 * 16 * 16 * 4))
    assert back.shape == (24, 16, 16)
    assert back.frozen_between == ("blocks.2.0.conv_pw", "blocks.2.0.bn1")
    reason = cut_or_reason(net, line, example_shape=SHAPE, max_bytes=64)
    assert isinstance(reason, str)
    assert "64 bytes" in reason


def test_feature_map_is_cut_too() -> None:
    net, x = build("mobilenetv2_100"), pictures()
    parts = made(cut_or_reason(net, "blocks.6", example_shape=SHAPE, forward=feature_map))
    with torch.no_grad():
        assert parts.suffix(parts.prefix(x)).dim() == 4
        torch.testing.assert_close(parts.suffix(parts.prefix(x)), feature_map(net, x))


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18", "convnext_atto"])
def test_other_sizes_of_pictures(name: str) -> None:
    net = build(name)
    parts = made(cut_or_reason(net, LINES[name][1][2], example_shape=SHAPE))
    x = pictures(3, 96)
    with torch.no_grad():
        torch.testing.assert_close(parts.suffix(parts.prefix(x)), features(net, x), rtol=1e-6, atol=1e-6)


def test_modes_are_as_before() -> None:
    net = build("resnet18")
    net.get_submodule("layer4").train()
    before = {n: m.training for n, m in net.named_modules()}
    made(cut_or_reason(net, "layer4", example_shape=SHAPE))
    assert {n: m.training for n, m in net.named_modules()} == before


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(x) if x.mean() > 0 else x


def test_reasons_for_no_cut() -> None:
    net = Untraceable()
    assert cut(net, "last", example_shape=(3, 8, 8), forward="forward") is None
    reason = cut_or_reason(net, "last", example_shape=(3, 8, 8), forward="forward")
    assert isinstance(reason, str)
    assert "cannot be traced" in reason
    resnet = build("resnet18")
    for line, words in (("conv1", "no single tensor"), ("layer9", "none of the layers")):
        reason = cut_or_reason(resnet, line, example_shape=SHAPE)
        assert isinstance(reason, str)
        assert words in reason


class Resizing(InPlace):
    """Something without weights comes first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.avg_pool2d(x, 2))


def test_a_prefix_without_weights_is_not_worth_storing() -> None:
    reason = cut_or_reason(Resizing().eval(), "first", example_shape=(3, 8, 8), forward="forward")
    assert isinstance(reason, str)
    assert "no single tensor" in reason


class Windows(nn.Module):
    """Between the layers the batch is split into windows, so that tensors no longer have one row per picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 1), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.middle(self.first(x).reshape(-1, 16))
        return self.last(rows).reshape(-1, 4 * 4 * 2)


def test_tensors_without_the_batch_in_front_are_not_stored() -> None:
    net, x = Windows().eval(), pictures(3, 8)
    parts = made(cut_or_reason(net, "last", example_shape=(3, 8, 8), forward="forward"))
    assert parts.at == "first"
    assert parts.frozen_between == ("middle",)
    with torch.no_grad():
        torch.testing.assert_close(parts.suffix(parts.prefix(x)), net(x))


class DropsInFront(nn.Module):
    """A block that drops values itself, in front of the layer that is trained; the cut lies at the block's input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.third(nn.functional.dropout(self.second(x), 0.5, self.training))


def test_a_frozen_layer_behind_the_cut_is_recorded_in_the_mode_it_stays_in() -> None:
    net, x = DropsInFront(), torch.randn(64, 4)

    def whole(module: nn.Module, x: Tensor) -> Any:
        return module(x)

    for kept, same in ((list(net.modules())[:3], True), ((), False)):
        parts = made(cut_or_reason(net, ["third"], example_shape=(4,), forward=whole, kept_in_eval=kept))
        assert parts.at == "first"
        stored = parts.prefix(x)
        parts.suffix.training = True
        assert torch.equal(parts.suffix(stored), parts.suffix(stored)) is same


class Unsteady(nn.Module):
    """A small network that calls what it is given in its forward pass, and multiplies by it."""

    def __init__(self, number: Callable[[], float]) -> None:
        super().__init__()
        self.stem, self.block, self.number = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), number

    def forward(self, x: Tensor) -> Tensor:
        return (self.number() * self.block(self.stem(x))).mean((2, 3))


@pytest.mark.parametrize(("number", "reason"), [
    (lambda: float(torch.rand(1)), "random numbers of its own"),
    (random.random, "random numbers of its own"),
    (np.random.rand, "random numbers of its own"),
    (itertools.count(1).__next__, "at every call others"),
    (lambda: 2.0, None),
])  # fmt: skip
def test_what_does_not_do_the_same_at_every_call_is_not_cut(number: Callable[[], float], reason: str | None) -> None:
    found = cut_or_reason(Unsteady(number), "block", example_shape=(3, 8, 8), forward=nn.Module.__call__)
    assert isinstance(found, Cut) if reason is None else reason in str(found)


def test_what_draws_random_numbers_is_not_computed_again() -> None:
    for number, is_refused in ((random.random, True), (lambda: 2.0, False)):
        found = segments(Unsteady(number), example_shape=(3, 8, 8))
        assert isinstance(found, str) == is_refused
        assert not is_refused or "random numbers of its own" in found


def test_numbers_of_a_generator_of_ones_own_are_seen_with_any_that_numpy_has() -> None:
    class Pairs(Unsteady):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"out": super().forward(x)}

    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))  # whose state is not that of the usual one
    try:
        found = cut_or_reason(Pairs(lambda: 1.0), "block", example_shape=(3, 8, 8), forward=nn.Module.__call__)
    finally:
        np.random.set_bit_generator(before)
    assert isinstance(found, Cut), found


@pytest.mark.parametrize(("generator", "draw"), [
    (random.Random(0), lambda g: g.random()),
    (np.random.default_rng(0), lambda g: g.random()),
    (np.random.RandomState(0), lambda g: g.random_sample()),
    (torch.Generator(), lambda g: float(torch.rand(1, generator=g))),
])  # fmt: skip
def test_a_network_that_draws_from_its_own_generator_is_not_cut(generator: Any, draw: Callable[[Any], float]) -> None:
    net = Unsteady(lambda: draw(generator))
    net.own = generator
    found = cut_or_reason(net, "block", example_shape=(3, 8, 8), forward=nn.Module.__call__)
    assert "random numbers of its own" in str(found)


@pytest.mark.parametrize("way", ["before", "of what comes", "another", "function"])
def test_a_network_that_changes_its_buffers_itself_is_not_cut_and_keeps_them(way: str) -> None:
    class Learns(Unsteady):
        def __init__(self) -> None:
            super().__init__(lambda: 1.0)
            self.register_buffer("mean", torch.ones(()))
            self.seen: dict[str, Any] = {}
            self.all: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen["mean"] = x.mean()
                self.all.append(x)
                with torch.no_grad():
                    if way == "before":
                        self.mean.mul_(0.9)
                    elif way == "of what comes":
                        self.mean.add_(x.mean())
                    elif way == "another":
                        self.mean = self.mean + 1
            if way == "function":
                x = functional.batch_norm(x, self.mean.expand(3), self.mean.expand(3), training=self.training)
            return super().forward(x) - self.mean

    net = Learns()
    for seen in ({"mean": torch.ones(2)}, {}):  # as after a picture, and before any
        net.seen, net.all = dict(seen), list(seen)
        found = cut_or_reason(net, "block", example_shape=(3, 8, 8), forward=nn.Module.__call__)
        assert (list(net.seen), net.all) == (list(seen), list(seen))
        assert all(isinstance(value, Tensor) for value in net.seen.values())
    found = cut_or_reason(net, "block", example_shape=(3, 8, 8), forward=nn.Module.__call__)
    assert "changes its buffers itself" in str(found)
    assert "changes its buffers itself" in str(segments(net, example_shape=(3, 8, 8)))
    conv_chains(net.train(), nn.Module.__call__)
    assert torch.equal(net.mean, torch.ones(()))
    assert net.seen == {}, "stand-ins for tensors, which nothing can be computed with"


def test_what_only_keeps_what_it_makes_is_cut_again_and_again() -> None:
    class Keeps(Unsteady):
        def __init__(self) -> None:
            super().__init__(lambda: 1.0)
            self.seen: dict[str, Any] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.seen["stem"] = x
            return super().forward(x)

    net = Keeps()
    for _ in range(2):
        assert isinstance(cut_or_reason(net, "block", example_shape=(3, 8, 8), forward=nn.Module.__call__), Cut)
        net(torch.ones(1, 3, 8, 8))
    assert net.seen["stem"].shape == (1, 3, 8, 8)


def test_a_long_row_of_what_may_be_views_is_looked_through_once() -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(40):
                x = torch.maximum(x, x.flip(-1))
            return self.block(x).mean((2, 3))  # type: ignore[no-any-return]

    found = cut_or_reason(Row(), "block", example_shape=(3, 8, 8), forward=nn.Module.__call__)
    assert isinstance(found, Cut)
    assert isinstance(segments(Row(), example_shape=(3, 8, 8)), Segments)  # 2 ** 40 ways lead through it


def test_numbers_that_another_thread_draws_are_no_reason() -> None:
    drawn = iter([True, False])

    class Beside(Unsteady):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, torch.fx.Proxy) and next(drawn, False):
                torch.rand(1)
            return super().forward(x)

    assert isinstance(
        cut_or_reason(Beside(lambda: 1.0), "block", example_shape=(3, 8, 8), forward=nn.Module.__call__), Cut
    )


class Statements(nn.Module):
    """Activations in place whose result nobody takes, as many write them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.act = kind, nn.ReLU(inplace=True)
        self.c = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.c:
            x = conv(x)
            if self.kind == "method":
                x.relu_()
            elif self.kind == "module":
                self.act(x)
            else:
                functional.relu(x, inplace=True)
        return x.mean((2, 3))


@pytest.mark.parametrize("kind", ["method", "module", "function"])
def test_what_is_done_in_place_as_a_statement_is_done_in_the_halves_too(kind: str) -> None:
    torch.manual_seed(0)
    net = Statements(kind).eval()
    found = cut_or_reason(net, "c.2", example_shape=SHAPE, forward=nn.Module.__call__)
    assert isinstance(found, Cut)
    parts = segments(net, example_shape=SHAPE)
    assert isinstance(parts, Segments)
    x = pictures()
    with torch.no_grad():
        assert torch.equal(found.suffix.eval_graph(found.prefix(x)), net(x))
        assert torch.equal(found.suffix.train_graph(found.prefix(x)), net(x))
        assert torch.equal(parts(x), net(x))
