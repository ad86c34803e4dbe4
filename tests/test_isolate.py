"""Decoding in limited processes: whatever a file does to its worker costs that file, by name, and nothing else."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from headstart import SetupError, decode, intake, load_images
from headstart.crews import bad_reasons
from headstart.dataspec import DataSpec
from headstart.isolate import Limits, Struck

posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and named pipes")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; memory limits are kept on Linux alone")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(path)
    return paths


def slow_picture(path: Path, side: int = 6000) -> Path:
    """Some kilobytes that take tenths of a second, and 3 bytes per pixel, to decode."""
    Image.new("1", (side, side)).save(path)
    return path


def children() -> set[int]:
    """Process ids of this process's children."""
    return {child.pid for child in psutil.Process().children()}


@contextmanager
def killing(kind: signal.Signals, times: int) -> Iterator[list[int]]:
    """Send a signal to the worker `times` times, each time when it is in the middle of a file."""
    before, killed, stop = children(), list[int](), threading.Event()
    ours = psutil.Process().cmdline()  # a child has it too, and our memory, until it becomes the worker

    def run() -> None:
        while not stop.is_set() and len(killed) < times:
            for pid in children() - before - set(killed):
                with suppress(psutil.NoSuchProcess):  # it ended while we looked
                    worker = psutil.Process(pid)
                    if worker.cmdline() != ours and worker.memory_info().rss > 150 << 20:  # only the large picture
                        worker.send_signal(kind)
                        killed.append(pid)
            time.sleep(0.005)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def test_the_reasons_are_those_of_the_decoder(pictures: list[Path]) -> None:
    pictures[3].write_bytes(pictures[3].read_bytes()[:-30])
    pictures[7].write_bytes(b"")
    pictures[9] = pictures[9].with_name("no-such.png")
    calls: list[tuple[int, int]] = []
    reasons = bad_reasons(pictures, workers=2, progress=lambda *at: calls.append(at))
    assert reasons == [decode.bad_reason(path) for path in pictures]
    assert [i for i, reason in enumerate(reasons) if reason] == [3, 7, 9]
    assert not any(isinstance(reason, Struck) for reason in reasons)
    assert calls[-1] == (40, 40)
    assert bad_reasons([], workers=2) == []


def test_it_always_comes_to_an_end(pictures: list[Path]) -> None:
    for _ in range(5):  # whichever thread happens to be the first to stop
        assert bad_reasons(pictures, workers=3) == [None] * 40


def test_a_file_that_takes_too_long_is_named_and_the_others_are_not(pictures: list[Path], tmp_path: Path) -> None:
    pictures.insert(5, slow_picture(tmp_path / "slow.png", side=8000))
    for limits, reason in (
        (Limits(seconds=0.05), "its decoding takes more than 0.05 seconds"),
        (Limits(wait_seconds=0.02), "its decoding was not done after 0.02 seconds"),
    ):
        reasons = bad_reasons(pictures, workers=1, limits=limits)
        assert reasons[5] == reason
        if limits.seconds < 1:  # by the clock a busy machine makes any file late
            assert reasons[:5] + reasons[6:] == [None] * 40


@linux_only
def test_a_file_that_needs_too_much_memory_is_named(pictures: list[Path], tmp_path: Path) -> None:
    pictures.insert(5, slow_picture(tmp_path / "large.png"))
    reasons = bad_reasons(pictures, workers=1, limits=Limits(memory_bytes=100 << 20))
    assert reasons[5] == "its decoding needs more than 100 MB of memory"
    assert isinstance(reasons[5], Struck)
    assert reasons[:5] + reasons[6:] == [None] * 40


@linux_only
def test_one_death_is_tried_again_two_are_the_files(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 13_000**2)  # so large that it is caught in the middle
    pictures.insert(5, slow_picture(tmp_path / "slow.png", side=13_000))
    with killing(signal.SIGKILL, times=1) as killed:
        assert bad_reasons(pictures, workers=1) == [None] * 41
    assert len(killed) == 1
    with killing(signal.SIGSEGV, times=2) as killed:
        reasons = bad_reasons(pictures, workers=1)
    assert len(killed) == 2
    assert reasons[5] == "it crashes the decoder (SIGSEGV)"
    assert isinstance(reasons[5], Struck)
    assert reasons[:5] + reasons[6:] == [None] * 40


@linux_only
def test_no_worker_is_left_behind(pictures: list[Path]) -> None:
    before = children()
    bad_reasons(pictures, workers=2)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bad_reasons(pictures, workers=2, progress=stop)
    assert children() == before


@posix_only
def test_a_pipe_or_a_device_is_no_picture(photos: Path) -> None:
    os.mkfifo(photos / "red" / "pipe.jpg")
    (photos / "red" / "zero.jpg").symlink_to("/dev/zero")
    table = load_images(photos, bad_files="skip")
    assert {path.name: reason for path, reason in table.bad_files} == {
        "pipe.jpg": "not a regular file",
        "zero.jpg": "not a regular file",
    }
    assert len(table) == 36


def test_a_module_in_the_working_folder_is_not_imported(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures[0].parent
    for name in ("json", "PIL", "signal", "numpy", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    monkeypatch.chdir(folder)
    assert bad_reasons([Path("0.png")], workers=1) == [None]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("way", ["script", "standard input"])
def test_scripts_need_no_main_guard(photos: Path, tmp_path: Path, way: str) -> None:
    code = f"import headstart\nprint('once', len(headstart.load_images({str(photos)!r})))\n"
    script = tmp_path / "script.py"
    script.write_text(code)
    arguments = {"script": [str(script)], "standard input": ["-"]}[way]
    done = subprocess.run([sys.executable, *arguments], input=code, capture_output=True, text=True, check=True)
    assert done.stdout == "once 36\n"


def test_where_no_process_starts_the_error_says_so(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(pictures[0]))
    with pytest.raises(SetupError, match="No process for decoding pictures can be started"):
        bad_reasons(pictures, workers=2)
    monkeypatch.setattr(sys, "executable", "/bin/false" if Path("/bin/false").exists() else "false")
    with pytest.raises(SetupError, match="did not start"):
        bad_reasons(pictures, workers=2)


def test_the_caps_of_this_process_hold_in_the_workers(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 63)
    assert "its header promises more than 63 pixels" in str(bad_reasons(pictures[:1], workers=1)[0])
    monkeypatch.undo()
    monkeypatch.setattr(decode, "MAX_BYTES", 20)
    assert "pictures of up to 20 are read" in str(bad_reasons(pictures[:1], workers=1)[0])


def test_the_pixel_cap_can_be_set_from_outside() -> None:
    code = "from headstart import decode; print(decode.MAX_PIXELS)"
    for value, expected in (("1000", "1000"), ("999999999", "it takes a whole number of pixels up to 178,956,970")):
        env = {**os.environ, decode.PIXELS_VARIABLE: value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert expected in done.stdout + done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_worker_keeps_the_memory_of_one_picture_for_the_next(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "picture.jpg"
    Image.fromarray(np.zeros((375, 500, 3), dtype=np.uint8)).save(path)

    def faults(number: int) -> int:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        parts, spec = ("view", "working"), DataSpec(image_size=224)
        assert intake.make([path] * number, parts, spec, workers=1, take=lambda *_: None) == [None] * number
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before

    assert (faults(48) - faults(8)) / 40 < 50  # without it 440: every page of every array


@linux_only
def test_libraries_of_another_decoder_do_not_count_as_a_picture_s_memory(tmp_path: Path) -> None:
    """torchcodec brings PyTorch, which takes more address space than a worker may; so does this stand-in for it."""
    library = tmp_path / "torchcodec"
    library.mkdir()
    (tmp_path / "torchcodec-1.0.dist-info").mkdir()
    (tmp_path / "torchcodec-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchcodec\nVersion: 1.0\n"
    )
    (library / "__init__.py").touch()
    (library / "decoders.py").write_text(
        "import io, mmap, numpy, PIL.Image\n"
        "taken = mmap.mmap(-1, 3 << 30)\n"
        "class Pixels:\n"
        "    def __init__(self, data): self.data = numpy.asarray(PIL.Image.open(io.BytesIO(data)))\n"
        "    def permute(self, *order): return self\n"
        "    def numpy(self): return self.data\n"
        "decode_jpeg = Pixels\n"
    )
    Image.new("RGB", (20, 10)).save(tmp_path / "good.jpg")
    Image.new("RGB", (20, 10)).save(tmp_path / "good.png")
    code = "import sys; from headstart.crews import bad_reasons; print(bad_reasons(sys.argv[1:], workers=1))"
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "good.jpg", tmp_path / "good.png"],
        env=os.environ | {"HEADSTART_DECODER": "torchcodec", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == "[None, None]"
