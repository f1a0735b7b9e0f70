"""A small network for every operator that has a rule: how it is called, and what must be true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

aten = torch.ops.aten

WIDTH = 12
BUILD = Callable[[int], "nn.Module | nn.Parameter"]


@dataclass(frozen=True)
class Case:
    """How one operator is called.

    Attributes:
        run: Given the network and the features (2, width, 6, 6), what enters the next convolution, (2, out, ...).
        out: Channels that leave `run`, from the width.
        layers: What `run` needs of layers and parameters, built from the width.
        checks: The independent checks that apply.
        free: Whether the channels of `a`, the convolution before, can be pruned; None where holding them is as right.
        readers: Dimensions along which parameters read that belong to no convolution or linear layer.
        width: Channels of `a`.
        dims: Dimensions of space: 1, 2 or 3.
    """

    run: Callable[[Net, Tensor], Tensor]
    out: Callable[[int], int] = lambda width: width
    layers: dict[str, BUILD] = field(default_factory=dict)
    checks: tuple[str, ...] = ("readers", "all")
    free: bool | None = True
    readers: dict[str, int] = field(default_factory=dict)
    width: int = WIDTH
    dims: int = 2


def _rows(x: Tensor) -> Tensor:
    """(1, 1, 3, 1) numbers of rows."""
    return torch.tensor([4, 1, 1], device=x.device).view(1, 1, 3, 1)


class Net(nn.Module):
    """A convolution, the operator, a convolution, and a classifier."""

    def __init__(self, case: Case, width: int | None = None) -> None:
        super().__init__()
        width = width or case.width
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[case.dims]
        self.run = (case.run,)  # in a tuple, so that it is no method
        self.a = conv(3, width, 3, padding=1)
        for name, build in case.layers.items():
            setattr(self, name, build(width))
        self.b = conv(case.out(width), 8, 1)
        self.h = nn.Linear(8, 5)

    def forward(self, x):
        y = self.b(self.run[0](self, self.a(x)))
        return self.h(y.flatten(2).mean(2))


def unary(function: Callable[[Tensor], Tensor], **more: Any) -> Case:
    """A case of features alone."""
    return Case(lambda net, x: function(x), **more)


def matrix(name: str, rows: Callable[[int], int], columns: Callable[[int], int]) -> dict[str, BUILD]:
    return {name: lambda width: nn.Parameter(torch.randn(rows(width), columns(width)))}


def same(width: int) -> int:
    return width


def twice(width: int) -> int:
    return 2 * width


def half(width: int) -> int:
    return width // 2


def fixed(number: int) -> Callable[[int], int]:
    return lambda width: number


POSITIVE = {
    **{"log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt},
    "reciprocal": torch.reciprocal,
}
UNARY = {
    **{"relu": F.relu, "relu6": aten.relu6, "leaky_relu": F.leaky_relu, "elu": F.elu, "celu": F.celu, "selu": F.selu},
    **{"gelu": F.gelu, "silu": F.silu, "mish": F.mish, "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid},
    **{"hardswish": F.hardswish, "hardtanh": F.hardtanh, "tanh": torch.tanh, "softplus": F.softplus},
    **{"log_sigmoid": F.logsigmoid, "threshold": lambda x: F.threshold(x, 0.1, 0.2), "exp": torch.exp},
    **{"expm1": torch.expm1, "neg": torch.neg, "abs": torch.abs, "square": torch.square, "sin": torch.sin},
    **{"cos": torch.cos, "erf": torch.erf, "floor": lambda x: x - x.floor(), "ceil": lambda x: x - x.ceil()},
    **{"round": lambda x: x - x.round(), "sign": lambda x: x * x.sign(), "nan_to_num": torch.nan_to_num},
    **{"clamp": lambda x: x.clamp(-0.3, 0.4), "clamp_min": lambda x: aten.clamp_min(x, 0.1)},
    **{"clamp_max": lambda x: aten.clamp_max(x, 0.1), "pow": lambda x: x.pow(2), "remainder": lambda x: x % 0.7},
    **{"fmod": lambda x: x.fmod(0.7), "dropout": lambda x: F.dropout(x, training=False)},
    **{"feature_dropout": lambda x: aten.feature_dropout(x, 0.5, False)},
    **{"alpha_dropout": lambda x: aten.alpha_dropout(x, 0.5, False), "clone": torch.clone},
    **{"contiguous": lambda x: x.transpose(2, 3).contiguous(), "detach": lambda x: x + x.detach()},
    **{"alias": lambda x: aten.alias(x), "to": lambda x: x.to(torch.float64).to(x.dtype)},
    "_to_copy": lambda x: aten._to_copy(x, dtype=torch.float64).to(x.dtype),
    **{"add": lambda x: x + 0.5, "sub": lambda x: x - x.tanh(), "rsub": lambda x: 1 - x, "mul": lambda x: x * x},
    **{"div": lambda x: x / (x * x + 1), "maximum": lambda x: torch.maximum(x, -0.5 * x)},
    **{"minimum": lambda x: torch.minimum(x, -0.5 * x), "where": lambda x: torch.where(x > 0, x, 0.1 * x)},
    **{"addcmul": lambda x: torch.addcmul(x, x, x, value=0.3), "lerp": lambda x: torch.lerp(x, x * x, 0.3)},
    **{"addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1, value=0.3), "eq": lambda x: x * (x.relu() == 0)},
    **{"ne": lambda x: x * (x.relu() != 0), "lt": lambda x: x * (x < 0.1), "gt": lambda x: x * (x > 0.1)},
    **{"le": lambda x: x * (x <= x.square()), "ge": lambda x: x * (x >= x.square())},
    "set_": lambda x: (y := x * 1.0, z := y.relu(), y.set_(), z)[-1],
    "index_put": lambda x: (y := x.clone(), y.__setitem__(y < 0, 0.1), y.relu())[-1],
    "logical_not": lambda x: x * (x > 0).logical_not(),
    "logical_and": lambda x: x * ((x > -0.1).logical_and(x < 0.3)),
    "logical_or": lambda x: x * ((x < -0.1).logical_or(x > 0.3)),
    **{"masked_fill": lambda x: x.masked_fill(x > 0.2, 0.1), "type_as": lambda x: x.type_as(x)},
    "rsub_scalar": lambda x: torch.rsub(x, 2.0),
    "copy": lambda x: torch.zeros_like(x).copy_(x),
    **{"to_device": lambda x: x.to("cpu", x.dtype), "to_dtype_layout": lambda x: x.to(x.device)},
    "to_other": lambda x: x.to(x.relu()),
    **{"rand": lambda x: x * (torch.rand(6, 6) >= 0), "randn": lambda x: x + 0 * torch.randn(6, 6).to(x)},
    **{"randint": lambda x: x + torch.randint(0, 1, (6, 6)), "randperm": lambda x: x + torch.randperm(1)},
    **{"bernoulli": lambda x: x * torch.bernoulli(torch.ones(6, 6)).to(x)},
    "uniform": lambda x: x + 0 * torch.empty(6, 6, dtype=x.dtype).uniform_(),
    "other_names": lambda x: (
        torch.multiply(torch.subtract(x, torch.absolute(torch.negative(x))), torch.divide(torch.clip(x, -1, 1), 2))
        + torch.true_divide(x, 3)
        + torch.max(x, -x)
        - torch.min(x, x.square())
    ),
    "comparisons": lambda x: (
        x
        * torch.greater(x, -0.3)
        * torch.less(x, 0.9)
        * torch.greater_equal(x, -0.2)
        * torch.less_equal(x, 0.8)
        * torch.not_equal(x, 0.1)
        * (x > -0.1).logical_xor(x > 0.7)
    ),
    "masks": lambda x: (
        x
        * (x.isfinite() & ~x.isnan() | x.isinf())
        * torch.bitwise_or((x > 0).bitwise_and(x < 1), (x > 2).bitwise_not())
    ),
    "functions": lambda x: (
        torch.tan(x / 9)
        + torch.sinh(x / 9)
        + torch.cosh(x / 9)
        + torch.atan(x)
        + torch.exp2(x / 9)
        + torch.log2(1 + x * x)
        + torch.log10(1 + x * x)
        + torch.logaddexp(x, -x)
        + torch.logit(x, 1e-2)
    ),
    "more_functions": lambda x: (
        torch.hypot(x, x + 1)
        + torch.special.expit(x)
        + x.trunc()
        + x.frac()
        + x.sgn()
        + F.hardshrink(x)
        + F.softshrink(x)
        + aten.rrelu(x, 0.1, 0.3, False)
        + aten.feature_alpha_dropout(x, 0.5, False)
    ),
    "inverse_functions": lambda x: (
        torch.atan2(x, x + 1)
        + torch.asin(x.tanh())
        + torch.acos(x.tanh())
        + torch.asinh(x)
        + torch.acosh(1 + x * x)
        + torch.atanh(0.9 * x.tanh())
        + torch.floor_divide(x, 0.3)
        + torch.fmax(x, -x).copysign(torch.fmin(x, 0.4 * x))
        + torch.erfc(x)
        + torch.sinc(x)
    ),
    "complex": lambda x: (
        torch.complex(x, x.sin()).conj().abs()
        + torch.polar(x.exp(), x).conj().imag
        + torch.view_as_complex(torch.stack([x, -x], 4)).angle()
    ),
    "filled": lambda x: x.clone().fill_(0.3) + x.clone().zero_() + x,
    "layouts": lambda x: torch.moveaxis(x.swapdims(2, 3), 3, 2).ravel().view(x.shape),
    **{"tril": lambda x: x * torch.ones(6, 6).tril().to(x), "triu": lambda x: x * torch.ones(6, 6).triu().to(x)},
}
SPATIAL = {
    **{"max_pool2d": lambda x: F.max_pool2d(x, 2), "avg_pool2d": lambda x: F.avg_pool2d(x, 2)},
    **{"adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3)},
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 3),
    "max_pool2d_with_indices": lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0],
    **{f"upsample_{mode}2d": lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode)
       for mode in ("bilinear", "nearest", "bicubic")},
    "_upsample_nearest_exact2d": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "_upsample_bilinear2d_aa": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
    "_upsample_bicubic2d_aa": lambda x: F.interpolate(x, size=(4, 4), mode="bicubic", antialias=True),
    "grid_sampler": lambda x: F.grid_sample(x, torch.linspace(-1, 1, 36, dtype=x.dtype, device=x.device)
                                            .view(1, 6, 3, 2).expand(2, 6, 3, 2), align_corners=False),
    "affine_grid_generator": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(2, 2, 3), x.shape, align_corners=False),
        align_corners=False),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "constant_pad_nd": lambda x: aten.constant_pad_nd(x, [1, 2, 0, 1], 0.5),
    "reflection_pad2d": lambda x: aten.reflection_pad2d(x, [1, 1, 1, 1]),
    "replication_pad2d": lambda x: aten.replication_pad2d(x, [1, 1, 1, 1]),
    "unfold": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)),
    "pixel_unshuffle": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "index": lambda x: x[:, :, torch.tensor([4, 1, 1])],
    "index_by_a_table": lambda x: x[:, :, torch.tensor([[4, 1], [1, 0]])].amax(3),
    "index_by_what_the_input_says": lambda x: x[:, :, (x[0, :, 0, 0].detach().sum() * 0 + torch.arange(6)).long()],
    "where_default": lambda x: x.index_select(2, torch.where(torch.ones(6) > 0)[0]),
    "tensor_split": lambda x: x.tensor_split(2, 2)[1],
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * (0.5 + 1j), s=x.shape[2:]),
    "fft_of_complex_numbers": lambda x: torch.fft.ifft(torch.fft.fftshift(torch.fft.fft(x, dim=2), 2), dim=2).real,
    "im2col": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
}  # fmt: skip
LINES = {
    **{"max_pool1d": lambda x: F.max_pool1d(x, 2), "avg_pool1d": lambda x: F.avg_pool1d(x, 2)},
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 3),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 3),
    "upsample_linear1d": lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
    "upsample_nearest1d": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
}
VOLUMES = {
    **{"max_pool3d": lambda x: F.max_pool3d(x, 2), "avg_pool3d": lambda x: F.avg_pool3d(x, 2)},
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 3),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 3),
    "upsample_trilinear3d": lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
    "upsample_nearest3d": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
}
VIEWS = {
    **{"permute": lambda x: x.permute(0, 1, 3, 2), "transpose": lambda x: x.transpose(2, 3)},
    **{"swapaxes": lambda x: x.swapaxes(1, 3).swapaxes(3, 1), "movedim": lambda x: x.movedim(1, -1).movedim(-1, 1)},
    "movedim_several": lambda x: x.movedim((1, 2), (3, 0)).movedim((3, 0), (1, 2)),
    **{
        "mT": lambda x: x.mT,
        "flip": lambda x: x.flip(2, 3),
        "numpy_T": lambda x: x.mean((2, 3)).T.relu().T[:, :, None, None],
    },
    "t": lambda x: x.mean((2, 3)).t().relu().t()[:, :, None, None],
    **{"view": lambda x: x.view(x.shape[0], x.shape[1], 36, 1), "reshape": lambda x: x.reshape(2, -1, 4, 9)},
    "_unsafe_view": lambda x: aten._unsafe_view(x, [x.shape[0], x.shape[1], 9, 4]),
    **{
        "flatten": lambda x: x.flatten(2)[..., None],
        "unflatten": lambda x: x.unflatten(2, (2, 3)).flatten(3)[..., 0, :, None],
    },
    **{"squeeze": lambda x: x.unsqueeze(1).squeeze(1), "unsqueeze": lambda x: x.unsqueeze(-1)[..., 0]},
    **{"view_as": lambda x: x.view_as(x.relu()), "reshape_as": lambda x: x.reshape_as(x.relu())},
    **{"expand": lambda x: x * x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)},
    **{"expand_as": lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x)},
    "broadcast_to": lambda x: x * x.mean((2, 3), keepdim=True).broadcast_to(x.shape),
    "slice": lambda x: x[:, :, 1:4],
    "narrow": lambda x: x.narrow(2, 1, 4),
    "select": lambda x: x[:, :, 2, None],
    "unbind": lambda x: torch.stack(x.unbind(3)[1:4], 3),
    "index_select": lambda x: x.index_select(3, torch.tensor([4, 1, 1], device=x.device)),
    "gather": lambda x: x.gather(2, _rows(x).expand(len(x), x.shape[1], 3, 6)),
    "gather_repeated": lambda x: x.gather(2, _rows(x).repeat(len(x), x.shape[1], 1, 6)),
    "linear_of_a_vector": lambda x: F.linear(x.softmax(3), torch.arange(6.0, device=x.device).to(x))[..., None],
    "roll": lambda x: x.roll((1, -2), (2, 3)),
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "tile": lambda x: x.tile((1, 1, 2, 1)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 2),
    "stack": lambda x: torch.stack([x, x.relu()], 4).flatten(3),
    **{"chunk": lambda x: x.chunk(2, 2)[1], "split": lambda x: x.split(2, 3)[1]},
    "split_with_sizes": lambda x: x.split([1, 5], 3)[1],
}
"""Along space and over whole channels: nothing here may hold a channel."""
CHANNEL_VIEWS = {
    "channel_shuffle": unary(lambda x: torch.channel_shuffle(x, 2)),
    "argmin_channels": unary(lambda x: x + x.argmin(1, keepdim=True), free=False),
    "slice_channels": unary(lambda x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], out=half),
    "narrow_channels": unary(lambda x: x.narrow(1, 2, x.shape[1] - 2), out=lambda width: width - 2),
    "chunk_channels": unary(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], out=half),
    "chunk_channels_unevenly": unary(lambda x: torch.cat(x.chunk(5, 1)[::-1], 1)),
    "split_channels": unary(lambda x: torch.cat(x.split(x.shape[1] // 3, 1)[::-1], 1)),
    "unfold_channels": unary(lambda x: x.unfold(1, 2, 2).amax(4), out=half, free=None),
    "flip_channels": unary(lambda x: x.flip(1)),
    "flip_and_meet": unary(lambda x: x + x.flip(1)),
    "roll_channels": unary(lambda x: x.roll(1, 1), free=None),
    "index_select_channels": unary(lambda x: x.index_select(1, torch.tensor([3, 1, 7, 7], device=x.device)),
                                   out=fixed(4), free=None),
    "gather_channels": unary(lambda x: x.gather(1, _rows(x).view(1, 3, 1, 1).expand(len(x), 3, 6, 6)),
                             out=fixed(3), free=False),
    "gather_by_its_own_index": unary(lambda x: x.gather(2, x.argsort(2)), free=False),
    "select_channel": unary(lambda x: x * x[:, 1:2].sigmoid() * x[:, 0, None], free=False),
    "unbind_channels": unary(lambda x: torch.stack(x.unbind(1), 1), free=False),
    "repeat_channels": unary(lambda x: x.repeat(1, 2, 1, 1), out=twice),
    "repeat_and_meet": unary(lambda x: x.repeat(1, 2, 1, 1) + torch.cat([x, -x], 1), out=twice),
    "tile_channels": unary(lambda x: x.tile((1, 2, 1, 1)), out=twice),
    "repeat_interleave_channels": unary(lambda x: x.repeat_interleave(2, 1), out=twice),
    "repeat_interleave_and_meet": unary(lambda x: x.repeat_interleave(2, 1) + torch.stack([x, -x], 2).flatten(1, 2),
                                        out=twice),
    "cat": unary(lambda x: torch.cat([x, x.relu()], 1), out=twice),
    "concat": unary(lambda x: torch.concat([x, x.relu()], 1), out=twice),
    "concatenate": unary(lambda x: torch.concatenate([x.relu(), x], 1), out=twice),
    "stack_channels": unary(lambda x: torch.stack([x, x.relu()], 1).flatten(1, 2), out=twice),
    "reshape_as_shuffle": unary(lambda x: x.view(2, 3, x.shape[1] // 3, 6, 6).transpose(1, 2).reshape_as(x)),
    "movedim_channels": unary(lambda x: x.flatten(2).movedim(1, 2).reshape(2, 6, 6, -1).movedim(-1, 1)),
    "pad_channels": unary(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), out=lambda width: width + 3),
    "im2col_channels": Case(lambda net, x: F.unfold(x, 2, stride=2).unflatten(2, (3, 3)), out=lambda width: 4 * width),
    "glu_channels": unary(lambda x: F.glu(x, 1), out=half, free=None),
    "glu": unary(lambda x: F.glu(x, 3), free=None),
    "index_put_channels": unary(lambda x: (y := x.clone(), y.__setitem__((0, [3, 1]), 0.1), y)[-1], free=False),
    "numpy_T_of_four": unary(lambda x: aten.numpy_T(x).permute(3, 2, 1, 0), free=None),
}  # fmt: skip
OVER_SPACE = {
    **{"mean": lambda x: x.mean((2, 3), keepdim=True), "sum": lambda x: x.sum(3, keepdim=True)},
    **{"amax": lambda x: x.amax(3, keepdim=True), "amin": lambda x: x.amin(3, keepdim=True)},
    **{"var": lambda x: x.var((2, 3), keepdim=True), "std": lambda x: x.std(3, keepdim=True)},
    "var_mean": lambda x: torch.stack(torch.var_mean(x, 3), 3),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, 3), 3),
    "logsumexp": lambda x: x.logsumexp(3, keepdim=True),
    "max.dim": lambda x: x.max(3, keepdim=True)[0],
    "min.dim": lambda x: x.min(3, keepdim=True).values,
    "softmax": lambda x: x.softmax(3),
    "_softmax": lambda x: aten._softmax(x, 3, False),
    "log_softmax": lambda x: x.log_softmax(2),
    "cumsum": lambda x: x.cumsum(3),
}
OVER_CHANNELS = {
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "amax": lambda x: x * x.amax(1, keepdim=True).sigmoid(),
    "amin": lambda x: x * x.amin(1, keepdim=True).sigmoid(),
    "var": lambda x: x * x.var(1, keepdim=True),
    "std": lambda x: x * x.std(1, keepdim=True),
    "var_mean": lambda x: x * torch.var_mean(x, 1, keepdim=True)[0],
    "std_mean": lambda x: x * torch.std_mean(x, 1, keepdim=True)[1],
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "sum": lambda x: x * x.sum(1, keepdim=True).sigmoid(),
    "max.dim": lambda x: x * x.max(1, keepdim=True)[0].sigmoid(),
    "min.dim": lambda x: x * x.min(1, keepdim=True)[0].sigmoid(),
}
HELD_OVER_CHANNELS = {
    "max_with_place": lambda x: x + x.max(1, keepdim=True)[1],
    "softmax": lambda x: x * x.softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "fft": lambda x: torch.fft.fft(x, dim=1).abs(),
    "as_complex": lambda x: (
        torch.view_as_complex(x.movedim(1, -1).unflatten(-1, (-1, 2)).contiguous())
        .abs()
        .movedim(-1, 1)
        .repeat_interleave(2, 1)
    ),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: torch.cat([x.topk(4, 1)[0], x[:, 4:]], 1),
    "argmax": lambda x: x + x.argmax(1, keepdim=True).to(x.dtype),
}
NORMS = {
    "batch_norm": ({"n": nn.BatchNorm2d}, lambda net, x: net.n(x), ("readers", "all", "survivors")),
    "instance_norm": ({"n": lambda width: nn.InstanceNorm2d(width, affine=True)}, lambda net, x: net.n(x),
                      ("readers", "all")),
    "layer_norm": ({"n": nn.LayerNorm}, lambda net, x: net.n(x.movedim(1, -1)).movedim(-1, 1),
                   ("readers", "survivors")),
    "rms_norm": ({"n": nn.RMSNorm}, lambda net, x: net.n(x.movedim(1, -1)).movedim(-1, 1), ("survivors",)),
    "group_norm": ({"n": lambda width: nn.GroupNorm(2, width)}, lambda net, x: net.n(x), ("readers",)),
    "group_norm_of_one": ({"n": lambda width: nn.GroupNorm(1, width)}, lambda net, x: net.n(x),
                          ("readers", "survivors")),
    "prelu": ({"n": nn.PReLU}, lambda net, x: net.n(x), ("readers", "all", "survivors")),
    "prelu_of_one": ({"n": lambda width: nn.PReLU()}, lambda net, x: net.n(x), ("readers", "all", "survivors")),
    "prelu_of_a_matrix": ({"n": nn.PReLU}, lambda net, x: net.n(x.mean((2, 3)))[..., None, None], ("readers", "all")),
}  # fmt: skip


def tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def grid(t: Tensor) -> Tensor:
    """Back again."""
    return t.transpose(1, 2).unflatten(2, (6, 6))


PRODUCTS = {
    "linear": Case(lambda net, x: net.n(x.movedim(1, -1)).movedim(-1, 1), fixed(10),
                   {"n": lambda width: nn.Linear(width, 10)}),
    "matmul": Case(lambda net, x: grid(tokens(x) @ net.w), fixed(10), matrix("w", same, fixed(10)), readers={"w": 0}),
    "mm": Case(lambda net, x: torch.mm(x.mean((2, 3)), net.w)[..., None, None], fixed(10),
               matrix("w", same, fixed(10)), readers={"w": 0}),
    "bmm": Case(lambda net, x: grid(torch.bmm(tokens(x), torch.bmm(x.flatten(2), tokens(x)))), checks=("all",)),
    "addmm": Case(lambda net, x: torch.addmm(net.w[0], x.mean((2, 3)), net.w)[..., None, None], fixed(10),
                  matrix("w", same, fixed(10)), readers={"w": 0}, free=False),
    "addmm_bias": Case(lambda net, x: torch.addmm(net.v, x.mean((2, 3)), net.w)[..., None, None], fixed(10),
                       {**matrix("w", same, fixed(10)), "v": lambda width: nn.Parameter(torch.randn(10))},
                       readers={"w": 0}),
    "addmm_residual": Case(lambda net, x: torch.addmm(x.mean((2, 3)), x.amax((2, 3)), net.w)[..., None, None],
                           layers=matrix("w", same, same), readers={"w": 0}),
    "baddbmm": Case(lambda net, x: grid(torch.baddbmm(tokens(x), tokens(x), net.w.expand(2, -1, -1))),
                    layers=matrix("w", same, same), readers={"w": 0}),
    "einsum": Case(lambda net, x: torch.einsum("bchw,oc->bohw", x, net.w), fixed(10), matrix("w", fixed(10), same),
                   readers={"w": 1}),
    "einsum_of_features": Case(lambda net, x: torch.einsum("bchw,bcij,bdij->bdhw", x, x, x), checks=("all",)),
    "einsum_outer": Case(lambda net, x: torch.einsum("bcx,bcy->bcxy", x.mean(2), x.mean(3))),
    "einsum_without_rule": Case(lambda net, x: torch.einsum("...chw,oc->...ohw", x, net.w), fixed(10),
                                matrix("w", fixed(10), same), free=None),
    "scaled_dot_product_attention": Case(
        lambda net, x: grid(F.scaled_dot_product_attention(tokens(net.q(x)), tokens(net.k(x)), tokens(x), scale=0.4)),
        layers={name: lambda width: nn.Conv2d(width, 6, 1) for name in ("q", "k")}, checks=("all",)),
    "attention_of_its_width": Case(
        lambda net, x: grid(F.scaled_dot_product_attention(tokens(net.q(x)), tokens(net.k(x)), tokens(x))),
        layers={name: lambda width: nn.Conv2d(width, 6, 1) for name in ("q", "k")}, checks=("all",)),
    "attention_with_a_mask": Case(
        lambda net, x: grid(F.scaled_dot_product_attention(tokens(net.q(x)), tokens(net.q(x)), tokens(x),
                                                           attn_mask=torch.eye(36, dtype=x.dtype), scale=0.4)),
        layers={"q": lambda width: nn.Conv2d(width, 6, 1)}, checks=("all",)),
    "lstm": Case(lambda net, x: grid(net.n(tokens(x))[0]), free=False,
                 layers={"n": lambda width: nn.LSTM(width, width)}),
    "gru": Case(lambda net, x: grid(net.n(tokens(x))[0]), free=False, layers={"n": lambda width: nn.GRU(width, width)}),
    "rnn": Case(lambda net, x: grid(net.r(net.n(tokens(x))[0])[0]), free=False,
                layers={"n": lambda width: nn.RNN(width, width),
                        "r": lambda width: nn.RNN(width, width, nonlinearity="relu")}),
    "cosine_similarity": Case(lambda net, x: x * F.cosine_similarity(x, net.v(x), dim=1)[:, None], checks=("all",),
                              layers={"v": lambda width: nn.Conv2d(width, width, 1)}),
    "cdist": Case(lambda net, x: grid(torch.cdist(tokens(x), net.w)), fixed(10), matrix("w", fixed(10), same),
                  free=None),
    "norm": Case(lambda net, x: x / (aten.norm(x, 2, [1], True) + 1), free=None, checks=("all", "survivors")),
    "linalg_vector_norm": Case(lambda net, x: x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1),
                               checks=("all", "survivors")),
    "normalize": Case(lambda net, x: F.normalize(x, dim=1), checks=("all", "survivors")),
}  # fmt: skip
CONVS = {
    "conv1d": Case(lambda net, x: net.n(x), fixed(10), {"n": lambda width: nn.Conv1d(width, 10, 3)}, dims=1),
    "conv2d": Case(lambda net, x: net.n(x), fixed(10), {"n": lambda width: nn.Conv2d(width, 10, 3)}),
    "conv3d": Case(lambda net, x: net.n(x), fixed(10), {"n": lambda width: nn.Conv3d(width, 10, 3)}, dims=3),
    "conv1d_of_positions": Case(lambda net, x: grid(net.n(tokens(x))), layers={"n": lambda width: nn.Conv1d(36, 36, 1)},
                                checks=("all",)),
    "conv1d_of_positions_in_steps": Case(lambda net, x: net.n(tokens(x)).mean(2)[..., None, None], fixed(9), free=False,
                                         layers={"n": lambda width: nn.Conv1d(36, 9, 1, stride=2)}, checks=("all",)),
    "embedding": Case(lambda net, x: x + net.e(torch.arange(6, device=x.device)).t()[:, :, None],
                      layers={"e": lambda width: nn.Embedding(6, width)}),
    "embedding_by_value": Case(lambda net, x: x * net.e(x.amax((1, 3)).argmax(1))[:, :, None, None],
                               layers={"e": lambda width: nn.Embedding(6, width)}, checks=("all",)),
    "embedding_of_channels": Case(lambda net, x: net.e(x.amax((2, 3)).argsort(1))[..., None], free=False,
                                  layers={"e": lambda width: nn.Embedding(width, 6)}),
    "depthwise": Case(lambda net, x: net.n(x), layers={"n": lambda width: nn.Conv2d(width, width, 3, groups=width)}),
    "depthwise_twice": Case(lambda net, x: net.n(x), twice,
                            {"n": lambda width: nn.Conv2d(width, 2 * width, 3, groups=width)}),
    "grouped": Case(lambda net, x: net.n(x), fixed(10), {"n": lambda width: nn.Conv2d(width, 10, 3, groups=2)}),
    "deform_conv2d": Case(
        lambda net, x: deform_conv2d(x, net.o(x), net.n.weight, net.n.bias, padding=1, mask=net.m(x).sigmoid()),
        fixed(10),
        {"n": lambda width: nn.Conv2d(width, 10, 3), "o": lambda width: nn.Conv2d(width, 36, 3, padding=1),
         "m": lambda width: nn.Conv2d(width, 18, 3, padding=1)}),
    "deform_conv2d_grouped": Case(
        lambda net, x: deform_conv2d(x, net.o(x), net.n.weight, padding=1), fixed(10), free=False,
        layers={"n": lambda width: nn.Conv2d(width, 10, 3, groups=2),
                "o": lambda width: nn.Conv2d(width, 18, 3, padding=1)}),
    "conv_transpose1d": Case(lambda net, x: net.n(x), fixed(10),
                             {"n": lambda width: nn.ConvTranspose1d(width, 10, 2, stride=2)}, dims=1),
    "conv_transpose2d": Case(lambda net, x: net.n(x), fixed(10),
                             {"n": lambda width: nn.ConvTranspose2d(width, 10, 2, stride=2)}),
    "conv_transpose3d": Case(lambda net, x: net.n(x), fixed(10),
                             {"n": lambda width: nn.ConvTranspose3d(width, 10, 2, stride=2)}, dims=3),
    "conv_transpose_without_bias": Case(lambda net, x: net.n(x), fixed(10),
                                        {"n": lambda width: nn.ConvTranspose2d(width, 10, 3, bias=False)}),
    "conv_transpose_grouped": Case(lambda net, x: net.n(x), fixed(10), free=None,
                                   layers={"n": lambda width: nn.ConvTranspose2d(width, 10, 2, groups=2)}),
    "conv_transpose_depthwise": Case(lambda net, x: net.n(x),
                                     layers={"n": lambda width: nn.ConvTranspose2d(width, width, 2, groups=width)}),
    "conv_transpose_depthwise_twice": Case(
        lambda net, x: net.n(x), twice,
        layers={"n": lambda width: nn.ConvTranspose2d(width, 2 * width, 2, groups=width)}),
    "conv_transpose_gathered": Case(
        lambda net, x: net.n(x), lambda width: width // 4,
        layers={"n": lambda width: nn.ConvTranspose2d(width, width // 4, 2, groups=width // 4)}),
    "conv_transpose_wavelets": Case(
        lambda net, x: F.conv_transpose2d(net.n(x).tanh(), net.n.weight, stride=2, groups=x.shape[1]),
        layers={"n": lambda width: nn.Conv2d(width, 4 * width, 2, stride=2, groups=width)}),
    "max_unpool3d": Case(lambda net, x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), dims=3),
}  # fmt: skip
CONSTANTS = {
    "zeros_like": lambda x: x + torch.zeros_like(x[:, :1]),
    "ones_like": lambda x: x * torch.ones_like(x[:, :1, 0, None]),
    "full_like": lambda x: x * torch.full_like(x[:, :1], 2.0),
    "rand_like": lambda x: x + 0 * torch.rand_like(x[:, :1]),
    "randn_like": lambda x: x + 0 * torch.randn_like(x[:, :1]),
    "empty_like": lambda x: torch.where(x == x, x, torch.empty_like(x[:, :1])),
    "new_zeros": lambda x: x + x.new_zeros(6),
    "new_ones": lambda x: x + x.new_ones(6, 1),
    "new_full": lambda x: x + x.new_full((6,), 0.3),
    "new_empty": lambda x: torch.where(x == x, x, x.new_empty(6)),
    "zeros": lambda x: x + torch.zeros(6, 6, dtype=x.dtype),
    "ones": lambda x: x + torch.ones(6, dtype=x.dtype),
    "full": lambda x: x + torch.full((6,), 0.3, dtype=x.dtype),
    "empty": lambda x: torch.where(x == x, x, torch.empty(6, dtype=x.dtype)),
    "arange": lambda x: x + torch.arange(6, dtype=x.dtype),
    "linspace": lambda x: x + torch.linspace(0, 1, 6, dtype=x.dtype),
    "eye": lambda x: x + torch.eye(6, dtype=x.dtype),
    "scalar_tensor": lambda x: x * torch.scalar_tensor(0.3, dtype=x.dtype),
    "meshgrid": lambda x: x * torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")[0].to(x.dtype),
}
"""Constants of the size of space meet features."""
CHANNEL_CONSTANTS = {
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "full_like": lambda x: x * torch.full_like(x, 2.0),
    "arange": lambda x: x + torch.arange(x.shape[1], dtype=x.dtype)[:, None, None],
    "new_ones": lambda x: x + x.new_ones(x.shape[1], 1, 1),
}
"""Constants of the size of the features: safe to hold, safe to follow; only a wrong result is wrong."""


def asserted(x: Tensor) -> Tensor:
    aten._assert_tensor_metadata(x, None, None, x.dtype)
    aten._assert_async(torch.ones(1, dtype=torch.bool, device=x.device))
    aten.sym_constrain_range_for_size(4, min=0, max=10)
    return x.relu()


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y += 0.5
    return F.relu(y.mul_(0.5).sub_(x), inplace=True)


CASES: dict[str, Case] = {
    **{f"elementwise-{name}": unary(function) for name, function in UNARY.items()},
    **{f"elementwise-{n}": unary(lambda x, f=f: f(x.abs() + 1)) for n, f in POSITIVE.items()},
    "elementwise-in_place": unary(in_place),
    "elementwise-assertion": unary(asserted),
    **{f"spatial-{name}": unary(function) for name, function in SPATIAL.items()},
    **{f"line-{name}": unary(function, dims=1) for name, function in LINES.items()},
    **{f"volume-{name}": unary(function, dims=3) for name, function in VOLUMES.items()},
    **{f"view-{name}": unary(function) for name, function in VIEWS.items()},
    **{f"channels-{name}": case for name, case in CHANNEL_VIEWS.items()},
    **{f"over_space-{name}": unary(function) for name, function in OVER_SPACE.items()},
    **{f"over_channels-{n}": unary(f, checks=("all" if n == "sum" else "survivors",))
       for n, f in OVER_CHANNELS.items()},
    **{f"held_over_channels-{name}": unary(function, free=False) for name, function in HELD_OVER_CHANNELS.items()},
    **{f"norm-{name}": Case(run, layers=layers, checks=checks) for name, (layers, run, checks) in NORMS.items()},
    **{f"product-{name}": case for name, case in PRODUCTS.items()},
    **{f"conv-{name}": case for name, case in CONVS.items()},
    **{f"constant-{name}": unary(function) for name, function in CONSTANTS.items()},
    **{f"channel_constant-{name}": unary(function, free=None) for name, function in CHANNEL_CONSTANTS.items()},
}  # fmt: skip
