"""Heads from their spec: order, counts, initialisation, and the sigmoid output as two logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.errors import ModelError
from headstart.heads import BinaryLogits, create_head
from headstart.recipe import HeadSpec, HiddenLayer

D = 24

BY_HAND = {
    "GAP-BN-Dropout-Dense": (
        HeadSpec(batchnorm=True, dropout=0.2),
        5,
        lambda: [nn.BatchNorm1d(D), nn.Dropout(0.2), nn.Linear(D, 5)],
    ),
    "GAP-Dense-BN-Dense-Dense": (
        HeadSpec(hidden=(HiddenLayer(16, batchnorm="after"), HiddenLayer(8, activation="gelu"))),
        3,
        lambda: [
            *(nn.Linear(D, 16), nn.ReLU(), nn.BatchNorm1d(16)),
            *(nn.Linear(16, 8), nn.GELU()),
            nn.Linear(8, 3),
        ],
    ),
    "BN before the activation": (
        HeadSpec(hidden=(HiddenLayer(16, batchnorm="before", dropout=0.1),)),
        2,
        lambda: [nn.Linear(D, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)],
    ),
    "Flatten-Dense(linear)-Dropout-sigmoid": (
        HeadSpec(pool="flatten", hidden=(HiddenLayer(256, activation="none"),), dropout=0.5, output="sigmoid"),
        2,
        lambda: [nn.Linear(D, 256), nn.Dropout(0.5), nn.Linear(256, 1), BinaryLogits()],
    ),
    "Dense": (HeadSpec(), 7, lambda: [nn.Linear(D, 7)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_spec_builds_what_is_written_by_hand(name: str) -> None:
    spec, classes, parts = BY_HAND[name]
    head, hand = create_head(spec, D, classes), nn.Sequential(*parts())
    assert [type(m) for m in head] == [type(m) for m in hand]
    assert [p.shape for p in head.parameters()] == [p.shape for p in hand.parameters()]
    assert [m.p for m in head if isinstance(m, nn.Dropout)] == [m.p for m in hand if isinstance(m, nn.Dropout)]
    # With the same numbers in it, it is the same function, in training mode too.
    hand.load_state_dict(dict(zip(hand.state_dict(), head.state_dict().values(), strict=True)))
    x = torch.randn(6, D)
    outputs = []
    for module in (head.train(), hand.train()):
        torch.manual_seed(0)
        outputs.append(module(x))
    assert outputs[0].shape == (6, classes)
    assert torch.equal(*outputs)


def test_names_can_be_read() -> None:
    spec = HeadSpec(batchnorm=True, dropout=0.1, hidden=(HiddenLayer(4, batchnorm="before", dropout=0.1),))
    names = [n for n, _ in create_head(spec, D, 3).named_children()]
    assert names == ["norm", "hidden1", "hidden1_norm", "hidden1_relu", "hidden1_dropout", "dropout", "classifier"]


def test_last_layer_is_xavier_uniform_with_zero_bias() -> None:
    torch.manual_seed(0)
    last = create_head(HeadSpec(hidden=(HiddenLayer(8),)), D, 500)[-1]
    bound = (6 / (8 + 500)) ** 0.5
    assert last.weight.abs().max() <= bound
    assert last.weight.abs().max() > 0.98 * bound  # uniform to the edge, unlike PyTorch's own initialisation
    assert last.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not last.bias.any()


def test_sigmoid_is_binary_cross_entropy() -> None:
    head = create_head(HeadSpec(output="sigmoid"), D, 2)
    x, labels = torch.randn(9, D), torch.randint(0, 2, (9,))
    z = head.classifier(x)[:, 0]
    logits = head(x)
    assert logits.shape == (9, 2)
    torch.testing.assert_close(logits.softmax(1)[:, 1], z.sigmoid())
    torch.testing.assert_close(
        nn.functional.cross_entropy(logits, labels), nn.functional.binary_cross_entropy_with_logits(z, labels.float())
    )


def test_sigmoid_is_for_two_classes() -> None:
    with pytest.raises(ModelError, match=r"two classes; there are 3. Use output='softmax'"):
        create_head(HeadSpec(output="sigmoid"), D, 3)


def test_one_class_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to tell apart"):
        create_head(HeadSpec(), D, 1)
