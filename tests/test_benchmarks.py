"""The comparison with other tools: what is read from records, what the tables say of them, what runners are given."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
AVX512 = ("avx2", "fma", "avx512f", "avx512_vnni")
BFLOAT16 = (*AVX512, "avx512_bf16")
AMX = (*BFLOAT16, "amx_bf16", "avx512_fp16")
ZEN5 = (*BFLOAT16, "avx512_vp2intersect")


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a results folder of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    for name in ("peers", "records", "runner_common", "step", "stores", "size", "views"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import peers as module
    import records

    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return module


def record(
    run: str,
    *,
    seed: int = 0,
    seconds: float = 100.0,
    val: float = 0.9,
    hits: str = "1110",
    flags: Iterable[str] = AVX512,
) -> dict[str, Any]:
    curve = [
        {"seconds": seconds / 4, "processor_seconds": seconds / 4, "phase": "head", "val_accuracy": val - 0.1},
        {"seconds": seconds / 2, "processor_seconds": seconds / 2, "phase": "all", "val_accuracy": val},
    ]
    return {
        "set": "flowers5", "seed": seed, "run": run, "seconds": seconds, "processor_seconds": seconds,
        "head_seconds": seconds / 4, "head_processor_seconds": seconds / 4, "curve": curve, "val_accuracy": val,
        "test_accuracy": hits.count("1") / len(hits), "test_ci95": [0.3, 0.95], "test_hits": hits, "peak_pss_mb": 500.0,
        "cpu_flags": list(flags),
    }  # fmt: skip


def write(name: str, *made: dict[str, Any]) -> None:
    import records

    text = "".join(json.dumps(one) + "\n" for one in made)
    (records.RESULTS / f"{name}-2026-01-01.jsonl").write_text(text)


def test_of_repeated_runs_the_last_record_counts(peers: ModuleType) -> None:
    write("peers", record("keras", seconds=900), record("keras", seed=1), record("keras", seconds=800))
    assert sorted((r["seed"], r["seconds"]) for r in peers.records("AVX-512").values()) == [(0, 800), (1, 100)]


def test_runs_on_two_kinds_of_machine_are_not_compared(peers: ModuleType) -> None:
    write(
        "peers", record("headstart", seconds=100), record("keras", seconds=800, flags=BFLOAT16),
        record("headstart", seconds=50, flags=BFLOAT16), record("fastai", seconds=300),
        record("headstart", seconds=20, flags=AMX), record("keras", seconds=100, flags=AMX),
        record("headstart", seconds=10, flags=ZEN5), record("fastai", seconds=40, flags=ZEN5),
        record("headstart", seconds=30, flags=("avx2", "fma")), record("keras", seconds=60, flags=("avx2", "fma")),
        record("keras", seconds=1000, flags=()),
    )  # fmt: skip
    ratios = [
        [peers.ratios(peers.records(kind), run, "seconds") for run in ("keras", "fastai")] for kind in peers.KINDS
    ]
    assert ratios == [[[], [4.0]], [[16.0], []], [[5.0], []], [[], [3.0]], [[2.0], []]]
    rows = ["\n".join(peers.bar_rows(peers.records(kind))) for kind in peers.KINDS]
    assert ["Keras" in found for found in rows] == [False, True, True, False, True]
    assert [title in peers.table() for title in peers.KINDS.values()] == [True] * 5
    assert "1,000" not in peers.table()  # a kind without a table


def test_a_part_of_a_run_is_scaled_to_the_whole_and_gives_way_to_it(peers: ModuleType) -> None:
    # Some of 30 and 10 epochs on every fourth picture: the quickest after the first counts, 3 and 5 seconds here.
    times = [("head", 12.0), ("head", 16.0), ("head", 19.0), ("all", 22.0), ("all", 27.0)]
    part = record("keras") | {
        "part": {"epochs": 3, "share": 0.25}, "planned": {"head": 30, "all": 10}, "setup_seconds": 4.0,
        "setup_processor_seconds": 4.0, "test_accuracy": None, "test_ci95": None, "test_hits": "",
        "curve": [{"phase": p, "seconds": s, "processor_seconds": s, "val_accuracy": 0.5} for p, s in times],
    }  # fmt: skip
    write("peers", part, record("headstart", seconds=100))
    assert peers.ratios(peers.records("AVX-512"), "keras", "head_processor_seconds") == [(4 + 30 * 3 * 4) / 25]
    assert peers.ratios(peers.records("AVX-512"), "keras", "seconds") == []
    assert peers.ratios(peers.records("AVX-512"), "keras", "processor_seconds") == [(4 + 30 * 3 * 4 + 10 * 5 * 4) / 100]
    row = next(row for row in peers.run_rows(peers.records("AVX-512"), "flowers5") if "Keras" in row)
    assert row.endswith("| 1 | ~364 | ~564 | - | - | - | - | - | - |")
    assert len(peers.accuracy_rows(peers.records("AVX-512"))) == 2  # the heading alone
    write("peers", record("keras", seconds=700), part, record("headstart", seconds=100))
    assert peers.ratios(peers.records("AVX-512"), "keras", "seconds") == [7.0]


def test_ratios_are_within_a_set_and_seed_and_a_missed_bar_is_said(peers: ModuleType) -> None:
    write(
        "peers", record("headstart", seconds=100), record("keras", seconds=800), record("fastai", seconds=250),
        record("keras", seed=1, seconds=9999),
    )  # fmt: skip
    assert peers.ratios(peers.records("AVX-512"), "keras", "seconds") == [8.0]
    rows = {row.split(" | ")[0]: row for row in peers.bar_rows(peers.records("AVX-512"))}
    assert rows["| whole run: Keras, head then top 20 layers"].endswith("| 8.0x | 8.0x | 1 | held | 16x |")
    assert rows["| head stage: Keras, head then top 20 layers"].endswith("| 8.0x | 8.0x | 1 | missed: 8.0 of 20 |  |")
    assert rows["| whole run: fastai `fine_tune(4)`"].endswith("| 2.5x | 2.5x | 1 | missed: 2.5 of 5 | 5x |")


def test_the_table_tells_when_headstart_got_where_the_peer_ended(peers: ModuleType) -> None:
    ours = record("headstart", seconds=100, val=0.9)
    assert peers.reached(ours, 0.8) == 25
    assert peers.reached(ours, 0.9) == 50
    assert peers.reached(ours, 0.95) is None
    write("peers", ours, record("keras", val=0.95), record("fastai", val=0.9))
    rows = {row.split(" | ")[0]: row.split(" | ") for row in peers.run_rows(peers.records("AVX-512"), "flowers5")}
    assert rows["| fastai `fine_tune(4)`"][7] == "50.0"
    assert rows["| Keras, head then top 20 layers"][7] == "- (not in 1 of 1)"
    assert (peers.sooner(peers.records("AVX-512"), "fastai"), peers.sooner(peers.records("AVX-512"), "keras")) == (
        [2.0],
        [0.0],
    )
    bars = {row.split(" | ")[0]: row for row in peers.bar_rows(peers.records("AVX-512"))}
    assert bars["| whole run: Keras, head then top 20 layers"].endswith("| never |")


def test_the_parts_of_the_default_run_add_up_to_it(peers: ModuleType) -> None:
    ours = record("headstart", seconds=100)
    times = [("head", 20), ("head", 25), ("all", 50), ("all", 70), ("all", 90)]
    ours["curve"] = [{"phase": p, "seconds": s, "processor_seconds": s, "val_accuracy": 0.5} for p, s in times]
    write("peers", ours)
    assert [row.split(" | ")[1] for row in peers.time_rows(peers.records("AVX-512"))[2:]] == [
        "25 |",
        "25 |",
        "40 |",
        "10 |",
    ]


def test_the_quick_recipe_has_rows_of_its_own(peers: ModuleType) -> None:
    write(
        "peers", record("headstart", seconds=100, hits="10" * 20), record("headstart_quick", seconds=40, hits="1" * 40),
        record("fastai", seconds=250, hits="1" * 30 + "0" * 10),
    )  # fmt: skip
    rows = {row.split(" | ")[0]: row for row in peers.bar_rows(peers.records("AVX-512"))}
    assert "| 2.5x | 2.5x | 1 | missed: 2.5 of 5 |" in rows["| whole run: fastai `fine_tune(4)`"]
    assert "| 6.2x | 6.2x | 1 | held |" in rows["| whole run, recipe `quick`: fastai `fine_tune(4)`"]
    own = peers.accuracy_rows(peers.records("AVX-512"), "headstart_quick", ("headstart", "fastai"))[2:]
    assert [row.split(" | ")[1:4] for row in own] == [
        ["headstart, default", "1", "+50.0"], ["fastai `fine_tune(4)`", "1", "+25.0"],
    ]  # fmt: skip


def test_mean_accuracies_are_over_the_sets_that_both_ran_on(peers: ModuleType) -> None:
    def of(run: str, name: str, seed: int, accuracy: float) -> dict[str, Any]:
        return record(run, seed=seed) | {"set": name, "test_accuracy": accuracy}

    write(
        "peers", of("headstart", "flowers5", 0, 0.9), of("headstart", "flowers5", 1, 0.8),
        of("headstart", "hotdog", 0, 0.95), of("headstart", "dogs10", 0, 0.1),
        of("keras", "flowers5", 0, 0.8), of("keras", "flowers5", 1, 0.6),
        of("keras", "hotdog", 0, 0.9), of("fastai", "hotdog", 0, 0.96), of("fastai", "hotdog", 7, 0.0),
    )  # fmt: skip
    assert peers.mean_rows(peers.records("AVX-512"))[2:] == [
        "| Keras, head then top 20 layers | 2 | 0.900 | 0.800 | +10.0 |",
        "| fastai `fine_tune(4)` | 1 | 0.950 | 0.960 | -1.0 |",
    ]


def test_accuracies_are_compared_picture_by_picture(peers: ModuleType) -> None:
    write(
        "peers",
        record("headstart", hits="1" * 40),
        record("keras", hits="10" * 20),
        record("timm", hits="1" * 39 + "0"),
    )
    rows = [row for row in peers.accuracy_rows(peers.records("AVX-512")) if row.startswith("| flowers5")]
    assert [row.split(" | ")[3] for row in rows] == ["+50.0", "+2.5"]
    assert [row.split(" | ")[5] for row in rows] == ["better |", "no difference |"]


def test_the_order_of_the_peers_is_turned_round(peers: ModuleType) -> None:
    chosen = ["keras", "headstart", "headstart_cached", "fastai"]
    assert peers.order(0, chosen) == ["headstart", "keras", "fastai"]
    assert peers.order(1, chosen) == ["fastai", "keras", "headstart"]


def test_every_runner_is_there_and_takes_the_common_arguments(peers: ModuleType) -> None:
    assert len(peers.RUNS) >= 12
    for run in peers.RUNS.values():
        source = (BENCHMARKS / "peers" / f"run_{run.runner}.py").read_text(encoding="utf-8")
        assert "arguments()" in source
        assert run.environment in {"", *peers.ENVIRONMENTS}


def test_runners_read_one_split_list(peers: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), ("b/1.jpg", "b", "train"), ("a/1.jpg", "a", "test")])
    names, splits = peers.read_splits(tmp_path / "list.csv", Path("/root"))
    assert names == ["a", "b"]
    assert splits == {"train": [("/root/b/1.jpg", 1)], "val": [], "test": [("/root/a/1.jpg", 0)]}


def test_a_page_keeps_what_stands_around_its_table(peers: ModuleType, tmp_path: Path) -> None:
    import records

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers: made by x -->\nold\n<!-- end of peers -->\nafter\n")
    records.write_between(page, "peers", "new")
    assert page.read_text() == "before\n<!-- peers: made by x -->\nnew\n<!-- end of peers -->\nafter\n"


def test_a_line_is_laid_through_the_sizes(peers: ModuleType) -> None:
    import size

    assert size.slope([1000, 5000, 20000], [12.0, 20.0, 50.0]) == pytest.approx((0.002, 10.0))


def test_a_record_is_appended_with_its_facts_and_the_last_of_its_kind_counts(peers: ModuleType) -> None:
    import records

    for n, value in ((1, 10), (2, 20), (1, 30)):
        records.append("made", {"n": n, "value": value})
    assert [r["value"] for r in records.read("made")] == [10, 20, 30]
    assert [(r["n"], r["value"]) for r in records.newest("made", "n")] == [(1, 30), (2, 20)]
    assert {"when", "machine", "load", "cpu_flags"} <= records.read("made")[0].keys()


def test_views_are_compared_with_the_default_on_the_seeds_that_both_have(peers: ModuleType) -> None:
    import views

    def head(kind: str, seed: int, hits: str, loss: float) -> dict[str, Any]:
        return {
            "stage": "head", "set": "flowers5", "seed": seed, "kind": kind, "processor_seconds": 10.0, "val_loss": loss,
            "test_log_loss": loss, "test_accuracy": hits.count("1") / len(hits), "test_ci95": [0.3, 0.95],
            "test_hits": hits,
        }  # fmt: skip

    write(
        "views", head("2", 0, "1100", 0.5), head("2", 1, "1100", 0.4), head("fresh", 0, "1110", 0.25),
        head("1", 0, "1100", 0.6), head("1", 1, "1100", 0.5),
    )  # fmt: skip
    rows = {row.split(" | ")[1]: row.split(" | ") for row in views.rows_of("head", 2)}
    assert list(rows) == ["1", "**2**", "fresh"]
    assert rows["fresh"][2] == "1"
    assert rows["fresh"][6].startswith("+25.0 ")
    assert rows["fresh"][7] == "-0.250"
    assert rows["1"][7] == "+0.100 (+0.100 to +0.100)"
    assert rows["**2**"][6:] == ["", "", " |"]


def test_the_profile_knows_where_each_part_lies(peers: ModuleType) -> None:
    import profile_fit

    for name in profile_fit.PARTS:
        room, function = name.split(".")
        assert f"def {function}(" in (BENCHMARKS.parent / "src" / "headstart" / f"{room}.py").read_text(), name


def test_the_gpu_script_runs_on_a_cpu(peers: ModuleType) -> None:
    import records

    words = "run --device cpu --networks resnet18 --batch 8 --step-batch 2 --rounds 1"
    words += " --calls 1 --no-compile --parts frozen,step"
    import gpu

    with mock.patch.object(sys, "argv", ["gpu.py", *words.split()]):
        gpu.main()
    made = records.read("gpu")
    ways = [sorted(one["figures"]["first call"]) for one in made]
    assert ways == [["augmented", "plain", "recorded"], ["by hand", "ours", "ours, not recorded"]]
    assert made[0]["figures"]["BatchNorm layers folded"] == 20
    assert "none was at hand" in gpu.table()
    records.append("gpu", made[0] | {"device": "H1"})
    assert "| H1 | frozen | resnet18 | 8 | plain " in gpu.table()


# In one process: each script imports PyTorch.
TABLES = (
    "peers", "step", "size", "stores", "checkpointing", "views", "head", "frozen_pass", "compare_sets", "advice",
    "sweep_preset", "kernels", "gpu", "unknown", "fine_tuning_variants", "stored_features", "profile_fit",
)  # fmt: skip


def test_the_page_holds_the_tables_that_the_records_give() -> None:
    code = (
        "import importlib, json, sys; print(json.dumps({n: importlib.import_module(n).table() for n in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *TABLES], capture_output=True, text=True, check=True, cwd=BENCHMARKS
    )
    page = PAGE.read_text(encoding="utf-8")
    for name, table in json.loads(done.stdout).items():
        assert table.count("|") > 10, name
        assert table in page, f"docs/benchmarks.md: run `python benchmarks/{name}.py table --write`"
