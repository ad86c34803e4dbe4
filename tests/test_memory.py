"""Memory that runs out halves what is computed at once, and nothing else changes; a batch size found by measuring."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from headstart import (
    HeadSpec,
    ImageTable,
    RecipeError,
    SetupError,
    Stage,
    attempt,
    create_classifier,
    load_images,
    make_runtime,
    set_freeze_line,
)
from headstart import gradients as gradients_room
from headstart.averaging import snapshot
from headstart.classifier import Classifier
from headstart.evaluation import source_logits
from headstart.features import FeatureSource, PixelSource, StageData, make_source
from headstart.gradients import Batch, Gradients
from headstart.memory import Portion, is_out_of_memory, peak_bytes
from headstart.numerics import keep_freed_memory
from headstart.once import store_features
from headstart.pixels import Pixels
from headstart.runtime import Runtime, free_memory_bytes
from headstart.train import fit
from tiny import SPEC, TinyNet


@pytest.fixture
def table(photos: Path) -> ImageTable:
    return load_images(photos)


def runtime() -> Runtime:
    return make_runtime(device="cpu", precision="fp32", workers=1)  # its portion is its own


def ask_for_too_much() -> None:
    """What the CPU allocator really raises."""
    torch.empty(1 << 60, dtype=torch.uint8)


class _HungryBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int) -> Tensor:
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if len(grad) > ctx.most:
            ask_for_too_much()
        return grad, None


class Hungry(nn.Module):
    """Two layers; more pictures than `most` at once are too many for it, forward or (between the layers) backward."""

    def __init__(self, most: int, *, backward: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 3, dtype=dtype)
        self.most, self.in_backward = most, backward
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return self.last(self.first(x))
        if torch.is_grad_enabled():
            self.sizes.append(len(x))
        if len(x) > self.most and not self.in_backward:
            ask_for_too_much()
        x = self.first(x)
        return self.last(_HungryBackward.apply(x, self.most) if self.in_backward else x)


def features(n: int, seed: int) -> FeatureSource:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return FeatureSource(torch.eye(3, 8)[labels][:, None] + 0.3 * torch.randn(n, 1, 8, generator=g), labels)


DATA = StageData(features(53, 0), features(9, 1))
STAGE = Stage(epochs=2, batch_size=16, optimizer="sgd", weight_decay=0.0, class_weights="balanced", schedule="constant")


def trained(head: Hungry, stage: Stage) -> tuple[Classifier, list[dict[str, Any]], list[Tensor]]:
    model = create_classifier(TinyNet(), ["a", "b", "c"], head=head, data_spec=SPEC)
    set_freeze_line(model, "head")
    after: list[Tensor] = []
    result = fit(
        model, DATA, stage, lr=0.1, runtime=runtime(),
        report=lambda _: after.append(torch.cat([p.detach().flatten() for p in head.parameters()])),
    )  # fmt: skip
    return model, result.events, after


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("stage", [STAGE, replace(STAGE, batch_size=8, accumulate=2), replace(STAGE, mixup=0.4)])
def test_a_step_that_ran_out_of_memory_ends_where_one_that_did_not_ends(stage: Stage, backward: bool) -> None:
    plenty = trained(Hungry(1000), stage)
    head = Hungry(5, backward=backward)
    scarce = trained(head, stage)
    assert len(plenty[2]) == len(scarce[2])  # the optimiser takes the same steps
    for one, other in zip(plenty[2], scarce[2], strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert plenty[1] == []
    assert [event["kind"] for event in scarce[1]] == ["out-of-memory"]
    assert scarce[1][0]["at_once"] == 4
    assert "4 pictures at once from now on" in scarce[1][0]["message"]
    assert max(head.sizes[-8:]) <= 5  # the next batches do not run into the wall again


def test_memory_that_is_short_for_one_picture_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(SetupError, match=r"Out of memory in stage 'head', with 1 picture at once.*--image-size"):
        trained(Hungry(0, backward=True), STAGE)


def test_an_error_that_is_not_about_memory_is_raised_as_it_is() -> None:
    class Broken(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if input.is_meta or not torch.is_grad_enabled():
                return super().forward(input)
            raise RuntimeError("shape mismatch")

    model = create_classifier(TinyNet(), ["a", "b", "c"], head=Broken(8, 3), data_spec=SPEC)
    set_freeze_line(model, "head")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fit(model, DATA, STAGE, lr=0.1, runtime=runtime())


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as found:
        ask_for_too_much()
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN's
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for the inner product primitive"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory cards"))


def test_scoring_and_the_frozen_pass_go_on_in_smaller_parts(
    table: ImageTable, capsys: pytest.CaptureFixture[str]
) -> None:
    class HungryNet(TinyNet):
        most = 1000

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.most:
                ask_for_too_much()
            return super().forward(x)

    net = HungryNet()
    model = create_classifier(net, table.class_names, head=None, data_spec=SPEC)
    set_freeze_line(model, "head")
    pixels = Pixels(table, SPEC, workers=1)
    whole = store_features(model, pixels, runtime=runtime())
    net.most = 3
    how = runtime()
    assert torch.allclose(store_features(model, pixels, runtime=how), whole, atol=1e-6)
    assert how.portion.size is not None
    assert how.portion.size <= 3
    told = capsys.readouterr().err
    assert told.count("Out of memory in the frozen layers") >= 1
    scores = source_logits(model, features(20, 3), indices=torch.arange(20), runtime=how)
    assert scores.shape == (20, len(table.class_names))
    assert capsys.readouterr().err == ""  # what was learned once is not tried again


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_what_the_shell_allows_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits: dict[int, int] = {}
    monkeypatch.setattr("resource.getrlimit", lambda of: (limits.get(of, resource.RLIM_INFINITY), -1))
    for of, taken in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        if hasattr(psutil.Process().memory_info(), taken):
            limits = {of: getattr(psutil.Process().memory_info(), taken) + 10**9}
            assert 0 < free_memory_bytes() <= 10**9
            limits = {of: 10**6}
            assert free_memory_bytes() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_goes_back_where_the_shell_limits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    asked: list[int] = []
    libc = SimpleNamespace(mallopt=lambda option, value: asked.append(option) or 1)
    monkeypatch.setattr("ctypes.CDLL", lambda name: libc)
    limited: set[int] = set()
    monkeypatch.setattr("resource.getrlimit", lambda of: (10**9 if of in limited else resource.RLIM_INFINITY, -1))
    assert keep_freed_memory()
    assert asked == [-4, -1]
    for of in (resource.RLIMIT_AS, resource.RLIMIT_DATA):  # where a smaller batch could have none any more
        limited = {of}
        assert not keep_freed_memory()
    assert asked == [-4, -1]


def test_files_that_a_container_has_read_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.runtime._CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=9_000))
    assert free_memory_bytes() == 9_000
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4900\n")
    (tmp_path / "memory.stat").write_text("anon 900\nfile 4000\ninactive_file 3000\nactive_file 500\n")
    assert free_memory_bytes() == 5000 - 4900 + 3500


def test_parts_are_equal_and_none_is_smaller_than_the_least() -> None:
    assert Portion().parts(33) == [33]
    assert Portion(16).parts(33) == [11, 11, 11]
    assert Portion(2, least=2).parts(5) == [3, 2]
    assert Portion(2, least=2).parts(3) == [3]
    assert Portion(4).parts(0) == [0]
    assert all(sum(Portion(k).parts(n)) == n for k in range(1, 7) for n in range(1, 20))


def test_batchnorm_that_learns_is_never_given_one_picture() -> None:
    portion = Portion(least=2)
    portion.halve(5, MemoryError("no more"), doing="here")
    assert portion.parts(5) == [3, 2]
    with pytest.raises(SetupError, match="with 3 pictures at once"):
        portion.halve(3, MemoryError(), doing="here")  # Python's own says nothing


def test_the_peak_of_a_computation_is_that_of_its_tensors() -> None:
    def compute() -> None:
        a = torch.zeros(1000, dtype=torch.uint8)
        del a
        b, c = torch.zeros(3000, dtype=torch.uint8), torch.zeros(4000, dtype=torch.uint8)
        b[:5] = c[:5]  # a view is no memory of its own

    assert peak_bytes(compute, torch.device("cpu")) == 7000


def pixel_gradients(table: ImageTable, stage: Stage) -> Gradients:
    model = create_classifier(TinyNet(dropout=0.1), table.class_names, head=HeadSpec(batchnorm=True), data_spec=SPEC)
    set_freeze_line(model, "all", batchnorm="train")
    return Gradients(model, PixelSource(Pixels(table, SPEC, workers=1)), stage, runtime=runtime())


AUTO = Stage(name="all", freeze_line="all", batchnorm="train", batch_size="auto")


class HungryInTraining(TinyNet):
    """More than three pictures at once are too many for a step of it."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 3 and torch.is_grad_enabled():
            ask_for_too_much()
        return super().forward(x)


@pytest.mark.parametrize("measured", ["size", "format"])
def test_a_measured_step_that_runs_out_of_memory_is_halved(table: ImageTable, measured: str) -> None:
    model = create_classifier(HungryInTraining(), table.class_names, head=None, data_spec=SPEC)
    set_freeze_line(model, "all")
    how = replace(runtime(), dtype=torch.bfloat16, times_formats=True) if measured == "format" else runtime()
    stage = Stage(freeze_line="all", batch_size=8)
    gradients = Gradients(model, PixelSource(Pixels(table, SPEC, workers=1)), stage, runtime=how)
    if measured == "format":
        gradients.keep_quicker_format()
    else:
        gradients.fit_to_memory()
    assert gradients.portion.size == 2
    kinds = dict.fromkeys(event["kind"] for event in gradients.portion.take())
    assert list(kinds) == ["out-of-memory", *(["precision"] if measured == "format" else [])]
    assert all(p.grad is None for p in model.parameters())


def test_measuring_a_step_changes_nothing_and_grows_with_the_pictures(table: ImageTable) -> None:
    gradients = pixel_gradients(table, AUTO)
    before, random = snapshot(gradients.model), torch.get_rng_state()
    two, four, eight = (gradients.step_bytes(n) for n in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.05)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(gradients.model).items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in gradients.model.parameters())


@pytest.mark.parametrize(
    ("bf16", "chosen", "turns"),
    [
        (0.5, torch.bfloat16, 2),
        (0.8, torch.bfloat16, 3),
        (0.95, torch.float32, 3),
        (3.0, torch.float32, 2),
    ],
)
def test_a_step_is_computed_in_the_format_that_measures_quicker(
    table: ImageTable, monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: torch.dtype, turns: int
) -> None:
    gradients = pixel_gradients(table, AUTO)
    before, formats = snapshot(gradients.model), []

    def seconds(once: Callable[[], object]) -> float:
        once()
        formats.append(gradients.runtime.dtype)
        return bf16 if formats[-1] == torch.bfloat16 else 1.0

    monkeypatch.setattr("headstart.gradients._seconds", seconds)
    asked = replace(runtime(), dtype=torch.bfloat16)
    gradients.runtime = asked
    gradients.keep_quicker_format()
    assert (gradients.runtime, formats) == (asked, [])  # the user has said which
    gradients.runtime = replace(asked, times_formats=True)
    gradients.keep_quicker_format()
    assert gradients.runtime.dtype == chosen
    assert formats == [torch.bfloat16, torch.float32] * turns  # times far apart are not taken a third time
    name = str(chosen).removeprefix("torch.")
    assert gradients.portion.take()[0]["message"].startswith(f"Trained in {name}: a step of")
    assert all(torch.equal(value, before[name]) for name, value in snapshot(gradients.model).items())


def test_time_in_which_others_have_the_processor_is_not_counted() -> None:
    assert gradients_room._seconds(lambda: time.sleep(0.2)) < 0.1
    began = time.process_time()
    assert gradients_room._seconds(lambda: [0 for _ in iter(lambda: time.process_time() - began < 0.1, False)]) > 0.09


def test_a_stage_goes_on_in_the_format_that_was_chosen(table: ImageTable, monkeypatch: pytest.MonkeyPatch) -> None:
    formats, scored = [], []
    own, own_score = Gradients._backward, attempt.score

    def backward(self: Gradients, *given: Any) -> Tensor:
        formats.append(self.runtime.dtype)
        return own(self, *given)

    def score(*given: Any, runtime: Runtime, **how: Any) -> Any:
        scored.append(runtime.dtype)
        return own_score(*given, runtime=runtime, **how)

    monkeypatch.setattr("headstart.gradients._seconds", lambda once: float(once() is not None))
    monkeypatch.setattr(Gradients, "_backward", backward)
    monkeypatch.setattr(attempt, "score", score)
    model = create_classifier("resnet18", table.class_names, weights="none", image_size=32)
    set_freeze_line(model, "layer4*")
    how = replace(runtime(), dtype=torch.bfloat16, times_formats=True)
    pixels = Pixels(table, model.spec, workers=1)
    data = make_source(pixels, pixels, model, views=1, runtime=how)
    assert data.train.batch([0], [0]).dtype == torch.bfloat16  # what the frozen layers have made
    stage = Stage(name="last", freeze_line="layer4*", epochs=1, batch_size=8)
    result = fit(model, data, stage, lr=0.01, runtime=how)
    assert formats[:6] == [torch.bfloat16, torch.float32] * 3
    assert set(formats[6:]) == {torch.float32}
    assert set(scored) == {torch.float32}
    assert result.events[0]["kind"] == "precision"


def test_auto_takes_the_largest_power_of_two_that_memory_holds(table: ImageTable) -> None:
    gradients = pixel_gradients(table, AUTO)
    each = (gradients.step_bytes(4) - gradients.step_bytes(2)) // 2
    gradients.fit_to_memory(10**12)
    assert gradients.portion.size is None  # the whole batch
    base = gradients.step_bytes(2) - 2 * each + 10**4  # with what Adam keeps
    gradients.fit_to_memory(int((base + 9 * each) / 0.6))
    assert gradients.portion.size == 8
    gradients.fit_to_memory(0)
    assert gradients.portion.size == 1
    assert [event["kind"] for event in gradients.portion.take()] == ["batch-size"] * 3


def test_auto_is_one_batch_per_optimiser_step() -> None:
    assert replace(AUTO, accumulate=3).batch_pictures == 96
    assert replace(AUTO, freeze_line="head").batch_pictures == 64
    assert Stage(batch_size=7, accumulate=3).batch_pictures == 7
    with pytest.raises(RecipeError, match=r"batch_size is 'atuo'; it takes a whole number or auto"):
        replace(AUTO, batch_size="atuo")
    found = fit(create_and_freeze(), DATA, Stage(epochs=1, batch_size="auto", accumulate=2), lr=0.1, runtime=runtime())
    assert (found.stage.batch_size, found.stage.accumulate) == (128, 1)


def create_and_freeze() -> Classifier:
    model = create_classifier(TinyNet(), ["a", "b", "c"], data_spec=SPEC)
    set_freeze_line(model, "head")
    return model


def test_gradients_in_parts_are_those_of_the_whole_in_float64() -> None:
    g = torch.Generator().manual_seed(3)
    x, labels = torch.randn(11, 1, 8, generator=g), torch.arange(11) % 3
    found = []
    for size in (None, 4, 1):
        model = create_classifier(TinyNet(), ["a", "b", "c"], head=Hungry(99), data_spec=SPEC)
        set_freeze_line(model, "head")
        gradients = Gradients(model, FeatureSource(x, labels), STAGE, runtime=runtime(), portion=Portion(size))
        total = gradients.add([Batch(x[:, 0], labels)], 11.0)
        found.append(
            (float(total), torch.cat([p.grad.flatten() for p in model.head.parameters() if p.grad is not None]))
        )
    for total, grad in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-6)
        assert torch.allclose(grad, found[0][1], atol=1e-7)
