"""The running average and the mixture with the start: what they do to the weights that a stage ends with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart import HeadSpec, HiddenLayer, Stage, set_freeze_line
from headstart.averaging import RunningAverage, mixture, restore, snapshot, trained_tensors
from headstart.classifier import Classifier
from headstart.contract import fixed_tensors
from headstart.evaluation import score
from headstart.features import FeatureSource, StageData
from headstart.train import fit
from test_train import CPU, DATA, QUICK, made_features, model_at

NORMED = HeadSpec(hidden=(HiddenLayer(width=6, batchnorm="after"),), batchnorm=True)
NOISY = StageData(made_features(n=30, noise=2.0), made_features(seed=1, views=1, noise=2.0))
RESTLESS = Stage(epochs=6, batch_size=8, schedule="constant", weight_decay=0.0)


def weights_after_each_step(model: Classifier, stage: Stage, data: StageData = DATA) -> list[dict[str, Tensor]]:
    """What the stage trains, as each optimiser step leaves it."""
    seen: list[dict[str, Tensor]] = []
    fit(model, data, stage, lr=0.05, runtime=CPU, report=lambda _: seen.append(snapshot(model)))
    return seen


class TestRunningAverage:
    def test_it_is_the_mean_written_out_by_hand(self) -> None:
        model = model_at(head=NORMED)
        average = RunningAverage(model, 0.5)
        expected = snapshot(model)
        for step in range(1, 12):
            for tensor in trained_tensors(model).values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape))
            average.update()
            decay = min(0.5, (1 + step) / (10 + step))
            now = snapshot(model)
            expected = {n: e * decay + now[n] * (1 - decay) for n, e in expected.items() if e.is_floating_point()}
        raw = snapshot(model)
        with average.applied():
            held = snapshot(model)
        assert all(torch.allclose(held[name], value, atol=1e-6) for name, value in expected.items())
        assert not torch.allclose(held["head.classifier.weight"], raw["head.classifier.weight"], atol=1e-3)
        assert all(torch.equal(value, raw[name]) for name, value in snapshot(model).items())

    def test_a_mask_of_infinite_values_does_not_spoil_it(self) -> None:
        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.classifier = nn.Linear(8, 3)
                self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

            def forward(self, x: Tensor) -> Tensor:
                return self.classifier(x) @ self.mask.softmax(-1)  # type: ignore[no-any-return]

        model = model_at(head=Masked())
        set_freeze_line(model, "head")
        found = fit(model, NOISY, replace(RESTLESS, ema=0.9, wise=True), lr=0.05, runtime=CPU)
        assert found.best.loss < found.history[0]["val"]["loss"]
        mask = torch.full((3, 3), float("-inf")).triu(1)
        assert torch.equal(model.head.mask, mask)
        assert torch.equal(mixture({"mask": mask}, {"mask": mask}, 0.5)["mask"], mask)

    def test_a_constant_stays_the_same_to_the_bit(self) -> None:
        model = model_at()
        with torch.no_grad():
            model.head.classifier.weight.copy_(torch.randn_like(model.head.classifier.weight) / 3)
        before = snapshot(model)
        average = RunningAverage(model, 0.999)
        for _ in range(50):
            average.update()
        with average.applied():
            assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())

    def test_training_goes_on_from_the_weights_themselves(self) -> None:
        plain = weights_after_each_step(model_at(head=NORMED), QUICK)
        averaged = weights_after_each_step(model_at(head=NORMED), replace(QUICK, ema=0.9))
        assert len(plain) == len(averaged) == 20
        assert all(torch.equal(a[n], b[n]) for a, b in zip(plain, averaged, strict=True) for n in a)

    def test_the_average_is_scored_and_kept(self) -> None:
        model = model_at(head=NORMED)
        seen: list[dict[str, Tensor]] = []
        stage = replace(QUICK, ema=0.9)
        result = fit(model, DATA, stage, lr=0.05, runtime=CPU, report=lambda _: seen.append(snapshot(model)))
        assert result.best_epoch == 5
        names = [n for n, t in seen[0].items() if t.is_floating_point()]
        start = snapshot(model_at(head=NORMED))
        expected = {n: start[n].clone() for n in names}
        for step, weights in enumerate(seen, 1):
            for n in names:
                expected[n].lerp_(weights[n], 1 - min(0.9, (1 + step) / (10 + step)))
        kept = snapshot(model)
        assert all(torch.equal(kept[n], expected[n]) for n in names)
        assert any(not torch.equal(kept[n], seen[-1][n]) for n in names)
        now = score(model, DATA.val, indices=torch.arange(60), runtime=CPU)
        assert now.loss == result.best.loss == result.history[-1]["val"]["loss"]

    def test_it_steadies_restless_weights(self) -> None:
        data = StageData(made_features(n=300, noise=1.0), made_features(n=300, seed=1, views=1, noise=1.0))
        plain = fit(model_at(), data, RESTLESS, lr=0.3, runtime=CPU)
        averaged = fit(model_at(), data, replace(RESTLESS, ema=0.95), lr=0.3, runtime=CPU)
        assert averaged.history[-1]["val"]["loss"] < 0.9 * plain.history[-1]["val"]["loss"]

    def test_what_is_frozen_is_not_held(self) -> None:
        model = model_at("block", head=NORMED)
        fixed = {name for name, _ in fixed_tensors(model)}
        held = set(trained_tensors(model))
        assert fixed
        assert not held & fixed
        assert {"backbone.block.weight", "head.norm.running_mean"} <= held
        before = {n: t.clone() for n, t in fixed_tensors(model)}
        average = RunningAverage(model, 0.9)
        average.update()
        with average.applied():
            assert all(torch.equal(t, before[n]) for n, t in fixed_tensors(model))


class TestWise:
    def wise_event(self, result: Any) -> dict[str, Any]:
        events = [event for event in result.events if event["kind"] == "wise"]
        assert len(events) == 1
        return events[0]

    def test_a_mixture_holds_statistics_too_and_its_ends_are_the_ends(self) -> None:
        start, end = snapshot(model_at(head=NORMED)), snapshot(model_at(head=NORMED))
        for name, value in end.items():
            end[name] = value + 2
        half = mixture(start, end, 0.5)
        assert set(half) == set(start)
        for name in ("head.classifier.weight", "head.norm.running_mean", "head.norm.running_var"):
            assert torch.allclose(half[name], start[name] + 1)
        assert torch.equal(half["head.norm.num_batches_tracked"], torch.tensor(2))
        assert all(torch.equal(value, end[name]) for name, value in mixture(start, end, 1.0).items())

    def test_a_middle_share_is_kept_where_it_is_best(self) -> None:
        model = model_at(head=NORMED)
        fit(model, NOISY, replace(QUICK, epochs=10), lr=0.02, runtime=CPU)
        start = snapshot(model)
        states: list[dict[str, Tensor]] = []
        stage = replace(RESTLESS, wise=True)
        result = fit(model, NOISY, stage, lr=0.1, runtime=CPU, log=lambda _: states.append(snapshot(model)))
        event = self.wise_event(result)
        assert 0 < event["alpha"] < 1
        assert result.best.loss < min(r["val"]["loss"] for r in result.history[:-1])
        assert score(model, NOISY.val, indices=torch.arange(60), runtime=CPU).loss == result.best.loss
        expected = mixture(start, states[event["epoch"]], event["alpha"])
        assert all(torch.equal(value, expected[name]) for name, value in snapshot(model).items())
        assert result.history[-1]["best"]
        assert result.history[-1]["epoch"] == stage.epochs + 1
        # No share of the grid, of the way to the best or to the last epoch, is better.
        best_epoch = min(range(1, 7), key=lambda e: result.history[e]["val"]["loss"])
        for epoch in {best_epoch, 6}:
            for share in (0.25, 0.5, 0.75):
                restore(model, mixture(start, states[epoch], share))
                assert score(model, NOISY.val, indices=torch.arange(60), runtime=CPU).loss >= result.best.loss

    def test_the_last_epoch_is_tried_where_no_epoch_beats_the_start(self) -> None:
        model = model_at()
        fit(model, NOISY, replace(QUICK, epochs=3), lr=0.02, runtime=CPU)
        result = fit(model, NOISY, replace(RESTLESS, epochs=3, wise=True), lr=0.4, runtime=CPU)
        assert all(r["val"]["loss"] > result.history[0]["val"]["loss"] for r in result.history[1:4])
        assert result.best.loss <= result.history[0]["val"]["loss"]
        assert self.wise_event(result)["epoch"] in (0, 3)

    def test_the_start_is_kept_to_the_bit_where_all_is_worse(self) -> None:
        model = model_at()
        fit(model, DATA, replace(QUICK, epochs=40), lr=0.05, runtime=CPU)
        before = snapshot(model)
        result = fit(model, DATA, replace(QUICK, wise=True, epochs=2, optimizer="sgd"), lr=1e4, runtime=CPU)
        assert self.wise_event(result)["alpha"] == 0.0
        assert result.best_epoch == 0
        assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())

    def test_accuracy_chooses_where_the_stage_says_so(self) -> None:
        model = model_at()
        fit(model, NOISY, replace(QUICK, epochs=2), lr=0.02, runtime=CPU)
        stage = replace(RESTLESS, wise=True, select="accuracy")
        result = fit(model, NOISY, stage, lr=0.2, runtime=CPU)
        assert result.best.accuracy == max(r["val"]["accuracy"] for r in result.history)

    def test_with_a_running_average_the_average_is_mixed(self) -> None:
        model = model_at()
        states: list[dict[str, Tensor]] = []
        stage = replace(RESTLESS, wise=True, ema=0.9)
        result = fit(model, NOISY, stage, lr=0.2, runtime=CPU, log=lambda _: states.append(snapshot(model)))
        event = self.wise_event(result)
        expected = mixture(states[0], states[event["epoch"]], event["alpha"]) if event["epoch"] else states[0]
        assert all(torch.equal(value, expected[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("option", [{"ema": 0.9}, {"wise": True}])
def test_a_line_in_the_middle_keeps_its_contract(option: dict[str, Any]) -> None:
    model = model_at("block", head=nn.Linear(8, 3))
    frozen = {n: t.clone() for n, t in fixed_tensors(model)}
    stage = Stage(name="top", freeze_line="block", epochs=2, batch_size=8, **option)
    pictures = torch.randint(0, 255, (12, 1, 3, 16, 16), dtype=torch.uint8)

    class Pictures(FeatureSource):
        def forward(self, model: Classifier, inputs: Tensor) -> Tensor:
            return model(inputs)  # type: ignore[no-any-return]

    source = Pictures(pictures, torch.arange(12) % 3)
    fit(model, StageData(source, source), stage, lr=0.01, runtime=CPU)  # checks the contract itself as well
    assert all(torch.equal(t, frozen[n]) for n, t in fixed_tensors(model))
    set_freeze_line(model, "all")
