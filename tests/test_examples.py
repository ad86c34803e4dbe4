"""The five worked examples: their notebooks run, on a made set, and the architectures are those of the tutorials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_picture
from headstart import HeadSpec, HiddenLayer, Interrupted, RecipeError, create_classifier, set_freeze_line
from headstart.space import COURSE_SPACE

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TOOL = ROOT / "tools" / "notebooks.py"
CLASSES = {"emotions": 3, "cats_dogs_finetune": 2, "vgg16_180": 2, "dog_breeds": 6, "hotdog": 2}
OPTIONS = {"vgg16_180": ["--last-block", "layer4"], "dog_breeds": ["--top", "layer4"]}
TINY = ["--backbone", "test_resnet", "--weights", "none", "--image-size", "32", "--epochs-scale", "0"]


@pytest.fixture
def in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook that is opened there: `common` is found beside it, and nothing is drawn on a screen."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which a script sets, and which is then as it was
    for name in ("common", "matplotlib.pyplot"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def made_set(folder: Path, classes: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        for i in range(8):
            make_picture(rng, number % 3, (48, 40) if number < 3 else (40, 64)).save(
                folder / f"class{number}" / f"{i}.jpg", quality=95
            )
    return folder


def cells(name: str) -> list[str]:
    page = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (page["nbformat"], page["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in page["cells"]}) == len(page["cells"])
    assert page["cells"][0]["source"][0].startswith("# ")
    code = [cell for cell in page["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    return ["".join(cell["source"]) for cell in code]


def run_notebook(
    name: str, photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the notebook's cells leave behind, and what it recorded."""
    file = out.with_suffix(".jsonl")
    words = [str(photos), *TINY, *OPTIONS.get(name, []), "--out", str(out), "--record", str(file), *more]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells(name)):
        exec(compile(source, f"{name}.ipynb, cell {number}", "exec"), space)
    return space, json.loads(file.read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.usefixtures("in_examples")
@pytest.mark.parametrize("name", CLASSES)
def test_the_notebook_runs_and_records_every_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = made_set(tmp_path / "photos", CLASSES[name])
    space, line = run_notebook(name, photos, tmp_path / "runs", monkeypatch)
    recipes = space["recipes"]
    assert [entry["name"] for entry in line["recipes"]] == [recipe.name for recipe in recipes]
    assert [entry["tutorial_epochs"] for entry in line["recipes"]] == [[s.epochs for s in r.stages] for r in recipes]
    assert all(set(entry["budget"]["epochs"]) == {1} for entry in line["recipes"])
    assert (line["data"], line["backbone"], line["classes"]) == ("photos", "test_resnet", CLASSES[name])
    assert all(run.joinpath("report.html").is_file() for run in (tmp_path / "runs").glob("*-seed0"))
    printed = capsys.readouterr().out
    assert all(recipe.name in printed for recipe in recipes)
    if name == "dog_breeds":
        assert (tmp_path / "runs" / "dog_breeds.png").stat().st_size > 10_000
        assert [trial["published"] for trial in line["sweep"]] == list(COURSE_SPACE.published)
        assert space["space"] == COURSE_SPACE  # the table that the preset of `headstart sweep` holds


@pytest.mark.usefixtures("in_examples")
def test_a_budget_for_one_recipe_and_one_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = made_set(tmp_path / "photos", 2)
    space, line = run_notebook("hotdog", photos, tmp_path / "runs", monkeypatch, "--budget", "scratch=2@24")
    assert [entry["budget"] for entry in line["recipes"]] == [
        {"epochs": [1], "image_size": 32},
        {"epochs": [1], "image_size": 32},
        {"epochs": [2], "image_size": 24},
    ]
    with pytest.raises(
        RecipeError, match=r"--budget nothing: no such recipe\. There are: joint, joint, momentum 0\.9, scratch"
    ):
        run_notebook("hotdog", photos, tmp_path / "more", monkeypatch, "--budget", "nothing=2")
    # In a notebook the command line is the kernel's own: the defaults are taken.
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert space["read"](space["options"]("hotdog", backbone="resnet18", image_size=224)).backbone == "resnet18"


def test_what_can_be_put_right_is_told_in_a_line(tmp_path: Path) -> None:
    photos = made_set(tmp_path / "photos", 3)
    for name, words, told in (
        ("hotdog", [tmp_path / "nowhere"], "nowhere"),
        ("vgg16_180", [photos, "--backbone", "test_resnet", "--last-block", "layer4"], "two classes"),
    ):
        command = [sys.executable, EXAMPLES / f"{name}.py", *words, "--weights", "none"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"{name}.py: error: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


def test_what_is_our_fault_keeps_its_trace(monkeypatch: pytest.MonkeyPatch, in_examples: None) -> None:
    import common

    shown: list[BaseException] = []
    monkeypatch.setattr(sys, "__excepthook__", lambda kind, error, trace: shown.append(error))
    common._explain("hotdog.py", KeyError, KeyError("x"), None)
    assert [type(error) for error in shown] == [KeyError]
    with pytest.raises(SystemExit) as stop:
        common._explain("hotdog.py", Interrupted, Interrupted("Stopped by hand."), None)
    assert stop.value.code == 130


@pytest.mark.parametrize(("name", "option"), [("dog_breeds", "--top"), ("vgg16_180", "--last-block")])
def test_usage_names_where_fine_tuning_begins(name: str, option: str) -> None:
    usage = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").partition("# %%")[0]
    assert option in usage
    assert option in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_notebooks_are_what_the_scripts_say(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "examples").mkdir()
    tool = tmp_path / "tools" / "notebooks.py"
    tool.write_text(TOOL.read_text(encoding="utf-8"), encoding="utf-8")

    def run(*words: str | Path) -> int:
        return subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode

    assert run(TOOL, "--check") == 0
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(CLASSES)
    script = tmp_path / "examples" / "one.py"
    script.write_text('"""One."""\n\n# %%\nx = 1\n\n# %% [markdown]\n# Text.\n#\n# More.\n', encoding="utf-8")
    assert run(tool, "--check") == 1
    assert run(tool) == 0
    assert run(tool, "--check") == 0
    made = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]] == [
        ("markdown", "# One."),
        ("code", "x = 1"),
        ("markdown", "Text.\n\nMore."),
    ]
    script.unlink()
    assert run(tool, "--check") == 1  # a notebook without its script


def test_the_tables_are_those_the_records_give() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "examples.py", "table"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") > 4
    assert done.stdout.strip() in (EXAMPLES / "README.md").read_text(encoding="utf-8")


# Parameters as Keras and torchvision count them, running statistics left out: VGG16 without its top, with its two fully
# connected layers, EfficientNet-B0 and -B4 without their tops, ResNet-18 without its last layer.
EMOTION_HEAD = HeadSpec(pool="avg", hidden=(HiddenLayer(1024, batchnorm="after"), HiddenLayer(128)))
BOOK_HEAD = HeadSpec(pool="flatten", hidden=(HiddenLayer(256, "none", dropout=0.5),), output="sigmoid")
BREED_HEAD = HeadSpec(pool="avg", batchnorm=True, dropout=0.2)
ARCHITECTURES = [
    ("efficientnet_b4", 256, EMOTION_HEAD, 3, "all", 17_548_616, 1792 * 1024 + 1024 + 2048 + 1024 * 128 + 128 + 387),
    ("vgg16", 180, BOOK_HEAD, 2, "block5", 14_714_688, 12_800 * 256 + 256 + 257),
    ("efficientnet_b0", 224, BREED_HEAD, 120, "blocks.6*", 4_007_548, 2 * 1280 + 1280 * 120 + 120),
    ("resnet18", 224, HeadSpec(), 2, "all", 11_176_512, 512 * 2 + 2),
]


@pytest.mark.parametrize(("name", "size", "head", "classes", "line", "backbone", "on_top"), ARCHITECTURES)
def test_the_full_architecture_has_the_tutorials_parameters(
    name: str, size: int, head: HeadSpec, classes: int, line: str, backbone: int, on_top: int
) -> None:
    names = [f"class{i}" for i in range(classes)]
    model = create_classifier(name, names, head=head, weights="none", image_size=size)
    assert sum(p.numel() for p in model.backbone.parameters()) == backbone
    assert sum(p.numel() for p in model.head.parameters()) == on_top
    placed = set_freeze_line(model, line, batchnorm="frozen" if line == "blocks.6*" else "fixed")
    assert placed.trainable_parameters + placed.frozen_parameters == backbone + on_top
    if line == "all":
        assert placed.trainable_parameters == backbone + on_top
    if line == "block5":  # three convolutions from 512 to 512 channels
        assert placed.trainable_parameters == 3 * (512 * 512 * 9 + 512) + on_top
    if line == "blocks.6*":
        statistics = {n for n, m in model.named_modules() if "BatchNorm" in type(m).__name__}
        trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
        assert {n.split(".")[0] for n in trained} == {"blocks", "conv_head"}
        assert all(n.startswith("blocks.6.") for n in trained if n.startswith("blocks."))
        assert not {f"backbone.{n}".rsplit(".", 1)[0] for n in trained} & statistics


@pytest.mark.slow
def test_the_penultimate_features_of_vgg16_are_4096() -> None:
    model = create_classifier("vgg16", ("cat", "dog"), weights="none")
    assert sum(p.numel() for p in model.backbone.parameters()) == 134_260_544
    assert set_freeze_line(model, "head").trainable_parameters == 4096 * 2 + 2
