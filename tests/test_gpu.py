"""The GPU's way of doing things: on a pretended GPU everywhere, on a real one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import EvoNorm2dB0
from torch import Tensor

import headstart
from headstart import attempt, frozenpass, gradients, load_images, numerics, once, set_freeze_line
from headstart.augment import augmented_batch
from headstart.averaging import restore, snapshot
from headstart.backbones import backbone_output
from headstart.batchviews import is_drawn_together, views_together
from headstart.classifier import Classifier
from headstart.cut import Cut, cut_or_reason
from headstart.dataspec import DataSpec
from headstart.evaluation import predict_logits, source_logits
from headstart.features import ActivationSource, FeatureSource, PixelSource, StageData
from headstart.filling import Stored
from headstart.memory import Portion, in_portions
from headstart.once import store_activations, store_features
from headstart.pixels import Pixels, views_at_once
from headstart.recipe import FINE_TUNE_STAGE, HEAD_STAGE, POLICIES, AugmentSpec, HeadSpec, Recipe, Stage
from headstart.recording import CAN_RECORD, Recording
from headstart.runtime import Runtime, find_device
from headstart.stock import is_stock
from pretend import GPU, PretendedGpu

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
needs_recording = pytest.mark.skipif(not CAN_RECORD, reason="this PyTorch is too old to record")
EVERYTHING = AugmentSpec(
    rotation=25, translation=0.1, zoom=0.4, crop_scale=(0.4, 1.0), hflip=0.5, vflip=0.2, contrast=0.3, brightness=0.3,
    channel_brightness=0.1, erasing=0.5,
)  # fmt: skip


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.array(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


ERASING = replace(POLICIES["photo"], erasing=0.5)
PICTURES = [picture(90, 70, 0), picture(64, 120, 1), picture(75, 75, 2), picture(200, 66, 3), picture(64, 64, 4)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        for i in range(8):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(80 + i, 70, i + 100 * (name == "b"))).save(path)
    return tmp_path / "photos"


# ---- augmented views, a batch at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_by", ["crop", "squash", "letterbox"])
def test_views_drawn_together_are_those_drawn_one_by_one(fit_by: str) -> None:
    spec = DataSpec(64, fit=fit_by)
    how: dict[str, Any] = {"seed": 3, "indices": range(5), "views": [1, 2, 3, 4, 5]}
    alone = augmented_batch(PICTURES, spec, EVERYTHING, **how).int()
    together = views_together([torch.from_numpy(one) for one in PICTURES], spec, EVERYTHING, **how).int()
    apart = (alone - together).abs()
    # One grey level by rounding; where a picture is shrunk, the two ways of averaging differ by a few.
    assert apart.float().mean() < 0.6
    assert (apart > 1).float().mean() < 0.12


def test_the_policy_photo_is_drawn_to_one_grey_level() -> None:
    spec, policy = DataSpec(64), POLICIES["photo"]
    how: dict[str, Any] = {"seed": 1, "indices": range(5), "views": [1] * 5}
    small = [picture(76, 76 + 9 * i, i) for i in range(5)]  # as `working_image` makes them: nothing is shrunk
    alone = augmented_batch(small, spec, policy, **how).int()
    together = views_together([torch.from_numpy(one) for one in small], spec, policy, **how).int()
    assert (alone - together).abs().max() <= 1


def test_a_view_drawn_together_does_not_depend_on_its_batch() -> None:
    spec, tensors = DataSpec(64), [torch.from_numpy(one) for one in PICTURES]
    batch = views_together(tensors, spec, EVERYTHING, seed=0, indices=range(5), views=[1] * 5)
    for i in range(5):
        alone = views_together(tensors[i : i + 1], spec, EVERYTHING, seed=0, indices=[i], views=[1])
        assert torch.equal(alone[0], batch[i])
    assert not torch.equal(batch, views_together(tensors, spec, EVERYTHING, seed=0, indices=range(5), views=[2] * 5))


def test_what_is_not_drawn_together() -> None:
    assert is_drawn_together(POLICIES["photo"])
    assert is_drawn_together(POLICIES["light"])
    for change in ({"noise": 0.1}, {"auto": "trivial"}, {"downsample": 0.5}):
        assert not is_drawn_together(replace(POLICIES["photo"], **change))
    assert not is_drawn_together(lambda x: x)


# ---- pictures that stay on a device ---------------------------------------------------------------------------------


def device_pixels(photos: Path, **options: Any) -> Pixels:
    return Pixels(load_images(photos), DataSpec(64), device=CPU, **options)


def test_batches_on_a_device_are_the_same_pictures(photos: Path) -> None:
    augment = replace(POLICIES["photo"], crop_scale=(0.6, 0.8))
    ours, plain = (Pixels(load_images(photos), DataSpec(64), augment=augment, device=device) for device in (CPU, None))
    indices, views = [3, 0, 15, 3], [0, 1, 0, 2]
    apart = (ours.batch(indices, views).int() - plain.batch(indices, views).int()).abs()
    assert torch.equal(apart[[0, 2]], torch.zeros_like(apart[[0, 2]]))
    assert apart.max() <= 1


def test_a_picture_is_read_once_and_then_lies_on_the_device(photos: Path) -> None:
    pixels = device_pixels(photos, augment=POLICIES["photo"], cache_bytes=1 << 20)
    with mock.patch("headstart.pixels.open_image", wraps=headstart.pixels.open_image) as opened:
        first = pixels.batch([0, 1], [1, 1])
        again = pixels.batch([0, 1], [1, 1])
        assert opened.call_count == 2
    assert torch.equal(first, again)
    full = device_pixels(photos, augment=POLICIES["photo"], cache_bytes=0)
    with mock.patch("headstart.pixels.open_image", wraps=headstart.pixels.open_image) as opened:
        assert torch.equal(full.batch([0, 1], [1, 1]), first)
        full.batch([0, 1], [1, 1])
        assert opened.call_count == 4


def test_what_cannot_be_drawn_there_is_drawn_as_ever(photos: Path) -> None:
    augment = replace(POLICIES["photo"], noise=0.05)
    ours, plain = (Pixels(load_images(photos), DataSpec(64), augment=augment, device=device) for device in (CPU, None))
    assert torch.equal(ours.batch([0, 5], [1, 2]), plain.batch([0, 5], [1, 2]))


def test_as_many_views_are_drawn_together_as_memory_allows() -> None:
    with mock.patch("headstart.pixels.free_bytes", return_value=139 << 30):
        assert views_at_once(GPU, DataSpec(224)) == 256
        assert 32 < views_at_once(GPU, DataSpec(600)) < 256
    with mock.patch("headstart.pixels.free_bytes", return_value=1 << 30):
        assert views_at_once(GPU, DataSpec(224)) == 32


def test_a_gpu_that_processes_share_is_not_touched_before_each_has_its_own() -> None:
    with mock.patch("torch.cuda.is_available", return_value=True), mock.patch("torch.empty") as made:
        assert find_device("cuda", shared=True) == torch.device("cuda")
        assert not made.called
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("torch.empty", side_effect=RuntimeError("no CUDA")),
        pytest.raises(headstart.SetupError, match="cannot be used here"),
    ):
        find_device("cuda", shared=True)


def test_bfloat16_is_tried_on_the_gpu_that_is_meant() -> None:
    numerics._bf16_works.cache_clear()
    with (
        mock.patch("torch.cuda.device") as inside,
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("headstart.numerics.bf16_errors", return_value={"matmul": 1e-3}) as tried,
    ):
        assert numerics.bf16_works("cuda:1")
    numerics._bf16_works.cache_clear()
    assert inside.call_args.args == tried.call_args.args == (torch.device("cuda:1"),)


def test_float32_on_a_gpu_may_be_as_far_apart_as_its_convolutions_round() -> None:
    gpu = torch.device("cuda")
    assert frozenpass.tolerance(gpu, torch.float32) == 5e-3
    assert frozenpass.tolerance(CPU, torch.float32) == 1e-5
    assert frozenpass.tolerance(gpu, torch.bfloat16) == frozenpass.tolerance(CPU, torch.bfloat16) == 5e-2
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert frozenpass.tolerance(gpu, torch.float32) == 1e-5


# ---- nothing waits for the GPU inside an epoch ----------------------------------------------------------------------


class Inline:
    """A pool whose threads are the caller: what is pretended holds for one thread."""

    def map(self, function: Any, *jobs: Any) -> Iterator[Any]:
        return map(function, *jobs)

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done


@contextmanager
def pretended(model: Classifier) -> Iterator[PretendedGpu]:
    """A pretended GPU that the model has been moved to; PyTorch's own backward pass, which needs a real one, is left
    out: gradients are zeros."""

    def backward(loss: torch.Tensor) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    with (
        PretendedGpu() as gpu,
        mock.patch("headstart.attempt.Contract"),
        mock.patch("torch.Tensor.backward", backward),
        mock.patch.object(attempt.Attempt, "_sum_over_processes", return_value=1.0),
        mock.patch("torch.cuda.mem_get_info", return_value=(8 << 30, 8 << 30)),
    ):
        model.to(GPU)
        yield gpu


def source_of(kind: str, model: Classifier, photos: Path) -> FeatureSource | ActivationSource | PixelSource:
    """What feeds an epoch over the 16 pictures, on the pretended GPU."""
    pixels = Pixels(load_images(photos), model.spec, augment=ERASING, device=GPU)
    pixels._pool = Inline()  # type: ignore[assignment]
    labels = torch.tensor(pixels.table.labels)
    if kind == "pixels":
        return PixelSource(pixels)
    if kind == "features":
        return FeatureSource(torch.randn(16, 2, model.num_features), labels, GPU)
    found = cut_of(model)
    return ActivationSource(Stored(torch.zeros(32, *found.shape, device=GPU), False, torch.float32), labels, found)


def cut_of(model: Classifier) -> Cut:
    found = cut_or_reason(
        model.backbone, model.freeze_line.trained, example_shape=(3, 64, 64),
        forward=partial(backbone_output, pool=model.pool), kept_in_eval=model.kept_in_eval,
    )  # fmt: skip
    assert isinstance(found, Cut)
    return found


def resnet(line: str) -> Classifier:
    model = headstart.create_classifier("resnet18", ("a", "b"), weights="none", image_size=64)
    set_freeze_line(model, line, batchnorm="fixed")
    return model


@pytest.mark.parametrize(("kind", "line"), [("features", "head"), ("activations", "layer4*"), ("pixels", "all")])
def test_an_epoch_waits_for_nothing(kind: str, line: str, photos: Path) -> None:
    stage = replace(
        FINE_TUNE_STAGE, freeze_line=line, batch_size=6, clip_norm=1.0, class_weights="balanced", mixup=0.2, ema=0.9
    )
    model = resnet(line)
    with pretended(model) as gpu:
        source = source_of(kind, model, photos)
        run = attempt.Attempt(
            model, StageData(source, source), stage, lr=0.1, seed=0, runtime=Runtime(GPU, workers=1), portion=Portion()
        )
        gpu.waits.clear()  # what is set up once may wait
        run.epoch(1, pool=Inline(), after_step=lambda: None)  # type: ignore[arg-type]
        assert run.step == 3
        assert gpu.waits == []
        assert next(model.parameters()).device == GPU


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_frozen_pass_waits_for_nothing_and_its_rows_stay(photos: Path) -> None:
    model, how = resnet("layer4*"), Runtime(GPU, torch.bfloat16, workers=1)
    found = cut_of(model)
    with pretended(model) as gpu, mock.patch.object(once._Pass, "tried", return_value=None) as tried:
        pixels = Pixels(load_images(photos), model.spec, augment=ERASING, device=GPU)
        pixels._pool = Inline()  # type: ignore[assignment]
        gpu.waits.clear()
        inline, as_it_is = nullcontext(Inline()), nullcontext()  # fake weights cannot be laid out anew in place
        with (
            mock.patch("headstart.once.ThreadPoolExecutor", return_value=inline),
            mock.patch("headstart.once.fast_kernels", return_value=as_it_is),
        ):
            stored = store_activations(model, found, pixels, views=2, runtime=how)
        assert gpu.waits == []
    assert tried.call_args.args == ("folded", "folded")
    assert stored.rows.device == GPU
    assert stored.rows.shape[0] == 32


@pytest.mark.parametrize("pool", ["backbone", "avg"])
@pytest.mark.parametrize("kept", ["features", "activations"])
def test_a_frozen_pass_has_no_batchnorm_left(kept: str, pool: str, photos: Path) -> None:
    """With a runtime that thinks the CPU a GPU: there the pass runs a folded copy."""
    model = headstart.create_classifier(
        "resnet18", ("a", "b"), weights="none", image_size=64, head=HeadSpec(pool=pool)
    ).eval()
    set_freeze_line(model, "head" if kept == "features" else "layer4*", batchnorm="fixed")
    pixels, made = Pixels(load_images(photos), model.spec), []

    def watched(*args: Any, **options: Any) -> frozenpass.FrozenForward:
        made.append(frozenpass.frozen_forward(*args, **options))
        return made[-1]

    with mock.patch.object(Runtime, "gpu", CPU), mock.patch("headstart.once.frozen_forward", watched):
        how = Runtime(CPU, torch.bfloat16, workers=1)
        if kept == "features":
            found = store_features(model, pixels, runtime=how)[:, 0]
            own = model.features(pixels.batch(range(16), [0] * 16))
        else:
            found = store_activations(model, cut_of(model), pixels, runtime=how).take(torch.arange(16)).float()
            own = cut_of(model).prefix(model.enter(pixels.batch(range(16), [0] * 16)))
    assert [quick.folded for quick in made] == [20 if kept == "features" else 15]
    assert (found - own).norm() / own.norm() < frozenpass.TOLERANCES[torch.bfloat16]


def test_the_pretended_gpu_notices_what_waits() -> None:
    with PretendedGpu() as gpu:
        x = torch.ones(3).to(GPU)
        x.cpu()
        x.copy_(torch.zeros(3))
        assert len(gpu.waits) == 3
        torch.ones(3).to(GPU, non_blocking=True)
        x.copy_(torch.zeros(3), non_blocking=True)
        assert len(gpu.waits) == 3
        with pytest.raises(Exception, match="local_scalar"):
            float(x.sum())
        assert len(gpu.waits) == 4


# ---- recorded and compiled ------------------------------------------------------------------------------------------


class PretendedRecording(Recording):
    """CUDA's graphs as far as they are used: what ran while one was recorded runs again when it is replayed."""

    works: bool | str = True

    def __init__(self, call: Any, examples: Any) -> None:
        names = ("Stream", "current_stream", "stream", "device", "CUDAGraph", "graph")
        with ExitStack() as stack:
            cuda = {name: stack.enter_context(mock.patch(f"torch.cuda.{name}")) for name in names}
            super().__init__(call, examples)
        how = {"stream": cuda["Stream"].return_value, "capture_error_mode": "thread_local"}
        assert cuda["graph"].call_args.kwargs == how
        self.call, self.runs, self.graph.replay = call, 0, self.again

    def again(self) -> None:
        self.runs += 1
        if self.works:
            fresh = self.call(*self.inputs)
            with torch.no_grad():
                for here, now in zip(self.outputs, fresh, strict=True):
                    here.copy_(now if self.works is True or not now.dim() else 0 * now)

    def __call__(self, *inputs: Tensor) -> Any:
        with mock.patch("torch.cuda.device"):
            return super().__call__(*inputs)


def test_a_recorded_function_gives_what_the_function_gives() -> None:
    net = torch.nn.Linear(4, 2).requires_grad_(False)
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    with mock.patch("headstart.frozenpass.Recording", PretendedRecording):
        made = frozenpass._Recorded(net, first)
    one = made(first)
    assert torch.equal(made(second), net(second))
    assert torch.equal(one, net(first)), "the next replay has written over it"


def test_a_graph_that_gives_the_first_result_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretendedRecording, "works", False)
    with (
        mock.patch("headstart.frozenpass.Recording", PretendedRecording),
        pytest.raises(RuntimeError, match="another result"),
    ):
        frozenpass._Recorded(torch.nn.Linear(4, 2).requires_grad_(False), torch.randn(3, 4))


def test_where_memory_runs_out_a_compiled_function_is_left_and_takes_fewer_pictures() -> None:
    seen: list[int] = []

    class Small(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            if len(x) > 4:
                raise torch.OutOfMemoryError("no more than 4")
            return super().forward(x)

    with mock.patch("torch.compile", lambda module, **options: module):
        quick = frozenpass.frozen_forward(Small(3, 2), compiled=True, batch_size=8)
    out = in_portions(quick, torch.randn(8, 3), Portion(), doing="here")
    assert out.shape == (8, 2)
    assert seen == [8, 4, 4]
    assert not quick.compiled


def test_a_way_that_is_refused_leaves_no_smaller_batches_behind(photos: Path) -> None:
    model, how = resnet("layer4*"), Runtime(CPU, torch.bfloat16, workers=1)
    pixels = Pixels(load_images(photos), model.spec)

    def compiler(module: torch.nn.Module, **options: Any) -> Any:
        def fails(x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("never")

        return fails

    with mock.patch("torch.compile", compiler):
        store_activations(model, cut_of(model), pixels, runtime=replace(how, dtype=torch.float32, compile="on"))
    assert how.portion.size is None


def gradients_of(model: Classifier, source: ActivationSource, batch: gradients.Batch) -> tuple[list[Any], dict]:
    """With a runtime that thinks the CPU a GPU, and a compiler that was asked for."""
    runtime = Runtime(CPU, compile="on")
    with mock.patch.object(Runtime, "gpu", CPU):
        made = gradients.Gradients(model, source, FINE_TUNE_STAGE, runtime=runtime)
    model.train()
    model.zero_grad(set_to_none=True)
    made.add([batch], 4.0)
    return made.portion.take(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def fed() -> tuple[Classifier, ActivationSource, gradients.Batch]:
    torch.manual_seed(0)
    model = resnet("layer4*")
    found = cut_of(model)
    source = ActivationSource(Stored(torch.randn(8, *found.shape), False, torch.float32), torch.arange(8) % 2, found)
    return model, source, gradients.Batch(source.batch(range(4), [0] * 4), source.labels[:4])


def test_a_compiled_step_has_the_same_gradients(fed: tuple[Classifier, ActivationSource, gradients.Batch]) -> None:
    model, source, batch = fed
    shapes: list[Any] = []

    def compiler(function: Any, dynamic: bool) -> Any:
        return lambda model, x: shapes.append(x.shape) or function(model, x)

    with mock.patch("torch.compile", compiler):
        events, quick = gradients_of(model, source, batch)
    assert [event["kind"] for event in events] == ["compile"]
    assert shapes == [batch.inputs.shape]
    expected = gradients.Gradients(model, source, FINE_TUNE_STAGE, runtime=Runtime(CPU))
    model.zero_grad(set_to_none=True)
    expected.add([batch], 4.0)
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(own) == set(quick)
    assert all(torch.equal(own[name], quick[name]) for name in own)


def test_memory_is_measured_without_the_compiler_and_smaller_parts_are_compiled_anew(
    fed: tuple[Classifier, ActivationSource, gradients.Batch],
) -> None:
    model, source, batch = fed
    shapes: list[int] = []

    def compiler(function: Any, dynamic: bool) -> Any:
        def compiled(model: Classifier, x: torch.Tensor) -> torch.Tensor:
            shapes.append(len(x))
            if len(x) == 4:
                raise torch.OutOfMemoryError("4 are too many")
            return function(model, x)

        return compiled

    with mock.patch("torch.compile", compiler), mock.patch.object(Runtime, "gpu", CPU):
        made = gradients.Gradients(model, source, FINE_TUNE_STAGE, runtime=Runtime(CPU, compile="on"))
        made.step_bytes(2)
        assert shapes == []
        made.add([batch], 4.0)
    assert shapes == [4, 2, 2]


def test_a_compiler_that_fails_is_left(fed: tuple[Classifier, ActivationSource, gradients.Batch]) -> None:
    model, source, batch = fed

    def compiler(function: Any, dynamic: bool) -> Any:
        def fails(model: Classifier, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler\nat all")

        return fails

    with mock.patch("torch.compile", compiler):
        events, quick = gradients_of(model, source, batch)
    assert "runs as it is: compiled it failed (RuntimeError: no compiler)" in events[-1]["message"]
    assert quick


def test_a_step_is_compiled_from_a_number_of_pictures_on(
    fed: tuple[Classifier, ActivationSource, gradients.Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source, _ = fed
    pictures = 8 * FINE_TUNE_STAGE.epochs
    with mock.patch.object(Runtime, "gpu", CPU), mock.patch("torch.compile") as compiler:
        for least, dtype, compiled in (
            (pictures, torch.bfloat16, 1), (pictures + 1, torch.bfloat16, 0), (pictures, torch.float32, 0)
        ):  # fmt: skip
            compiler.reset_mock()
            monkeypatch.setattr(gradients, "COMPILED_FROM", least)
            gradients.Gradients(model, source, FINE_TUNE_STAGE, runtime=Runtime(CPU, dtype))
            assert compiler.call_count == compiled
    monkeypatch.setattr(gradients, "COMPILED_FROM", 0)
    with mock.patch("torch.compile") as compiler:  # on a CPU our own kernels run
        gradients.Gradients(model, source, FINE_TUNE_STAGE, runtime=Runtime(CPU, torch.bfloat16, compile="on"))
    assert not compiler.called


# ---- a recorded step ------------------------------------------------------------------------------------------------


RECORDED = replace(FINE_TUNE_STAGE, batch_size=4, epochs=60, class_weights=(1.0, 3.0), label_smoothing=0.1)


@pytest.fixture
def can_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CAN_RECORD", True)
    monkeypatch.setattr(gradients, "Recording", PretendedRecording)


def gradients_on(gpu: torch.device | None, model: Classifier, source: Any, stage: Stage) -> gradients.Gradients:
    with mock.patch.object(Runtime, "gpu", gpu):
        return gradients.Gradients(model, source, stage, runtime=Runtime(CPU))


def batches_of(source: ActivationSource, *, mixed: bool) -> list[gradients.Batch]:
    """Two of four pictures, and one of three."""
    found = []
    for rows in ([0, 1, 2, 3], [4, 5, 7, 1], [6, 2, 3]):
        n = len(rows)
        mix = gradients.Mix(torch.arange(n).roll(1), 0.3 + 0.1 * len(found)) if mixed else None
        found.append(gradients.Batch(source.batch(rows, [0] * n), source.labels[rows], mix))
    return found


@pytest.mark.usefixtures("can_record")
@pytest.mark.parametrize("mixed", [False, True])
def test_a_recorded_step_has_the_gradients_of_the_step(
    mixed: bool, fed: tuple[Classifier, ActivationSource, gradients.Batch]
) -> None:
    model, source, _ = fed
    model.train()
    found = []
    for gpu in (None, CPU):
        made, results = gradients_on(gpu, model, source, RECORDED), []
        for weight, batch in zip((4.0, 5.0, 3.0), batches_of(source, mixed=mixed), strict=True):
            model.zero_grad(set_to_none=True)
            loss = made.add([batch], weight)
            results += [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        found.append(results)
    assert made._recording.runs == 3, "once when it was tried, once for each whole batch"
    assert len(found[0]) == len(found[1]) > 15
    for own, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded, own, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("can_record")
@pytest.mark.parametrize("fails", ["wrong", "no gradients", "at once", "memory"])
def test_a_step_that_cannot_be_recorded_runs_as_it_is(
    fails: str, fed: tuple[Classifier, ActivationSource, gradients.Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source, _ = fed
    model.train()
    error = torch.OutOfMemoryError("full") if fails == "memory" else RuntimeError("not permitted when capturing")
    if fails in ("wrong", "no gradients"):
        monkeypatch.setattr(PretendedRecording, "works", False if fails == "wrong" else "loss alone")
    else:
        monkeypatch.setattr(gradients, "Recording", mock.Mock(side_effect=error))
    first = batches_of(source, mixed=False)[0]
    results, weight = [], 4e6  # gradients that are next to nothing beside the loss
    for gpu in (None, CPU):
        made, state = gradients_on(gpu, model, source, RECORDED), torch.get_rng_state()
        model.zero_grad(set_to_none=True)
        made.add([first], weight)
        results.append([weight * p.grad for p in model.parameters() if p.grad is not None])
        assert torch.equal(torch.get_rng_state(), state)
    assert made._recording is None
    assert not made._records
    (told,) = made.portion.events
    words = {"at once": "not permitted when capturing", "memory": "full"}.get(fails, "other gradients")
    assert told["kind"] == "record"
    assert words in told["message"]
    assert len(results[0]) > 5
    for own, now in zip(*results, strict=True):
        torch.testing.assert_close(now, own, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("can_record")
def test_what_is_not_recorded(fed: tuple[Classifier, ActivationSource, gradients.Batch]) -> None:
    model, source, _ = fed
    assert gradients_on(CPU, model, source, RECORDED)._records
    assert not gradients_on(None, model, source, RECORDED)._records
    for change in ({"epochs": 10}, {"accumulate": 2}, {"checkpointing": True}):
        assert not gradients_on(CPU, model, source, replace(RECORDED, **change))._records
    features = FeatureSource(torch.randn(8, 1, model.num_features), source.labels)
    assert not gradients_on(CPU, model, features, RECORDED)._records
    set_freeze_line(model, "layer4*", batchnorm="train")
    assert not gradients_on(CPU, model, source, RECORDED)._records
    set_freeze_line(model, "layer4*", batchnorm="fixed")
    assert gradients_on(CPU, model, source, RECORDED)._records
    hook = model.head.register_forward_hook(lambda module, given, out: None)
    assert not gradients_on(CPU, model, source, RECORDED)._records
    hook.remove()
    script = torch.fx.GraphModule(torch.nn.Module(), torch.fx.symbolic_trace(torch.nn.Identity()).graph)
    for odd in (torch.nn.BatchNorm1d(512, track_running_stats=False), type("Own", (torch.nn.Identity,), {})(), script):
        model.head = torch.nn.Sequential(odd, torch.nn.Linear(512, 2))
        model.keep_frozen()
        made = gradients_on(CPU, model, source, RECORDED)
        assert not made._records
        assert made._filled(3) == 3


def test_no_norm_of_any_kind_learns_from_filling() -> None:
    net = timm.create_model("resnet18", num_classes=0, norm_layer=EvoNorm2dB0)
    model = headstart.create_classifier(net, ("a", "b"), data_spec=DataSpec(64))
    for batchnorm, filled in (("fixed", 4), ("train", 3)):
        set_freeze_line(model, "all", batchnorm=batchnorm)
        model.train()
        source = FeatureSource(torch.randn(8, 1, model.num_features), torch.arange(8) % 2)
        with mock.patch.object(Runtime, "gpu", CPU):
            assert gradients.Gradients(model, source, RECORDED, runtime=Runtime(CPU))._filled(3) == filled


@pytest.mark.parametrize("name", ["mobilenetv2_100", "vit_tiny_patch16_224", "convnext_atto", "densenet121"])
def test_networks_of_timm_do_the_same_at_every_call(name: str) -> None:
    model = headstart.create_classifier(name, ("a", "b"), weights="none")
    set_freeze_line(model, "last:30%", batchnorm="fixed")
    assert is_stock(model)


@pytest.mark.usefixtures("can_record")
def test_recording_leaves_no_trace_in_the_model(fed: tuple[Classifier, ActivationSource, gradients.Batch]) -> None:
    model, source, batch = fed
    linear = next(module for module in model.head.modules() if isinstance(module, torch.nn.Linear))
    torch.nn.utils.parametrizations.spectral_norm(linear)  # has buffers that every pass in training mode changes
    model.train()
    start, ends = snapshot(model), []
    for gpu in (None, CPU):
        restore(model, start)
        made = gradients_on(gpu, model, source, RECORDED)
        model.zero_grad(set_to_none=True)
        made.add([batch], 4.0)
        assert made._records == (gpu is not None)
        ends.append([*snapshot(model).values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for own, recorded in zip(*ends, strict=True):
        torch.testing.assert_close(recorded, own, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("can_record")
def test_pictures_are_normalised_before_a_recorded_step(photos: Path) -> None:
    model = resnet("all")
    model.train()
    pixels = Pixels(load_images(photos), model.spec)
    made = gradients_on(CPU, model, PixelSource(pixels), RECORDED)
    batch = gradients.Batch(pixels.batch(range(4), [0] * 4), torch.tensor([0, 1, 0, 1]))
    with mock.patch.object(Classifier, "enter", autospec=True, side_effect=Classifier.enter) as enter:
        made.add([batch], 4.0)
    assert made._recording is not None
    assert enter.call_count == 1, "what sends numbers to the GPU cannot be recorded"
    assert made._recording.inputs[0].is_floating_point()


def test_each_process_fills_up_its_own_share(fed: tuple[Classifier, ActivationSource, gradients.Batch]) -> None:
    model, source, _ = fed
    with mock.patch.object(Runtime, "gpu", CPU):
        how = Runtime(CPU, world=2)
        made = gradients.Gradients(model, source, replace(FINE_TUNE_STAGE, batch_size=48), runtime=how)
        assert [made._filled(n) for n in (24, 23, 5)] == [24, 24, 8]


def test_what_is_halved_is_what_was_computed(fed: tuple[Classifier, ActivationSource, gradients.Batch]) -> None:
    model, source, batch = fed
    with mock.patch.object(Runtime, "gpu", CPU):
        stage = replace(FINE_TUNE_STAGE, batch_size=16)
        made = gradients.Gradients(model, source, stage, runtime=Runtime(CPU), portion=Portion(4))
        forward, seen = made._forward, []

        def small(model: Classifier, x: Tensor) -> Tensor:
            seen.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("no more than 2")
            return forward(model, x)

        made._forward = small
        five = gradients.Batch(torch.cat([batch.inputs, batch.inputs[:1]]), torch.tensor([0, 1, 0, 1, 0]))
        made.add([five], 5.0)
    assert seen == [4, 2, 2, 2]
    assert made.portion.size == 2


@pytest.mark.usefixtures("can_record")
def test_a_recording_gives_its_memory_back_where_memory_runs_out(
    fed: tuple[Classifier, ActivationSource, gradients.Batch],
) -> None:
    model, source, _ = fed
    model.train()
    made, (whole, _, short) = gradients_on(CPU, model, source, RECORDED), batches_of(source, mixed=False)
    made.add([whole], 4.0)
    assert made._recording is not None
    forward = made._forward

    def small(model: Classifier, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("no more than 2")
        return forward(model, x)

    made._forward = small
    model.zero_grad(set_to_none=True)
    made.add([short], 3.0)
    assert made._recording is None
    assert made.portion.size == 1

    made, seen = gradients_on(CPU, model, source, RECORDED), []
    made.add([whole], 4.0)
    made._forward = lambda model, x: seen.append(len(x)) or (small if len(seen) == 1 else forward)(model, x)
    model.zero_grad(set_to_none=True)
    made.add([short], 3.0)
    assert made._recording is None
    assert seen == [3, 3], "without it there is room"
    assert made.portion.size is None


# ---- few shapes -----------------------------------------------------------------------------------------------------


def test_short_batches_are_filled_up_to_few_sizes() -> None:
    with mock.patch.object(Runtime, "gpu", CPU):
        assert [Runtime(CPU).filled(n, 48) for n in (0, 1, 3, 31, 33, 48, 50)] == [0, 1, 4, 32, 48, 48, 50]
    assert [Runtime(CPU).filled(n, 48) for n in (1, 3, 31, 48)] == [1, 3, 31, 48]


def test_of_a_filled_batch_nothing_but_its_own_rows_comes_back() -> None:
    seen: list[Tensor] = []

    def compute(x: Tensor) -> Tensor:
        seen.append(x)
        if len(x) > 4:
            raise torch.OutOfMemoryError("no more than 4")
        return 2 * x

    x = torch.randn(5, 3)
    assert torch.equal(in_portions(compute, x, Portion(), doing="here", size=8), 2 * x)
    assert [len(one) for one in seen] == [8, 4, 4]
    assert torch.equal(seen[-1][1:], x[-1].expand(3, 3))


@pytest.mark.parametrize("at_once", [None, 2])
def test_a_filled_step_has_the_gradients_of_its_own_pictures(
    at_once: int | None, fed: tuple[Classifier, ActivationSource, gradients.Batch]
) -> None:
    model, source, batch = fed
    three = gradients.Batch(batch.inputs[:3], batch.labels[:3], gradients.Mix(torch.tensor([1, 2, 0]), 0.3))
    stage = replace(FINE_TUNE_STAGE, class_weights=(1.0, 3.0), batch_size=4)
    shapes, found = [], []
    for gpu in (None, CPU):
        with mock.patch.object(Runtime, "gpu", gpu):
            made = gradients.Gradients(model, source, stage, runtime=Runtime(CPU), portion=Portion(at_once))
            forward = made._forward
            made._forward = lambda model, x, forward=forward: shapes.append(len(x)) or forward(model, x)
            model.zero_grad(set_to_none=True)
            loss = made.add([three], 5.0)
        found.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert shapes == ([3, 4] if at_once is None else [2, 1, 2, 2])
    assert len(found[0]) == len(found[1]) > 5
    for own, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, own, rtol=1e-4, atol=1e-6)


def test_batchnorm_that_learns_learns_from_no_filling(photos: Path) -> None:
    model = headstart.create_classifier("resnet18", ("a", "b"), weights="none", image_size=64)
    set_freeze_line(model, "layer4*", batchnorm="train")
    model.train()
    pixels, shapes = Pixels(load_images(photos), model.spec), []
    with mock.patch.object(Runtime, "gpu", CPU):
        made = gradients.Gradients(model, PixelSource(pixels), FINE_TUNE_STAGE, runtime=Runtime(CPU))
        forward = made._forward
        made._forward = lambda model, x: shapes.append(len(x)) or forward(model, x)
        made.add([gradients.Batch(pixels.batch(range(3), [0] * 3), torch.tensor([0, 1, 0]))], 3.0)
    assert shapes == [3]


def test_few_shapes_go_through_a_network(photos: Path) -> None:
    model, shapes = resnet("layer4*").eval(), []

    class Counting(torch.nn.Conv2d):
        __module__ = "torch.nn"  # what is not PyTorch's, or has a hook, is not filled up

        def forward(self, x: Tensor) -> Tensor:
            shapes.append(len(x))
            return super().forward(x)

    model.backbone.conv1.__class__ = Counting
    pixels, how = Pixels(load_images(photos), model.spec), Runtime(CPU, workers=1)
    own = predict_logits(model, pixels, runtime=how)
    assert shapes == [16]
    found = cut_of(model)
    shapes.clear()
    with mock.patch.object(Runtime, "gpu", CPU), mock.patch.object(Runtime, "batch_size", 12):
        rows = store_activations(model, found, pixels, batch_size=12, runtime=how).take(torch.arange(16))
        assert shapes == [12, 4]
        source = ActivationSource(Stored(rows, False, torch.float32), torch.arange(16) % 2, found)
        eleven = source_logits(model, source, indices=torch.arange(11), runtime=how)
        torch.testing.assert_close(eleven, own[:11], rtol=1e-4, atol=1e-5)
        shapes.clear()
        torch.testing.assert_close(predict_logits(model, pixels, runtime=how), own, rtol=1e-4, atol=1e-5)
        few = pixels.table.select(range(11))
        predict_logits(model, Pixels(few, model.spec), runtime=how)
    assert shapes == [12, 4, 12]


# ---- a real one -----------------------------------------------------------------------------------------------------


on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def probs_of_a_fit(photos: Path, device: str, precision: str) -> np.ndarray:
    result = headstart.fine_tune(
        photos, backbone="resnet18", weights="none", device=device, precision=precision, cache=False,
        spec_overrides={"image_size": 64}, recipe=Recipe(stages=(HEAD_STAGE, replace(FINE_TUNE_STAGE, epochs=1))),
    )  # fmt: skip
    return headstart.evaluate(result.model.cpu(), result.splits.val).probs


@on_each
def test_a_fit_on_the_gpu_is_that_on_the_cpu_within_rounding(photos: Path, device: str) -> None:
    one, other = (probs_of_a_fit(photos, device, "fp32") for device in ("cpu", device))
    assert np.abs(one - other).max() < (0.05 if device == "cuda" else 1e-6)


@needs_gpu
def test_a_fit_by_default_on_the_gpu_is_near_that_in_float32(photos: Path) -> None:
    one, other = (probs_of_a_fit(photos, "cuda", precision) for precision in ("fp32", "auto"))
    assert np.abs(one - other).max() < 0.2


@needs_gpu
def test_views_drawn_on_the_gpu_are_those_drawn_on_the_cpu() -> None:
    how: dict[str, Any] = {"seed": 3, "indices": range(5), "views": [1, 2, 3, 4, 5]}
    there, here = (
        views_together([torch.from_numpy(one).to(device) for one in PICTURES], DataSpec(64), EVERYTHING, **how).cpu()
        for device in ("cuda", "cpu")
    )
    apart = (there.int() - here.int()).abs()
    assert (apart > 1).float().mean() < 0.01


@on_each
@pytest.mark.parametrize("kind", ["activations", "pixels"])
@pytest.mark.parametrize("recorded", [False, True])
def test_an_epoch_runs_where_waiting_is_an_error(
    recorded: bool, kind: str, device: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = torch.device(device)
    if recorded:
        monkeypatch.setattr(gradients, "_RECORDED_FROM", 0)
    model = resnet("layer4*" if kind == "activations" else "all").to(where)
    pixels = Pixels(load_images(photos), model.spec, augment=ERASING, device=Runtime(where).gpu)
    labels, source = torch.tensor(pixels.table.labels), PixelSource(pixels)
    if kind == "activations":
        found = cut_of(model)
        source = ActivationSource(
            Stored(torch.randn(32, *found.shape, device=where), False, torch.float32), labels, found
        )
    stage = replace(
        FINE_TUNE_STAGE, freeze_line=model.freeze_line.where, batch_size=8, clip_norm=1.0, mixup=0.2, ema=0.9
    )
    run = attempt.Attempt(
        model, StageData(source, source), stage, lr=0.1, seed=0, runtime=Runtime(where, workers=1), portion=Portion()
    )
    with ThreadPoolExecutor(1) as pool:
        run.epoch(1, pool=pool, after_step=lambda: None)  # libraries choose their kernels, pictures are sent
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with mock.patch.object(
                attempt.Attempt, "_sum_over_processes", return_value=1.0
            ):  # the one wait, at the end
                run.epoch(2, pool=pool, after_step=lambda: None)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert run.step == 4
    assert (run.gradients._recording is not None) == (recorded and device == "cuda" and gradients.CAN_RECORD)


@needs_gpu
@needs_recording
def test_what_cannot_be_recorded_leaves_the_stream_as_it_was() -> None:
    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum() > 0)

    before, x = torch.cuda.current_stream(), torch.ones(4, 3, device="cuda")
    quick = frozenpass.frozen_forward(Asks(), recorded=True)
    assert torch.equal(quick(x), x)
    assert quick._graph is None
    assert torch.cuda.current_stream() == before


@needs_gpu
@needs_recording
def test_recorded_kernels_give_what_the_network_gives() -> None:
    model, dtype = resnet("head").eval().to("cuda"), torch.bfloat16
    quick = frozenpass.frozen_forward(model.backbone, dtype=dtype, recorded=True)
    assert quick.folded == 20
    for seed in (0, 1):
        x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).cuda()
        own, got = model.backbone(x), quick(x).float()
        assert quick._graph is not None
        assert (got - own).norm() / own.norm() < frozenpass.TOLERANCES[dtype]


@needs_gpu
@needs_recording
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_recorded_on_the_gpu_has_the_gradients_of_the_step(dtype: torch.dtype) -> None:
    model = headstart.create_classifier(
        "resnet18", ("a", "b"), weights="none", image_size=64, drop_rate=0.3, drop_path_rate=0.1
    ).to("cuda")
    set_freeze_line(model, "layer4*", batchnorm="fixed")
    model.train()
    found = cut_of(model)
    rows = torch.randn(8, *found.shape, device="cuda", dtype=dtype)
    source = ActivationSource(Stored(rows, False, dtype), torch.arange(8) % 2, found)
    results = []
    for records in (False, True):
        made = gradients.Gradients(model, source, RECORDED, runtime=Runtime(torch.device("cuda"), dtype, compile="off"))
        made._records = records
        for seed, batch in enumerate(batches_of(source, mixed=True)):
            torch.manual_seed(seed)
            model.zero_grad(set_to_none=True)
            loss = made.add([batch], 4.0)
            results.append(
                torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])
            )
    assert made._recording is not None
    for own, recorded in zip(results[:3], results[3:], strict=True):
        assert (recorded - own).norm() < 1e-2 * own.norm()
