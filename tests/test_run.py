"""The run folder: atomic writes, names and numbers that read back equal, and nothing removed that is not ours."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from headstart import run as run_room
from headstart.errors import CheckpointError
from headstart.files import check_target, read_csv, replacing, to_json, write_atomic
from headstart.recipe import Recipe
from headstart.run import Run, check_run_path, open_evaluation, open_run
from headstart.run_record import environment, is_run, read_history, read_run


def complete(run: Run, mark: str = "first") -> Run:
    """Write the files a small run leaves; `mark` tells runs apart."""
    run.write_json("recipe.json", {**Recipe().to_dict(), "name": mark})
    run.write_json("environment.json", environment())
    run.append_history({"stage": "head", "epoch": 0})
    run.write_json("metrics.json", {"mark": mark})
    return run


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_written_and_read_back(tmp_path: Path) -> None:
    run = complete(open_run(tmp_path / "runs" / "first"))
    assert run.finish() == tmp_path / "runs" / "first"
    record = read_run(run.path)
    assert Recipe.from_dict({**record.recipe, "name": "fine-tune"}) == Recipe()
    assert record.metrics == {"mark": "first"}
    assert record.history == [{"stage": "head", "epoch": 0}]
    assert record.environment["versions"]["numpy"] == np.__version__
    assert (record.model, record.predictions, record.splits) == ({}, [], [])


def test_json_of_odd_values(tmp_path: Path) -> None:
    run = open_run(tmp_path / "r")
    value = {
        "nan": math.nan,
        "inf": [math.inf],
        "np": np.float32(0.5),
        "n": np.int64(3),
        "a": np.array([1, 2]),
        7: (1,),
    }
    run.write_json("metrics.json", {**value, "flag": np.bool_(True), "path": Path("a/b"), "name": "Blüte \udcff"})
    assert json.loads((run.path / "metrics.json").read_text()) == {
        "nan": None, "inf": [None], "np": 0.5, "n": 3, "a": [1, 2], "7": [1], "flag": True, "path": "a/b",
        "name": "Blüte \udcff",
    }  # fmt: skip
    with pytest.raises(TypeError, match="object"):
        run.write_json("metrics.json", {"x": object()})
    assert "Blüte" in (run.write_json("model.json", {"name": "Blüte"})).read_text(encoding="utf-8")


def test_lists_of_numbers_stand_on_one_line_and_read_back_equal() -> None:
    value = {
        "matrix": [[1, -2], [3.5e-9, 4.0]], "none": [], "words": ["1", "[\n 1,\n 2\n]"], "mixed": [1, "a"],
        "gaps": [1, None, 2.5], "names": {"a": [7]},
    }  # fmt: skip
    text = to_json(value, indent=1).decode()
    assert json.loads(text) == value
    assert "[1, -2]" in text
    assert "[3.5e-09, 4.0]" in text
    assert '"a": [7]' in text
    assert "[1, null, 2.5]" in text
    assert re.sub(r"\s", "", text) == re.sub(r"\s", "", json.dumps(value))
    rest = {"a": {"b": [], "c": {}, "ü": [{"x": True}, None, "\n"]}, "d": [[]], "e": -0.0}
    for indent in (1, 2):
        assert to_json(rest, indent=indent).decode() == json.dumps(rest, indent=indent, ensure_ascii=False)
    assert to_json([np.float64(0.5), np.nan, np.int64(3)], indent=1) == b"[0.5, null, 3]"
    tracemalloc.start()
    confusion = to_json({"confusion": [[0] * 300] * 300}, indent=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(confusion) < 3.1 * 300 * 300
    assert peak < 10 * len(confusion)  # a piece for each number takes 26 times as much


@pytest.mark.parametrize(
    "name",
    ["plain.jpg", "a,b.jpg", 'say "cheese".jpg', "two\nlines.jpg", "return\rof.jpg", "both\r\n.jpg", "=1+1.jpg",
     "Blüte.jpg", "bytes\udcff.jpg", " spaced ", "'quoted'"],
)  # fmt: skip
def test_csv_reads_back_any_file_name(tmp_path: Path, name: str) -> None:
    run = open_run(tmp_path / "r")
    path = run.write_csv("splits.csv", ("path", "p:a,b"), [(name, 0.1), ("next.jpg", np.float64(1 / 3))])
    assert [(r["path"], float(r["p:a,b"])) for r in read_csv(path)] == [(name, 0.1), ("next.jpg", 1 / 3)]


def test_rows_of_a_csv_file_are_made_and_written_one_by_one(tmp_path: Path) -> None:
    written = []

    def rows() -> Iterator[list[str]]:
        for number in range(3):
            written.append(sum(path.stat().st_size for path in tmp_path.glob(".long.csv*")))
            yield [str(number), "x" * 100_000]

    Run(tmp_path, tmp_path).write_csv("long.csv", ["n", "text"], rows())
    assert written[2] > 100_000
    assert [len(row["text"]) for row in read_csv(tmp_path / "long.csv")] == [100_000] * 3


def test_predictions_keep_of_the_probabilities_their_own_label_s(tmp_path: Path) -> None:
    run = complete(open_run(tmp_path / "r"))
    header = ["path", "split", "label", "pred", "prob", "p:a", "p:b"]
    run.write_csv("predictions.csv", header, [["1.jpg", "val", "b", "a", "0.7", "0.7", "0.3"]])
    assert read_run(run.path).answers == [
        {"path": "1.jpg", "split": "val", "label": "b", "pred": "a", "prob": "0.7", "p:b": "0.3"}
    ]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_atomic(path, b"old")

    def interrupted(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(path)

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(run_room.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"Cannot write .*metrics\.json: no space.* Make room"):
        write_atomic(path, b"new")
    assert everything(tmp_path) == {"metrics.json": b"old"}


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    for folder in ("kept", "links"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kept" / "old.csv").write_bytes(b"old")
    for name in ("old.csv", "new.csv"):  # the second leads to nothing yet
        link = tmp_path / "links" / name
        link.symlink_to(f"../kept/{name}")
        write_atomic(link, b"1")
        assert link.is_symlink()
    assert everything(tmp_path / "kept") == {"new.csv": b"1", "old.csv": b"1"}
    nowhere = tmp_path / "links" / "nowhere"
    nowhere.symlink_to(tmp_path / "no" / "x")
    with pytest.raises(CheckpointError, match=rf"Cannot write {nowhere}: there is no folder {tmp_path / 'no'}\."):
        write_atomic(nowhere, b"1")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "link"])
def test_what_stdout_is_redirected_to_keeps_what_it_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    script = f"""
import sys
sys.path[:] = {sys.path!r}
from headstart.files import check_target, write_atomic
print("before")
check_target({name!r})
write_atomic({name!r}, b"content\\n")
print("after")
"""
    for mode in ("wb", "ab"):
        with (tmp_path / "out").open(mode) as out:
            subprocess.run([sys.executable, "-c", script], stdout=out, check=True, cwd=tmp_path)
    assert (tmp_path / "out").read_text() == "before\ncontent\nafter\n" * 2


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
@pytest.mark.parametrize("number", ["987", "9" * 20])
def test_a_descriptor_that_is_not_open_is_refused(number: str) -> None:
    with pytest.raises(CheckpointError, match="not open"):
        check_target(f"/dev/fd/{number}")


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_a_descriptor_that_is_only_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (tmp_path / "file").open() as file, pytest.raises(CheckpointError, match="not open for that"):
        check_target(f"/dev/fd/{file.fileno()}")


def test_the_folder_of_an_evaluation_is_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(CheckpointError, match="broken is no folder"):
        run_room.open_evaluation(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="Choose another with --out"):
        run_room.open_evaluation(tmp_path / ("x" * 300))
    assert not (tmp_path / "new").exists()
    assert run_room.open_evaluation(tmp_path / "new").path == tmp_path / "new"
    assert not (tmp_path / "new").exists()  # made when there is something to write


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # else opening it for writing waits for a reader
    try:
        for path in (pipe, link):
            write_atomic(path, [b"a", b"b"])
            assert os.read(reader, 10) == b"ab"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no open files by number on this system")
def test_an_open_file_by_its_number_is_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        write_atomic(f"/dev/fd/{writer}", b"1")
        assert os.read(reader, 10) == b"1"
    finally:
        os.close(reader)
        os.close(writer)


def may_not_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an account without permission; tests may run as root, whom modes do not stop."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and real(path, mode))


def test_a_folder_that_may_not_be_written_in_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "runs" / "earlier"
    complete(open_run(earlier))
    monkeypatch.chdir(tmp_path)
    may_not_write(tmp_path / "runs", monkeypatch)
    where = rf"no permission to write in {tmp_path / 'runs'}\. Name another"
    with pytest.raises(CheckpointError, match=rf"Cannot write runs/x\.csv: {where}"):
        check_target("runs/x.csv")
    for path, overwrite in (("runs/new", False), ("runs/deep/er", False), ("runs/earlier", True)):
        with pytest.raises(CheckpointError, match=rf"Run .*{path}: {where}"):
            check_run_path(path, overwrite=overwrite)
    with pytest.raises(CheckpointError, match=rf"runs/scores: {where}"), open_evaluation("runs/scores"):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'file'} is no folder\. Choose another"):
        check_run_path("file/run")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["earlier"]


def test_a_device_that_may_not_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    may_not_write(tmp_path / "pipe", monkeypatch)
    with pytest.raises(CheckpointError, match=r"pipe: no permission\."):
        check_target(tmp_path / "pipe")


def test_files_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(run_room.os, "fsync", lambda fd: (calls.append("sync"), sync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))[1])
    write_atomic(tmp_path / "x", b"1")
    assert calls == ["sync", "rename", "sync"]  # the file, its name, the folder


def test_others_may_read_the_files(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_atomic(tmp_path / "x", b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_history_lines_are_on_disk_at_once_and_a_torn_line_is_tolerated(tmp_path: Path) -> None:
    run = open_run(tmp_path / "r")
    path = run.path / "history.jsonl"
    run.append_history({"epoch": 0, "val": {"loss": np.float64("inf")}})
    run.append_history({"epoch": 1})
    assert read_history(path) == [{"epoch": 0, "val": {"loss": None}}, {"epoch": 1}]
    path.write_bytes(path.read_bytes() + b'{"epoch": 2, "va')
    assert [r["epoch"] for r in read_history(path)] == [0, 1]
    Run(run.path, run.path).append_history({"epoch": 2})
    assert [r["epoch"] for r in read_history(path)] == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-1])  # whole, but for its line end
    Run(run.path, run.path).append_history({"epoch": 3})
    assert [r["epoch"] for r in read_history(path)] == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    with pytest.raises(CheckpointError, match="line 2 of 3"):
        read_history(path)


def test_an_existing_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    complete(open_run(tmp_path / "r"))
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=r"earlier run.*--overwrite"):
        open_run(tmp_path / "r")
    assert everything(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    assert open_run(tmp_path / "r").path == tmp_path / "r"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    for path in (tmp_path / "r", tmp_path / "r" / "below"):
        with pytest.raises(CheckpointError, match="--out"):
            open_run(path, overwrite=True)


def test_overwriting_keeps_the_older_run_until_the_new_one_is_complete(tmp_path: Path) -> None:
    complete(open_run(tmp_path / "r"), "old")
    old = everything(tmp_path / "r")
    run = open_run(tmp_path / "r", overwrite=True)
    assert everything(tmp_path / "r") == old
    assert (run.path.parent, run.target) == (tmp_path, tmp_path / "r")
    complete(run, "new")
    assert everything(tmp_path / "r") == old  # a crash up to here leaves it as it was
    assert run.finish() == run.path == tmp_path / "r"
    assert read_run(tmp_path / "r").metrics == {"mark": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert run.finish() == tmp_path / "r"  # a second call changes nothing
    run.append_history({"stage": "head", "epoch": 1})
    assert len(read_run(tmp_path / "r").history) == 2


def test_overwriting_an_unfinished_run_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete(open_run(tmp_path / "r"), "old")
    crashed = open_run(tmp_path / "r", overwrite=True)
    complete(crashed, "crashed")
    (tmp_path / "r.new-notes").mkdir()
    assert not capsys.readouterr().err
    complete(open_run(tmp_path / "r", overwrite=True), "new").finish()
    told = capsys.readouterr().err
    assert f"{crashed.path} is left of a run that was to replace {tmp_path / 'r'}" in told
    assert "notes" not in told
    assert read_run(tmp_path / "r").metrics == {"mark": "new"}
    assert read_run(crashed.path).metrics == {"mark": "crashed"}


def test_a_swap_that_fails_keeps_both_runs_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(open_run(tmp_path / "r"), "old")
    run = complete(open_run(tmp_path / "r", overwrite=True), "new")

    def refuse(self: Path, to: Path) -> Path:
        raise OSError("device busy")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"device busy.*r\.new-1"):
        run.finish()
    assert read_run(tmp_path / "r").metrics == {"mark": "old"}
    assert read_run(run.path).metrics == {"mark": "new"}


def test_discard_leaves_the_older_run_or_nothing(tmp_path: Path) -> None:
    complete(open_run(tmp_path / "fresh")).discard()
    assert not (tmp_path / "fresh").exists()
    complete(open_run(tmp_path / "r"), "old")
    complete(open_run(tmp_path / "r", overwrite=True), "new").discard()
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert read_run(tmp_path / "r").metrics == {"mark": "old"}


@pytest.mark.parametrize(
    "recipe", [None, "{}", "[]", "not json", '{"stages": []}', '{"stages": [{"name": "lunch"}]}', '{"stages": ["x"]}']
)
def test_overwrite_never_removes_a_folder_that_is_no_run(tmp_path: Path, recipe: str | None) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "only copy.jpg").write_bytes(b"precious")
    if recipe is not None:
        (folder / "recipe.json").write_text(recipe)
    before = everything(tmp_path)
    assert not is_run(folder)
    with pytest.raises(CheckpointError, match="run folders only"):
        open_run(folder, overwrite=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.docx", "photos/cat.jpg"])
def test_overwrite_never_removes_other_files_beside_a_run(tmp_path: Path, name: str) -> None:
    """A recipe file of the user's own lies in their project folder, and `--out .` is one keystroke away."""
    complete(open_run(tmp_path / "r"))
    (tmp_path / "r" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "r" / name).write_bytes(b"precious")
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=name.split("/")[0]):
        open_run(tmp_path / "r", overwrite=True)
    assert everything(tmp_path) == before


def test_other_files_that_appear_while_training_are_not_removed_either(tmp_path: Path) -> None:
    complete(open_run(tmp_path / "r"), "old")
    run = complete(open_run(tmp_path / "r", overwrite=True), "new")
    (tmp_path / "r" / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        run.finish()
    assert (tmp_path / "r" / "notes.txt").read_text() == "precious"
    assert read_run(run.path).metrics == {"mark": "new"}


def test_what_a_file_browser_or_a_crash_left_does_not_stop_overwriting(tmp_path: Path) -> None:
    complete(open_run(tmp_path / "r"))
    for name in (".DS_Store", ".metrics.json.0123.tmp"):
        (tmp_path / "r" / name).write_bytes(b"")
    complete(open_run(tmp_path / "r", overwrite=True), "new").finish()
    assert not (tmp_path / "r" / ".DS_Store").exists()


def test_a_run_that_another_process_is_making_is_not_overwritten(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.write_json("recipe.json", Recipe().to_dict())
    run.write_environment()
    open_run(run.path, overwrite=True).discard()  # by the process that makes it, as in a notebook
    card = json.loads((run.path / "environment.json").read_text())
    newer = open_run(run.path, overwrite=True)
    newer.write_json("recipe.json", Recipe().to_dict())
    run.write_json("environment.json", card | {"process": card["process"] | {"pid": os.getppid(), "started": ""}})
    for refused in (
        lambda: open_run(run.path, overwrite=True),
        lambda: check_run_path(run.path, overwrite=True),
        newer.finish,
    ):
        with pytest.raises(CheckpointError, match=f"process {os.getppid()} has it in hand"):
            refused()
    run.write_json("metrics.json", {"val": {}})
    run.write_text("report.html", "")
    assert newer.finish() == run.path  # it has come to its end


def test_a_run_that_is_not_complete_is_offered_to_go_on_with(tmp_path: Path) -> None:
    run = complete(open_run(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"to replace it, or --resume to go on with it[.]$"):
        check_run_path(run.path)
    run.write_text("report.html", "")
    with pytest.raises(CheckpointError, match=r"or pass --overwrite to replace it[.]$"):
        check_run_path(run.path)


def test_a_link_to_a_run_stays_a_link(tmp_path: Path) -> None:
    complete(open_run(tmp_path / "real"), "old")
    (tmp_path / "latest").symlink_to("real")
    complete(open_run(tmp_path / "latest", overwrite=True), "new").finish()
    assert (tmp_path / "latest").is_symlink()
    assert read_run(tmp_path / "real").metrics == {"mark": "new"}


def test_relative_paths_survive_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run("r")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.write_text("report.html", "x")
    assert (tmp_path / "r" / "report.html").read_text() == "x"


def test_files_stay_in_the_run_folder(tmp_path: Path) -> None:
    run = open_run(tmp_path / "r")
    with pytest.raises(CheckpointError, match="plain file name"):
        run.write_text("../outside.txt", "x")


def test_reading_what_is_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no recipe\.json"):
        read_run(tmp_path / "empty")
    run = complete(open_run(tmp_path / "r"))
    for text in ("{", "[1]"):
        (run.path / "metrics.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"metrics\.json"):
            read_run(run.path)
