"""Data sets by name, `hf:NAME` and `torchvision:NAME`, exported once as picture files into the cache folder."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from .errors import DataError, SetupError, near_matches
from .folders import SPLIT_FOLDERS
from .prepared import PictureWriter, hold, prepared_folder, prepared_path
from .terminal import ProgressBar, say

_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "category", "breed")


class _Set(NamedTuple):
    """How a class of torchvision.datasets says which split it is: the argument, and our split name -> its word.

    config: its one further argument, which stands behind the name. default: of that, where it has none itself.
    """

    argument: str
    splits: Mapping[str, object]
    config: str = ""
    default: str = ""


_TRAIN_OR_NOT = {"train": True, "test": False}
_WITH_VAL = {"train": "train", "val": "val", "test": "test"}
_WITHOUT_VAL = {"train": "train", "test": "test"}
TORCHVISION_SETS = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), _Set("train", _TRAIN_OR_NOT)),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN"), _Set("split", _WITHOUT_VAL)),
    **dict.fromkeys(("DTD", "Flowers102", "RenderedSST2"), _Set("split", _WITH_VAL)),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT"), _Set("", {"train": None})),
    "Country211": _Set("split", {"train": "train", "val": "valid", "test": "test"}),
    "EMNIST": _Set("train", _TRAIN_OR_NOT, "split", "balanced"),
    "FGVCAircraft": _Set("split", _WITH_VAL, "annotation_level"),
    "Imagenette": _Set("split", {"train": "train", "val": "val"}, "size"),
    "OxfordIIITPet": _Set("split", {"train": "trainval", "test": "test"}),
}


def is_named(text: str | Path) -> bool:
    """Whether this is the name of a data set, not a path."""
    return str(text).startswith(("hf:", "torchvision:"))


def export_named(name: str) -> Path:
    """The manifest of a data set by name, after its pictures were exported, once, into the cache folder.

    `hf:NAME[@REVISION][:CONFIG][?image=COLUMN&label=COLUMN]` comes through the package `datasets`; the columns are
    found in the schema where they are not named. `torchvision:NAME[:CONFIG]` is a class of `torchvision.datasets`.
    Pictures that the data set holds encoded are written byte for byte, others as PNG. CIFAR10 and CIFAR100 are
    pickles, which torchvision reads after it has compared their checksums with its own; nothing else here is one.

    Raises:
        DataError: no such name, configuration or column; several labels per picture.
        SetupError: no network and not in the cache; a package that is not installed.
    """
    kind, _, rest = name.partition(":")
    export = _export_hub if kind == "hf" else _export_torchvision

    def fill(folder: Path) -> None:
        writer = PictureWriter(folder)
        export(name, rest, writer)
        writer.finish()

    return prepared_folder(re.sub(r"[^\w.@=-]+", "-", name), fill) / PictureWriter.MANIFEST


# ---- Hugging Face ----------------------------------------------------------------------------------------------


def _export_hub(name: str, rest: str, writer: PictureWriter) -> None:
    address, _, query = rest.partition("?")
    repository, _, config = address.partition(":")
    repository, _, revision = repository.partition("@")
    wanted = dict(parse_qsl(query))
    if not repository or set(wanted) - {"image", "label"}:
        raise DataError(f"{name}: the form is hf:NAME[@REVISION][:CONFIG][?image=COLUMN&label=COLUMN].")
    parts = _load_hub(name, repository, config or None, revision or None)
    import datasets

    splits = _split_names(name, list(parts))
    features = next(iter(parts.values())).features
    image = wanted.get("image") or _image_column(name, features)
    label = wanted.get("label") or _label_column(name, features)
    for column in (image, label):
        if column not in features:
            raise DataError(f"{name}: no column {column!r}. Columns: {', '.join(features)}.")
    to_word = _to_word(name, label, features[label])
    unlabelled = 0
    with ProgressBar(sum(len(parts[own]) for own in splits), f"Exporting {name}", enabled=True) as bar:
        for own, split_name in splits.items():
            rows = parts[own].select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
            for row in rows:
                word = to_word(row[label])
                if word is None or row[image] is None:
                    unlabelled += 1
                else:
                    writer.add(_encoded(row[image]), word, split=split_name)
                bar.advance(1)
    say(f"{name}: {unlabelled:,} pictures without a label are left out.", enabled=unlabelled > 0)


def _load_hub(name: str, repository: str, config: str | None, revision: str | None) -> Mapping[str, Any]:
    """Split name -> data set; from the hub, or without network from what the hub's cache holds."""
    try:
        import datasets
    except ImportError:
        raise SetupError(
            f"{name} comes through the package datasets, which is not installed: pip install 'headstart[datasets]'."
        ) from None
    try:
        return _dictionary(datasets.load_dataset(repository, config, revision=revision))
    except datasets.exceptions.DatasetNotFoundError:
        raise DataError(f"{name}: the hub has no data set {repository!r} that you may read. Check the name.") from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name} cannot be loaded: {error}") from None
    except OSError as error:  # no network, or the hub does not answer
        snapshot = _snapshot(repository, revision)
        if snapshot is None:
            raise SetupError(
                f"{name} is not in the cache and cannot be downloaded: {error}. Run this once with network (without "
                "HF_HUB_OFFLINE), or copy the cache of a machine that has (HF_HOME) here. A folder, an archive or a "
                "manifest of the same pictures will do as well."
            ) from None
    try:
        return _dictionary(datasets.load_dataset(str(snapshot), config))
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: its copy in the hub's cache cannot be loaded: {error}") from None


def _dictionary(loaded: Any) -> Mapping[str, Any]:
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """The repository's files in the hub's cache, which `datasets` itself does not look for without network."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    names = [repository]
    if "/" not in repository:  # known by its short name, kept under its full one
        folders = Path(constants.HF_HUB_CACHE).glob(f"datasets--*--{repository}")
        names += [folder.name.removeprefix("datasets--").replace("--", "/") for folder in folders]
    for name in names:
        try:
            return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            continue
    return None


def _split_names(name: str, own: list[str]) -> dict[str, str]:
    """Its split names -> ours; one split by another name is all there is."""
    known = {word: SPLIT_FOLDERS[word.casefold()] for word in own if word.casefold() in SPLIT_FOLDERS}
    if not known and len(own) == 1:
        return {own[0]: "train"}
    if not known:
        raise DataError(f"{name}: its splits are {', '.join(own)}; none is called train, validation or test.")
    others = [word for word in own if word not in known]
    say(f"{name}: its splits {', '.join(others)} are left out.", enabled=bool(others))
    return known


def _image_column(name: str, features: Mapping[str, Any]) -> str:
    import datasets

    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        many = f"several columns of pictures ({', '.join(found)})" if found else "no column of pictures"
        raise DataError(f"{name} has {many}. Columns: {', '.join(features)}. Name one: '{name}?image=COLUMN'.")
    return found[0]


def _label_column(name: str, features: Mapping[str, Any]) -> str:
    import datasets

    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [column for column in _LABEL_NAMES if column in features]
    preferred = [column for column in named if column in classes]
    found = preferred[:1] or (classes if len(classes) == 1 else []) or ([] if classes else named[:1])
    if not found:
        raise DataError(
            f"{name}: which column is the label? Columns: {', '.join(features)}. Name it: '{name}?label=COLUMN'."
        )
    return found[0]


def _to_word(name: str, column: str, feature: Any) -> Callable[[Any], str | None]:
    """From a cell of the label column to the class name; None where there is no label."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return lambda cell: None if cell is None or cell < 0 else str(feature.int2str(cell))
    if not isinstance(feature, datasets.Value):
        raise DataError(
            f"{name}: column {column!r} holds {type(feature).__name__}, not one label per picture. Several labels per "
            f"picture (multi-label) are not supported; name another column: '{name}?label=COLUMN'."
        )
    return lambda cell: None if cell is None or str(cell) == "" else str(cell)


def _encoded(cell: Mapping[str, Any]) -> bytes:
    data: bytes | None = cell["bytes"]
    return Path(cell["path"]).read_bytes() if data is None else data


# ---- torchvision -----------------------------------------------------------------------------------------------


def _export_torchvision(name: str, rest: str, writer: PictureWriter) -> None:
    word, _, config = rest.partition(":")
    own = {known.casefold(): known for known in TORCHVISION_SETS}.get(word.casefold())
    if own is None:
        raise DataError(
            f"No torchvision set {word!r}. Known: {', '.join(sorted(TORCHVISION_SETS))}."
            f"{near_matches(word, tuple(TORCHVISION_SETS))}"
        )
    one = TORCHVISION_SETS[own]
    if config and not one.config:
        raise DataError(f"{name}: {own} has no configurations. Leave {config!r} out.")
    config = config or one.default
    for split_name, value in one.splits.items():
        arguments = ({one.argument: value} if one.argument else {}) | ({one.config: config} if config else {})
        pictures = _load_torchvision(name, own, arguments)
        with ProgressBar(len(pictures), f"Exporting {name} {split_name}", enabled=True) as bar:
            for picture, label in _labelled(pictures):
                writer.add(picture, label, split=split_name)
                bar.advance(1)


def _load_torchvision(name: str, own: str, arguments: Mapping[str, object]) -> Any:
    from torchvision import datasets

    home = prepared_path(own).parent / "torchvision"
    home.mkdir(parents=True, exist_ok=True)
    hold(home)
    make = getattr(datasets, own)
    loader = {"loader": str} if "loader" in inspect.signature(make).parameters else {}  # the path, not the pixels
    try:
        return make(str(home), download=True, **loader, **arguments)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None
    except (OSError, RuntimeError) as error:
        raise SetupError(
            f"{name} is not in {home} and cannot be downloaded: {error}. Run this once with network, or put its files "
            "there as torchvision lays them out."
        ) from None


def _labelled(pictures: Any) -> Iterator[tuple[Any, str]]:
    """(encoded bytes or a decoded picture, class name) of each."""
    classes = [word[0] if isinstance(word, tuple) else str(word) for word in _classes(pictures)]
    for i in range(len(pictures)):
        picture, label = pictures[i]
        if isinstance(picture, (str, os.PathLike)):
            picture = Path(picture).read_bytes()
        yield picture, classes[label] if classes else str(label)


def _classes(pictures: Any) -> list[Any]:
    return list(getattr(pictures, "classes", None) or getattr(pictures, "categories", None) or ())
