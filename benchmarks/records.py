"""What the scripts of this folder share: records that are only ever appended, and their tables in pages.

A script appends to `benchmarks/results/NAME-DATE.jsonl`, one line for each record; no line is ever edited. Its table is
made from all of them, and stands in a page between `<!-- MARK: ... -->` and `<!-- end of MARK -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headstart.run_record import environment

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from runner_common import cpu_flags

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
SHARED = Path(os.environ.get("HEADSTART_SHARED", HERE.parents[1] / "shared"))
"""Real pictures and weights."""
WEIGHTS = SHARED / "weights" / "mobilenetv2_100.safetensors"

Record = dict[str, Any]


def facts() -> Record:
    """When and on what machine a record is made, and how busy that is."""
    return {
        "load": os.getloadavg()[0], "cpu_flags": cpu_flags(), "machine": environment(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def append(name: str, record: Record) -> None:
    """Add one record, with the facts that it does not bring itself, to today's file of that name."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts() | record) + "\n")


def read(name: str) -> list[Record]:
    """Every record ever appended under this name, the oldest first."""
    files = sorted(RESULTS.glob(f"{name}-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def newest(name: str, *keys: str) -> list[Record]:
    """Of the records that agree in all of these values the last one."""
    return list({tuple(record[key] for key in keys): record for record in read(name)}.values())


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands in a page between the two marks."""
    start, rest = page.read_text(encoding="utf-8").split(f"<!-- {mark}:", 1)
    note, rest = rest.split("-->", 1)
    end = rest.split(f"<!-- end of {mark} -->", 1)[1]
    page.write_text(f"{start}<!-- {mark}:{note}-->\n{text}\n<!-- end of {mark} -->{end}", encoding="utf-8")


def show(text: str, mark: str, *, write: bool, page: Path = PAGE) -> None:
    """Print a table, and with `write` put it into its page."""
    print(text)
    if write:
        write_between(page, mark, text)


def parser(doc: str, *actions: str, page: str = "docs/benchmarks.md") -> argparse.ArgumentParser:
    """The command line every script starts from: what to do, and whether the table goes into its page."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=(*actions, "table"))
    made.add_argument("--write", action="store_true", help=f"put the table into {page}")
    return made
