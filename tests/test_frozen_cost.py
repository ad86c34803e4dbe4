"""What is frozen costs nothing in a step: no gradient, no state in the optimiser, nothing kept for a backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headstart import DataSpec, Stage, create_classifier, load_images, make_runtime, set_freeze_line
from headstart.backbones import backbone_output
from headstart.classifier import Classifier
from headstart.contract import fixed_tensors
from headstart.features import PixelSource, Source, make_source
from headstart.gradients import Batch, Gradients
from headstart.pixels import Pixels
from headstart.schedule import make_optimizer

CPU = make_runtime(device="cpu", precision="fp32", workers=1)
SPEC = DataSpec(image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0, fit="squash")


def step(model: Classifier, source: Source) -> tuple[torch.optim.Optimizer, list[int], list[Tensor]]:
    """One step of the loop: its optimiser, and what autograd kept for it (storages; those of weights apart)."""
    optimizer = make_optimizer(model, Stage(), lr=0.01)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.train()
    batch = Batch(source.batch(range(6), [0] * 6), source.labels[:6])
    gradients = Gradients(model, source, Stage(freeze_line="all"), runtime=CPU)
    with source.kernels(model, CPU), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gradients.add([batch], 6.0)
    optimizer.step()
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return optimizer, [p for p in kept if p in weights], [t for p, t in kept.items() if p not in weights]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("line", ["blocks.4", "blocks.2"])
def test_frozen_parts_cost_nothing_in_a_step(photos: Path, line: str, stored: bool) -> None:
    table = load_images(photos)
    model = create_classifier("mobilenetv3_small_050", table.class_names, weights="none", data_spec=SPEC)
    set_freeze_line(model, line)
    pixels = Pixels(table, SPEC, workers=1)
    source = make_source(pixels, pixels, model, views=1, runtime=CPU).train if stored else PixelSource(pixels)
    assert isinstance(source, PixelSource) is not stored
    optimizer, weights_kept, activations = step(model, source)

    frozen = {name for name, _ in fixed_tensors(model)}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert any(name in frozen for name in parameters)
    for name, parameter in parameters.items():
        is_frozen = name in frozen
        assert (parameter.grad is None) is is_frozen, name
        assert (id(parameter) in held) is not is_frozen, name
        assert (parameter in optimizer.state) is not is_frozen, name
    in_front = {t.untyped_storage().data_ptr() for n, t in model.named_parameters() if n in frozen}
    assert not in_front & set(weights_kept)

    from_store = make_source(pixels, pixels, model, views=1, runtime=CPU).train
    alone = sum(t.nbytes for t in step(model, from_store)[2])  # the trained rest and nothing else
    assert sum(t.nbytes for t in activations) == pytest.approx(alone, rel=0.05)
    set_freeze_line(model, "all")
    assert alone < 0.8 * sum(t.nbytes for t in step(model, PixelSource(pixels))[2])


def test_the_output_of_the_frozen_part_has_no_graph_behind_it(photos: Path) -> None:
    table = load_images(photos)
    model = create_classifier("mobilenetv3_small_050", table.class_names, weights="none", data_spec=SPEC)
    set_freeze_line(model, "blocks.4")
    seen: list[Tensor] = []
    blocks = model.backbone.get_submodule("blocks")
    assert isinstance(blocks, nn.Sequential)
    blocks[3].register_forward_hook(lambda _m, _args, out: seen.append(out))
    blocks[4].register_forward_hook(lambda _m, _args, out: seen.append(out))
    model.train()
    backbone_output(model.backbone, model.enter(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)), model.pool)
    assert [t.grad_fn is None and not t.requires_grad for t in seen] == [True, False]
