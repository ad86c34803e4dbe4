"""The command line on real pictures, from the folder to the prediction; stopped by hand; with broken files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import make_photos
from headstart.cli import main
from headstart.files import read_csv

NET = ["--backbone", "test_resnet.r160_in1k", "--weights", "none", "--image-size", "32", "--augment", "none"]
MACHINE = ["--device", "cpu", "--precision", "fp32", "--workers", "1"]
QUICK = [*NET, *MACHINE, "--epochs", "2,1", "--batch-size", "8", "--quiet"]
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of ten pictures; nothing in this module may change it."""
    return make_photos(tmp_path_factory.mktemp("data") / "photos", 10, CLASSES)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder written by `headstart fit`; nothing in this module may change it."""
    path = tmp_path_factory.mktemp("runs") / "first"
    assert main(["fit", str(folder), "--out", str(path), *QUICK]) == 0
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A JPEG file cut off in the middle."""
    path = tmp_path / "broken.jpg"
    data = (folder / "red" / "red0.jpg").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_fit_leaves_a_run_and_prints_its_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, "fit", folder, *QUICK, "--seed", "3", "--pool", "avg", "--hidden", "8:gelu")
    assert (code, err) == (0, "")
    path = Path("runs/photos-test_resnet.r160_in1k")
    lines = out.splitlines()
    assert lines[-2:] == [f"run     {path}", f"report  {path / 'report.html'}"]
    metrics = json.loads((path / "metrics.json").read_bytes())
    for name in ("val", "test"):
        (row,) = [line.split() for line in lines if line.startswith(name)]
        assert row[:3] == [name, str(metrics[name]["n"]), f"{metrics[name]['accuracy']:.3f}"]
    (row,) = [line.split() for line in lines if line.startswith("fine-tune")]
    assert row[2] == f"{metrics['stages'][1]['trainable_parameters']:,}"
    recipe = json.loads((path / "recipe.json").read_bytes())
    assert (recipe["seed"], recipe["head"]["pool"], recipe["head"]["hidden"][0]["width"]) == (3, "avg", 8)
    assert [(stage["epochs"], stage["batch_size"]) for stage in recipe["stages"]] == [(2, 8), (1, 8)]
    assert json.loads((path / "model.json").read_bytes())["preprocessing"]["image_size"] == 32


def test_fit_tells_on_stderr_what_it_does(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = [word for word in QUICK if word != "--quiet"]
    code, out, err = command(capsys, "fit", folder, *loud, "--recipe", "head", "--epochs", "1", "--out", tmp_path / "a")
    assert code == 0
    assert "Stage head:" in err
    assert "\r" not in err
    assert "Stage head:" not in out


def test_a_reader_of_stderr_that_goes_away_ends_no_fit(folder: Path, tmp_path: Path) -> None:
    loud = [word for word in QUICK if word != "--quiet"]
    path = tmp_path / "run"
    command = [sys.executable, "-m", "headstart.cli", "fit", folder, *loud, "--recipe", "head", "--out", path]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, "--epochs", "1"], stdout=subprocess.PIPE, stderr=writer, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0
    assert done.stdout.decode().splitlines()[-1] == f"report  {path / 'report.html'}"
    assert (path / "report.html").is_file()


def test_an_existing_run_is_kept_unless_told_otherwise(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    before = (again / "metrics.json").read_bytes()
    code, out, err = command(capsys, "fit", folder, "--out", again, *QUICK)
    assert (code, out) == (2, "")
    assert "--overwrite" in err
    assert (again / "metrics.json").read_bytes() == before
    code, _, _ = command(capsys, "fit", folder, "--out", again, *QUICK, "--seed", "7", "--overwrite")
    assert code == 0
    assert json.loads((again / "recipe.json").read_bytes())["seed"] == 7


def test_fit_names_a_broken_picture_before_training(
    folder: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = shutil.copytree(folder, tmp_path / "photos")
    shutil.copy(broken, photos / "green" / "cut.jpg")
    out = tmp_path / "run"
    code, _, err = command(capsys, "fit", photos, "--out", out, *QUICK)
    assert code == 2
    assert "green/cut.jpg" in err
    assert "--bad-files skip" in err
    assert not out.exists()
    loud = [option for option in QUICK if option != "--quiet"]
    code, _, err = command(capsys, "fit", photos, "--out", out, *loud, "--bad-files", "skip")
    assert code == 0
    assert "1 unreadable file is left out:\n  green/cut.jpg: damaged or cut off" in err
    assert "could not be read" not in err  # said once
    ((path, _),) = json.loads((out / "metrics.json").read_bytes())["data"]["bad_files"]
    assert path.endswith("green/cut.jpg")
    code, _, err = command(capsys, "evaluate", out, photos, *MACHINE, "--bad-files", "skip")
    assert code == 0
    assert "green/cut.jpg" in err


def test_without_network_a_broken_picture_is_named_before_the_weights(
    folder: Path,
    broken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    photos = shutil.copytree(folder, tmp_path / "photos")
    wanted = ["fit", photos, "--backbone", "test_resnet.r160_in1k", "--out", tmp_path / "run", *MACHINE]
    code, _, err = command(capsys, *wanted)
    assert code == 2
    assert "--weights FILE" in err
    shutil.copy(broken, photos / "green" / "cut.jpg")
    code, _, err = command(capsys, *wanted)
    assert code == 2
    assert "green/cut.jpg: damaged" in err
    assert "--weights" not in err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--backbone", "resnet81"], "resnet18"),
        (["--freeze-line", "head,layer9"], "layer9"),
        (["--weights", "missing.safetensors"], "missing.safetensors"),
        (["--device", "warp"], "warp"),
        (["--interpolation", "cubic"], "cubic"),
        (["--val", "1.5"], "1.5"),
    ],
)
def test_what_fit_cannot_do_is_one_message(
    changed: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "fit", folder, "--out", tmp_path / "run", *QUICK, *changed)
    assert (code, out) == (2, "")
    assert err.startswith("headstart fit: error: ")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_run_serves_as_weights(folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = command(
        capsys, "fit", folder, *QUICK, "--out", tmp_path / "next", "--weights", run, "--recipe", "head", "--epochs", "1"
    )
    assert code == 0
    from safetensors.numpy import load_file

    first, second = (load_file(path / "model.safetensors") for path in (run, tmp_path / "next"))
    backbone = [name for name in first if name.startswith("backbone")]
    assert backbone
    assert all(np.array_equal(first[name], second[name]) for name in backbone)


def test_evaluate_scores_every_picture(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "evaluate", run, folder, *MACHINE)
    assert code == 0
    assert out.splitlines()[-1].split()[:2] == ["photos", "30"]
    _, out, _ = command(capsys, "evaluate", run, folder, *MACHINE, "--json")
    metrics = json.loads(out)
    assert metrics["n"] == 30
    assert [row["name"] for row in metrics["per_class"]] == list(CLASSES)


def test_evaluate_writes_a_report_where_it_is_told_to(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "evaluate", run, folder, *MACHINE, "--out", tmp_path / "scored")
    assert code == 0
    assert out.splitlines()[-1] == f"report  {tmp_path / 'scored' / 'report.html'}"
    assert (tmp_path / "scored/report.html").is_file()
    code, _, err = command(capsys, "evaluate", run, folder, *MACHINE, "--out", tmp_path / "x", "--transforms")
    assert code == 2
    assert "--out goes with the figures" in err


def test_changes_are_tried_with_a_word_on_what_was_trained_on(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_csv(run / "splits.csv")
    met = sum(row["split"] != "test" for row in rows)
    code, out, err = command(capsys, "evaluate", run, folder, *MACHINE, "--transforms", "light", "--quiet")
    assert code == 0
    assert f"{met} of these {len(rows)} pictures were trained on or chose the model" in err
    assert "Unchanged pictures: accuracy" in out
    for name in ("model.json", "model.safetensors"):  # as `headstart.save` leaves it
        shutil.copy(run / name, tmp_path / name)
    code, _, err = command(capsys, "evaluate", tmp_path, folder, *MACHINE, "--transforms")
    assert code == 2
    assert f"{tmp_path} holds a model without its recipe" in err
    assert "--transforms with a policy (none, light" in err
    code, _, err = command(capsys, "evaluate", folder, folder, *MACHINE, "--transforms")
    assert code == 2
    assert "model.json" in err
    assert "recipe" not in err


def test_predict_says_what_training_said(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        saved = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert saved
    code, out, err = command(capsys, "predict", run, *(folder / row["path"] for row in saved), *MACHINE, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["path"] for row in rows] == [str(folder / row["path"]) for row in saved]
    for now, before in zip(rows, saved, strict=True):
        assert now["pred"] == before["pred"]
        assert now["probs"] == {name: float(before[f"p:{name}"]) for name in CLASSES}


@pytest.mark.skipif(sys.platform == "win32", reason="no such file names there")
def test_the_name_of_a_picture_that_cannot_be_read_does_not_move_the_cursor(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "a\x1b[2J\u202e.jpg"
    bad.write_bytes(b"")
    code, _, err = command(capsys, "predict", run, bad, *MACHINE)
    assert code == 2
    assert "a\\x1b[2J\\u202e.jpg cannot be read" in err


def test_predict_forms(folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = command(capsys, "predict", run, folder, *MACHINE, "--json", "--top", "2")
    ranked: list[dict[str, Any]] = json.loads(out)
    assert len(ranked) == 30
    assert [len(row["top"]) for row in ranked] == [2] * 30
    assert all(row["top"][0] == {"class": row["pred"], "prob": row["prob"]} for row in ranked)

    whole, short = tmp_path / "whole.csv", tmp_path / "short.csv"
    assert command(capsys, "predict", run, folder, *MACHINE, "--csv", whole) == (0, "", "")
    assert command(capsys, "predict", run, folder, *MACHINE, "--csv", "-") == (0, whole.read_text(), "")
    assert command(capsys, "predict", run, folder, *MACHINE, "--csv", short, "--top", "9") == (0, "", "")
    with whole.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "pred", "prob", "p:blue", "p:green", "p:red"]
    assert [row["path"] for row in rows] == [row["path"] for row in ranked]
    assert [float(row[f"p:{row['pred']}"]) for row in rows] == [row["prob"] for row in ranked]
    assert sum(float(rows[0][f"p:{name}"]) for name in CLASSES) == pytest.approx(1)
    with short.open(encoding="utf-8", newline="") as file:
        best = list(csv.DictReader(file))
    assert list(best[0]) == ["path", "pred", "prob", "pred_2", "prob_2", "pred_3", "prob_3"]
    assert [(row["pred"], row["pred_2"]) for row in best] == [tuple(t["class"] for t in row["top"]) for row in ranked]

    _, out, _ = command(capsys, "predict", run, folder / "red" / "red0.jpg", *MACHINE, "--top", "3")
    assert out.splitlines()[0].split() == ["picture", "1.", "prob", "2.", "prob", "3.", "prob"]
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{run}", "{folder}", "--csv", "{out}/x.csv"],
        ["evaluate", "{run}", "{folder}", "--out", "{out}"],
        ["fit", "{folder}", "--out", "{out}"],
        ["audit", "{folder}", "--out", "{out}"],
        ["audit", "{folder}", "--write-clean", "{out}/x.csv"],
    ],
)
def test_what_may_not_be_written_is_told_before_pictures_are_read(
    arguments: list[str],
    folder: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and may(path, mode))
    monkeypatch.setattr("headstart.crews.ask_all", lambda *_, **__: pytest.fail("a picture was read"))
    words = [word.format(folder=folder, run=run, out=tmp_path) for word in arguments]
    code, out, err = command(capsys, *words)
    assert (code, out) == (2, "")
    assert f"{words[-1]}: no permission to write in {tmp_path}. Name another" in err


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_json_can_be_read_in_any_encoding(
    encoding: str, folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    odd = [os.fsdecode(b"\xff.jpg")] if sys.platform == "linux" else []  # no valid text, which others refuse
    names = [photos / "red" / name for name in ("\u00e9.jpg", "\u732b.jpg", "\U0001f431.jpg", *odd)]
    for name in names:
        shutil.copy(folder / "red" / "red0.jpg", name)

    def printed(*arguments: str | Path) -> Any:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert main([str(argument) for argument in arguments]) == 0
            stream.flush()
        return json.loads(stream.buffer.getvalue().decode(encoding))

    assert [row["path"] for row in printed("predict", run, *names, *MACHINE, "--json")] == list(map(str, names))
    findings = json.dumps(printed("audit", photos, "--fast", "--json"), ensure_ascii=False)
    assert all(name.name in findings for name in names[:3])


def test_predict_names_what_cannot_be_read_and_does_the_others(
    folder: Path, run: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [folder / "red" / "red1.jpg", folder / "blue" / "blue1.jpg"]
    code, out, err = command(capsys, "predict", run, good[0], broken, good[1], *MACHINE, "--json")
    assert code == 2
    assert [row["path"] for row in json.loads(out)] == [str(path) for path in good]
    assert err.count("\n") == 1
    assert f"{broken} cannot be read: " in err
    code, _, again = command(capsys, "predict", run, good[0], broken, *MACHINE, "--bad-files", "skip")
    assert (code, again) == (0, err)
    assert command(capsys, "predict", run, broken, *MACHINE) == (2, "", err)
    for more, columns in ([], [f"p:{name}" for name in CLASSES]), (["--top", "2"], ["pred_2", "prob_2"]):
        header = ",".join(["path", "pred", "prob", *columns])
        assert command(capsys, "predict", run, broken, *MACHINE, "--csv", "-", *more) == (2, f"{header}\n", err)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["{folder}"], "model.json"),
        (["{run}", "--device", "warp"], "warp"),
        (["{run}", "--tta", "rotate"], "rotate"),
        (["{run}", "--workers", "-1"], "workers"),
    ],
)
def test_predict_reads_no_picture_for_a_call_that_is_wrong(
    wrong: list[str],
    message: str,
    folder: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headstart.crews.ask_all", lambda *_, **__: pytest.fail("a picture was read"))
    model, *options = [word.format(folder=folder, run=run) for word in wrong]
    code, out, err = command(capsys, "predict", model, folder, *MACHINE, *options)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{folder}", "{folder}"], "model.json"),
        (["predict", "{run}", "{folder}/redd"], "Did you mean: red?"),
        (["predict", "{run}", "{folder}", "--csv", "{folder}"], "it is a folder. Name a file in it."),
        (["preview", "{folder}", "--out", "no/folder.png"], "there is no folder no"),
        (["preview", "{folder}", "--seed", "-1"], "--seed is -1; it takes a whole number from 0"),
        (["compare", "{folder}", "--budget", "head=1", "--budget", "head=2"], "--budget of head is given twice"),
        (["predict", "{run}", "{folder}", "--csv", "no/folder.csv"], "there is no folder no"),
        (["evaluate", "{run}", "{run}"], "Expected is one folder per class"),
        (["evaluate", "{folder}", "{folder}"], "model.json"),
    ],
)
def test_wrong_runs_and_folders_are_one_message(
    arguments: list[str], message: str, folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(folder=folder, run=run) for word in arguments]
    machine = [] if words[0] == "preview" else MACHINE
    code, out, err = command(capsys, *words, *machine)
    assert (code, out) == (2, "")
    assert err.startswith(f"headstart {words[0]}: error: ")
    assert message in err


def test_summary_of_a_name_and_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(
        capsys,
        "summary",
        "test_resnet",
        "--image-size",
        "64",
        "--classes",
        "5",
        "--hidden",
        "8",
        "--freeze-line",
        "layer4",
    )
    assert code == 0
    lines = out.splitlines()
    (line,) = [n for n, text in enumerate(lines) if text.startswith("==== freeze line: layer4")]
    assert lines[line - 1].startswith("layer3")
    assert lines[line + 1].startswith("layer4")
    assert "3 x 64 x 64" in out
    metrics = json.loads((run / "metrics.json").read_bytes())
    trained, frozen = (metrics["stages"][1][f"{what}_parameters"] for what in ("trainable", "frozen"))
    assert frozen
    _, out, _ = command(capsys, "summary", run)
    assert out.splitlines()[-1].split()[:3] == ["total", f"{trained + frozen:,}", f"{trained:,}"]
    _, out, _ = command(capsys, "summary", run, "--freeze-line", "head")
    assert out.splitlines()[-1].split()[2] == f"{metrics['stages'][0]['trainable_parameters']:,}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_resne"], "test_resnet"),
        (["test_resnet", "--classes", "0"], "num_classes is 0; it takes a whole number from 2"),
        (["test_resnet", "--freeze-line", "layer9"], "layer9"),
        (["test_resnet", "--hidden", "8", "--pool", "avg"], "--hidden would change nothing, since without --classes"),
        (["{run}", "--classes", "3", "--output", "softmax"], "--output, --classes would change nothing, since a run"),
    ],
)
def test_what_summary_cannot_show_is_one_message(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "summary", *(word.format(run=run) for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("headstart summary: error: ")
    assert message in err


def test_an_audit_and_the_fits_after_it_share_decoded_pictures_and_features(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cleanlab")
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    photos = Path(shutil.copytree(folder, tmp_path / "photos"))
    for i in range(2):
        (photos / "red" / f"red{i}.jpg").rename(photos / "blue" / f"stray{i}.jpg")
    looked = ("audit", photos, *NET[:-2], *MACHINE, "--interpolation", "nearest", "--json")  # there is no augmentation

    def queue(*more: str) -> tuple[object, str]:
        code, out, err = command(capsys, *looked, *more)
        assert code == 0, err
        return json.loads(out)["doubtful"], err

    first, told = queue()
    assert "30 pictures to decode" in told
    again, told = queue()
    assert "Features stored earlier are used: 30 pictures" in told
    assert "to decode" not in told
    alone, told = queue("--no-cache")
    assert "stored earlier" not in told
    assert first == again == alone != []
    other, _ = queue("--crop-pct", "0.5")
    assert other != first
    loud = [word for word in QUICK if word != "--quiet"]
    code, _, err = command(capsys, "fit", photos, "--out", tmp_path / "run", *loud, "--interpolation", "nearest")
    assert code == 0
    assert "to decode" not in err


def test_what_a_fast_audit_would_not_use_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "audit", folder, "--fast", "--crop-pct", "0.5", "--device", "cpu", "--no-cache")
    assert code == 2
    assert "so --crop-pct, --device, --no-cache would change nothing" in err


@pytest.mark.parametrize("what", [("evaluate",), ("evaluate", "--transforms", "light"), ("predict",)])
def test_quiet_leaves_the_bars_out(
    run: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: tuple[str, ...],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work = (what[0], run, folder, *what[1:], *MACHINE)
    told = command(capsys, *work)[2]
    assert "Reading pictures:   0%|" in told
    assert told.count("0%|") > told.count("Reading pictures:   0%|")
    code, out, err = command(capsys, *work, "--quiet")
    assert code == 0
    assert "0%|" not in err
    assert out


def test_preview_writes_a_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", folder, "--backbone", "test_resnet", "--image-size", "32", "--fit", "squash"]
    sheets = []
    for name, extra in (("a.png", []), ("b.png", ["--seed", "5"]), ("c.png", ["--augment", "none"])):
        assert command(capsys, *words, "--out", tmp_path / name, *extra) == (0, f"{tmp_path / name}\n", "")
        with Image.open(tmp_path / name) as image:
            sheets.append(np.asarray(image.convert("RGB")))
    assert all(sheet.shape == sheets[0].shape for sheet in sheets)
    assert not np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])
    code, _, err = command(capsys, *words, "--out", tmp_path / "a.pnk")
    assert code == 2
    assert "png" in err


def test_preview_leaves_out_bad_files_where_it_may(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    classes = sorted(path for path in photos.iterdir() if path.is_dir())
    for path in list(classes[0].iterdir())[1:]:
        path.write_bytes(b"no picture")  # all but one: some are drawn
    words = ["preview", photos, "--backbone", "test_resnet", "--image-size", "32", "--out", tmp_path / "sheet.png"]
    code, _, err = command(capsys, *words)
    assert (code, (tmp_path / "sheet.png").exists()) == (2, False)
    code, out, err = command(capsys, *words, "--bad-files", "skip")
    assert (code, out) == (0, f"{tmp_path / 'sheet.png'}\n")
    assert "left out" in err


def wait_for(path: Path, text: bytes, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Until the file holds the text; a process that ends before that fails the test."""
    until = time.monotonic() + seconds
    while not (path.exists() and text in path.read_bytes()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_run_that_predicts(
    sent: signal.Signals, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stopped"
    words = [*QUICK, "--epochs", "1,5000", "--out", path]
    # A shell that starts tests in the background has Ctrl-C ignored, and children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import sys; from headstart.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "fit", folder, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for(path / "history.jsonl", b'"stage": "fine-tune", "epoch": 2', process)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert f"headstart predict {path}" in err
    metrics = json.loads((path / "metrics.json").read_bytes())
    assert metrics["interrupted"] is True
    assert not metrics.get("test")
    code, out, _ = command(capsys, "predict", path, folder / "red", *MACHINE)
    assert code == 0
    assert len(out.splitlines()) == 2 + 10
    code, _, _ = command(
        capsys,
        "fit",
        folder,
        *QUICK,
        "--weights",
        path,
        "--out",
        tmp_path / "next",
        "--recipe",
        "head",
        "--epochs",
        "1",
    )
    assert code == 0
