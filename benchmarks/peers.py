"""How quick and how good is headstart beside other tools that do the same, on the same pictures and weights?

    python benchmarks/peers.py run [--sets flowers5] [--seeds 0] [--peers keras,fastai] [--threads 1] [--lock FILE]
    python benchmarks/peers.py run --epochs 3 --every 8   # the seconds alone, estimated from parts of the runs
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
from records import SHARED, WEIGHTS, Record, append, read, show
from runner_common import BACKBONE, cpu_flags, cpu_words, read_splits

import headstart
from headstart.metrics import paired_difference, wilson_interval

HERE = Path(__file__).parent
BENCH = Path(os.environ.get("HEADSTART_BENCH", Path.home() / ".cache" / "headstart-bench"))
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
    "headstart_quick": Run("headstart, recipe `quick`", "", "headstart", "quick"),
    "headstart_head": Run("headstart, recipe `head`", "", "headstart", "head"),
    "headstart_head_cached": Run("the same again, from the cache", "", "headstart", "head", cached=True),
    "keras": Run("Keras, head then top 20 layers", "keras", "keras"),
    "fastai": Run("fastai `fine_tune(4)`", "torch", "fastai"),
    "huggingface": Run("Hugging Face example", "torch", "hf"),
    "plain_bf16_head": Run("plain PyTorch, fast formats, head", "torch", "plain", "head fast"),
    "timm": Run("timm train.py", "torch", "timm"),
    "plain_bf16_all": Run("plain PyTorch, fast formats, everything", "torch", "plain", "all fast"),
    "plain_head": Run("plain PyTorch, head", "torch", "plain", "head"),
    "plain_all": Run("plain PyTorch, everything", "torch", "plain", "all"),
}
WHOLE = ("keras", "fastai", "timm", "huggingface", "plain_all", "plain_bf16_all")
"""The runs that the whole default fit is compared with."""
HEADS = {"keras": 20.0, "plain_bf16_head": 10.0}
"""Bars: how many times faster the head stage is to be."""
WHOLE_BAR = 5.0


Found = dict[tuple[str, int, str], Record]
"""Records by set, seed and run."""
KINDS = {
    "AVX-512, bfloat16, Zen 5": "On a CPU with bfloat16 (Zen 5)",
    "AVX-512, bfloat16": "On a CPU with bfloat16 (Zen 4)",
    "AVX-512, bfloat16 in AMX": "On a CPU with bfloat16 in matrix units (AMX)",
    "AVX-512": "On a CPU without bfloat16",
    "AVX2": "On a CPU without AVX-512 (Zen 3)",
}
"""Machines that have a table, by what they compute with: runs on one kind are never compared with runs on another."""


def records(kind: str) -> Found:
    """Whole runs on CPUs of this kind, and estimates of those that have only been run in part.

    Of repeated runs the last one counts, and a whole run before any estimate.
    """
    made = [r for r in read("peers") if cpu_words(r["cpu_flags"]) == kind]
    whole = {(r["set"], r["seed"], r["run"]): r for r in made if not r.get("part")}
    parts = {(r["set"], r["seed"], r["run"]): estimate(r) for r in made if r.get("part")}
    return parts | whole


def estimate(record: Record) -> Record:
    """What the whole run would have taken: setup, and one epoch of each phase as often as planned, for all pictures.

    In processor seconds alone: what else ran during a short piece must not be multiplied. The first epoch of a phase is
    for warming up, and the quickest of the others counts. Scoring the test pictures is left out, in the peer's favour.
    """
    total = before = record["setup_processor_seconds"]
    epochs: dict[str, list[float]] = {}
    for entry in record["curve"]:
        epochs.setdefault(entry["phase"], []).append(entry["processor_seconds"] - before)
        before = entry["processor_seconds"]
    head = None
    for phase, number in record["planned"].items():
        total += number * min(epochs[phase][1:] or epochs[phase]) / record["part"]["share"]
        if phase == "head":
            head = round(total, 2)
    unknown = dict.fromkeys(("val_accuracy", "seconds", "head_seconds"))
    return record | unknown | {"head_processor_seconds": head, "processor_seconds": round(total, 2)}


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


def write_part(splits: Path, every: int) -> Path:
    """A split list of every n-th picture."""
    path = splits.with_name(f"{splits.stem}-every{every}.csv")
    heading, *rows = splits.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(heading + "".join(rows[::every]), encoding="utf-8")
    return path


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
        from runner_torch import evaluation_view, overlay

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


def start(
    run: Run, *, name: str, seed: int, threads: int, cache: Path | None = None, epochs: int = 0, every: int = 1
) -> Record:
    """Run one runner to its end, or `epochs` of each phase on every n-th picture; returns its record."""
    splits, root = write_splits(name, seed), SHARED / "data" / name
    if every > 1:
        splits = write_part(splits, every)
    python = make_environment(run.environment) if run.environment else Path(sys.executable)
    command = [
        str(python), str(HERE / "peers" / f"run_{run.runner}.py"), "--splits", str(splits), "--root", str(root),
        "--weights", str(WEIGHTS), "--reference", str(write_reference(splits, root)), "--seed", str(seed),
        "--threads", str(threads), "--variant", run.variant, "--epochs", str(epochs),
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
        "test_ci95": list(wilson_interval(hits.count("1"), len(hits))) if hits else None,
        "part": {"epochs": epochs, "share": 1 / every} if epochs else None,
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
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            for key in order(seed, chosen):
                run_one(key, options, name=name, seed=seed)


def run_one(key: str, options: argparse.Namespace, *, name: str, seed: int) -> None:
    """One run, and headstart's again from the cache it has filled; what has a record is not run again."""
    keys = [key] + [f"{key}_cached"] * (f"{key}_cached" in RUNS)
    if {(name, seed, key) for key in keys} <= whole_runs(records(cpu_words(cpu_flags()))).keys():
        return
    lock, threads, epochs = options.lock, options.threads, options.epochs
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as cache:
        for key in keys:
            with holding(lock) if lock else nullcontext():
                record = start(
                    RUNS[key],
                    name=name,
                    seed=seed,
                    threads=threads,
                    cache=Path(cache),
                    epochs=epochs,
                    every=options.every,
                )
            about = {"run": key, "set": name, "seed": seed, "threads": threads}
            append("peers", about | record)
            seconds = [record[field] for field in ("head_seconds", "seconds", "processor_seconds")]
            print(name, seed, key, "seconds: head, all, processor", seconds, record["test_accuracy"], flush=True)


def reached(ours: Record, val_accuracy: float) -> float | None:
    """Seconds until a run's validation accuracy first reached this figure; None where it never did."""
    return next((e["seconds"] for e in ours["curve"] if e["val_accuracy"] >= val_accuracy - 1e-6), None)


def whole_runs(found: Found) -> Found:
    return {key: record for key, record in found.items() if not record.get("part")}


def sooner(found: Found, theirs: str) -> list[float]:
    """How many times sooner, by the wall, headstart had the validation accuracy with which a peer's whole run ended.

    0 where the default run never had it.
    """
    times = []
    for (name, seed, peer), record in whole_runs(found).items():
        mine = found.get((name, seed, "headstart"))
        if peer == theirs and mine:
            there = reached(mine, record["val_accuracy"])
            times.append(record["seconds"] / there if there else 0.0)
    return times


def _sooner(found: Found, theirs: str) -> str:
    times = sooner(found, theirs)
    return "" if not times else f"{statistics.median(times):.0f}x" if statistics.median(times) else "never"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def run_rows(found: Found, name: str) -> list[str]:
    """The table of one set: medians over the seeds, mean accuracies with the mean interval; `~` is an estimate."""
    rows = [
        "| run | seeds | processor seconds: head | in all | wall seconds: head | in all | validation | "
        "headstart gets there in | test accuracy | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, run in RUNS.items():
        mine = [r for (where, _, what), r in found.items() if (where, what) == (name, key)]
        if not mine:
            continue
        scored = [r for r in mine if not r.get("part")]
        about = "" if scored else "~"
        times = [
            _number(_median(r[field] for r in scored or mine))
            for field in ("head_processor_seconds", "processor_seconds", "head_seconds", "seconds")
        ]
        times = [cell if cell == "-" else f"{about}{cell}" for cell in times]
        cells = (run.title, len(scored or mine), *times, *_quality(scored, found, theirs=run.runner != "headstart"))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def _quality(scored: Sequence[Record], found: Found, *, theirs: bool) -> list[str]:
    """Validation accuracy, when headstart got there, test accuracy and memory of whole runs."""
    if not scored:
        return ["-"] * 4
    validation = f"{statistics.mean(r['val_accuracy'] for r in scored):.3f}"
    ours = [(found.get((r["set"], r["seed"], "headstart")), r) for r in scored]
    there = [reached(mine, r["val_accuracy"]) for mine, r in ours if mine]
    missed = sum(value is None for value in there)
    got = _number(_median(there), 1) + (f" (not in {missed} of {len(there)})" if missed else "")
    low, high = (statistics.mean(r["test_ci95"][i] for r in scored) for i in (0, 1))
    accuracy = f"{statistics.mean(r['test_accuracy'] for r in scored):.3f} ({low:.3f} - {high:.3f})"
    return [validation, got if theirs else "", accuracy, _number(_median(r["peak_pss_mb"] for r in scored))]


def ratios(found: Found, theirs: str, field: str, ours: Sequence[str] = ("headstart",)) -> list[float]:
    """How many times longer a peer took than headstart, for each set and seed that has both.

    Args:
        ours: headstart's runs to compare with, the first that there is.
    """
    pairs = []
    for (name, seed, key), record in found.items():
        mine = next((found[name, seed, one] for one in ours if (name, seed, one) in found), None)
        if key == theirs and record[field] and mine:
            pairs.append(record[field] / mine[field])
    return pairs


def verdict(values: Sequence[float], bar: float) -> str:
    """`held`, or by how much the median misses the bar."""
    middle = statistics.median(values)
    return "held" if middle >= bar else f"missed: {middle:.1f} of {bar:g}"


def bar_rows(found: Found) -> list[str]:
    """Ratios by processor and by wall seconds, their medians over all sets and seeds, and whether each bar is held."""
    rows = [
        "| headstart's default against | bar | ratio, processor | ratio, wall | runs | by processor seconds "
        "| sooner at the peer's own accuracy, wall |",
        "|---|---|---|---|---|---|---|",
    ]
    wanted = [(key, "head stage", "head_", bar, ("headstart", "headstart_head")) for key, bar in HEADS.items()]
    wanted += [(key, "whole run", "", WHOLE_BAR, ("headstart",)) for key in WHOLE]
    wanted += [(key, "whole run, recipe `quick`", "", WHOLE_BAR, ("headstart_quick",)) for key in WHOLE]
    for key, what, prefix, bar, ours in wanted:
        wall, processor = (ratios(found, key, f"{prefix}{field}", ours) for field in ("seconds", "processor_seconds"))
        if not processor:
            continue
        about = "~" * any(run == key and r.get("part") for (_, _, run), r in found.items())
        spread = f" ({min(processor):.1f} - {max(processor):.1f})" if len(processor) > 1 else ""
        cells = (
            f"{what}: {RUNS[key].title}", f"{bar:g}x", f"{about}{statistics.median(processor):.1f}x{spread}",
            f"{statistics.median(wall):.1f}x" if wall else "-", len(processor), verdict(processor, bar),
            _sooner(found, key) if what == "whole run" else "",
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def accuracy_rows(
    found: Found, ours: str = "headstart", theirs: Sequence[str] = (*WHOLE, "plain_head", "plain_bf16_head")
) -> list[str]:
    """Paired differences of test accuracy, `ours` minus each of `theirs`, for each set, over the seeds."""
    found = whole_runs(found)
    rows = ["| set | against | seeds | difference in points | 95 % interval | |", "|---|---|---|---|---|---|"]
    for name in sorted({key[0] for key in found}):
        for peer in theirs:
            seeds = [s for (where, s, what) in found if (where, what) == (name, peer)]
            seeds = [s for s in seeds if (name, s, ours) in found]
            if not seeds:
                continue
            hits = [[list(map(int, found[name, s, key]["test_hits"])) for s in seeds] for key in (ours, peer)]
            test = paired_difference(*hits)
            said = "better" if test["low"] > 0 else "worse" if test["high"] < 0 else "no difference"
            interval = f"{100 * test['low']:+.1f} to {100 * test['high']:+.1f}"
            cells = (name, RUNS[peer].title, len(seeds), f"{100 * test['difference']:+.1f}", interval, said)
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def mean_rows(found: Found) -> list[str]:
    """Test accuracy averaged over the sets that a peer ran on: the mean of each set's seeds, then of the sets."""
    found = whole_runs(found)
    rows = ["| against | sets | headstart, default | the other | difference in points |", "|---" * 5 + "|"]
    for peer in (*WHOLE, "plain_head", "plain_bf16_head"):
        means = []
        for name in sorted({where for where, _, run in found if run == peer}):
            seeds = [s for where, s, run in found if (where, run) == (name, peer) and (name, s, "headstart") in found]
            if seeds:
                means.append(
                    [
                        statistics.mean(found[name, s, run]["test_accuracy"] for s in seeds)
                        for run in ("headstart", peer)
                    ]
                )
        if means:
            ours, theirs = (statistics.mean(column) for column in zip(*means, strict=True))
            rows.append(
                f"| {RUNS[peer].title} | {len(means)} | {ours:.3f} | {theirs:.3f} | {100 * (ours - theirs):+.1f} |"
            )
    return rows


def time_rows(found: Found) -> list[str]:
    """Where the processor seconds of headstart's default run go, by the ends of its epochs; medians over all runs."""
    parts: dict[str, list[float]] = {}
    for (_, _, run), record in found.items():
        if run != "headstart":
            continue
        later = [e["processor_seconds"] for e in record["curve"] if e["phase"] == "all"]
        head, whole = record["head_processor_seconds"], record["processor_seconds"]
        opening, last = (later[0], later[-1]) if later else (head, head)
        each = {
            "the head stage, with decoding, the look at the data and the frozen pass": head,
            "the frozen part of the fine-tuning stage, and its first epoch": opening - head,
            "its other epochs, with the mixing of states at the end": last - opening,
            "scoring validation and test, and the report": whole - last,
        }
        for what, seconds in each.items():
            parts.setdefault(what, []).append(seconds)
    rows = ["| of the default run | processor seconds |", "|---|---|"]
    return rows + [f"| {what} | {statistics.median(seconds):.0f} |" for what, seconds in parts.items()]


def table() -> str:
    """Markdown, for each kind of machine: the bars, one table per set, and the accuracies compared."""
    parts = []
    for kind, title in KINDS.items():
        found = records(kind)
        if not found:
            continue
        parts += [f"### {title}", "", *bar_rows(found)]
        for name in sorted({where for where, _, _ in found}):
            parts += ["", f"#### {name}", "", *run_rows(found, name)]
        parts += ["", "#### Where headstart's time goes", "", *time_rows(found)]
        parts += ["", "#### Accuracy, on the same test pictures", "", *accuracy_rows(found)]
        parts += ["", "#### Mean test accuracy over the sets", "", *mean_rows(found)]
        if any(run == "headstart_quick" for _, _, run in found):
            quick = accuracy_rows(found, "headstart_quick", ("headstart", *WHOLE))
            parts += ["", "#### Accuracy of the recipe `quick`, on the same test pictures", "", *quick]
        parts.append("")
    return "\n".join(parts[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "setup"))
    parser.add_argument("--sets", default="flowers5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--peers", default="", help=f"all of {', '.join(RUNS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=0, help="run only so many of each phase, and estimate the rest")
    parser.add_argument("--every", type=int, default=1, help="with --epochs: take every n-th picture only")
    parser.add_argument("--lock", type=Path, help="a file that other heavy work locks, too")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    if options.what == "table":
        show(table(), "peers", write=options.write)
    elif options.what == "setup":
        for name in ENVIRONMENTS:
            print(make_environment(name))
    else:
        run_all(options)


if __name__ == "__main__":
    main()
