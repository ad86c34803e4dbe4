"""Findings about files and classes: broken, blank, odd sizes, wrong extensions, EXIF turns, few or uneven pictures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from .dataset import ImageTable
from .findings import EXAMPLES, Finding
from .inspection import Look

Traits = dict[str, dict[str, dict[str, dict[str, int]]]]

TINY_PX, HUGE_PIXELS, HUGE_BYTES, HUGE_RATIO, LONG_SIDE = 32, 50_000_000, 50_000_000, 400, 5.0
FEW, TOO_FEW = 20, 5  # training pictures of a class
UNEVEN, VERY_UNEVEN = 3.0, 10.0  # largest class over smallest
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
_IMAGENET_FILE = re.compile(r"^(ILSVRC2012_(val|test)_\d{8}|n\d{8}_\d+)\.jpe?g$", re.IGNORECASE)


def split_word(split: str) -> str:
    """How a split is called in counts: `all` for pictures of a folder without split folders."""
    return split or "all"


def count_pictures(table: ImageTable) -> dict[str, dict[str, int]]:
    """Pictures per split and class, classes without any included."""
    splits = list(dict.fromkeys(split_word(name) for name in table.split_names))
    counts = {split: dict.fromkeys(table.class_names, 0) for split in splits}
    for split, label in zip(table.split_names, table.labels, strict=True):
        counts[split_word(split)][table.class_names[label]] += 1
    return counts


def count_traits(table: ImageTable, looks: Sequence[Look]) -> Traits:
    """Format, mode and EXIF orientation, each per split and class: value -> readable pictures."""
    traits: Traits = {}
    for what in ("format", "mode", "orientation"):
        rows: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        for split, label, one in zip(table.split_names, table.labels, looks, strict=True):
            if one.reason is None:
                rows[split_word(split)][table.class_names[label]][str(getattr(one.header, what))] += 1
        traits[what] = {
            split: {name: dict(sorted(values.items())) for name, values in classes.items()}
            for split, classes in rows.items()
        }
    return traits


def file_findings(table: ImageTable, looks: Sequence[Look]) -> list[Finding]:
    """What the files show one by one, without comparing them."""
    areas = [_area(one) for one in looks if one.reason is None]
    ordinary = max(1.0, float(np.median(areas))) if areas else 1.0
    names = table.relative_paths
    found = []
    for check in _CHECKS:
        hits = [i for i, one in enumerate(looks) if (one.reason is None) == check.of_good and check.test(one, ordinary)]
        if hits:
            title = f"{_files(len(hits))} {check.words if len(hits) > 1 else check.word}."
            files, details = tuple(names[i] for i in hits), tuple(check.detail(looks[i]) for i in hits)
            found.append(Finding(check.kind, check.severity, title, check.advice, files, details))
    return [*found, *_extensions(table, looks), *_modes(table, looks), *_orientations(table, looks)]


def left_out_findings(table: ImageTable) -> list[Finding]:
    """The unreadable files that the table was loaded without."""
    if not table.bad_files:
        return []
    n = len(table.bad_files)
    title = f"{_files(n)} could not be read and {'was' if n == 1 else 'were'} left out."
    advice = f"Repair {'it, or remove it' if n == 1 else 'them, or remove them'} for good."
    files, reasons = zip(*table.left_out, strict=True)
    return [Finding("left-out", "warning", title, advice, files, reasons)]


def class_findings(table: ImageTable) -> list[Finding]:
    """Classes with few pictures, of very different sizes, or absent from a split."""
    counts = count_pictures(table)
    base = "train" if "train" in counts else "all"
    train = counts.get(base, {})
    found = []
    few = {name: n for name, n in sorted(train.items(), key=lambda pair: pair[1]) if n < FEW}
    if few:
        found.append(
            grouped_finding(
                table, [_places(table, name, base) for name in few],
                "few-pictures", "warning" if min(few.values()) < TOO_FEW else "note",
                f"{_classes(len(few))} fewer than {FEW} training pictures: {_named(few)}.",
                "Add pictures: with so few, what is measured is hardly more than luck.",
            )
        )  # fmt: skip
    some = {name: n for name, n in train.items() if n}
    largest, smallest = (pick(some, key=some.__getitem__, default="") for pick in (max, min))
    if some and some[largest] / some[smallest] >= UNEVEN:
        found.append(
            grouped_finding(
                table, [_sample(_places(table, name, base)) for name in (largest, smallest)],
                "imbalance", "warning" if some[largest] / some[smallest] >= VERY_UNEVEN else "note",
                f"Class {largest} has {some[largest]:,} training pictures, {smallest} {some[smallest]:,}.",
                "Judge by balanced accuracy; --class-weights balanced or --balanced-sampling on helps rare classes.",
                examples=True,
            )
        )  # fmt: skip
    for split, classes in counts.items():
        absent = [name for name, n in classes.items() if not n]
        if absent:
            found.append(
                grouped_finding(
                    table, [_sample(_places(table, name)) for name in absent], "absent-class", "warning",
                    f"Split {split} has no picture of {', '.join(absent[:5])}{' and more' if len(absent) > 5 else ''}.",
                    "Its figures say nothing about that class; move some pictures there.",
                    examples=True,
                )
            )  # fmt: skip
    return found


def grouped_finding(
    table: ImageTable,
    groups: Sequence[Sequence[int]],
    kind: str,
    severity: str,
    title: str,
    advice: str,
    *,
    words: Callable[[int], str] | None = None,
    examples: bool = False,
) -> Finding:
    """A finding about pictures that are shown side by side.

    Args:
        groups: places in the table; an empty group is left out.
        words: what is said of the picture at a place; by default its split and class.
    """
    names, say = table.relative_paths, words or partial(_split_and_class, table)
    places = [i for group in groups for i in group]
    return Finding(
        kind, severity, title, advice,
        files=tuple(names[i] for i in places),
        details=tuple(map(say, places)),
        groups=tuple(tuple(names[i] for i in group) for group in groups if len(group)),
        examples=examples,
    )  # fmt: skip


def _split_and_class(table: ImageTable, place: int) -> str:
    return f"{split_word(table.split_names[place])}, {table.class_names[table.labels[place]]}"


def _places(table: ImageTable, class_name: str, split: str | None = None) -> list[int]:
    """Of a class's pictures, in one split or in all."""
    of_class = np.flatnonzero(table.labels == table.class_names.index(class_name)).tolist()
    return [i for i in of_class if split is None or split_word(table.split_names[i]) == split]


def _sample(places: Sequence[int]) -> list[int]:
    """A few of them from beginning to end, since neighbours are often alike."""
    return [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(EXAMPLES, len(places))).astype(int))]


def imagenet_findings(table: ImageTable) -> list[Finding]:
    """Pictures that, by their names, are of ImageNet, on which most pretrained weights were trained."""
    hits = [name for name in table.relative_paths if _IMAGENET_FILE.match(PurePosixPath(name).name)]
    words = set(re.split(r"[^a-z0-9]+", table.root.as_posix().lower()))
    known = [title for title, keys, classes in _KNOWN_SETS if keys & words or classes == set(table.class_names)]
    if not hits and not known:
        return []
    what = f"This looks like {known[0]}, whose pictures are ImageNet's" if known else ""
    named = f"{_files(len(hits))} {_be(len(hits))} named as in ImageNet" if hits else ""
    shown = tuple(hits) or tuple(table.relative_paths[i] for i in _sample(range(len(table))))
    return [
        Finding(
            "imagenet", "note", f"{'; '.join(part for part in (what, named) if part)}.",
            "Weights trained on ImageNet have seen such pictures: every score with them is flattered.",
            shown, examples=not hits,
        )
    ]  # fmt: skip


# Sets made of ImageNet pictures: how each is called, words of its folder, its classes.
_KNOWN_SETS: tuple[tuple[str, set[str], set[str]], ...] = (
    ("Imagenette", {"imagenette", "imagenette2"}, set()),
    ("Imagewoof", {"imagewoof", "imagewoof2"}, set()),
    ("Stanford Dogs", {"stanforddogs", "stanford"}, set()),
    ("Tiny ImageNet", {"tinyimagenet"}, set()),
    ("the hymenoptera set", {"hymenoptera"}, {"ants", "bees"}),
)


# ---- single pictures -------------------------------------------------------------------------------------------


def _area(one: Look) -> int:
    return one.header.width * one.header.height


def _short_side(one: Look) -> int:
    return min(one.header.width, one.header.height)


def _size(one: Look) -> str:
    return f"{one.header.width} x {one.header.height}, {one.file_bytes:,} bytes"


def _is_huge(one: Look, ordinary: float) -> bool:
    return _area(one) > min(HUGE_PIXELS, HUGE_RATIO * ordinary) or one.file_bytes > HUGE_BYTES


def _is_long(one: Look, ordinary: float) -> bool:
    return max(one.header.width, one.header.height) > LONG_SIDE * _short_side(one)


def _is_blank(one: Look, ordinary: float = 0.0) -> bool:
    spread, grey = float(one.thumb.std()), float(np.mean(one.mean))
    return spread < 3 or (spread < 8 and (grey < 24 or grey > 248))


def _is_placeholder(one: Look, ordinary: float = 0.0) -> bool:
    """Grey text on a plain light ground; a product shot has colour, or more contrast."""
    plain = one.flat >= 0.7 and one.chroma <= 5 and float(one.thumb.std()) <= 40
    return plain and float(np.mean(one.mean)) > 128 and not _is_blank(one)


@dataclass(frozen=True)
class _Check:
    """A test of one picture, given the usual number of pixels; `word` and `words` follow '1 picture', '2 pictures'."""

    kind: str
    severity: str
    test: Callable[[Look, float], bool]
    word: str
    words: str
    advice: str
    detail: Callable[[Look], str] = _size
    of_good: bool = True


_CHECKS = (
    _Check(
        "unreadable",
        "error",
        lambda one, _: True,
        "cannot be read",
        "cannot be read",
        "Repair or remove what is broken, or leave it out with --bad-files skip.",
        lambda one: one.reason or "",
        of_good=False,
    ),
    _Check(
        "blank",
        "warning",
        _is_blank,
        "shows nothing: of one colour, or nearly black or white",
        "show nothing: of one colour, or nearly black or white",
        "Look, and remove what shows nothing of its class.",
        lambda one: f"mean grey {np.mean(one.mean):.0f} of 255, spread {one.thumb.std():.1f}",
    ),
    _Check(
        "placeholder",
        "warning",
        _is_placeholder,
        "looks like a notice in place of a picture (grey text on a plain ground)",
        "look like a notice in place of a picture (grey text on a plain ground)",
        "Look, and remove what is no picture of its class.",
        lambda one: f"{100 * one.flat:.0f} % of one colour",
    ),
    _Check(
        "animated",
        "warning",
        lambda one, _: one.header.animated,
        "is animated",
        "are animated",
        "Only the first frame is used; save the frame that counts as a picture of its own.",
        lambda one: one.header.format,
    ),
    _Check(
        "tiny",
        "warning",
        lambda one, _: _short_side(one) < TINY_PX,
        f"has a side below {TINY_PX} px",
        f"have a side below {TINY_PX} px",
        "There is little to see: put larger pictures in their place, or remove them.",
    ),
    _Check(
        "huge",
        "note",
        _is_huge,
        f"is huge: over {HUGE_PIXELS // 10**6} Mpx, {HUGE_BYTES // 10**6} MB, or {HUGE_RATIO} times the usual",
        f"are huge: over {HUGE_PIXELS // 10**6} Mpx, {HUGE_BYTES // 10**6} MB, or {HUGE_RATIO} times the usual",
        "Shrink what is huge once: reading gets faster.",
    ),
    _Check(
        "long",
        "note",
        _is_long,
        f"is more than {LONG_SIDE:.0f} times as long as wide",
        f"are more than {LONG_SIDE:.0f} times as long as wide",
        "A crop to a square loses most of such a picture; cut it by hand, or use --fit letterbox.",
    ),
)


def _extensions(table: ImageTable, looks: Sequence[Look]) -> list[Finding]:
    wrong = [
        (name, one.header.format)
        for name, one in zip(table.relative_paths, looks, strict=True)
        if one.reason is None and PurePosixPath(name).suffix.lower() not in _SUFFIXES.get(one.header.format, ())
    ]
    if not wrong:
        return []
    return [
        Finding(
            "extension", "note", f"{_files(len(wrong))} {_be(len(wrong))} named with the extension of another format.",
            "headstart goes by the content; rename for programs that do not.",
            tuple(name for name, _ in wrong), tuple(f"is {kind}" for _, kind in wrong),
        )
    ]  # fmt: skip


def _modes(table: ImageTable, looks: Sequence[Look]) -> list[Finding]:
    modes = Counter(one.header.mode for one in looks if one.reason is None)
    usual = modes.most_common(1)[0][0] if modes else ""
    odd = [i for i, one in enumerate(looks) if one.reason is None and one.header.mode != usual]
    if not odd:
        return []
    counted = ", ".join(f"{n:,} {mode}" for mode, n in modes.most_common() if mode != usual)
    return [
        Finding(
            "modes", "note", f"Most pictures are {usual}; {counted}.",
            "All become RGB; see that no class is made of the odd ones.",
            tuple(table.relative_paths[i] for i in odd), tuple(looks[i].header.mode for i in odd),
        )
    ]  # fmt: skip


def _orientations(table: ImageTable, looks: Sequence[Look]) -> list[Finding]:
    turned = [i for i, one in enumerate(looks) if one.reason is None and one.header.orientation != 1]
    if not turned:
        return []
    shares, uneven = _turned_shares(table, looks)
    spread = f", unevenly: {', '.join(f'{name} {100 * share:.0f} %' for name, share in shares[:6])}" if uneven else ""
    return [
        Finding(
            "orientation", "warning" if uneven else "note",
            f"{_files(len(turned))} {_be(len(turned))} turned by an EXIF entry{spread}.",
            "headstart turns them upright, in training as in use; "
            + ("take the pictures of all classes in one way, or the camera gives the class away." if uneven else
               "programs that do not would see what is shown lying on its side."),
            tuple(table.relative_paths[i] for i in turned),
            tuple(f"orientation {looks[i].header.orientation}" for i in turned),
        )
    ]  # fmt: skip


def _turned_shares(table: ImageTable, looks: Sequence[Look]) -> tuple[list[tuple[str, float]], bool]:
    """Share of turned pictures per class, most first, and whether classes differ by more than chance and by a tenth."""
    good = np.array([one.reason is None for one in looks])
    turned = np.array([one.header.orientation != 1 for one in looks]) & good
    n = np.bincount(table.labels[good], minlength=len(table.class_names))
    k = np.bincount(table.labels[turned], minlength=len(table.class_names))
    has = n > 0
    shares = sorted(
        ((table.class_names[i], float(k[i] / n[i])) for i in np.flatnonzero(has)), key=lambda pair: -pair[1]
    )
    counts = np.stack([k[has], n[has] - k[has]])
    if has.sum() < 2 or (counts.sum(axis=1) == 0).any():
        return shares, False
    return shares, shares[0][1] - shares[-1][1] >= 0.1 and chance_of_shares(counts) < 1e-3


def chance_of_shares(counts: npt.NDArray[np.int64]) -> float:
    """Chance that shares differ as in this table [2, C] of counts, none of its sums 0, where they are the same.

    Pearson's chi-square, with Yates' correction for C = 2. `scipy.stats` has it, but takes longer to import than a set
    takes to be looked at.
    """
    from scipy.special import chdtrc

    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    apart = np.abs(counts - expected)
    if counts.shape[1] == 2:
        apart = np.maximum(apart - 0.5, 0)
    return float(chdtrc(counts.shape[1] - 1, (apart**2 / expected).sum()))


def _files(n: int) -> str:
    return f"{n:,} picture{'' if n == 1 else 's'}"


def _be(n: int) -> str:
    return "is" if n == 1 else "are"


def _classes(n: int) -> str:
    return "1 class has" if n == 1 else f"{n:,} classes have"


def _named(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items(), key=lambda pair: pair[1])[:5])
    return shown + (f" and {len(counts) - 5:,} more" if len(counts) > 5 else "")
