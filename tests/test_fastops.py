"""Faster kernels: same results and gradients as the stock ones, same keys, and everything can be undone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headstart import fastconv, fastops, numerics
from headstart.fastconv import Convolution, InPlaceReLU6, depthwise_grad_input, pointwise_gradients
from headstart.fastops import (
    fast_gradients,
    fast_squeeze_excite,
    fast_training,
    fuse_fixed_batchnorm,
)
from headstart.frozenpass import FrozenForward, frozen_forward
from headstart.fxtrace import trace
from headstart.numerics import bf16_errors, bf16_works


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    grad = draw(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return Convolution.apply(x, weight, bias, (stride, stride), (padding, padding), (1, 1), len(weight), None)  # type: ignore[no-any-return, no-untyped-call]


CASES = [(k, s, p, size) for k in (3, 5, 7) for s in (1, 2) for p in (k // 2, 0, 1) for size in ((9, 12), (11, 11))]


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CASES)
def test_depthwise_gradients_in_float64(kernel: int, stride: int, padding: int, size: tuple[int, int]) -> None:
    x, weight, bias = draw(3, 4, *size), draw(4, 1, kernel, kernel, seed=1), draw(4, seed=2)
    ours = gradients(lambda a, w, b: depthwise(a, w, b, stride, padding), x, weight, bias)
    stock = gradients(lambda a, w, b: F.conv2d(a, w, b, stride, padding, 1, 4), x, weight, bias)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (12, 7)])
@pytest.mark.parametrize("chunk", [1, 1 << 30])
def test_grad_input_by_transposed_convolution(
    kernel: int, size: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastconv, "_CHUNK_BYTES", chunk)
    x, weight, padding = draw(3, 4, *size), draw(4, 1, kernel, kernel, seed=1), kernel // 2
    out, grad_x = gradients(lambda a: F.conv2d(a, weight, None, 2, padding, 1, 4), x)
    grad = draw(*out.shape, seed=9)
    found = depthwise_grad_input(grad, x, weight, stride=(2, 2), padding=(padding, padding))
    torch.testing.assert_close(found, grad_x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 1), (5, 2), (7, 1)])
def test_depthwise_gradients_in_low_precision(dtype: torch.dtype, kernel: int, stride: int) -> None:
    x, weight = draw(4, 32, 14, 14).to(dtype), draw(32, 1, kernel, kernel, seed=1).to(dtype)
    padding = kernel // 2
    ours = gradients(lambda a, w: depthwise(a, w, None, stride, padding), x, weight)
    exact = gradients(lambda a, w: F.conv2d(a, w, None, stride, padding, 1, 32), x.double(), weight.double())
    stock = gradients(lambda a, w: F.conv2d(a, w, None, stride, padding, 1, 32), x, weight)
    assert torch.equal(ours[0], stock[0]), "the forward is the stock one"
    for a, b, c in zip(ours, exact, stock, strict=True):
        assert a.dtype == dtype
        # A CPU that does not compute in bfloat16 itself sums in it: there the stock gradients are not better.
        assert relative(a, b) < (1e-6 if dtype == torch.float32 else max(5e-3, 1.01 * relative(c, b)))


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f", (True, True)),
        ("vendor_id : AuthenticAMD\nflags : avx2", (False, True)),
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f", (False, False)),
        ("CPU architecture: 8", (False, False)),
    ],
)
def test_where_products_pay(cpu: str, expected: tuple[bool, bool], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(cpu)
    with (
        mock.patch("headstart.fastconv.Path", return_value=tmp_path / "cpuinfo"),
        mock.patch("torch.backends.mkl.is_available", return_value=True),
    ):
        assert fastconv.products_pay.__wrapped__() == expected


@pytest.mark.parametrize(("d", "c"), [(3, 8), (8, 3), (5, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_gradients_in_float64(d: int, c: int, bias: bool) -> None:
    x, weight, grad = draw(2, d, 5, 7), draw(c, d, 1, 1, seed=1), draw(2, c, 5, 7, seed=2)
    ours = pointwise_gradients(grad, x, weight, True, True, bias)
    stock = torch.ops.aten.convolution_backward(
        grad, x, weight, [c], (1, 1), (0, 0), (1, 1), False, [0, 0], 1, [True, True, bias]
    )
    for a, b in zip(ours, stock, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert pointwise_gradients(grad, x, weight, False, False, False) == (None, None, None)


@pytest.mark.parametrize("pays", [(True, True), (False, True), (False, False)])
def test_pointwise_gradients_are_products_where_those_pay(
    pays: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(fastconv, "products_pay", lambda: pays)
    monkeypatch.setattr(fastops, "products_pay", lambda: pays)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 9, 1, bias=False), nn.Conv2d(9, 6, 1, stride=2))
    x = draw(4, 3, 9, 11, dtype=torch.float32)
    stock = net_gradients(net, x)
    with fast_gradients(net) as done:
        assert done.converted == (2 if any(pays) else 0)
        with (
            Calls() as calls,
            mock.patch("headstart.fastconv.pointwise_gradients", wraps=pointwise_gradients) as products,
        ):
            ours = net_gradients(net, x)
        assert calls.count["convolution_backward"] == (1 if all(pays) else 3)
        assert [call.args[3:] for call in products.mock_calls] == (
            [(pays[0], True, False), (pays[0], True, True)] if any(pays) else []
        )
        for a, b in zip(ours, stock, strict=True):
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize(("d", "stride", "bias"), [(1, 2, True), (3, 2, False), (7, (1, 3), True)])
def test_weights_of_few_channels_and_a_stride_are_never_left_to_the_kernel_that_damages_memory(
    d: int, stride: Any, bias: bool
) -> None:
    """Run by stock operations on a CPU with AVX2 and no AVX-512, this test would take the process with it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(d, 8, 1, stride=stride, bias=bias)
    x = draw(4, d, 17, 20, dtype=torch.float32)
    exact = copy.deepcopy(conv).double()
    exact(x.double().contiguous()).square().sum().backward()
    with (
        fast_gradients(conv.to(memory_format=torch.channels_last)) as done,
        mock.patch("headstart.fastconv._backward", wraps=fastconv._backward) as stock,
    ):
        assert done.converted == 1
        x.requires_grad_()
        conv(x).square().sum().backward()
    assert [call.args[-1] for call in stock.mock_calls] == [[True, False, False]]
    for own, other in zip(conv.parameters(), exact.parameters(), strict=True):
        assert relative(own.grad, other.grad) < 1e-5


class Block(nn.Module):
    """Convolutions of every kind that is, or is not, to be converted."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.same = Conv2dSame(8, 8, 5, stride=2, groups=8)
        self.plain = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8)
        self.worded = nn.Conv2d(8, 8, 5, padding="same", groups=8)
        self.reflect = nn.Conv2d(8, 8, 5, padding=2, groups=8, padding_mode="reflect")
        self.dense = nn.Conv2d(8, 8, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def net_gradients(net: nn.Module, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    net.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net(leaf)
    out.square().mean().backward()
    assert leaf.grad is not None
    return [out.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def test_conversion_keeps_keys_and_results_and_can_be_undone() -> None:
    torch.manual_seed(0)
    net, x = Block().double(), draw(2, 8, 29, 31)
    stock, keys, classes = net_gradients(net, x), list(net.state_dict()), [type(m) for m in net.modules()]
    with fast_gradients(net) as done:
        assert done.converted == 3
        assert isinstance(net.same, fastops.FastConv2dSame)
        assert type(net.dilated) is type(net.plain) is type(net.worded) is nn.Conv2d
        assert list(net.state_dict()) == keys
        for a, b in zip(net_gradients(net, x), stock, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        twin = copy.deepcopy(net)
    assert [type(m) for m in net.modules()] == classes
    for a, b in zip(net_gradients(twin, x), stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_converted_under_autocast() -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16)),
        draw(4, 16, 14, 14, dtype=torch.float32),
    )
    exact = net_gradients(copy.deepcopy(net).double(), x.double())
    with fast_gradients(net):
        ours = net_gradients(net, x, autocast=True)
    assert ours[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in ours[1:])
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b) < 1e-2


def spread_norms(net: nn.Module) -> nn.Module:
    """Statistics and affine parts that are not the identity, in eval mode."""
    generator = torch.Generator().manual_seed(3)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        with torch.no_grad():
            norm.running_mean.normal_(generator=generator).mul_(0.3)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2.0, generator=generator)  # type: ignore[union-attr]
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(generator=generator).mul_(0.3)
        norm.eval()
    return net


FUSED_NORMS = ("_FusedNorm", "_FusedNormAct")
NETS = ("mobilenetv3_small_100", "tf_efficientnet_b0", "resnet18")


@pytest.fixture(scope="module", params=NETS)
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return spread_norms(timm.create_model(request.param, num_classes=0).double().eval())


def test_fused_fixed_batchnorm_in_float64(backbone: nn.Module) -> None:
    x = draw(2, 3, 40, 40)
    stock, keys, classes = (
        net_gradients(backbone, x),
        list(backbone.state_dict()),
        [type(m) for m in backbone.modules()],
    )
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    with fuse_fixed_batchnorm(backbone) as done:
        fused = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d) and m.__class__.__name__ in FUSED_NORMS]
        assert done.converted >= len(fused) == norms > 10
        assert list(backbone.state_dict()) == keys
        for a, b in zip(net_gradients(backbone, x), stock, strict=True):
            assert relative(a, b) < 1e-9 or float(b.norm()) < 1e-12
    assert [type(m) for m in backbone.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(net_gradients(backbone, x), stock, strict=True))


def test_everything_for_training_together(backbone: nn.Module) -> None:
    x = draw(2, 3, 40, 40)
    stock, classes = net_gradients(backbone, x), [type(m) for m in backbone.modules()]
    with fast_training(backbone):
        for a, b in zip(net_gradients(backbone, x), stock, strict=True):
            assert relative(a, b) < 1e-9 or float(b.norm()) < 1e-12
    assert [type(m) for m in backbone.modules()] == classes


class Pair(nn.Module):
    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=True)
        self.norm = BatchNormAct2d(6, act_layer=nn.SiLU)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y if self.shared else self.norm(y)


def test_norm_in_training_mode_is_not_fused() -> None:
    torch.manual_seed(0)
    net, x = spread_norms(Pair().double()), draw(4, 3, 8, 8)
    net.norm.train()
    twin = copy.deepcopy(net)
    stock = net_gradients(twin, x)
    with fuse_fixed_batchnorm(net) as done:
        assert done.converted == 1
        ours = net_gradients(net, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    assert torch.equal(net.norm.running_mean, twin.norm.running_mean)
    assert net.norm.num_batches_tracked == 1
    assert net.norm.act.inplace


def test_relu6_in_place_copies_nothing_and_has_the_stock_gradient() -> None:
    x = torch.cat([draw(2, 3, 4, 4, dtype=torch.float32) * 5, torch.tensor([0.0, 6.0]).expand(2, 3, 4, 2)], dim=3)
    for a, b in zip(
        gradients(lambda t: InPlaceReLU6.apply(t * 1), x), gradients(lambda t: F.relu6(t * 1), x), strict=True
    ):
        assert torch.equal(a, b)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), BatchNormAct2d(6, act_layer=nn.ReLU6), nn.Conv2d(6, 2, 1)).eval()
    found = []
    fastconv.activations_fuse(torch.float32)  # its own trial copies, once in a process
    for fused in (False, True):
        with fuse_fixed_batchnorm(net) if fused else nullcontext(), Calls() as calls:
            net(x).sum().backward()
        found.append(calls.count["clone"])
    assert found == [1, 0]


def test_convolution_that_others_read_is_not_fused() -> None:
    with fuse_fixed_batchnorm(Pair(shared=True).eval()) as done:
        assert done.converted == 0


class Chains(nn.Module):
    """A convolution, a norm and an activation in each way in which networks write them."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), BatchNormAct2d(16, act_layer=act))
        self.conv, self.norm, self.drop, self.act = nn.Conv2d(16, 16, 3, 2), nn.BatchNorm2d(16), nn.Identity(), act()
        self.depthwise, self.bare = nn.Conv2d(16, 16, 5, 2, groups=16), act()
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.drop(self.norm(self.conv(self.inside(x)))))
        return self.last(self.bare(self.depthwise(x)))  # type: ignore[no-any-return]


class Calls(TorchDispatchMode):
    """Counts the operations that are run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_convolutions_do_the_activation_after_them(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    fastconv.activations_fuse(torch.float32)  # its own trials, once in a process, are none of the calls below
    net, x = spread_norms(Chains(act)), draw(4, 3, 29, 31, dtype=torch.float32) * 3
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stock, classes = net_gradients(net, x), [type(m) for m in net.modules()]
    keeps_result = act in (nn.ReLU, nn.ReLU6)
    with fuse_fixed_batchnorm(net) as done:
        assert done.converted == 4  # three chains, in one of them a norm and an activation
        with torch.no_grad(), Calls() as calls:
            assert relative(net(x), stock[0]) < 1e-6
        assert calls.count["_convolution_pointwise"] == 3
        assert not calls.count.keys() & {"relu", "relu_", "hardtanh", "hardtanh_", "silu", "silu_", "hardswish"}
        with Calls() as calls:
            ours = net_gradients(net, x)
        assert calls.count["_convolution_pointwise"] == 3 * keeps_result
        for a, b in zip(ours, stock, strict=True):
            assert relative(a, b) < 1e-5
        net.norm.train()  # then the activation is none of the convolution's business
        twin = copy.deepcopy(net)
        fastops.restore_stock(twin)
        with torch.no_grad():
            assert relative(net(x), twin(x)) < 1e-6
        assert [type(m) for m in twin.modules()] == classes
        net.norm.eval()
    assert [type(m) for m in net.modules()] == classes
    assert not any({"stock", "norm", "act", "done"} & vars(m).keys() for m in net.modules())


class Changed(nn.Module):
    """What ReLU6 gives is changed in place, in each way in which it can be; ReLU's may not be, in stock PyTorch."""

    def __init__(self, norm: nn.Module, how: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), norm
        self.act = nn.Identity() if isinstance(norm, BatchNormAct2d) else nn.ReLU6()
        self.passing, self.drop, self.last = nn.Identity(), nn.Dropout(0.5, inplace=True), nn.Conv2d(6, 4, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        if self.how == "operator":
            y *= 2
        elif self.how == "method":
            y.add_(1)
        elif self.how == "module":
            y = self.drop(y)
        elif self.how == "function":
            y = F.relu6(y, inplace=True)
        elif self.how == "underscore":
            y = torch.relu_(y)
        elif self.how == "flag in its place":
            y = F.leaky_relu(y, 0.1, True)
        elif self.how == "item":
            y[:, :2] = 0.5
        elif self.how == "copy that is none":
            y = y.contiguous().mul_(2.0)
        elif self.how == "part":
            y.narrow(1, 0, 2).mul_(0.5)
        elif self.how == "view":
            z = y.permute(0, 2, 3, 1)  # shares its memory whatever its layout
            z *= 2
        else:
            y = self.passing(y)
            y += 1
        return self.last(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", [
    "operator", "method", "module", "function", "underscore", "flag in its place", "item", "copy that is none", "part",
    "view", "passed on",
])  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_relu6_whose_result_is_changed_in_place_trains(inside: bool, how: str) -> None:
    norm = BatchNormAct2d(6, act_layer=nn.ReLU6) if inside else nn.BatchNorm2d(6)
    net, x = spread_norms(Changed(norm, how)), draw(4, 3, 9, 9, dtype=torch.float32)
    net.drop.train()
    torch.manual_seed(0)
    expected = net_gradients(copy.deepcopy(net), x)
    with fastops.fast_training(net):
        torch.manual_seed(0)
        ours = net_gradients(net, x)
    for a, b in zip(ours, expected, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), BatchNormAct2d(3, apply_act=False)])
def test_what_is_added_to_a_norm_in_place_leaves_it_fused(norm: nn.Module) -> None:
    class Residual(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            y += x
            return y  # type: ignore[no-any-return]

    net = Residual()
    net.conv, net.norm = nn.Conv2d(3, 3, 1), norm
    with fuse_fixed_batchnorm(net.eval()) as done:
        assert done.converted == 1


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_convolutions_do_the_activation_in_bfloat16_with_the_same_bits(
    act: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both are asked here: at the first time an answer is tried out, whose operations would be counted below.
    if not all(fastconv.activations_fuse(dtype) for dtype in (torch.bfloat16, torch.float32)):
        pytest.skip("no convolution in bfloat16 here that does its activation")
    torch.manual_seed(0)
    net, x = spread_norms(Chains(act)), draw(4, 3, 29, 31, dtype=torch.float32) * 3
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stock, keeps_result = net_gradients(net, x), act in (nn.ReLU, nn.ReLU6)
    results = []
    for fuses in (True, False):
        if not fuses:
            monkeypatch.setattr(fastconv, "activations_fuse", lambda dtype: False)
        with fuse_fixed_batchnorm(net), torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad(), Calls() as calls:
                plain = net(x)
            assert calls.count["_convolution_pointwise"] == 3 * fuses
            with Calls() as calls:
                results.append([plain, *net_gradients(net, x)])
            assert calls.count["_convolution_pointwise"] == 3 * (fuses and keeps_result)
    for together, apart in zip(*results, strict=True):
        # Limits that are no rounding in bfloat16 do the same before it and after it.
        assert torch.equal(together, apart) if keeps_result else relative(together, apart) < 1e-2
    assert relative(results[0][0], stock[0]) < 3e-2


def test_no_fused_activation_in_float64() -> None:
    assert not fastconv.activations_fuse(torch.float64)


def test_fast_kernels_within_fast_kernels_change_nothing() -> None:
    net, x = spread_norms(Chains(nn.ReLU6)), draw(2, 3, 29, 31, dtype=torch.float32)
    classes = [type(m) for m in net.modules()]
    with torch.no_grad():
        stock = net(x)
        with fast_training(net):
            fused = [type(m) for m in net.modules()]
            with fast_training(net):
                assert relative(net(x), stock) < 1e-6
            assert [type(m) for m in net.modules()] == fused
            assert relative(net(x), stock) < 1e-6
            whole, graph = trace(net, nn.Module.__call__)
            traced = fx.GraphModule(whole, graph)
            assert relative(traced(x), stock) < 1e-6
        assert relative(traced(x), stock) < 1e-6  # it still holds the activations
    assert [type(m) for m in net.modules()] == classes


def test_activations_are_done_apart_where_pytorch_cannot_fuse_them(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = spread_norms(Chains(nn.ReLU6)), draw(2, 3, 29, 31, dtype=torch.float32)
    stock = net(x)
    monkeypatch.setattr(fastconv, "_with_activation", lambda *_: torch.zeros(2, 8, 5, 5))  # a wrong kernel
    fastconv.activations_fuse.cache_clear()
    with fuse_fixed_batchnorm(net), torch.no_grad():
        assert relative(net(x), stock.detach()) < 1e-6
    fastconv.activations_fuse.cache_clear()


def test_squeeze_excite_gradients_in_float64() -> None:
    torch.manual_seed(0)
    net, x = spread_norms(timm.create_model("efficientnet_b0", num_classes=0).double().eval()), draw(2, 3, 40, 40)
    stock = net_gradients(net, x)
    with fast_squeeze_excite(net) as done:
        assert done.converted == 16
        for a, b in zip(net_gradients(net, x), stock, strict=True):
            assert relative(a, b) < 1e-9 or float(b.norm()) < 1e-12


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18", "vit_tiny_patch16_224"])
def test_frozen_forward(name: str) -> None:
    torch.manual_seed(0)
    options = {"img_size": 64} if "vit" in name else {}
    net = spread_norms(timm.create_model(name, num_classes=0, **options).eval())
    x = draw(3, 3, 64, 64, dtype=torch.float32)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    classes = [type(m) for m in net.modules()]
    with torch.no_grad():
        plain = net(x)
    fast = frozen_forward(net)
    assert (fast.folded > 15) == ("vit" not in name)
    found = fast(x)
    assert relative(found, plain) < 1e-5
    assert not found.requires_grad
    if bf16_works():
        half = frozen_forward(net, dtype=torch.bfloat16)(x)
        assert half.dtype == torch.bfloat16
        assert relative(half, plain) < 5e-2
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [type(m) for m in net.modules()] == classes
    assert all(p.requires_grad for p in net.parameters())


def test_frozen_forward_of_a_converted_net() -> None:
    torch.manual_seed(0)
    net, x = spread_norms(timm.create_model("mobilenetv2_100", num_classes=0).eval()), draw(2, 3, 64, 64).float()
    with torch.no_grad():
        plain = net(x)
    with fast_training(net):
        fast = frozen_forward(net)
        assert fast.folded == 52
        assert relative(fast(x), plain) < 1e-5
        with torch.no_grad():
            assert relative(net(x), plain) < 1e-5


def test_fixed_batch_size_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    net, x = spread_norms(timm.create_model("mobilenetv2_100", num_classes=0).eval()), draw(4, 3, 64, 64).float()
    fast = frozen_forward(net, batch_size=4)
    sizes: list[int] = []
    fast.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole = fast(x)
    assert fast(x[:1]).shape == (1, whole.shape[1])
    assert torch.equal(fast(x[:3]), whole[:3])
    assert sizes == [4, 4, 4]


def test_failed_compilation_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: nn.Module, **_: object) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3)), draw(2, 3, 8, 8).float()
    fast = frozen_forward(net, compiled=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    assert isinstance(fast, FrozenForward)
    assert not fast.compiled
    assert "no compiler here" in fast.compile_error


def test_bf16_self_test_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = bf16_errors()
    assert set(errors) >= {"matmul", "2x2 stride 2", "3x3 stride 3", "depthwise 5x5 stride 2"}
    right = F.conv2d

    def wrong(x: Tensor, weight: Tensor, **options: object) -> Tensor:
        out = right(x, weight, **options)  # type: ignore[arg-type]
        return out * 1.5 if x.dtype == torch.bfloat16 and weight.shape[2] == 2 else out

    monkeypatch.setattr(numerics.F, "conv2d", wrong)
    monkeypatch.setattr(numerics, "_cpu_has_bf16", lambda: True)
    numerics._bf16_works.cache_clear()
    assert bf16_errors()["2x2 stride 2"] > 0.1
    assert not bf16_works(torch.device("cpu"))
    numerics._bf16_works.cache_clear()


def test_bf16_is_not_used_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_cpu_has_bf16", lambda: False)
    numerics._bf16_works.cache_clear()
    assert not bf16_works()
    numerics._bf16_works.cache_clear()


@pytest.mark.parametrize("place", range(3))
def test_a_hook_changes_what_it_would(place: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.normal_(net[1].running_mean)
    nn.init.normal_(net[1].weight)
    x = torch.randn(2, 3, 8, 8)
    with fast_training(net):
        assert type(net[0]) is not nn.Conv2d
    net[place].register_forward_hook(lambda module, given, out: out - 0.5)
    own = net(x)
    with fast_training(net):
        torch.testing.assert_close(net(x), own)


def test_a_network_that_is_one_layer() -> None:
    net, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    own = net(x)
    with fast_training(net, lambda module, x: module(x)):
        torch.testing.assert_close(net(x), own)
