"""Averaging over views when predicting: the mean of the views' probabilities, whatever stands beside a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart import RecipeError, create_classifier, evaluate, load_images, predict_files, save
from headstart.classifier import Classifier
from headstart.cli import main
from headstart.evaluation import predict_logits, predict_probs, tta_views
from headstart.metrics import softmax
from headstart.pixels import Pixels
from headstart.recipe import POLICIES
from tiny import SPEC, TinyNet

NAMES = ("blue", "green", "red")


def model() -> Classifier:
    made = create_classifier(TinyNet(), NAMES, data_spec=SPEC).eval()
    made.head.classifier.weight.data.mul_(20)  # sure enough for views to differ
    return made


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A picture and its mirror image."""
    left_to_right = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    paths = tmp_path / "picture.png", tmp_path / "mirrored.png"
    for path, pixels in zip(paths, (left_to_right, left_to_right[:, ::-1]), strict=True):
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    return paths


def probs(paths: tuple[Path, ...], tta: str | int) -> np.ndarray:
    return np.array([list(row["probs"].values()) for row in predict_files(model(), paths, tta=tta)])


def test_with_flip_a_picture_and_its_mirror_image_are_predicted_alike(pair: tuple[Path, Path]) -> None:
    plain = probs(pair, "none")
    assert np.abs(plain[0] - plain[1]).max() > 0.01
    flipped = probs(pair, "flip")
    assert flipped[0] == pytest.approx(flipped[1], abs=1e-6)
    assert flipped[0] == pytest.approx(plain.mean(0), abs=1e-6)


def test_a_number_is_the_mean_over_that_many_views(photos: Path) -> None:
    table = load_images(photos)
    pixels = Pixels(table, SPEC)
    views = pixels.with_views(POLICIES["light"], alike=True)
    each = [softmax(predict_logits(model(), views, view=v).numpy()) for v in range(4)]
    assert np.array_equal(each[0], softmax(predict_logits(model(), pixels).numpy()))
    assert np.abs(each[0] - each[3]).max() > 0.001
    assert predict_probs(model(), pixels, tta=4) == pytest.approx(np.mean(each, axis=0), abs=1e-7)
    assert np.array_equal(predict_probs(model(), pixels), each[0])


@pytest.mark.parametrize("tta", ["flip", 3])
def test_a_prediction_does_not_depend_on_the_pictures_beside_it(pair: tuple[Path, Path], tta: str | int) -> None:
    both, alone = probs(pair, tta), probs(pair[1:], tta)
    assert both[1] == pytest.approx(alone[0], abs=1e-5)


@pytest.mark.parametrize("tta", ["flop", 1, "101", "", "2.5", -3])
def test_what_it_takes_is_told(tta: str | int) -> None:
    with pytest.raises(RecipeError, match=r"none, flip .* or a number of views from 2 to 100"):
        tta_views(tta)


def test_evaluate_scores_the_mean_and_the_command_says_so(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = load_images(photos)
    made = create_classifier("mobilenetv2_035", table.class_names, weights="none", image_size=32)
    expected = predict_probs(made, Pixels(table, made.spec), tta="flip")
    result = evaluate(made, table, tta="flip")
    assert np.array_equal(result.probs, expected)
    right = (expected.argmax(1) == table.labels).mean()
    assert result.metrics["accuracy"] == pytest.approx(right)
    save(made, tmp_path / "run")
    assert main(["predict", str(tmp_path / "run"), str(table.paths[0]), "--tta", "flip", "--json"]) == 0
    best = f"{expected[0].max():.4f}"
    assert best[:5] in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), str(photos), "--tta", "flop"]) == 2
    assert "tta is 'flop'" in capsys.readouterr().err
