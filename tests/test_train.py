"""The training loop, fed with made features and pictures: what it must hold whatever the model."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart import (
    HeadSpec,
    HiddenLayer,
    ModelError,
    RecipeError,
    Stage,
    create_classifier,
    make_runtime,
    set_freeze_line,
)
from headstart.attempt import Attempt
from headstart.averaging import snapshot
from headstart.classifier import Classifier
from headstart.evaluation import Score, score
from headstart.features import FeatureSource, Source, StageData
from headstart.schedule import batches_of_epoch, class_weight_vector, learning_rate, make_optimizer, views_of_epoch
from headstart.train import Progress, fit
from tiny import SPEC, TinyNet

CPU = make_runtime(device="cpu", precision="fp32", workers=1)


def made_features(n: int = 60, classes: int = 3, *, seed: int = 0, views: int = 2, noise: float = 0.3) -> FeatureSource:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.eye(classes, 8)
    features = centres[labels][:, None] + noise * torch.randn(n, views, 8, generator=g)
    return FeatureSource(features, labels)


def model_at(where: str = "head", *, head: HeadSpec | nn.Module | None = None, classes: int = 3) -> Classifier:
    names = [f"class{i}" for i in range(classes)]
    model = create_classifier(TinyNet(), names, head=head, data_spec=SPEC)
    set_freeze_line(model, where)
    return model


DATA = StageData(made_features(), made_features(seed=1, views=1))
QUICK = Stage(epochs=5, batch_size=16)


def test_training_lowers_the_validation_loss_and_reports_the_best_epoch() -> None:
    model = model_at()
    result = fit(model, DATA, QUICK, lr=0.05, runtime=CPU)
    losses = [r["val"]["loss"] for r in result.history]
    assert len(losses) == 6  # the state before the first step, then five epochs
    assert losses[-1] < 0.6 * losses[0]
    assert result.best.loss == min(losses) == losses[result.best_epoch]
    assert result.best.accuracy > 0.8


def test_the_model_ends_in_its_best_state_not_its_last() -> None:
    model = model_at()
    # A rate this high overshoots later on: the best epoch is not the last one.
    wild = Stage(epochs=12, batch_size=16, schedule="constant", weight_decay=0.0)
    noisy = StageData(made_features(n=30, noise=2.0), made_features(seed=1, views=1, noise=2.0))
    result = fit(model, noisy, wild, lr=0.5, runtime=CPU)
    assert result.best_epoch < result.epochs
    with torch.no_grad():
        logits = model.eval().head(noisy.val.batch(range(60), [0] * 60))
    assert nn.functional.cross_entropy(logits, noisy.val.labels).item() == pytest.approx(result.best.loss, rel=1e-5)


def test_the_last_epoch_is_kept_where_that_is_asked_for_whatever_its_score() -> None:
    wild = Stage(epochs=12, batch_size=16, schedule="constant", weight_decay=0.0, select="last")
    noisy = StageData(made_features(n=30, noise=2.0), made_features(seed=1, views=1, noise=2.0))
    model = model_at()
    shown: list[Tensor] = []
    result = fit(
        model,
        noisy,
        wild,
        lr=0.5,
        runtime=CPU,
        log=lambda _: shown.append(model.head.classifier.weight.detach().clone()),
    )
    losses = [record["val"]["loss"] for record in result.history]
    assert result.best_epoch == result.epochs == 12
    assert result.best.loss == losses[-1] > min(losses)
    assert torch.equal(model.head.classifier.weight, shown[-1])
    for beside in ({"early_stop": 3}, {"wise": True}):
        with pytest.raises(RecipeError, match="keeps the last epoch"):
            Stage(select="last", **beside)  # type: ignore[arg-type]


def test_a_stage_that_only_gets_worse_returns_what_it_started_from() -> None:
    model = model_at()
    fit(model, DATA, QUICK, lr=0.05, runtime=CPU)
    before = snapshot(model)
    result = fit(model, DATA, replace(QUICK, schedule="constant", epochs=2), lr=1e4, runtime=CPU)
    assert result.best_epoch == 0
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "rmsprop", "sgd"])
def test_every_optimizer_and_schedule_fits_one_batch(optimizer: str) -> None:
    for schedule in ("constant", "cosine", "one-cycle"):
        model = model_at()
        one = StageData(made_features(n=12, views=1), made_features(n=12, views=1))
        stage = Stage(epochs=40, batch_size=12, optimizer=optimizer, schedule=schedule, weight_decay=0.0, warmup=0.1)
        result = fit(model, one, stage, lr=0.5 if optimizer == "sgd" else 0.05, runtime=CPU)
        assert result.best.accuracy == 1.0, (optimizer, schedule)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    def run(seed: int) -> Tensor:
        model = model_at(head=HeadSpec(dropout=0.5))
        fit(model, DATA, QUICK, lr=0.05, seed=seed, runtime=CPU)
        return torch.cat([p.flatten() for p in model.head.parameters()])

    first = run(3)
    torch.rand(7)  # what the caller does with the global generator must not matter
    assert torch.equal(first, run(3))
    assert not torch.equal(first, run(4))


@pytest.mark.parametrize("class_weights", ["none", "balanced", (1.0, 5.0, 0.2)])
def test_accumulated_batches_are_one_large_batch(class_weights: str | tuple[float, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 13 + [1] * 7 + [2] * 3)  # 23 pictures: the last step is a short one
    data = StageData(FeatureSource(torch.randn(23, 1, 8, generator=g), labels), DATA.val)

    def run(batch_size: int, accumulate: int) -> Tensor:
        model = model_at()
        stage = Stage(
            epochs=2, batch_size=batch_size, accumulate=accumulate, optimizer="sgd", class_weights=class_weights,
            label_smoothing=0.1, schedule="constant",
        )  # fmt: skip
        last: list[Tensor] = []  # as the last step leaves it: the best state may be an earlier one
        fit(
            model, data, stage, lr=0.1, runtime=CPU,
            report=lambda _: last.append(torch.cat([p.detach().flatten() for p in model.head.parameters()])),
        )  # fmt: skip
        return last[-1]

    assert torch.allclose(run(12, 1), run(4, 3), atol=1e-6)
    assert not torch.allclose(run(12, 1), run(4, 1), atol=1e-6)


def test_the_training_loss_is_that_of_torch_with_weights_and_smoothing() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    data = StageData(FeatureSource(torch.randn(8, 1, 8), labels), DATA.val)
    model = model_at()
    stage = Stage(epochs=1, batch_size=8, class_weights="balanced", label_smoothing=0.2)
    weight = class_weight_vector(stage, labels, 3)
    assert weight is not None
    assert weight.tolist() == pytest.approx([8 / 15, 8 / 6, 8 / 3])
    with torch.no_grad():
        logits = model.head(data.train.batch(range(8), [0] * 8))
    expected = nn.functional.cross_entropy(logits, labels, weight=weight, label_smoothing=0.2).item()
    result = fit(model, data, stage, lr=0.01, runtime=CPU)
    assert result.history[1]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_selection_uses_the_plain_loss_whatever_the_training_loss_is() -> None:
    model = model_at()
    stage = replace(QUICK, label_smoothing=0.3, class_weights=(10.0, 1.0, 1.0))
    result = fit(model, DATA, stage, lr=0.05, runtime=CPU)
    with torch.no_grad():
        logits = model.eval().head(DATA.val.batch(range(60), [0] * 60))
    assert result.best.loss == pytest.approx(nn.functional.cross_entropy(logits, DATA.val.labels).item(), rel=1e-6)


def test_selection_by_accuracy_takes_the_most_accurate_epoch() -> None:
    noisy = StageData(made_features(n=30, noise=1.5), made_features(seed=1, views=1, noise=1.5))
    result = fit(model_at(), noisy, replace(QUICK, select="accuracy", epochs=15), lr=0.3, runtime=CPU)
    scores = [(r["val"]["accuracy"], -r["val"]["loss"]) for r in result.history]
    assert (result.best.accuracy, -result.best.loss) == max(scores) == scores[result.best_epoch]


def test_early_stopping_ends_the_stage_after_that_many_epochs_without_gain() -> None:
    noisy = StageData(made_features(n=30, noise=2.0), made_features(seed=1, views=1, noise=2.0))
    stage = Stage(epochs=100, batch_size=16, schedule="constant", early_stop=3)
    result = fit(model_at(), noisy, stage, lr=0.3, runtime=CPU)
    assert result.epochs == result.best_epoch + 3 < 100
    assert [event["kind"] for event in result.events] == ["early-stop"]


class TestCollapse:
    """A rate that wrecks a trained head is noticed in the first steps."""

    STAGE = Stage(name="fine-tune", epochs=6, batch_size=8, schedule="constant", on_collapse="retry")

    def trained(self) -> Classifier:
        model = model_at()
        fit(model, DATA, QUICK, lr=0.05, runtime=CPU)
        return model

    def test_retry_rolls_back_and_goes_on_at_a_tenth(self) -> None:
        model = self.trained()
        entry = fit(self.trained(), DATA, replace(QUICK, epochs=1), lr=1e-9, runtime=CPU).history[0]["val"]["loss"]
        result = fit(model, DATA, replace(self.STAGE, lr_scale=0.5), lr=30.0, runtime=CPU, starts_trained=True)
        kinds = [event["kind"] for event in result.events]
        assert set(kinds) == {"rollback"}
        assert result.lr == pytest.approx(30.0 / 10 ** len(kinds))
        assert result.best.loss <= entry
        message = result.events[0]["message"]
        assert "wrecked the trained head" in message
        assert "retrying at 3. To begin there, lower the stage's lr_scale from 0.5 to 0.05." in message

    def test_stop_returns_the_state_before(self) -> None:
        model = self.trained()
        before = snapshot(model)
        result = fit(model, DATA, replace(self.STAGE, on_collapse="stop"), lr=30.0, runtime=CPU, starts_trained=True)
        assert [event["kind"] for event in result.events] == ["rollback"]
        assert result.events[0]["message"].endswith("To train this stage, lower its lr_scale below 1.")
        assert result.best_epoch == 0
        assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())

    def test_ignore_trains_on_and_still_returns_nothing_worse(self) -> None:
        model = self.trained()
        result = fit(model, DATA, replace(self.STAGE, on_collapse="ignore"), lr=30.0, runtime=CPU, starts_trained=True)
        assert result.events == []
        assert result.epochs == 6
        assert result.best.loss <= result.history[0]["val"]["loss"]

    def test_statistics_of_the_head_that_still_move_are_not_blamed_on_the_rate(self) -> None:
        model = model_at(head=HeadSpec(batchnorm=True))
        fit(model, DATA, QUICK, lr=0.05, runtime=CPU)
        moved = StageData(FeatureSource(DATA.train.features + 5.0, DATA.train.labels), DATA.val)
        result = fit(model, moved, self.STAGE, lr=1e-5, runtime=CPU, starts_trained=True)
        first, second = (event["message"] for event in result.events)
        assert "wrecked the trained head" in first
        assert "the rate is not what moves it, but the head's BatchNorm" in second
        assert "Going on at 1e-05 without the alarm" in second
        assert result.lr == pytest.approx(1e-5)
        assert result.epochs == self.STAGE.epochs

    def test_a_running_average_is_judged_where_there_is_one(self) -> None:
        def alarms(ema: float, lr: float) -> int:
            stage = replace(self.STAGE, on_collapse="stop", ema=ema)
            return len(fit(self.trained(), DATA, stage, lr=lr, runtime=CPU, starts_trained=True).events)

        assert alarms(ema=0.0, lr=13.0) == 1  # single steps go over the threshold
        assert alarms(ema=0.9, lr=13.0) == 0
        assert alarms(ema=0.9, lr=30.0) == 1

    @pytest.mark.parametrize(
        ("batch_size", "looks", "many"), [(3, 3, False), (6, 3, False), (9, 3, True), (20, 2, False)]
    )
    def test_the_alarm_looks_up_to_three_times_within_an_epoch_and_else_at_the_ends(
        self, batch_size: int, looks: int, many: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[int] = []

        def counted(model: Classifier, data: Source, *, indices: torch.Tensor, **how: Any) -> Score:
            seen.append(len(indices) if data is DATA.val else 0)
            return score(model, data, indices=indices, **how)

        model = self.trained()
        monkeypatch.setattr("headstart.attempt.score", counted)
        monkeypatch.setattr("headstart.alarm.PICTURES", 7)
        monkeypatch.setattr("headstart.alarm.TIMES", 1 if many else 100)
        fit(model, DATA, replace(self.STAGE, batch_size=batch_size), lr=1e-4, runtime=CPU, starts_trained=True)
        n = len(DATA.val.labels)
        within = [7] * looks
        second = [*within, n] if many else [n]
        assert [count for count in seen if count] == [n, 7, *within, n, *second] + [n] * (self.STAGE.epochs - 2)

    def test_no_alarm_at_a_sensible_rate_or_for_an_untrained_head(self) -> None:
        assert fit(self.trained(), DATA, self.STAGE, lr=1e-3, runtime=CPU, starts_trained=True).events == []
        assert fit(model_at(), DATA, self.STAGE, lr=30.0, runtime=CPU).events == []


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_rate() -> None:
    with pytest.raises(ModelError, match=r"rate of 1e\+38 .*not a finite number"):
        fit(model_at(), DATA, replace(QUICK, optimizer="sgd", schedule="constant"), lr=1e38, runtime=CPU)


def test_weights_that_are_not_finite_are_an_error_though_the_loss_is() -> None:
    model = model_at("all")

    def ruin(at: Progress) -> None:
        if at.step == 5:
            with torch.no_grad():
                model.backbone.block.weight.fill_(float("nan"))

    with pytest.raises(ModelError, match=r"rate of 0\.05 .*not a finite number"):
        fit(model, DATA, QUICK, lr=0.05, runtime=CPU, report=ruin)
    assert model.backbone.block.weight.isfinite().all()  # the best state so far


def test_requires_grad_changed_behind_our_back_is_named() -> None:
    model = model_at()

    def meddle(_: object) -> None:
        model.backbone.block.weight.requires_grad_(True)

    with pytest.raises(ModelError, match=r"requires_grad was changed.*backbone\.block\.weight"):
        fit(model, DATA, QUICK, lr=0.05, runtime=CPU, report=meddle)


def test_an_interrupt_leaves_the_best_state_so_far() -> None:
    model = model_at()
    seen: list[dict[str, Tensor]] = []

    def log(record: dict[str, object]) -> None:
        if record["best"]:
            seen.append(snapshot(model))
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, DATA, QUICK, lr=0.05, runtime=CPU, log=log)
    assert len(seen) == 4
    assert all(torch.equal(value, seen[-1][name]) for name, value in snapshot(model).items())


def test_a_last_batch_of_one_is_joined_to_the_one_before() -> None:
    labels = torch.zeros(33, dtype=torch.int64)
    sizes = [len(b) for b in batches_of_epoch(33, labels, Stage(batch_size=8), seed=0, epoch=1)]
    assert sizes == [8, 8, 8, 9]
    head = HeadSpec(hidden=(HiddenLayer(width=4, batchnorm="after"),))
    data = StageData(made_features(n=33), DATA.val)
    model = model_at(head=head)
    fit(model, data, Stage(epochs=1, batch_size=8), lr=0.01, runtime=CPU)  # BatchNorm would raise on a batch of one
    assert int(model.head.hidden1_norm.num_batches_tracked) == 4


def test_each_epoch_holds_every_picture_once_in_an_order_of_its_own() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    epochs = [torch.cat(batches_of_epoch(50, labels, Stage(batch_size=8), seed=5, epoch=e)) for e in (1, 2, 1)]
    assert all(sorted(e.tolist()) == list(range(50)) for e in epochs)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_balanced_sampling_shows_every_class_equally_often() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    stage = Stage(batch_size=100, balanced_sampling=True)
    drawn = torch.cat([torch.cat(batches_of_epoch(1000, labels, stage, seed=0, epoch=e)) for e in range(1, 6)])
    assert torch.bincount(labels[drawn]) / 5000 == pytest.approx([1 / 3] * 3, abs=0.03)


def test_views_take_turns_and_every_stored_view_is_used() -> None:
    indices = torch.arange(6)
    seen = torch.stack([views_of_epoch(indices, 3, epoch=e) for e in (1, 2, 3)])
    assert all(sorted(column.tolist()) == [0, 1, 2] for column in seen.T)
    assert views_of_epoch(indices, None, epoch=7).tolist() == [7] * 6
    assert views_of_epoch(indices, 1, epoch=7).tolist() == [0] * 6


def test_learning_rate_schedules() -> None:
    def rates(schedule: str, warmup: float = 0.0) -> list[float]:
        return [learning_rate(s, steps=10, lr=1.0, schedule=schedule, warmup=warmup) for s in range(10)]

    assert rates("constant") == [1.0] * 10
    assert rates("cosine")[0] == 1.0
    assert rates("cosine")[5] == pytest.approx(0.5)
    assert 0 < rates("cosine")[9] < 0.03
    assert rates("constant", 0.4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    one = rates("one-cycle")
    assert learning_rate(0, steps=1, lr=1.0, schedule="one-cycle", warmup=0.0) == 1.0
    assert one[0] == pytest.approx(1 / 25)
    assert max(one) == one[3] == 1.0
    assert one[9] < 0.06


def test_weight_decay_is_decoupled_and_spares_biases() -> None:
    model = model_at()
    with torch.no_grad():
        model.head.classifier.bias.fill_(1.0)
    before = model.head.classifier.weight.detach().clone()
    # Features of zero: the gradient of the weight is zero, so only decay moves it; Adam must not rescale it.
    zero = StageData(FeatureSource(torch.zeros(8, 1, 8), torch.arange(8) % 3), DATA.val)
    stage = Stage(epochs=1, batch_size=8, weight_decay=0.5, schedule="constant")
    weights = []
    fit(
        model,
        zero,
        stage,
        lr=0.1,
        runtime=CPU,
        report=lambda _: weights.append(model.head.classifier.weight.detach().clone()),
    )
    assert torch.allclose(weights[0], before * (1 - 0.1 * 0.5))


def test_the_head_multiplier_sets_the_head_rate_apart() -> None:
    model = model_at("all")
    optimizer = make_optimizer(model, Stage(head_lr_multiplier=10.0), lr=0.01)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert {name: rate for name, rate in rates.items() if name.startswith("head")} == pytest.approx(
        {"head": 0.1, "head, no decay": 0.1}
    )
    assert rates["backbone"] == pytest.approx(0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_sgd_steps_as_torchs_own_with_that_momentum(momentum: float) -> None:
    decay = 0.1 if momentum == 0 else 0.0  # plain SGD alone is the same with decay in the gradient and beside it
    stage = Stage(
        epochs=4, batch_size=60, optimizer="sgd", momentum=momentum, schedule="constant", weight_decay=decay
    )  # fmt: skip
    whole = StageData(made_features(views=1), made_features(seed=1, views=1))
    model = model_at()
    twin = nn.Linear(8, 3)
    twin.load_state_dict({name.removeprefix("classifier."): value for name, value in model.head.state_dict().items()})
    torchs = torch.optim.SGD(
        [{"params": twin.weight, "weight_decay": decay}, {"params": twin.bias}], lr=0.2, momentum=momentum
    )
    moved: list[Tensor] = []
    fit(
        model, whole, stage, lr=0.2, runtime=CPU,
        report=lambda _: moved.append(model.head.classifier.weight.detach().clone()),
    )  # fmt: skip
    for weight in moved:
        torchs.zero_grad()
        nn.functional.cross_entropy(twin(whole.train.features[:, 0]), whole.train.labels).backward()
        torchs.step()
        assert torch.allclose(weight, twin.weight, atol=1e-6)
    assert len(moved) == 4


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_optimisers_are_fused(optimizer: str) -> None:
    assert make_optimizer(model_at(), Stage(optimizer=optimizer), lr=0.1).defaults["fused"] is True


def test_momentum_is_refused_where_it_would_do_nothing() -> None:
    assert Stage(optimizer="sgd", momentum=0).momentum == 0
    for optimizer in ("adamw", "adam", "rmsprop", "lbfgs"):
        with pytest.raises(RecipeError, match="takes none"):
            Stage(optimizer=optimizer, momentum=0.5)
    for wrong in (-0.1, 1.0, True):
        with pytest.raises(RecipeError, match="momentum is"):
            Stage(optimizer="sgd", momentum=wrong)


def test_class_weights_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ModelError, match="2 numbers for 3 classes"):
        fit(model_at(), DATA, replace(QUICK, class_weights=(1.0, 2.0)), lr=0.1, runtime=CPU)


def test_gradients_are_clipped_to_the_norm_given() -> None:
    model = model_at()
    before = snapshot(model)
    stage = Stage(epochs=1, batch_size=60, optimizer="sgd", schedule="constant", weight_decay=0.0, clip_norm=0.01)
    moved: list[float] = []

    def measure(_: object) -> None:
        after = snapshot(model)
        moved.append(math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in after)))

    fit(model, DATA, stage, lr=1.0, runtime=CPU, report=measure)
    assert moved[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("validation", "scored"), [(20, 100), (160, 160), (400, 256)])
def test_training_pictures_that_layers_run_for_are_scored_in_proportion_to_validation(
    validation: int, scored: int
) -> None:
    stored, val = made_features(), SimpleNamespace(labels=torch.zeros(validation))
    through_layers = SimpleNamespace(labels=torch.zeros(1000))
    for train, expected in ((stored, 256), (through_layers, scored)):
        run = SimpleNamespace(data=SimpleNamespace(train=train, val=val))
        assert Attempt._train_scored(run) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("starts_trained", [False, True])
def test_features_that_are_no_numbers_are_not_blamed_on_the_rate(starts_trained: bool) -> None:
    assert isinstance(DATA.val, FeatureSource)
    nothing = FeatureSource(torch.full_like(DATA.val.features, math.nan), DATA.val.labels)
    with pytest.raises(ModelError, match=r"validation loss is nan before the first step: the backbone gives NaN"):
        fit(model_at(), StageData(DATA.train, nothing), QUICK, lr=0.05, runtime=CPU, starts_trained=starts_trained)
