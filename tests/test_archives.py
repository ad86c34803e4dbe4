"""Archives: what is unpacked and kept, what is refused with nothing written, what comes over the network."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from headstart import archives, prepared
from headstart.cli import main
from headstart.dataset import load_images
from headstart.errors import DataError, HeadstartError, SetupError
from headstart.prepared import hold, prepared_folder, prepared_folders, prepared_path, remove_prepared
from headstart.sources import source_name
from hostile_archives import GOOD, HOSTILE, PICTURE, gz, tar_of, zip_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, deep enough that a few `..` stay in the test's folder."""
    folder = tmp_path / "a" / "b" / "cache"
    monkeypatch.setenv("HEADSTART_CACHE", str(folder))
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


# ----------------------------------------------------------------------------------------------------- what is unpacked


@pytest.mark.parametrize("name", ["p.zip", "p.tar", "p.tar.gz", "P.TGZ", "wrapped.zip", "deflated.zip"])
def test_an_archive_is_read_like_its_folder(name: str, tmp_path: Path, cache: Path) -> None:
    data = {
        "p.zip": lambda: zip_of(("cat/notes.exe", b"MZ"), ("__MACOSX/cat/._0.png", b"x")),
        "p.tar": lambda: tar_of(("./cat/9.png", PICTURE)),
        "p.tar.gz": lambda: gz(tar_of()),
        "P.TGZ": lambda: gz(tar_of()),
        "wrapped.zip": wrapped,
        "deflated.zip": lambda: zip_of(compression=zipfile.ZIP_DEFLATED),
    }[name]()
    (tmp_path / name).write_bytes(data)
    table = load_images(tmp_path / name)
    assert table.class_names == ("cat", "dog")
    inside = "train/" if name == "wrapped.zip" else ""
    assert table.relative_paths[:2] == (f"{inside}cat/0.png", f"{inside}cat/1.png")
    assert all(path.read_bytes() in (PICTURE, *(data for _, data in GOOD)) for path in table.paths)
    assert table.root.is_relative_to(cache)
    assert not list(cache.rglob("*.exe")), "pictures and tables alone are written"
    assert not list(cache.rglob("*.filling"))


def wrapped() -> bytes:
    """Everything in one folder, with entries for the folders."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("photos")
        for name, data in GOOD:
            archive.writestr(f"photos/train/{name}", data)
    return buffer.getvalue()


def zipped(names: list[str]) -> bytes:
    """A zip with a picture under each of these names, and other files empty."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, PICTURE if name.endswith(".png") else b"")
    return buffer.getvalue()


def test_folders_around_the_pictures_may_be_several(tmp_path: Path) -> None:
    names = [f"download/photos/{label}/{i}.png" for label in ("cat", "dog") for i in range(2)]
    (tmp_path / "p.zip").write_bytes(zipped([*names, "download/photos/Icon\r"]))
    table = load_images(tmp_path / "p.zip", check=False)
    assert table.relative_paths == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")


def test_the_folder_of_the_only_class_is_no_wrapper(tmp_path: Path) -> None:
    (tmp_path / "p.zip").write_bytes(zipped([f"photos/cat/{i}.png" for i in range(3)]))
    table = load_images(tmp_path / "p.zip", class_names=("cat", "dog"), check=False)
    assert table.class_counts().tolist() == [3, 0]
    (tmp_path / "q.zip").write_bytes(zipped([f"cat/{i}.png" for i in range(3)]))
    assert load_images(tmp_path / "q.zip", class_names=("cat", "dog"), check=False).class_counts().tolist() == [3, 0]


def test_names_in_utf_8_without_the_flag_are_read(tmp_path: Path) -> None:
    """As macOS writes them."""
    data = bytearray(zipped(["K\u00e4fer/0.png", "\u00d6tzi/0.png", "plain/0.png"]))
    for magic, at in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        start = data.find(magic)
        while start >= 0:
            data[start + at] &= ~0x08
            start = data.find(magic, start + 4)
    (tmp_path / "p.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.namelist()[0] != "K\u00e4fer/0.png", "the flag is gone"
    assert load_images(tmp_path / "p.zip", check=False).class_names == ("K\u00e4fer", "plain", "\u00d6tzi")


def test_a_prepared_folder_that_lost_a_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of())
    first = load_images(tmp_path / "a.zip")
    first.paths[0].unlink()
    (first.root / ".DS_Store").write_bytes(b"")  # does not stand in for it
    assert load_images(tmp_path / "a.zip").paths == first.paths
    first.paths[0].unlink()
    monkeypatch.setattr(prepared, "_locked", lambda file: False)  # as where another process reads it
    with pytest.raises(DataError, match="has lost some of its files, and another process reads it"):
        load_images(tmp_path / "a.zip")


def test_a_split_folder_alone_is_no_wrapper(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in GOOD:
            archive.writestr(f"test/{name}", data)
    (tmp_path / "p.zip").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="no split folder 'train' to learn from"):
        load_images(tmp_path / "p.zip")


def test_an_archive_is_unpacked_once_whatever_its_name(tmp_path: Path, cache: Path) -> None:
    for name in ("a.zip", "b.zip"):
        (tmp_path / name).write_bytes(zip_of())
    first = load_images(tmp_path / "a.zip")
    stamps = [path.stat().st_mtime_ns for path in first.paths]
    second = load_images(tmp_path / "b.zip")
    assert second.paths == first.paths
    assert [path.stat().st_mtime_ns for path in second.paths] == stamps
    (tmp_path / "a.zip").write_bytes(zip_of(("cat/x.png", PICTURE)))
    assert len(load_images(tmp_path / "a.zip")) == len(first) + 1


def test_what_was_left_half_done_is_never_seen(tmp_path: Path) -> None:
    def stops(folder: Path) -> None:
        (folder / "half.png").write_bytes(PICTURE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared_folder("x", stops)
    assert list(prepared_path("x").parent.iterdir()) == []
    old = prepared_path("x").with_name(".x.1-2.filling")
    old.mkdir()
    os.utime(old, (0, 0))
    made = prepared_folder("x", lambda folder: (folder / "whole.png").write_bytes(PICTURE) and None)
    assert files(made) == {"whole.png", ".files"}
    assert not old.exists()


def test_two_processes_at_once_end_with_one_folder() -> None:
    def meets_another(folder: Path) -> None:
        prepared_folder("x", lambda other: (other / "theirs.png").write_bytes(PICTURE) and None)
        (folder / "mine.png").write_bytes(PICTURE)

    assert files(prepared_folder("x", meets_another)) == {"theirs.png", ".files"}


def test_the_cache_command_lists_and_clears_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of())
    table = load_images(tmp_path / "x.zip", check=False)
    assert main(["cache", "list"]) == 0
    assert "sets of pictures        1" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert table.paths[0].exists(), "runs name these files: they go when they are meant"
    assert main(["cache", "clear", "--kind", "sets"]) == 0
    assert not table.root.exists()
    assert len(load_images(tmp_path / "x.zip")) == len(table)


def test_folders_that_are_not_ours_are_left_alone_and_named(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of())
    root = load_images(tmp_path / "x.zip", check=False).root
    for name in ("hf-beans", f"arrays-{'0' * 32}", f"archive-{'a' * 32}", "torchvision", "mine", "hf-mine"):
        (cache / "sets" / name).mkdir()
        (cache / "sets" / name / "1.png").write_bytes(PICTURE)
    (cache / "sets" / "hf-beans" / "photos.csv").write_text("path,label\n")  # as earlier versions left it
    (tmp_path / "elsewhere").mkdir()
    (cache / "sets" / f"arrays-{'1' * 32}").symlink_to(tmp_path / "elsewhere")
    assert main(["cache", "list", "--kind", "sets"]) == 0
    assert "sets of pictures        5" in capsys.readouterr().out
    assert main(["cache", "clear", "--kind", "sets"]) == 0
    said = capsys.readouterr().out
    assert f"Left alone in {cache / 'sets'}, since they are not headstart's: arrays-{'1' * 32}, hf-mine, mine\n" in said
    assert sorted(path.name for path in (cache / "sets").iterdir()) == [f"arrays-{'1' * 32}", "hf-mine", "mine"]
    assert not root.exists()


@pytest.mark.parametrize("words", [["list"], ["clear"], ["clear", "--kind", "sets"]])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_place_of_the_cache_folder_is_told(
    words: list[str], below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "file" / below))
    assert main(["cache", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"but {tmp_path / 'file'} is a file. Let HEADSTART_CACHE name a folder." in printed.err


def test_a_data_set_that_a_process_reads_is_not_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of())
    code = f"from headstart import load_images; load_images({str(tmp_path / 'x.zip')!r}); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"1\n"
        assert main(["cache", "clear", "--kind", "sets"]) == 0
        assert "0 kB removed" in (told := capsys.readouterr().out)
        assert "1 entry is in use and stays" in told
        reader.communicate(b"\n")
    table = load_images(tmp_path / "x.zip")
    assert all(path.exists() for path in table.paths)
    assert main(["cache", "clear", "--kind", "sets"]) == 0
    assert "in use" not in capsys.readouterr().out
    assert not table.root.exists()


def test_a_folder_that_is_held_is_the_one_that_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleared and made anew between opening and locking: the second one is held."""
    made = prepared_folder("x", lambda folder: (folder / "whole.png").write_bytes(PICTURE) and None)
    assert remove_prepared(made)
    assert remove_prepared(made), "another process was quicker"
    made.mkdir()
    own, changed = os.open, []

    def slow(path: Any, flags: int) -> int:
        found = own(path, flags)
        if not changed:
            changed.append(1)
            made.rename(tmp_path / "old")
            made.mkdir()
        return found

    monkeypatch.setattr("headstart.prepared.os.open", slow)
    assert hold(made)
    assert os.path.samestat(os.fstat(prepared._held[made]), made.stat())
    monkeypatch.undo()
    assert remove_prepared(made)
    assert not hold(made)


def test_names_of_results() -> None:
    assert source_name("https://example.org/data/cats.tar.gz?x=1#sha256=00") == "cats"
    assert source_name("some/cats.zip") == "cats"
    assert source_name("some/cats.v2") == "cats.v2"


# ------------------------------------------------------------------------------------------------------ what is refused


def test_there_are_enough_hostile_archives() -> None:
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_nothing_is_written(name: str, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / ("x.zip" if name.startswith("zip") else "x.tar")
    file.write_bytes(HOSTILE[name]())
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"x\.(zip|tar)"):
        load_images(file)
    assert files(tmp_path) == before, "nothing in the cache folder, nothing outside it"
    assert not Path("/tmp/evil.png").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: zip_of(("cat/CON.jpg", PICTURE)), "'CON.jpg' in its name, which Windows reserves for a device"),
        (lambda: zip_of(("cat/../../x.jpg", PICTURE)), "'..' in its name, which leads out of the archive's folder"),
        (
            lambda: zip_of(("cat/A.png", PICTURE), ("cat/a.png", PICTURE)),
            "members 'cat/A.png' and 'cat/a.png' differ by letter case or spelling alone.",
        ),
        (
            lambda: tar_of(("Dog/7.png", PICTURE)),
            "members 'dog/0.png' and 'Dog/7.png' differ by letter case or spelling alone, in 'dog' and 'Dog'.",
        ),
        (lambda: gz(tar_of())[:-40], "it is damaged or cut off"),
    ],
    ids=["device", "parent", "case", "folders", "cut off"],
)
def test_a_refusal_says_what_is_wrong(data: Callable[[], bytes], words: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.zip").write_bytes(data())
    with pytest.raises(DataError) as caught:
        load_images(tmp_path / "x.zip")
    assert words in str(caught.value)
    assert "Nothing was written" in str(caught.value)


@pytest.mark.parametrize("name", ["tar.gz long name bomb", "tar.gz bomb outside the pictures", "zip bomb"])
def test_a_bomb_does_not_fill_the_memory(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(HOSTILE[name]())
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            load_images(file)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # they unpack to 64 MB and more
    finally:
        tracemalloc.stop()


def test_more_entries_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_ENTRIES", 5)
    for name, data in (("x.zip", zip_of()), ("x.tar", tar_of()), ("x.tgz", gz(tar_of()))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="more than 5 entries"):
            load_images(tmp_path / name)


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (tmp_path / "x.zip").write_bytes(zip_of())
    with pytest.raises(DataError, match="more than the 100 bytes that are free"):
        load_images(tmp_path / "x.zip")


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_mutated_archives_are_read_or_refused(kind: str, tmp_path: Path, cache: Path) -> None:
    whole = {"zip": zip_of(compression=zipfile.ZIP_DEFLATED), "tar": tar_of(), "tgz": gz(tar_of())}[kind]
    rng = random.Random(0)
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / f"x.{kind}"
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        file.write_bytes(raw[: rng.randint(1, len(raw))] if rng.random() < 0.3 else raw)
        with suppress(HeadstartError):
            load_images(file, check=False)
    assert all(path.startswith(("x/", "a/b/cache/sets/archive-")) for path in files(tmp_path))
    assert not list(cache.rglob("*.filling"))


# --------------------------------------------------------------------------------------------------- over the network


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/short.zip":  # announces more than it sends
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(zip_of())
            return
        super().do_GET()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The address of a web server of ours, and the folder it serves."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_with_its_checksum(site: tuple[str, Path], cache: Path) -> None:
    address, folder = site
    data = gz(tar_of())
    (folder / "photos").write_bytes(data)  # the content decides, not the name
    url = f"{address}/photos#sha256={hashlib.sha256(data).hexdigest().upper()}"
    first = load_images(url)
    assert first.class_names == ("cat", "dog")
    (folder / "photos").unlink()
    while prepared._held:  # as a new process begins
        os.close(prepared._held.popitem()[1])
    assert load_images(url).paths == first.paths  # nothing is asked of the network again
    assert list(prepared._held) == prepared_folders()
    assert not list(cache.rglob("*.filling"))


def test_another_checksum_is_refused(site: tuple[str, Path], cache: Path) -> None:
    address, folder = site
    (folder / "p.zip").write_bytes(zip_of())
    with pytest.raises(DataError, match=f"what came has SHA-256 {hashlib.sha256(zip_of()).hexdigest()}"):
        load_images(f"{address}/p.zip#sha256={'0' * 64}")
    assert files(cache) == set()


@pytest.mark.parametrize("fragment", ["", "#sha256=12", "#md5=" + "0" * 64, "#" + "0" * 64])
def test_an_address_needs_a_checksum(fragment: str) -> None:
    with pytest.raises(DataError, match=r"needs the checksum .*#sha256=HEX"):
        load_images(f"http://127.0.0.1:9/p.zip{fragment}")


def test_a_download_that_fails_says_what_to_do(
    site: tuple[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = site
    (folder / "p.zip").write_bytes(zip_of())
    ending = "#sha256=" + "0" * 64
    with pytest.raises(SetupError, match=r"answers 404"):
        load_images(f"{address}/none.zip{ending}")
    with pytest.raises(SetupError, match=r"cannot be downloaded: .*pass its path"):
        load_images(f"http://127.0.0.1:1/p.zip{ending}")
    with pytest.raises(SetupError, match=r"was cut off after [\d,]+ of 100,000"):
        load_images(f"{address}/short.zip{ending}")
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 100)
    with pytest.raises(SetupError, match="there is room for 100"):
        load_images(f"{address}/p.zip{ending}")
    assert files(cache) == set()


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(zip_of())
    with pytest.raises(DataError, match=r"No file .*photo\.zip\. Did you mean: photos\.zip\?"):
        load_images(tmp_path / "photo.zip")
    (tmp_path / "photos.tar.bz2").write_bytes(b"BZh9")
    with pytest.raises(DataError, match=r"is a file; .*\.tar\.gz"):
        load_images(tmp_path / "photos.tar.bz2")


def test_a_tar_of_the_oldest_kind(tmp_path: Path) -> None:
    data = bytearray(tar_of(form=tarfile.USTAR_FORMAT))
    for start in range(0, len(data) - 512, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 257 : start + 265] = bytes(8)
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = f"{sum(data[start : start + 512]):06o}\0 ".encode()
    (tmp_path / "x.tar").write_bytes(data)
    assert len(load_images(tmp_path / "x.tar")) == 6
