"""Recipes as frozen value objects: the only home of defaults, range checks included, unknown keys refused.

A recipe is a head, an augmentation and a short list of stages; a stage is a freeze line, a rate and a length.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import RecipeError, near_matches
from .fields import Spec, as_tuple, check_choice, check_flag, check_number, read_json_file

DEFAULT_BACKBONE = "mobilenetv2_100"
ACTIVATIONS = ("none", "relu", "gelu")
POOLS = ("backbone", "avg", "max", "flatten")
OUTPUTS = ("softmax", "sigmoid")
BATCHNORM_MODES = ("fixed", "frozen", "train")
OPTIMIZERS = ("adamw", "adam", "rmsprop", "sgd", "lbfgs")
WARM_STARTS = ("none", "ridge")
AUTO_POLICIES = ("none", "randaugment", "trivial")
SELECTIONS = ("loss", "accuracy", "last")
SCHEDULES = ("constant", "cosine", "one-cycle")
ON_COLLAPSE = ("retry", "stop", "ignore")
HEAD_BATCH, FINE_TUNE_BATCH = 64, 32
# What only a linear head on stored features can follow, and what other stages take in its place.
_FOR_LINEAR = {"warm_start": ("ridge", "none"), "optimizer": ("lbfgs", "adamw")}

TUNED_ON = "tuned_on"  # what a recipe in a file was found on; no part of the recipe (see the room `tuned`)


@dataclass(frozen=True)
class HiddenLayer(Spec):
    """One hidden layer of a head: Linear, then its activation, with BatchNorm before or after it, then dropout.

    activation: `none`, `relu` or `gelu`. batchnorm: `none`, or `before` or `after` the activation.
    """

    width: int
    activation: str = "relu"
    batchnorm: str = "none"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_number("hidden layer", "width", self.width, 1, 65536, whole=True)
        check_choice("hidden layer", "activation", self.activation, ACTIVATIONS)
        check_choice("hidden layer", "batchnorm", self.batchnorm, ("none", "before", "after"))
        check_number("hidden layer", "dropout", self.dropout, 0, 0.99)


@dataclass(frozen=True)
class HeadSpec(Spec):
    """What is put on the backbone: pooling, BatchNorm on the features, hidden layers, dropout, the last layer.

    `pool="backbone"` is what the network itself does before its classifier; `avg`, `max` and `flatten` act on the
    feature map [N, C, H, W] and leave out everything the network does after it (VGG's fully connected layers).
    `output="sigmoid"` is one output for two classes, trained as binary cross-entropy.
    `features_from` names an earlier block of the backbone; everything behind it is left out.
    """

    pool: str = "backbone"
    batchnorm: bool = False
    hidden: tuple[HiddenLayer, ...] = ()
    dropout: float = 0.0
    output: str = "softmax"
    features_from: str | None = None

    def __post_init__(self) -> None:
        check_choice("head", "pool", self.pool, POOLS)
        check_choice("head", "output", self.output, OUTPUTS)
        check_number("head", "dropout", self.dropout, 0, 0.99)
        check_flag("head", "batchnorm", self.batchnorm)
        if self.features_from is not None and (not isinstance(self.features_from, str) or not self.features_from):
            raise RecipeError(f"head: features_from is {self.features_from!r}; it takes a block's name or null.")
        hidden = as_tuple("head", "hidden", self.hidden, HiddenLayer, "HiddenLayers, such as (HiddenLayer(64),)")
        object.__setattr__(self, "hidden", hidden)

    @property
    def _besides_linear(self) -> tuple[str, ...]:
        """The fields that make it more than one Linear behind the pooling."""
        return tuple(
            name
            for name in ("hidden", "batchnorm", "dropout", "output")
            if getattr(self, name) != HeadSpec.__dataclass_fields__[name].default
        )

    @classmethod
    def _nested(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        hidden = values.get("hidden", ())
        if not isinstance(hidden, tuple):
            raise RecipeError(f"{where}: hidden is {hidden!r}; it takes a list of layers.")
        values["hidden"] = tuple(HiddenLayer.from_dict(h, where=f"{where}: hidden[{i}]") for i, h in enumerate(hidden))
        return values


@dataclass(frozen=True)
class AugmentSpec(Spec):
    """Ranges of the random changes made to training pictures; 0 turns a change off.

    rotation: degrees either way. translation: fraction of the side either way. zoom: fraction in or out.
    crop_scale: (low, high) area fraction of a random resized crop, (1, 1) is off. crop_ratio: its aspect range.
    hflip, vflip: probabilities. contrast, brightness: factor in 1 +- x. channel_brightness: the same, drawn for
    each channel. noise: standard deviation on the 0-1 scale. downsample: least side fraction the picture may be
    shrunk to before it is enlarged again; 1 is off. auto: `none`, `randaugment` (`auto_ops` operations of strength
    `auto_magnitude`, 0 to 30) or `trivial` (one operation of any strength), after all of these. erasing: the chance
    that a rectangle is blanked, last of all.
    """

    rotation: float = 0.0
    translation: float = 0.0
    zoom: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.0
    vflip: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    channel_brightness: float = 0.0
    noise: float = 0.0
    downsample: float = 1.0
    auto: str = "none"
    auto_ops: int = 2
    auto_magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self) -> None:
        check_number("augment", "rotation", self.rotation, 0, 180)
        for name in (
            "translation",
            "hflip",
            "vflip",
            "contrast",
            "brightness",
            "channel_brightness",
            "noise",
            "erasing",
        ):
            check_number("augment", name, getattr(self, name), 0, 1)
        check_number("augment", "zoom", self.zoom, 0, 0.9)
        check_number("augment", "downsample", self.downsample, 0.05, 1)
        check_choice("augment", "auto", self.auto, AUTO_POLICIES)
        check_number("augment", "auto_ops", self.auto_ops, 1, 10, whole=True)
        check_number("augment", "auto_magnitude", self.auto_magnitude, 0, 30, whole=True)
        for name, low, high in (("crop_scale", 0.01, 1.0), ("crop_ratio", 0.1, 10.0)):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise RecipeError(f"augment: {name} is {pair!r}; it takes two numbers.")
            for value in pair:
                check_number("augment", name, value, low, high)
            if pair[0] > pair[1]:
                raise RecipeError(f"augment: {name} is {pair!r}; the first must not exceed the second.")

    @property
    def is_identity(self) -> bool:
        """True when no change is ever made, whatever the random numbers."""
        idle = {name: getattr(self, name) for name in ("crop_ratio", "auto_ops", "auto_magnitude")}
        return self == replace(AugmentSpec(), **idle)

    @property
    def changes_light(self) -> bool:
        """Whether brightness or contrast is ever changed."""
        return bool(self.brightness or self.contrast or self.channel_brightness)


POLICIES: dict[str, AugmentSpec] = {
    "none": AugmentSpec(),
    "light": AugmentSpec(hflip=0.5, crop_scale=(0.7, 1.0)),
    "photo": AugmentSpec(hflip=0.5, crop_scale=(0.5, 1.0), rotation=10, brightness=0.2, contrast=0.2),
    "strong": AugmentSpec(
        hflip=0.5, crop_scale=(0.3, 1.0), rotation=20, brightness=0.3, contrast=0.3, channel_brightness=0.1, noise=0.02
    ),
    "document": AugmentSpec(rotation=3, translation=0.05, zoom=0.05, brightness=0.2, contrast=0.2),
    "overhead": AugmentSpec(hflip=0.5, vflip=0.5, rotation=180, crop_scale=(0.6, 1.0), brightness=0.2, contrast=0.2),
    "randaugment": AugmentSpec(hflip=0.5, crop_scale=(0.7, 1.0), auto="randaugment"),
    "trivial": AugmentSpec(hflip=0.5, crop_scale=(0.7, 1.0), auto="trivial"),
}


@dataclass(frozen=True)
class Stage(Spec):
    """One stretch of training with the freeze line in one place.

    name: what history and report call the stage. freeze_line, batchnorm: as `set_freeze_line` takes them.
    epochs: passes over the training pictures.
    batch_size: pictures per batch; `auto` puts all pictures of an optimiser step into one batch (the default size times
    `accumulate`) and computes as many at once as memory holds. accumulate: batches per optimiser step.
    optimizer: `adamw`, `adam` (the same), `rmsprop`, `sgd`, or `lbfgs`, for a linear head on stored features: it fits
    all stored views at once, `weight_decay` is a penalty on the mean loss, weight_decay / 2 * |weight|^2, and rates and
    batches have no effect. momentum: of optimizer `sgd`, 0 is plain SGD; every step is 1 / (1 - momentum) times as long
    in the end. lr_scale: the stage's rate is `recipe.lr * lr_scale`. head_lr_multiplier: the head's rate over the
    backbone's. layer_decay: the rate of each backbone block over that of the next deeper one, 1 is the same for all.
    weight_decay: decoupled from the gradient with every optimiser; norms and biases are not decayed.
    schedule: of the rate: `constant`, `cosine` (half of one, to 0) or `one-cycle` (along half a cosine up from a 25th
    of it, along another down to a 10,000th). warmup: share of the steps in which the rate rises from 0; with
    `one-cycle` the share before its peak, where 0 means 0.3. label_smoothing: share of each training label that is
    spread over all classes.
    class_weights: of the training loss: `none`, `balanced` (N / (C * n_c), rare classes weigh more) or one number per
    class. balanced_sampling: an epoch draws its pictures with replacement, every class equally often on average.
    early_stop: epochs without a better score before the stage ends, 0 is off. clip_norm: largest gradient norm, 0 is
    off. select: the state that is kept is the best by validation `loss` or `accuracy`, what the stage began with
    included; or the `last` epoch's whatever its score, as a loop that keeps no best one does: a stage may then end
    worse. views: how many views of each picture are stored when the stage trains from stored features (1 is the plain
    picture alone). on_collapse: when the rate wrecks the trained head: `retry` (roll back, a tenth of the rate, three
    times at most), `stop` (roll back and end the stage) or `ignore`. collapse_ratio, collapse_margin: it is wrecked
    when the validation loss of the first steps exceeds the entry loss by this factor and by this many nats.
    mixup, cutmix: each batch is mixed with a shuffled copy of itself, the share drawn from Beta(x, x), 0 is off.
    ema: decay of a running average of what is trained, which is then scored and kept in place of the weights
    themselves, 0 is off. wise: at the end, mix what the stage started from with what it came to, the share chosen on
    validation. warm_start: `none`, or `ridge`: a linear head on stored features starts from its solution in closed
    form. checkpointing: keep few activations of a step and compute the others again for the backward pass: less memory,
    more time.
    """

    name: str = "head"
    freeze_line: str = "head"
    batchnorm: str = "fixed"
    epochs: int = 30
    batch_size: int | str = HEAD_BATCH
    accumulate: int = 1
    optimizer: str = "adamw"
    momentum: float = 0.9
    lr_scale: float = 1.0
    head_lr_multiplier: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    class_weights: str | tuple[float, ...] = "none"
    balanced_sampling: bool = False
    early_stop: int = 0
    clip_norm: float = 0.0
    select: str = "loss"
    views: int = 2
    on_collapse: str = "retry"
    collapse_ratio: float = 1.5
    collapse_margin: float = 0.25
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    wise: bool = False
    warm_start: str = "none"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        owner = f"stage {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"stage: name is {self.name!r}; it takes a word.")
        if not isinstance(self.freeze_line, str) or not self.freeze_line:
            raise RecipeError(
                f"{owner}: freeze_line is {self.freeze_line!r}; it takes head, all, last:N, last:N% or a block."
            )
        check_choice(owner, "batchnorm", self.batchnorm, BATCHNORM_MODES)
        check_number(owner, "epochs", self.epochs, 1, 100_000, whole=True)
        if isinstance(self.batch_size, str):
            if self.batch_size != "auto":
                raise RecipeError(f"{owner}: batch_size is {self.batch_size!r}; it takes a whole number or auto.")
        else:
            check_number(owner, "batch_size", self.batch_size, 1, 1_000_000, whole=True)
        check_number(owner, "accumulate", self.accumulate, 1, 10_000, whole=True)
        check_choice(owner, "optimizer", self.optimizer, OPTIMIZERS)
        check_number(owner, "momentum", self.momentum, 0, 0.999)
        if self.optimizer != "sgd" and self.momentum != Stage.__dataclass_fields__["momentum"].default:
            raise RecipeError(
                f"{owner}: momentum is {self.momentum!r}, but optimizer {self.optimizer!r} takes none. Leave momentum"
                " out, or take optimizer 'sgd'."
            )
        check_number(owner, "lr_scale", self.lr_scale, 0, 1e6, above=True)
        check_number(owner, "head_lr_multiplier", self.head_lr_multiplier, 0, 1e6, above=True)
        check_number(owner, "layer_decay", self.layer_decay, 0, 1, above=True)
        check_number(owner, "weight_decay", self.weight_decay, 0, 100)
        check_choice(owner, "schedule", self.schedule, SCHEDULES)
        check_number(owner, "warmup", self.warmup, 0, 0.9)
        check_number(owner, "label_smoothing", self.label_smoothing, 0, 0.99)
        self._take_class_weights()
        if isinstance(self.class_weights, str):
            check_choice(owner, "class_weights", self.class_weights, ("none", "balanced"))
        elif isinstance(self.class_weights, tuple):
            for weight in self.class_weights:
                check_number(owner, "class_weights", weight, 0, above=True)
        else:
            raise RecipeError(
                f"{owner}: class_weights is {self.class_weights!r}; it takes none, balanced or a number per class,"
                " in the order of the class names."
            )
        check_flag(owner, "balanced_sampling", self.balanced_sampling)
        check_number(owner, "early_stop", self.early_stop, 0, whole=True)
        check_number(owner, "clip_norm", self.clip_norm, 0)
        check_choice(owner, "select", self.select, SELECTIONS)
        check_number(owner, "views", self.views, 1, 1000, whole=True)
        check_choice(owner, "on_collapse", self.on_collapse, ON_COLLAPSE)
        check_number(owner, "collapse_ratio", self.collapse_ratio, 1)
        check_number(owner, "collapse_margin", self.collapse_margin, 0)
        check_number(owner, "mixup", self.mixup, 0, 100)
        check_number(owner, "cutmix", self.cutmix, 0, 100)
        check_number(owner, "ema", self.ema, 0, 0.99999)
        check_flag(owner, "wise", self.wise)
        check_flag(owner, "checkpointing", self.checkpointing)
        check_choice(owner, "warm_start", self.warm_start, WARM_STARTS)
        if self.linear_settings and self.freeze_line != "head":
            raise RecipeError(
                f"{owner}: {self.linear_settings}, but the freeze line stands at {self.freeze_line!r}. That is for a"
                " linear head on stored features, in a stage with freeze_line 'head'."
                f" Give stages their own values ({self._one_stage_alone()}), or take --recipe head."
            )
        if self.optimizer == "lbfgs":
            self._refuse_beside_lbfgs(owner)
        for name in ("early_stop", "wise"):
            if self.select == "last" and getattr(self, name):
                raise RecipeError(f"{owner}: select 'last' keeps the last epoch, but {name} looks for the best one.")

    def _take_class_weights(self) -> None:
        """A list or array of numbers as a tuple of Python's own."""
        weights: Any = self.class_weights
        weights = weights.tolist() if hasattr(weights, "tolist") else weights
        if isinstance(weights, (list, tuple)):
            weights = tuple(weight.tolist() if hasattr(weight, "tolist") else weight for weight in weights)
            object.__setattr__(self, "class_weights", weights)

    @property
    def batch_pictures(self) -> int:
        """Pictures per batch as a number; for `auto` all of an optimiser step, `accumulate` default batches."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        return (HEAD_BATCH if self.freeze_line == "head" else FINE_TUNE_BATCH) * self.accumulate

    @property
    def linear_settings(self) -> str:
        """Those that only a linear head on stored features can follow, in words; empty where there are none."""
        return " and ".join(f"{name} is {_FOR_LINEAR[name][0]!r}" for name in self._for_linear())

    def _for_linear(self) -> list[str]:
        return [name for name, (value, _) in _FOR_LINEAR.items() if getattr(self, name) == value]

    def _one_stage_alone(self) -> str:
        """How options give these settings to the first of two stages alone."""
        return " ".join(f"--{name.replace('_', '-')} {','.join(_FOR_LINEAR[name])}" for name in self._for_linear())

    def _refuse_beside_lbfgs(self, owner: str) -> None:
        of_batches = ("batch_size", "accumulate", "balanced_sampling", "clip_norm", "mixup", "cutmix", "ema")
        defaults = {name: Stage.__dataclass_fields__[name].default for name in (*of_batches, "schedule", "warmup")}
        idle = {name: usual for name, usual in defaults.items() if getattr(self, name) != usual}
        if idle:  # all at once: a recipe of two stages brings several that nobody has given
            raise RecipeError(
                f"{owner}: {', '.join(f'{name} is {getattr(self, name)!r}' for name in idle)}, but optimizer 'lbfgs'"
                " sees all pictures at once and finds the length of its steps itself. Take"
                f" {', '.join(f'{name} {usual}' for name, usual in idle.items())}, or another optimizer, or give stages"
                f" their own values ({self._one_stage_alone()})."
            )


HEAD_STAGE = Stage()
FINE_TUNE_STAGE = Stage(
    name="fine-tune",
    freeze_line="last:80%",
    epochs=5,
    batch_size=FINE_TUNE_BATCH,
    lr_scale=0.01,
    warmup=0.2,
    views=4,
    ema=0.9,
    wise=True,
)


@dataclass(frozen=True)
class Recipe(Spec):
    """A head, an augmentation, a nominal head rate and the stages that use them.

    lr: nominal learning rate of the head; every stage's own rate is a multiple of it. augment: a policy's name or an
    `AugmentSpec`. pretrained: False starts the backbone from random weights. drop_rate, drop_path_rate: dropout and
    stochastic depth in the backbone while it is trained, as timm builds them in; 0 leaves the network's own.
    seed: of the split, the head's first weights, the order of the pictures, their views and dropout.
    """

    name: str = "fine-tune"
    stages: tuple[Stage, ...] = (HEAD_STAGE, FINE_TUNE_STAGE)
    head: HeadSpec = HeadSpec()
    lr: float = 5e-3
    augment: str | AugmentSpec = "photo"
    pretrained: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"recipe: name is {self.name!r}; it takes a word.")
        if not isinstance(self.augment, (str, AugmentSpec)):
            raise RecipeError(f"recipe: augment is {self.augment!r}; it takes a policy's name or an object of ranges.")
        check_number("recipe", "lr", self.lr, 0, 100, above=True)
        check_number("recipe", "seed", self.seed, 0, 2**63 - 1, whole=True)
        check_number("recipe", "drop_rate", self.drop_rate, 0, 0.99)
        check_number("recipe", "drop_path_rate", self.drop_path_rate, 0, 0.99)
        check_flag("recipe", "pretrained", self.pretrained)
        if not isinstance(self.head, HeadSpec):
            raise RecipeError(
                f"recipe: head is {self.head!r}; it takes a HeadSpec. A module of your own goes to fine_tune(head=...)."
            )
        object.__setattr__(self, "stages", as_tuple("recipe", "stages", self.stages, Stage, "a tuple of Stages"))
        if not self.stages:
            raise RecipeError("recipe: stages is empty; a recipe trains in at least one stage.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise RecipeError(f"recipe: stage names repeat ({', '.join(names)}); give each its own.")
        if isinstance(self.augment, str):
            check_choice("recipe", "augment", self.augment, tuple(POLICIES))
        for stage in self.stages:
            if stage.linear_settings and self.head._besides_linear:
                raise RecipeError(
                    f"stage {stage.name!r}: {stage.linear_settings}, which is for a head of one Linear alone, but the"
                    f" head is given {', '.join(self.head._besides_linear)}. Leave that out of the head, or take"
                    " warm_start 'none' and another optimizer."
                )

    @property
    def augment_spec(self) -> AugmentSpec:
        """The augmentation as ranges, whether the recipe names a policy or spells it out."""
        return POLICIES[self.augment] if isinstance(self.augment, str) else self.augment

    @classmethod
    def _nested(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        if "stages" in values:
            stages = values["stages"]
            if not isinstance(stages, tuple):
                raise RecipeError(f"{where}: stages is {stages!r}; it takes a list of stages.")
            values["stages"] = tuple(Stage.from_dict(s, where=f"{where}: stages[{i}]") for i, s in enumerate(stages))
        if "head" in values:
            values["head"] = HeadSpec.from_dict(values["head"], where=f"{where}: head")
        if isinstance(values.get("augment"), Mapping):
            values["augment"] = AugmentSpec.from_dict(values["augment"], where=f"{where}: augment")
        return values


RECIPES: dict[str, Recipe] = {
    "fine-tune": Recipe(),
    "head": Recipe(name="head", stages=(HEAD_STAGE,)),
    # 0.56 to 0.69 of the default's processor time: fewer layers and epochs at twice the rate, and views that both
    # stages share, one for each epoch (pictures seen twice are learned by heart).
    "quick": Recipe(
        name="quick",
        stages=(
            replace(HEAD_STAGE, views=3),
            replace(FINE_TUNE_STAGE, freeze_line="last:60%", epochs=3, views=3, lr_scale=0.02),
        ),
    ),
    "joint": Recipe(
        name="joint",
        # What an untrained head starts from is nothing to mix with.
        stages=(
            replace(FINE_TUNE_STAGE, name="joint", freeze_line="all", epochs=10, head_lr_multiplier=10.0, wise=False),
        ),
    ),
    # From the head backwards, as ULMFiT does (Howard and Ruder 2018, arXiv 1801.06146).
    "gradual": Recipe(
        name="gradual",
        stages=(
            HEAD_STAGE,
            replace(FINE_TUNE_STAGE, name="last quarter", freeze_line="last:25%", epochs=2),
            replace(FINE_TUNE_STAGE, name="last half", freeze_line="last:50%", epochs=2),
            replace(FINE_TUNE_STAGE, freeze_line="all"),
        ),
    ),
    "scratch": Recipe(
        name="scratch",
        pretrained=False,
        stages=(Stage(name="scratch", freeze_line="all", batchnorm="train", epochs=30, lr_scale=0.1, warmup=0.1),),
    ),
}


def load_recipe(name_or_file: str | Path) -> Recipe:
    """A named recipe, or one read from a JSON file of the closed schema (what `recipe.json` in a run folder holds).

    Raises:
        RecipeError: neither a name nor a file; no JSON, an unknown key, a value out of range.
    """
    if str(name_or_file) in RECIPES:
        return RECIPES[str(name_or_file)]
    path = recipe_file(name_or_file)
    data = read_json_file(path, f"Recipe {path}")
    if isinstance(data, dict):
        data.pop(TUNED_ON, None)
    return Recipe.from_dict(data, where=str(path))


def recipe_file(name_or_file: str | Path) -> Path:
    """The file of a recipe that is no named one.

    Raises:
        RecipeError: there is none.
    """
    if not isinstance(name_or_file, (str, os.PathLike)):
        raise RecipeError(
            f"A recipe is given as a {type(name_or_file).__name__}; it takes a name ({', '.join(RECIPES)}), a JSON"
            " file, or what Recipe(...) and Recipe.from_dict(...) make."
        )
    path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(
            f"Recipe {str(name_or_file)!r} is neither a known recipe ({', '.join(RECIPES)}) nor a file."
            f"{near_matches(str(name_or_file), tuple(RECIPES))}"
        )
    return path
