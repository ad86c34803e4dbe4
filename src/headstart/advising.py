"""Advice before training: which of the four classic cases a set of pictures is, and the recipe that goes with it.

Small or large is counted. Similar or different to what the backbone was trained on is measured: a linear classifier
on its frozen features against the same on a network of random weights, on a sample of the training pictures, each
judged while held out. No test picture is looked at, and nothing is trained but the linear classifiers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .backbones import spec_of
from .bench import Bench
from .classifier import Classifier, create_classifier
from .errors import ModelError, RecipeError
from .files import to_json, write_atomic
from .groundwork import make_bench
from .metrics import holm, paired_difference
from .pixels import Pixels
from .probing import FINAL, Probe, blocks_to_probe, pooled_features, probe
from .recipe import DEFAULT_BACKBONE, FINE_TUNE_STAGE, HEAD_STAGE, POLICIES, RECIPES, HeadSpec, Recipe
from .recipes import weights_of
from .runtime import make_runtime
from .settings import own_settings
from .sizes import picture_sizes
from .terminal import ProgressBar
from .tracing import evaluation_mode
from .tuned import write_tuned

SAMPLE = 200  # pictures: an accuracy is then known to about 6 points, and a pass of them takes three seconds
SAMPLE_PER_CLASS = 5  # at the least, one for each fold

# From 300 pictures of a class on, the 15 % held out for validation are 45 of them: an accuracy of 90 % is then known
# to 4.5 points (one standard error) in each class, and better than to 3.2 in two. Below that states that fine-tuning
# passes through can hardly be told apart.
LARGE_FROM = 300
# The frozen features must remove at least half of the errors that random weights leave. A share of errors, unlike a
# difference of accuracies, means the same for two classes and for a hundred.
SIMILAR_FROM = 0.5
# Fewer validation pictures cannot choose between states of fine-tuning: one of them is 5 points.
VALIDATION_FROM = 20
# An earlier block is taken for the features where chance explains its lead less than once in twenty (after Holm).
BLOCK_P = 0.05
# Several looks are taken at the pictures, so that the mirror needs more than one chance in twenty against it.
MIRROR_P = 0.01
SMALL_SIDE = 0.5  # of the input: below it more than three quarters of the pixels that the network sees are made up
LONG_STEPS = 5_000  # of fine-tuning; longer sets see fewer epochs

FAR_STAGE = replace(FINE_TUNE_STAGE, freeze_line="all", epochs=10, lr_scale=0.02)


@dataclass(frozen=True)
class Facts:
    """What the advice rests on.

    per_class: the median class's training pictures. side_px: the median picture's shorter side. sampled: pictures the
    accuracies are of. frozen, chance: accuracy of linear classifiers on the frozen features, and on the best ones of
    the same network with random weights. blocks: accuracy on an earlier block's, with the (adjusted) p value of its
    difference from `frozen`. mirrored: accuracy on mirror images, with the p value of what that costs.
    """

    classes: int
    train: int
    val: int
    per_class: float
    side_px: int
    input_px: int
    sampled: int
    frozen: float
    chance: float
    blocks: Mapping[str, tuple[float, float]]
    mirrored: tuple[float, float]

    @property
    def removed(self) -> float:
        """Share of the random network's errors that the frozen features remove."""
        return 1 - (1 - self.frozen) / max(1 - self.chance, 1e-9)

    @property
    def is_large(self) -> bool:
        return self.per_class >= LARGE_FROM

    @property
    def is_similar(self) -> bool:
        return self.removed >= SIMILAR_FROM

    @property
    def better_block(self) -> str | None:
        """The earlier block whose features are better by more than chance."""
        better = [name for name, (share, p) in self.blocks.items() if share > self.frozen and p < BLOCK_P]
        return max(better, key=lambda name: self.blocks[name][0], default=None)

    @property
    def mirror_harms(self) -> bool:
        return self.mirrored[0] < self.frozen and self.mirrored[1] < MIRROR_P


@dataclass(frozen=True)
class Advice:
    """The case, the recipe, why, and the figures behind it.

    Attributes:
        case: `small, similar` and so on.
        reasons: sentences, one for each thing proposed.
        facts: the figures: pictures counted (`classes`, `train`, `val`, `per_class`, the median, `sampled`) and their
            sides (`side_px`, `input_px`); accuracies of linear classifiers on the frozen features (`frozen`), on those
            of random weights (`chance`), on earlier `blocks` and on `mirrored` pictures, both with their p values; the
            share of errors that pretraining `removed`.
        found_on: `backbone`, `weights`, and `pictures`, what replaced the backbone's own preprocessing.
        seconds: what looking took, reading the pictures left out.
    """

    case: str
    recipe: Recipe
    reasons: tuple[str, ...]
    facts: Facts
    found_on: Mapping[str, Any]
    seconds: float

    def text(self) -> str:
        """The advice in plain words."""
        return "\n".join([f"This is the case: {self.case}.", *(f"- {reason}" for reason in self.reasons)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        facts = {**asdict(self.facts), "removed": self.facts.removed}
        return {
            "case": self.case, "reasons": list(self.reasons), "facts": facts, "recipe": self.recipe.to_dict(),
            "found_on": dict(self.found_on), "seconds": self.seconds,
        }  # fmt: skip

    def write(self, path: str | Path) -> None:
        """The recipe as a file for `fit --recipe`, which says what it was found on."""
        write_tuned(path, self.recipe, **self.found_on)

    def write_facts(self, run: str | Path) -> None:
        """`advice.json` in a run folder: what was measured and why the recipe is as it is."""
        write_atomic(Path(run) / "advice.json", to_json(self.to_dict(), indent=1) + b"\n")


@own_settings(draws=True)
def advise(
    data: Any,
    *,
    backbone: str = DEFAULT_BACKBONE,
    weights: str | Path | None = None,
    spec_overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    progress: bool = False,
    **data_options: Any,
) -> Advice:
    """Look at the pictures and at what the backbone's frozen features tell of them, and propose a recipe.

    Three passes of a sample (200 pictures, or 5 of each class): through the backbone, through it with the pictures
    mirrored, and, at half the side where it takes that, through the same network with random weights.

    Args:
        data, backbone, weights, spec_overrides, device, precision, workers: as in `fine_tune`.
        seed: of the split, the sample and the random weights; the recipe's too.
        data_options: val, test, val_folder, test_folder, root, bad_files, limit and cache, as in `fine_tune`.
    Raises:
        RecipeError: `weights` is `none`: there is nothing learned to advise about.
    """
    if str(weights) == "none":
        raise RecipeError(
            "Advice is about what a backbone has learned, but weights are 'none'. Give pretrained ones, or take the"
            " recipe for random weights: --recipe scratch."
        )
    overrides = dict(spec_overrides or {})
    weights = weights_of(Recipe(), weights)
    bench = data if isinstance(data, Bench) else make_bench(
        data, runtime=make_runtime(device=device, precision=precision, workers=workers), seed=seed, progress=progress,
        spec=spec_of(backbone, weights, **overrides), **data_options,
    )  # fmt: skip
    bench = bench.without_test()
    started = time.perf_counter()
    models = [
        create_classifier(backbone, bench.splits.class_names, weights=str(of), seed=seed, **overrides)
        for of in (weights, "none")
    ]
    facts = look(bench, *models, seed=seed, progress=progress)
    recipe, reasons = decide(facts)
    return Advice(
        f"{'large' if facts.is_large else 'small'}, {'similar' if facts.is_similar else 'different'}",
        replace(recipe, seed=seed), reasons, facts,
        {"backbone": backbone, "weights": weights, "pictures": overrides}, time.perf_counter() - started,
    )  # fmt: skip


def look(bench: Bench, model: Classifier, random: Classifier, *, seed: int = 0, progress: bool = False) -> Facts:
    """Count the pictures and probe a sample of the training split.

    Args:
        random: the same network with random weights.
    """
    train = bench.splits.train
    sample = train.limit(max(SAMPLE, SAMPLE_PER_CLASS * len(train.class_names)), seed=seed)
    blocks = blocks_to_probe(model)
    pixels = Pixels(sample, model.spec, workers=bench.runtime.workers, store=bench.pixels("train", model.spec).store)
    with ProgressBar(3 * len(sample), "Looking at frozen features", enabled=progress) as bar:
        how: dict[str, Any] = {"runtime": bench.runtime, "advance": bar.advance}
        model.to(bench.runtime.device)
        learned = pooled_features(model, pixels, blocks=blocks, **how)
        mirrored = pooled_features(model, pixels, mirrored=True, **how)[FINAL]
        random.to(bench.runtime.device)
        drawn = pooled_features(random, pixels, blocks=blocks, side=_half_side(random), **how)
    judge: dict[str, Any] = {"groups": sample.groups, "seed": seed}
    found = {name: probe(x, sample.labels, mirrored=None if name else mirrored, **judge) for name, x in learned.items()}
    chance = max(probe(x, sample.labels, **judge).accuracy for x in drawn.values())
    sizes = picture_sizes(train.paths)
    return Facts(
        classes=len(train.class_names),
        train=len(train),
        val=len(bench.splits.val),
        per_class=float(np.median(train.class_counts())),
        side_px=int(np.median(sizes.min(axis=1))) if len(sizes) else model.spec.image_size,
        input_px=model.spec.image_size,
        sampled=len(sample),
        frozen=found[FINAL].accuracy,
        chance=chance,
        blocks=_blocks(found),
        mirrored=_mirrored(found[FINAL]),
    )


def _half_side(model: Classifier) -> int | None:
    """Half the side of the input, where the backbone takes that: a quarter of the work.

    Random weights tell as much of smaller pictures: on seven real sets the case came out the same.
    """
    half = model.spec.image_size // 2
    try:
        with evaluation_mode(model), torch.inference_mode():
            model.features(torch.zeros(1, 3, half, half, device=next(model.parameters()).device))
    except ModelError:
        return None
    return half


def _blocks(found: Mapping[str, Probe]) -> dict[str, tuple[float, float]]:
    names = [name for name in found if name != FINAL]
    p_values = holm([paired_difference(found[name].right, found[FINAL].right)["p"] for name in names])
    return {name: (found[name].accuracy, p) for name, p in zip(names, p_values, strict=True)}


def _mirrored(found: Probe) -> tuple[float, float]:
    assert found.mirrored is not None
    return float(found.mirrored.mean()), paired_difference(found.mirrored, found.right)["p"]


# ---- from figures to a recipe ----------------------------------------------------------------------------------


def decide(facts: Facts) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that the figures call for, and a sentence for each thing in it."""
    reasons = [_size_sentence(facts), _likeness_sentence(facts)]
    stages, head, why = _stages(facts)
    augment, changes = _augment(facts)
    recipe = replace(RECIPES["fine-tune"], name="advised", stages=stages, head=head, augment=augment)
    return recipe, (*reasons, *_small_sentence(facts), *why, changes)


def _size_sentence(facts: Facts) -> str:
    return (
        f"{'Large' if facts.is_large else 'Small'}: {facts.per_class:,.0f} training pictures of a class (the median of"
        f" {facts.classes}); large is from {LARGE_FROM} on, where validation can tell fine-tuned states apart."
    )


def _likeness_sentence(facts: Facts) -> str:
    return (
        f"{'Similar' if facts.is_similar else 'Different'}: a linear classifier gets {100 * facts.frozen:.1f} % of"
        f" {facts.sampled} held-out pictures right on the frozen features and {100 * facts.chance:.1f} % on random"
        f" weights, so that pretraining removes {100 * facts.removed:.0f} % of the errors; similar is from"
        f" {100 * SIMILAR_FROM:.0f} % on."
    )


def _stages(facts: Facts) -> tuple[tuple[Any, ...], HeadSpec, list[str]]:
    block = None if facts.is_similar else facts.better_block
    if block is not None and not facts.is_large:
        share, p = facts.blocks[block]
        head = HeadSpec(features_from=block)
        why = (
            f"Features from {block} on: they get {100 * share:.1f} % right against {100 * facts.frozen:.1f} % at the"
            f" end of the network (p = {p:.2g}); what is behind it is too special, and these pictures too few to train"
            " it anew."
        )
    else:
        head, why = HeadSpec(), ""
    if facts.val < VALIDATION_FROM:
        few = (
            f"The head alone: {facts.val} validation pictures cannot choose between states of fine-tuning (from"
            f" {VALIDATION_FROM} on they do). Hold more out (--val), or take more pictures."
        )
        return (HEAD_STAGE,), head, [*([why] if why else []), few]
    stage = FINE_TUNE_STAGE if facts.is_similar else FAR_STAGE
    steps = max(1, -(-facts.train // stage.batch_pictures))
    stage = replace(stage, epochs=max(2, min(stage.epochs, LONG_STEPS // steps)))
    rate = RECIPES["fine-tune"].lr * stage.lr_scale
    if facts.is_similar:
        line = (
            f"The head, then the last 80 % of the layers for {stage.epochs} epochs at a rate of {rate:.0e}: the"
            " features fit already, so little has to change; what stands in front runs once per picture."
        )
    else:
        line = (
            f"The head, then every layer for {stage.epochs} epochs at a rate of {rate:.0e}, twice the usual one: the"
            " features were made for other pictures, and the first layers, too, have something to learn."
        )
    return (HEAD_STAGE, stage), head, [*([why] if why else []), line]


def _augment(facts: Facts) -> tuple[Any, str]:
    share, p = facts.mirrored
    if facts.mirror_harms:
        return replace(POLICIES["photo"], hflip=0.0), (
            f"Augmentation photo without mirroring: of the mirror images {100 * share:.1f} % are right against"
            f" {100 * facts.frozen:.1f} % (p = {p:.2g}), so left and right mean something here."
        )
    return (
        "photo",
        f"Augmentation photo: mirror images cost nothing that counts ({100 * share:.1f} % of them are right).",
    )


def _small_sentence(facts: Facts) -> list[str]:
    if facts.side_px >= SMALL_SIDE * facts.input_px:
        return []
    return [
        f"The pictures are small: a shorter side of {facts.side_px} px, scaled up to {facts.input_px}, so that the"
        " network sees less detail than it was trained on. Larger ones would help first of all."
    ]
