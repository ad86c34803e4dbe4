"""What do the stores of pictures and of features cost, in time, disk and memory, as the number of pictures grows?

    python benchmarks/stores.py run [--sizes 1000,5000,20000,50000] [--folder /tmp]
    python benchmarks/stores.py table

Generated JPEG pictures (500 x 375, each file different, 200 different pictures), prepared for 224 px. The baseline, in
the same process: the same decoding and resizing in as many threads, with nothing checked, hashed or written. Each size
runs in a process of its own, once (no randomness is involved); its anonymous memory (RssAnon: mapped pages of files are
the kernel's) is looked at twenty times a second. Features are 1,280 random float32 numbers in 2 views. The folder needs
0.5 MB a picture and is emptied afterwards. Records are appended to benchmarks/results/stores-DATE.jsonl; they name the
machine.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZES = (1_000, 5_000, 20_000, 50_000)
DISTINCT = 200
SAMPLE = 400  # pictures the baseline decodes
BATCH = 32
FEATURES = (2, 1280)


def make_pictures(folder: Path, n: int) -> list[Path]:
    """`n` files in 10 folders; smooth colours with some noise, about 60 kB each."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
        pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (375, 500, 3))
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        contents.append(data.getvalue())
    paths = []
    for i in range(n):
        path = folder / f"class{i % 10}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[i % DISTINCT] + i.to_bytes(4, "little"))  # decoders ignore what follows the picture
        paths.append(path)
    return paths


class Anonymous:
    """The largest RssAnon of this process while the context is open, in bytes."""

    def __enter__(self) -> Anonymous:
        self.peak, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            text = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(text.partition("RssAnon:")[2].split()[0]) * 1024)


def measure(n: int, folder: Path) -> dict:
    """All figures for `n` pictures; `folder` is empty and stays so."""
    import torch

    from headstart.dataset import ImageTable, open_image
    from headstart.pixels import Pixels
    from headstart.pixelstore import PixelStore, picture_bytes
    from headstart.rowstore import RowStore
    from headstart.run import environment
    from headstart.store import Cache
    from headstart.threads import available_cores, map_threads
    from headstart.transforms import DataSpec, evaluation_view, working_image

    spec = DataSpec(image_size=224)
    paths = make_pictures(folder / "pictures", n)
    time.sleep(2.1)  # younger files are not remembered
    cache = Cache(folder / "cache", limit_bytes=200 * 10**9)
    seconds: dict[str, float] = {}

    def timed(name: str, started: float) -> None:
        seconds[name] = round(time.perf_counter() - started, 3)

    def decode(path: Path) -> None:
        image = open_image(path)
        evaluation_view(image, spec)
        working_image(image, spec)

    started = time.perf_counter()
    map_threads(decode, paths[:SAMPLE])
    timed("baseline", started)
    with Anonymous() as memory:
        started = time.perf_counter()
        reasons = PixelStore(cache, spec).fill(paths, root=folder)
        timed("fill", started)
        assert not any(reasons)
        started = time.perf_counter()
        store = PixelStore(cache, spec)
        store.fill(paths, root=folder)
        timed("open", started)
        table = ImageTable(folder, tuple(paths), np.zeros(n, dtype=np.int64), ("one",), ("",) * n)
        pixels = Pixels(table, spec, workers=available_cores(), store=store)
        started = time.perf_counter()
        for first in range(0, n, BATCH):
            chosen = range(first, min(n, first + BATCH))
            pixels.batch(chosen, [0] * len(chosen))
        timed("read views", started)
        started = time.perf_counter()
        for path in paths:
            store.working(path)
        timed("read working images", started)
        started = time.perf_counter()
        rows = RowStore(cache, "benchmark", writes=True, say=print)
        places = rows.begin((n, *FEATURES), torch.float32)
        block = torch.rand(BATCH, *FEATURES)
        for first in range(0, n, BATCH):
            part = places[first : first + BATCH]
            part[:] = block[: len(part)]
            rows.filled(part)
        rows.finish(places, {})
        timed("keep features", started)
        started = time.perf_counter()
        assert RowStore(cache, "benchmark", writes=True, say=print).load() is not None
        timed("load features", started)
    sizes = {kind: sum(e.nbytes for e in cache.entries() if e.kind == kind) for kind in ("pixels", "features", "files")}
    return {
        "n": n,
        "seconds": seconds,
        "baseline_pictures": min(SAMPLE, n),
        "anonymous_bytes": memory.peak,
        "disk_bytes": sizes,
        "estimated_bytes": n * picture_bytes(spec, working=True),
        "cores": available_cores(),
        "load": os.getloadavg()[0],
        "versions": environment(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table() -> str:
    """Markdown: rates and sizes, of every size the newest record."""
    lines = [
        line for path in sorted((HERE / "results").glob("stores-*.jsonl")) for line in path.read_text().splitlines()
    ]
    newest = {record["n"]: record for record in map(json.loads, lines)}
    rows = [
        "| pictures | decode alone, img/s | fill, img/s | open again, s | read views, img/s | keep / load features, "
        "s | disk, MB | anonymous memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n, record in sorted(newest.items()):
        s = record["seconds"]
        rows.append(
            f"| {n:,} | {record['baseline_pictures'] / s['baseline']:,.0f} | {n / s['fill']:,.0f} | {s['open']:.2f} | "
            f"{n / s['read views']:,.0f} | {s['keep features']:.2f} / {s['load features']:.2f} | "
            f"{sum(record['disk_bytes'].values()) / 1e6:,.0f} | {record['anonymous_bytes'] / 1e6:,.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "one", "table"))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    if args.action == "table":
        print(table())
        return
    if args.action == "one":
        print(json.dumps(measure(int(args.sizes), Path(args.folder))))
        return
    out = HERE / "results" / f"stores-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    for n in map(int, args.sizes.split(",")):
        folder = Path(tempfile.mkdtemp(prefix="headstart-stores-", dir=args.folder))
        command = [sys.executable, __file__, "one", "--sizes", str(n), "--folder", str(folder)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        finally:
            shutil.rmtree(folder)
        with out.open("a") as file:
            file.write(done.stdout.strip().splitlines()[-1] + "\n")
        print(table())


if __name__ == "__main__":
    main()
