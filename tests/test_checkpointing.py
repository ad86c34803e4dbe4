"""Checkpointing: the gradients of the plain pass, to the bit, from less memory."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from headstart import DataSpec, ImageTable, Stage, create_classifier, load_images, set_freeze_line
from headstart.averaging import snapshot
from headstart.checkpointing import Segments, best_places, segments
from headstart.classifier import Classifier
from headstart.features import ActivationSource, FeatureSource, PixelSource, Source, make_source
from headstart.gradients import Batch, Gradients, checkpointed
from headstart.pixels import Pixels
from headstart.runtime import make_runtime
from tiny import SPEC, TinyNet

CPU = make_runtime(device="cpu", precision="fp32", workers=1)
SMALL = DataSpec(image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0, fit="squash")


@pytest.fixture
def table(photos: Path) -> ImageTable:
    return load_images(photos)


def of_a_step(model: Classifier, source: Source, *, on: bool, n: int = 6) -> dict[str, Tensor]:
    """Gradients of one step by name, and what the step left in the buffers."""
    stage = Stage(name="x", freeze_line="all", checkpointing=on)
    gradients = Gradients(model, source, stage, runtime=CPU)
    model.train()
    torch.manual_seed(7)
    labels = source.labels[:n]
    with source.kernels(model, CPU):
        loss = gradients.add([Batch(source.batch(range(n), [0] * n), labels)], float(n))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found | {name: b.clone() for name, b in model.named_buffers()} | {"loss": loss}


def small_net(table: ImageTable, backbone: str, *, line: str, batchnorm: str = "fixed") -> Classifier:
    model = create_classifier(
        backbone, table.class_names, weights="none", data_spec=SMALL, drop_rate=0.3, drop_path_rate=0.3
    )
    set_freeze_line(model, line, batchnorm=batchnorm)
    return model


@pytest.mark.parametrize("batchnorm", ["fixed", "train"])
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "test_vit", "repvgg_a0", "xcit_nano_12_p16_224"])
def test_gradients_and_statistics_are_those_of_the_plain_pass(table: ImageTable, backbone: str, batchnorm: str) -> None:
    model = small_net(table, backbone, line="all", batchnorm=batchnorm)
    source, state = PixelSource(Pixels(table, SMALL, workers=1)), snapshot(model)
    plain = of_a_step(model, source, on=False)
    model.load_state_dict(state, strict=False)
    again = of_a_step(model, source, on=True)
    assert plain.keys() == again.keys()
    assert [name for name, value in plain.items() if not torch.equal(value, again[name])] == []
    assert len([name for name, value in plain.items() if value.abs().sum() > 0]) > 50


def test_statistics_of_any_norm_are_learned_once(table: ImageTable) -> None:
    class Instances(nn.Sequential):
        def __init__(self) -> None:
            blocks = ((nn.Conv2d(3, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True), nn.ReLU()) for _ in range(3))
            super().__init__(*(module for block in blocks for module in block), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    model = create_classifier(Instances(), table.class_names, data_spec=SMALL)
    set_freeze_line(model, "all", batchnorm="train")
    source, state = PixelSource(Pixels(table, SMALL, workers=1)), snapshot(model)
    plain = of_a_step(model, source, on=False)
    model.load_state_dict(state, strict=False)
    saving = of_a_step(model, source, on=True)
    assert not torch.equal(plain["backbone.1.running_var"], state["backbone.1.running_var"])
    for name, value in plain.items():  # up to rounding: cut into segments, a convolution may take another kernel
        torch.testing.assert_close(saving[name], value, rtol=1e-5, atol=1e-6)


def test_the_trained_rest_behind_stored_activations_takes_part(table: ImageTable) -> None:
    model = small_net(table, "mobilenetv3_small_050", line="blocks.3")
    pixels = Pixels(table, SMALL, workers=1)
    source = make_source(pixels, pixels, model, views=1, runtime=CPU).train
    assert isinstance(source, ActivationSource)
    plain, again = (of_a_step(model, source, on=on) for on in (False, True))
    assert [name for name, value in plain.items() if not torch.equal(value, again[name])] == []


def test_a_step_takes_less_memory(table: ImageTable) -> None:
    model = small_net(table, "mobilenetv3_small_050", line="all")
    source = PixelSource(Pixels(table, SMALL, workers=1))
    each = []
    for on in (False, True):
        gradients = Gradients(model, source, Stage(freeze_line="all", checkpointing=on), runtime=CPU)
        each.append(gradients.step_bytes(12) - gradients.step_bytes(6))  # without what is there once
    assert each[1] < 0.6 * each[0]


def test_a_transformer_is_divided_between_its_blocks() -> None:
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=0, drop_path_rate=0.3
    ).train()
    made = segments(net, example_shape=(3, 32, 32))
    assert isinstance(made, Segments)
    assert len(made.parts) > 4  # what a block gives goes into a LayerNorm, which writes into nothing
    x, found = torch.randn(4, 3, 32, 32), []
    for forward in (net, made):
        torch.manual_seed(7)
        forward(x).square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
        net.zero_grad(set_to_none=True)
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_what_cannot_be_recorded_keeps_its_activations_and_says_so(table: ImageTable) -> None:
    class Winding(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().float().mean()) < 1e9 else x.mean((2, 3))

    net = Winding()
    model = create_classifier(net, table.class_names, data_spec=SPEC)
    set_freeze_line(model, "all")
    gradients = Gradients(
        model, PixelSource(Pixels(table, SPEC, workers=1)), Stage(freeze_line="all", checkpointing=True), runtime=CPU
    )
    (event,) = gradients.portion.take()
    assert event["kind"] == "checkpointing"
    assert "Winding cannot be traced" in event["message"]
    assert gradients.step_bytes(2) > 0


def test_a_head_alone_has_nothing_to_divide() -> None:
    model = create_classifier(TinyNet(), ["a", "b"], data_spec=SPEC)
    source = FeatureSource(torch.randn(4, 1, 8), torch.tensor([0, 1, 0, 1]))
    assert checkpointed(source, model) == source.forward


def test_segments_are_run_again_for_the_backward_pass() -> None:
    class Counted(nn.Conv2d):  # a convolution is recorded as a call, not looked into
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    layers = [Counted(4, 4, 1) for _ in range(8)]
    net = nn.Sequential(*(layer for conv in layers for layer in (conv, nn.Tanh())))
    made = segments(net, example_shape=(4, 2, 2))
    assert isinstance(made, Segments)
    assert 1 < len(made.parts) < 16
    before = [layer.calls for layer in layers]
    made(torch.randn(3, 4, 2, 2)).sum().backward()
    calls = [layer.calls - was for layer, was in zip(layers, before, strict=True)]
    assert set(calls) <= {1, 2}  # a segment's last operation, whose result no gradient needs, may be left out
    assert sum(calls) > 8


def test_the_division_takes_least_memory_of_all_divisions() -> None:
    sizes, places = [5, 1, 9, 2, 7, 3, 8, 1, 4, 6], [1, 3, 5, 7, 8]

    def taken(division: tuple[int, ...]) -> int:
        points = [-1, *division, len(sizes) - 1]
        largest = max(sum(sizes[a + 1 : b + 1]) for a, b in pairwise(points))
        return sum(sizes[p] for p in division) + largest

    least = min(taken(c) for k in range(len(places) + 1) for c in combinations(places, k))
    assert taken(tuple(best_places(sizes, places))) == least
    assert best_places([3, 3], []) == []
