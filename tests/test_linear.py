"""The head in closed form and by L-BFGS: what scikit-learn finds, never worse than what it starts from, and quick."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

import headstart
from headstart import (
    Classifier,
    HeadSpec,
    HiddenLayer,
    Recipe,
    RecipeError,
    Stage,
    create_classifier,
    fine_tune,
    load_images,
    make_runtime,
    split,
)
from headstart.attempt import Attempt
from headstart.errors import ModelError
from headstart.evaluation import Score
from headstart.features import FeatureSource, StageData
from headstart.freezing import set_freeze_line
from headstart.linear import PENALTIES, fit_ridge
from headstart.train import fit
from tiny import SPEC, TinyNet

CPU = make_runtime(device="cpu", precision="fp32", workers=1)


def made(n: int, d: int = 8, views: int = 1, seed: int = 0) -> FeatureSource:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.randn(3, d, generator=torch.Generator().manual_seed(9))
    x = centres[labels][:, None] + 1.5 * torch.randn(n, views, d, generator=g)
    return FeatureSource(x * torch.linspace(0.1, 30, d) + 5, labels)


def model_of(spec: HeadSpec | None = None) -> Classifier:
    model = create_classifier(TinyNet(), ["a", "b", "c"], data_spec=SPEC, head=spec)
    set_freeze_line(model, "head")
    return model


DATA = StageData(made(60, views=2), made(30, seed=1))
RIDGE = Stage(epochs=1, warm_start="ridge", lr_scale=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 8), (20, 40)])
def test_ridge_is_that_of_scikit_learn(n: int, d: int) -> None:
    train, val = made(n, d), made(30, d, seed=1)
    x, val_x = train.features[:, 0], val.features[:, 0]
    found = fit_ridge(x, train.labels, val_x, val.labels, 3)
    assert found.penalty in PENALTIES
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    z = ((x - mean) / std).numpy()
    reference = Ridge(alpha=found.penalty * n).fit(z, 2.0 * np.eye(3)[train.labels] - 1)
    expected = torch.from_numpy(reference.predict(((val_x - mean) / std).numpy()))
    logits = val_x @ found.weight.T + found.bias
    scale = float((logits * expected).sum() / (expected * expected).sum())  # one positive number for all logits
    assert scale > 0
    torch.testing.assert_close(logits, (scale * expected).float(), rtol=2e-3, atol=2e-3)
    assert float(torch.nn.functional.cross_entropy(logits, val.labels)) == pytest.approx(found.loss, rel=1e-3)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    train, val = made(40), made(20, seed=1)
    for source in (train, val):
        source.features[..., 3] = 7.0
    found = fit_ridge(train.features[:, 0], train.labels, val.features[:, 0], val.labels, 3)
    assert torch.isfinite(found.weight).all()
    assert found.loss < 1.0


def test_a_stage_starts_from_ridge_and_says_so() -> None:
    model = model_of()
    result = fit(model, DATA, RIDGE, lr=1e-9, runtime=CPU)
    first = result.history[0]
    assert first["event"]["kind"] == "warm-start"
    assert first["val"]["loss"] == pytest.approx(result.best.loss, rel=1e-3)
    cold = fit(model_of(), DATA, replace(RIDGE, warm_start="none"), lr=1e-9, runtime=CPU)
    assert result.best.loss < 0.7 * cold.best.loss


def test_a_stage_that_is_stopped_at_the_ridge_leaves_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scored = model_of(), Attempt.score_val
    before = model.head.state_dict()["classifier.weight"].clone()

    def stopped(run: Attempt, limit: int | None = None) -> Score:
        if not torch.equal(model.head.state_dict()["classifier.weight"], before):
            raise KeyboardInterrupt
        return scored(run, limit)

    monkeypatch.setattr(Attempt, "score_val", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(model, DATA, RIDGE, lr=1e-9, runtime=CPU)
    assert torch.equal(model.head.state_dict()["classifier.weight"], before)


def test_a_better_head_is_not_given_up_for_ridge() -> None:
    model = model_of()
    stage = Stage(epochs=20, optimizer="lbfgs", weight_decay=0.0, warm_start="ridge")
    trained = fit(model, StageData(DATA.val, DATA.val), stage, lr=1.0, runtime=CPU)
    ridge = fit(model_of(), DATA, RIDGE, lr=1e-9, runtime=CPU)
    assert trained.best.loss < ridge.best.loss
    before = model.head.state_dict()["classifier.weight"].clone()
    again = fit(model, DATA, RIDGE, lr=1e-9, runtime=CPU)
    assert again.history[0]["val"]["loss"] == trained.best.loss
    assert "which it had" in again.history[0]["event"]["message"]
    assert torch.allclose(model.head.state_dict()["classifier.weight"], before)


def test_lbfgs_reaches_the_minimum_that_scikit_learn_reaches() -> None:
    model, decay = model_of(), 0.05
    x, labels = DATA.train.features.flatten(0, 1), DATA.train.labels.repeat_interleave(2)  # type: ignore[attr-defined]
    stage = Stage(epochs=60, optimizer="lbfgs", weight_decay=decay)
    result = fit(model, StageData(DATA.train, DATA.train), stage, lr=1.0, runtime=CPU)
    reference = LogisticRegression(C=1 / (decay * len(x)), max_iter=5000, tol=1e-8).fit(x.numpy(), labels.numpy())

    def objective(weight: Tensor, bias: Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, labels)
        return float((loss + decay / 2 * weight.square().sum()).detach())

    best = objective(*(torch.from_numpy(part).double() for part in (reference.coef_, reference.intercept_)))
    losses = [record["train_loss"] for record in result.history[1:]]
    assert losses[-1] <= losses[0]
    layer = model.head.classifier
    # The kept epoch is the best by plain loss; the minimum itself is of loss and penalty together.
    assert objective(layer.weight.double(), layer.bias.double()) == pytest.approx(best, rel=0.05)


def test_two_thousand_by_1280_takes_well_under_a_second_of_processor_time() -> None:
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2000, 1280, generator=g), torch.arange(2000) % 5
    started = time.process_time()
    fit_ridge(x, labels, x[:300], labels[:300], 5)
    assert time.process_time() - started < 3  # 0.5 s measured; the bound is for machines under load


@pytest.mark.parametrize("stage", [RIDGE, Stage(optimizer="lbfgs")])
def test_it_is_refused_where_it_cannot_be_done(stage: Stage) -> None:
    for spec in (HeadSpec(hidden=(HiddenLayer(4),)), HeadSpec(batchnorm=True), HeadSpec(dropout=0.2)):
        with pytest.raises(ModelError, match="one Linear alone"):
            fit(model_of(spec), DATA, stage, lr=0.1, runtime=CPU)


@pytest.mark.parametrize("stage", [RIDGE, Stage(optimizer="lbfgs")])
def test_a_head_module_of_ones_own_is_looked_at_before_any_work(stage: Stage, photos: Path, tmp_path: Path) -> None:
    head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    recipe, splits = Recipe(stages=(stage,)), split(load_images(photos))
    (photos / "blue" / "torn.jpg").write_bytes(b"no picture")  # would be told, had pictures been read
    with pytest.raises(ModelError, match="one Linear alone"):
        fine_tune(photos, backbone=TinyNet(), data_spec=SPEC, head=head, recipe=recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    net = TinyNet()
    model = create_classifier(net, splits.class_names, data_spec=SPEC, head=head)
    set_freeze_line(model, "head")
    net.pictures = 0
    with pytest.raises(ModelError, match="one Linear alone"):
        headstart.fit(model, splits, stage, runtime=CPU, cache=False)
    assert net.pictures == 0


def test_no_schedule_is_noted_of_lbfgs_on_which_none_acts() -> None:
    result = fit(model_of(), DATA, Stage(epochs=4, optimizer="lbfgs"), lr=0.02, runtime=CPU)
    assert [record["lr"] for record in result.history] == [0.02] * 5


def test_lbfgs_ends_once_it_has_found_the_least_loss() -> None:
    stage = Stage(epochs=400, optimizer="lbfgs", weight_decay=0.05)
    result = fit(model_of(), DATA, stage, lr=1.0, runtime=CPU)
    assert 5 < result.epochs < 100
    assert result.history[-1]["event"]["message"] == f"L-BFGS has found the least loss after {result.epochs} epochs."
    losses = [record["train_loss"] for record in result.history[1:]]
    assert losses[-1] == pytest.approx(losses[-2], rel=1e-2)  # without the penalty, which is minimised too
    short = fit(model_of(), DATA, replace(stage, epochs=2), lr=1.0, runtime=CPU)
    assert short.epochs == 2
    assert short.history[-1]["event"] is None


def test_lbfgs_takes_no_options_of_batches() -> None:
    of_batches = ({"ema": 0.9}, {"mixup": 0.2}, {"accumulate": 2}, {"clip_norm": 1.0}, {"balanced_sampling": True})
    for options in (*of_batches, {"batch_size": 7}, {"schedule": "one-cycle"}, {"warmup": 0.3}):
        with pytest.raises(RecipeError, match="sees all pictures at once"):
            Stage(optimizer="lbfgs", **options)  # type: ignore[arg-type]
