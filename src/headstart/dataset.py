"""A folder of labelled pictures -> `ImageTable`; and the three tables of a run, which `splitting` makes of it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import crews
from .decode import open_image
from .errors import DataError, near_matches
from .folders import IMAGE_EXTENSIONS, find_pictures, natural_key
from .groups import shared_groups
from .manifest import ManifestLayout, ManifestRow
from .order import permutation, random_stream
from .sources import read_source
from .threads import available_cores

__all__ = [
    "IMAGE_EXTENSIONS",
    "SPLITS",
    "ImageTable",
    "Splits",
    "bad_reasons",
    "by_path",
    "check_images",
    "list_image_files",
    "load_images",
    "open_image",
    "word",
]

SPLITS = ("train", "val", "test")
BAD_FILES = ("error", "skip")


@dataclass(frozen=True, eq=False)
class ImageTable:
    """N labelled pictures in a fixed order, with one class map whatever splits they stand in.

    labels: int64 [N], indices into `class_names`. split_names: per picture 'train', 'val' or 'test' where the folder
    came with split folders, else ''. bad_files: (file, reason) of pictures left out under `bad_files="skip"`.
    ignored: (extension, count) of files in the class folders that are no pictures. noted: rows of the manifest it was
    read from that say more: dropped ones, those with a reason or an original label. The three belong to the load: parts
    made with `select` carry them on.
    groups: per picture the group that stays on one side of every split, '' for a picture by itself; () is '' for all.
    limited: to how many pictures `limit` has cut it; 0 where it has not.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    split_names: tuple[str, ...]
    bad_files: tuple[tuple[Path, str], ...] = ()
    ignored: tuple[tuple[str, int], ...] = ()
    noted: tuple[ManifestRow, ...] = ()
    groups: tuple[str, ...] = ()
    limited: int = 0

    def __post_init__(self) -> None:
        labels = np.array(self.labels, dtype=np.int64)
        labels.setflags(write=False)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "groups", self.groups or ("",) * len(self.paths))
        if not len(self.paths) == len(labels) == len(self.split_names) == len(self.groups):
            raise DataError(
                f"ImageTable: {len(self.paths)} paths, {len(labels)} labels, {len(self.split_names)} split names and "
                f"{len(self.groups)} groups; it takes one of each per picture."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise DataError(f"ImageTable: a label lies outside 0 .. {len(self.class_names) - 1}.")

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def relative_paths(self) -> tuple[str, ...]:
        """Paths relative to `root`, with forward slashes, as they are spelled on the disk."""
        return tuple(p.relative_to(self.root).as_posix() for p in self.paths)

    @property
    def dropped(self) -> tuple[tuple[Path, str], ...]:
        """(file, reason) of the pictures that the manifest leaves out."""
        return tuple((row.path, row.reason) for row in self.noted if row.drop)

    def names_from(self, root: Path) -> tuple[str, ...]:
        """As `relative_paths` where the pictures lie under this root, too; those that do not, in full."""
        return self.relative_paths if root == self.root else tuple(_name_from(root, path) for path in self.paths)

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """`bad_files` by their paths relative to `root` where they lie in it."""
        return tuple((_name_from(self.root, path), reason) for path, reason in self.bad_files)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Pictures per class, int64 [C]; 0 for a class that has none here."""
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def select(self, indices: npt.ArrayLike) -> ImageTable:
        """The pictures at `indices` (positions or a mask of length N), in that order; class map and root stay."""
        chosen = np.arange(len(self))[np.asarray(indices, dtype=None if np.size(indices) else np.int64)]
        return replace(
            self,
            paths=tuple(self.paths[i] for i in chosen),
            labels=self.labels[chosen],
            split_names=tuple(self.split_names[i] for i in chosen),
            groups=tuple(self.groups[i] for i in chosen),
        )

    def with_groups(self, groups: Mapping[Path, str]) -> ImageTable:
        """The same pictures in these groups, by path; '' stands alone."""
        return replace(self, groups=tuple(groups[path] for path in self.paths))

    def rows(self, split: str = "", *, dropped: bool = False) -> list[ManifestRow]:
        """The pictures as rows for `write_manifest`, with the reasons and original labels that they were read with.

        Args:
            split: in place of the split names they came with.
            dropped: the rows that the manifest drops as well, behind the others; they belong to the whole of what was
                loaded, so ask one of its parts at most.
        """
        labels = (self.class_names[label] for label in self.labels)
        columns = zip(self.paths, labels, self.split_names, self.groups, strict=True)
        rows = [ManifestRow(path, label, split or own, group) for path, label, own, group in columns]
        noted = {row.path: (row.reason, row.original_label, row.label) for row in self.noted if not row.drop}
        for i, row in enumerate(rows):
            reason, original, label = noted.get(row.path, ("", "", ""))
            if label == row.label:
                rows[i] = replace(row, reason=reason, original_label=original)
        return [*rows, *(row for row in self.noted if row.drop)] if dropped else rows

    def limit(self, n: int, seed: int = 0) -> ImageTable:
        """At most `n` pictures, drawn in proportion from every class of every split: a quick dry run.

        Small groups keep up to three pictures, so that a split can still be made, where `n` allows it.

        Raises:
            DataError: `n` is smaller than the number of classes times splits.
        """
        if n >= len(self):
            return self
        groups = self._groups()
        if n < len(groups):
            raise DataError(
                f"--limit is {n}; {self.root} has {len(groups)} groups (classes times splits) and each needs a "
                f"picture: {len(groups)} or more."
            )
        quotas = _quotas([len(members) for members in groups.values()], n)
        chosen: list[int] = []
        for (name, label), quota in zip(groups, quotas, strict=True):
            members = _shuffled(self, groups[name, label], random_stream(seed, word(self.class_names[label]), 3))
            chosen.extend(members[:quota])
        return replace(self.select(sorted(chosen)), limited=n)

    def _groups(self) -> dict[tuple[str, int], list[int]]:
        groups: dict[tuple[str, int], list[int]] = {}
        for i, key in enumerate(zip(self.split_names, self.labels.tolist(), strict=True)):
            groups.setdefault(key, []).append(i)
        return groups


@dataclass(frozen=True, eq=False)
class Splits:
    """Train fits, val chooses, test is scored once at the end; each picture stands in exactly one of them."""

    train: ImageTable
    val: ImageTable
    test: ImageTable

    def __post_init__(self) -> None:
        for name, table in self.named().items():
            if table.class_names != self.class_names:
                raise DataError(
                    f"The classes of {name} ({', '.join(table.class_names)}) are not those of train"
                    f" ({', '.join(self.class_names)}), in that order. Load its pictures with"
                    " load_images(folder, class_names=train.class_names)."
                )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, which all three tables share."""
        return self.train.class_names

    def named(self) -> dict[str, ImageTable]:
        """The three tables by name, in the order train, val, test."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def with_groups(self, groups: Mapping[Path, str]) -> Splits:
        """The same splits with their pictures in these groups."""
        return replace(self, **{name: table.with_groups(groups) for name, table in self.named().items()})

    def joined(self) -> ImageTable | None:
        """All pictures in one table, each with the name of its split; None where they lie under several roots."""
        tables = [table for table in self.named().values() if len(table)]
        if len({table.root for table in tables}) != 1:
            return None
        return replace(
            tables[0],
            paths=tuple(path for table in tables for path in table.paths),
            labels=np.concatenate([table.labels for table in tables]),
            split_names=tuple(name for name, table in self.named().items() for _ in range(len(table))),
            groups=tuple(group for table in tables for group in table.groups),
        )

    def leaked(self, name: str = "test") -> npt.NDArray[np.bool_]:
        """Mask of the pictures of split `name` whose group stands in another split, too."""
        shared = self.shared_groups()
        return np.array([group in shared for group in self.named()[name].groups], dtype=bool)

    def shared_groups(self) -> dict[str, tuple[str, ...]]:
        """Groups that stand in several splits, which splits the data bring themselves can do; empty after `split`."""
        return shared_groups({name: table.groups for name, table in self.named().items()})


def load_images(
    folder: str | Path,
    *,
    bad_files: str = "error",
    class_names: Sequence[str] | None = None,
    val_folder: str | None = None,
    test_folder: str | None = None,
    root: str | Path | None = None,
    check: bool = True,
    workers: int = 0,
) -> ImageTable:
    """Read labelled pictures: a folder, an archive of one, a manifest (see `read_manifest`), or a data set's name.

    PHOTOS/cat/1.jpg, or PHOTOS/train/cat/1.jpg beside `val` (`valid`, `validation`) and `test` in any letter case.
    The class map is that of the training pictures, naturally sorted (2 before 10). Hidden folders and files are
    skipped; other files in the class folders are counted in `ignored`.

    Args:
        bad_files: what happens to pictures that do not decode: `error` names them, `skip` leaves them out and lists
            them in `ImageTable.bad_files`.
        class_names: impose this class map (a saved model's); folders of some of its classes are then enough.
        val_folder, test_folder: the folder that serves as this split, when its name does not say so.
        root: the folder that a manifest's relative paths start from; None is the manifest's own.
        check: decode every picture once, to the last row, before anything is trained.
        workers: processes for the check; 0 is one per CPU core.
    Raises:
        DataError: no such folder or file, another layout (multi-label, nested, flat), an empty class, fewer than two
            classes, a class that training does not have, pictures that do not decode; what `read_manifest`,
            `unpack_archive` and `export_named` refuse.
        SetupError: no network, or a package that is not installed.
    """
    if bad_files not in BAD_FILES:
        raise DataError(f"bad_files is {bad_files!r}; allowed: {', '.join(BAD_FILES)}.")
    layout = read_source(folder, val_folder=val_folder, test_folder=test_folder, root=root)
    names = _class_map(layout.splits, class_names, shown=str(folder))
    index = {name: i for i, name in enumerate(names)}
    rows = [
        (path, index[name], split_name)
        for split_name, classes in layout.splits.items()
        for name, paths in classes.items()
        for path in paths
    ]
    table = ImageTable(
        root=layout.root,
        paths=tuple(row[0] for row in rows),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        class_names=names,
        split_names=tuple(row[2] for row in rows),
        ignored=tuple(sorted(layout.ignored.items())),
        noted=layout.noted if isinstance(layout, ManifestLayout) else (),
        groups=tuple(layout.groups.get(row[0], "") for row in rows),
    )
    return check_images(table, bad_files=bad_files, workers=workers) if check else table


def check_images(
    table: ImageTable,
    *,
    bad_files: str = "error",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    reasons: Sequence[str | None] | None = None,
) -> ImageTable:
    """Decode every picture of the table once and name, or leave out, those that do not decode.

    This happens in processes of their own with limits (see `isolate`): a file that crashes a decoder, or takes more
    than 5 seconds or 2 GB, is a bad file like any other.

    Args:
        bad_files: `error` or `skip`, as in `load_images`.
        progress: called with (pictures done, pictures in all) now and then.
        reasons: what decoding them has shown already, None for each good picture; nothing is then decoded here.
    Raises:
        DataError: bad pictures under `error` (the first 20 with their reasons); under `skip`, a class of which no
            training picture is left.
    """
    if bad_files not in BAD_FILES:
        raise DataError(f"bad_files is {bad_files!r}; allowed: {', '.join(BAD_FILES)}.")
    if reasons is None:
        reasons = bad_reasons(table.paths, workers=workers, progress=progress)
    bad = [(i, reason) for i, reason in enumerate(reasons) if reason is not None]
    if not bad:
        return table
    if bad_files == "error":
        lines = bad_file_lines([(table.relative_paths[i], reason) for i, reason in bad])
        raise DataError(
            f"{len(bad):,} of {len(table):,} pictures in {table.root} cannot be read:{lines}\n"
            'Repair or remove them, or leave them out with --bad-files skip (bad_files="skip").'
        )
    kept = table.select([i for i, reason in enumerate(reasons) if reason is None])
    lost = np.flatnonzero((_train_counts(table) > 0) & (_train_counts(kept) == 0))
    if len(lost):
        names = ", ".join(table.class_names[i] for i in lost[:5])
        raise DataError(
            f"No training picture of {names} in {table.root} can be read "
            f"({table.relative_paths[bad[0][0]]}: {bad[0][1]}). Repair the pictures or remove the class."
        )
    return replace(kept, bad_files=table.bad_files + tuple((table.paths[i], reason) for i, reason in bad))


def bad_file_lines(bad: Sequence[tuple[str, str]]) -> str:
    """A line for each of the first 20 (file, reason), each after a line break, and how many more there are."""
    more = f"\n  ... and {len(bad) - 20:,} more" if len(bad) > 20 else ""
    return "".join(f"\n  {file}: {reason}" for file, reason in bad[:20]) + more


def bad_reasons(
    paths: Sequence[str | Path], *, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[str | None]:
    """Why each file does not decode, None where it does; decoded in limited processes, 0 is one per CPU core."""
    return crews.bad_reasons(paths, workers=workers or available_cores(), progress=progress)


def _name_from(root: Path, path: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def list_image_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given, and the pictures in folders (at any depth, naturally sorted, hidden ones left out), each once.

    Raises:
        DataError: a path that does not exist, a folder without pictures, nothing at all.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = find_pictures(path, links=True)
            if not inside:
                raise DataError(f"No picture in {path}; looked for {', '.join(sorted(IMAGE_EXTENSIONS))} at any depth.")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            siblings = [p.name for p in islice(path.parent.iterdir(), 10_000)] if path.parent.is_dir() else []
            raise DataError(f"No file or folder {path}.{near_matches(path.name, siblings)}")
    if not found:
        raise DataError("No picture asked for; name files or folders.")
    return list(found)


def _class_map(
    splits: dict[str, dict[str, list[Path]]], class_names: Sequence[str] | None, *, shown: str
) -> tuple[str, ...]:
    """The class names in label order, after checking every split's folders against them."""
    if class_names is not None:
        names = tuple(class_names)
        if isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
            raise DataError(f"class_names is {class_names!r}; it takes a list of names, as text.")
        owner = "the class names given"
    elif "train" in splits or "" in splits:
        names = tuple(sorted(splits.get("train", splits.get("", {})), key=natural_key))
        owner = "the training pictures"
    else:
        raise DataError(
            f"{shown}: there are pictures for {' and '.join(splits)}, but no split folder 'train' to learn from. "
            "Add it, or pass one of the folders by itself."
        )
    known = set(names)
    for split_name, classes in splits.items():
        for name in classes:
            if name not in known:
                where = f"split {split_name!r} of {shown}" if split_name else shown
                raise DataError(
                    f"Class {name!r} in {where} is not among the {len(names)} classes of {owner}: "
                    f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}.{near_matches(name, names)} "
                    "Rename it or take it out."
                )
    if class_names is None and len(names) < 2:
        raise DataError(
            f"One class only in {shown} ({names[0]!r}); a classifier needs two or more, each with pictures of its own."
        )
    return names


def _train_counts(table: ImageTable) -> npt.NDArray[np.int64]:
    mask = np.array([name in ("", "train") for name in table.split_names], dtype=bool)
    return np.bincount(table.labels[mask], minlength=len(table.class_names)).astype(np.int64)


def _quotas(sizes: list[int], n: int) -> list[int]:
    """Share out `n` over groups of these sizes: in proportion, but first up to three each where `n` allows."""
    floor = next(k for k in (3, 2, 1) if sum(min(size, k) for size in sizes) <= n)
    quotas = [min(size, floor) for size in sizes]
    wanted = [n * size / sum(sizes) for size in sizes]
    for _ in range(n - sum(quotas)):
        open_groups = [i for i, size in enumerate(sizes) if quotas[i] < size]
        quotas[max(open_groups, key=lambda i: wanted[i] - quotas[i])] += 1
    return quotas


def _shuffled(table: ImageTable, members: list[int], stream: np.random.Philox) -> list[int]:
    """`members` in an order that depends on their relative paths and the stream, not on their order in the table."""
    ordered = by_path(table, members)
    return [ordered[i] for i in permutation(len(ordered), stream)]


def by_path(table: ImageTable, members: list[int]) -> list[int]:
    """`members`, positions in the table, in the order of their relative paths."""
    # In one Unicode form: systems spell the same name differently, and the split must not depend on that.
    return sorted(members, key=lambda i: unicodedata.normalize("NFC", table.relative_paths[i]))


def word(text: str) -> int:
    """A class name as a number that random streams are keyed with."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "little")
