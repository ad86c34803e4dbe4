"""What a start costs: `headstart predict` on one picture beyond torch and timm, and the self-test of bfloat16."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headstart import Recipe, Stage, fine_tune

# Processor time, of child processes too: it does not depend on what else the machine does.
CODE = """
import os, sys, time
def spent():
    return sum(os.times()[:4])
import torch, timm
torch.set_num_threads(1)
imported = started = spent()
from headstart.cli import main
code = main(["predict", sys.argv[1], sys.argv[2], "--json", "--workers", "1"])
print(round(spent() - started, 3), round(imported, 3), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_predict_is_quick_beyond_importing_torch_and_timm(photos: Path, tmp_path: Path) -> None:
    recipe = Recipe(stages=(Stage(epochs=1, views=1),))
    fine_tune(photos, backbone="mobilenetv2_100", weights="none", recipe=recipe, limit=9, out=tmp_path / "run")
    arguments = [sys.executable, "-c", CODE, str(tmp_path / "run"), str(photos / "red" / "red0.jpg")]
    seconds, imports = [], []
    for _ in range(3):  # what else the machine does stretches processor time, too, through its caches
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert '"pred"' in done.stdout
        for figure, figures in zip(done.stderr.splitlines()[-1].split(), (seconds, imports), strict=True):
            figures.append(float(figure))
    # 0.5 to 0.7 s where this was written. A machine that others slow down takes longer for both: a seventh to a fifth
    # of what it has just taken to import torch and timm.
    assert min(seconds) < max(1.0, min(imports) / 4)


SELF_TEST = """
import time, torch
from headstart.numerics import bf16_errors
torch.set_num_threads(1)
x = torch.ones(1, requires_grad=True)
torch.autograd.grad(x * 2, x)  # starts what every training starts
started = time.process_time()
bf16_errors()
print(time.process_time() - started)
"""


@pytest.mark.slow
def test_the_self_test_of_bfloat16_is_quick() -> None:
    seconds = [
        float(subprocess.run([sys.executable, "-c", SELF_TEST], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    # 0.03 to 0.04 where this was written, with bfloat16 emulated and kernels made at their first use; 0.05 is meant.
    assert min(seconds) < 0.1
