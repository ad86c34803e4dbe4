"""Decoded once, found by content, the same to the bit as decoding again; two processes share one store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from conftest import make_picture
from headstart import (
    DataSpec,
    Recipe,
    Stage,
    crews,
    decode,
    fine_tune,
    groundwork,
    intake,
    isolate,
    load_images,
    load_view,
    open_image,
    split,
)
from headstart.errors import DataError, SetupError
from headstart.inspection import LOOK_BYTES, look
from headstart.isolate import Limits
from headstart.pixels import Pixels
from headstart.pixelstore import PixelStore, picture_bytes
from headstart.recipe import POLICIES
from headstart.store import Cache
from headstart.transforms import working_image
from tiny import SPEC, TinyNet


@contextmanager
def decodes() -> Iterator[list[str]]:
    """What is decoded meanwhile: the names of the files that worker processes are given, and "here" for what is not."""
    seen: list[str] = []
    load, ask = ImageFile.ImageFile.load, isolate.Worker.ask

    def counted(self: ImageFile.ImageFile) -> object:
        if self._im is None:  # not decoded yet
            seen.append("here")
        return load(self)

    def asked(self: isolate.Worker, path: Path) -> isolate.Answer:
        seen.append(path.name)
        return ask(self, path)

    patch = pytest.MonkeyPatch()
    patch.setattr(ImageFile.ImageFile, "load", counted)
    patch.setattr(isolate.Worker, "ask", asked)
    try:
        yield seen
    finally:
        patch.undo()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return Cache()


def filled(cache: Cache, photos: Path, spec: DataSpec = SPEC, **how: bool) -> tuple[PixelStore, list[Path]]:
    store = PixelStore(cache, spec)
    paths = sorted(photos.rglob("*.*"))
    store.fill(paths, root=photos, **how)
    return store, paths


@pytest.mark.parametrize("fit", ["crop", "squash", "letterbox"])
def test_stored_pictures_equal_decoded_ones_to_the_bit(cache: Cache, photos: Path, fit: str) -> None:
    rng = np.random.default_rng(1)
    for i, size in enumerate(((300, 40), (25, 33), (90, 90))):
        make_picture(rng, 0, size).save(photos / "red" / f"odd{i}.png")
    Image.new("RGBA", (50, 60), (10, 20, 30, 90)).save(photos / "red" / "clear.png")
    spec = replace(SPEC, fit=fit, crop_pct=0.875)
    filled(cache, photos, spec)
    store, paths = filled(cache, photos, spec)
    assert len(paths) == 40
    for path in paths:
        view, working = store.view(path), store.working(path)
        assert view is not None
        assert torch.equal(view, load_view(path, spec))
        assert np.array_equal(working, working_image(open_image(path), spec))


def test_stored_looks_equal_fresh_ones_to_the_bit(cache: Cache, photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, "Camera \u00e4", "2024:05:06 07:08:09"
    rng = np.random.default_rng(1)
    make_picture(rng, 0, (60, 40)).save(photos / "red" / "turned.jpg", exif=exif)
    Image.new("RGBA", (50, 60), (10, 20, 30, 90)).save(photos / "red" / "clear.png")
    for spec in (SPEC, None):
        PixelStore(cache, spec).fill(sorted(photos.rglob("*.*")), root=photos, look=True)
        store = PixelStore(cache, spec)
        paths = sorted(photos.rglob("*.*"))
        with decodes() as seen:
            store.fill(paths, root=photos, look=True)
            kept = [store.look(path) for path in paths]
        assert seen == []
        for path, one in zip(paths, kept, strict=True):
            fresh = look(path)
            assert one is not None
            for field in fields(one):
                assert np.array_equal(getattr(one, field.name), getattr(fresh, field.name)), field.name


def test_looks_are_added_to_what_is_known_without_them(cache: Cache, photos: Path) -> None:
    broken = photos / "red" / "broken.jpg"
    broken.write_bytes(b"no picture")
    paths = sorted(photos.rglob("*.*"))
    reasons = PixelStore(cache, None).fill(paths, root=photos)
    for wanted in (36, 0):
        store = PixelStore(cache, None)
        with decodes() as seen:
            assert store.fill(paths, root=photos, look=True) == reasons
        assert len(seen) == wanted
        assert [path for path in paths if store.look(path) is None] == [broken]


def test_an_unchanged_picture_is_never_decoded_again_and_a_changed_one_is(cache: Cache, photos: Path) -> None:
    with decodes() as first:
        filled(cache, photos)
    assert sorted(first) == sorted(path.name for path in photos.rglob("*.jpg"))
    with decodes() as second:
        store, paths = filled(cache, photos)
        store.view(paths[0])
    assert second == []
    shutil.copy(paths[0], photos / "red" / "copy.jpg")  # the same content in another place
    make_picture(np.random.default_rng(5), 2).save(paths[1])
    with decodes() as third:
        store, paths = filled(cache, photos)
    assert len(third) == 1
    view = store.view(paths[1])
    assert view is not None
    assert torch.equal(view, load_view(paths[1], SPEC))
    with decodes() as other_size:
        filled(cache, photos, replace(SPEC, image_size=24))
    assert len(other_size) == 37


def test_a_picture_that_changes_before_it_is_decoded_is_kept_as_what_it_is_then(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    hash_files = PixelStore._hash_files

    def then_change(self: PixelStore, *args: Any) -> None:
        hash_files(self, *args)
        make_picture(np.random.default_rng(5), 2).save(paths[1])

    monkeypatch.setattr(PixelStore, "_hash_files", then_change)
    store = PixelStore(cache, SPEC)
    assert store.fill(paths, root=photos) == [None] * 36
    view = store.view(paths[1])
    assert view is not None
    assert torch.equal(view, load_view(paths[1], SPEC))


@pytest.mark.parametrize("trouble", ["cut", "gone"])
def test_a_file_that_is_whole_again_is_not_held_for_bad(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    whole, hash_files = paths[1].read_bytes(), PixelStore._hash_files

    def then_spoil(self: PixelStore, *args: Any) -> None:
        hash_files(self, *args)
        paths[1].unlink()
        if trouble == "cut":
            paths[1].write_bytes(whole[:300])

    with monkeypatch.context() as patch:
        patch.setattr(PixelStore, "_hash_files", then_spoil)
        reasons = PixelStore(cache, SPEC).fill(paths, root=photos)
    assert [i for i, reason in enumerate(reasons) if reason] == [1]
    paths[1].write_bytes(whole)
    assert PixelStore(cache, SPEC).fill(paths, root=photos) == [None] * 36


@pytest.mark.parametrize("spec", [SPEC, None])
def test_a_picture_is_refused_for_its_size_by_the_cap_of_now(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch, spec: DataSpec | None
) -> None:
    large = photos / "red" / "large.jpg"
    make_picture(np.random.default_rng(5), 2, (90, 90)).save(large)
    paths = sorted(photos.rglob("*.jpg"))

    def refused(cap: int) -> tuple[list[str], int]:
        monkeypatch.setattr(decode, "MAX_PIXELS", cap)
        with decodes() as seen:
            reasons = PixelStore(cache, spec).fill(paths, root=photos)
        assert all(path == large for path, reason in zip(paths, reasons, strict=True) if reason)
        return [reason for reason in reasons if reason], len(seen)

    why = "its header promises more than {:,} pixels; shrink it first (or set HEADSTART_MAX_PIXELS)"
    assert refused(8_099) == ([why.format(8_099)], 37)
    assert refused(8_099) == ([why.format(8_099)], 0)
    assert refused(8_098) == ([why.format(8_098)], 37)  # nobody knows how large the others are
    assert refused(8_100) == ([], 1)
    assert refused(decode.PILLOWS_PIXELS) == ([], 0)
    assert refused(8_099) == ([why.format(8_099)], 0)


def test_after_an_interrupt_bad_files_are_known(cache: Cache, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    for path in paths[:20]:
        path.write_bytes(path.name.encode())  # each other bytes

    def stop(done: int, total: int) -> None:
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PixelStore(cache, SPEC).fill(paths, root=photos, progress=stop, workers=1)
    with decodes() as seen:
        PixelStore(cache, SPEC).fill(paths, root=photos)
    assert not {path.name for path in paths[:20]} & set(seen)
    assert len(seen) <= 4


def test_workers_decode_with_the_decoder_of_this_process(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_DECODER", "simplejpeg")  # set after headstart was imported: nobody goes by it
    store, paths = filled(cache, photos)
    view = store.view(paths[0])
    assert view is not None
    assert torch.equal(view, load_view(paths[0], SPEC))


def test_where_pillow_has_changed_meanwhile_nothing_is_kept(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.__version__", "1.0")
    with pytest.raises(SetupError, match="start it again"):
        filled(cache, photos)


def test_an_answer_that_does_not_fit_is_refused() -> None:
    def answer(name: str, shape: list[int]) -> isolate.Answer:
        return isolate.Answer(None, {"digest": "d", "arrays": [[name, shape]]}, (b"123456",))

    assert intake._made(answer("view", [3, 1, 2]), {"view"}).parts["view"].tolist() == [
        [[49, 50]],
        [[51, 52]],
        [[53, 54]],
    ]
    for wrong in (answer("view", [3, 1, 1]), answer("look", [6])):
        with pytest.raises(SetupError, match="answers with 6 bytes"):
            intake._made(wrong, {"view"})


def test_without_a_spec_only_the_verdicts_are_kept(cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "red" / "broken.jpg").write_bytes(b"no picture")
    paths = sorted(photos.rglob("*.jpg"))
    with decodes() as first:
        reasons = PixelStore(cache, None).fill(paths, root=photos)
    assert len(first) == len(set(first)) == 37
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere")  # no such process starts now
        assert PixelStore(cache, None).fill(paths, root=photos) == reasons
    assert [p.name for p, reason in zip(paths, reasons, strict=True) if reason] == ["broken.jpg"]
    assert sum(entry.nbytes for entry in cache.entries()) < 10_000


def test_a_file_that_strikes_the_decoder_is_named_and_not_remembered(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = photos / "red" / "slow.png"
    Image.new("1", (6000, 6000)).save(slow)
    paths = sorted(photos.rglob("*.*"))
    strict = Limits(seconds=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(crews, "Limits", lambda: strict)
        with decodes() as seen:
            reasons = PixelStore(cache, SPEC).fill(paths, root=photos)
        assert len(seen) == len(set(seen)) == 37
    assert reasons == [None if path != slow else "its decoding takes more than 0.05 seconds" for path in paths]
    assert PixelStore(cache, SPEC).fill(paths, root=photos) == [None] * 37


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_a_bad_file_and_is_not_waited_for(cache: Cache, photos: Path) -> None:
    pipe = photos / "pipe.jpg"
    os.mkfifo(pipe)
    done: list[str | None] = []
    filling = threading.Thread(
        target=lambda: done.extend(PixelStore(cache, SPEC).fill([pipe], root=photos)), daemon=True
    )
    filling.start()
    filling.join(20)
    if filling.is_alive():  # let the thread end
        pipe.open("wb").close()
    assert done == ["not a regular file"]


def test_what_is_missing_of_a_picture_is_added(cache: Cache, photos: Path) -> None:
    plain, paths = filled(cache, photos, working=False)
    assert plain.working(paths[0]) is None
    with decodes() as seen:
        store, _ = filled(cache, photos)
    assert len(seen) == 36
    assert store.working(paths[0]) is not None
    with decodes() as seen:
        filled(cache, photos, working=False)
    assert seen == []


def test_fit_decodes_each_picture_once_and_again_not_at_all(cache: Cache, photos: Path) -> None:
    broken = photos / "red" / "broken.jpg"
    broken.write_bytes((photos / "red" / "red0.jpg").read_bytes()[:300])

    def run(seed: int = 0) -> torch.Tensor:
        recipe = Recipe(stages=(Stage(epochs=1), Stage(name="all", freeze_line="all", epochs=2)), seed=seed)
        result = fine_tune(
            photos, backbone=TinyNet(), data_spec=SPEC, recipe=recipe, precision="fp32", bad_files="skip"
        )
        assert [path.name for path, _ in result.splits.train.bad_files] == ["broken.jpg"]
        return torch.cat([p.detach().flatten() for p in result.model.parameters()])

    with decodes() as first:
        weights = run()
    assert len(first) == len(set(first)) == 37
    assert "here" not in first
    with decodes() as second:
        again = run()
        run(seed=1)  # other splits, other views of the same pictures
    assert second == []
    kept = split(load_images(photos, bad_files="skip", check=True), seed=2)
    with decodes() as beforehand:
        fine_tune(kept, backbone=TinyNet(), data_spec=SPEC, recipe=Recipe(stages=(Stage(epochs=1),)))
    assert beforehand == []
    assert torch.equal(weights, again)
    with pytest.raises(DataError, match=r"broken\.jpg: damaged or cut off"):
        fine_tune(photos, backbone=TinyNet(), data_spec=SPEC)


def test_without_the_cache_nothing_is_written_and_the_result_is_the_same(cache: Cache, photos: Path) -> None:
    recipe = Recipe(stages=(Stage(epochs=1), Stage(name="all", freeze_line="all", epochs=1)))

    def run(use: bool) -> torch.Tensor:
        model = fine_tune(photos, backbone=TinyNet(), data_spec=SPEC, recipe=recipe, precision="fp32", cache=use).model
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    without = run(False)
    assert not cache.folder.exists()
    assert torch.equal(without, run(True))
    assert [entry.kind for entry in cache.entries() if entry.kind != "files"] == [
        "pixels",
        "pixels",
        "audits",
    ]  # views and looks


@pytest.mark.parametrize("trouble", ["room", "folder"])
def test_without_room_the_run_goes_on_and_says_so(
    cache: Cache, photos: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    if trouble == "room":
        monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "10KB")
    else:
        cache.folder.write_text("a file, not a folder")
    store = PixelStore(Cache(), SPEC, say=said.append)
    broken = photos / "red" / "broken.jpg"
    broken.write_bytes(b"no picture")
    paths = sorted(photos.rglob("*.jpg"))
    steps: list[tuple[int, int]] = []
    reasons = store.fill(paths, root=photos, progress=lambda done, total: steps.append((done, total)))
    assert [path for path, reason in zip(paths, reasons, strict=True) if reason] == [broken]
    assert steps[-1] == (37, 37)
    line = said[-1]
    assert "goes on without it" in line
    if trouble == "room":
        assert "37 pictures to decode, about " in line
        assert "room for 10 kB" in line
    assert store.view(paths[0]) is None
    told = len(said)
    store.fill(paths, root=photos)
    assert len(said) == told, "nothing is said twice, nor of a store that cannot be used what it will take"
    kept = [path for path in paths if path != broken]
    pixels = Pixels(load_images(photos, bad_files="skip"), SPEC, store=store)
    assert torch.equal(pixels.batch([0], [0])[0], load_view(pixels.table.paths[0], SPEC))
    assert len(kept) == 36


@pytest.mark.parametrize("change", ["other", "cut", "gone", ""])
def test_a_look_at_files_that_have_changed_is_not_kept_as_one_at_what_they_were(
    cache: Cache, photos: Path, change: str
) -> None:
    table = load_images(photos)
    cache.limit_bytes = 10_000  # no room for looks
    store, paths = filled(cache, photos, look=True)
    cache.limit_bytes = 10**6
    before = paths[1].read_bytes()
    if change == "gone":
        paths[1].unlink()
    elif change:
        paths[1].write_bytes(paths[2].read_bytes() if change == "other" else before[:300])
    groundwork._looked_at(table, store, workers=1, show=False)
    assert len(cache.names("audits")) == (not change)


def test_the_estimate_is_about_what_is_taken(cache: Cache, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "large").mkdir()
    for i in range(4):
        make_picture(rng, i % 3, (400, 300)).save(tmp_path / "large" / f"{i}.jpg")
    spec = replace(SPEC, image_size=64, fit="crop", crop_pct=0.875)
    filled(cache, tmp_path / "large", spec)
    (entry,) = [e for e in cache.entries() if e.kind == "pixels"]
    assert 0.95 < entry.nbytes / (4 * picture_bytes(spec, working=True)) < 1.1


def test_pictures_that_take_more_than_estimated_do_not_exceed_the_limit(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "wide").mkdir()
    paths = [tmp_path / "wide" / f"{i}.jpg" for i in range(32)]
    for path in paths:
        make_picture(rng, 0, (160, 90)).save(path)
    spec = replace(SPEC, image_size=64, fit="crop", crop_pct=0.875)
    estimate = 32 * picture_bytes(spec, working=True)
    monkeypatch.setattr("headstart.pixelstore.SHARD_BYTES", estimate // 3)
    limited = Cache(cache.folder, limit_bytes=int(1.35 * estimate))
    writer = limited.write("features", "earlier")
    writer.append(bytes(int(0.34 * estimate)))  # it may stay, by the estimate
    writer.publish({})
    said: list[str] = []
    taken: list[int] = []

    def measure(done: int, total: int) -> None:
        taken.append(sum(path.stat().st_size for path in cache.folder.glob("*/*")))

    store = PixelStore(limited, spec, say=said.append)
    store.fill(paths, root=tmp_path, progress=measure)
    measure(32, 32)
    assert len(taken) == 3
    assert max(taken) <= limited.limit_bytes
    assert all(store.view(path) is not None for path in paths)
    assert limited.names("features") == []
    assert not any("no more room" in line for line in said)
    held = sum(entry.nbytes for entry in limited.entries())
    for path in paths:
        make_picture(rng, 1, (160, 90)).save(path)
    limited.limit_bytes = held + int(1.1 * estimate)
    second = PixelStore(limited, spec, say=said.append)
    second.fill(paths, root=tmp_path)
    assert sum(entry.nbytes for entry in limited.entries()) <= limited.limit_bytes
    assert 24 < sum(second.view(path) is not None for path in paths) < 32
    assert "no more room" in said[-1]
    assert all(store.view(path) is not None for path in paths)


def test_what_is_decoded_stays_while_more_is_decoded(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.pixelstore.SHARD_BYTES", 10_000)
    kept: list[int] = []
    store, paths = PixelStore(cache, SPEC), sorted(photos.rglob("*.jpg"))
    store.fill(paths, root=photos, progress=lambda done, total: kept.append(Cache(cache.folder).clear()[1]))
    assert len(kept) == 3
    assert kept[0] > 0
    assert all(store.view(path) is not None and store.working(path) is not None for path in paths)


def test_bytes_that_the_disk_changed_are_noticed(cache: Cache, photos: Path) -> None:
    store, paths = filled(cache, photos)
    (entry,) = cache.entries()
    with entry.path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\0" * 20_000)
    pixels = Pixels(load_images(photos), SPEC, augment=POLICIES["photo"], store=store)
    fresh = Pixels(load_images(photos), SPEC, augment=POLICIES["photo"])
    everything = list(range(36))
    for view in (0, 1):
        assert torch.equal(pixels.batch(everything, [view] * 36), fresh.batch(everything, [view] * 36))
    assert not entry.path.exists()  # the next run decodes again
    store, _ = filled(cache, photos)
    view0 = store.view(paths[0])
    assert view0 is not None
    assert torch.equal(view0, load_view(paths[0], SPEC))


CHILD = """
import json, sys
from pathlib import Path
from headstart.isolate import Worker
ask, seen = Worker.ask, []
def counted(self, path):
    seen.append(path)
    return ask(self, path)
Worker.ask = counted
sys.path.insert(0, {tests!r})
from tiny import SPEC
from headstart.pixelstore import PixelStore
from headstart.store import Cache
import zlib
paths = sorted(Path({photos!r}).rglob("*.jpg"))
store = PixelStore(Cache(), SPEC)
print("ready", flush=True)
sys.stdin.readline()
store.fill(paths, root=Path({photos!r}), workers=1)
print(json.dumps([len(seen), zlib.crc32(b"".join(store.view(p).numpy().tobytes() for p in paths))]))
"""


def test_two_processes_fill_one_store_and_decode_each_picture_once(cache: Cache, photos: Path) -> None:
    code = CHILD.format(tests=str(Path(__file__).parent), photos=str(photos))
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    results = [json.loads(child.communicate(timeout=60)[0]) for child in children]
    assert sum(count for count, _ in results) == 36
    assert results[0][1] == results[1][1]


def test_a_later_part_is_all_that_is_made_and_kept(cache: Cache, photos: Path) -> None:
    store, paths = filled(cache, photos)
    before = sum(entry.nbytes for entry in cache.entries())
    told: list[str] = []
    again = PixelStore(cache, SPEC, say=told.append)
    again.fill(paths, root=photos, look=True)
    more = sum(entry.nbytes for entry in cache.entries()) - before
    assert "36 pictures to decode, about 102 kB" in told[0], "the looks alone"
    assert 0 < more < 36 * LOOK_BYTES * 1.2
    assert all(torch.equal(again.view(path), store.view(path)) for path in paths)
    assert all(again.look(path) is not None for path in paths)


def test_looks_serve_every_preprocessing(cache: Cache, photos: Path) -> None:
    filled(cache, photos, look=True)
    with mock.patch.object(intake, "make", wraps=intake.make) as make:
        store, paths = filled(cache, photos, replace(SPEC, image_size=24), look=True)
    assert make.call_args.args[1] == ["view", "working"]
    assert all(store.look(path) is not None for path in paths)
    with decodes() as seen:
        filled(cache, photos, replace(SPEC, image_size=24), look=True)
    assert seen == []
