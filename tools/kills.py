"""Kill a fit again and again with SIGKILL, damage what it goes on from, and compare what it ends in.

    python tools/kills.py --n 500      # make soak

Each fit is a process of its own on a few made pictures: a head with dropout on a frozen network, then all of it with a
running average and mixed weights, every optimiser step followed by a point. It is killed after a time that is drawn by
(seed, kill), and started again with `resume`, until it comes to its end; then the next one begins. After
every third kill one of the files of its points is damaged: cut, flipped in one bit, emptied, removed. Exit code 1 when
a run ends in other bits than the one that nobody stopped, in an error, or in fewer steps than there are.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import headstart
from headstart import HeadSpec, Recipe, Stage, points
from headstart.run import tidy_up
from headstart.run_record import POINT_FILES, is_complete

LONGEST_SECONDS = 60.0  # of a fit that nobody kills: later it hangs
PLAN = Recipe(
    stages=(
        Stage(epochs=2, views=2, batch_size=8),
        Stage(name="all", freeze_line="all", epochs=3, batch_size=8, lr_scale=0.1, ema=0.9, wise=True),
    ),
    head=HeadSpec(dropout=0.3), lr=0.01,
)  # fmt: skip


@dataclass
class Outcome:
    """What became of the fits. where: kills by how far the run was; failures: one line each."""

    kills: int = 0
    damaged: int = 0
    runs: int = 0
    where: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def make_photos(folder: Path) -> Path:
    """Three classes of ten small pictures."""
    rng = np.random.default_rng(0)
    for hue, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 120, (32, 32, 3))
            pixels[..., hue] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def digest(run: Path) -> str:
    """Of what the run ended in: weights and predictions."""
    return hashlib.sha256((run / "model.safetensors").read_bytes() + (run / "predictions.csv").read_bytes()).hexdigest()


def fit(photos: Path, out: Path) -> None:
    """One fit, gone on with where it was begun."""
    points.EVERY_SECONDS, points.SHARE = 0.0, 1e9
    headstart.fine_tune(
        photos, out=out, recipe=PLAN, backbone="test_resnet", weights="none", spec_overrides={"image_size": 32},
        device="cpu", precision="fp32", workers=1, resume=True, audit=False,
    )  # fmt: skip


def in_a_process(work: Callable[[], None], *, seconds: float) -> int | None:
    """Its exit code, or None where it was killed after so long."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def how_far(run: Path) -> str:
    """How far a killed run is, by its newest point."""
    if not run.is_dir():
        return "before its folder"
    point = points.read_point(run)
    if point is None:
        return "before its first point"
    return f"stage {point.values['run']['stage']}" + ("" if "course" in point.values else " begins")


def damage(run: Path, draw: random.Random) -> bool:
    """Damage one of the files of the run's points, if it has any."""
    files = [run / name for name in POINT_FILES if (run / name).is_file()]
    if not files:
        return False
    path, way = draw.choice(files), draw.choice(("cut", "flip", "empty", "remove"))
    data = bytearray(path.read_bytes())
    if way == "remove":
        path.unlink()
    elif data:
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes({"cut": data[:place], "flip": data, "empty": b""}[way])
    return True


def kill(n: int, *, seed: int = 0, tell: Callable[[int], None] | None = None) -> Outcome:
    """Kill n times."""
    for room in ("recipes", "report"):  # once, not in each process
        importlib.import_module(f"headstart.{room}")
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="headstart-kills-") as name:
        folder = Path(name)
        photos, out = make_photos(folder / "photos"), folder / "run"
        os.environ["HEADSTART_CACHE"] = str(folder / "cache")
        for _ in range(2):  # the second one finds the decoded pictures, as those to be killed do
            started = time.monotonic()
            if in_a_process(lambda: fit(photos, folder / "whole"), seconds=LONGEST_SECONDS) != 0:
                outcome.failures.append("the fit that nobody stops failed")
                return outcome
            seconds, whole = time.monotonic() - started, digest(folder / "whole")
            shutil.rmtree(folder / "whole")
        while outcome.kills < n:
            draw = random.Random(f"{seed} {outcome.kills}")
            code = in_a_process(lambda: fit(photos, out), seconds=draw.uniform(0.05, 0.7) * seconds)
            if code is None and is_complete(out):  # in the moment between its end and the process's
                code = 0
                tidy_up(out)  # as the next `--resume` does
            if code is None:
                outcome.kills += 1
                outcome.where[how_far(out)] += 1
                if outcome.kills % 3 == 0 and damage(out, draw):
                    outcome.damaged += 1
                if tell:
                    tell(outcome.kills)
                continue
            if code and points.read_point(out) is None and (out / "model.safetensors").is_file():
                shutil.rmtree(out)  # both points were damaged behind its last epoch: its model is not erased unasked
                continue
            outcome.runs += 1
            if code or digest(out) != whole:
                outcome.failures.append(f"run {outcome.runs}: " + (f"exit code {code}" if code else "other bits"))
            left = [path.name for path in out.iterdir() if path.name.startswith((".", "point-"))] if not code else []
            if left:
                outcome.failures.append(f"run {outcome.runs}: left {', '.join(left)}")
            shutil.rmtree(out, ignore_errors=True)
    return outcome


def main() -> int:
    """Parse, kill, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    outcome = kill(args.n, seed=args.seed, tell=lambda k: print(f"  {k:,} of {args.n:,}", end="\r", file=sys.stderr))
    print(
        f"{outcome.kills:,} kills of {outcome.runs:,} runs, {outcome.damaged:,} damaged points, in"
        f" {time.perf_counter() - started:.0f} s"
    )
    for name, count in outcome.where.most_common():
        print(f"  {count:6,}  {name}")
    print(f"{len(outcome.failures)} failures", *outcome.failures[:20], sep="\n  ")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
