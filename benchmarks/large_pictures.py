"""Would JPEG draft mode, or another decoder, be worth having for large photographs?

    python benchmarks/large_pictures.py [--backbone NAME] [--weights FILE] [--rounds 3]

One thread. Photographs of 2000 to 4000 px are generated (noise of all scales, quality 90), and each way of decoding is
timed down to what a run keeps of them, the evaluation view and the working image, and to the audit's look; the ways
alternate and the least processor time of the rounds counts. `draft` lets libjpeg leave out frequencies, down to the
smallest of its scales (1/2, 1/4, 1/8) that still has both sides of the working image; `simplejpeg` and `torchcodec` are
timed where they are installed. Also: how far the working image by block means (what `working_image` does) and that of a
draft lie from the one shrunk at once, in grey levels, and how far the features of a draft's evaluation view are off.
Milliseconds of processor time; adds a line to benchmarks/results.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import PIL
import torch
from PIL import Image
from records import append

from headstart import create_classifier
from headstart.dataspec import DataSpec, working_size
from headstart.decode import open_image
from headstart.inspection import look_of_bytes
from headstart.portable import RESAMPLING, evaluation_view
from headstart.transforms import as_tensor, working_image

SIZES = ((2000, 1500), (3000, 2000), (4000, 3000))


def photograph(width: int, height: int, seed: int) -> bytes:
    """Noise whose strength falls with its frequency, as in photographs, in colours that drift slowly."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(3, 13):
        side = 2**octave
        small = Image.fromarray(rng.integers(0, 256, (min(side, height), min(side, width), 3), dtype=np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32) / side**0.8
    low, high = np.percentile(total, (0.5, 99.5))
    pixels = ((total - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def draft(data: bytes, spec: DataSpec) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    image.draft("RGB", working_size(*image.size, spec))
    image.load()
    return image.convert("RGB")


def by_simplejpeg(data: bytes) -> Image.Image:
    import simplejpeg

    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))


def by_torchcodec(data: bytes) -> Image.Image:
    from torchcodec.decoders import decode_jpeg

    return Image.fromarray(decode_jpeg(data).permute(1, 2, 0).numpy())


def timed(job: Callable[[], object]) -> float:
    started = time.process_time()
    job()
    return time.process_time() - started


def at_once(image: Image.Image, spec: DataSpec) -> np.ndarray:
    size = working_size(*image.size, spec)
    return np.asarray(image.resize(size, RESAMPLING[spec.interpolation])).astype(int)


def times_of(data: bytes, decoders: dict[str, Callable[[bytes], Image.Image]], spec: DataSpec) -> dict[str, float]:
    """Processor seconds of each way to decode, and of what is made of the decoded picture."""
    image, small = open_image(data), draft(data, spec)
    found = {f"decode: {name}": timed(lambda decode=decode: decode(data)) for name, decode in decoders.items()}
    return found | {
        "view": timed(lambda: evaluation_view(image, spec)),
        "working image": timed(lambda: working_image(image, spec)),
        "working image at once": timed(lambda: at_once(image, spec)),
        "both of a draft": timed(lambda: (evaluation_view(small, spec), working_image(small, spec))),
        "look": timed(lambda: look_of_bytes(image, data)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = create_classifier(args.backbone, ["a", "b"], weights=args.weights).eval()
    spec = model.spec
    files = {size: [photograph(*size, seed) for seed in range(1)] for size in SIZES}
    decoders: dict[str, Callable[[bytes], Image.Image]] = {"pillow": open_image, "draft": lambda d: draft(d, spec)}
    for name, way in (("simplejpeg", by_simplejpeg), ("torchcodec", by_torchcodec)):
        with suppress(ImportError):
            way(files[SIZES[0]][0])
            decoders[name] = way
    record: dict[str, object] = {
        "pillow": PIL.__version__,
        "backbone": args.backbone, "weights": args.weights != "none",
    }  # fmt: skip
    apart: dict[str, list[np.ndarray]] = {"block means": [], "draft": []}
    views = []
    for size, pictures in files.items():
        found: dict[str, float] = {}
        for _ in range(args.rounds):
            for name, seconds in times_of(pictures[0], decoders, spec).items():
                found[name] = min(found.get(name, 1e9), seconds)
        record["x".join(map(str, size))] = {name: round(1000 * seconds, 1) for name, seconds in found.items()}
        for data in pictures:
            image, small = open_image(data), draft(data, spec)
            plain = at_once(image, spec)
            apart["block means"].append(np.abs(working_image(image, spec).astype(int) - plain))
            apart["draft"].append(np.abs(working_image(small, spec).astype(int) - plain))
            views.append((evaluation_view(image, spec), evaluation_view(small, spec)))
    for name, differences in apart.items():
        record[f"{name}: mean, largest difference"] = [
            round(float(np.mean([d.mean() for d in differences])), 2), int(max(d.max() for d in differences))
        ]  # fmt: skip
    with torch.no_grad():
        full, drafts = (model.features(torch.stack([as_tensor(pair[k]) for pair in views])) for k in (0, 1))
    record["features of drafts off by"] = round(float((full - drafts).norm() / full.norm()), 4)
    print(json.dumps(record, indent=1))
    append("large_pictures", record)


if __name__ == "__main__":
    main()
