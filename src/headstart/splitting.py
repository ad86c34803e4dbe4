"""`ImageTable` -> stratified `Splits`; where a picture goes is a pure function of the seed, paths and class names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from numbers import Real

import numpy as np

from .dataset import SPLITS, ImageTable, Splits, by_path, word
from .errors import DataError
from .groups import Unit, make_units, take_mixed_units, take_units
from .order import permutation, random_stream

# Labels that are all numbers look like measured ones from so many on, where they have fewer pictures each than classes
# that are called by numbers.
_VALUES, _PER_VALUE = 10, 4


def split(table: ImageTable, *, val: float = 0.15, test: float = 0.15, seed: int = 0) -> Splits:
    """Train, val and test; a split the folder brings is kept, a missing one is held out of train, class by class.

    A pure function of the seed, the relative paths and the class names: the same in any process, on any system, in
    any order of the files. Each held-out split gets its share of each class, at least one picture; which pictures
    are test does not depend on `val`, but in classes of so few that both take all they can. Pictures of one group go
    to one side together, as near to the shares as whole groups allow, also where a group has pictures of several
    classes.

    Args:
        val, test: share of each class's pictures to hold out, in [0, 1); 0 leaves the split empty. Without effect
            for a split the folder brings.
    Raises:
        DataError: no table, a share or seed out of range, or a class with too few pictures (or groups) for the splits
            asked for.
    """
    if not isinstance(table, ImageTable):
        raise DataError(f"split takes an ImageTable, such as load_images(folder); this is {type(table).__name__}.")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise DataError(f"seed is {seed!r}; it takes a whole number from 0.")
    for name, share in (("val", val), ("test", test)):
        if not isinstance(share, Real) or not 0 <= share < 1:
            raise DataError(f"{name} is {share!r}; it takes a share of the pictures from 0 to below 1.")
    seed = int(seed)
    given = set(table.split_names)
    shares = {name: share for name, share in (("test", test), ("val", val)) if share and name not in given}
    if sum(shares.values()) >= 1:
        raise DataError(f"val {val} and test {test} leave nothing to train on; together they stay below 1.")
    assigned = np.array([name or "train" for name in table.split_names], dtype="<U5")
    pool = by_path(table, np.flatnonzero(assigned == "train").tolist())
    labels = table.labels.tolist()
    units = make_units(pool, table.groups)
    _require_enough(table, units, tuple(shares))
    if any(len({labels[i] for i in unit}) > 1 for unit in units):
        held_out = _mixed(table, units, shares, seed)
    else:
        held_out = _class_by_class(table, units, shares, seed)
    for name, chosen in held_out:
        assigned[chosen] = name
    train, val_table, test_table = (table.select(np.flatnonzero(assigned == name)) for name in SPLITS)
    return Splits(train=train, val=val_table, test=test_table)


def _class_by_class(
    table: ImageTable, units: Sequence[Unit], shares: dict[str, float], seed: int
) -> list[tuple[str, Unit]]:
    """Of each class, whose pictures alone a unit has, its share: (split, pictures) of every unit held out."""
    of_class: dict[int, list[Unit]] = {}
    for unit in units:
        of_class.setdefault(int(table.labels[unit[0]]), []).append(unit)
    held_out: list[tuple[str, Unit]] = []
    for label, own in of_class.items():
        free = _in_random_order(own, seed, table.class_names[label])
        left = len(shares)  # units to leave: one for each split still to come, and for train
        for name, count in _held_out(sum(map(len, own)), shares).items():
            held_out += [(name, unit) for unit in take_units(free, count, leave=left)]
            left -= 1
    return held_out


def _mixed(table: ImageTable, units: Sequence[Unit], shares: dict[str, float], seed: int) -> list[tuple[str, Unit]]:
    """As `_class_by_class` where units have pictures of several classes: all classes are shared out at once."""
    labels = table.labels.tolist()
    counts = Counter(labels[i] for unit in units for i in unit)
    wanted = {label: _held_out(n, shares) for label, n in counts.items()}
    free = _in_random_order(units, seed, "")
    held_out: list[tuple[str, Unit]] = []
    for left, name in zip(range(len(shares), 0, -1), shares, strict=True):
        taken = take_mixed_units(free, {label: wanted[label][name] for label in wanted}, labels, leave=left)
        without = set(counts) - {labels[i] for unit in taken for i in unit}
        if without:
            named = ", ".join(repr(table.class_names[label]) for label in sorted(without)[:5])
            raise DataError(
                f"The groups of the pictures in {table.root} have pictures of several classes, and no way was found to"
                f" give {name} a picture of {named} and leave the other splits one of each class. Bring your own split"
                " folders (train, val, test), make groups smaller, or add pictures of these classes."
            )
        held_out += [(name, unit) for unit in taken]
    return held_out


def _in_random_order(units: Sequence[Unit], seed: int, name: str) -> list[Unit]:
    return [units[i] for i in permutation(len(units), random_stream(seed, word(name), 2))]


def _require_enough(table: ImageTable, units: Sequence[Unit], missing: tuple[str, ...]) -> None:
    """Refuse a class that has fewer pictures, or groups, than there are splits that need one."""
    needed = 1 + len(missing)
    labels = table.labels.tolist()
    found = Counter(label for unit in units for label in {labels[i] for i in unit})
    short = [label for label in range(len(table.class_names)) if found[label] < needed]
    if short:
        named = ", ".join(f"{table.class_names[i]!r} has {found[i]}" for i in short[:5])
        more = f" and {len(short) - 5} classes more" if len(short) > 5 else ""
        *sides, last = ("train", *sorted(missing, reverse=True))
        raise DataError(
            f"Too few training pictures in {table.root}: class {named}{more}; one each for "
            f"{', '.join(sides)}{' and ' * bool(sides)}{last} makes {needed}"
            f"{' (pictures of one group count as one)' if any(table.groups) else ''}. "
            f"{f'Raise the limit, {table.limited}, which left others out; else add' if table.limited else 'Add'} "
            "pictures, remove the class, or bring your own split folders (train, val, test)."
            f"{_measured(table.class_names, found.total())}"
        )


def _measured(class_names: Sequence[str], pictures: int) -> str:
    """A hint where the labels look like measurements: many numbers with fractions, or with few pictures each."""
    try:
        values = [float(name) for name in class_names]
    except ValueError:
        return ""
    is_whole = all(value.is_integer() for value in values)
    if len(values) < _VALUES or (is_whole and len(values) * _PER_VALUE <= pictures):
        return ""
    return (
        f" All {len(values):,} labels are numbers, each a class of its own; where they are measured values (regression,"
        " which headstart does not do), make a few classes of ranges of them."
    )


def _held_out(n: int, shares: dict[str, float]) -> dict[str, int]:
    """How many of `n` pictures each missing split gets: its rounded share, at least 1, and train keeps at least 1."""
    counts = {name: max(1, int(n * share + 0.5)) for name, share in shares.items()}
    while sum(counts.values()) >= n and counts:
        counts[max(counts, key=lambda name: counts[name])] -= 1
    return counts
