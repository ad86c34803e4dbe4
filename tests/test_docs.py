"""The generated pages are what the program says now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "cli_docs.py"


def test_command_line_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_command_line_page_names_every_option() -> None:
    from headstart.cli import build_parser

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    parser, commands = build_parser()
    flags = {flag for one in (parser, *commands.values()) for action in one._actions for flag in action.option_strings}
    assert len(flags) > 50
    assert {flag for flag in flags if flag not in text} == set()
    assert all(f"## headstart {name}\n" in text for name in commands)


def test_check_tells_a_page_that_is_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    tool = tmp_path / "tools" / "cli_docs.py"
    tool.write_text(TOOL.read_text(encoding="utf-8"), encoding="utf-8")
    page = tmp_path / "docs" / "cli.md"
    page.write_text("old", encoding="utf-8")

    def run(*arguments: str) -> int:
        return subprocess.run([sys.executable, tool, *arguments], capture_output=True, check=False).returncode

    assert run("--check") == 1
    assert page.read_text(encoding="utf-8") == "old"
    assert run() == 0
    assert run("--check") == 0
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["test", "quick", "check", "docs", "demo"])
def test_makefile_has_the_target(target: str) -> None:
    assert f"\n{target}: $(INSTALLED)" in (ROOT / "Makefile").read_text(encoding="utf-8")
