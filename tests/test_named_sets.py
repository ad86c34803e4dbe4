"""Data sets by name, from a hub cache and from torchvision's files laid out as the real ones are, without network."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headstart.dataset import load_images
from headstart.errors import DataError, SetupError
from headstart.named_sets import TORCHVISION_SETS
from headstart.prepared import prepared_path
from headstart.sources import source_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def encoded(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- the hub's cache


def put_in_hub(home: Path, repository: str, files: dict[str, bytes]) -> None:
    """A data set in the hub's cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    folder = home / "hub" / f"datasets--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    for number, (name, data) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        link = folder / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def parquet_of(columns: dict[str, Any], features: dict[str, Any]) -> bytes:
    """A Parquet file with the schema of `datasets` in its header, as the hub's own conversion writes it."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    kinds = {column: image for column, feature in features.items() if feature == IMAGE}
    table = pa.table({column: pa.array(cells, kinds.get(column)) for column, cells in columns.items()})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


IMAGE = {"_type": "Image"}
CLASSES = {"names": ["airplane", "T-shirt/top", "dog"], "_type": "ClassLabel"}
COARSE = {"names": ["thing", "animal"], "_type": "ClassLabel"}


def rows(labels: Sequence[int], start: int = 0, kind: str = "PNG") -> dict[str, Any]:
    pictures = [{"bytes": encoded(start + i, kind), "path": None} for i in range(len(labels))]
    return {"img": pictures, "label": list(labels)}


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A HF_HOME of this test's own."""
    return tmp_path / "huggingface"


Load = Callable[..., dict[str, Any]]


@pytest.fixture
def load(hub: Path, tmp_path: Path) -> Load:
    """`load_images(name)` in a process of its own, since the hub's libraries read the environment once."""
    pytest.importorskip("datasets")
    code = """
import json, sys
from headstart import load_images, DataError, SetupError
try:
    table = load_images(sys.argv[1])
    print(json.dumps({"classes": table.class_names, "labels": table.labels.tolist(), "splits": table.split_names,
                      "paths": [str(path) for path in table.paths]}))
except (DataError, SetupError) as error:
    print(json.dumps({"error": type(error).__name__ + ": " + str(error)}))
"""

    def run(name: str) -> dict[str, Any]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "HEADSTART_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout), stderr=done.stderr)

    return run


def test_a_parquet_set_of_the_hub_by_nothing_but_its_name(hub: Path, load: Load) -> None:
    features = {"img": IMAGE, "label": CLASSES}
    files = {
        "plain_text/train-00000-of-00001.parquet": parquet_of(rows([0, 1, 2, 0, 1, 2], kind="JPEG"), features),
        "plain_text/test-00000-of-00001.parquet": parquet_of(rows([2, -1, 0], 50), features),
    }
    put_in_hub(hub, "uoft-cs/cifar10", files)
    found = load("hf:cifar10")
    assert found["classes"] == ["airplane", "dog", "T-shirt/top"]
    assert found["labels"] == [0, 0, 1, 1, 2, 2, 0, 1]
    assert found["splits"] == ["train"] * 6 + ["test"] * 2
    assert "1 pictures without a label are left out" in found["stderr"]
    first = Path(found["paths"][0])
    assert first.suffix == ".jpg"
    assert first.read_bytes() == encoded(0, "JPEG"), "byte for byte"
    stamps = [Path(path).stat().st_mtime_ns for path in found["paths"]]
    again = load("hf:cifar10")
    assert again["paths"] == found["paths"]
    assert [Path(path).stat().st_mtime_ns for path in again["paths"]] == stamps, "exported once"


@pytest.mark.slow
def test_a_folder_of_pictures_on_the_hub(hub: Path, load: Load) -> None:
    files = {
        f"data/{split}/{name}/{i}.png": encoded(i) for split in ("train", "validation") for name in "ab" for i in (1, 2)
    }
    put_in_hub(hub, "someone/letters", files)
    found = load("hf:someone/letters")
    assert found["classes"] == ["a", "b"]
    assert found["splits"] == ["train"] * 4 + ["val"] * 4


@pytest.mark.slow
def test_columns_are_found_or_named(hub: Path, load: Load) -> None:
    features = {
        "img": IMAGE,
        "fine_label": CLASSES,
        "coarse_label": COARSE,
        "tags": {"feature": CLASSES, "_type": "List"},
    }
    columns = rows([0, 1, 2])
    columns["fine_label"] = columns.pop("label")
    columns |= {"coarse_label": [0, 0, 1], "tags": [[0, 1], [1], [2]]}
    put_in_hub(hub, "uoft-cs/cifar100", {"train.parquet": parquet_of(columns, features)})
    assert load("hf:uoft-cs/cifar100")["classes"] == ["airplane", "dog", "T-shirt/top"]
    assert load("hf:uoft-cs/cifar100?label=coarse_label")["classes"] == ["animal", "thing"]
    assert "multi-label" in load("hf:uoft-cs/cifar100?label=tags")["error"]
    assert "no column 'labl'. Columns: img" in load("hf:uoft-cs/cifar100?label=labl")["error"]


def test_what_is_not_there_is_one_clear_error(load: Load, tmp_path: Path) -> None:
    error = load("hf:nobody/nothing")["error"]
    assert error.startswith("SetupError: hf:nobody/nothing is not in the cache and cannot be downloaded")
    assert "HF_HUB_OFFLINE" in error
    assert "\n" not in error
    assert "the form is hf:NAME" in load("hf:")["error"]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith((".", "hf"))]


@pytest.mark.slow
def test_a_set_without_pictures_or_without_a_label_column(hub: Path, load: Load) -> None:
    text = {"dtype": "string", "_type": "Value"}
    put_in_hub(
        hub, "a/words", {"train.parquet": parquet_of({"text": ["x"], "label": ["y"]}, {"text": text, "label": text})}
    )
    assert "no column of pictures. Columns: text, label" in load("hf:a/words")["error"]
    columns = {"image": rows([0, 0])["img"], "name": ["x", "y"], "kind": ["u", "v"]}
    put_in_hub(hub, "a/unclear", {"train.parquet": parquet_of(columns, {"image": IMAGE, "name": text, "kind": text})})
    assert "which column is the label? Columns: image, name, kind" in load("hf:a/unclear")["error"]
    assert load("hf:a/unclear?label=kind")["classes"] == ["u", "v"]


# --------------------------------------------------------------------------------------------------------- torchvision


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision's files are looked for; nothing listens where it would download from."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    return prepared_path("x").parent / "torchvision"


def put_idx(folder: Path, name: str, array: np.ndarray[Any, Any]) -> None:
    """A file of the MNIST family, packed and unpacked as torchvision leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    (folder / name).write_bytes(data)
    (folder / f"{name}.gz").write_bytes(gzip.compress(data))


def test_fashion_mnist(home: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 28, 28)).astype(np.uint8)
    for word in ("train", "t10k"):
        put_idx(home / "FashionMNIST" / "raw", f"{word}-images-idx3-ubyte", pixels)
        put_idx(home / "FashionMNIST" / "raw", f"{word}-labels-idx1-ubyte", np.array([0, 9, 3, 3, 0, 9], np.uint8))
    table = load_images("torchvision:FashionMNIST")
    assert table.class_names == ("Ankle boot", "Dress", "T-shirt/top")
    assert table.split_names == ("train",) * 6 + ("test",) * 6
    ankle = [path for path, label in zip(table.paths, table.labels, strict=True) if label == 0]
    assert np.array_equal(np.asarray(Image.open(ankle[0])), pixels[1]), "lossless"


def test_eurosat_byte_for_byte(home: Path) -> None:
    for i, name in enumerate(("AnnualCrop", "Forest")):
        (home / "eurosat" / "2750" / name).mkdir(parents=True)
        (home / "eurosat" / "2750" / name / f"{name}_1.jpg").write_bytes(encoded(i, "JPEG"))
    table = load_images("torchvision:eurosat")
    assert table.class_names == ("AnnualCrop", "Forest")
    assert [path.read_bytes() for path in table.paths] == [encoded(0, "JPEG"), encoded(1, "JPEG")]


def test_gtsrb_whose_format_is_not_read_here_becomes_png(home: Path) -> None:
    base = home / "gtsrb"
    for i in range(2):
        folder = base / "GTSRB" / "Training" / f"{i:05d}"
        folder.mkdir(parents=True)
        (folder / "00000_00000.ppm").write_bytes(encoded(i, "PPM"))
    images = base / "GTSRB" / "Final_Test" / "Images"
    images.mkdir(parents=True)
    (images / "00000.ppm").write_bytes(encoded(9, "PPM"))
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;1\n")
    table = load_images("torchvision:GTSRB")
    assert table.class_names == ("0", "1")
    assert [path.suffix for path in table.paths] == [".png"] * 3
    assert np.asarray(Image.open(table.paths[2]))[0, 0].tolist() == [9, 0, 0]


def test_a_set_that_is_not_there_and_one_that_is_not_known(home: Path) -> None:
    with pytest.raises(SetupError, match=r"torchvision:MNIST is not in .* and cannot be downloaded"):
        load_images("torchvision:MNIST")
    with pytest.raises(DataError, match=r"No torchvision set 'CIFAR11'.*Did you mean: CIFAR1"):
        load_images("torchvision:CIFAR11")
    with pytest.raises(DataError, match="MNIST has no configurations"):
        load_images("torchvision:MNIST:letters")
    with pytest.raises(DataError, match="has no meaning there"):
        load_images("torchvision:EuroSAT", root=home)
    assert not prepared_path("torchvision-MNIST").exists()


def test_the_known_sets_take_the_arguments_they_are_called_with() -> None:
    import inspect

    from torchvision import datasets

    for name, one in TORCHVISION_SETS.items():
        parameters = inspect.signature(getattr(datasets, name)).parameters
        variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for argument in ("download", one.argument, one.config):
            assert not argument or argument in parameters or variadic, f"{name}({argument}=)"


def test_a_run_is_named_after_the_set() -> None:
    assert source_name("hf:uoft-cs/cifar10:plain?label=x") == "hf-uoft-cs-cifar10-plain-label-x"
    assert source_name("torchvision:CIFAR10") == "torchvision-CIFAR10"
