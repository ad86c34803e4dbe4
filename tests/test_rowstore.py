"""Stored features: the frozen part runs once, in this run and in all later ones that are the same up to the line."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_picture
from headstart import (
    Recipe,
    SetupError,
    Stage,
    create_classifier,
    fastconv,
    features,
    fine_tune,
    fit,
    load_images,
    make_runtime,
    set_freeze_line,
    split,
)
from headstart.classifier import Classifier
from headstart.cut import Cut, Suffix
from headstart.errors import DataError
from headstart.fastops import fast_training
from headstart.features import ActivationSource, FeatureSource, make_source, place_source
from headstart.fxtrace import Whole
from headstart.once import store_activations, store_features
from headstart.pixels import Pixels
from headstart.pixelstore import PixelStore
from headstart.recipe import POLICIES
from headstart.rowstore import RowStore, built, row_keys
from headstart.store import Cache
from tiny import SPEC, TinyNet

NET: dict[str, Any] = {
    "backbone": "test_resnet.r160_in1k", "weights": "none", "spec_overrides": {"image_size": 32}, "precision": "fp32"
}  # fmt: skip
CPU = make_runtime(device="cpu", precision="fp32", workers=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return Cache()


@contextmanager
def computed() -> Iterator[list[int]]:
    """Batch sizes that convolutions on three channels (the stem of a network) see meanwhile."""
    seen: list[int] = []

    def counted(convolve: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if x.shape[1] == 3 and type(x) is torch.Tensor and x.device.type != "meta":
                seen.append(len(x))
            return convolve(x, *args, **kwargs)

        return run

    patch = pytest.MonkeyPatch()
    patch.setattr(fastconv, "_with_activation", counted(fastconv._with_activation))
    patch.setattr(nn.functional, "conv2d", counted(nn.functional.conv2d))
    patch.setattr(torch, "conv2d", nn.functional.conv2d)
    try:
        yield seen
    finally:
        patch.undo()


def weights(model: Classifier) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(photos: Path, *, line: str = "head", seed: int = 0, **how: Any) -> tuple[Classifier, int]:
    """A fit with one stage at the line; the model, and how many pictures went through the network's first layer."""
    recipe = Recipe(stages=(Stage(freeze_line=line, epochs=2, views=2),), seed=seed)
    with computed() as seen:
        result = fine_tune(photos, recipe=recipe, **NET | how)
    return result.model, sum(seen)


@pytest.mark.parametrize("line", ["head", "layer4"])
def test_a_second_fit_runs_nothing_frozen(cache: Cache, photos: Path, line: str) -> None:
    first, count = run(photos, line=line)
    others = count - 24 * 2 - 6 - 6  # a cut is tried on made pictures
    assert others <= 2
    again, count = run(photos, line=line)
    assert count == 6 + others  # the test pictures alone
    assert torch.equal(weights(first), weights(again))
    without, count = run(photos, line=line, cache=False)
    assert count > 48
    assert torch.equal(weights(first), weights(without))


def test_whatever_changes_the_features_changes_the_key(cache: Cache, photos: Path) -> None:
    run(photos)
    for how in ({"seed": 1}, {"augment": POLICIES["light"]}, {"spec_overrides": {"image_size": 64}}):
        assert run(photos, **how)[1] >= 48, how
    changed = a_training_picture(photos)
    make_picture(np.random.default_rng(9), 0).save(changed, quality=95)
    assert run(photos)[1] >= 48


def test_a_file_that_changes_before_it_is_read_again_leaves_nothing_under_its_name(cache: Cache, photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier("test_resnet.r160_in1k", splits.class_names, weights="none", image_size=32)
    set_freeze_line(model, "head")
    changing = splits.train.paths[3]
    before, other = changing.read_bytes(), splits.train.paths[-1].read_bytes()
    store = PixelStore(Cache(cache.folder, limit_bytes=10_000), model.spec)  # no room for pictures
    store.fill(splits.train.paths, root=photos)
    store.cache.limit_bytes = 10**6  # but for features

    def rows(store: PixelStore | None, augment: str, views: int) -> torch.Tensor:
        pixels = Pixels(splits.train, model.spec, augment=POLICIES[augment], store=store)
        return store_features(model, pixels, views=views, runtime=CPU, batch_size=8)

    changing.write_bytes(other)
    for augment, views in (("none", 1), ("photo", 2)):  # the plain view, and working images
        with pytest.raises(DataError, match=rf"{changing.name} has changed while .* run the command again"):
            rows(store, augment, views)
    assert cache.names("features") == []
    changing.write_bytes(before)
    fresh = PixelStore(cache, model.spec)
    fresh.fill(splits.train.paths, root=photos)
    assert torch.equal(rows(fresh, "photo", 2), rows(None, "photo", 2))


def a_training_picture(photos: Path) -> Path:
    """A training picture of `run`."""
    return split(load_images(photos)).train.paths[0]


def test_the_key_names_weights_buffers_place_policy_and_machine(cache: Cache, photos: Path) -> None:
    table = load_images(photos)
    model = create_classifier("test_resnet.r160_in1k", table.class_names, weights="none", image_size=32)
    store = PixelStore(cache, model.spec)
    store.fill(table.paths, root=photos)

    def key(pixels: Pixels | None = None, at: str = "features", views: int = 2, batch_size: int = 32) -> str | None:
        pixels = pixels or Pixels(table, model.spec, augment=POLICIES["photo"], store=store)
        keys = row_keys(model, model.backbone, at, pixels, batch_size=batch_size, runtime=CPU, kind="module")
        return keys(views)

    keys = [key()]
    assert keys[0] == key()
    keys += [key(at="layer1"), key(views=3), key(batch_size=16)]
    keys.append(key(Pixels(table, model.spec, augment=POLICIES["photo"], seed=1, store=store)))
    keys.append(key(Pixels(table, model.spec, augment=POLICIES["light"], store=store)))
    keys.append(key(Pixels(table.select(list(range(35, -1, -1))), model.spec, augment=POLICIES["photo"], store=store)))
    torch.set_num_threads(2)
    keys.append(key())
    torch.set_num_threads(1)
    rounding = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    keys.append(key())
    torch.backends.cudnn.conv.fp32_precision = rounding
    with torch.no_grad():
        next(b for n, b in model.backbone.named_buffers() if n.endswith("running_mean")).add_(1e-3)
    keys.append(key())
    with torch.no_grad():
        next(iter(model.backbone.parameters()))[0, 0, 0, 0] += 1e-3
    keys.append(key())
    assert None not in keys
    assert len(set(keys)) == len(keys)
    one_view = [key(Pixels(table, model.spec, augment=POLICIES["photo"], seed=s, store=store), views=1) for s in (0, 1)]
    assert one_view[0] == one_view[1]  # the plain view knows no seed
    assert key(Pixels(table, model.spec, augment=lambda x: x.flip(-1), store=store)) is None


def _own(module: nn.Module) -> nn.Module:
    return type("Own", (nn.Module,), {"forward": lambda self, x: x.sin()})()


BY_HAND: dict[str, Callable[[nn.Module], object]] = {
    "another activation": lambda net: setattr(net, "act1", nn.SiLU()),
    "another number": lambda net: setattr(net.get_submodule("bn1"), "eps", 0.5),
    "another pooling": lambda net: setattr(net, "maxpool", nn.AvgPool2d(3, 2, 1)),
    "another slope": lambda net: setattr(net.get_submodule("layer3.0"), "act3", nn.LeakyReLU(0.2)),
    "own module": lambda net: setattr(net, "act1", _own(net)),
    "a hook": lambda net: net.get_submodule("layer3").register_forward_hook(lambda module, given, out: out * 0.5),
    "own features": lambda net: setattr(net, "forward_features", lambda x: type(net).forward_features(net, 2 * x)),
    "own forward": lambda net: setattr(net.get_submodule("bn1"), "forward", lambda x: x),
}


@pytest.mark.parametrize("line", ["head", "layer4"])
def test_a_network_changed_by_hand_is_another(cache: Cache, photos: Path, line: str) -> None:
    table = load_images(photos)

    def stored(change: Callable[[nn.Module], object] | None) -> torch.Tensor:
        model = create_classifier("test_resnet.r160_in1k", table.class_names, weights="none", image_size=32)
        if change:
            change(model.backbone)
        set_freeze_line(model, line)
        store = PixelStore(cache, model.spec)
        store.fill(table.paths, root=photos, workers=1)
        pixels = Pixels(table, model.spec, store=store)
        source = make_source(pixels, pixels, model, views=1, runtime=CPU).train
        assert isinstance(source, FeatureSource if line == "head" else ActivationSource)
        return source.batch(range(4), [0] * 4)

    seen = [stored(None)]
    for name, change in BY_HAND.items():
        seen.append(stored(change))
        assert all(one.shape != seen[-1].shape or not torch.equal(one, seen[-1]) for one in seen[:-1]), name
    assert torch.equal(stored(None), seen[0])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_mambaout"])
def test_a_network_is_known_while_its_fast_kernels_are_at_work(name: str) -> None:
    model = create_classifier(name, ("a", "b"), weights="none", image_size=32)
    form = built(model.backbone)
    assert form
    assert "0x" not in str(form), "an address is another in the next process"
    with fast_training(model.backbone):
        assert built(model.backbone) == form
    again = create_classifier(name, ("a", "b"), weights="none", image_size=32)
    assert built(again.backbone) == form
    for number in (1.0, 2.0):
        again.backbone.scale = np.array([number])
        assert built(again.backbone) != form
        form = built(again.backbone)
    again.backbone.scale = object()
    assert built(again.backbone) is None


def test_modules_of_the_users_own_are_not_kept(cache: Cache, photos: Path) -> None:
    for _ in range(2):
        plan = Recipe(stages=(Stage(epochs=1),))
        result = fine_tune(photos, backbone=TinyNet(), data_spec=SPEC, recipe=plan, precision="fp32")
        assert result.model.backbone.pictures == 24 * 2 + 6 + 6
    assert cache.names("features") == []


def test_harmed_rows_are_made_again(cache: Cache, photos: Path) -> None:
    first, _ = run(photos)
    for name in cache.names("features"):
        with cache.path("features", name).open("r+b") as file:
            file.seek(100)
            file.write(b"\xff" * 8)
    again, count = run(photos)
    assert count == 24 * 2 + 6 + 6
    assert torch.equal(weights(first), weights(again))
    assert run(photos)[1] == 6


@pytest.mark.parametrize("where", ["head", "layer4"])
def test_loaded_rows_are_the_made_ones_to_the_bit(cache: Cache, photos: Path, where: str) -> None:
    splits = split(load_images(photos))
    model = create_classifier("test_resnet.r160_in1k", splits.class_names, weights="none", image_size=32)
    set_freeze_line(model, where)
    store = PixelStore(cache, model.spec)
    parts = [Pixels(splits.train, model.spec, augment=POLICIES["photo"], store=store)]
    parts.append(Pixels(splits.val, model.spec, store=store))
    for part in parts:
        store.fill(part.table.paths, root=photos)
    plain = [replace_store(part) for part in parts]
    runtime = replace(CPU, dtype=torch.bfloat16)
    made, loaded = (make_source(parts[0], parts[1], model, views=2, runtime=runtime) for _ in range(2))
    fresh = make_source(plain[0], plain[1], model, views=2, runtime=runtime)
    assert len(cache.names("features")) == 2
    kind = FeatureSource if where == "head" else ActivationSource
    for one, two, three in zip(sides(made), sides(loaded), sides(fresh), strict=True):
        assert isinstance(one, kind)
        rows = [source.batch(list(range(6)), [0] * 6) for source in (one, two, three)]
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])
        assert rows[0].stride() == rows[1].stride()
        assert rows[0].dtype == rows[2].dtype
    shutil.rmtree(cache.folder)  # what is mapped stays readable where the system allows it
    assert torch.equal(loaded.train.batch([3], [1]), made.train.batch([3], [1]))


def sides(data: Any) -> tuple[Any, Any]:
    return data.train, data.val


def replace_store(pixels: Pixels) -> Pixels:
    """The same pictures without anything kept."""
    return Pixels(pixels.table, pixels.spec, augment=pixels.augment, seed=pixels.seed)


def test_without_room_rows_stay_in_memory(cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "1KB")
    said: list[str] = []
    monkeypatch.setattr("headstart.bench.say", lambda text, **_: said.append(text))
    run(photos)
    assert any("Stored features take" in line and "are held in memory" in line for line in said)
    assert cache.entries() == [] or all(entry.kind == "files" for entry in cache.entries())
    assert run(photos)[1] == 24 * 2 + 6 + 6


def test_rows_that_neither_disk_nor_memory_holds_are_an_error_and_not_a_killed_process(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE_LIMIT", "1KB")
    monkeypatch.setattr("headstart.filling.free_memory_bytes", lambda: 10_000)
    with pytest.raises(SetupError, match=r"no room in the cache folder, and 10 kB of\s+memory are free.*--views"):
        run(photos)


def test_a_folder_that_cannot_be_written_is_not_counted_on(cache: Cache, photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier("test_resnet.r160_in1k", splits.class_names, weights="none", image_size=32)
    train = Pixels(splits.train, model.spec, augment=POLICIES["photo"], store=PixelStore(cache, model.spec))
    assert features._budget(train, model, CPU) == cache.limit_bytes // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STORE_BYTES", 1000)
        assert features._budget(train, model, CPU) == cache.limit_bytes // 2
        shutil.rmtree(cache.folder)
        cache.folder.write_text("a file where the folder should be")
        assert features._budget(train, model, CPU) == 1000


def test_without_locks_rows_are_kept_and_found(cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", none)
    first, count = run(photos)
    assert count == 24 * 2 + 6 + 6
    again, count = run(photos)
    assert count == 6
    assert torch.equal(weights(first), weights(again))
    assert cache.clear() == (0, len(cache.entries()))  # who uses what cannot be told


def two_stages(photos: Path, *, views: int = 2, augment: str = "photo", **how: Any) -> tuple[Classifier, int]:
    """As `run`, with a head stage and a fine-tuning stage behind it."""
    later = Stage(name="fine-tune", freeze_line="layer4", epochs=2, views=views, lr_scale=0.01)
    recipe = Recipe(stages=(Stage(epochs=2, views=2), later), augment=augment)
    with computed() as seen:
        result = fine_tune(photos, recipe=recipe, **NET | how)
    return result.model, sum(seen)


HEAD_ALONE = 24 * 2 + 6 + 6
TRIED = 2 * 3 * 4 + 2 * 2  # in two passes two halves are compared with the whole; two cuts are tried


def test_one_pass_serves_the_head_and_the_stage_after_it(
    cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("headstart.bench.say", lambda text, **_: said.append(text))
    first, count = two_stages(photos)
    assert HEAD_ALONE < count <= HEAD_ALONE + TRIED
    assert not any("stored earlier" in line for line in said)  # the head stage of the same run
    again, _ = two_stages(photos)
    used = [line for line in said if "stored earlier" in line]
    assert (
        used
        == [f"Features stored earlier are used: {n}." for n in ("24 pictures x 2 views", "6 pictures x 1 view")] * 2
    )
    without, count = two_stages(photos, cache=False)
    assert count >= HEAD_ALONE + 24 * 2 + 6
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(weights(first), weights(without))


def test_a_stage_with_more_views_runs_those_alone_that_are_not_there(cache: Cache, photos: Path) -> None:
    first, count = two_stages(photos, views=4)
    assert HEAD_ALONE + 24 * 2 <= count <= HEAD_ALONE + 24 * 2 + TRIED
    assert len(cache.names("features")) == 4  # training and validation of two stages: no rows are kept twice
    without, count = two_stages(photos, views=4, cache=False)
    assert count >= HEAD_ALONE + 24 * 4 + 6
    assert torch.equal(weights(first), weights(without))
    again, count = two_stages(photos, views=3)  # the beginning of what is there
    assert count <= 6 + TRIED
    without, _ = two_stages(photos, views=3, cache=False)
    assert torch.equal(weights(again), weights(without))


def test_a_stage_with_fewer_views_runs_its_own(cache: Cache, photos: Path) -> None:
    assert two_stages(photos, views=1)[1] >= HEAD_ALONE + 24 + 6
    cache.clear()
    assert two_stages(photos, views=3, augment="none")[1] <= 24 + 6 + 6 + TRIED  # of which there are none


def test_without_room_nothing_is_put_aside(cache: Cache, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("headstart.bench.say", lambda text, **_: said.append(text))
    monkeypatch.setattr(RowStore, "has_room", lambda self, nbytes: False)
    assert two_stages(photos)[1] >= HEAD_ALONE + 24 * 2 + 6
    cache.clear()
    monkeypatch.undo()
    monkeypatch.setenv("HEADSTART_CACHE", str(cache.folder))
    monkeypatch.setattr("headstart.bench.say", lambda text, **_: said.append(text))
    begin, put = RowStore.begin, []

    def full(self: RowStore, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype) if len(shape) == 4 else begin(self, shape, dtype)

    monkeypatch.setattr(RowStore, "begin", full)
    monkeypatch.setattr(RowStore, "filled", lambda self, rows: put.append(len(rows)) if rows.dim() == 4 else None)
    assert two_stages(photos)[1] >= HEAD_ALONE + 24 * 2 + 6
    assert put == [24, 6, 24, 24, 6]  # given up after the first batch; then the second stage's own
    assert not any("held in memory" in line for line in said)


def test_fit_with_one_stage_puts_nothing_aside(cache: Cache, photos: Path) -> None:
    splits = split(load_images(photos))
    model = create_classifier("test_resnet.r160_in1k", splits.class_names, weights="none", image_size=32)
    set_freeze_line(model, "head")
    fit(model, splits, augment="none", runtime=CPU)
    assert len(cache.names("features")) == 2


CUTS = [("test_resnet.r160_in1k", "layer4"), ("test_efficientnet.r160_in1k", "last:6")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backbone", "line"), CUTS)
def test_what_is_put_aside_is_what_the_next_stage_would_make(
    cache: Cache, photos: Path, backbone: str, line: str, dtype: torch.dtype
) -> None:
    model, pixels, found = ready_to_cut(cache, photos, backbone, line)
    runtime = replace(CPU, dtype=dtype)
    said: list[str] = []
    assert pixels.store is not None
    monkeypatch.setattr(pixels.store, "say", said.append)
    features = store_features(model, pixels, views=2, runtime=runtime, batch_size=8, aside=lambda: found)
    assert said == [f"  Stored on the way for the next stage: {len(pixels)} pictures x 2 views at {found.at}, {SIZE}."]
    assert len(cache.names("features")) == 2
    plain = replace_store(pixels)
    assert torch.equal(features, store_features(model, plain, views=2, runtime=runtime, batch_size=8))
    with computed() as seen:
        kept = store_activations(model, found, pixels, views=2, runtime=runtime, batch_size=8)
    assert seen == []
    fresh = store_activations(model, found, plain, views=2, runtime=runtime, batch_size=8)
    assert torch.equal(kept.rows, fresh.rows)
    assert (kept.channels_last, kept.dtype) == (fresh.channels_last, fresh.dtype)


def test_a_cut_within_what_is_computed_as_one_is_not_put_aside(cache: Cache, photos: Path) -> None:
    model, pixels, found = ready_to_cut(cache, photos, "test_efficientnet.r160_in1k", "last:1")
    assert "conv" in found.at  # and its BatchNorm, which is fused with it in the whole network, lies behind
    store_features(model, pixels, views=2, runtime=CPU, batch_size=8, aside=lambda: found)
    assert len(cache.names("features")) == 1


def test_halves_that_give_other_bits_than_the_whole_are_not_used(cache: Cache, photos: Path) -> None:
    model, pixels, found = ready_to_cut(cache, photos, *CUTS[0])
    rest = found.suffix.eval_graph
    off = replace(found, suffix=Suffix(found.suffix.train_graph, Whole(rest, lambda net, x: net(x) * 1.001)))
    features = store_features(model, pixels, views=2, runtime=CPU, batch_size=8, aside=lambda: off)
    assert torch.equal(features, store_features(model, replace_store(pixels), views=2, runtime=CPU, batch_size=8))
    assert len(cache.names("features")) == 1


def rows_of(cache: Cache, photos: Path, **how: Any) -> Callable[..., tuple[torch.Tensor, int]]:
    """Features of so many views of the training pictures, and how many pictures the network saw for them."""
    splits = split(load_images(photos))
    model = create_classifier("test_resnet.r160_in1k", splits.class_names, weights="none", image_size=32)
    set_freeze_line(model, "head")
    store = PixelStore(cache, model.spec, **how)
    store.fill(splits.train.paths, root=photos)

    def rows(views: int, seed: int = 0) -> tuple[torch.Tensor, int]:
        pixels = Pixels(splits.train, model.spec, augment=POLICIES["photo"], seed=seed, store=store)
        with computed() as seen:
            features = store_features(model, pixels, views=views, runtime=CPU, batch_size=8)
        return features, sum(seen)

    return rows


def test_rows_of_other_numbers_of_views_are_used_as_far_as_they_go(cache: Cache, photos: Path) -> None:
    rows = rows_of(cache, photos)
    whole = rows(10)[0].clone()  # what is held is not cleared
    cache.clear()
    for views, new in ((2, 2), (4, 2), (3, 0), (9, 5), (10, 1), (10, 0)):
        features, seen = rows(views)
        assert torch.equal(features, whole[:, :views])
        assert seen == 24 * new, views


def test_the_plain_view_stays_for_other_seeds(cache: Cache, photos: Path) -> None:
    rows = rows_of(cache, photos)
    assert [rows(*how)[1] // 24 for how in ((1, 0), (2, 0), (1, 0), (2, 1), (3, 2))] == [1, 1, 0, 1, 2]


def test_fewer_views_that_leave_no_room_for_more_are_made_anew(cache: Cache, photos: Path) -> None:
    said: list[str] = []
    rows_of(cache, photos)
    used = sum(entry.nbytes for entry in cache.entries())
    each = rows_of(cache, photos)(1)[0].numel() * 4
    cache.clear(("features",))
    tight = Cache(cache.folder, limit_bytes=used + 5 * each)
    rows = rows_of(tight, photos, say=said.append)
    assert rows(2)[1] == 24 * 2
    assert rows(4)[1] == 24 * 4
    assert not any("held in memory" in line for line in said)
    assert rows(4)[1] == 0


def test_what_is_there_among_more_views_is_not_put_aside(cache: Cache, photos: Path) -> None:
    model, pixels, found = ready_to_cut(cache, photos, *CUTS[0])
    store_activations(model, found, pixels, views=4, runtime=CPU, batch_size=8)
    assert len(cache.names("features")) == 1
    store_features(model, pixels, views=2, runtime=CPU, batch_size=8, aside=lambda: found)
    assert len(cache.names("features")) == 2


def ready_to_cut(cache: Cache, photos: Path, backbone: str, line: str) -> tuple[Classifier, Pixels, Cut]:
    """A classifier with its backbone frozen, its training pictures in the store, and a cut in the middle."""
    splits = split(load_images(photos))
    model = create_classifier(backbone, splits.class_names, weights="none", image_size=32)
    set_freeze_line(model, line)
    store = PixelStore(cache, model.spec)
    pixels = Pixels(splits.train, model.spec, augment=POLICIES["photo"], store=store)
    store.fill(pixels.table.paths, root=photos)
    found = place_source(pixels, pixels, model, views=2, runtime=CPU).cut
    assert found is not None
    set_freeze_line(model, "head")
    return model, pixels, found
