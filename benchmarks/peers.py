"""How quick and how good is headstart beside other tools that do the same, on the same pictures and weights?

    python benchmarks/peers.py run [--sets flowers5] [--seeds 0] [--peers keras,fastai] [--threads 1] [--lock FILE]
    python benchmarks/peers.py table [--write]        # the tables in docs/benchmarks.md, from the records
    python benchmarks/peers.py setup                  # make the virtual environments now instead of on first use

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared), and a package index for the peers'
virtual environments, which are made under ~/.cache/headstart-bench (HEADSTART_BENCH). Every peer is a short program in
benchmarks/peers/, which says what it does and after which page; each run is a process of its own. Backbone
mobilenetv2_100 with the same ImageNet weights, 224 px, one split list per set and seed (headstart's own split, with
15 % of the training pictures held out for validation), one number of threads for all, two loader threads or processes
beside it. The order of the peers is turned round from seed to seed. Records are appended to
benchmarks/results/peers-DATE.jsonl when a run ends; finished runs are not run again.

Seconds are of the wall and of the processor (user and system, all processes of the run), from the first file that is
opened to the last scored test picture, imports left out. On a machine that does other work the processor seconds are
what compares. Memory is the largest sum, over the processes of a run, of their share of the physical memory (PSS),
looked at once a second.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

import headstart
from headstart.metrics import paired_difference, wilson_interval
from headstart.run import environment

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import BACKBONE, cpu_flags, has_bfloat16, read_splits

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("HEADSTART_SHARED", HERE.parents[1] / "shared"))
BENCH = Path(os.environ.get("HEADSTART_BENCH", Path.home() / ".cache" / "headstart-bench"))
WEIGHTS = SHARED / "weights" / f"{BACKBONE}.safetensors"
PAGE = HERE.parent / "docs" / "benchmarks.md"
ENVIRONMENTS = {"torch": ("fastai", "transformers"), "keras": ("tensorflow-cpu", "keras", "safetensors")}
"""What each virtual environment gets; `torch` also sees the packages of the one this script runs in."""


@dataclass(frozen=True)
class Run:
    """One way of training: its row in the tables, and how it is started."""

    title: str
    environment: str  # "" is the one this script runs in
    runner: str
    variant: str = ""
    cached: bool = False  # headstart's second run: from the cache folder that the run before it has filled


RUNS = {
    "headstart": Run("headstart, default", "", "headstart", "fine-tune"),
    "headstart_cached": Run("the same again, from the cache", "", "headstart", "fine-tune", cached=True),
    "headstart_head": Run("headstart, recipe `head`", "", "headstart", "head"),
    "headstart_head_cached": Run("the same again, from the cache", "", "headstart", "head", cached=True),
    "keras": Run("Keras, head then top 20 layers", "keras", "keras"),
    "fastai": Run("fastai `fine_tune(4)`", "torch", "fastai"),
    "huggingface": Run("Hugging Face example", "torch", "hf"),
    "plain_bf16_head": Run("plain PyTorch, channels-last, head", "torch", "plain", "head fast"),
    "timm": Run("timm train.py", "torch", "timm"),
    "plain_bf16_all": Run("plain PyTorch, channels-last, everything", "torch", "plain", "all fast"),
    "plain_head": Run("plain PyTorch, head", "torch", "plain", "head"),
    "plain_all": Run("plain PyTorch, everything", "torch", "plain", "all"),
}
WHOLE = ("keras", "fastai", "timm", "huggingface", "plain_all", "plain_bf16_all")
"""The runs that the whole default fit is compared with."""
HEADS = {"keras": 20.0, "plain_bf16_head": 10.0}
"""Bars: how many times faster the head stage is to be."""
WHOLE_BAR = 5.0


def records() -> list[dict[str, Any]]:
    """Every record ever appended; of repeated runs the last one counts."""
    lines = [
        line for path in sorted((HERE / "results").glob("peers-*.jsonl")) for line in path.read_text().splitlines()
    ]
    return list({(r["set"], r["seed"], r["run"]): r for r in map(json.loads, lines)}.values())


def make_environment(name: str) -> Path:
    """The interpreter of a peer's virtual environment, which is made where it is missing."""
    folder = BENCH / name
    python, ready = folder / "bin" / "python", folder / "ready.json"
    if not ready.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if name == "torch":
            site = subprocess.run(
                [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                capture_output=True, text=True, check=True,
            ).stdout.strip()  # fmt: skip
            Path(site, "project.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
        subprocess.run([python, "-m", "pip", "install", "-q", *ENVIRONMENTS[name]], check=True)
        ready.write_text(json.dumps(ENVIRONMENTS[name]))
    return python


def write_splits(name: str, seed: int) -> Path:
    """The split list of a set and seed, made once by headstart's own split."""
    path = BENCH / "splits" / f"{name}-{seed}.csv"
    if not path.is_file():
        folder = SHARED / "data" / name
        table = headstart.load_images(folder, test_folder="val" if name == "hymenoptera" else None)
        splits = headstart.split(table, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "split"))
            for part in ("train", "val", "test"):
                rows = getattr(splits, part)
                for image, label in zip(rows.paths, rows.labels, strict=True):
                    writer.writerow((image.relative_to(folder), rows.class_names[label], part))
        temporary.replace(path)
    return path


def write_reference(splits: Path, root: Path) -> Path:
    """Four pictures as timm's network takes them, and its features and logits: other layouts have to agree."""
    path = BENCH / "reference.npz"
    if not path.is_file():
        import numpy as np
        import timm
        import torch
        from torch_common import evaluation_view, overlay

        model = timm.create_model(
            BACKBONE, pretrained=True, pretrained_cfg_overlay=overlay(argparse.Namespace(weights=WEIGHTS))
        ).eval()
        from PIL import Image

        view = evaluation_view(256)
        files = [picture for picture, _ in read_splits(splits, root)[1]["test"][::50]][:4]
        pictures = torch.stack([view(Image.open(file).convert("RGB")) for file in files])
        with torch.inference_mode():
            features = model.forward_features(pictures)
            logits = model.forward_head(features)
        np.savez(path, pictures=pictures.numpy(), features=features.numpy(), logits=logits.numpy())
    return path


class Memory:
    """The largest sum of PSS over a process and its children, in bytes, and its anonymous part."""

    def __init__(self, pid: int) -> None:
        self.peak = self.anonymous = 0
        self._process, self._end = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(1.0):
            pss = anonymous = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    pss += _kilobytes(text, "\nPss:")
                    anonymous += _kilobytes(text, "\nPss_Anon:")
            except (psutil.Error, OSError):  # one has just ended
                continue
            self.peak, self.anonymous = max(self.peak, pss), max(self.anonymous, anonymous)


def _kilobytes(text: str, name: str) -> int:
    return int(text.partition(name)[2].split()[0]) * 1024


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Wait for other heavy work that takes the same lock."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start(run: Run, *, name: str, seed: int, threads: int, cache: Path | None = None) -> dict[str, Any]:
    """Run one runner to its end; returns its record and what is known about the process."""
    splits, root = write_splits(name, seed), SHARED / "data" / name
    python = make_environment(run.environment) if run.environment else Path(sys.executable)
    command = [
        str(python), str(HERE / "peers" / f"run_{run.runner}.py"), "--splits", str(splits), "--root", str(root),
        "--weights", str(WEIGHTS), "--reference", str(write_reference(splits, root)), "--seed", str(seed),
        "--threads", str(threads), "--variant", run.variant,
    ]  # fmt: skip
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    surroundings |= {"HEADSTART_CACHE": str(cache)} if cache else {}
    if run.environment:
        surroundings.pop("PYTHONPATH", None)
    load, started = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=surroundings)
        memory = Memory(process.pid)
        output, _ = process.communicate()
        memory.stop()
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{errors.read()[-4000:]}")
    record = json.loads(output.strip().splitlines()[-1])
    hits = record["test_hits"]
    return record | {
        "test_ci95": list(wilson_interval(hits.count("1"), len(hits))),
        "wall_seconds_with_imports": round(time.perf_counter() - started, 2),
        "peak_pss_mb": round(memory.peak / 1e6, 1),
        "peak_anonymous_mb": round(memory.anonymous / 1e6, 1),
        "splits_sha256": hashlib.sha256(splits.read_bytes()).hexdigest()[:16],
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


def order(seed: int, chosen: Sequence[str]) -> list[str]:
    """headstart's runs and the peers', turned round from seed to seed; a run from the cache follows its first run."""
    firsts = [name for name in RUNS if name in chosen and not RUNS[name].cached]
    return firsts if seed % 2 == 0 else firsts[::-1]


def run_all(options: argparse.Namespace) -> None:
    chosen = options.peers.split(",") if options.peers else list(RUNS)
    unknown = set(chosen) - set(RUNS)
    if unknown:
        raise SystemExit(f"No run is called {', '.join(sorted(unknown))}. There are: {', '.join(RUNS)}.")
    (HERE / "results").mkdir(exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            for key in order(seed, chosen):
                run_one(key, name=name, seed=seed, threads=options.threads, lock=options.lock)


def run_one(key: str, *, name: str, seed: int, threads: int, lock: Path | None) -> None:
    """One run, and headstart's again from the cache it has filled; what has a record is not run again."""
    keys = [key] + [f"{key}_cached"] * (f"{key}_cached" in RUNS)
    if {(name, seed, key) for key in keys} <= {(r["set"], r["seed"], r["run"]) for r in records()}:
        return
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as cache:
        for key in keys:
            with holding(lock) if lock else nullcontext():
                record = start(RUNS[key], name=name, seed=seed, threads=threads, cache=Path(cache))
            about = {"run": key, "set": name, "seed": seed, "threads": threads, "cpu_flags": cpu_flags()}
            about |= {"bfloat16_cpu": has_bfloat16(), "machine": environment()}
            about |= {"when": datetime.now(UTC).isoformat(timespec="seconds")}
            log = HERE / "results" / f"peers-{datetime.now(UTC):%Y-%m-%d}.jsonl"
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(about | record) + "\n")
            head = record["head_seconds"]
            print(f"{name} {seed} {key}: head {head}, all {record['seconds']} s, test {record['test_accuracy']:.4f}")
            sys.stdout.flush()


def reached(ours: dict[str, Any], val_accuracy: float) -> float | None:
    """Seconds until a run's validation accuracy first reached this figure; None where it never did."""
    return next((e["seconds"] for e in ours["curve"] if e["val_accuracy"] >= val_accuracy - 1e-6), None)


def by_key() -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(r["set"], r["seed"], r["run"]): r for r in records()}


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def run_rows(name: str) -> list[str]:
    """The table of one set: medians over the seeds, mean accuracies with the mean interval."""
    found = by_key()
    rows = [
        "| run | seeds | seconds: head | in all | processor seconds | validation | headstart gets there in | "
        "test accuracy | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, run in RUNS.items():
        mine = {seed: r for (where, seed, what), r in found.items() if (where, what) == (name, key)}
        if not mine:
            continue
        there = [
            reached(found[name, seed, "headstart"], r["val_accuracy"])
            for seed, r in mine.items()
            if (name, seed, "headstart") in found
        ]
        missed = sum(value is None for value in there)
        got = _number(_median(there), 1) + (f" (not in {missed} of {len(there)})" if missed else "")
        runs = list(mine.values())
        low, high = (statistics.mean(r["test_ci95"][i] for r in runs) for i in (0, 1))
        accuracy = f"{statistics.mean(r['test_accuracy'] for r in runs):.3f} ({low:.3f} - {high:.3f})"
        cells = (
            run.title, len(runs), _number(_median([r["head_seconds"] for r in runs])),
            _number(_median([r["seconds"] for r in runs])), _number(_median([r["processor_seconds"] for r in runs])),
            f"{statistics.mean(r['val_accuracy'] for r in runs):.3f}", "" if run.runner == "headstart" else got,
            accuracy, _number(_median([r["peak_pss_mb"] for r in runs])),
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def ratios(theirs: str, field: str) -> list[float]:
    """How many times longer a peer took than headstart's default run, for each set and seed that has both."""
    found = by_key()
    return [
        r[field] / found[name, seed, "headstart"][field]
        for (name, seed, key), r in found.items()
        if key == theirs and r[field] and (name, seed, "headstart") in found
    ]


def verdict(values: Sequence[float], bar: float) -> str:
    """`held`, or by how much the median misses the bar."""
    middle = statistics.median(values)
    return "held" if middle >= bar else f"missed: {middle:.1f} of {bar:g}"


def bar_rows() -> list[str]:
    """Ratios by wall and by processor seconds, their medians over all sets and seeds, and whether each bar is held."""
    rows = [
        "| headstart's default against | bar | ratio, wall | ratio, processor | runs | |",
        "|---|---|---|---|---|---|",
    ]
    wanted = [(key, "head stage", "head_", bar) for key, bar in HEADS.items()]
    wanted += [(key, "whole run", "", WHOLE_BAR) for key in WHOLE]
    for key, what, prefix, bar in wanted:
        wall, processor = (ratios(key, f"{prefix}{field}") for field in ("seconds", "processor_seconds"))
        if not wall:
            continue
        spread = f" ({min(wall):.1f} - {max(wall):.1f})" if len(wall) > 1 else ""
        cells = (
            f"{what}: {RUNS[key].title}", f"{bar:g}x", f"{statistics.median(wall):.1f}x{spread}",
            f"{statistics.median(processor):.1f}x", len(wall), verdict(wall, bar),
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def accuracy_rows() -> list[str]:
    """Paired differences of test accuracy, headstart's default minus each peer's, for each set, over the seeds."""
    found = by_key()
    rows = ["| set | against | seeds | difference in points | 95 % interval | |", "|---|---|---|---|---|---|"]
    for name in sorted({key[0] for key in found}):
        for peer in (*WHOLE, "plain_head", "plain_bf16_head"):
            seeds = [s for (where, s, what) in found if (where, what) == (name, peer)]
            seeds = [s for s in seeds if (name, s, "headstart") in found]
            if not seeds:
                continue
            hits = [[list(map(int, found[name, s, key]["test_hits"])) for s in seeds] for key in ("headstart", peer)]
            test = paired_difference(*hits)
            said = "better" if test["low"] > 0 else "worse" if test["high"] < 0 else "no difference"
            low, high = 100 * test["low"], 100 * test["high"]
            cells = (
                name,
                RUNS[peer].title,
                len(seeds),
                f"{100 * test['difference']:+.1f}",
                f"{low:+.1f} - {high:+.1f}",
                said,
            )
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def table() -> str:
    """Markdown: the bars, one table per set, and the accuracies compared."""
    sets = sorted({r["set"] for r in records()})
    parts = ["### Against the bars", "", *bar_rows()]
    for name in sets:
        parts += ["", f"### {name}", "", *run_rows(name)]
    parts += ["", "### Accuracy, on the same test pictures", "", *accuracy_rows()]
    return "\n".join(parts)


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands in a page between `<!-- MARK: ... -->` and `<!-- end of MARK -->`."""
    start, rest = page.read_text(encoding="utf-8").split(f"<!-- {mark}:", 1)
    note, rest = rest.split("-->", 1)
    end = rest.split(f"<!-- end of {mark} -->", 1)[1]
    page.write_text(f"{start}<!-- {mark}:{note}-->\n{text}\n<!-- end of {mark} -->{end}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "setup"))
    parser.add_argument("--sets", default="flowers5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--peers", default="", help=f"all of {', '.join(RUNS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lock", type=Path, help="a file that other heavy work locks, too")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        if options.write:
            write_between(PAGE, "peers", table())
    elif options.what == "setup":
        for name in ENVIRONMENTS:
            print(make_environment(name))
    else:
        run_all(options)


if __name__ == "__main__":
    main()
