"""Blocks of random networks: shared layers, computed weights, and arithmetic with the width."""

from __future__ import annotations

from tests.user_writer import Writer, block

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
