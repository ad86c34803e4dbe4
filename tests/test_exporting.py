"""An exported model says what the run says, from a file's bytes to its label, or is not written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from conftest import make_photos
from headstart import (
    CheckpointError,
    Classifier,
    DataError,
    DataSpec,
    ExportError,
    Recipe,
    RecipeError,
    SetupError,
    Stage,
    create_classifier,
    export,
    exporting,
    fine_tune,
    load,
    open_image,
    predict_files,
    read_run,
    save,
)
from headstart.cli import main
from headstart.decode import bad_reason
from headstart.portable import Exported, read_picture

SIZE = 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("pictures") / "photos", 12)


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    plan = Recipe(stages=(Stage(epochs=2, views=1),))
    out = photos.parent / "run"
    fine_tune(photos, out=out, recipe=plan, backbone="test_resnet", weights="none", spec_overrides={"image_size": SIZE})
    return out


@pytest.fixture(scope="module")
def onnx(run: Path) -> exporting.Export:
    return export(run)


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return exporting._made_pictures(tmp_path_factory.mktemp("awkward"))


class Own(nn.Module):
    """A backbone of the user's: features [N, 4]."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.way = way
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "parity":  # an answer for each number of pictures, which no one file holds
            x = x * 1.0 if x.shape[0] % 2 else x + 0.0
        features = self.conv(x).mean((2, 3))
        if self.way == "values" and float(features.sum()) > 1e9:
            return features * 2
        return features


def own(way: str = "") -> Classifier:
    return create_classifier(Own(way), ("a", "b"), data_spec=DataSpec(SIZE))


def test_the_file_says_what_the_run_says_of_files_of_every_kind(
    run: Path, onnx: exporting.Export, photos: Path, awkward: list[Path]
) -> None:
    files = [*awkward, *sorted(photos.rglob("*.jpg"))[:9]]
    said = predict_files(run, files)
    asked = Exported(onnx.file)
    probs = asked.probs(files)
    assert probs.dtype == np.float32
    assert asked.class_names == ["blue", "green", "red"]
    assert [asked.class_names[i] for i in probs.argmax(1)] == [one["pred"] for one in said]
    np.testing.assert_allclose(probs, [list(one["probs"].values()) for one in said], atol=1e-6)
    np.testing.assert_allclose(asked.probs([files[3].read_bytes()])[0], probs[3], atol=1e-6)  # alone, from bytes
    assert not onnx.one_at_a_time
    assert onnx.pictures == {"test": 6, "made": len(awkward)}
    assert onnx.same_label == 6 + len(awkward)
    assert onnx.recorded == 6
    assert onnx.probability < 1e-6
    one = asked.probs(str(files[0]))
    np.testing.assert_allclose(one, probs[:1], atol=1e-6)
    assert asked.probs([]).shape == (0, 3)


def test_the_file_says_nothing_of_this_machine(onnx: exporting.Export) -> None:
    data = onnx.file.read_bytes()
    assert b"headstart.json" in data
    for word in (str(Path(exporting.__file__).parent), str(Path(torch.__file__).parent), "stack_trace"):
        assert word.encode() not in data


def test_the_file_takes_pixels_and_gives_probabilities(run: Path, onnx: exporting.Export) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx.file, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type, taken.shape) == ("pixels", "tensor(uint8)", ["N", 3, SIZE, SIZE])
    assert {one.name: one.shape for one in session.get_outputs()} == {"probs": ["N", 3], "logits": ["N", 3]}
    pixels = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probs, logits = session.run(["probs", "logits"], {"pixels": pixels.numpy()})
    with torch.no_grad():
        wanted = load(run)(pixels)
    np.testing.assert_allclose(logits, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(probs, wanted.softmax(1).numpy(), atol=1e-6)
    told = json.loads((onnx.path / "export.json").read_text())
    assert told["preprocessing"]["image_size"] == SIZE
    assert told["agreement"]["pictures"] == dict(onnx.pictures)
    assert told["agreement"]["largest_difference"]["probability"] == onnx.probability


def test_the_script_beside_it_needs_nothing_of_headstart_or_torch(
    run: Path, onnx: exporting.Export, awkward: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.stdout.reconfigure(encoding='cp1252')\n"  # as where Windows writes into a file
        f"sys.argv = ['predict.py', *sys.argv[1:]]\n"
        f"try: runpy.run_path({str(onnx.path / 'predict.py')!r}, run_name='__main__')\n"
        "finally: print(sorted({'headstart', 'torch', 'timm'} & set(sys.modules)), file=sys.stderr)"
    )
    broken, bomb, named = tmp_path / "broken.jpg", tmp_path / "bomb.png", tmp_path / "\N{HOT DOG}.jpg"
    broken.write_bytes(awkward[0].read_bytes()[:200])
    Image.new("1", (14_000, 14_000)).save(bomb)
    named.write_bytes(awkward[0].read_bytes())
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, onnx.file, broken, bomb, *awkward, named],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "[]"
    assert "broken.jpg cannot be read: " in done.stderr
    assert "bomb.png cannot be read: Image size (196000000 pixels) exceeds limit" in done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows.pop()[0].endswith("\\U0001f32d.jpg")
    assert [row[0] for row in rows] == [str(path) for path in awkward]
    assert [row[1:] for row in rows] == [[o["pred"], f"{o['prob']:.4f}"] for o in predict_files(run, awkward)]


def test_the_script_s_lines_may_be_left_unread(onnx: exporting.Export, awkward: list[Path]) -> None:
    command = [sys.executable, onnx.path / "predict.py", onnx.file, *awkward[:2] * 4]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asked:
        assert asked.stdout
        assert asked.stderr
        asked.stdout.close()
        assert asked.stderr.read() == b""
    assert asked.returncode == 0


def test_what_is_no_picture_is_told_in_the_same_words(tmp_path: Path) -> None:
    for i, data in enumerate((b"", b"some text", b"<html>", b"\x89PNG\r\n", b"\0\0\0\x18ftypheic")):
        file = tmp_path / f"{i}.jpg"
        file.write_bytes(data)
        with pytest.raises(UnidentifiedImageError) as told:
            read_picture(file)
        assert str(told.value) == bad_reason(file)


def test_pictures_are_read_as_headstart_reads_them(awkward: list[Path]) -> None:
    for path in awkward:
        assert read_picture(path).tobytes() == open_image(path).tobytes(), path.name


def test_pytorch_s_own_form_says_the_same(run: Path, awkward: list[Path], tmp_path: Path) -> None:
    found = export(run, tmp_path / "out", format="pt2", pictures=awkward[:2])
    assert found.pictures == {"given": 2, "made": len(awkward)}
    assert sorted(path.name for path in found.path.iterdir()) == ["export.json", "model.pt2", "predict.py"]
    wanted = [list(one["probs"].values()) for one in predict_files(run, awkward)]
    np.testing.assert_allclose(Exported(found.file).probs(awkward), wanted, atol=1e-6)


def _raised(head: nn.Module) -> None:
    next(head.parameters())[0, 0] += 3


def _without_a_number(head: nn.Module) -> None:
    next(head.parameters())[0, 0] = float("nan")


def _in_another_order(head: nn.Module) -> None:
    for parameter in head.parameters():
        parameter.copy_(parameter.flip(0))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("change", [_raised, _without_a_number, _in_another_order])
def test_another_model_is_not_kept(
    format: str, change: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = own()
    with torch.no_grad():
        change(other.head)
    write = exporting._write
    monkeypatch.setattr(exporting, "_write", lambda model, *rest: write(other, *rest))
    with pytest.raises(ExportError, match=rf"model\.{format} is not the model: of .* it says .*, and the model"):
        export(own(), tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_other_preprocessing_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = own()
    other.spec = replace(other.spec, crop_pct=0.5)
    told = exporting._description(other, one_at_a_time=False)
    monkeypatch.setattr(exporting, "_description", lambda *_, **__: told)
    with pytest.raises(ExportError, match="is not the model"):
        export(own(), tmp_path / "out", format="pt2")
    assert list(tmp_path.iterdir()) == []


def test_one_picture_at_a_time_where_no_file_holds_any_number(awkward: list[Path], tmp_path: Path) -> None:
    model = own("parity")
    found = export(model, tmp_path / "out")
    assert found.one_at_a_time
    told = json.loads((found.path / "export.json").read_text())
    assert told["input"]["shape"] == [1, 3, SIZE, SIZE]
    assert told["outputs"]["probs"]["shape"] == [1, 2]
    wanted = [list(one["probs"].values()) for one in predict_files(model, awkward)]
    np.testing.assert_allclose(Exported(found.file).probs(awkward), wanted, atol=1e-6)


def test_a_network_that_cannot_be_written_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match=r"Own cannot be written as ONNX by torch .* It may be with --format pt2"):
        export(own("values"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_pictures_that_are_broken_or_gone_are_left_out(tmp_path: Path) -> None:
    gone = make_photos(tmp_path / "gone", 6)
    fine_tune(
        gone, out=tmp_path / "run", recipe=Recipe(stages=(Stage(epochs=1, views=1),)), backbone="test_resnet",
        weights="none", spec_overrides={"image_size": SIZE}, test=0.0,
    )  # fmt: skip
    record, names = read_run(tmp_path / "run"), ("blue", "green", "red")
    asked, told = exporting._own_pictures(record, gone, names)
    assert list(asked) == ["val"]
    assert list(told) == asked["val"]
    for path, row in told.items():
        line = next(line for line in record.predictions if (gone / line["path"]) == path)
        assert [float(line[f"p:{name}"]) for name in names] == row.tolist()
    first, *others = asked["val"]
    first.write_bytes(first.read_bytes()[:300])
    assert exporting._own_pictures(record, gone, names)[0] == {"val": others}
    for path in gone.rglob("*.jpg"):
        path.unlink()
    assert exporting._own_pictures(record, gone, names) == ({}, {})


def test_what_the_run_has_on_record_is_compared_too(run: Path, photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    card = json.loads((other / "model.json").read_text())
    card["preprocessing"]["std"] = [0.1, 0.1, 0.1]  # both sides would read it so
    (other / "model.json").write_text(json.dumps(card))
    with pytest.raises(ExportError, match=r"The run has .* on record for .*\.jpg, and its model says .* --pictures"):
        export(other, tmp_path / "out", format="pt2")
    assert not (tmp_path / "out").exists()
    found = export(other, tmp_path / "out", format="pt2", pictures=photos / "red")
    assert (found.pictures["given"], found.recorded) == (12, 0)


def test_a_folder_with_the_model_alone_is_written_beside_it(tmp_path: Path) -> None:
    model = create_classifier("test_resnet", ("a", "b"), weights="none", image_size=SIZE)
    found = export(save(model, tmp_path / "saved"), format="pt2")
    assert found.file == tmp_path / "saved-pt2" / "model.pt2"
    assert list(found.pictures) == ["made"]


def test_a_model_in_half_precision_is_written_in_single(tmp_path: Path) -> None:
    model = own().half()
    found = export(model, tmp_path / "out", format="pt2")
    assert found.probability < 1e-6
    assert next(model.parameters()).dtype is torch.float16


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = mock.Mock(side_effect=CheckpointError("No space left on device"))
    monkeypatch.setattr(exporting, "write_atomic", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(own(), tmp_path / "out", format="pt2")
    assert full.call_count == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_asked_for_is_told_before_the_work(
    run: Path, onnx: exporting.Export, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = onnx.file.read_bytes()
    with pytest.raises(RecipeError, match=r"format is 'onx'; it takes onnx or pt2\. Did you mean: onnx\?"):
        export(run, format="onx")
    with pytest.raises(RecipeError, match="has no folder to be written beside"):
        export(own())
    with pytest.raises(CheckpointError, match=r"holds an earlier export, .* or pass --overwrite"):
        export(run)
    (tmp_path / "mine.txt").write_text("of mine")
    make_photos(tmp_path / "of mine", 1)
    with pytest.raises(CheckpointError, match=r"holds mine\.txt"):
        export(run, tmp_path, overwrite=True)
    for where in (photos, photos / "red"):
        with pytest.raises(CheckpointError, match=r"lies in .*photos and would be taken for pictures"):
            export(run, where / "exported")
    with pytest.raises(CheckpointError, match=r"lies in .* and would be taken for pictures"):
        export(own(), tmp_path / "of mine" / "out", pictures=[tmp_path / "of mine"])
    monkeypatch.setattr(exporting, "MOST_BYTES", 100)
    with pytest.raises(ExportError, match=r"more than the .* that one ONNX file holds\. Take --format pt2"):
        export(own(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="No model in"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="No file or folder"):
        export(run, tmp_path / "out", pictures=tmp_path / "none.jpg")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(SetupError, match=r"ONNX needs onnxscript\. Install them: pip install 'headstart\[export\]'"):
        export(run, tmp_path / "out")
    assert onnx.file.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_was_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my model"
    assert main(["export", str(run), "--out", str(out), "--format", "pt2", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "agrees   on 6 test and 12 made pictures: 18 of 18 with the same label," in printed.out
    assert f"use      python '{out}/predict.py' '{out}/model.pt2' PHOTO..." in printed.out
    assert main(["export", str(run), "--out", str(out), "--format", "onx"]) == 2


@pytest.mark.parametrize(
    "backbone",
    [
        *("mobilenetv3_small_050", "test_efficientnet", "test_convnext", "test_nfnet", "test_byobnet", "test_mambaout"),
        *("test_vit_relpos", "test_maxvit", "xcit_nano_12_p16_224", "repvgg_a0", "hiera_tiny_224"),
    ],
)
def test_families_can_be_written(backbone: str, tmp_path: Path) -> None:
    size = 224 if backbone == "hiera_tiny_224" else 64  # it has one size alone
    model = create_classifier(backbone, ("a", "b"), weights="none", image_size=size)
    found = export(model, tmp_path / "out")
    assert not found.one_at_a_time
    assert found.probability < 1e-5
