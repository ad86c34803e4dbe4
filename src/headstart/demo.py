"""The whole idea in two minutes, without network or weights: scikit-learn's scanned digits.

A small network learns the digits 0-4 from scratch; what it knows is then transferred to the digits 5-9 with twenty
pictures of each: from scratch, with a frozen backbone, and fine-tuned. Everything goes through the public library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .closing import FitResult
from .dataset import load_images
from .recipe import RECIPES
from .recipes import fine_tune
from .terminal import say

BACKBONE = "test_resnet"  # timm's smallest ResNet, 0.5 M parameters
IMAGE_SIZE = 32
TRAIN_PER_CLASS, VAL_PER_CLASS = 20, 10
# Nominal head rates; a stage trains at a tenth (scratch) or a hundredth (fine-tune) of them. The target task from
# scratch gets Adam's usual 1e-3, and as many epochs as fine-tuning; the source task has more pictures and takes more.
SOURCE_LR, SCRATCH_LR, HEAD_LR = 5e-2, 1e-2, 3e-2
_AUGMENT = "document"  # digits must not be mirrored


@dataclass(frozen=True)
class DemoResult:
    """Test metrics of the three ways, and the report of the fine-tuned one."""

    scores: dict[str, dict[str, Any]]
    report_path: Path


def run_demo(
    *, out: str | Path = "runs/demo", overwrite: bool = True, seed: int = 0, progress: bool = True
) -> DemoResult:
    """Write the pictures and four runs under `out`, and return the three test scores.

    Args:
        out: folder for the pictures and the runs; the demo's own earlier runs there are replaced.
        seed: which pictures are held out, initial weights, order.
    """
    out = Path(out)
    pictures = write_digits(out / "digits", seed=seed)
    machine: dict[str, Any] = {"overwrite": overwrite, "progress": progress, "seed": seed}
    say("Source task: digits 0-4, from scratch", enabled=progress)
    source = _fit(pictures / "source", "scratch", out=out / "source", lr=SOURCE_LR, epochs=(15,), **machine)
    scores = {"source task (0-4)": source.metrics["test"]}
    results: dict[str, FitResult] = {}
    for label, recipe, weights, lr, epochs in (
        ("from scratch", "scratch", "none", SCRATCH_LR, (30,)),
        ("frozen head", "head", source.run_path, HEAD_LR, (60,)),
        ("fine-tuned", "fine-tune", source.run_path, HEAD_LR, (60, 30)),
    ):
        say(f"Target task: digits 5-9, {TRAIN_PER_CLASS} pictures each, {label}", enabled=progress)
        results[label] = _fit(
            pictures / "target",
            recipe,
            weights=weights,
            out=out / label.replace(" ", "-"),
            lr=lr,
            epochs=epochs,
            **machine,
        )
        scores[label] = results[label].metrics["test"]
    report = results["fine-tuned"].report_path
    assert report is not None
    return DemoResult(scores, report)


def _fit(
    folder: Path,
    recipe: str,
    *,
    weights: str | Path | None = "none",
    out: Path,
    lr: float,
    epochs: tuple[int, ...],
    overwrite: bool,
    seed: int,
    progress: bool,
) -> FitResult:
    plan = RECIPES[recipe]
    stages = tuple(replace(s, epochs=n, batch_size=32, views=4) for s, n in zip(plan.stages, epochs, strict=True))
    plan = replace(plan, stages=stages, lr=lr, augment=_AUGMENT, seed=seed)
    return fine_tune(
        load_images(folder, check=False), backbone=BACKBONE, weights=weights or "none", out=out, recipe=plan,
        spec_overrides={"image_size": IMAGE_SIZE, "fit": "squash"}, overwrite=overwrite, progress=progress,
        device="cpu", precision="fp32", audit=False,  # of 64 pixels, many a digit looks like a copy of another
    )  # fmt: skip


def write_digits(folder: Path, *, seed: int = 0) -> Path:
    """Write scikit-learn's 1,797 digits (8 x 8, grey) as PNG files: `source/` holds 0-4, `target/` 5-9.

    Each has split folders; the target's train and val folders hold 20 and 10 pictures per class, its test folder
    all others. Files that are there already are left.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures, labels = (digits.images * 255 / 16).round().astype(np.uint8), digits.target
    rng = np.random.default_rng(seed)
    for digit in range(10):
        task = "source" if digit < 5 else "target"
        indices = rng.permutation(np.flatnonzero(labels == digit))
        ends = (TRAIN_PER_CLASS, TRAIN_PER_CLASS + VAL_PER_CLASS) if task == "target" else (120, 145)
        for split, part in zip(("train", "val", "test"), np.split(indices, ends), strict=True):
            home = folder / task / split / str(digit)
            home.mkdir(parents=True, exist_ok=True)
            for index in part:
                path = home / f"{index:04}.png"
                if not path.exists():
                    Image.fromarray(pictures[index]).save(path)
    return folder
