"""Doing a thing twice, and going on from what was trained before: what a person expects, to the bit where possible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from headstart import (
    HeadSpec,
    HiddenLayer,
    ModelError,
    change_classes,
    create_classifier,
    load,
    new_head,
    save,
    set_freeze_line,
)
from headstart.classifier import Classifier
from headstart.features import StageData
from headstart.train import fit
from test_train import CPU, DATA, QUICK, made_features, model_at
from tiny import SPEC, TinyNet

PICTURES = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HIDDEN = HeadSpec(batchnorm=True, hidden=(HiddenLayer(5, batchnorm="after"),), dropout=0.1)


def trained(names: tuple[str, ...] = ("a", "b", "c"), head: HeadSpec | None = None) -> Classifier:
    """As if trained: no row, statistic or weight of the head is what it starts as."""
    model = create_classifier(TinyNet(), names, head=head, data_spec=SPEC)
    with torch.no_grad():
        for tensor in model.head.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return model


def logits(model: Classifier) -> Tensor:
    with torch.no_grad():
        return model.eval()(PICTURES)  # type: ignore[no-any-return]


def flags(model: Classifier) -> dict[str, bool]:
    model.train()
    return {n: p.requires_grad for n, p in model.named_parameters()} | {n: m.training for n, m in model.named_modules()}


class TestTwice:
    def test_a_new_head_twice_is_a_new_head_once(self) -> None:
        once = new_head(trained(), ("x", "y"), head=HIDDEN, seed=3)
        state = {n: t.clone() for n, t in once.state_dict().items()}
        twice = new_head(new_head(trained(), ("x", "y"), seed=9), ("x", "y"), head=HIDDEN, seed=3)
        assert twice.class_names == once.class_names == ("x", "y")
        assert twice.head_spec == once.head_spec
        assert all(torch.equal(value, state[name]) for name, value in twice.state_dict().items())
        assert list(twice.state_dict()) == list(state)  # no head on a head

    def test_a_new_head_on_a_frozen_backbone_freezes_nothing(self) -> None:
        model = trained()
        set_freeze_line(model, "head")
        fresh = new_head(model, ("a", "b", "c"))
        assert flags(fresh) == flags(trained())
        assert fresh.freeze_line is None
        assert set_freeze_line(fresh, "head").frozen == ("stem", "norm", "block")

    def test_a_classifier_is_no_backbone(self) -> None:
        with pytest.raises(ModelError, match=r"whole classifier already.*new_head\(model, class_names\)"):
            create_classifier(trained(), ("a", "b"), data_spec=SPEC)

    @pytest.mark.parametrize("where", ["head", "block", "all"])
    def test_freezing_twice_is_freezing_once(self, where: str) -> None:
        once, twice, moved = trained(), trained(), trained()
        line = set_freeze_line(once, where)
        set_freeze_line(twice, where)
        assert set_freeze_line(twice, where) == line
        for other in ("all", "head", "norm"):
            set_freeze_line(moved, other, batchnorm="train")
        assert set_freeze_line(moved, where) == line
        assert flags(once) == flags(twice) == flags(moved)
        assert [id(m) for m in twice._kept_in_eval] == [id(m) for m in dict.fromkeys(twice._kept_in_eval)]

    def test_training_a_trained_model_again_starts_where_it_was_and_never_ends_worse(self) -> None:
        model = model_at()
        first = fit(model, DATA, QUICK, lr=0.05, runtime=CPU)
        set_freeze_line(model, "head")
        again = fit(model, DATA, QUICK, lr=0.05, runtime=CPU, starts_trained=True)
        assert again.history[0]["val"]["loss"] == first.best.loss
        assert again.best.loss <= first.best.loss


class TestChangeClasses:
    @pytest.mark.parametrize("head", [None, HIDDEN])
    def test_known_classes_keep_their_logits_to_the_bit_and_new_ones_get_rows(self, head: HeadSpec | None) -> None:
        before = logits(trained(head=head))
        model, handover = change_classes(trained(head=head), ("c", "new", "a"))
        assert (handover.kept, handover.new, handover.left_out) == (("c", "a"), ("new",), ("b",))
        after = logits(model)
        assert torch.equal(after[:, 0], before[:, 2])
        assert torch.equal(after[:, 2], before[:, 0])
        assert after[:, 1].abs().max() > 0
        assert model.class_names == ("c", "new", "a")
        assert not torch.equal(
            logits(change_classes(trained(head=head), ("c", "new", "a"), seed=5)[0])[:, 1], after[:, 1]
        )

    def test_the_same_classes_give_the_same_model(self) -> None:
        model, handover = change_classes(trained(head=HIDDEN), ("a", "b", "c"))
        assert handover.describe() == "the head goes on with its 3 classes"
        assert all(torch.equal(v, trained(head=HIDDEN).state_dict()[n]) for n, v in model.state_dict().items())
        again, _ = change_classes(model, ("a", "b", "c"))
        assert torch.equal(logits(again), logits(model))

    def test_classes_added_one_by_one_leave_every_row_that_was_there(self) -> None:
        model = trained(head=HIDDEN)
        before, rows = logits(model), dict(zip("abc", model.head.classifier.weight, strict=True))
        for names in (("a", "b", "c", "d"), ("a", "aa", "b", "c", "d"), ("a", "aa", "b", "c", "d")):
            model, handover = change_classes(model, names, seed=len(names))
            assert handover.left_out == ()
            now = dict(zip(names, model.head.classifier.weight, strict=True))
            assert all(torch.equal(now[name], row) for name, row in rows.items())
            rows = now
        assert torch.allclose(logits(model)[:, [0, 2, 3]], before, atol=1e-6)  # another width sums in another order

    def test_a_new_head_after_training_is_the_head_the_backbone_would_have_got_at_first(self) -> None:
        model = model_at()
        fresh = new_head(model_at(), ("x", "y"), seed=4).state_dict()
        fit(model, DATA, QUICK, lr=0.05, runtime=CPU)
        again = new_head(model, ("x", "y"), seed=4).state_dict()
        assert list(again) == list(fresh)
        assert all(torch.equal(value, fresh[name]) for name, value in again.items())

    def test_one_sigmoid_output_stays_one_or_becomes_a_softmax(self) -> None:
        two = HeadSpec(output="sigmoid")
        before = logits(trained(("a", "b"), two))
        swapped, _ = change_classes(trained(("a", "b"), two), ("b", "a"))
        assert swapped.head.classifier.out_features == 1
        difference = logits(swapped)[:, 1] - logits(swapped)[:, 0]
        assert torch.allclose(difference, before[:, 0] - before[:, 1], atol=1e-6)
        more, _ = change_classes(trained(("a", "b"), two), ("a", "b", "d"))
        assert more.head_spec == HeadSpec(output="softmax")
        assert torch.allclose(logits(more)[:, :2], before, atol=1e-6)

    def test_what_was_learned_is_still_known_when_a_class_is_added(self) -> None:
        model = model_at()
        fit(model, DATA, QUICK, lr=0.05, runtime=CPU)
        more, handover = change_classes(model, ("class0", "class1", "class2", "class3"))
        assert handover.describe() == "the head keeps 3 classes; new: class3"
        set_freeze_line(more, "head")
        four = StageData(made_features(80, 4), made_features(80, 4, seed=1, views=1))
        old = DATA.val.labels
        with torch.no_grad():
            known = more.eval().head(DATA.val.batch(range(60), [0] * 60))[:, :3].argmax(1)
        assert (known == old).double().mean() > 0.8
        result = fit(more, four, QUICK, lr=0.05, runtime=CPU, starts_trained=True)
        fresh = model_at(classes=4)
        scratch = fit(fresh, four, QUICK, lr=0.05, runtime=CPU)
        assert result.history[0]["val"]["accuracy"] > scratch.history[0]["val"]["accuracy"] + 0.2
        assert result.history[1]["val"]["loss"] < scratch.history[1]["val"]["loss"]

    def test_nothing_in_common_and_a_head_of_ones_own_are_refused(self) -> None:
        with pytest.raises(ModelError, match=r"None of these classes \(A, d\).*the model's \(a, b, c\).*--weights RUN"):
            change_classes(trained(), ("A", "d"))
        own = create_classifier(TinyNet(), ("a", "b"), head=torch.nn.Linear(8, 2), data_spec=SPEC)
        with pytest.raises(ModelError, match=r"module of your own.*new_head\(model, class_names, head=module\)"):
            change_classes(own, ("a", "b", "c"))

    def test_a_backbone_by_name_stays_loadable(self, tmp_path: Path) -> None:
        spec = HeadSpec(pool="avg", features_from="blocks.2", hidden=(HiddenLayer(4),))
        model = create_classifier("mobilenetv2_035", ("a", "b"), head=spec, weights="none", image_size=32)
        more, _ = change_classes(model, ("a", "b", "c"))
        save(more, tmp_path)
        again = load(tmp_path)
        x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            assert torch.equal(again(x), more.eval()(x))
        assert again.class_names == ("a", "b", "c")
        with pytest.raises(ModelError, match=r"built for pool 'avg' and features_from 'blocks.2'"):
            new_head(model, ("a", "b"), head=HeadSpec())
        assert new_head(model, ("x", "y")).head_spec == HeadSpec(pool="avg", features_from="blocks.2")
