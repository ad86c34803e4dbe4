"""The contract: whatever breaks the freeze line during a stage is seen, and named."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from headstart.classifier import Classifier, create_classifier
from headstart.contract import Contract, tensors_digest
from headstart.errors import ModelError
from headstart.freezing import set_freeze_line
from headstart.rates import param_groups
from headstart.recipe import HeadSpec, HiddenLayer
from tiny import SPEC, TinyNet

HEAD = HeadSpec(batchnorm=True, hidden=(HiddenLayer(8),), dropout=0.1)


def stage(where: str = "block") -> tuple[Classifier, torch.optim.Optimizer]:
    model = create_classifier(TinyNet(), ("cat", "dog", "owl"), data_spec=SPEC, head=HEAD)
    set_freeze_line(model, where)
    return model, torch.optim.SGD(param_groups(model, lr=0.1), lr=0.1)


def test_optimiser_must_hold_what_is_trainable() -> None:
    model, _ = stage()
    with pytest.raises(
        ModelError, match=r"trainable but not in the optimiser: backbone.block.weight, backbone.block.bias"
    ):
        Contract(model, torch.optim.SGD(model.head.parameters(), lr=0.1))


def test_optimiser_must_not_hold_what_is_frozen() -> None:
    model, _ = stage()
    with pytest.raises(
        ModelError, match=r"in the optimiser but not trainable: backbone.stem.weight, .*backbone.norm.bias"
    ):
        Contract(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_optimiser_must_hold_it_once() -> None:
    model, _ = stage("head")
    parameters = [*model.head.parameters(), model.head.classifier.bias]
    with pytest.raises(ModelError, match=r"more than once: head.classifier.bias\."):
        Contract(model, torch.optim.SGD(parameters, lr=0.1))


def test_optimiser_of_another_model() -> None:
    model, optimizer = stage()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ModelError, match="of no part of the model: 1 tensors"):
        Contract(model, optimizer)


def test_a_stage_that_trains_nothing() -> None:
    model, optimizer = stage()
    with pytest.raises(ModelError, match="would train nothing"):
        Contract(model.requires_grad_(False), optimizer)


def test_trainable_in_front_of_the_line() -> None:
    model, _ = stage()
    model.backbone.stem.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"backbone.stem.weight .*in front of the freeze line"):
        Contract(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))


def test_less_may_be_trained_than_stands_behind_the_line() -> None:
    model, _ = stage()
    model.backbone.block.bias.requires_grad_(False)
    contract = Contract(model, torch.optim.SGD(param_groups(model, lr=0.1), lr=0.1))
    contract.watch()
    contract.finish()


@pytest.mark.parametrize(("name", "flag"), [("backbone.stem.weight", True), ("backbone.block.weight", False)])
def test_requires_grad_changed_behind_our_back(name: str, flag: bool) -> None:
    contract = Contract(*stage())
    contract.model.get_parameter(name).requires_grad_(flag)
    with pytest.raises(ModelError, match=f"requires_grad was changed after the optimiser was built: {name}"):
        contract.watch()


def test_line_moved_during_the_stage() -> None:
    contract = Contract(*stage())
    set_freeze_line(contract.model, "all")
    with pytest.raises(ModelError, match="freeze line was moved"):
        contract.watch()


def test_optimiser_changed_during_the_stage() -> None:
    contract = Contract(*stage())
    contract.optimizer.param_groups.pop()
    with pytest.raises(ModelError, match="trainable but not in the optimiser"):
        contract.watch()


def test_frozen_tensor_written_to() -> None:
    contract = Contract(*stage())
    with torch.no_grad():
        contract.model.backbone.stem.weight.mul_(1.0)
    with pytest.raises(ModelError, match=r"written to during the stage: backbone.stem.weight"):
        contract.watch()
    contract.finish()  # the values are the same


def test_statistics_behind_the_line_written_to() -> None:
    contract = Contract(*stage("all"))
    contract.model.backbone.norm.running_mean.add_(1)
    with pytest.raises(ModelError, match=r"written to during the stage: backbone.norm.running_mean"):
        contract.watch()
    with pytest.raises(
        ModelError, match=r"changed during the stage: backbone.norm.running_mean \(norm 0 -> 2.82842712\)"
    ):
        contract.finish()


def test_frozen_tensor_replaced() -> None:
    contract = Contract(*stage())
    stem = contract.model.backbone.stem
    stem.weight = nn.Parameter(stem.weight.detach().clone(), requires_grad=False)
    with pytest.raises(ModelError, match=r"replaced during the stage: backbone.stem.weight"):
        contract.watch()
    contract.finish()


def test_change_that_only_the_hash_can_see() -> None:
    contract = Contract(*stage())
    contract.model.backbone.stem.weight.data[0, 0, 0, 0] += 1e-3
    contract.watch()
    with pytest.raises(ModelError, match=r"changed during the stage: backbone.stem.weight \(norm"):
        contract.finish()


def test_modes_changed_behind_our_back_are_put_right() -> None:
    contract = Contract(*stage("head"))
    contract.model.backbone.train()
    contract.watch()
    assert not contract.model.backbone.norm.training


def test_watching_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = Contract(*stage())

    def items(_self: torch.Tensor) -> Iterator[float]:
        raise AssertionError("a tensor was read")

    for method in ("item", "tolist", "numpy", "cpu", "clone"):
        monkeypatch.setattr(torch.Tensor, method, items)
    contract.watch()


# ---------------------------------------------------------------- digests


def test_digest_sees_names_types_shapes_and_values() -> None:
    base = tensors_digest([("a", torch.zeros(4)), ("b", torch.ones(2))])
    assert base == tensors_digest([("a", torch.zeros(4)), ("b", torch.ones(2))])
    others = [
        [("a", torch.zeros(4)), ("c", torch.ones(2))],
        [("b", torch.ones(2)), ("a", torch.zeros(4))],
        [("a", torch.zeros(2, 2)), ("b", torch.ones(2))],
        [("a", torch.zeros(4, dtype=torch.int32)), ("b", torch.ones(2))],
        [("a", torch.zeros(4)), ("b", torch.tensor([1, math.nextafter(1, 2)]).double().float() * (1 + 2**-23))],
        [("a", -torch.zeros(4)), ("b", torch.ones(2))],  # minus zero is another bit pattern
    ]
    assert len({base, *(tensors_digest(o) for o in others)}) == len(others) + 1


@pytest.mark.parametrize("tensor", [
    torch.tensor(3),
    torch.zeros(0),
    torch.arange(6.0).reshape(2, 3).t(),
    torch.ones(3, dtype=torch.bfloat16),
    torch.tensor([True, False]),
    nn.Parameter(torch.ones(2)),
])  # fmt: skip
def test_digest_of_every_kind_of_tensor(tensor: torch.Tensor) -> None:
    digest = tensors_digest([("x", tensor)])
    assert digest == tensors_digest([("x", tensor.detach().clone())])
    assert len(digest) == 64
