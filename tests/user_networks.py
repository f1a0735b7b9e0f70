"""Random networks as people write them: the source of a plain `nn.Module`, made from random blocks.

`network(seed)` writes the text of a class with literal sizes, strided slices, shared layers, accumulators and the like,
and builds it. The same seed gives the same text. Each block notes what the check of a pruned model may rely on:
whether channels are read by weights alone, and whether something counts channels in a way that cannot be told from the
plan.
"""

from __future__ import annotations

import linecache
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.independent import StandardisedConv2d, random_values

SIZE = 8
"""Height and width of the input images."""


@dataclass
class Network:
    """One generated network.

    Attributes:
        seed: What it was made from.
        constructs: Names of its blocks, and of the form of its output.
        source: The text of its class.
        module: The network, with random values, in eval mode.
        inputs: Its arguments.
        readers: The dimensions along which parameters read that belong to no convolution or linear layer.
        by_weights: Whether channels are read by weights alone.
        counts: Whether something counts channels in a way that the plan does not tell; then only shapes are checked.
    """

    seed: int
    constructs: tuple[str, ...]
    source: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    readers: dict[str, int]
    by_weights: bool
    counts: bool


class Pair(NamedTuple):
    """A named tuple, as a model returns it."""

    logits: Tensor
    features: Tensor


@dataclass
class Record:
    """A dataclass, as a model returns it."""

    logits: Tensor
    features: Tensor


class Plain:
    """An object that is neither a tuple nor a dict."""

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.features = logits, features


class ModelOutput(dict):
    """A dict whose entries are attributes too, like the outputs of transformers."""

    __getattr__ = dict.__getitem__


@dataclass
class Writer:
    """The text of a network so far, and what is known of it."""

    rng: random.Random
    c: int
    s: int = SIZE
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    readers: dict[str, int] = field(default_factory=dict)
    by_weights: bool = True
    counts: bool = False
    count: int = 0

    def name(self, stem: str = "m") -> str:
        """A name that is not taken."""
        self.count += 1
        return f"{stem}{self.count}"

    def layer(self, text: str, stem: str = "m") -> str:
        """Adds a submodule, parameter or buffer; returns how forward names it."""
        name = self.name(stem)
        self.init.append(f"self.{name} = {text}")
        return f"self.{name}"

    def conv(self, c_out: int, c_in: int | None = None, k: int = 3, **more: Any) -> str:
        """Adds a convolution that keeps height and width."""
        rest = "".join(f", {name}={value}" for name, value in more.items())
        return self.layer(f"nn.Conv2d({c_in or self.c}, {c_out}, {k}, padding={k // 2}{rest})", "conv")

    def linear(self, c_in: int, c_out: int) -> str:
        return self.layer(f"nn.Linear({c_in}, {c_out})", "fc")

    def do(self, *lines: str) -> None:
        """Adds lines to forward."""
        self.forward += lines

    def width(self, low: int = 4, high: int = 40, of: int = 1) -> int:
        """A random width that `of` divides."""
        return self.rng.randrange(math.ceil(low / of), high // of + 1) * of

    def even(self, of: int = 2, low: int = 4) -> None:
        """Makes the current width a multiple of `of`, by a convolution."""
        if self.c % of or self.c < low:
            width = self.width(low=max(low, of), of=of)
            self.do(f"x = F.relu({self.conv(width)}(x))")
            self.c = width

    def act(self) -> str:
        return self.rng.choice(["F.relu({})", "F.silu({})", "F.gelu({})", "{}.tanh()", "F.leaky_relu({}, 0.1)"])


Block = Callable[[Writer], None]
BLOCKS: dict[str, Block] = {}


def block(function: Block) -> Block:
    """Adds a block to the list of constructs."""
    BLOCKS[function.__name__] = function
    return function


# Plain building blocks.


@block
def conv_bn_act(w: Writer) -> None:
    out = w.width()
    conv, bn = w.conv(out, k=w.rng.choice([1, 3])), w.layer(f"nn.BatchNorm2d({out})", "bn")
    w.do(f"x = {w.act().format(f'{bn}({conv}(x))')}")
    w.c = out


@block
def inverted_residual(w: Writer) -> None:
    mid = w.width()
    a, d, p = w.conv(mid, k=1), w.conv(mid, mid, groups=mid), w.conv(w.c, mid, 1)
    w.do(f"x = x + {p}(F.relu({d}(F.relu({a}(x)))))")


@block
def depthwise_multiplier(w: Writer) -> None:
    times = w.rng.choice([2, 3])
    w.do(f"x = F.relu({w.conv(times * w.c, groups=w.c)}(x))")
    w.c *= times
    out = w.width()
    w.do(f"x = {w.conv(out, k=1)}(x)")
    w.c = out


@block
def grouped(w: Writer) -> None:
    groups = w.rng.choice([2, 3, 4])
    w.even(groups, 2 * groups)
    out = w.width(of=groups, low=2 * groups)
    w.do(f"x = F.relu({w.conv(out, groups=groups)}(x))")
    w.c = out


@block
def residual(w: Writer) -> None:
    mid = w.width()
    a, b = w.conv(mid), w.conv(w.c, mid)
    w.do(f"x = F.relu(x + {b}(F.relu({a}(x))))")


@block
def concat(w: Writer) -> None:
    out = w.width()
    w.do(f"x = torch.cat([x, F.relu({w.conv(out)}(x))], 1)")
    w.c += out
    merged = w.width()
    w.do(f"x = F.relu({w.conv(merged, k=1)}(x))")
    w.c = merged


@block
def squeeze_excite(w: Writer) -> None:
    mid = w.width(high=12)
    a, b = w.conv(mid, k=1), w.conv(w.c, mid, 1)
    w.do(f"x = x * torch.sigmoid({b}(F.relu({a}(F.adaptive_avg_pool2d(x, 1)))))")


@block
def squeeze_excite_linear(w: Writer) -> None:
    mid = w.width(high=12)
    a, b = w.linear(w.c, mid), w.linear(mid, w.c)
    tail = w.rng.choice([".view(x.shape[0], x.shape[1], 1, 1)", f".view(-1, {w.c}, 1, 1)", "[:, :, None, None]"])
    w.do(f"x = x * torch.sigmoid({b}(F.relu({a}(x.mean((2, 3)))))){tail}")


@block
def layer_norm_last(w: Writer) -> None:
    mid = w.width()
    norm, a, b = w.layer(f"nn.LayerNorm({w.c})", "norm"), w.linear(w.c, mid), w.linear(mid, w.c)
    w.do(f"x = x + {b}(F.gelu({a}({norm}(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)")


@block
def group_norm(w: Writer) -> None:
    groups = w.rng.choice([1, 2, 4])
    w.even(groups, 2 * groups)
    w.do(f"x = F.relu({w.layer(f'nn.GroupNorm({groups}, {w.c})', 'norm')}(x))")


@block
def instance_norm(w: Writer) -> None:
    w.do(f"x = F.relu({w.layer(f'nn.InstanceNorm2d({w.c}, affine=True)', 'norm')}(x))")


@block
def prelu(w: Writer) -> None:
    w.do(f"x = {w.layer(f'nn.PReLU({w.rng.choice([1, w.c])})', 'act')}(x)")


# Literal sizes.


@block
def literal_gate(w: Writer) -> None:
    w.even()
    half, out = w.c // 2, w.width()
    w.do(f"x = x[:, :{half}] * torch.sigmoid(x[:, {half}:])", f"x = {w.conv(out, half)}(x)")
    w.c = out


@block
def literal_slice_partial(w: Writer) -> None:
    first = w.rng.randrange(1, w.c)
    conv = w.conv(first, first)
    w.do(f"x = torch.cat([F.relu({conv}(x[:, :{first}])), x[:, {first}:]], 1)")


@block
def literal_slice_in_place(w: Writer) -> None:
    first = w.rng.randrange(1, w.c)
    conv = w.conv(first, first)
    w.do("y = x.clone()", f"y[:, :{first}] = {conv}(x[:, :{first}])", "x = y")


@block
def literal_heads(w: Writer) -> None:
    heads, width = w.rng.choice([2, 4]), w.rng.choice([2, 3, 5, 8])
    q, k, v = (w.conv(heads * width, k=1) for _ in range(3))
    out = w.conv(w.c, heads * width, 1)
    view = f".view(b, {heads}, {width}, h * w)"
    w.do(
        "b, c, h, w = x.shape",
        f"q, k, v = {q}(x){view}, {k}(x){view}, {v}(x){view}",
        f"y = ((q.transpose(2, 3) @ k) * {width**-0.5}).softmax(-1) @ v.transpose(2, 3)",
        f"x = x + {out}(y.transpose(2, 3).reshape(b, {heads * width}, h, w))",
    )
    w.by_weights = False


@block
def qkv_literal(w: Writer) -> None:
    heads, width = w.rng.choice([1, 2]), w.rng.choice([3, 4, 6])
    inner = heads * width
    qkv, out = w.linear(w.c, 3 * inner), w.linear(inner, w.c)
    w.do(
        "b, c, h, w = x.shape",
        "t = x.flatten(2).transpose(1, 2)",
        f"q, k, v = {qkv}(t).reshape(b, h * w, 3, {heads}, {width}).permute(2, 0, 3, 1, 4).unbind(0)",
        f"y = F.scaled_dot_product_attention(q, k, v, scale={width**-0.5})",
        f"t = t + {out}(y.transpose(1, 2).reshape(b, h * w, {inner}))",
        "x = t.transpose(1, 2).reshape(b, c, h, w)",
    )
    w.by_weights = False


@block
def literal_shuffle(w: Writer) -> None:
    groups = w.rng.choice([2, 3, 4])
    w.even(groups, 2 * groups)
    w.do(
        "b, c, h, w = x.shape",
        f"x = x.view(b, {groups}, {w.c // groups}, h, w).transpose(1, 2).reshape(b, {w.c}, h, w)",
    )
    if w.rng.random() < 0.5:
        w.do(f"x = {w.conv(w.c, groups=groups)}(x)")


@block
def literal_bias(w: Writer) -> None:
    bias = w.layer(f"nn.Parameter(torch.randn({w.c}))", "bias")
    w.do(f"x = x + {bias}.view({w.rng.choice(['1, -1, 1, 1', f'1, {w.c}, 1, 1'])})")


@block
def literal_split(w: Writer) -> None:
    first = w.rng.randrange(1, w.c)
    a, b = w.conv(first, first), w.conv(w.c - first, w.c - first)
    w.do(f"p, q = x.split([{first}, {w.c - first}], 1)", f"x = torch.cat([{a}(p), {b}(q)], 1)")


@block
def literal_split_size(w: Writer) -> None:
    part = w.rng.randrange(max(1, w.c // 4), w.c)
    sizes = [part] * (w.c // part) + ([w.c % part] if w.c % part else [])
    out = w.width()
    convs = [w.conv(out, size, 1) for size in sizes]
    w.do(f"parts = torch.split(x, {part}, 1)")
    w.do(f"x = {' + '.join(f'{conv}(parts[{i}])' for i, conv in enumerate(convs))}")
    w.c = out


@block
def literal_narrow(w: Writer) -> None:
    start = w.rng.randrange(w.c)
    length = w.rng.randrange(1, w.c - start + 1)
    out = w.width()
    w.do(f"x = F.relu({w.conv(out)}(x)) + {w.conv(out, length, 1)}(x.narrow(1, {start}, {length}))")
    w.c = out


@block
def literal_flatten(w: Writer) -> None:
    out, flat = w.width(), w.c * 4
    view = w.rng.choice([f"view(-1, {flat})", f"view(x.size(0), {flat})", "flatten(1)", f"reshape(-1, {flat})"])
    w.do("y = F.adaptive_avg_pool2d(x, 2)", f"x = F.relu({w.conv(out)}(x))")
    w.do(f"x = x * torch.sigmoid({w.linear(flat, out)}(y.{view.replace('x.', 'y.')}))[:, :, None, None]")
    w.c = out


@block
def literal_zeros(w: Writer) -> None:
    convs = [w.conv(w.c) for _ in range(2)]
    w.do(f"acc = torch.zeros(x.shape[0], {w.c}, {w.s}, {w.s}, dtype=x.dtype, device=x.device)")
    w.do(*(w.rng.choice([f"acc += {c}(x)", f"acc = acc + {c}(x)", f"acc.add_({c}(x))"]) for c in convs))
    w.do("x = F.relu(acc)")


@block
def literal_pad(w: Writer) -> None:
    more = w.rng.randrange(1, 9)
    conv = w.conv(w.c + more)
    around = w.rng.choice([f"0, {more}", f"{more}, 0", f"{more // 2}, {more - more // 2}"])
    w.do(f"x = F.relu(F.pad(x, (0, 0, 0, 0, {around})) + {conv}(x))")
    w.c += more


@block
def literal_expand(w: Writer) -> None:
    gate = w.conv(1)
    w.do(f"x = x * torch.sigmoid({gate}(x)).expand(-1, {w.c}, -1, -1)")


# Slices and parts that follow the width.


@block
def strided_slices(w: Writer) -> None:
    step = w.rng.choice([2, 2, 3])
    out = w.width()
    convs = [w.conv(out, len(range(first, w.c, step)), 1) for first in range(step)]
    w.do(f"x = {' + '.join(f'{conv}(x[:, {i}::{step}])' for i, conv in enumerate(convs))}")
    w.c = out


@block
def strided_slice_one(w: Writer) -> None:
    out, first = w.width(), w.rng.choice([0, 1])
    w.do(f"x = {w.conv(out)}(x) + {w.conv(out, len(range(first, w.c, 2)), 1)}(x[:, {first}::2])")
    w.c = out


@block
def strided_interleave(w: Writer) -> None:
    w.even()
    w.do("x = torch.stack([x[:, ::2], -x[:, 1::2]], 2).flatten(1, 2)")


@block
def half_slice(w: Writer) -> None:
    out, half = w.width(), w.c // 2
    a = w.conv(out, half, 1)
    b = w.conv(out, w.c - half, 1)
    w.do(f"x = {a}(x[:, : x.shape[1] // 2]) + {b}(x[:, x.shape[1] // 2 :])")
    w.c = out


@block
def third_slice(w: Writer) -> None:
    part = w.c // 3 or 1
    out = w.width()
    w.do("n = x.shape[1] // 3 or 1", f"x = {w.conv(out)}(x) + {w.conv(out, part, 1)}(x[:, :n])")
    w.c = out


@block
def slice_from_the_end(w: Writer) -> None:
    part = w.rng.randrange(1, w.c)
    out = w.width()
    w.do(f"x = {w.conv(out)}(x) + {w.conv(out, part, 1)}(x[:, -{part}:])")
    w.c = out


@block
def slice_to_match(w: Writer) -> None:
    more = w.rng.randrange(1, 9)
    conv = w.conv(w.c + more)
    w.do(f"y = {conv}(x)", "x = F.relu(x + y[:, : x.shape[1]])")


@block
def pad_to_match(w: Writer) -> None:
    more = w.rng.randrange(1, 9)
    conv = w.conv(w.c + more)
    w.do(f"y = {conv}(x)", "x = F.relu(y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))")
    w.c += more


@block
def chunk_two(w: Writer) -> None:
    w.even(w.rng.choice([1, 2]), 4)
    first = -(-w.c // 2)
    conv = w.conv(w.c - first, first)
    w.do("p, q = x.chunk(2, 1)", f"x = torch.cat([q * torch.sigmoid({conv}(p)), p], 1)")


@block
def chunk_uneven(w: Writer) -> None:
    count = w.rng.choice([3, 4])
    part = -(-w.c // count)
    sizes = [part] * (w.c // part) + ([w.c % part] if w.c % part else [])
    out = w.width()
    convs = [w.conv(out, size, 1) for size in sizes]
    w.do(f"parts = x.chunk({count}, 1)")
    w.do(f"x = {' + '.join(f'{conv}(parts[{i}])' for i, conv in enumerate(convs))}")
    w.c = out


@block
def split_by_width(w: Writer) -> None:
    w.even()
    convs = [w.conv(w.c // 2, w.c // 2) for _ in range(2)]
    w.do("n = x.shape[1] // 2", "p, q = torch.split(x, [n, x.shape[1] - n], 1)")
    w.do(f"x = torch.cat([{convs[0]}(p), {convs[1]}(q)], 1)")


@block
def res2net(w: Writer) -> None:
    w.even(4, 8)
    part = w.c // 4
    convs = w.layer(f"nn.ModuleList([nn.Conv2d({part}, {part}, 3, padding=1) for _ in range(3)])", "convs")
    w.do(
        f"parts = torch.split(x, {w.rng.choice([str(part), 'x.shape[1] // 4'])}, 1)",
        "outs = [parts[0]]",
        f"for part, conv in zip(parts[1:], {convs}):",
        "    outs.append(F.relu(conv(part + outs[-1] if len(outs) > 1 else part)))",
        "x = torch.cat(outs, 1)",
    )


@block
def glu(w: Writer) -> None:
    w.even()
    half, out = w.c // 2, w.width()
    w.do(f"x = {w.conv(out, half)}(F.glu(x, 1))")
    w.c = out


@block
def shuffle_by_width(w: Writer) -> None:
    groups = w.rng.choice([2, 3])
    w.even(groups, 2 * groups)
    w.do(
        "b, c, h, w = x.shape",
        f"x = x.view(b, {groups}, c // {groups}, h, w).transpose(1, 2).reshape(b, c, h, w)",
    )
    if w.rng.random() < 0.5:
        w.do(f"x = {w.conv(w.c, groups=groups)}(x)")


@block
def channel_shuffle(w: Writer) -> None:
    w.even(2)
    w.do("x = F.channel_shuffle(x, 2)")


@block
def pixel_shuffle(w: Writer) -> None:
    inner, out = w.width(high=10), w.width()
    up = w.conv(4 * inner, k=1)
    w.do(f"x = F.avg_pool2d({w.conv(out, inner)}(F.pixel_shuffle({up}(x), 2)), 2)")
    w.c = out


@block
def pixel_unshuffle(w: Writer) -> None:
    out = w.width()
    w.do(f"y = {w.conv(out, 4 * w.c, 1)}(F.pixel_unshuffle(x, 2))")
    w.do(f"x = F.relu({w.conv(out)}(x)) + F.interpolate(y, scale_factor=2)")
    w.c = out


@block
def fixed_permutation(w: Writer) -> None:
    order = w.rng.sample(range(w.c), w.c)
    how = w.rng.choice(["buffer", "list", "flip", "roll", "index_select"])
    if how == "buffer" or how == "index_select":
        name = w.name("order")
        w.init.append(f"self.register_buffer('{name}', torch.tensor({order}))")
        w.do(f"x = x[:, self.{name}]" if how == "buffer" else f"x = x.index_select(1, self.{name})")
    else:
        w.do({"list": f"x = x[:, {order}]", "flip": "x = x.flip(1)", "roll": f"x = torch.roll(x, {order[0]}, 1)"}[how])


@block
def repeated_channels(w: Writer) -> None:
    how = w.rng.choice(["x.repeat(1, 2, 1, 1)", "x.repeat_interleave(2, 1)", "torch.cat([x, -x], 1)"])
    w.do(f"x = {how}")
    out = w.width()
    w.do(f"x = F.relu({w.conv(out, 2 * w.c, 1)}(x))")
    w.c = out


@block
def one_channel_gate(w: Writer) -> None:
    index = w.rng.randrange(w.c)
    w.do(
        f"x = x * torch.sigmoid(x[:, {index}:{index + 1}])" if w.rng.random() < 0.5 else f"x = x * x[:, {index}, None]"
    )


@block
def loop_over_channels(w: Writer) -> None:
    conv = w.conv(1, 1)
    w.do(f"x = torch.cat([F.relu({conv}(x[:, i : i + 1])) for i in range(x.shape[1])], 1)")


@block
def maxout(w: Writer) -> None:
    w.even(2)
    half, out = w.c // 2, w.width()
    view = w.rng.choice(["x.shape[1] // 2, 2", f"{half}, 2", "2, x.shape[1] // 2"])
    dim = 1 if view.startswith("2,") else 2
    w.do(f"x = x.view(x.shape[0], {view}, *x.shape[2:]).amax({dim})")
    w.do(f"x = {w.conv(out, half)}(x)")
    w.c = out
    w.counts = True


@block
def softmax_over_channels(w: Writer) -> None:
    w.do("x = x * x.softmax(1)")


# Shared layers and computed weights.


@block
def shared_twice(w: Writer) -> None:
    conv = w.conv(w.c)
    w.do(f"x = F.relu({conv}(F.relu({conv}(x))))")


@block
def shared_on_branches(w: Writer) -> None:
    mid, out = w.width(), w.width()
    a, b, shared = w.conv(mid), w.conv(mid, k=1), w.conv(out, mid)
    w.do(f"x = {shared}(F.relu({a}(x))) + {shared}(F.relu({b}(x)))")
    w.c = out


@block
def shared_on_parts(w: Writer) -> None:
    w.even(2)
    half = w.c // 2
    conv = w.conv(half, half)
    w.do(f"x = torch.cat([{conv}(x[:, :{half}]), {conv}(x[:, {half}:])], 1)")


@block
def tied_weights(w: Writer) -> None:
    mid = w.width()
    a = w.conv(mid, k=1)
    w.do(f"y = F.relu({a}(x))", f"x = x + F.conv_transpose2d(y, {a}.weight)")
    w.by_weights = False


@block
def gained_weight(w: Writer) -> None:
    out = w.width()
    weight = w.layer(f"nn.Parameter(torch.randn({out}, {w.c}, 3, 3))", "w")
    gain = w.layer(f"nn.Parameter(torch.randn({w.rng.choice([f'{out}, 1, 1, 1', f'1, {w.c}, 1, 1'])}))", "g")
    w.readers[weight.removeprefix("self.")] = 1
    w.do(f"x = F.conv2d(x, {weight} * {gain}, padding=1)")
    w.c = out


@block
def standardised_weight(w: Writer) -> None:
    out = w.width()
    conv = w.layer(f"StandardisedConv2d({w.c}, {out}, 3, padding=1)", "conv")
    w.do(f"x = F.relu({conv}(x))")
    w.c = out


@block
def weight_norm(w: Writer) -> None:
    out = w.width()
    how = w.rng.choice(["torch.nn.utils.weight_norm", "torch.nn.utils.parametrizations.weight_norm"])
    conv = w.layer(f"{how}(nn.Conv2d({w.c}, {out}, 3, padding=1))", "conv")
    w.do(f"x = F.relu({conv}(x))")
    w.c = out
    w.counts = True


@block
def functional_groups(w: Writer) -> None:
    groups = w.rng.choice([2, 4])
    w.even(groups, 2 * groups)
    out = w.width(of=groups, low=2 * groups)
    weight = w.layer(f"nn.Parameter(torch.randn({out}, {w.c // groups}, 3, 3))", "w")
    w.readers[weight.removeprefix("self.")] = 1
    w.do(f"x = F.conv2d(x, {weight}, padding=1, groups={groups})")
    w.c = out


@block
def functional_depthwise(w: Writer) -> None:
    weight = w.layer(f"nn.Parameter(torch.randn({w.c}, 1, 3, 3))", "w")
    w.do(f"x = F.conv2d(x, {weight}, padding=1, groups={w.rng.choice([str(w.c), 'x.shape[1]'])})")


@block
def bare_matrix(w: Writer) -> None:
    out = w.width()
    weight = w.layer(f"nn.Parameter(torch.randn({w.c}, {out}))", "w")
    w.readers[weight.removeprefix("self.")] = 0
    how = [
        f"(x.permute(0, 2, 3, 1) @ {weight}).permute(0, 3, 1, 2)",
        f"torch.einsum('bchw,co->bohw', x, {weight})",
        f"torch.tensordot(x, {weight}, dims=([1], [0])).permute(0, 3, 1, 2)",
    ]
    w.do(f"x = ({w.rng.choice(how)}).contiguous()")
    w.c = out


@block
def dynamic_weight(w: Writer) -> None:
    out = w.width(high=12)
    hyper = w.linear(w.c, out * w.c)
    w.do(
        "b, c, h, w = x.shape",
        f"k = {hyper}(x.mean((2, 3))).view(b, {out}, {w.rng.choice(['c', str(w.c)])})",
        f"x = torch.bmm(k, x.flatten(2)).view(b, {out}, h, w)",
    )
    w.c = out
    w.by_weights = False


# Width arithmetic at run time.


@block
def divided_by_width(w: Writer) -> None:
    out = w.width()
    how = w.rng.choice(["x - x.sum(1, keepdim=True) / x.shape[1]", "x / x.shape[1]", "x / float(x.size(1))"])
    w.do(f"x = {w.conv(out)}({how})")
    w.c = out
    w.by_weights = False


@block
def scaled_by_width(w: Writer) -> None:
    out = w.width()
    how = w.rng.choice(["x * x.shape[1] ** -0.5", "x / math.sqrt(x.shape[1])", "x * (1 / x.size(1))"])
    w.do(f"x = {w.conv(out)}({how})")
    w.c = out


@block
def width_as_tensor(w: Writer) -> None:
    out = w.width()
    how = ["x / torch.tensor(float(x.shape[1]))", "x / torch.full((1,), x.shape[1], dtype=x.dtype)",
           "x * torch.ones_like(x).sum(1, keepdim=True)"]  # fmt: skip
    w.do(f"x = {w.conv(out)}({w.rng.choice(how)})")
    w.c = out


@block
def width_in_a_range(w: Writer) -> None:
    out = w.width()
    w.do("ramp = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)")
    w.do(f"x = {w.conv(out)}(x + {w.rng.choice(['ramp', 'torch.linspace(0, 1, x.shape[1])'])}[None, :, None, None])")
    w.c = out


@block
def clamped_by_width(w: Writer) -> None:
    out = w.width()
    how = w.rng.choice(["x.clamp(max=x.shape[1] / 10)", "x.clamp(-x.shape[1], x.shape[1])", "x.pow(x.shape[1] % 2 + 1)",
                        "F.leaky_relu(x, 1 / x.shape[1])", "F.threshold(x, x.shape[1] / 20, 0.0)"])  # fmt: skip
    w.do(f"x = {w.conv(out)}({how})")
    w.c = out


@block
def branch_on_width(w: Writer) -> None:
    out = w.width()
    how = w.rng.choice([
        f"F.relu(x) if x.shape[1] >= {w.c} else -x",
        f"F.relu(x) if x.shape[1] % 2 == {w.c % 2} else x.tanh()",
        f"x.flip(2) if x.shape[1] > {max(1, w.c // 2)} else x",
        f"x.mean((2, 3), keepdim=True) + x if x.shape[1] > {max(1, w.c - 2)} else x",
    ])  # fmt: skip
    w.do(f"x = {how}", f"x = {w.conv(out)}(x)")
    w.c = out


@block
def attention_scale_of_width(w: Writer) -> None:
    inner = w.width(high=12)
    q, k, v, o = w.conv(inner, k=1), w.conv(inner, k=1), w.conv(inner, k=1), w.conv(w.c, inner, 1)
    scale = w.rng.choice(["math.sqrt(q.shape[1])", "q.shape[1] ** 0.5", "(q.size(1) ** 0.5)", f"{inner**0.5}"])
    w.do(
        f"q, k, v = {q}(x).flatten(2), {k}(x).flatten(2), {v}(x).flatten(2)",
        f"y = (q.transpose(1, 2) @ k / {scale}).softmax(-1)",
        f"x = x + {o}((v @ y.transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:]))",
    )
    w.by_weights = False


@block
def sdpa_default_scale(w: Writer) -> None:
    inner = w.width(high=12)
    q, k, v, o = w.linear(w.c, inner), w.linear(w.c, inner), w.linear(w.c, inner), w.linear(inner, w.c)
    w.do(
        "t = x.flatten(2).transpose(1, 2)",
        f"t = t + {o}(F.scaled_dot_product_attention({q}(t), {k}(t), {v}(t)))",
        "x = t.transpose(1, 2).reshape(x.shape)",
    )
    w.by_weights = False


@block
def cosine(w: Writer) -> None:
    w.do("x = F.normalize(x, dim=1)" if w.rng.random() < 0.5 else "x = x / (x.norm(dim=1, keepdim=True) + 1e-6)")
    w.by_weights = False


@block
def sum_over_channels(w: Writer) -> None:
    w.do(f"x = x * torch.sigmoid(x.sum(1, keepdim=True) * {1 / w.c})")
    w.by_weights = False


@block
def mean_over_channels(w: Writer) -> None:
    how = ["x - x.mean(1, keepdim=True)", "x * torch.sigmoid(x.mean(1, keepdim=True))",
           "x * torch.sigmoid(x.amax(1, keepdim=True))", "x / (x.std(1, keepdim=True) + 1)"]  # fmt: skip
    w.do(f"x = {w.rng.choice(how)}")
    w.counts = True


# where, masks, in-place writes.


@block
def where(w: Writer) -> None:
    how = ["torch.where(x > 0, x, 0.1 * x)", "torch.where(x > 0, x, torch.zeros_like(x))",
           "torch.where(x.abs() > 0.1, x, torch.tensor(0.0, dtype=x.dtype))", "x * (x > 0)",
           "x.masked_fill(x < 0, 0.5)", "x * (x > 0).type_as(x)", "x * (x > 0).to(x.dtype)", "x * (x > 0).float()"]  # fmt: skip
    w.do(f"x = {w.rng.choice(how)}")


@block
def where_index(w: Writer) -> None:
    w.do("keep = torch.where(torch.ones(x.shape[2], device=x.device) > 0)[0]", "x = x.index_select(2, keep)")


@block
def channel_mask(w: Writer) -> None:
    mask = [w.rng.randrange(2) for _ in range(w.c)]
    name, kind = w.name("mask"), w.rng.choice(["float", "bool", "fill"])
    dtype = "torch.float32" if kind == "float" else "torch.bool"
    w.init.append(f"self.register_buffer('{name}', torch.tensor({mask}, dtype={dtype}).view(1, -1, 1, 1))")
    w.do(f"x = x.masked_fill(self.{name}, 0.3)" if kind == "fill" else f"x = x * self.{name}")


@block
def type_as_positions(w: Writer) -> None:
    w.do("x = x + torch.arange(x.shape[3], device=x.device).type_as(x)")


@block
def accumulator(w: Writer) -> None:
    convs = [w.conv(w.c) for _ in range(2)]
    start = w.rng.choice(
        ["torch.zeros_like(x)", "x.new_zeros(x.shape)", "torch.zeros(x.shape, dtype=x.dtype)", "x * 0", "x.clone()"]
    )
    w.do(f"acc = {start}")
    for conv in convs:
        w.do(w.rng.choice([f"acc += {conv}(x)", f"acc[:] = acc + {conv}(x)", f"acc.copy_(acc + {conv}(x))",
                           f"acc[:, :] += {conv}(x)", f"acc.add_({conv}(x), alpha=0.5)"]))  # fmt: skip
    w.do("x = F.relu(acc)")


@block
def assembled_in_place(w: Writer) -> None:
    first, second = w.width(high=20), w.width(high=20)
    a, b = w.conv(first), w.conv(second)
    w.do(
        "b, c, h, w = x.shape",
        f"y = torch.{w.rng.choice(['zeros', 'empty'])}(b, {first + second}, h, w, dtype=x.dtype, device=x.device)",
        f"y[:, :{first}] = {a}(x)",
        f"y[:, {first}:] = {b}(x)",
        "x = F.relu(y)",
    )
    w.c = first + second


@block
def filled_list(w: Writer) -> None:
    out = w.width(high=16)
    convs = w.layer(f"nn.ModuleList([nn.Conv2d({w.c}, {out}, 1) for _ in range(3)])", "convs")
    w.do(
        f"y = x.new_zeros(x.shape[0], 3, {out}, *x.shape[2:])",
        f"for i, conv in enumerate({convs}):",
        "    y[:, i] = conv(x)",
        f"x = {w.rng.choice(['y.sum(1)', 'y.mean(1)', 'y.amax(1)'])}",
    )
    w.c = out


@block
def written_view(w: Writer) -> None:
    part = w.rng.randrange(1, w.c)
    w.do("x = F.relu(x) * 0.5")
    w.do(w.rng.choice([f"x[:, :{part}].mul_(2.0)", f"x[:, {part}] += 1.0", f"x[:, {part}:] *= -1.0",
                       "x[:, ::2].mul_(0.5)", "x[:, -1] = 0.0", "x.transpose(0, 1)[0] *= 3.0",
                       "x.chunk(2, 1)[0].mul_(2.0)", "x[:, :, 1:3].add_(1.0)"]))  # fmt: skip


@block
def relu_in_place(w: Writer) -> None:
    conv = w.conv(w.c)
    w.do(f"y = {conv}(x)", "y += x", "y *= 0.5", "x = F.relu_(y)")


@block
def cached_activation(w: Writer) -> None:
    conv = w.conv(w.c)
    w.do("self.feat = x", f"x = F.relu({conv}(x))", "x = x + self.feat")


@block
def lost_origin(w: Writer) -> None:
    conv = w.conv(w.c)
    how = w.rng.choice(
        ["x.data", "x.detach()", "copy.deepcopy(x.detach())", "copy.copy(x)", "x.clone()", "x.contiguous().view_as(x)"]
    )
    w.do(f"x = x + {conv}({how})")
    w.do("y = x.data.relu()", "x = x + y") if w.rng.random() < 0.5 else None


# What differs between training and evaluation.


@block
def auxiliary_head(w: Writer) -> None:
    w.do("if self.training:", f"    aux.append({w.conv(3, k=1)}(x).mean((2, 3)))")


@block
def auxiliary_branch(w: Writer) -> None:
    mid = w.width()
    a, b = w.conv(mid), w.conv(3, mid, 1)
    w.do("if self.training:", f"    aux.append({b}(F.relu({a}(x))).mean((2, 3)))")


@block
def residual_in_training(w: Writer) -> None:
    w.do("if self.training:", f"    x = x + {w.conv(w.c)}(x)")


@block
def training_norm(w: Writer) -> None:
    w.do("if not self.training:", "    x = x * 1.0", "else:", "    x = x - x.mean((2, 3), keepdim=True)")


@block
def training_slice(w: Writer) -> None:
    part = w.rng.randrange(1, w.c)
    w.do("if self.training:", f"    aux.append({w.conv(3, part, 1)}(x[:, :{part}]).mean((2, 3)))")


def _plain_head(w: Writer) -> str:
    return f"{w.linear(w.c, 5)}(x.mean((2, 3)))"


def _flat_head(w: Writer) -> str:
    flat, mid = w.c * 4, w.width()
    view = w.rng.choice([f"view(-1, {flat})", f"view(y.size(0), {w.c} * 2 * 2)", "flatten(1)", "view(y.size(0), -1)"])
    a, b = w.linear(flat, mid), w.linear(mid, 5)
    w.do("y = F.adaptive_avg_pool2d(x, 2)", f"y = F.relu({a}(y.{view}))")
    return f"{b}(y)"


OUTPUTS = {
    "tensor": "logits",
    "tuple": "(logits, x)",
    "dict": "{'logits': logits, 'features': x}",
    "nested": "{'out': [logits, (x, None)]}",
    "named_tuple": "Pair(logits, x)",
    "dataclass": "Record(logits, x)",
    "plain_object": "Plain(logits, x)",
    "model_output": "ModelOutput(logits=logits, features=x)",
    "in_a_list_of_objects": "[Record(logits, x)]",
}
"""What forward returns: all but the first give the features away too, which therefore must stay."""


def network(seed: int, only: str | None = None, output: str | None = None) -> Network:
    """The network of a seed.

    Args:
        seed: Same seed, same network.
        only: The one construct to put into it; else up to four random ones.
        output: A name of `OUTPUTS`; else a random one, a tensor in most.
    """
    rng = random.Random(f"{seed} {only}")
    w = Writer(rng, c=rng.randrange(4, 41))
    w.do(f"x = F.relu({w.conv(w.c, 3)}(x))")
    names = [only] if only else rng.sample(sorted(BLOCKS), rng.randrange(1, 5))
    for name in names:
        BLOCKS[name](w)
        if w.c > 40 or rng.random() < 0.5:
            BLOCKS["conv_bn_act"](w)
    if output is None:
        output = "tensor" if only or rng.random() < 0.7 else rng.choice(sorted(OUTPUTS))
    head = rng.choice([_plain_head, _plain_head, _flat_head])
    logits = head(w)
    source = "\n".join(
        [
            "class Net(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in w.init),
            "",
            "    def forward(self, x):",
            "        aux = []",
            *(f"        {line}" for line in w.forward if line),
            f"        logits = {logits}",
            f"        out = {OUTPUTS[output]}",
            "        return (out, aux) if self.training and aux else out",
        ]
    )
    module = random_values(_built(source, f"<network {seed} {only or ''}>", seed), seed).eval()
    inputs = (torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)),)
    constructs = (*names, f"returns_{output}")
    return Network(seed, constructs, source, module, inputs, w.readers, w.by_weights, w.counts)


def _built(source: str, filename: str, seed: int) -> nn.Module:
    """Runs the text, which has a file of its own in tracebacks, and builds the module."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    names: dict[str, Any] = {
        **{"torch": torch, "nn": nn, "F": F, "math": math, "copy": __import__("copy")},
        **{"Pair": Pair, "Record": Record, "Plain": Plain, "ModelOutput": ModelOutput},
        **{"StandardisedConv2d": StandardisedConv2d, "__name__": "tests.user_networks"},
    }
    torch.manual_seed(seed)
    exec(compile(source, filename, "exec"), names)
    return names["Net"]()
