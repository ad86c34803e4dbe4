"""The demo, cut short: real scanned digits, four runs, three ways compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from headstart import demo


def test_the_digits_are_written_once_each_and_keep_their_labels(tmp_path: Path) -> None:
    demo.write_digits(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 1797
    digits = load_digits()
    for path in files[::100]:
        index = int(path.stem)
        assert int(path.parent.name) == digits.target[index]
        assert np.abs(np.asarray(Image.open(path)) / 255 * 16 - digits.images[index]).max() < 0.05
    counts = {path.parent.name: len(list(path.parent.iterdir())) for path in tmp_path.glob("target/train/*/*.png")}
    assert counts == {str(digit): 20 for digit in range(5, 10)}


@pytest.mark.slow
def test_the_demo_compares_three_ways_and_leaves_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run_demo(out=tmp_path / "demo", progress=False)
    assert list(result.scores) == ["source task (0-4)", "from scratch", "frozen head", "fine-tuned"]
    n = {score["n"] for name, score in result.scores.items() if name != "source task (0-4)"}
    assert len(n) == 1
    assert n.pop() > 700
    assert all(score["accuracy"] > 0.5 for score in result.scores.values())  # five classes: chance is 0.2
    assert capsys.readouterr().err == ""
    assert "<html" in result.report_path.read_text(encoding="utf-8")
