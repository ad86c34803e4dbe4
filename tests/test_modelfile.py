"""Model files of strangers: each of a corpus of malicious and broken ones is refused by name, and costs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_safetensors

from headstart import CheckpointError, create_classifier, load, save
from headstart.backbones import create_backbone
from headstart.modelfile import MAX_HEADER_BYTES, read_header
from headstart.weights import read_weights

BACKBONE = "test_resnet"
ZERO = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


class Boom:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ.get("HEADSTART_BOOM", "boom"),)


def st(header: Any, data: bytes = b"\0" * 4, *, length: int | None = None) -> bytes:
    """A safetensors file with this header (text, bytes, or what becomes JSON) and these bytes behind it."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": ZERO | changes}


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def torch_file(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def doubled_member() -> bytes:
    data = archive({"archive/data.pkl": b"one", "archive/data.pk2": pickle.dumps(Boom())})
    return data.replace(b"data.pk2", b"data.pkl")


def claimed_size() -> bytes:
    """An archive whose directory says that its member is 4 GB long."""
    data = archive({"archive/data.pkl": b"x" * 20})
    at = data.rindex(b"PK\x01\x02")
    return data[: at + 20] + struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0) + data[at + 28 :]


# Under the name of a safetensors file.
SAFETENSORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "0 bytes"),
    "seven bytes": (lambda: b"\1\0\0\0\0\0\0", "7 bytes"),
    "a pickle": (lambda: pickle.dumps(Boom()), "holds a pickle"),
    "an old pickle": (lambda: pickle.dumps(Boom(), protocol=0), "should have"),
    "a zip with a pickle": (lambda: torch_file({"a": Boom()}), "holds a zip archive"),
    "a pickle behind a length": (lambda: st(pickle.dumps(Boom())), "not JSON"),
    "a header beyond the file": (lambda: st(entry(), length=10_000), "header alone should have 10,000"),
    "the greatest length": (lambda: st(entry(), length=2**64 - 1), "header alone should have"),
    "a header of 100 MB": (lambda: st("{" + " " * (100 << 20) + "}"), f"up to {MAX_HEADER_BYTES:,}"),
    "no JSON": (lambda: st("{'a': 1}"), "not JSON"),
    "a list": (lambda: st("[1]"), "no JSON object"),
    "not UTF-8": (lambda: st(b'{"\xff": 1}'), "not JSON"),
    "deep nesting": (lambda: st('{"a":' * 200_000 + "1" + "}" * 200_000), "nested too deeply"),
    "deep lists": (lambda: st('{"a":' + "[" * 500_000 + "]" * 500_000 + "}"), "nested too deeply"),
    "a key twice": (lambda: st(f'{{"a":{json.dumps(ZERO)},"a":{json.dumps(ZERO)}}}'), "stands in it twice"),
    "a part twice": (lambda: st('{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]}}'), "twice"),
    "an unknown part": (lambda: st(entry(code="import os")), "and nothing else"),
    "a part missing": (lambda: st({"a": {"dtype": "F32", "shape": [1]}}), "and nothing else"),
    "an unknown type": (lambda: st(entry(dtype="OBJECT")), "of type 'OBJECT'"),
    "a type that is no word": (lambda: st(entry(dtype=["F32"])), "of type"),
    "a NaN in the shape": (lambda: st('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "NaN is no number"),
    "a negative side": (lambda: st(entry(shape=[-1, -1])), "has the shape"),
    "a side of 1.0": (lambda: st(entry(shape=[1.0])), "has the shape"),
    "a true side": (lambda: st(entry(shape=[True])), "has the shape"),
    "a side that overflows": (lambda: st(entry(shape=[2**32, 2**32])), "takes 73,786,976"),
    "a side without end": (lambda: st(entry(shape=[10**30])), "has the shape"),
    "digits without end": (lambda: st('{"a":{"dtype":"F32","shape":[' + "9" * 9_000 + "]}}"), "not JSON"),
    "a thousand dimensions": (lambda: st(entry(shape=[1] * 1000)), "has the shape"),
    "a shape larger than its bytes": (lambda: st(entry(shape=[1_000_000])), "takes 4,000,000 bytes"),
    "offsets beyond the file": (lambda: st(entry(shape=[1000], data_offsets=[0, 4000])), "there are 4"),
    "offsets back to front": (lambda: st(entry(data_offsets=[4, 0])), "offsets are 4 and 0"),
    "negative offsets": (lambda: st(entry(data_offsets=[-4, 0])), "has the offsets"),
    "overlapping tensors": (lambda: st({"a": ZERO, "b": ZERO}), "overlap"),
    "a gap": (lambda: st({"a": ZERO, "b": ZERO | {"data_offsets": [8, 12]}}, b"\0" * 12), "gap"),
    "bytes behind the last": (lambda: st(entry(), b"\0" * 4 + pickle.dumps(Boom())), "behind the header"),
    "bytes without a tensor": (lambda: st({}, b"\0" * 4), "behind the header"),
    "no name": (lambda: st({"": ZERO}), "has the name"),
    "a name with a NUL": (lambda: st({"a\0b": ZERO}), "has the name"),
    "a name without end": (lambda: st({"a" * 10_000: ZERO}), "has the name"),
}  # fmt: skip

# Under the name of a PyTorch file, which a user may ask for.
PYTORCH: dict[str, tuple[Callable[[], bytes], str]] = {
    "code in an archive": (lambda: torch_file({"a": Boom()}), "which is no tensor"),
    "code in the old form": (lambda: torch_file({"a": Boom()}, _use_new_zipfile_serialization=False), "refused"),
    "a bare pickle": (lambda: pickle.dumps(Boom()), "refused by"),
    "a whole module": (lambda: torch_file(torch.nn.Linear(2, 2)), "it holds torch.nn.modules.linear.Linear"),
    "a compressed archive": (lambda: archive({"archive/data.pkl": b"\0" * 10**7}, zipfile.ZIP_DEFLATED), "compressed"),
    "a member twice": (doubled_member, "members of the same name"),
    "a member above it": (lambda: archive({"../data.pkl": b"x"}), "lead out of it"),
    "a member of 4 GB": (claimed_size, "claim more than that"),
    "half an archive": (lambda: torch_file({"a": torch.zeros(1000)})[:2000], "damaged archive"),
    "a tensor from nothing": (lambda: torch_file({"a": torch.zeros(1).expand(2**20, 2**20)}), "not plain tensors"),
    "a sparse tensor": (lambda: torch_file({"a": torch.eye(3).to_sparse()}), "refused by | not plain tensors"),
    "a meta tensor": (lambda: torch_file({"a": torch.empty(2**30, device="meta")}), "not plain tensors"),
    "no tensors": (lambda: torch_file([1, 2, 3]), "no named tensors"),
}  # fmt: skip


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert str(path) in text
    assert any(part in text for part in message.split(" | ")), text  # PyTorch or we, whoever sees it first
    assert len(text) < 2000
    assert not re.search(
        "weights_only|torch.load|safe_globals|trusted source", text
    )  # how to run the code all the same


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = SAFETENSORS[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(make())
    refused(path, message)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]  # nothing was run


@pytest.mark.parametrize("case", PYTORCH)
def test_a_hostile_pytorch_file_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = PYTORCH[case]
    path = tmp_path / "weights.pth"
    path.write_bytes(make())
    refused(path, message)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


def test_pickles_do_run_code_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus is sharp: what is refused above makes a folder here."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Boom()))
    assert (tmp_path / "boom").is_dir()


# ---- run folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(create_classifier(BACKBONE, ("no", "yes"), weights="none"), tmp_path_factory.mktemp("run") / "run")


def changed(run: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the run whose model.json is changed."""
    folder.mkdir()
    card = json.loads((run / "model.json").read_bytes())
    change(card)
    (folder / "model.json").write_text(json.dumps(card))
    (folder / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    return folder


CARDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another program's path": (lambda c: c["backbone"].update(name="os.system"), "cannot be rebuilt"),
    "a path": (lambda c: c["backbone"].update(name="../../../etc/passwd"), "cannot be rebuilt"),
    "a hub address": (lambda c: c["backbone"].update(name="hf-hub:evil/model"), "cannot be rebuilt"),
    "a folder's address": (lambda c: c["backbone"].update(name="local-dir:/tmp"), "cannot be rebuilt"),
    "a name that is no word": (lambda c: c["backbone"].update(name=["test_resnet"]), "takes a name and args"),
    "weights in the args": (lambda c: c["backbone"]["args"].update(weights="/etc/passwd"), "takes a name and args"),
    "args of a wrong type": (lambda c: c["backbone"]["args"].update(drop_rate="1"), "wrong type: drop_rate"),
    "args that are none": (lambda c: c["backbone"].update(args=None), "takes a name and args"),
    "a larger network": (lambda c: c["backbone"].update(name="resnet18"), "do not fit the model"),
    "a head without end": (lambda c: c["head"].update(hidden=[{"units": 10**9}]), "model.json"),
    "a huge picture": (lambda c: c["preprocessing"].update(image_size=10**9), "image_size"),
    "names that are no words": (lambda c: c.update(class_names=[1, 2]), "takes a list of names"),
    "names in an object": (lambda c: c.update(class_names={"a": 1, "b": 2}), "takes a list of names"),
    "a width that is no number": (lambda c: c.update(num_features=True), "takes a whole number from 1"),
    "another width": (lambda c: c.update(num_features=10**12), "do not fit the model"),
    "one name": (lambda c: c.update(class_names=["a"]), "class_names"),
    "an unknown key": (lambda c: c.update(hook="import os"), "hook"),
    "another version": (lambda c: c.update(version=2), "format headstart-model, version 1"),
    "preprocessing of code": (lambda c: c.update(preprocessing="lambda x: x"), "DataSpec"),
}  # fmt: skip


@pytest.mark.parametrize("case", CARDS)
def test_a_hostile_model_description_is_refused(case: str, run: Path, tmp_path: Path) -> None:
    change, message = CARDS[case]
    folder = changed(run, tmp_path / "run", change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"format": "headstart-model", "format": "other"}', "stands in it twice"),
        ('{"version": Infinity}', "Infinity is no number"),
        ('{"a": "' + "x" * (5 << 20) + '"}', "up to 4,194,304 are read"),
        ("\ufeff{}", "not JSON"),
    ],
    ids=["deep", "twice", "infinite", "long", "marked"],
)
def test_model_json_is_read_strictly(text: str, message: str, run: Path, tmp_path: Path) -> None:
    folder = changed(run, tmp_path / "run", lambda card: None)
    (folder / "model.json").write_text(text, encoding="utf-8")
    for read in (load, lambda path: create_backbone(BACKBONE, weights=path)):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


@pytest.mark.slow
def test_nothing_is_allocated_for_a_description_that_the_file_does_not_match(run: Path, tmp_path: Path) -> None:
    """A network of 300 million parameters, described beside a file of some hundred kilobytes."""
    folder = changed(run, tmp_path / "run", lambda c: c["backbone"].update(name="vit_large_patch16_224"))
    code = f"""
import resource, headstart
from headstart import CheckpointError
headstart.create_classifier("{BACKBONE}", ("no", "yes"), weights="none")  # everything is imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    headstart.load({str(folder)!r})
except CheckpointError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000  # kB: timm's table of that network, not its 1.2 GB


def test_reading_a_file_takes_no_more_than_the_file(tmp_path: Path) -> None:
    rows = {f"n{i}": {"dtype": "F32", "shape": [0] * 16, "data_offsets": [0, 0]} for i in range(4_000)}
    path = tmp_path / "many.safetensors"
    for data in (st(rows, b""), st(entry(shape=[10**12])), st("{" + " " * (5 << 20) + "}")):
        path.write_bytes(data)
        size = len(data)
        del data
        tracemalloc.start()
        with suppress(CheckpointError):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * size + (16 << 20)  # a header is at most 4 MB, and Python's objects are larger than text


def test_good_files_of_each_type_are_read(tmp_path: Path) -> None:
    tensors = {str(t): torch.zeros(2, 3, dtype=t) for t in (torch.bool, torch.int8, torch.bfloat16, torch.float64)}
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(1.0)}
    path = tmp_path / "good.safetensors"
    path.write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
    header = read_header(path)
    assert {name: info.shape for name, info in header.items()} == {k: tuple(v.shape) for k, v in tensors.items()}
    assert read_weights(path).keys() == tensors.keys()


def test_the_real_weights_are_read(shared: Path) -> None:
    files = sorted((shared / "weights").glob("*.safetensors"))
    assert files
    assert all(len(read_header(path)) > 10 for path in files)
