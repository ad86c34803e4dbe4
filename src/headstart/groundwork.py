"""What is done before any run: pictures are found, decoded, looked at and split, once for all runs on a bench."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from .arrays import Labels, Pictures, images_from_arrays
from .audit_copies import is_copies
from .audit_kept import audit_key, keep_audit, kept_audit
from .audit_quick import quick_audit
from .audit_sheet import finding_line
from .bench import Bench, fill_store, open_store
from .dataset import ImageTable, Splits, bad_file_lines, check_images, load_images
from .dataspec import DataSpec
from .errors import DataError, RecipeError
from .findings import AuditResult
from .folders import class_parents
from .groups import join_groups
from .pixelstore import PixelStore
from .run import refuse_among_pictures
from .runtime import Runtime
from .splitting import split
from .terminal import ProgressBar, say

Data = str | Path | ImageTable | Splits | tuple[Pictures, Labels]


def make_bench(
    data: Data,
    *,
    runtime: Runtime,
    seed: int = 0,
    val: float = 0.15,
    test: float = 0.15,
    val_folder: str | None = None,
    test_folder: str | None = None,
    root: str | Path | None = None,
    bad_files: str = "error",
    limit: int | None = None,
    check: bool | None = None,
    spec: DataSpec | None = None,
    share: bool = True,
    cache: bool = True,
    audit: bool = True,
    progress: bool = False,
) -> Bench:
    """Read, check, look at and split the pictures, once for all runs on this bench.

    Args:
        data: pictures as `load_images` takes them, an `ImageTable`, `Splits` made beforehand, or a pair of pictures
            and labels in memory as `images_from_arrays` takes them.
        seed: of the split.
        val, test, val_folder, test_folder, root, bad_files, limit: as in `fine_tune`.
        check: decode every picture, to see whether it does; None is for folders alone, and wherever `bad_files` is
            `skip`.
        spec: the preprocessing, where it is known already: the check then decodes what the runs need.
        share: keep what one run makes for the next.
        cache: keep decoded pictures in the cache folder and use those kept before.
        audit: look at the pictures (see `audit_quick`), and keep copies of one picture on one side of the split.
        progress: a bar and a line on standard error.
    Raises:
        DataError: pictures that cannot be used. RecipeError: options without effect on what was given.
    """
    show = progress and runtime.is_main
    if isinstance(data, Splits) and bad_files != "error":
        raise RecipeError(
            "bad_files: without effect on a Splits; leave it out, or load the pictures so, before they are split:"
            ' load_images(..., bad_files="skip").'
        )
    found = find_data(data, seed=seed, val_folder=val_folder, test_folder=test_folder, root=root, limit=limit)
    stores = {spec: open_store(spec, show=show)} if cache else {}
    is_new = not isinstance(data, (ImageTable, Splits))  # else whoever made the table has checked it
    how: dict[str, Any] = {"workers": runtime.workers, "show": show}
    if isinstance(found, ImageTable) and (bad_files != "error" or (is_new if check is None else check)):
        found = _checked(found, stores.get(spec), bad_files=bad_files, look=audit, **how)
    elif audit and cache:
        _fill_unchecked(found, stores[spec], **how)
    result, found = _looked_at(found, stores.get(spec), **how) if audit else (None, found)
    splits = found if isinstance(found, Splits) else _split(found, val=val, test=test, seed=seed, show=show)
    require_validation(splits)
    _say_data(splits, show)
    _say_findings(result, show)
    return Bench(splits, runtime, share, cache, show, result, stores)


def find_data(
    data: Data,
    *,
    seed: int,
    val_folder: str | None,
    test_folder: str | None,
    root: str | Path | None,
    limit: int | None,
) -> ImageTable | Splits:
    """The pictures that the runs are about, not looked into yet.

    Raises:
        DataError, RecipeError: see `make_bench`.
    """
    idle: dict[str, Any] = (
        {"val_folder": val_folder, "test_folder": test_folder, "root": root}
        if isinstance(data, (ImageTable, Splits, tuple))
        else {}
    )
    idle |= {"limit": limit} if isinstance(data, Splits) else {}
    given = [name for name, value in idle.items() if value is not None]
    if given:
        raise RecipeError(f"{', '.join(given)}: without effect on a {type(data).__name__}; leave it out.")
    if isinstance(data, Splits):
        return data
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(
                f"Pictures are given as a tuple of {len(data)}; it takes two: the pictures and their labels."
            )
        data = images_from_arrays(*data)
    if not isinstance(data, ImageTable):
        data = load_images(data, val_folder=val_folder, test_folder=test_folder, root=root, check=False)
    return data if limit is None else data.limit(limit, seed=seed)


def refuse_as_class(
    out: str | Path, data: object, *, val_folder: str | None = None, test_folder: str | None = None, **_: object
) -> None:
    """Refuse a folder for results that the next run on this folder of pictures would take for a class.

    Beside the folders of splits it is none.

    Raises:
        CheckpointError: it is one. DataError: a layout that is refused.
    """
    root = Path(data).expanduser().absolute() if isinstance(data, (str, os.PathLike)) else None
    if root is None or not root.is_dir():
        return
    for parent in class_parents(root, shown=str(data), val_folder=val_folder, test_folder=test_folder):
        refuse_among_pictures(Path(out).expanduser(), parent)


def _checked(
    table: ImageTable, store: PixelStore | None, *, bad_files: str, look: bool, workers: int, show: bool
) -> ImageTable:
    """The pictures that decode; decoding them fills the store."""
    if store:
        reasons = fill_store(store, table, working=True, look=look, check=True, workers=workers, show=show)
        return check_images(table, bad_files=bad_files, reasons=reasons)
    with ProgressBar(len(table), "Reading pictures", enabled=show) as bar:
        return check_images(table, bad_files=bad_files, workers=workers, progress=lambda done, _: bar.move_to(done))


def _fill_unchecked(found: ImageTable | Splits, store: PixelStore, *, workers: int, show: bool) -> None:
    """Decode for the look at the pictures and for the runs in one go, without a word about files that do not decode."""
    for name, table in found.named().items() if isinstance(found, Splits) else (("train", found),):
        if len(table):
            fill_store(store, table, working=name == "train", look=True, check=False, workers=workers, show=show)


def _looked_at(
    found: ImageTable | Splits, store: PixelStore | None, *, workers: int, show: bool
) -> tuple[AuditResult | None, ImageTable | Splits]:
    """What the quick audit says, and the same pictures with the groups of their copies."""
    table = found.joined() if isinstance(found, Splits) else found
    if table is None or not len(table):
        return None, found
    contents = store.contents(table.paths) if store else None
    key = audit_key(table, contents) if contents else ""
    known = kept_audit(store.cache, key) if store and key else None
    if known is None:
        with ProgressBar(len(table), "Looking at pictures", enabled=show) as bar:
            quick = quick_audit(
                table, known=store.look if store else None, workers=workers, progress=lambda done, _: bar.move_to(done)
            )
        known = quick.result, quick.copies.names
        if store and key and store.is_unchanged(table.paths, root=table.root):
            keep_audit(store.cache, key, quick)
    result, copies = known
    return result, found.with_groups(dict(zip(table.paths, join_groups(table.groups, copies), strict=True)))


def _split(table: ImageTable, *, val: float, test: float, seed: int, show: bool) -> Splits:
    """Split with copies on one side; where a class is too full of them for that, without, and say so."""
    try:
        return split(table, val=val, test=test, seed=seed)
    except DataError:
        own = replace(table, groups=tuple("" if is_copies(name) else name for name in table.groups))
        splits = split(own, val=val, test=test, seed=seed)  # raises again where copies are not the reason
    splits = splits.with_groups(dict(zip(table.paths, table.groups, strict=True)))
    shared = [name for name in splits.shared_groups() if is_copies(name)]
    if shared:
        say(
            "A class has too few pictures that are no copies of each other, so that copies stand in several splits"
            f" ({_across(splits, shared[0])}): the scores are too good.",
            enabled=show,
        )
    return splits


def require_validation(splits: Splits) -> None:
    if not isinstance(splits, Splits):
        raise DataError(f"fit takes Splits, such as split(load_images(folder)); this is {type(splits).__name__}.")
    if not len(splits.val):
        raise DataError("The validation split is empty, but it chooses the best state. Hold some out: --val 0.15.")


def _say_findings(result: AuditResult | None, show: bool) -> None:
    """Errors and warnings with their first files; left-out files have been named, and a leak is told once."""
    leaked = {file for one in result.of_kind("near-leaks") for file in one.files} if result else set()
    for one in result.findings if result else ():
        is_told = one.kind == "left-out" or (one.kind == "exact-leaks" and leaked.issuperset(one.files))
        if one.severity != "note" and not is_told:
            say(finding_line(one), enabled=show)


def _say_data(splits: Splits, show: bool) -> None:
    counts = f"{len(splits.train):,} train, {len(splits.val):,} val, {len(splits.test):,} test"
    say(f"{len(splits.class_names)} classes; pictures: {counts}.", enabled=show)
    say_left_out(splits.train, show)
    if splits.train.dropped:
        say(f"{len(splits.train.dropped):,} pictures are dropped by the manifest; the report lists them.", enabled=show)
    shared = [name for name in splits.shared_groups() if not is_copies(name)]  # copies are told by what was found
    if shared:
        advice = " Leave the split to headstart to keep them together." if any(splits.train.split_names) else ""
        say(
            f"{len(shared):,} {'group of pictures stands' if len(shared) == 1 else 'groups of pictures stand'} in"
            f" several splits (group {shared[0]!r}: {_across(splits, shared[0])}): the scores are too good.{advice}",
            enabled=True,
        )


def _across(splits: Splits, group: str) -> str:
    """The first picture of a group in each split: `a.jpg in train and b.jpg in test`."""
    named = {name: table for name, table in splits.named().items() if group in table.groups}
    root = splits.train.root
    return " and ".join(
        f"{table.names_from(root)[table.groups.index(group)]} in {name}" for name, table in named.items()
    )


def say_left_out(table: ImageTable, show: bool) -> None:
    """Name the unreadable files that `bad_files="skip"` left out, with their reasons."""
    n = len(table.left_out)
    if n:
        word = "unreadable file is" if n == 1 else "unreadable files are"
        say(f"{n:,} {word} left out:{bad_file_lines(table.left_out)}", enabled=show)
