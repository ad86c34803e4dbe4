"""The options of the command line and what they change in a recipe. No defaults live here: `recipe` has them all.

An option that is not given is None and leaves what the recipe says; help texts show the named recipes' own values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .owners import launched
from .recipe import POLICIES, RECIPES, Recipe
from .sources import source_name

EXIT_BAD_INPUT = 2
DEFAULT_RECIPE = "fine-tune"
PHOTOS_HELP = (
    "folder of class folders (or of train/val/test), .zip or .tar.gz of one, URL#sha256=HEX, manifest (.csv, "
    ".parquet), hf:NAME, torchvision:NAME"
)


@dataclass(frozen=True)
class Command:
    """One word after `headstart`: its options and the function that runs it and returns the exit code."""

    title: str
    usage: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    notes: str = ""


def read_whole(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"{flag} is {text!r}; it takes a whole number.") from None


def read_batch_size(flag: str, text: str) -> int | str:
    return text if text == "auto" else read_whole(flag, text)


def read_number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"{flag} is {text!r}; it takes a number.") from None


def read_switch(flag: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise RecipeError(f"{flag} is {text!r}; it takes on or off.")
    return text == "on"


def read_word(flag: str, text: str) -> str:
    return text


@dataclass(frozen=True)
class Option:
    """One option that sets the field of the same name: how its text is read, and what its help says."""

    name: str
    read: Callable[[str, str], Any]
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        """How it is written on the command line: `--lr-scale` for `lr_scale`."""
        return "--" + self.name.replace("_", "-")


STAGE_OPTIONS = (
    Option(
        "freeze_line",
        read_word,
        "WHERE",
        "what is trained: head, all, last:N, last:N%, or from a block on; head,layer4: first the head, then from there",
    ),
    Option("batchnorm", read_word, "MODE", "the backbone's BatchNorm behind the line: fixed, frozen or train"),
    Option("epochs", read_whole, "N", "passes over the training pictures"),
    Option(
        "batch_size",
        read_batch_size,
        "N|auto",
        "pictures per batch; auto: a default batch, as much at once as memory holds",
    ),
    Option("accumulate", read_whole, "N", "batches per optimiser step"),
    Option("optimizer", read_word, "NAME", "adamw (adam is the same), rmsprop or sgd; lbfgs for a linear head"),
    Option("momentum", read_number, "X", "of optimizer sgd; 0 is plain SGD"),
    Option("lr_scale", read_number, "X", "the stage's learning rate as a multiple of --lr"),
    Option("head_lr_multiplier", read_number, "X", "the head's rate over the backbone's"),
    Option(
        "layer_decay", read_number, "X", "rate of each backbone block over the next deeper one's; 1 is the same for all"
    ),
    Option("weight_decay", read_number, "X", "decoupled; not on norms and biases"),
    Option("schedule", read_word, "NAME", "of the learning rate: constant, cosine or one-cycle"),
    Option("warmup", read_number, "X", "share of the steps in which the rate rises from 0"),
    Option("label_smoothing", read_number, "X", "share of each label spread over all classes"),
    Option("class_weights", read_word, "HOW", "none, or balanced: rare classes weigh more in the loss"),
    Option("balanced_sampling", read_switch, "on|off", "draw every class equally often"),
    Option("early_stop", read_whole, "N", "epochs without a better score before the stage ends, 0 is off"),
    Option("clip_norm", read_number, "X", "largest gradient norm, 0 is off"),
    Option("select", read_word, "SCORE", "the best epoch is chosen by validation loss or accuracy; last: no choice"),
    Option("views", read_whole, "N", "views of each picture stored where layers are frozen, the plain one included"),
    Option("mixup", read_number, "X", "blend each picture with another, share from Beta(X, X); 0.2 is usual, 0 is off"),
    Option(
        "cutmix",
        read_number,
        "X",
        "or paste a rectangle of another in, likewise; 1 is usual; for a line in front of all",
    ),
    Option(
        "ema", read_number, "X", "keep the running average of the trained weights, with this decay (0.99); 0 is off"
    ),
    Option("wise", read_switch, "on|off", "mix the stage's first and last weights, the share chosen on validation"),
    Option(
        "warm_start", read_word, "HOW", "none, or ridge: a linear head on stored features starts from its closed form"
    ),
    Option("checkpointing", read_switch, "on|off", "compute activations again instead of keeping them: less memory"),
    Option("on_collapse", read_word, "WHAT", "when the rate wrecks the trained head: retry lower, stop, or ignore"),
)

RECIPE_OPTIONS = (
    Option("lr", read_number, "X", "nominal learning rate of the head; each stage takes a multiple of it"),
    Option("seed", read_whole, "N", "of the split, the head's first weights, the order and the augmentation"),
    Option(
        "drop_rate",
        read_number,
        "X",
        "dropout in the backbone while it is trained; mostly where it pools, so that another --pool takes it out",
    ),
    Option("drop_path_rate", read_number, "X", "stochastic depth in the backbone"),
)


def recipe_values(value: Callable[[Recipe], Iterable[object]]) -> str:
    """What the named recipes say, for a help text: `0.01`, or `fine-tune 30,6; head 30` where they differ."""
    by_recipe = {name: _joined(value(recipe)) for name, recipe in RECIPES.items()}
    if len(set(by_recipe.values())) == 1:
        return next(iter(by_recipe.values()))
    return "; ".join(f"{name} {text}" for name, text in by_recipe.items())


def _stage_values(name: str) -> str:
    return recipe_values(lambda recipe: [getattr(stage, name) for stage in recipe.stages])


def _recipe_values(name: str) -> str:
    return recipe_values(lambda recipe: [getattr(recipe, name)])


def _joined(values: Iterable[object]) -> str:
    texts = [_text(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else ",".join(texts)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Stage`, in a group of their own."""
    group = parser.add_argument_group(
        "stages",
        "One value for all stages, or one per stage with commas between (--epochs 20,5);\n"
        "an empty place leaves that stage as it is (--epochs ,5).",
    )
    for option in STAGE_OPTIONS:
        default = _stage_values(option.name)
        group.add_argument(option.flag, metavar=option.metavar, help=_help(option.help, default))


def add_recipe_options(parser: argparse.ArgumentParser, default_recipe: str = DEFAULT_RECIPE) -> None:
    """The recipe itself and what holds for all its stages."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=_help(f"{', '.join(RECIPES)}, or a JSON file such as a run's recipe.json", default_recipe),
    )
    for option in RECIPE_OPTIONS:
        default = _recipe_values(option.name)
        group.add_argument(option.flag, metavar=option.metavar, help=_help(option.help, default))
    add_augment_option(group)


def add_augment_option(parser: argparse._ActionsContainer) -> None:
    """`--augment`, a policy's name or a file, and `--erasing`, which adds to either."""
    default = recipe_values(lambda recipe: [recipe.augment])
    text = f"changes made to training pictures: {', '.join(POLICIES)}, or a JSON file with ranges"
    parser.add_argument("--augment", metavar="POLICY|FILE", help=_help(text, default))
    text = "chance that a rectangle of a training picture is blanked; 0.25 is usual"
    default = recipe_values(lambda recipe: [recipe.augment_spec.erasing])
    parser.add_argument("--erasing", metavar="X", help=_help(text, default))


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """The options of `HeadSpec`."""
    group = parser.add_argument_group("head")

    def default(name: str) -> str:
        return recipe_values(lambda recipe: [getattr(recipe.head, name) or "none"])

    group.add_argument(
        "--pool",
        metavar="HOW",
        help=_help("backbone (what the network does itself), avg, max or flatten", default("pool")),
    )
    group.add_argument(
        "--hidden",
        metavar="SPEC",
        help="hidden layers, first one first, commas between: width[:activation][:bn-before|bn-after][:dropout], such "
        "as 256:relu or 512:none:bn-after:0.2,64:gelu; activation none, relu or gelu; none takes all away "
        + _default(default("hidden")),
    )
    group.add_argument(
        "--head-batchnorm",
        action=argparse.BooleanOptionalAction,
        help=_help("BatchNorm on the features", recipe_values(lambda recipe: [recipe.head.batchnorm])),
    )
    group.add_argument(
        "--head-dropout",
        metavar="X",
        help=_help("dropout before the last layer", recipe_values(lambda recipe: [recipe.head.dropout])),
    )
    group.add_argument(
        "--output", metavar="KIND", help=_help("softmax, or sigmoid: one output for two classes", default("output"))
    )
    group.add_argument(
        "--features-from",
        metavar="BLOCK",
        help="take the features from this earlier block and leave out what is behind it",
    )


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """How pictures are brought to the network: each backbone has its own, an option overrides it."""
    group = parser.add_argument_group("pictures", "Each backbone brings its own values; they travel with the model.")
    group.add_argument("--image-size", metavar="PX", help="side of the square the network sees")
    group.add_argument("--mean", metavar="R,G,B", help="subtracted, on the 0-1 scale; one number serves all channels")
    group.add_argument("--std", metavar="R,G,B", help="divided by, on the 0-1 scale")
    group.add_argument("--interpolation", metavar="HOW", help="nearest, bilinear, bicubic or lanczos")
    group.add_argument("--crop-pct", metavar="X", help="share of the short side that the centre crop keeps")
    group.add_argument("--fit", metavar="HOW", help="crop the centre, squash to a square, or letterbox on the mean")


def add_machine_options(
    parser: argparse.ArgumentParser, *, workers: str = "threads that read pictures"
) -> argparse._ArgumentGroup:
    """Where and how to compute; returns the group, for more of the kind.

    Args:
        workers: what they are.
    """
    group = parser.add_argument_group("machine")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    group.add_argument(
        "--precision",
        metavar="HOW",
        help="auto, fp32 or bf16 (default: auto, but fp32 in evaluate, familiar, predict, serve)",
    )
    group.add_argument("--workers", type=int, metavar="N", help=f"{workers} (default: one per core, at most 8)")
    return group


def add_compile_option(parser: argparse._ActionsContainer) -> None:
    """`--compile`: the same words in every command that runs the frozen layers over many pictures."""
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        help="compile the frozen layers before they run over the pictures; auto: where that pays (default: auto)",
    )


def add_quiet_option(parser: argparse._ActionsContainer) -> None:
    """`--quiet`: the same words in every command."""
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_cache_option(parser: argparse._ActionsContainer) -> None:
    """`--no-cache`: the same words in every command."""
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_const",
        const=False,
        help="neither use nor keep decoded pictures and stored features; see `headstart cache`",
    )


def add_audit_option(parser: argparse._ActionsContainer) -> None:
    """`--no-audit`: the same words in every command that trains."""
    parser.add_argument(
        "--no-audit",
        dest="audit",
        action="store_const",
        const=False,
        help="do not look at the pictures first (see `headstart audit`); copies may then stand in several splits",
    )


def add_bad_files_option(parser: argparse._ActionsContainer, what: str = "stop, or name it and go on") -> None:
    """`--bad-files`: the same words in every command, but for `predict`, where no picture needs the others."""
    parser.add_argument(
        "--bad-files",
        choices=("error", "skip"),
        help=f"a picture that cannot be read: {what} (default: error)",
    )


def add_root_option(parser: argparse._ActionsContainer) -> None:
    """`--root`: where a manifest's pictures are, in every command that takes PHOTOS."""
    parser.add_argument(
        "--root", metavar="FOLDER", help="where a manifest's relative paths start (default: the manifest's folder)"
    )


def refuse_beside_from_run(options: Mapping[str, Any]) -> None:
    """`--from-run` brings backbone, preprocessing and head: an option that says otherwise is an error."""
    beside = (
        *("backbone", "weights", "image_size", "mean", "std", "interpolation", "crop_pct", "fit"),
        *("pool", "hidden", "head_batchnorm", "head_dropout", "output", "features_from"),
    )
    given = ["--" + name.replace("_", "-") for name in beside if options.get(name) is not None]
    if options.get("from_run") is not None and given:
        raise RecipeError(
            f"{', '.join(given)} cannot be had: --from-run {options['from_run']} brings its own backbone,"
            " preprocessing and head. Leave it out, or give the run to --weights for a new head on its backbone."
        )


def add_unknown_option(parser: argparse.ArgumentParser) -> None:
    """`--unknown`: the same words in every command that predicts."""
    parser.add_argument(
        "--unknown",
        type=float,
        metavar="SHARE",
        help="call pictures unknown that are less familiar than all but this share of those held out, such as 0.05"
        " (needs `headstart familiar RUN`)",
    )


def add_tta_option(parser: argparse.ArgumentParser) -> None:
    """`--tta`: the same words in every command that predicts."""
    parser.add_argument(
        "--tta",
        metavar="flip|N",
        help="average over the picture and its mirror image, or over N views of it (default: one plain view)",
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where the splits come from, and what to do about files that cannot be read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--val",
        type=float,
        metavar="X",
        help="share held out for validation where PHOTOS has no such folder (default: 0.15)",
    )
    group.add_argument("--test", type=float, metavar="X", help="share held out for the test, likewise (default: 0.15)")
    group.add_argument("--val-folder", metavar="NAME", help="split folder of PHOTOS to use for validation")
    group.add_argument("--test-folder", metavar="NAME", help="split folder of PHOTOS to use as the test split")
    add_root_option(group)
    add_bad_files_option(group)


def default_run_path(photos: str, backbone: str, *, overwrite: bool = False) -> Path:
    """`runs/<photos>-<backbone>`; with `-2`, `-3`, ... behind it when that is taken and not to be overwritten."""
    backbone = backbone.replace("/", "-").replace(":", "-")
    base = Path("runs") / f"{source_name(photos)}-{backbone}"
    path, number = base, 1
    while path.exists() and not overwrite:
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


@contextmanager
def new_run_path(photos: str, backbone: str, *, overwrite: bool) -> Iterator[Path]:
    """`default_run_path`, taken at once where it is to be a new one, so that no other process takes it meanwhile.

    The folder goes again where nothing was put into it.
    """
    path = default_run_path(photos, backbone, overwrite=overwrite)
    if overwrite or launched()[0]:
        yield path
        return
    parent_is_new = not path.parent.exists()
    try:
        path = _taken(path, photos, backbone)
        yield path
    finally:
        with suppress(OSError):  # there is something in it, or it was never made
            path.rmdir()
            if parent_is_new:
                path.parent.rmdir()


def _taken(path: Path, photos: str, backbone: str) -> Path:
    while True:
        try:
            path.mkdir(parents=True)
        except OSError:
            free = default_run_path(photos, backbone)
            if free == path:  # no other process has it: whoever opens the run says why it cannot be made
                return path
            path = free
        else:
            return path


def short_path(path: Path | None) -> str:
    """A path below the working folder relative to it, any other as it is."""
    here = Path.cwd()
    return str(path.relative_to(here) if path and path.is_relative_to(here) else path)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given; the library's own defaults serve for the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _default(text: str) -> str:
    return f"(default: {text})".replace("%", "%%")


def _help(text: str, default: str) -> str:
    return f"{text.replace('%', '%%')} {_default(default)}"
