"""Does the audit find planted faults, and nothing where nothing was planted? What does it find on the real sets?

    python benchmarks/audit_faults.py run [--parts copies,shortcuts,turns,real,labels] [--sets hotdog,...] [--seeds 0,1]
    python benchmarks/audit_faults.py table [--write]     # the tables in docs/audit.md, from the records

Needs the folder of real pictures and weights (HEADSTART_SHARED, else ../shared). The real sets are read only; changed
pictures are written to a temporary folder. The seed draws which pictures are changed, and how much.

copies: half of a set's pictures at most get one copy each: equal pixels in another file, or one of the changes in
    `CHANGES`. Recall: share of copies joined with their original. Precision: share of the pairs with a copy in them
    that are right; pairs of the set's own pictures are counted apart (the set may hold copies of its own). The twin is
    the usual tool for this, a perceptual hash (ImageHash's phash, 64 bits) at the distance of at most 8 bits.
shortcuts: all pictures of one class get a border, another size, brightness, file quality or format.
turns: 30 % of one class's pictures lie on their side with an EXIF entry that turns them upright.
labels: 5 % or 10 % of the training labels are moved to another class; found are those in the first 2x of the list.
real: the findings on each set as it is.

Records are appended to benchmarks/results/audit_faults-DATE.jsonl; of repeated runs the last one counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from audit_gain import flip
from PIL import Image, ImageEnhance, ImageOps
from records import HERE, SHARED, WEIGHTS, append, newest, parser, show

import headstart
from headstart.audit_copies import find_copies
from headstart.audit_files import file_findings
from headstart.dataset import ImageTable, bad_reasons, load_images, open_image
from headstart.doubtful import doubtful_labels, out_of_fold
from headstart.inspection import Look, look, look_at
from headstart.metrics import wilson_interval
from headstart.once import store_features
from headstart.pixels import Pixels
from headstart.runtime import make_runtime
from headstart.shortcuts import find_shortcuts
from headstart.threads import map_threads

SETS = ("hotdog", "cats_dogs", "flowers5", "hymenoptera", "dogs10", "emotions3")
FLIPPED_SETS = ("hotdog", "cats_dogs", "flowers5")
FLIPPED_SHARES = (0.05, 0.1)
PER_CHANGE = 25
HASH_BITS = 8

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def scaled(image: Image.Image, factor: float) -> Image.Image:
    """The picture at another size, at least 8 px a side."""
    size = (max(8, round(image.width * factor)), max(8, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(image: Image.Image, rng: np.random.Generator, most: float = 0.1) -> Image.Image:
    """Up to `most` of the width and of the height cut away, in all, at a random place."""
    w, h = image.size
    cut_x, cut_y = rng.uniform(0.02, most, 2) * (w, h)
    left, top = rng.uniform(0, 1, 2) * (cut_x, cut_y)
    return image.crop((round(left), round(top), round(left + w - cut_x), round(top + h - cut_y)))


# name -> (change, JPEG quality to write it with; 0 is PNG, which keeps the pixels)
CHANGES: dict[str, tuple[Change, int | tuple[int, int]]] = {
    "equal pixels": (lambda im, _: im, 0),
    "JPEG quality 30 - 95": (lambda im, _: im, (30, 96)),
    "JPEG quality 30": (lambda im, _: im, 30),
    "scale 0.5 - 2": (lambda im, rng: scaled(im, float(2 ** rng.uniform(-1, 1))), 85),
    "scale 0.5": (lambda im, _: scaled(im, 0.5), 85),
    "mirrored": (lambda im, _: ImageOps.mirror(im), 85),
    "cropped by up to 10 %": (cropped, 85),
    "brightness 0.6 - 1.5": (lambda im, rng: ImageEnhance.Brightness(im).enhance(float(rng.uniform(0.6, 1.5))), 85),
    "grey": (lambda im, _: im.convert("L").convert("RGB"), 85),
    "all together": (
        lambda im, rng: ImageEnhance.Brightness(
            scaled(cropped(ImageOps.mirror(im), rng), float(2 ** rng.uniform(-1, 1)))
        ).enhance(float(rng.uniform(0.6, 1.5))),
        (30, 96),
    ),
}

SHORTCUTS: dict[str, tuple[str, Change, dict[str, Any]]] = {
    "border of 4 px": ("border colour", lambda im, _: ImageOps.expand(ImageOps.crop(im, 4), 4, (20, 20, 20)), {}),
    "size 0.7": ("size in pixels", lambda im, _: scaled(im, 0.7), {}),
    "brightness 1.5": ("mean colour and contrast", lambda im, _: ImageEnhance.Brightness(im).enhance(1.5), {}),
    "JPEG quality 40": ("file length", lambda im, _: im, {"quality": 40}),
    "PNG": ("format and mode", lambda im, _: im, {"format": "PNG"}),
}


@cache
def set_table(name: str) -> ImageTable:
    """A real set as it is, its own test folder included."""
    return load_images(SHARED / "data" / name, test_folder="val" if name == "hymenoptera" else None, check=False)


@cache
def looks_of(name: str) -> tuple[Look, ...]:
    """A look at every file of a set."""
    table = set_table(name)
    return tuple(look_at(table, reasons=bad_reasons(table.paths)))


# ---- copies ----------------------------------------------------------------------------------------------------


def copies_part(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """One record per change, and one for all pairs."""
    table = set_table(name)
    looks = list(looks_of(name))
    rng = np.random.default_rng([seed, len(table)])
    good = np.array([i for i, one in enumerate(looks) if one.reason is None and one.thumb.std() >= 4])
    per_change = min(PER_CHANGE, len(good) // (2 * len(CHANGES)))
    chosen = rng.choice(good, (len(CHANGES), per_change), replace=False)
    with tempfile.TemporaryDirectory() as folder:
        planted = [
            (str(change), int(i), write_copy(table.paths[i], Path(folder) / f"{k}_{i}", change, rng))
            for k, change in enumerate(CHANGES)
            for i in chosen[k]
        ]
        started = time.perf_counter()
        all_looks = [*looks, *map_threads(look, [path for _, _, path in planted])]
        looked = time.perf_counter() - started
        started = time.perf_counter()
        copies = find_copies(all_looks)
        seconds = time.perf_counter() - started
        hashes = hash_pairs([*table.paths, *(path for _, _, path in planted)])
    n = len(looks)
    origin = np.arange(len(all_looks))
    origin[n:] = [i for _, i, _ in planted]
    own = find_copies(looks)  # what the set holds of its own
    family = np.where(own.near >= 0, len(all_looks) + own.near, np.arange(n))[origin]
    for number, (change, _) in enumerate(CHANGES.items()):
        mine = range(n + number * per_change, n + (number + 1) * per_change)
        found = [copies.near[i] >= 0 and copies.near[i] == copies.near[origin[i]] for i in mine]
        exact = [copies.exact[i] >= 0 and copies.exact[i] == copies.exact[origin[i]] for i in mine]
        yield {
            "part": "copies", "set": name, "seed": seed, "what": change, "n": per_change,
            "found": int(sum(found)), "exact": int(sum(exact)),
            "hash_found": sum((origin[i], i) in hashes for i in mine),
        }  # fmt: skip
    pairs = {(pair.a, pair.b) for pair in copies.pairs if pair.b >= n}
    right = sum(bool(family[a] == family[b]) for a, b in pairs)
    hash_planted = {pair for pair in hashes if pair[1] >= n}
    yield {
        "part": "copies", "set": name, "seed": seed, "what": "pairs", "pairs": len(pairs), "right": right,
        "wrong": [[all_name(table, planted, a), all_name(table, planted, b)] for a, b in sorted(pairs)
                  if family[a] != family[b]][:20],
        "own_pairs": len(own.pairs), "hash_pairs": len(hash_planted),
        "hash_right": sum(bool(family[a] == family[b]) for a, b in hash_planted),
        "hash_own_pairs": len(hashes) - len(hash_planted),
        "pictures": len(all_looks), "look_seconds": round(looked, 2), "seconds": round(seconds, 2),
    }  # fmt: skip


def all_name(table: ImageTable, planted: list[tuple[str, int, Path]], i: int) -> str:
    n = len(table)
    return table.relative_paths[i] if i < n else f"{planted[i - n][0]} of {table.relative_paths[planted[i - n][1]]}"


def write_copy(source: Path, target: Path, change: str, rng: np.random.Generator) -> Path:
    """The changed picture in a file of its own."""
    do, quality = CHANGES[change]
    image = do(open_image(source), rng)
    if quality == 0:
        path = target.with_suffix(".png")
        image.save(path)
        return path
    q = int(rng.integers(*quality)) if isinstance(quality, tuple) else quality
    path = target.with_suffix(".jpg")
    image.save(path, quality=q)
    return path


def hash_pairs(paths: list[Path]) -> set[tuple[int, int]]:
    """Pairs by the usual perceptual hash, the twin; unreadable files have none."""
    import imagehash

    def bits(path: Path) -> Any:
        try:
            return imagehash.phash(open_image(path)).hash.ravel()
        except headstart.HeadstartError:
            return None

    rows = map_threads(bits, paths)
    known = np.array([i for i, row in enumerate(rows) if row is not None])
    table = np.stack([rows[i] for i in known]).astype(np.int16)
    apart = table.sum(1)[:, None] + table.sum(1)[None] - 2 * (table @ table.T)
    a, b = np.nonzero(np.triu(apart <= HASH_BITS, 1))
    return {(int(known[i]), int(known[j])) for i, j in zip(a, b, strict=True)}


# ---- shortcuts and turns ---------------------------------------------------------------------------------------


def shortcuts_part(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """The clean set, and each shortcut in all pictures of the class that the seed draws."""
    table = set_table(name)
    looks = list(looks_of(name))
    clean = find_shortcuts(looks, table.labels, table.class_names)
    yield {
        "part": "shortcuts", "set": name, "seed": seed, "what": "clean", "n": len(table),
        "reported": [one.name for one in clean if one.suspicious],
        "strengths": {one.name: round(one.strength, 3) for one in clean},
    }  # fmt: skip
    rng = np.random.default_rng([seed, len(table)])
    target = int(rng.integers(len(table.class_names)))
    mine = [i for i in np.flatnonzero(table.labels == target) if looks[i].reason is None]
    for what, (property_name, change, options) in SHORTCUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = [save_like(table.paths[i], Path(folder) / str(i), change, rng, options) for i in mine]
            changed = dict(zip(mine, map_threads(look, paths), strict=True))
        planted = [changed.get(i, one) for i, one in enumerate(looks)]
        found = {one.name: one for one in find_shortcuts(planted, table.labels, table.class_names)}
        yield {
            "part": "shortcuts", "set": name, "seed": seed, "what": what, "n": len(mine),
            "class": table.class_names[target], "found": bool(found[property_name].suspicious),
            "strength": round(found[property_name].strength, 3),
            "reported": [one.name for one in found.values() if one.suspicious],
        }  # fmt: skip


def save_like(source: Path, target: Path, change: Change, rng: np.random.Generator, options: dict[str, Any]) -> Path:
    """The changed picture, written as its original was (JPEG tables kept) where the options do not say otherwise."""
    image = change(open_image(source), rng)
    with Image.open(source) as original:
        kind, tables = original.format, getattr(original, "quantization", None)
    if "format" in options or kind != "JPEG":
        image.save(target.with_suffix(".png"), "PNG")
        return target.with_suffix(".png")
    how = options or ({"qtables": tables} if tables else {"quality": 90})
    image.save(target.with_suffix(".jpg"), "JPEG", **how)
    return target.with_suffix(".jpg")


def turns_part(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """30 % of a class's pictures on their side, with EXIF orientation 6."""
    table = set_table(name)
    looks = list(looks_of(name))
    rng = np.random.default_rng([seed, len(table)])
    target = int(rng.integers(len(table.class_names)))
    mine = np.array([i for i in np.flatnonzero(table.labels == target) if looks[i].reason is None])
    mine = rng.choice(mine, round(0.3 * len(mine)), replace=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    with tempfile.TemporaryDirectory() as folder:
        for i in mine:
            path = Path(folder) / f"{i}.jpg"
            open_image(table.paths[i]).transpose(Image.Transpose.ROTATE_90).save(path, quality=90, exif=exif)
            looks[i] = look(path)
    found = [one for one in file_findings(table, looks) if one.kind == "orientation"]
    yield {
        "part": "turns", "set": name, "seed": seed, "what": "turned", "n": len(mine),
        "found": bool(found) and found[0].severity == "warning" and len(set(found[0].files)) >= len(mine),
    }  # fmt: skip


# ---- the sets as they are --------------------------------------------------------------------------------------


def real_part(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Every finding of the quick audit."""
    result = headstart.audit(set_table(name))
    yield {
        "part": "real", "set": name, "seed": 0, "what": "findings", "n": result.pictures,
        "findings": [
            {"kind": one.kind, "severity": one.severity, "title": one.title, "files": list(one.files[:8]),
             "details": list(one.details[:8])}
            for one in result.findings
        ],
        "seconds": dict(result.seconds),
    }  # fmt: skip


@cache
def features_of(name: str) -> tuple[ImageTable, npt.NDArray[np.float64], tuple[str, ...]]:
    """The readable pictures of a set, their pooled features [N, D], and the groups of their copies."""
    good = [i for i, one in enumerate(looks_of(name)) if one.reason is None]
    table = set_table(name).select(good)
    model = headstart.create_classifier("mobilenetv2_100", table.class_names, weights=str(WEIGHTS))
    headstart.set_freeze_line(model, "head")
    features = store_features(model, Pixels(table, model.spec), runtime=make_runtime())[:, 0]
    return table, features.numpy().astype(np.float64), find_copies([looks_of(name)[i] for i in good]).names


def labels_part(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """One record per share of flipped labels; they are drawn from all splits, as the list holds all."""
    table, features, copies = features_of(name)
    for flipped in FLIPPED_SHARES:
        rows = flip(table.rows(), flipped, seed, ("train", "val", "test", ""))
        wrong = {i: row.original_label for i, row in enumerate(rows) if row.original_label}
        labels = np.array([table.class_names.index(row.label) for row in rows])
        started = time.perf_counter()
        listed = doubtful_labels(replace(table, labels=labels), out_of_fold(features, labels, copies))
        seconds = time.perf_counter() - started
        place = {file: i for i, file in enumerate(table.relative_paths)}
        flagged = [one for one in listed if one.flagged]
        relabel = [one for one in listed if one.relabel]
        yield {
            "part": "labels", "set": name, "seed": seed, "what": f"{flipped:g} flipped", "n": len(wrong),
            "in_2x": sum(place[one.file] in wrong for one in listed[: 2 * len(wrong)]), "listed": len(listed),
            "flagged": len(flagged), "flagged_right": sum(place[one.file] in wrong for one in flagged),
            "relabel": len(relabel),
            "relabel_right": sum(wrong.get(place[one.file]) == one.suggested for one in relabel),
            "seconds": round(seconds, 1),
        }  # fmt: skip


PARTS = {
    "copies": copies_part,
    "shortcuts": shortcuts_part,
    "turns": turns_part,
    "real": real_part,
    "labels": labels_part,
}


# ---- records and tables ----------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    """Every record ever appended; of repeated runs the last one counts."""
    return newest("audit_faults", "part", "set", "seed", "what")


def share(found: int, n: int) -> str:
    """`75 of 75` or, where some are missing, with the share and its 95 % interval."""
    if found == n:
        return f"{found:,} of {n:,}"
    low, high = wilson_interval(found, n)
    return f"{found:,} of {n:,} ({found / n:.3f}, {low:.3f} - {high:.3f})"


def markdown(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def copies_table(mine: list[dict[str, Any]]) -> str:
    """Per change, over sets and seeds: recall of the audit and of the hash; then precision of all pairs."""
    rows: list[tuple[object, ...]] = []
    for change in CHANGES:
        group = [r for r in mine if r["what"] == change]
        if group:
            n = sum(r["n"] for r in group)
            rows.append(
                (change, share(sum(r["found"] for r in group), n), share(sum(r["hash_found"] for r in group), n))
            )
    pairs = [r for r in mine if r["what"] == "pairs"]
    right, all_pairs = sum(r["right"] for r in pairs), sum(r["pairs"] for r in pairs)
    hash_right, hash_pairs_ = sum(r["hash_right"] for r in pairs), sum(r["hash_pairs"] for r in pairs)
    rows.append(("pairs with a planted copy that are right", share(right, all_pairs), share(hash_right, hash_pairs_)))
    own = {r["set"]: r for r in pairs}
    note = ", ".join(f"{name} {r['own_pairs']}" for name, r in own.items())
    runs = f"{len(own)} sets ({', '.join(own)}), {len(pairs)} runs"
    return markdown(("planted copy", "found by the audit", f"by a perceptual hash ({HASH_BITS} bits)"), rows) + (
        f"\n\n{runs}. Pairs that the audit finds among each set's own pictures: {note}."
    )


def planted_table(mine: list[dict[str, Any]]) -> str:
    """Shortcuts and turns planted in one class: how many of the runs found them, and the clean sets."""
    rows: list[tuple[object, ...]] = []
    for what in (*SHORTCUTS, "turned"):
        group = [r for r in mine if r["what"] == what]
        if group:
            missed = sorted({f"{r['set']}" for r in group if not r["found"]})
            rows.append((what, share(sum(r["found"] for r in group), len(group)), ", ".join(missed) or "none"))
    clean = {r["set"]: r for r in mine if r["what"] == "clean"}
    wrong = [f"{name}: {', '.join(r['reported'])}" for name, r in clean.items() if r["reported"]]
    return markdown(("planted in one class", "found in runs", "sets where it was missed"), rows) + (
        f"\n\nReported on the {len(clean)} sets as they are ({', '.join(clean)}): {'; '.join(wrong) or 'nothing'}."
    )


def labels_table(mine: list[dict[str, Any]]) -> str:
    """Per set and share of flipped labels, over the seeds."""
    rows: list[tuple[object, ...]] = []
    for name in SETS:
        for flipped in FLIPPED_SHARES:
            group = [r for r in mine if r["set"] == name and r["what"] == f"{flipped:g} flipped"]
            if group:
                n = sum(r["n"] for r in group)
                rows.append(
                    (
                        name, f"{100 * flipped:g} %", len(group), share(sum(r["in_2x"] for r in group), n),
                        share(sum(r["flagged_right"] for r in group), sum(r["flagged"] for r in group)),
                        share(sum(r["relabel_right"] for r in group), sum(r["relabel"] for r in group)),
                    )
                )  # fmt: skip
    header = ("set", "flipped", "seeds", "in the first 2x", "right of the flagged", "right of the proposed relabels")
    return markdown(header, rows)


def real_table(mine: list[dict[str, Any]]) -> str:
    """What the quick audit says of the sets as they are."""
    rows = [
        (r["set"], one["severity"], one["title"], ", ".join(f"`{file}`" for file in one["files"][:2]))
        for r in mine
        for one in r["findings"]
    ]
    return markdown(("set", "severity", "finding", "files (first two)"), rows)


TABLES = {
    "Copies": (("copies",), copies_table),
    "Shortcuts and turned pictures": (("shortcuts", "turns"), planted_table),
    "Wrong labels": (("labels",), labels_table),
    "The real sets as they are": (("real",), real_table),
}


def tables() -> str:
    """All tables of which there are records, under their headings."""
    known = records()
    out = []
    for title, (parts, draw) in TABLES.items():
        mine = [r for r in known if r["part"] in parts]
        if mine:
            out.append(f"### {title}\n\n{draw(mine)}")
    return "\n\n".join(out)


def main() -> None:
    line = parser(__doc__, "run", page="docs/audit.md")
    line.add_argument("--parts", default=",".join(PARTS))
    line.add_argument("--sets", default=",".join(SETS))
    line.add_argument("--seeds", default="0,1,2")
    options = line.parse_args()
    if options.what == "table":
        show(tables(), "faults", write=options.write, page=HERE.parent / "docs" / "audit.md")
        return
    for part in options.parts.split(","):
        for name in options.sets.split(","):
            for seed in map(int, options.seeds.split(",") if part != "real" else "0"):
                for record in PARTS[part](name, seed):
                    append("audit_faults", record)
                    print(record, flush=True)


if __name__ == "__main__":
    main()
