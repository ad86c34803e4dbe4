"""The command line: what options become, what is printed where, exit codes, and how quickly help is there."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from headstart import cli
from headstart.cli import COMMANDS, main
from headstart.cli_options import STAGE_OPTIONS, default_run_path, new_run_path
from headstart.cli_overrides import apply_overrides, picture_overrides, read_hidden
from headstart.errors import DataError, Interrupted, RecipeError
from headstart.recipe import DEFAULT_BACKBONE, POLICIES, RECIPES, AugmentSpec, HeadSpec, HiddenLayer, Stage

FINE_TUNE = RECIPES["fine-tune"]
METRICS: dict[str, Any] = {
    "n": 40,
    "accuracy": 0.925,
    "accuracy_ci95": [0.801, 0.974],
    "top5": None,
    "log_loss": 0.25,
    "balanced_accuracy": 0.91,
    "majority_baseline": 0.5,
    "weighted_precision": 0.93,
    "weighted_recall": 0.925,
    "weighted_f1": 0.926,
    "per_class": [
        {"name": "cat", "n": 20, "precision": 0.9, "recall": 0.95, "f1": 0.924},
        {"name": "dog", "n": 20, "precision": 0.947, "recall": 0.9, "f1": 0.923},
    ],
}
STAGE_FACTS = {
    "name": "head",
    "freeze_line": "head",
    "trainable_parameters": 2562,
    "best_epoch": 4,
    "epochs": 30,
    "best_val_loss": 0.31,
    "best_val_accuracy": 0.9,
    "seconds": 75.2,
}


def headstart(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "headstart.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command that must exit 2 says on stderr; nothing may be on stdout."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    assert "Traceback" not in output.err
    return output.err


# ---- help ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
def test_help_is_instant_and_needs_no_heavy_package(words: list[str]) -> None:
    heavy = ("torch", "timm", "numpy", "PIL", "sklearn", "matplotlib")
    block = f"import sys; sys.modules |= dict.fromkeys({heavy!r}); sys.argv[0] = 'headstart'; "
    code = block + "from headstart.cli import main; main()"
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, check=False
        )
        after = os.times()  # of the processor, not of the clock: other work on the machine must not fail this
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(" ".join(["usage: headstart", *words]))
    assert min(seconds) < 0.5


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"headstart {version('headstart')}\n"


def test_help_shows_the_recipes_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "head", replace(RECIPES["head"], lr=0.123, stages=(Stage(epochs=77),)))
    text = " ".join(cli.build_parser()[1]["fit"].format_help().split())
    assert "; head 0.123; " in text
    assert "; head 77; " in text
    assert "(default: adamw)" in text


def test_help_states_the_defaults_that_are_used() -> None:
    from headstart.comparison import compare
    from headstart.groundwork import make_bench
    from headstart.recipes import fine_tune
    from headstart.sweeps import sweep

    said = {name: " ".join(one.format_help().split()) for name, one in cli.build_parser()[1].items()}
    for name, verb in (("fit", fine_tune), ("sweep", sweep)):
        default = inspect.signature(verb).parameters["recipe"].default
        assert f"such as a run's recipe.json (default: {default})" in said[name]
    for verb in (fine_tune, compare, make_bench):
        shares = inspect.signature(verb).parameters
        assert (shares["val"].default, shares["test"].default) == (0.15, 0.15)
    holding_out = [text for text in said.values() if "share held out" in text]
    assert len(holding_out) > 4
    assert all(text.count("(default: 0.15)") == 2 for text in holding_out)


def test_help_says_what_becomes_of_bad_files() -> None:
    parsers = cli.build_parser()[1]
    said = {name: " ".join(parsers[name].format_help().split()) for name in ("predict", "evaluate", "preview")}
    assert (
        "it is named, the others are predicted, and the exit code is 2, or 0 with skip (default: error)"
        in (said["predict"])
    )
    assert "cannot be read: stop, or name it and go on (default: error)" in said["evaluate"]
    assert "stop where it is drawn (no others are opened), or open all" in said["preview"]


def test_every_stage_field_has_its_option() -> None:
    fields = {name for name in Stage.__dataclass_fields__ if name not in ("name", "collapse_ratio", "collapse_margin")}
    assert {option.name for option in STAGE_OPTIONS} == fields


# ---- options become a recipe -----------------------------------------------------------------------------------


def test_no_options_leave_the_recipe_as_it_is() -> None:
    parser = cli.build_parser()[1]["fit"]
    options = vars(parser.parse_args(["photos"]))
    for recipe in RECIPES.values():
        assert apply_overrides(recipe, options) == recipe


def test_one_value_is_for_all_stages_and_a_list_for_each() -> None:
    recipe = apply_overrides(FINE_TUNE, {"epochs": "3", "batch_size": "16,8", "freeze_line": "head,last:3"})
    assert [(s.epochs, s.batch_size, s.freeze_line) for s in recipe.stages] == [(3, 16, "head"), (3, 8, "last:3")]
    assert recipe.stages[0] == replace(FINE_TUNE.stages[0], epochs=3, batch_size=16)


def test_an_empty_place_leaves_that_stage() -> None:
    recipe = apply_overrides(FINE_TUNE, {"epochs": ",2"})
    assert [s.epochs for s in recipe.stages] == [FINE_TUNE.stages[0].epochs, 2]


def test_every_stage_option_reaches_its_field() -> None:
    given = {
        "freeze_line": "blocks.6*", "batchnorm": "frozen", "epochs": "7", "batch_size": "9", "accumulate": "2",
        "optimizer": "sgd", "momentum": "0.5", "lr_scale": "0.5",
        "head_lr_multiplier": "3", "weight_decay": "0.2", "schedule": "constant",
        "warmup": "0.3", "label_smoothing": "0.15", "class_weights": "balanced", "balanced_sampling": "on",
        "early_stop": "4", "clip_norm": "1.5", "select": "accuracy", "views": "6", "on_collapse": "stop",
        "layer_decay": "0.75", "ema": "0.99", "wise": "on", "mixup": "0.2", "cutmix": "0.5",
        "checkpointing": "on",
    }  # fmt: skip
    assert {*given, "warm_start"} == {option.name for option in STAGE_OPTIONS}
    assert apply_overrides(RECIPES["head"], {"warm_start": "ridge"}).stages[0].warm_start == "ridge"
    (stage,) = apply_overrides(RECIPES["head"], given).stages
    for name, text in given.items():
        value = getattr(stage, name)
        assert value != getattr(Stage(), name)
        assert (value is True) if text == "on" else (str(value).removesuffix(".0") == text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--warm-start ridge", r"stage 'fine-tune': warm_start is 'ridge'.*'last:80%'.*--warm-start ridge,none.*--rec"),
        ("--warm-start ,ridge", r"'last:80%'.*--warm-start ridge,none"),
        ("--recipe head --freeze-line all --warm-start ridge", r"stage 'head'.*'all'.*freeze_line 'head'"),
        (
            "--warm-start ridge,none --hidden 16",
            r"stage 'head': warm_start is 'ridge', which.*one Linear.*given hidden\.",
        ),
        ("--optimizer lbfgs,adamw --head-dropout 0.2", r"optimizer is 'lbfgs', which.*given dropout\."),
        ("--recipe head --optimizer lbfgs --head-batchnorm --output sigmoid", r"given batchnorm, output\."),
        ("--optimizer lbfgs", r"optimizer is 'lbfgs', but the freeze line.*\(--optimizer lbfgs,adamw\).*--recipe head"),
        ("--optimizer lbfgs --batch-size 64", r"but the freeze line.*\(--optimizer lbfgs,adamw\)"),
        ("--optimizer lbfgs --warm-start ridge", r"\(--warm-start ridge,none --optimizer lbfgs,adamw\)"),
        (
            "--optimizer lbfgs --freeze-line head,head",
            r"batch_size is 32, ema is 0.9, warmup.*Take batch_size 64, ema 0.0, warmup 0.0,.*--optimizer lbfgs,adamw",
        ),
    ],
)
def test_what_is_for_a_linear_head_alone_is_refused_before_anything_is_read(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "fit", tmp_path / "no pictures", *options.split())
    assert re.search(message, error)


@pytest.mark.parametrize(
    "options", ["--warm-start ridge,none --optimizer lbfgs,adamw", "--recipe head --optimizer lbfgs"]
)
def test_a_linear_head_in_a_stage_of_its_own_is_not_refused(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no pictures" in error_of(capsys, "fit", tmp_path / "no pictures", *options.split())


def test_recipe_and_head_options_reach_their_fields() -> None:
    options = {
        "lr": "0.02", "seed": "5", "drop_rate": "0.1", "drop_path_rate": "0.2", "augment": "light", "pool": "avg",
        "hidden": "256:relu", "head_batchnorm": True, "head_dropout": "0.2", "output": "sigmoid",
        "features_from": "blocks.3",
    }  # fmt: skip
    recipe = apply_overrides(FINE_TUNE, options)
    assert recipe == replace(
        FINE_TUNE, lr=0.02, seed=5, drop_rate=0.1, drop_path_rate=0.2, augment="light",
        head=HeadSpec("avg", True, (HiddenLayer(256),), 0.2, "sigmoid", "blocks.3"),
    )  # fmt: skip


def test_erasing_is_added_to_the_policy() -> None:
    assert apply_overrides(FINE_TUNE, {"erasing": "0.25"}).augment == replace(POLICIES["photo"], erasing=0.25)
    both = apply_overrides(FINE_TUNE, {"erasing": "0.5", "augment": "trivial"})
    assert both.augment == replace(POLICIES["trivial"], erasing=0.5)
    with pytest.raises(RecipeError, match=r"erasing is 1\.5; it takes a number from 0 to 1"):
        apply_overrides(FINE_TUNE, {"erasing": "1.5"})


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("none", ()),
        ("256", (HiddenLayer(256),)),
        ("512:none:bn-after:0.2,64:gelu", (HiddenLayer(512, "none", "after", 0.2), HiddenLayer(64, "gelu"))),
        ("64:bn-before", (HiddenLayer(64, "relu", "before"),)),
        ("64:.5", (HiddenLayer(64, dropout=0.5),)),
    ],
)
def test_hidden_layers(text: str, layers: tuple[HiddenLayer, ...]) -> None:
    assert read_hidden(text) == layers


def test_augmentation_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"rotation": 12, "crop_scale": [0.5, 1]}', encoding="utf-8")
    recipe = apply_overrides(FINE_TUNE, {"augment": str(path)})
    assert recipe.augment == AugmentSpec(rotation=12, crop_scale=(0.5, 1))


def test_picture_options() -> None:
    given = {"image_size": "180", "mean": "0.5", "std": "0.2,0.3,0.4", "interpolation": "bilinear", "fit": "squash"}
    assert picture_overrides({**given, "crop_pct": None}) == {
        "image_size": 180,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bilinear",
        "fit": "squash",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": "1,2,3"}, r"--epochs is '1,2,3': 3 values.*has 2 stages \(head, fine-tune\)"),
        ({"epochs": "three"}, "--epochs is 'three'; it takes a whole number"),
        ({"epochs": ""}, "--epochs is empty"),
        ({"epochs": "0"}, "stage 'head': epochs is 0"),
        ({"weight_decay": "x"}, "--weight-decay is 'x'; it takes a number"),
        ({"balanced_sampling": "yes"}, "--balanced-sampling is 'yes'; it takes on or off"),
        ({"optimizer": "adamm"}, "optimizer is 'adamm'.*Did you mean: adam"),
        ({"lr": "-1"}, "lr is -1.0"),
        ({"hidden": "big"}, "--hidden: width is 'big'"),
        ({"hidden": "64:tanh"}, "activation is 'tanh'"),
        ({"hidden": "64:bn-middle"}, "batchnorm is 'middle'"),
        ({"hidden": "64:relu:gelu"}, "'64:relu:gelu' gives its activation twice"),
        ({"hidden": "64:0.2.3"}, "--hidden: dropout is '0.2.3'"),
        ({"head_dropout": "much"}, "--head-dropout is 'much'"),
        ({"augment": "lihgt"}, "neither a policy.*nor a file.*Did you mean: light"),
    ],
)
def test_wrong_values_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply_overrides(FINE_TUNE, options)


def test_one_stage_is_not_called_stages() -> None:
    with pytest.raises(RecipeError, match=r"has 1 stage \(head\)\."):
        apply_overrides(RECIPES["head"], {"epochs": "1,2"})


def test_an_augmentation_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.json: not a JSON file"):
        apply_overrides(FINE_TUNE, {"augment": str(path)})


@pytest.mark.parametrize("text", ["1,2", "1,2,x", ""])
def test_wrong_channels_are_named(text: str) -> None:
    with pytest.raises(RecipeError, match="--mean"):
        picture_overrides({"mean": text})


# ---- options that argparse refuses -----------------------------------------------------------------------------


def test_an_unknown_option_names_near_matches(capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, "fit", "photos", "--epocs", "3")
    assert (
        text
        == "headstart fit: error: '--epocs' is not understood. Did you mean: --epochs?\nSee `headstart fit --help`.\n"
    )


def test_options_are_never_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'--epoch' is not understood. Did you mean: --epochs?" in error_of(capsys, "fit", "photos", "--epoch", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fitt"], "invalid choice: 'fitt'"),
        (["fit"], "required: PHOTOS"),
        (["fit", "photos", "--bad-files", "drop"], "invalid choice: 'drop'"),
        (["fit", "photos", "--val", "much"], "invalid float value: 'much'"),
        (["predict", "run", "a.jpg", "--csv", "x", "--json"], "not allowed with"),
        (["predict", "run", "a.jpg", "--top", "0"], "--top is 0"),
    ],
)
def test_wrong_command_lines_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, *arguments)


# ---- what the commands call and print --------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the library's verbs: each checks that the real one takes such a call, and notes it."""
    from headstart import asking, recipes

    noted: dict[str, Any] = {"raise": None}
    result = SimpleNamespace(
        history=[],
        metrics={"stages": [STAGE_FACTS], "val": METRICS, "test": {**METRICS, "accuracy": 0.95}},
        run_path=Path("runs/x"),
        report_path=Path("runs/x/report.html"),
    )

    def stand_in(room: Any, name: str, answer: Any) -> None:
        signature = inspect.signature(getattr(room, name))

        def call(*args: Any, **options: Any) -> Any:
            noted[name] = signature.bind(*args, **options).arguments
            if noted["raise"]:
                raise noted["raise"]
            return answer(*args) if callable(answer) else answer

        monkeypatch.setattr(room, name, call)

    stand_in(recipes, "fine_tune", result)
    stand_in(asking, "evaluate_run", METRICS)
    return noted


def test_fit_calls_fine_tune_with_what_was_given(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = """fit photos --backbone resnet18 --weights w.safetensors --out runs/x --epochs 2,1 --val 0.2
        --test-folder val --bad-files skip --image-size 96 --device cpu --precision fp32 --workers 1 --limit 50
        --quiet --no-cache"""
    assert main(arguments.split()) == 0
    call = calls["fine_tune"]
    assert call.pop("recipe") == apply_overrides(FINE_TUNE, {"epochs": "2,1"})
    assert call == {
        "data": "photos", "backbone": "resnet18", "weights": "w.safetensors", "out": "runs/x", "overwrite": False,
        "spec_overrides": {"image_size": 96}, "progress": False, "val": 0.2, "test_folder": "val", "bad_files": "skip",
        "limit": 50, "device": "cpu", "precision": "fp32", "workers": 1, "cache": False,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "head   head           2,562     4 of 30     0.310         0.900  1:15\n" in out
    assert "test        40     0.950  0.801 - 0.974" in out
    assert out.endswith("run     runs/x\nreport  runs/x/report.html\n")


def test_fit_leaves_what_was_not_given_to_the_library(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "data/flowers/"])
    assert calls["fine_tune"] == {
        "data": "data/flowers/", "backbone": DEFAULT_BACKBONE, "weights": None, "recipe": FINE_TUNE,
        "out": Path("runs/flowers-mobilenetv2_100"), "overwrite": False, "spec_overrides": {}, "progress": True,
    }  # fmt: skip
    main(["fit", "data/flowers", "--recipe", "scratch"])
    assert calls["fine_tune"]["weights"] is None  # the library chooses: random where the recipe is from scratch


def test_a_new_run_folder_is_taken_at_once_and_given_back_where_nothing_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_run_path("photos", "x", overwrite=False) as one, new_run_path("photos", "x", overwrite=False) as two:
        assert (one, two) == (Path("runs/photos-x"), Path("runs/photos-x-2"))
        (two / "model.json").write_text("{}")
    assert [entry.name for entry in Path("runs").iterdir()] == ["photos-x-2"]
    (two / "model.json").unlink()
    two.rmdir()
    Path("runs").rmdir()
    Path("runs").symlink_to("nowhere")
    with new_run_path("photos", "x", overwrite=False) as path:
        assert path == Path("runs/photos-x")
    Path("runs").unlink()
    with pytest.raises(DataError), new_run_path("photos", "x", overwrite=False):
        raise DataError("no such folder")
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["compare photos", "fit photos --auto", "evaluate runs/x photos"])
def test_only_a_fit_runs_in_several_processes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = error_of(capsys, *command.split())
    assert "only fit trains in several" in " ".join(said.split())
    assert main(["cache", "list"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "all")
    assert main(["cache", "list"]) == 0


def test_of_other_processes_a_line_of_an_error_is_shown(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls["raise"] = DataError("2 pictures cannot be read:\n  a\x1b[2J.jpg\n  b.jpg")
    assert error_of(capsys, "fit", "photos").endswith(":\n  a\\x1b[2J.jpg\n  b.jpg\n")
    monkeypatch.setenv("RANK", "1")  # left over from something: there is one process
    assert error_of(capsys, "fit", "photos").endswith("b.jpg\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert error_of(capsys, "fit", "photos") == "headstart fit: error: (process 1) 2 pictures cannot be read:\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no such file names there")
def test_names_of_bad_files_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (40, 40), (90 * i, 200, 10)).save(tmp_path / name / f"{name}{i}.png")
    bad = tmp_path / "cat" / "a\x1b[2J\u202e.jpg"
    bad.write_bytes(b"")
    assert main(["audit", str(tmp_path), "--fast", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[2J\\u202e.jpg" in out
    assert not {"\x1b", "\u202e"} & {*out}


def test_default_run_folder_is_numbered_when_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "hf-hub:timm/vgg16"
    assert default_run_path("my/photos/", name) == Path("runs/photos-hf-hub-timm-vgg16")
    Path("runs/photos-hf-hub-timm-vgg16").mkdir(parents=True)
    assert default_run_path("my/photos", name) == Path("runs/photos-hf-hub-timm-vgg16-2")
    Path("runs/photos-hf-hub-timm-vgg16-2").mkdir()
    assert default_run_path("my/photos", name) == Path("runs/photos-hf-hub-timm-vgg16-3")
    assert default_run_path("my/photos", name, overwrite=True) == Path("runs/photos-hf-hub-timm-vgg16")
    assert default_run_path(".", "x") == Path(f"runs/{tmp_path.name}-x")


def test_evaluate_prints_classes_and_scores(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/x", "photos/test", "--device", "cpu"]) == 0
    assert calls["evaluate_run"] == {"run": "runs/x", "folder": "photos/test", "device": "cpu", "progress": True}
    out = capsys.readouterr().out
    assert "dog                  20      0.947   0.900  0.923\n" in out
    assert "weighted mean        40      0.930   0.925  0.926\n" in out
    assert "test        40     0.925  0.801 - 0.974" in out
    main(["evaluate", "runs/x", "photos/test", "--json"])
    assert json.loads(capsys.readouterr().out) == METRICS


def test_demo_ends_with_the_scores_and_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headstart import demo

    noted = {}

    def run_demo(**options: Any) -> SimpleNamespace:
        noted.update(inspect.signature(real).bind(**options).arguments)
        return SimpleNamespace(
            scores={"from scratch": METRICS, "fine-tuned": METRICS}, report_path=Path("runs/demo/report.html")
        )

    real = demo.run_demo
    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert main(["demo", "--out", "x", "--quiet"]) == 0
    assert noted == {"out": "x", "progress": False}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == ["from scratch", "fine-tuned"]
    assert lines[-1] == "report  runs/demo/report.html"


def test_an_error_of_ours_is_one_message_and_exit_2(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    calls["raise"] = DataError("No picture in photos. Give another folder.")
    assert error_of(capsys, "fit", "photos") == "headstart fit: error: No picture in photos. Give another folder.\n"
    calls["raise"] = PermissionError(13, "Permission denied", "runs/x")
    assert "error: [Errno 13] Permission denied: 'runs/x'" in error_of(capsys, "evaluate", "runs/x", "photos")


@pytest.mark.parametrize("arguments", [["--debug", "fit", "photos"], ["fit", "photos", "--debug"]])
def test_debug_shows_the_trace(arguments: list[str], calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    calls["raise"] = DataError("No picture.")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("headstart fit: error: No picture.\n")


def test_a_bug_of_ours_is_not_dressed_up(calls: dict[str, Any]) -> None:
    for bug in (ZeroDivisionError("bug"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        calls["raise"] = bug
        with pytest.raises(type(bug)):
            main(["fit", "photos"])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried 9")])
def test_memory_that_runs_out_is_one_message(
    error: Exception, calls: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    calls["raise"] = error
    said = error_of(capsys, "fit", "photos")
    assert said.startswith(f"headstart fit: error: Out of memory ({type(error).__name__}: ")
    assert said.endswith("Take a smaller --image-size or --backbone, or free memory.\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Interrupted("Stopped. Go on with: headstart fit ..."), "Stopped. Go on with: headstart fit ...\n"),
        (KeyboardInterrupt(), "Stopped by hand. Give the same command again to start over.\n"),
    ],
)
def test_ctrl_c_says_how_to_go_on_and_exits_130(
    error: BaseException, said: str, calls: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    calls["raise"] = error
    assert main(["fit", "photos"]) == 130
    assert capsys.readouterr().err == said


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    code = (
        "import sys; from headstart import cli; from dataclasses import replace\n"
        "cli.COMMANDS['demo'] = replace(cli.COMMANDS['demo'], run=lambda args: print('x' * 9_000_000) or 0)\n"
        "sys.exit(cli.main(['demo']))"
    )
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.read(10)
    reader.stdout.close()
    assert reader.stderr.read() == b""
    reader.stderr.close()
    assert reader.wait() == 0


@pytest.mark.parametrize("closed", ["unread", "closed"])
def test_a_stderr_that_nobody_reads_changes_no_exit_code(closed: str) -> None:
    code = (
        "import sys; from headstart import cli, terminal; from dataclasses import replace\n"
        "from headstart.errors import DataError\n"
        "def work(args):\n"
        "    terminal.say('x' * 9_000)\n"
        "    if args.out: raise DataError('no such folder')\n"
        "    print('done'); return 0\n"
        "cli.COMMANDS['demo'] = replace(cli.COMMANDS['demo'], run=work)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    for words, expected in ((["demo"], (0, b"done\n")), (["demo", "--out", "x"], (2, b""))):
        command = [sys.executable, "-c", code, *words]
        if closed == "closed":
            command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, check=False)
        assert (done.returncode, done.stdout) == expected
    os.close(writer)


def test_a_broken_pipe_that_is_not_stdout_is_an_error(
    calls: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    calls["raise"] = BrokenPipeError(32, "Broken pipe")
    assert error_of(capsys, "fit", "photos") == "headstart fit: error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("words", [["cache", "list"], ["--help"], ["cache", "--help"]])
def test_without_a_stdout_the_work_is_done(words: list[str]) -> None:
    command = [sys.executable, "-m", "headstart.cli", *words]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("columns", "widest"), [("abc", 100), ("0", 100), ("-3", 100), ("1", 40), ("60", 58)])
def test_help_is_as_wide_as_can_be_read(columns: str, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    text = cli.build_parser()[0].format_help()
    assert widest - 12 <= max(map(len, text.partition("options:")[2].splitlines())) <= widest
