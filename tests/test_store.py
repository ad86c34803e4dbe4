"""The cache folder: complete entries or none, room for the new, nothing taken from under anybody's hands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart import store
from headstart.cli import main
from headstart.errors import SetupError
from headstart.hashes import FileHashes, content_hash
from headstart.store import Cache, cache_folder, cache_limit, key_of


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", limit_bytes=10**6)


def put(cache: Cache, name: str, nbytes: int = 1000, *, age: float = 0.0, kind: str = "features") -> Path:
    writer = cache.write(kind, name)
    writer.append(os.urandom(nbytes))
    writer.publish({"name": name})
    path = cache.path(kind, name)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_an_entry_comes_back_as_it_was_written(cache: Cache) -> None:
    writer = cache.write("features", "a")
    assert writer.append(b"one") == 0
    assert writer.append(b"two") == 3
    assert cache.open("features", "a") is None  # not before it is complete
    writer.publish({"shape": [2, 3]})
    entry = cache.open("features", "a")
    assert entry is not None
    assert entry.data.tobytes() == b"onetwo"
    assert entry.meta["shape"] == [2, 3]
    writer = cache.write("features", "b")
    room = writer.reserve(1000)
    room[:] = np.arange(1000) % 256
    writer.publish({})
    again = cache.open("features", "b")
    assert again is not None
    assert np.array_equal(again.data, np.arange(1000) % 256)


def test_a_discarded_entry_leaves_nothing(cache: Cache) -> None:
    writer = cache.write("features", "a")
    writer.append(b"some")
    writer.discard()
    assert list((cache.folder / "features").iterdir()) == []


@pytest.mark.parametrize("harm", ["cut", "empty", "longer", "foreign", "description", "trailer"])
def test_torn_and_foreign_files_are_told_and_removed(cache: Cache, harm: str) -> None:
    path = put(cache, "a")
    data = path.read_bytes()
    harmed = {
        "cut": data[:-100],
        "empty": b"",
        "longer": data + b"x",
        "foreign": b"\x89PNG" + os.urandom(2000),
        "description": data.replace(b'"name"', b'"mane"'),
        "trailer": data[:-8] + b"HSTORE0\n",
    }[harm]
    assert harmed != data
    path.write_bytes(harmed)
    assert cache.open("features", "a") is None
    assert not path.exists()
    path.write_bytes(harmed)
    assert cache.describe("features", "a") is None


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(cache: Cache) -> None:
    paths = [put(cache, name, 300_000, age=age) for name, age in (("a", 300), ("b", 200), ("c", 100))]
    held = cache.open("features", "a")  # also makes it the one used last
    assert held is not None
    assert cache.make_room(300_000)
    assert [path.exists() for path in paths] == [True, False, True]
    assert not cache.make_room(800_000)  # a is held: nothing is evicted in vain
    assert [path.exists() for path in paths] == [True, False, True]
    held.close()
    assert cache.make_room(900_000)
    assert not any(path.exists() for path in paths)


def test_an_entry_removed_while_it_is_opened_is_none(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(cache, "a")
    there = Path.exists

    def gone(self: Path) -> bool:  # the last look at the name, just before the map
        found = there(self)
        if self == path:
            self.unlink()
        return found

    monkeypatch.setattr(Path, "exists", gone)
    assert cache.open("features", "a") is None
    monkeypatch.undo()
    assert not path.exists()


def test_what_is_being_written_takes_room(cache: Cache) -> None:
    path = put(cache, "a", 300_000)
    writer = cache.write("pixels", "b")
    writer.reserve(600_000)
    assert 399_000 < cache.room() < 400_000
    assert not cache.make_room(500_000)
    assert path.exists()
    assert cache.make_room(300_000)
    assert not path.exists()
    writer.discard()
    assert cache.room() == 1_000_000


def test_leftovers_of_a_dead_writer_are_swept_and_a_living_one_is_left_alone(cache: Cache) -> None:
    writer = cache.write("features", "living")
    (left,) = (cache.folder / "features").glob(".*.part")
    dead = left.with_name(".dead.1-ff.part")
    dead.write_bytes(b"half")
    for path in (left, dead):
        os.utime(path, (time.time() - 3600,) * 2)
    assert cache.make_room(10)
    assert left.exists()
    assert not dead.exists()
    writer.discard()


def test_clearing_takes_what_was_just_left_and_the_list_counts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    cache = Cache()
    put(cache, "a")
    writer = cache.write("features", "living")
    (left,) = (cache.folder / "features").glob(".*.part")
    dead = left.with_name(".dead.1-ff.part")
    dead.write_bytes(bytes(3_000_000))
    for path in (left, dead):
        os.utime(path, (time.time() - 2,) * 2)
    assert main(["cache", "list"]) == 0
    assert "3.0 MB unfinished" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.startswith("3.0 MB removed")
    assert (left.exists(), dead.exists()) == (True, False)
    writer.discard()


def test_a_torn_file_that_cannot_be_removed_is_none(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(cache, "a")
    path.write_bytes(path.read_bytes()[:-100])

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert cache.open("features", "a") is None
    assert cache.describe("features", "a") is None
    with pytest.raises(SetupError, match=r"cannot be removed\. Make its folder writable"):
        cache.clear()


def test_what_cannot_be_asked_is_neither_counted_as_free_nor_in_the_way(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, opened, room = [put(cache, name) for name in "abc"], Path.open, cache.room()
    sizes = [path.stat().st_size for path in paths]

    def refuse(self: Path, *given: Any, **options: Any) -> Any:
        if self == paths[1]:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)  # another account's
        assert room - cache.room() == sizes[1]
        assert cache.clear() == (sum(sizes), 0)
    assert not any(path.exists() for path in paths)
    paths = [put(cache, name) for name in "abc"]
    unlink = Path.unlink

    def stuck(self: Path, missing_ok: bool = False) -> None:
        if self in paths[:2]:
            raise OSError(30, "Read-only file system", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", stuck)
    with pytest.raises(SetupError, match=r"cannot be removed, nor can 1 more\. Make its folder writable"):
        cache.clear()
    assert [path.exists() for path in paths] == [True, True, False]


def test_what_was_installed_under_a_running_program_is_not_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.code_hash("errors")
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"newer")
    assert store.code_hash("errors") == before


def test_hashes_that_are_read_count_as_used(cache: Cache, tmp_path: Path) -> None:
    path = put(cache, FileHashes(cache, tmp_path)._name, age=3600, kind="files")
    FileHashes(cache, tmp_path)
    assert time.time() - path.stat().st_mtime < 60


def test_hashes_are_remembered_and_a_changed_file_is_noticed(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"first")
    old = time.time() - 100
    os.utime(path, (old, old))
    time.sleep(2.1)  # the time of the last change of anything about the file must lie back, too
    hashes = FileHashes(cache, tmp_path)
    assert hashes.of(path) == content_hash(b"first")
    hashes.save()
    again = FileHashes(cache, tmp_path)
    assert again._known[str(path)][1] == content_hash(b"first")
    path.write_bytes(b"other")  # of the same length, and made to look as old
    os.utime(path, (old, old))
    assert again.of(path) == content_hash(b"other")


def test_a_file_changed_just_now_is_not_remembered(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"first")
    hashes = FileHashes(cache, tmp_path)
    hashes.of(path)
    hashes.save()
    assert cache.names("files") == []


def test_one_process_at_a_time_holds_a_lock(cache: Cache) -> None:
    code = f"""
import sys
from pathlib import Path
from headstart.store import Cache
with Cache(Path({str(cache.folder)!r}), 10**6).lock("x"):
    print("in", flush=True)
    sys.stdin.readline()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    waited = []

    def waiting() -> None:
        waited.append(child.poll())  # still inside
        child.stdin.close()  # type: ignore[union-attr]

    with cache.lock("x", waiting=waiting):
        assert waited == [None]
    assert child.wait(timeout=30) == 0
    child.stdout.close()
    with cache.lock("x", waiting=lambda: pytest.fail("free again")):
        pass


def test_folder_and_limit_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for text, nbytes in (("20GB", 20 * 10**9), ("1.5 m", 1_500_000), ("77", 77), ("", 20 * 10**9)):
        monkeypatch.setenv("HEADSTART_CACHE_LIMIT", text)
        assert cache_limit() == nbytes
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "much")
    with pytest.raises(SetupError, match="HEADSTART_CACHE_LIMIT is 'much'"):
        cache_limit()
    monkeypatch.delenv("HEADSTART_CACHE")
    assert cache_folder().name == "headstart"


def test_keys_are_the_same_for_the_same_parts_in_any_order() -> None:
    assert key_of({"a": 1, "b": [1.5, None]}) == key_of({"b": [1.5, None], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": "1"})


def test_list_and_clear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    cache = Cache()
    put(cache, "a", 2_000_000, kind="pixels")
    put(cache, "b", 1000)
    assert main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "decoded pictures        1  2.0 MB" in out
    assert f"2.0 MB of 20.0 GB in {tmp_path / 'cache'}" in out
    assert main(["cache", "clear", "--kind", "features"]) == 0
    assert [entry.kind for entry in cache.entries()] == ["pixels"]
    held = cache.open("pixels", "a")
    assert held is not None
    assert main(["cache", "clear"]) == 0
    assert "1 entry is in use and stays" in capsys.readouterr().out
    held.close()
    assert main(["cache", "clear"]) == 0
    assert cache.entries() == []
