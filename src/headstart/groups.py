"""Groups: pictures that belong together, such as near copies or a burst, and stay on one side of every split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

Unit = list[int]


def make_units(members: Sequence[int], groups: Sequence[str]) -> list[Unit]:
    """What is divided up as one piece: a group's members, or one picture that stands alone.

    Args:
        members: positions to divide up; units and their members come in this order.
        groups: group ('' stands alone) of every position.
    """
    units: dict[object, Unit] = {}
    for i in members:
        units.setdefault(groups[i] or i, []).append(i)
    return list(units.values())


def take_units(units: list[Unit], pictures: int, *, leave: int) -> list[Unit]:
    """Remove whole units from the front of `units`, up to `pictures` pictures, and return them.

    A unit too large for what is left is passed over; where none fits, the smallest is taken. With units of one
    picture each, these are the first `pictures`.

    Args:
        leave: this many units stay, whatever was asked for.
    """
    taken: list[Unit] = []
    kept: list[Unit] = []
    for unit in units:
        if len(unit) <= pictures and len(units) - len(taken) > leave:
            taken.append(unit)
            pictures -= len(unit)
        else:
            kept.append(unit)
    if not taken and pictures > 0 and len(kept) > leave:
        taken.append(kept.pop(kept.index(min(kept, key=len))))
    units[:] = kept
    return taken


def take_mixed_units(units: list[Unit], wanted: Mapping[int, int], labels: Sequence[int], *, leave: int) -> list[Unit]:
    """As `take_units` for units with pictures of several classes, of each of which so many are wanted.

    In the units' order, each is taken that brings the classes nearer to what is wanted of them, in shares of it; a
    class that has got none so far then gets the smallest unit that leaves the others theirs. That is stratification
    in one go (after Sechidis et al. 2011, for multi-label data) with whole groups in place of pictures.

    Args:
        wanted: label -> pictures. labels: of every position.
        leave: so many units with a picture of each class stay.
    """
    counts = [Counter(labels[i] for i in unit) for unit in units]
    left = Counter(label for count in counts for label in count)
    lacking = dict(wanted)
    taken: set[int] = set()

    def take(place: int) -> None:
        taken.add(place)
        left.subtract(counts[place].keys())
        for label, n in counts[place].items():
            lacking[label] -= n

    def is_free(place: int) -> bool:
        return place not in taken and all(left[label] > leave for label in counts[place])

    for place, count in enumerate(counts):
        nearer = sum((abs(lacking[c]) - abs(lacking[c] - n)) / wanted[c] for c, n in count.items())
        # No class gets half as much again as is wanted of it, whatever the others gain.
        if nearer > 0 and all(2 * (n - lacking[c]) <= wanted[c] for c, n in count.items()) and is_free(place):
            take(place)
    for label in sorted(wanted, key=lambda label: left[label]):
        if not any(label in counts[place] for place in taken):
            free = [place for place, count in enumerate(counts) if label in count and is_free(place)]
            if free:
                take(min(free, key=lambda place: len(units[place])))
    chosen = [unit for place, unit in enumerate(units) if place in taken]
    units[:] = [unit for place, unit in enumerate(units) if place not in taken]
    return chosen


def join_groups(groups: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Per picture one group: pictures that share a group of either kind, directly or in a chain, share one.

    It is called as in `groups` where one of its pictures has a name there, else as in `others`; '' stands alone.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(name: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    # Names of `groups` sort before those of `others`, and the smaller name becomes the root.
    keys = [[(kind, name) for kind, name in (("a", own), ("b", other)) if name] for own, other in
            zip(groups, others, strict=True)]  # fmt: skip
    for names in keys:
        for name in names:
            one, other = sorted((root(names[0]), root(name)))
            parent[other] = one
    return tuple(root(names[0])[1] if names else "" for names in keys)


def shared_groups(sides: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The groups that stand in more than one split, with those splits, in the order of `sides`.

    Args:
        sides: split name -> the group of each of its pictures, '' for those that stand alone.
    """
    found: dict[str, list[str]] = {}
    for side, groups in sides.items():
        for group in dict.fromkeys(groups):
            if group:
                found.setdefault(group, []).append(side)
    return {group: tuple(names) for group, names in found.items() if len(names) > 1}
