"""Groups: pictures that belong together, such as near copies or a burst, and stay on one side of every split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

Unit = list[int]


def make_units(members: Sequence[int], groups: Sequence[str], labels: Sequence[int]) -> dict[int, list[Unit]]:
    """Label -> the units of that class; a unit is a group's members, or one picture that stands alone.

    A group that spans several classes counts with the class of most of its pictures, the lower label at a tie.

    Args:
        members: positions to divide up; units and their members come in this order.
        groups, labels: group ('' stands alone) and label of every position.
    """
    units: dict[object, Unit] = {}
    for i in members:
        units.setdefault(groups[i] or i, []).append(i)
    of_class: dict[int, list[Unit]] = {}
    for unit in units.values():
        counts = Counter(labels[i] for i in unit)
        of_class.setdefault(min(counts, key=lambda label: (-counts[label], label)), []).append(unit)
    return of_class


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
