"""Blocks of random networks: the plain ones, and those with sizes written as numbers."""

from __future__ import annotations

from tests.user_writer import Writer, block

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
