"""Sums of products: linear layers, matrix products, einsum, attention."""

from __future__ import annotations

import math

import numpy as np

from scap_hub.channels.labels import Ids, broadcast, line, merge, support
from scap_hub.channels.operators.table import Call, Consumer, Cost, Producer, rule


def contraction(call: Call, operands: list[Ids], labels: list[str], out: str, weight: str | None = None) -> Ids:
    """A product of tensors whose dimensions carry labels, summed over the labels that `out` lacks.

    Every operand that has a label must lose the same elements of it.
    """
    ledger, reason = call.ledger, f"is multiplied with a tensor that cannot shrink ({call.place})"
    along: dict[str, np.ndarray] = {}
    size: dict[str, int] = {}
    for operand, names in zip(operands, labels, strict=True):
        for dim, name in enumerate(names):
            size[name] = max(size.get(name, 1), operand.shape[dim])
        for layer in operand.layers:
            if len(support(layer)) > 1:
                ledger.pin(layer, f"varies along several dimensions of a product ({call.place})")
    for name in size:
        tracked = [
            operand.along(names.index(name))
            for operand, names in zip(operands, labels, strict=True)
            if name in names and operand.shape[names.index(name)] > 1
        ]
        present = [ids for ids in tracked if ids is not None]
        if len(present) < len(tracked):
            for ids in present:
                ledger.pin(ids, reason)
        elif present:
            for ids in present[1:]:
                ledger.equate(present[0], ids, reason)
            along[name] = present[0]
            if name not in out:
                call.trace.summed.append(present[0])
    every = list(size)
    space = Ids(tuple(size.values()), tuple(line(ids, every.index(name), len(every)) for name, ids in along.items()))
    call.trace.costs.append(Cost(space, 1, weight))
    return Ids(
        tuple(size[name] for name in out),
        tuple(line(ids, out.index(name), len(out)) for name, ids in along.items() if name in out),
    )


@rule("linear")
def linear(call: Call) -> Ids:
    """Y = x Wᵀ + b on the last dimension."""
    x, w, name = call.ids("input"), call.ids("weight"), call.state("weight")
    batch = "abcdefgh"[: len(x.shape) - 1]
    out = contraction(call, [x, w], [batch + "i", "oi"], batch + "o", name)
    rows, columns = w.along(0), x.along(-1)
    if name and rows is not None:
        call.trace.producers.append(Producer(call.node, name, rows))
    if name and columns is not None:
        call.trace.consumers.append(Consumer(call.node, name, columns))
    if call.given("bias"):
        out = broadcast(call.ledger, [out, call.ids("bias")], call.shape, f"has a fixed bias ({call.place})")
    return out


@rule("matmul", "mm", "bmm")
def matmul(call: Call) -> Ids:
    """Matrix product with broadcast batch dimensions."""
    left, right = call.tensors if len(call.tensors) == 2 else (call.tensors[0], call.tensors[0])
    return _matmul(call, left, right)


@rule("addmm", "baddbmm")
def addmm(call: Call) -> Ids:
    """Self + a @ b."""
    names = ("mat1", "mat2") if call.op.startswith("addmm") else ("batch1", "batch2")
    product = _matmul(call, *(call.ids(name) for name in names))
    return broadcast(call.ledger, [call.ids("self"), product], call.shape, f"meets a fixed tensor ({call.place})")


def _matmul(call: Call, left: Ids, right: Ids) -> Ids:
    if min(len(left.shape), len(right.shape)) < 2:
        call.ledger.pin_all([left, right], f"is multiplied with a vector ({call.place})")
        return Ids(call.shape)
    batch = "abcdefgh"[: max(len(left.shape), len(right.shape)) - 2]
    labels = [batch[len(batch) - (len(ids.shape) - 2) :] for ids in (left, right)]
    return contraction(call, [left, right], [labels[0] + "mk", labels[1] + "kn"], batch + "mn")


@rule("einsum")
def einsum(call: Call) -> Ids:
    """Any einsum without ellipsis or repeated labels."""
    equation = call["equation"].replace(" ", "")
    operands = [call.trace.ids[node] for node in call["tensors"]]
    left, arrow, out = equation.partition("->")
    labels = left.split(",")
    if not arrow or "." in equation or any(len(set(names)) < len(names) for names in labels):
        call.ledger.pin_all(operands, f"enters an einsum without a rule ({equation})")
        return Ids(call.shape)
    return contraction(call, operands, labels, out)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Ids:
    """softmax(q kᵀ · scale) v; without an explicit scale the width of q and k is part of the function."""
    q, k, v = (call.ids(name) for name in ("query", "key", "value"))
    if call["scale"] is None:
        for ids in (q, k):
            if (width := ids.along(-1)) is not None:
                call.ledger.pin(width, f"sets the scale of an attention ({call.place})")
        q, k = (Ids(ids.shape, tuple(s for s in ids.layers if len(ids.shape) - 1 not in support(s))) for ids in (q, k))
    for ids in (q, k):
        if (tokens := ids.along(-2)) is not None:
            call.ledger.pin(tokens, f"is normalised over by a softmax ({call.place})")
    batch = "abcdefgh"[: len(q.shape) - 2]
    weights = contraction(call, [q.only(*range(len(q.shape) - 2), -1), k.only(*range(len(k.shape) - 2), -1)],
                          [batch + "md", batch + "nd"], batch + "mn")  # fmt: skip
    if call.given("attn_mask"):
        mask = call.ids("attn_mask")
        weights = broadcast(call.ledger, [weights, mask], weights.shape, f"meets a fixed mask ({call.place})")
    return contraction(call, [weights, v], [batch + "mn", batch + "nv"], batch + "mv")


@rule("norm", "linalg_vector_norm", "cdist")
def unsupported(call: Call) -> Ids:
    """Left to a rule of its own when a model needs it."""
    call.ledger.pin_all(call.tensors, f"enters {call.place}, which has no rule")
    return merge(call.ledger, call.shape, [], "")


def positions(shape: tuple[int, ...]) -> int:
    """Number of positions of a feature map (N, C, ...): all but the channels."""
    return shape[0] * math.prod(shape[2:])
