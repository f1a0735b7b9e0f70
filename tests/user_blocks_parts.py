"""Blocks of random networks: slices, splits and shuffles of channels that follow the width."""

from __future__ import annotations

from tests.user_writer import Writer, block

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
