"""Do the time and the memory of a whole fit grow in proportion to the number of pictures?

    python benchmarks/size.py run [--sizes 1000,5000,20000] [--recipe head] [--folder /tmp]
    python benchmarks/size.py table [--write]             # the table in docs/benchmarks.md, from the records

Generated JPEG pictures (160 x 120, all different, two classes), `fine_tune` from an empty cache with a run folder,
backbone mobilenetv3_small_050 with random weights at 64 px: small, so that what headstart itself does with each
picture (checks, decoding, the look at the data, stores, report) is not hidden behind the network. The baseline is
proportion itself: a line through all sizes, and how far the largest size lies from what the smaller ones would make
of it. Each size runs in a process of its own, once; memory is the largest RssAnon (mapped pages of files are the
kernel's), looked at twenty times a second. benchmarks/stores.py has the stores alone, up to 50,000 pictures. Records
are appended to benchmarks/results/size-DATE.jsonl.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from records import Record, append, newest, parser, show
from runner_common import processor_seconds
from stores import Anonymous, in_a_process

SIZES = (1_000, 5_000, 20_000)
BACKBONE, IMAGE_SIZE = "mobilenetv3_small_050", 64


def make_pictures(folder: Path, n: int) -> None:
    """`n` different pictures of smooth colours in two classes, the second with more red."""
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = rng.integers(0, 200, (6, 8, 3), dtype=np.uint8)
        coarse[..., 0] += 50 * (i % 2)
        data = io.BytesIO()
        Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())


def measure(n: int, recipe: str, folder: Path) -> Record:
    """Seconds and memory of one fit; `folder` is empty."""
    make_pictures(folder / "pictures", n)
    os.environ["HEADSTART_CACHE"] = str(folder / "cache")
    time.sleep(2.1)  # younger files are not remembered

    import headstart

    with Anonymous() as memory:
        started, busy = time.perf_counter(), processor_seconds()
        result = headstart.fine_tune(
            folder / "pictures", backbone=BACKBONE, weights="none", recipe=recipe, out=folder / "run",
            spec_overrides={"image_size": IMAGE_SIZE},
        )  # fmt: skip
        seconds, processor = time.perf_counter() - started, processor_seconds() - busy
    return {
        "n": n, "recipe": recipe, "seconds": round(seconds, 2), "processor_seconds": round(processor, 2),
        "anonymous_bytes": memory.peak, "phases": result.metrics.get("phases"),
    }  # fmt: skip


def slope(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """Of the least-squares line through (size, value): its rise for each picture, and its start."""
    rise, start = np.polyfit(sizes, values, 1)
    return float(rise), float(start)


def table() -> str:
    """Markdown: of every recipe and size the newest record, then the lines through them."""
    records = sorted(newest("size", "recipe", "n"), key=lambda record: record["n"])
    rows = [
        "| recipe | pictures | seconds | processor seconds | for each 1,000 | anonymous memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    said = []
    for recipe in sorted({record["recipe"] for record in records}):
        mine = [record for record in records if record["recipe"] == recipe]
        for r in mine:
            cells = (
                recipe, f"{r['n']:,}", f"{r['seconds']:.0f}", f"{r['processor_seconds']:.0f}",
                f"{1000 * r['processor_seconds'] / r['n']:.1f}", f"{r['anonymous_bytes'] / 1e6:,.0f}",
            )  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
        if len(mine) > 1:
            sizes = [r["n"] for r in mine]
            rise, start = slope(sizes, [r["processor_seconds"] for r in mine])
            bytes_each, bytes_start = slope(sizes, [r["anonymous_bytes"] for r in mine])
            said.append(
                f"Recipe `{recipe}`: {1000 * rise:.1f} processor seconds for each 1,000 pictures beyond {start:.0f} s,"
                f" and {bytes_each / 1e3:.1f} kB of anonymous memory for each beyond {bytes_start / 1e6:.0f} MB."
            )
    return "\n".join([*rows, "", *said])


def main() -> None:
    options = parser(__doc__, "run", "one")
    options.add_argument("--sizes", default=",".join(map(str, SIZES)))
    options.add_argument("--recipe", default="head")
    options.add_argument("--folder", default=tempfile.gettempdir())
    args = options.parse_args()
    if args.what == "table":
        show(table(), "size", write=args.write)
        return
    if args.what == "one":
        print(json.dumps(measure(int(args.sizes), args.recipe, Path(args.folder))))
        return
    for n in map(int, args.sizes.split(",")):
        append("size", in_a_process(__file__, n, args.folder, "--recipe", args.recipe))
        print(table(), flush=True)


if __name__ == "__main__":
    main()
