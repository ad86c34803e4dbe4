"""Mixup and CutMix: what comes out of a batch, and the loss that goes with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headstart import ModelError, Recipe, Stage, fine_tune
from headstart.features import FeatureSource, StageData
from headstart.mixing import Mix, draw_mix, mix_inputs
from headstart.schedule import batches_of_epoch, class_weight_vector
from headstart.train import fit
from test_train import CPU, DATA, QUICK, model_at
from tiny import SPEC, TinyNet


def drawn(n: int, *, mixup: float = 0.0, cutmix: float = 0.0, count: int = 400) -> list[Mix]:
    mixes = [draw_mix(n, mixup=mixup, cutmix=cutmix, seed=(7, i)) for i in range(count)]
    return [mix for mix in mixes if mix]


def test_mixup_blends_every_picture_with_its_partner() -> None:
    pictures = torch.randint(0, 255, (5, 3, 4, 4), dtype=torch.uint8)
    mix = Mix(torch.tensor([1, 0, 3, 4, 2]), 0.7)
    mixed, share = mix_inputs(pictures, mix)
    assert share == 0.7
    for i, j in enumerate((1, 0, 3, 4, 2)):
        assert torch.allclose(mixed[i], 0.7 * pictures[i].float() + 0.3 * pictures[j].float(), atol=1e-4)


def test_cutmix_pastes_one_rectangle_and_counts_its_pixels() -> None:
    pictures = torch.stack([torch.zeros(3, 20, 12), torch.full((3, 20, 12), 200.0)]).to(torch.uint8)
    for mix in drawn(2, cutmix=1.0, count=100):
        mixed, share = mix_inputs(pictures, replace(mix, partners=torch.tensor([1, 0])))
        pasted = mixed[0] == 200
        assert torch.equal(pasted[0], pasted[1])
        assert torch.equal(~pasted, mixed[1] == 200)
        assert pasted.double().mean().item() == pytest.approx(1 - share)
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns)  # a rectangle without holes
    mixed, share = mix_inputs(pictures, Mix(torch.tensor([1, 0]), 0.75, (0.25, 0.25, 0.75, 0.75)))
    assert share == 0.75
    assert (mixed[0, 0, 5:15, 3:9] == 200).all()


def test_shares_follow_the_beta_distribution() -> None:
    for alpha in (0.2, 1.0, 5.0):
        shares = np.array([mix.share for mix in drawn(4, mixup=alpha)])
        assert shares.mean() == pytest.approx(0.5, abs=0.06)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def test_with_both_each_batch_takes_one_and_with_none_nothing_is_mixed() -> None:
    both = drawn(4, mixup=0.2, cutmix=1.0)
    assert sum(mix.box is not None for mix in both) / len(both) == pytest.approx(0.5, abs=0.08)
    assert all(mix.box is not None for mix in drawn(4, cutmix=1.0))
    assert all(mix.box is None for mix in drawn(4, mixup=1.0))
    assert all(sorted(mix.partners.tolist()) == [0, 1, 2, 3] for mix in both)
    assert drawn(4) == []


def test_the_loss_is_mixed_in_the_same_share_with_weights_and_smoothing() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    features = torch.randn(8, 1, 8)
    data = StageData(FeatureSource(features, labels), DATA.val)
    stage = Stage(epochs=1, batch_size=8, class_weights="balanced", label_smoothing=0.2, mixup=1.0)
    model = model_at()
    start = [p.detach().clone() for p in model.head.parameters()]
    result = fit(model, data, stage, lr=0.01, seed=3, runtime=CPU)
    mix = draw_mix(8, mixup=1.0, cutmix=0.0, seed=(3, 1, 2, 0, 0))
    assert mix is not None
    assert 0.01 < mix.share < 0.99
    (batch,) = batches_of_epoch(8, labels, stage, seed=3, epoch=1)
    x, y = features[batch, 0], labels[batch]
    logits = torch.lerp(x[mix.partners], x, mix.share) @ start[0].T + start[1]
    weight = class_weight_vector(stage, labels, 3)
    own, other = (
        nn.functional.cross_entropy(logits, t, weight=weight, label_smoothing=0.2).item() for t in (y, y[mix.partners])
    )
    expected = mix.share * own + (1 - mix.share) * other
    assert result.history[1]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_mixed_model_is_less_sure_and_its_validation_is_not_mixed() -> None:
    stage = replace(QUICK, epochs=60, batch_size=30)
    surest = []
    for mixup in (0.0, 1.0):
        model = model_at()
        result = fit(model, DATA, replace(stage, mixup=mixup), lr=0.1, runtime=CPU)
        assert result.best.accuracy > 0.9
        with torch.no_grad():
            logits = model.eval().head(DATA.val.batch(range(60), [0] * 60))
        assert result.best.loss == pytest.approx(nn.functional.cross_entropy(logits, DATA.val.labels).item(), rel=1e-6)
        surest.append(logits.softmax(1).max(1).values.mean().item())
    assert surest[1] < surest[0] - 0.05


def test_the_same_seed_mixes_the_same() -> None:
    def weights(seed: int) -> Tensor:
        model = model_at()
        fit(model, DATA, replace(QUICK, mixup=0.5), lr=0.05, seed=seed, runtime=CPU)
        return torch.cat([p.detach().flatten() for p in model.head.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("line", ["head", "block"])
def test_cutmix_behind_a_line_is_refused(line: str) -> None:
    model = model_at(line)
    with pytest.raises(ModelError, match=rf"cutmix is 1.*freeze line stands at '{line}'.*--cutmix 0,1"):
        fit(model, DATA, replace(QUICK, freeze_line=line, cutmix=1.0), lr=0.05, runtime=CPU)


def test_a_whole_run_refuses_cutmix_before_it_trains_and_says_what_mixup_mixes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = Stage(epochs=1, batch_size=8)
    top = Stage(name="top", freeze_line="block", epochs=1, batch_size=8, cutmix=1.0)
    for refused in ((head, top), (replace(head, cutmix=1.0),)):
        with pytest.raises(ModelError, match="cutmix"):
            fine_tune(photos, backbone=TinyNet(), data_spec=SPEC, recipe=Recipe(stages=refused), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    stages = (replace(head, mixup=0.2), replace(top, freeze_line="all", mixup=0.2))
    result = fine_tune(photos, backbone=TinyNet(), data_spec=SPEC, recipe=Recipe(stages=stages), progress=True)
    assert [s["name"] for s in result.metrics["stages"]] == ["head", "top"]
    assert capsys.readouterr().err.count("mixup blends what the frozen layers made of the pictures") == 1


def test_cutmix_on_pixels_trains() -> None:
    model = model_at("all")
    pictures = torch.randint(0, 255, (12, 1, 3, 16, 16), dtype=torch.uint8)

    class Pictures(FeatureSource):
        def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
            return model(inputs)  # type: ignore[no-any-return]

    source = Pictures(pictures, torch.arange(12) % 3)
    stage = Stage(name="all", freeze_line="all", epochs=2, batch_size=6, cutmix=1.0, mixup=0.2)
    result = fit(model, StageData(source, source), stage, lr=0.01, runtime=CPU)
    assert len(result.history) == 3
