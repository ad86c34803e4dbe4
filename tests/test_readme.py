"""The commands and the Python of three pages run as they are written, on a made folder and a local hub cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from safetensors.torch import save_file

from conftest import make_picture

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md", "docs/coming-from.md")
# Set-up, tried by continuous integration itself; what has a test of its own, and does not end by itself; what takes
# more validation pictures than there are here.
NOT_HERE = ("make ", "headstart demo", "headstart serve", "headstart predict runs/first new-photos --unknown 0.05")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """In the order of the page: the lines of `bash` blocks, and those behind a prompt in `console` blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = []
    for language, block in re.findall(r"^```(bash|console)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        shown = [line for line in block.splitlines() if line.strip()]
        lines += shown if language == "bash" else [line[2:] for line in shown if line.startswith("$ ")]
    return [line.split("  #")[0] for line in lines if not line.startswith(NOT_HERE)]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working folder with `photos`, and a hub cache laid out as the real one, holding random weights."""
    folder = tmp_path
    rng = np.random.default_rng(0)
    for hue, name in enumerate(("roses", "sunflowers", "tulips")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(1, 9):
            make_picture(rng, hue, (64, 64)).save(folder / "photos" / name / f"{i}.jpg")
    shutil.make_archive(str(folder / "photos"), "zip", folder / "photos")
    for name in ("roses", "tulips"):
        (folder / "new-photos" / name).mkdir(parents=True)
        make_picture(rng, 0, (64, 64)).save(folder / "new-photos" / name / "1.jpg")
    (folder / "something-else").mkdir()
    make_picture(rng, 1, (64, 64)).save(folder / "something-else" / "1.jpg")
    hub = folder / "hub" / "models--timm--mobilenetv2_100.ra_in1k"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    snapshot = hub / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    save_file(timm.create_model("mobilenetv2_100").state_dict(), snapshot / "model.safetensors")
    return folder


# What it is given is run in one process each, since importing torch takes longer than most of the commands.
RUN_COMMANDS = """
import contextlib, io, json, subprocess, sys
from headstart.cli import main
for line in json.load(sys.stdin):
    words, out = [word.strip("'\\"") for word in line.split()], io.StringIO()
    if words[0] == "headstart":
        with contextlib.redirect_stdout(out):
            code = main(words[1:])
    else:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        code = done.returncode if out.write(done.stdout) else "and printed nothing"
    assert code == 0, f"{line}: exit code {code}"
    assert out.getvalue(), f"{line}: printed nothing"
"""
RUN_PYTHON = """
import json, sys
for number, block in enumerate(json.load(sys.stdin)):
    exec(compile(block, f"block {number}", "exec"), {"__name__": "__main__"})
"""


def run(here: Path, program: str, given: list[str], *options: str) -> None:
    environment = os.environ | {
        "HF_HUB_CACHE": str(here / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HEADSTART_CACHE": str(here / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, *options, "-c", program],
        cwd=here, env=environment, input=json.dumps(given), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_and_python_run_as_written(page: str, here: Path) -> None:
    lines = commands(page)
    assert len(lines) > 4
    run(here, RUN_COMMANDS, lines)
    run(here, RUN_PYTHON, blocks(page, "python"), "-W", "error")


def test_the_result_table_is_the_one_the_records_give() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "real_sets.py", "table"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") >= 8  # six sets and two lines of heading
    assert done.stdout.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_that_is_pointed_to_is_there() -> None:
    for page in (*PAGES, "ARCHITECTURE.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page} -> {target}"
