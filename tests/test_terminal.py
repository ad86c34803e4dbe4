"""Bars that are quiet when nobody watches, and tables whose columns stand under each other."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from headstart.terminal import (
    ProgressBar,
    closing_table,
    duration,
    figure,
    format_table,
    notes,
    per_class_table,
    predictions_table,
    printable,
    ranking,
    say,
    scores_table,
)

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
termios = pytest.importorskip("termios", reason="no pseudo-terminals on this system")

BAR = """
import time
from headstart.terminal import ProgressBar, say
with ProgressBar(40, "Reading", enabled={enabled}, keep={keep}) as bar:
    for _ in range(4):
        time.sleep(0.15)
        bar.note(val_loss="0.250")
        bar.advance(10)
    say("a line", enabled={enabled})
"""
SCORE: dict[str, Any] = {
    "n": 1234, "accuracy": 0.9, "accuracy_ci95": [0.88, 0.915], "top5": None, "log_loss": 0.3,
    "balanced_accuracy": 0.89, "majority_baseline": 0.4,
}  # fmt: skip


def shown_in_terminal(code: str) -> str:
    """What the code writes to stderr when that is a terminal; stdout must stay empty."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # Linux says so that the other side is closed
        pass
    os.close(ours)
    assert done.stdout == b""
    return text.decode()


def test_a_bar_shows_rate_and_time_left_on_a_terminal() -> None:
    text = shown_in_terminal(BAR.format(enabled=True, keep=True))
    assert "Reading:  50%" in text
    assert "img/s, val_loss=0.250]" in text
    assert "<00:00" in text
    assert "Reading: 100%" in text.splitlines()[-1]
    assert "\ra line\r\n" in text


def test_a_bar_makes_room_unless_it_is_kept() -> None:
    text = shown_in_terminal(BAR.format(enabled=True, keep=False))
    assert "Reading:  50%" in text
    assert text.rsplit("\r", 2)[-2].strip() == ""


def test_a_bar_is_quiet_when_told_to_be() -> None:
    assert shown_in_terminal(BAR.format(enabled=False, keep=True)) == ""


def test_a_bar_is_quiet_when_stderr_is_no_terminal() -> None:
    code = BAR.format(enabled=True, keep=True)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "a line\n")


def unread() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    """A file on a disk without room."""
    if not Path("/dev/full").exists():
        pytest.skip("no full disk to write to")
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("make", [unread, full_disk])
def test_what_cannot_be_shown_ends_no_work(make: Callable[[], int]) -> None:
    code = "import sys; sys.stderr.isatty = lambda: True\n" + BAR.format(enabled=True, keep=True)
    stderr = make()
    # Python itself would end with another code, since it tries once more to write what stderr holds.
    code += "print('done', flush=True); import os; os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, check=False)
    os.close(stderr)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class Flaky(io.StringIO):
    """Cannot be written to the first time."""

    calls = 0

    def write(self, text: str) -> int:
        self.calls += 1
        if self.calls == 1:
            raise OSError("no space left on device")
        return super().write(text)


@pytest.mark.parametrize("stream", [None, closed_stream(), Flaky()])
def test_without_a_stderr_it_is_quiet_from_then_on(stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    say("a line")
    with ProgressBar(3, "Reading") as bar:
        bar.advance(2)
        say("another")
    assert stream is None or stream.closed or stream.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    say("seen again")
    assert sys.stderr.getvalue() == "seen again\n"


def test_last_words_are_tried_whatever_failed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Flaky()
    monkeypatch.setattr(sys, "stderr", stream)
    say("lost")
    say("lost, too")
    say("error: what matters", last=True)
    assert stream.getvalue() == "error: what matters\n"


def test_a_stderr_that_is_full_for_the_moment_is_written_to_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Flaky):
        def write(self, text: str) -> int:
            try:
                return super().write(text)
            except OSError:
                raise BlockingIOError("full") from None

    stream = Full()
    monkeypatch.setattr(sys, "stderr", stream)
    say("a")
    say("b")
    assert stream.getvalue().endswith("b\n")


def test_a_line_is_said_above_the_bar_of_a_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with tqdm(total=10, desc="theirs", file=sys.stderr) as bar:
        say("HELLO")
        bar.update(1)
    assert "\rHELLO" in stream.getvalue()  # the bar's line is cleared first
    assert "]HELLO" not in stream.getvalue()


def test_a_word_that_stderr_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    say("a \u732b")
    say("and on")
    stream.seek(0)
    assert stream.read() == "a \\u732b\nand on\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (3.24, "3.2 s"),
        (9.97, "0:10"),
        (59.6, "1:00"),
        (760, "12:40"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figure() -> None:
    assert [figure(v) for v in (None, "x", 12345, 0.12345, 1.0)] == ["-", "x", "12,345", "0.123", "1.000"]


def test_columns_stand_under_each_other() -> None:
    text = format_table(["name", "n"], [["a", "1"], ["long name", "1,000"]])
    assert text.split("\n") == [
        "name           n",
        "----------------",
        "a              1",
        "long name  1,000",
    ]


def test_a_name_cannot_move_the_cursor_or_break_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = format_table(["class", "n"], [["dai\x1b[31msy\nrose", "1"], ["\x9b2J", "2"]])
    assert text.splitlines()[2:] == ["dai\\x1b[31msy\\nrose  1", "\\x9b2J               2"]
    say("file a\x1b]0;owned\x07.jpg\n\tand b")
    assert capsys.readouterr().err == "file a\\x1b]0;owned\\x07.jpg\n\tand b\n"
    assert notes(["of \x1b[2J", "b"]) == "\nnote    of \\x1b[2J\nnote    b\n"


def test_a_name_cannot_turn_what_stands_beside_it() -> None:
    turned = "cat\u202egpj.exe\u202c \u2066dog\u2069"
    assert printable(turned) == "cat\\u202egpj.exe\\u202c \\u2066dog\\u2069"
    assert printable("\u05d7\u05ea\u05d5\u05dc\u200f \u2065\u206a") == "\u05d7\u05ea\u05d5\u05dc\u200f \u2065\u206a"


def test_a_table_without_rows_is_its_header() -> None:
    assert format_table(["name", "n"], []).split("\n") == ["name  n", "-------"]
    assert "\x1b" not in format_table(["\x1b[31mclass", "n"], [])


def test_letters_of_two_columns_and_of_none_are_reckoned_with() -> None:
    lines = format_table(
        ["class", "n"], [["\u732b", "1"], ["e\u0301t\u00e9", "2"], ["\u304b\u3099", "3"], ["plain", "4"]]
    )
    assert lines.split("\n")[2:] == ["\u732b     1", "e\u0301t\u00e9    2", "\u304b\u3099     3", "plain  4"]


def test_top5_has_a_column_only_where_it_means_something() -> None:
    assert "top-5" not in scores_table({"val": SCORE})
    text = scores_table({"val": SCORE, "test": {**SCORE, "top5": 0.991}})
    assert "top-5" in text
    rows = text.split("\n")
    assert "0.915      -     0.300" in rows[2]
    assert "0.915  0.991     0.300" in rows[3]
    assert rows[2].startswith("val      1,234     0.900  0.880 - 0.915")


def test_closing_table_shows_what_there_is() -> None:
    stage = {
        "name": "head", "freeze_line": "last:3", "trainable_parameters": 7, "best_epoch": 0, "epochs": 3,
        "best_val_loss": 0.5, "best_val_accuracy": 0.75, "seconds": 61.0,
    }  # fmt: skip
    stages = closing_table({"stages": [stage], "val": {}, "test": None})
    assert stages.split("\n")[2:] == ["head   last:3             7      0 of 3     0.500         0.750  1:01"]
    both = closing_table({"stages": [stage], "val": SCORE, "test": SCORE})
    assert both.startswith(stages + "\n\n")
    assert [row.split()[0] for row in both.split("\n")[-2:]] == ["val", "test"]
    assert closing_table({"stages": []}) == ""


def test_per_class_table_ends_with_the_weighted_means() -> None:
    metrics = {
        "n": 30, "weighted_precision": 0.5, "weighted_recall": 0.6, "weighted_f1": 0.55,
        "per_class": [{"name": "cat", "n": 30, "precision": 0.5, "recall": None, "f1": 0.55}],
    }  # fmt: skip
    assert per_class_table(metrics).split("\n")[2:] == [
        "cat                  30      0.500       -  0.550",
        "weighted mean        30      0.500   0.600  0.550",
    ]


def test_predictions_are_ranked() -> None:
    row = {"path": "a.jpg", "pred": "dog", "prob": 0.7, "probs": {"cat": 0.1, "dog": 0.7, "eel": 0.2}}
    assert ranking(row, 2) == [("dog", 0.7), ("eel", 0.2)]
    assert len(ranking(row, 9)) == 3
    assert predictions_table([row], top=2).split("\n") == [
        "picture  1.   prob   2.   prob",
        "-------------------------------",
        "a.jpg    dog  0.700  eel  0.200",
    ]
