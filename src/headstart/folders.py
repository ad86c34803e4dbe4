"""How a folder of pictures is laid out: which folders are splits, which are classes, what is refused and why."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import DataError, near_matches

# The extension only finds candidates; the content decides what they are.
IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
)
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_HIDDEN = frozenset(("__macosx", "__pycache__", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"))
_TABLES = frozenset((".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".parquet"))


@dataclass(frozen=True)
class Layout:
    """What a source of pictures holds.

    splits: split name ('' without splits) -> class name -> pictures. ignored: extension -> files. root: the folder
    that holds all pictures. groups: the group of each picture that has one.
    """

    splits: dict[str, dict[str, list[Path]]]
    ignored: Counter[str]
    root: Path
    groups: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Folder:
    """What lies directly in one folder, naturally sorted, hidden things left out."""

    path: Path
    pictures: tuple[Path, ...]
    others: tuple[Path, ...]
    folders: tuple[Path, ...]


def natural_key(text: str) -> tuple[tuple[tuple[int, str] | str, ...], str]:
    """Sort key under which 2 comes before 10; ties (`a1`, `A1`) are settled by the text itself."""
    parts = re.split(r"([0-9]+)", unicodedata.normalize("NFC", text))
    return tuple((int(p), p) if i % 2 else p.casefold() for i, p in enumerate(parts)), text


def read_layout(root: Path, *, shown: str, val_folder: str | None = None, test_folder: str | None = None) -> Layout:
    """The pictures under `root` by split and class.

    Args:
        shown: `root` as the user wrote it, for messages.
        val_folder, test_folder: direct subfolders that serve as these splits whatever they are called.
    Raises:
        DataError: every layout that is not one folder per class, at most inside split folders.
    """
    if not root.is_dir():
        raise _no_folder(root, shown)
    top = _list(root)
    split_folders = _split_folders(top, shown, {"val": val_folder, "test": test_folder})
    ignored: Counter[str] = Counter()
    if not split_folders:
        _refuse_wrapper(top, shown)
        return Layout({"": _read_classes(top, shown, ignored)}, ignored, root)
    if top.pictures:
        raise _stray(top, shown)
    splits: dict[str, dict[str, list[Path]]] = {}
    for name in sorted(split_folders, key=("train", "val", "test").index):
        splits[name] = _read_classes(_list(split_folders[name]), shown, ignored, top=top)
    return Layout(splits, ignored, root)


def class_parents(
    root: Path, *, shown: str, val_folder: str | None = None, test_folder: str | None = None
) -> list[Path]:
    """The folders whose folders are classes: those of the splits or `root` itself, or none; see `read_layout`."""
    top = _list(root)
    found = _split_folders(top, shown, {"val": val_folder, "test": test_folder})
    return list(found.values()) or ([root] if any(_list(path).pictures for path in top.folders) else [])


def find_pictures(folder: Path, *, links: bool = False) -> list[Path]:
    """All candidates under a folder at any depth, naturally sorted; hidden files and folders left out.

    Args:
        links: follow links to folders. Each folder is read once: under its own place where it has one here, else by
            the first link to it. A link that leads back, to what `folder` lies in, is left out.
    """
    listed: dict[Path, _Folder] = {}
    seen = {str(outer) for outer in Path(os.path.realpath(folder)).parents}
    waiting, linked = deque([folder]), deque[Path]()
    while waiting or linked:  # links last: what they lead to may have its place here
        path = (waiting or linked).popleft()
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        listed[path] = _list(path)
        for inner in listed[path].folders:
            if not inner.is_symlink():
                waiting.append(inner)
            elif links:
                linked.append(inner)

    def inside(path: Path) -> Iterator[Path]:
        yield from listed[path].pictures
        for inner in listed[path].folders:
            if inner in listed:
                yield from inside(inner)

    return list(inside(folder))


def _list(path: Path) -> _Folder:
    pictures, others, folders = [], [], []
    try:
        entries = sorted((e for e in os.scandir(path) if not _is_hidden(e.name)), key=lambda e: natural_key(e.name))
    except OSError as error:
        raise DataError(f"Folder {path} cannot be listed: {error.strerror}.") from None
    for entry in entries:
        if _is_folder(entry):
            folders.append(path / entry.name)
        elif Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS:
            pictures.append(path / entry.name)
        else:
            others.append(path / entry.name)
    return _Folder(path, tuple(pictures), tuple(others), tuple(folders))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: what becomes of it is told where it is read
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _HIDDEN


def _split_folders(top: _Folder, shown: str, chosen: dict[str, str | None]) -> dict[str, Path]:
    """Split name -> its folder; empty when the folders are classes.

    A folder called `train` with folders in it is a split; with pictures directly in it, beside other class folders,
    it is a class of trains.
    """
    found = {name: _chosen_folder(top, shown, name, folder) for name, folder in chosen.items() if folder is not None}
    if len(set(found.values())) < len(found):
        raise DataError(f"{shown}: val and test are the same folder {chosen['val']!r}; choosing and scoring need two.")
    free = [p for p in top.folders if p not in found.values()]
    named = [p for p in free if p.name.casefold() in SPLIT_FOLDERS]
    if not found and not any(_holds_classes(_list(p)) for p in named):
        if named and len(named) == len(top.folders):
            raise _refuse(shown, f"no class folders in {_names(named)}{_beside(top)}")
        return {}
    for path in named:
        name = SPLIT_FOLDERS[path.name.casefold()]
        if chosen.get(name) is not None:
            continue  # the user has named another folder for this split: this one is left out
        if name in found:
            raise DataError(
                f"{shown}: {found[name].name!r} and {path.name!r} both mean split {name!r}. Remove one, or name the "
                f"right one (fit --{name}-folder NAME)."
            )
        found[name] = path
    stray = [p for p in free if p not in named and find_pictures(p)]
    if stray:
        raise DataError(
            f"{shown}: {_names(stray)} beside the split folders {_names(list(found.values()))} belongs to no split. "
            "Move it away, or say which split it is (--val-folder NAME, --test-folder NAME)."
        )
    return found


def _holds_classes(here: _Folder) -> bool:
    """Whether there are folders in it that count: an empty one beside pictures, say of thumbnails, does not."""
    return any(not here.pictures or find_pictures(inner) for inner in here.folders)


def _chosen_folder(top: _Folder, shown: str, name: str, folder: str) -> Path:
    by_name = {p.name: p for p in top.folders}
    by_case = {p.name.casefold(): p for p in top.folders}
    path = by_name.get(folder) or by_case.get(folder.casefold())
    if path is None:
        raise DataError(
            f"{shown}: no folder {folder!r} to use as split {name!r}. Folders there: {', '.join(by_name) or 'none'}."
            f"{near_matches(folder, list(by_name))}"
        )
    return path


def _read_classes(
    here: _Folder, shown: str, ignored: Counter[str], top: _Folder | None = None
) -> dict[str, list[Path]]:
    """Class name -> pictures of one folder of class folders; everything else that lies there is refused."""
    classes = [_list(path) for path in here.folders]
    filled = [inner for inner in classes if inner.pictures]
    tables = _beside(top or here)
    if here.pictures and not filled:
        raise _refuse(shown, f"{len(here.pictures):,} pictures in {here.path.name} itself, in no class folder{tables}")
    nested = [path for inner in classes for path in inner.folders if find_pictures(path)]
    if nested:
        shown_paths = [str(path.relative_to(here.path)) for path in nested]
        raise _refuse(shown, f"class folders nested in class folders ({_names(shown_paths)})")
    if tables and len(filled) < 2 and top is None:
        raise _refuse(shown, f"fewer than two class folders{tables}")
    if not classes:
        raise _refuse(shown, f"no picture and no class folder in {here.path.name}{tables}")
    if here.pictures:
        raise _stray(here, shown)
    empty = [inner for inner in classes if not inner.pictures]
    if empty:
        held = f" (it holds {_extensions(empty[0].others)})" if empty[0].others else ""
        raise DataError(
            f"{shown}: no picture in class folder {_names([p.path for p in empty])}{held}. "
            f"Pictures end in {', '.join(sorted(IMAGE_EXTENSIONS))}. Fill the folder or remove it."
        )
    ignored.update(path.suffix.lower() for inner in classes for path in inner.others)
    pictures: dict[str, list[Path]] = {}
    for inner in classes:
        # As a manifest's labels are read, in which nobody sees blanks at the end.
        name = unicodedata.normalize("NFC", inner.path.name).strip() or inner.path.name
        if name in pictures:
            raise DataError(
                f"{shown}: two class folders are both called {name!r}, spelled with other Unicode characters or blanks."
                " Move their pictures into one of them."
            )
        pictures[name] = list(inner.pictures)
    return pictures


def _refuse_wrapper(top: _Folder, shown: str) -> None:
    """An unpacked archive often is one folder around the real one: say so instead of guessing."""
    if top.pictures or len(top.folders) != 1:
        return
    inner = _list(top.folders[0])
    if not inner.pictures and len([p for p in inner.folders if find_pictures(p)]) > 1:
        raise DataError(
            f"{shown}: its only folder, {inner.path.name!r}, holds the folders of pictures. "
            f"Pass {Path(shown) / inner.path.name}."
        )


def _refuse(shown: str, what: str) -> DataError:
    root = Path(shown).name or shown
    return DataError(
        f"{shown}: {what}. Expected is one folder per class, the folder's name being the one label of its pictures: "
        f"{root}/cat/1.jpg and {root}/dog/2.jpg, or inside split folders {root}/train/cat/1.jpg and "
        f"{root}/val/cat/2.jpg. Sort the pictures so, or pass a table with columns path and label: {root}.csv. Several "
        "labels per picture (multi-label) are not supported."
    )


def _stray(here: _Folder, shown: str) -> DataError:
    return DataError(
        f"{shown}: {len(here.pictures):,} pictures beside the folders have no label "
        f"({_names(here.pictures)}). Move each into its class's folder, or away."
    )


def require_file(path: Path, shown: str) -> None:
    """Raise, with near matches, unless `path` is a file; `shown` is how the user wrote it."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"No file {shown}.{near_matches(path.name, siblings)}")


def _no_folder(root: Path, shown: str) -> DataError:
    if root.exists():
        return DataError(
            f"{shown} is a file; headstart reads a folder of class folders, an archive (.zip, .tar, .tar.gz, .tgz) or "
            "a manifest (.csv, .tsv, .parquet)."
        )
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    return DataError(f"No folder {shown}.{near_matches(root.name, siblings)}")


def _beside(top: _Folder) -> str:
    tables = [p for p in top.others if p.suffix.lower() in _TABLES]
    return f", beside {_names(tables)}: it looks like labels in a table" if tables else ""


def _names(paths: Iterable[Path | str]) -> str:
    names = [path.name if isinstance(path, Path) else path for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _extensions(paths: Iterable[Path]) -> str:
    counts = Counter(path.suffix.lower() or "no extension" for path in paths)
    return ", ".join(f"{n:,} x {extension}" for extension, n in counts.most_common(3))
