"""What do the stores of pictures and of features cost, in time, disk and memory, as the number of pictures grows?

    python benchmarks/stores.py run [--sizes 1000,5000,20000,50000] [--folder /tmp]
    python benchmarks/stores.py table [--write]           # the table in docs/benchmarks.md, from the records

Generated JPEG pictures (500 x 375, each file different, 200 different pictures), prepared for 224 px. The baseline, in
the same process: the same decoding and resizing in as many threads, with nothing checked, hashed or written. Each size
runs in a process of its own, once (no randomness is involved); its anonymous memory (RssAnon: mapped pages of files are
the kernel's) is looked at twenty times a second. Features
are 1,280 random float32 numbers in 2 views. The folder needs 0.5 MB a picture and is emptied afterwards. Records are
appended to benchmarks/results/stores-DATE.jsonl; the table takes those that have processor seconds (the first ones
have wall seconds alone, of a machine that was busy).
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from records import Record, append, newest, parser, show
from runner_common import processor_seconds

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


def measure(n: int, folder: Path) -> Record:
    """All figures for `n` pictures; `folder` is empty and stays so."""
    import torch

    from headstart.dataset import ImageTable, open_image
    from headstart.dataspec import DataSpec
    from headstart.pixels import Pixels
    from headstart.pixelstore import PixelStore, picture_bytes
    from headstart.portable import evaluation_view
    from headstart.rowstore import RowStore
    from headstart.store import Cache
    from headstart.threads import available_cores, map_threads
    from headstart.transforms import working_image

    spec = DataSpec(image_size=224)
    paths = make_pictures(folder / "pictures", n)
    time.sleep(2.1)  # younger files are not remembered
    cache = Cache(folder / "cache", limit_bytes=200 * 10**9)
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started, busy = time.perf_counter(), processor_seconds()
        yield
        seconds[name] = round(time.perf_counter() - started, 3)
        processor[name] = round(processor_seconds() - busy, 3)

    def decode(path: Path) -> None:
        image = open_image(path)
        evaluation_view(image, spec)
        working_image(image, spec)

    with timed("baseline"):
        map_threads(decode, paths[:SAMPLE])
    with Anonymous() as memory:
        with timed("fill"):
            reasons = PixelStore(cache, spec).fill(paths, root=folder)
        assert not any(reasons)
        store = PixelStore(cache, spec)
        with timed("open"):
            store.fill(paths, root=folder)
        table = ImageTable(folder, tuple(paths), np.zeros(n, dtype=np.int64), ("one",), ("",) * n)
        pixels = Pixels(table, spec, workers=available_cores(), store=store)
        with timed("read views"):
            for first in range(0, n, BATCH):
                chosen = range(first, min(n, first + BATCH))
                pixels.batch(chosen, [0] * len(chosen))
        with timed("read working images"):
            for path in paths:
                store.working(path)
        rows = RowStore(cache, "benchmark", writes=True, say=print)
        with timed("keep features"):
            places = rows.begin((n, *FEATURES), torch.float32)
            block = torch.rand(BATCH, *FEATURES)
            for first in range(0, n, BATCH):
                part = places[first : first + BATCH]
                part[:] = block[: len(part)]
                rows.filled(part)
            rows.finish(places, {})
        with timed("load features"):
            assert RowStore(cache, "benchmark", writes=True, say=print).load() is not None
    sizes = {kind: sum(e.nbytes for e in cache.entries() if e.kind == kind) for kind in ("pixels", "features", "files")}
    return {
        "n": n, "seconds": seconds, "processor_seconds": processor, "baseline_pictures": min(SAMPLE, n),
        "anonymous_bytes": memory.peak, "disk_bytes": sizes, "cores": available_cores(),
        "estimated_bytes": n * picture_bytes(spec, working=True),
    }  # fmt: skip


def in_a_process(script: str, n: int, parent: str, *words: str) -> Record:
    """What `SCRIPT one` measures for `n` pictures, in a folder of its own that is emptied afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="headstart-size-", dir=parent))
    command = [sys.executable, script, "one", "--sizes", str(n), "--folder", str(folder), *words]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(folder)
    return json.loads(done.stdout.strip().splitlines()[-1])


def table() -> str:
    """Markdown: processor time for each picture, and sizes, of every number of pictures the newest record."""
    rows = [
        "| pictures | decode alone, ms | fill, ms | open again, ms | read views, ms"
        " | keep / load features, ms | disk, MB | anonymous memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    records = [record for record in newest("stores", "n") if "processor_seconds" in record]
    for record in sorted(records, key=lambda record: record["n"]):
        n, s = record["n"], record["processor_seconds"]
        each = {what: 1e3 * value / n for what, value in s.items()}
        cells = (
            f"{n:,}", f"{1e3 * s['baseline'] / record['baseline_pictures']:.2f}", f"{each['fill']:.2f}",
            f"{each['open']:.3f}", f"{each['read views']:.3f}",
            f"{each['keep features']:.3f} / {each['load features']:.3f}",
            f"{sum(record['disk_bytes'].values()) / 1e6:,.0f}", f"{record['anonymous_bytes'] / 1e6:,.0f}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    options = parser(__doc__, "run", "one")
    options.add_argument("--sizes", default=",".join(map(str, SIZES)))
    options.add_argument("--folder", default=tempfile.gettempdir())
    args = options.parse_args()
    if args.what == "table":
        show(table(), "stores", write=args.write)
        return
    if args.what == "one":
        print(json.dumps(measure(int(args.sizes), Path(args.folder))))
        return
    for n in map(int, args.sizes.split(",")):
        append("stores", in_a_process(__file__, n, args.folder))
        print(table(), flush=True)


if __name__ == "__main__":
    main()
