"""Blocks of random networks: masks, writes in place, and what differs in training mode."""

from __future__ import annotations

from tests.user_writer import Writer, block

# where, masks, in-place writes.


@block
def where(w: Writer) -> None:
    how = ["torch.where(x > 0, x, 0.1 * x)", "torch.where(x > 0, x, torch.zeros_like(x))",
           "torch.where(x.abs() > 0.1, x, torch.tensor(0.0, dtype=x.dtype))", "x * (x > 0)",
           "x.masked_fill(x < 0, 0.5)", "x * (x > 0).type_as(x)", "x * (x > 0).to(x.dtype)",
           "x * (x > 0).float()"]  # fmt: skip
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
    # A product, because the references want channels of zeros to stay such.
    w.do("x = x * torch.arange(1, x.shape[3] + 1, device=x.device).type_as(x)")


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
                       "x[:, :, 1:3].add_(1.0)"]))  # fmt: skip


@block
def partial_conv(w: Writer) -> None:
    part = w.rng.randrange(2, w.c)
    conv = w.conv(part, part)
    w.do("x = F.relu(x) * 0.5")
    w.do(w.rng.choice([f"x[:, :{part}] = {conv}(x[:, :{part}].clone())",
                       f"x[:, -{part}:] += {conv}(x[:, -{part}:].clone())",
                       f"x.narrow(1, 0, {part}).copy_({conv}(x[:, :{part}].clone()))"]))  # fmt: skip


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
