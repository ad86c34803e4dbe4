"""The generated pages are what the program says now."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import headstart

ROOT = Path(__file__).parents[1]
TOOLS = {"cli_docs": "cli.md", "api_docs": "api.md"}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TOOLS)
def test_generated_page_is_up_to_date(name: str) -> None:
    words = [sys.executable, ROOT / "tools" / f"{name}.py", "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_command_line_page_names_every_option() -> None:
    from headstart.cli import build_parser

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    parser, commands = build_parser()
    flags = {flag for one in (parser, *commands.values()) for action in one._actions for flag in action.option_strings}
    assert len(flags) > 50
    assert {flag for flag in flags if flag not in text} == set()
    assert all(f"## headstart {name}\n" in text for name in commands)


@pytest.mark.parametrize("name", TOOLS)
def test_check_tells_a_page_that_is_out_of_date(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("COLUMNS", "NO_COLOR"):
        monkeypatch.setenv(variable, "")  # which the tool sets, and which is then as it was
    module, page = tool(name), tmp_path / "docs" / TOOLS[name]
    monkeypatch.setattr(module, "PAGE", page)
    assert module.main(["--check"]) == 1
    assert f"{page} is not what" in capsys.readouterr().err
    page.parent.mkdir()
    page.write_text("old", encoding="utf-8")
    assert module.main(["--check"]) == 1
    assert page.read_text(encoding="utf-8") == "old"
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / TOOLS[name]).read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["test", "quick", "check", "docs", "demo"])
def test_makefile_has_the_target(target: str) -> None:
    assert f"\n{target}: $(INSTALLED)" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TOOLS)
def test_makefile_writes_and_checks_the_page(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"python tools/{name}.py\n" in makefile
    assert f"python tools/{name}.py --check\n" in makefile


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/coming-from.md", "docs/traps.md"])
def test_a_freeze_line_for_fit_leaves_the_first_stage_to_the_head(page: str) -> None:
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        for command, where in re.findall(r"(\bsummary [^`]*)?--freeze-line ([^\s`]+)", line):
            assert command or where.startswith("head,"), line


# ---- the page of the library -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api_docs() -> ModuleType:
    return tool("api_docs")


def test_python_page_has_every_name_and_no_dead_link() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#{2,3} (.*)$", text, flags=re.MULTILINE)
    assert {*headstart.__all__} <= {*headings}
    counts: dict[str, int] = {}
    anchors = set()
    for heading in headings:  # as GitHub makes them
        plain = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{plain}-{counts[plain]}" if counts.get(plain) else plain)
        counts[plain] = counts.get(plain, 0) + 1
    links = {*re.findall(r"\]\(#([^)]+)\)", text)}
    assert len(links) > 60
    assert links - anchors == set()
    assert " at 0x" not in text  # what is another one in every process


def test_an_exported_name_without_a_group_is_told(api_docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headstart, "__all__", sorted([*headstart.__all__, "new_verb"]))
    with pytest.raises(LookupError, match="new_verb"):
        api_docs.page()


def test_a_docstring_becomes_prose_and_lists(api_docs: ModuleType) -> None:
    text = """What it does to `a_b` *now*.

    Args:
        one, other: of `load`,
            going on. As in `make_runtime`.
        last: 2 * x_i and _this_.
    Raises:
        DataError: none. RecipeError: `x`.
    """
    lines = [line.removeprefix("    ") for line in text.splitlines()]
    assert api_docs._markdown("\n".join(lines), (), {"make_runtime": "make_runtime", "load": "load"}).splitlines() == [
        r"What it does to `a_b` \*now\*.",
        "",
        "Args:",
        "",
        "- `one`, `other`: of `load`, going on. As in [`make_runtime`](#make_runtime).",
        r"- `last`: 2 \* x_i and \_this\_.",
        "",
        "Raises:",
        "",
        "- `DataError`: none.",
        "- `RecipeError`: `x`.",
    ]
    assert api_docs._markdown("One thing. size: of it, in px. kind, way: words.", ("size", "kind", "way"), {}) == (
        "One thing.\n\n- `size`: of it, in px.\n- `kind`, `way`: words."
    )


def test_every_field_with_few_words_names_them() -> None:
    """What a value object takes from a short list stands in its docstring, which is all that the page has."""
    from headstart import recipe

    for owner, field, allowed in (
        (recipe.Stage, "optimizer", recipe.OPTIMIZERS),
        (recipe.Stage, "schedule", recipe.SCHEDULES),
        (recipe.Stage, "on_collapse", recipe.ON_COLLAPSE),
        (recipe.Stage, "warm_start", recipe.WARM_STARTS),
        (recipe.Stage, "select", recipe.SELECTIONS),
        (recipe.HiddenLayer, "activation", recipe.ACTIVATIONS),
        (recipe.AugmentSpec, "auto", recipe.AUTO_POLICIES),
    ):
        words = (owner.__doc__ or "").partition(f"{field}: ")[2]
        assert words, f"{owner.__name__}.{field} is not described"
        assert [word for word in allowed if f"`{word}`" not in words] == [], f"{owner.__name__}.{field}"
    named = {name for name in recipe.Stage.__dataclass_fields__ if name in (recipe.Stage.__doc__ or "")}
    assert {*recipe.Stage.__dataclass_fields__} - named == set()


# ---- the guide: tables written by hand say what the program does ------------------------------------------------


GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def test_guide_names_every_option_of_fit() -> None:
    from headstart.cli import build_parser

    fit = build_parser()[1]["fit"]
    flags = {flag for action in fit._actions for flag in action.option_strings if flag.startswith("--")}
    missing = {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", GUIDE)}
    assert missing == {"--help", "--no-head-batchnorm"}


def policy_row(name: str) -> list[str]:
    """What the guide's table has to say of a policy."""
    from headstart.recipe import POLICIES

    spec = POLICIES[name]

    def around(x: float) -> str:
        return f"{1 - x:g} - {1 + x:g}" if x else ""

    ways = {(0, 0): "", (0.5, 0): "left-right", (0.5, 0.5): "both ways"}
    cells = [
        f"`{name}`",
        ways[spec.hflip, spec.vflip],
        f"{spec.crop_scale[0]:g} - 1" if spec.crop_scale != (1, 1) else "",
        f"{spec.rotation:g} degrees" if spec.rotation else "",
        around(spec.brightness),
    ]
    assert spec.brightness == spec.contrast
    assert spec.translation == spec.zoom
    besides = [
        f"each colour channel {around(spec.channel_brightness)}" if spec.channel_brightness else "",
        f"noise {spec.noise:g}" if spec.noise else "",
        f"shifted and zoomed by up to {100 * spec.zoom:g} %" if spec.zoom else "",
        f"RandAugment: two operations of strength {spec.auto_magnitude} of 30" if spec.auto == "randaugment" else "",
        "TrivialAugment: one operation of any strength" if spec.auto == "trivial" else "",
    ]
    return [*cells, ", ".join(filter(None, besides))]


def test_guide_says_what_each_policy_does() -> None:
    from headstart.recipe import POLICIES, AugmentSpec, Recipe

    lines = [line.removeprefix("|").removesuffix("|") for line in GUIDE.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [row for row in map(policy_row, POLICIES) if row not in rows] == []
    assert f"**The default, `{Recipe().augment}`, mirrors left and right**" in GUIDE
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    assert {*AugmentSpec.__dataclass_fields__} <= keys
    example = re.search(r"```json\n(.*)\n```", GUIDE)
    assert example
    assert AugmentSpec.from_dict(json.loads(example[1])).rotation == 15


def test_guide_says_what_a_run_folder_holds() -> None:
    from headstart.run_record import RUN_FILES

    section = GUIDE.partition("## What a run folder holds")[2].partition("\n## ")[0]
    assert [name for name in (*RUN_FILES, "advice.json") if f"`{name}`" not in section] == []
    run = {"stage", "stage_index", "epoch", "lr", "train_loss", "train", "val", "best", "seconds", "event"}
    score = {"loss", "accuracy", "top5", "n"}
    assert [key for key in sorted(run | score) if f"`{key}`" not in section] == []


# ---- the table for who comes from elsewhere ---------------------------------------------------------------------


def test_what_is_named_for_who_comes_from_elsewhere_is_there() -> None:
    from headstart.cli import build_parser

    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line != "| you know | here |"]
    assert len(rows) > 60
    ours = [re.findall(r"`([^`]+)`", row.split(" | ", 1)[1]) for row in rows]
    parser, commands = build_parser()
    flags = {flag for one in (parser, *commands.values()) for action in one._actions for flag in action.option_strings}
    said = {flag for codes in ours for code in codes for flag in re.findall(r"(?<!\w)--[a-z][a-z-]+", code)}
    assert len(said) > 40
    assert said - flags == set()
    words = {word for codes in ours for code in codes for word in re.findall(r"headstart ([a-z]+) ", code)}
    assert words - {*commands} == set()
    calls = {name for codes in ours for code in codes for name in re.findall(r"^([A-Za-z]\w+)\(", code)}
    assert len(calls) > 10
    assert calls - {*headstart.__all__} == set()
