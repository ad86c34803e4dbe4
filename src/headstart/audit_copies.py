"""Findings that compare pictures: copies within and across splits, copies with two labels, series of shots."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from .audit_files import grouped_finding
from .dataset import ImageTable
from .duplicates import Pair, exact_pairs, groups_of, likeness, near_pairs
from .findings import Finding
from .inspection import Look

SERIES_SECONDS = 5.0  # between two shots of one series
SERIES_LIKENESS = 0.9  # correlation of small grey pictures, where the files have no times

COPIES = "copies:"  # how the name of a group of copies begins, here and in a manifest that follows an audit


def is_copies(group: str) -> bool:
    """Whether a group's name is one that was given to copies, not by the user."""
    return group.startswith(COPIES) or re.fullmatch(r"copies-\d+", group) is not None  # as earlier versions wrote it


@dataclass(frozen=True, eq=False)
class Copies:
    """exact, near: group number per picture, int64 [N], -1 for none; near groups hold the exact copies, too."""

    pairs: tuple[Pair, ...]
    exact: npt.NDArray[np.int64]
    near: npt.NDArray[np.int64]

    @property
    def names(self) -> tuple[str, ...]:
        """The near groups as `ImageTable.groups` takes them."""
        return tuple(f"{COPIES}{number + 1}" if number >= 0 else "" for number in self.near)


def find_copies(looks: Sequence[Look]) -> Copies:
    """Exact and near copies among the readable pictures."""
    exact = exact_pairs([one.pixels for one in looks])
    aside = [i for i, one in enumerate(looks) if one.reason is not None] + [pair.b for pair in exact]
    near = near_pairs([one.thumb for one in looks], leave_out=aside)
    return Copies((*exact, *near), groups_of(len(looks), exact), groups_of(len(looks), (*exact, *near)))


def copy_findings(table: ImageTable, copies: Copies) -> list[Finding]:
    """Conflicting labels, leaks across splits, and copies within a split, each for exact and for near copies."""
    found = []
    for word, groups in (("exact", _members(copies.exact)), ("near", _beyond(copies))):
        conflicts = [g for g in groups if len({int(table.labels[i]) for i in g}) > 1]
        leaks = [g for g in groups if len({table.split_names[i] for i in g}) > 1]
        inside = [g for g in groups if g not in conflicts and g not in leaks]
        found += [
            *_grouped(
                table, conflicts, f"{word}-conflicts", "error" if word == "exact" else "warning",
                f"{_sets(conflicts, word)} stand in different classes",
                "At least one label is wrong: keep each in its own class, or drop it.",
            ),
            *_grouped(
                table, leaks, f"{word}-leaks", "error",
                f"{_sets(leaks, word)} stand in different splits",
                "Scores on them are too good; take them out of all splits but one.",
            ),
            *_grouped(
                table, inside, f"{word}-duplicates", "note",
                f"{_sets(inside, word)} stand in one class",
                "They count double and must stay on one side of a split, which fit sees to; drop all but one of each.",
            ),
        ]  # fmt: skip
    return found


def leaked(table: ImageTable, copies: Copies, split: str = "test") -> npt.NDArray[np.bool_]:
    """Mask [N]: pictures of `split` of which a copy, exact or near, stands in another split."""
    splits = np.array(table.split_names)
    mask = np.zeros(len(table), dtype=bool)
    for group in _members(copies.near):
        here = [i for i in group if splits[i] == split]
        if len(here) < len(group):
            mask[here] = True
    return mask


def series_findings(table: ImageTable, looks: Sequence[Look]) -> list[Finding]:
    """Shots of one series by name, number and time: a suggestion for groups, which nothing follows by itself."""
    series = [run for run in _runs(table, looks) if len(run) > 1]
    if not series:
        return []
    n = sum(map(len, series))
    return _grouped(
        table, series, "series", "note",
        f"{n:,} pictures are shots of {len(series):,} series, by their names and times or their likeness",
        "Shots of one series on both sides of a split flatter the score: give each a `group` in a manifest.",
    )  # fmt: skip


def _runs(table: ImageTable, looks: Sequence[Look]) -> Iterable[list[int]]:
    """Neighbours by number within one folder and prefix, cut where two shots are apart."""
    shelves: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for i, name in enumerate(table.relative_paths):
        path = PurePosixPath(name)
        found = re.fullmatch(r"(.*?)(\d+)", path.stem)
        if found and looks[i].reason is None and len(found[2]) < 10:
            shelves[str(path.parent), found[1]].append((int(found[2]), i))
    for shelf in shelves.values():
        shelf.sort()
        run = [shelf[0][1]]
        for (number, i), (next_number, j) in pairwise(shelf):
            if next_number - number <= 2 and _same_series(looks[i], looks[j]):
                run.append(j)
            else:
                yield run
                run = [j]
        yield run


def _same_series(one: Look, other: Look) -> bool:
    if one.header.taken is not None and other.header.taken is not None:
        return abs(one.header.taken - other.header.taken) <= SERIES_SECONDS
    return likeness(one.thumb, other.thumb) >= SERIES_LIKENESS


def _members(numbers: npt.NDArray[np.int64]) -> list[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for i, number in enumerate(numbers.tolist()):
        if number >= 0:
            groups[number].append(i)
    return list(groups.values())


def _beyond(copies: Copies) -> list[list[int]]:
    """Near groups that hold more than the exact copies of one picture."""
    return [g for g in _members(copies.near) if len({int(copies.exact[i]) for i in g}) > 1 or copies.exact[g[0]] < 0]


def _sets(groups: Sequence[Sequence[int]], word: str) -> str:
    copies = "exact copies" if word == "exact" else "near copies (re-encoded, resized, mirrored, cropped, recoloured)"
    return f"{sum(map(len, groups)):,} pictures in {len(groups):,} group{'' if len(groups) == 1 else 's'} of {copies}"


def _grouped(
    table: ImageTable, groups: Sequence[Sequence[int]], kind: str, severity: str, title: str, advice: str
) -> list[Finding]:
    return [grouped_finding(table, groups, kind, severity, f"{title}.", advice)] if groups else []
