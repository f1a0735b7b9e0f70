"""Sums of products: linear layers, matrix products, einsum, attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from scap_hub.channels.labels import Labels, broadcast, line, support
from scap_hub.channels.operators.table import (
    Call,
    Consumer,
    Cost,
    Integers,
    Producer,
    Size,
    always,
    module_integers,
    operator,
)
from scap_hub.surgery import SCALED


def contraction(call: Call, operands: list[Labels], letters: list[str], out: str, weight: str | None = None) -> Labels:
    """A product of tensors whose dimensions carry letters, summed over the letters that `out` lacks.

    Every operand that has a letter must lose the same elements of it.
    """
    size = _sizes(operands, letters)
    along: dict[str, np.ndarray] = {}
    for operand in operands:
        for array in operand.arrays:
            if len(support(array)) > 1:
                call.ledger.pin(array, f"varies along several dimensions of a product ({call.place})")
    for letter in size:
        agreed = _agreed(call, operands, letters, letter)
        if agreed is not None:
            along[letter] = agreed
            if letter not in out:
                call.trace.summed.append(agreed)
    every = list(size)
    products = tuple(line(labels, every.index(letter), len(every)) for letter, labels in along.items())
    call.trace.costs.append(Cost(Labels(tuple(size.values()), products), 1, weight))
    return Labels(
        tuple(size[letter] for letter in out),
        tuple(line(labels, out.index(letter), len(out)) for letter, labels in along.items() if letter in out),
    )


def _sizes(operands: list[Labels], letters: list[str]) -> dict[str, int]:
    """How long the dimension of each letter is."""
    size: dict[str, int] = {}
    for operand, own in zip(operands, letters, strict=True):
        for dim, letter in enumerate(own):
            size[letter] = max(size.get(letter, 1), operand.shape[dim])
    return size


def _agreed(call: Call, operands: list[Labels], letters: list[str], letter: str) -> np.ndarray | None:
    """The labels of a letter, equated over the operands that have it; None, and pinned, where one cannot shrink."""
    tracked = [
        operand.along(own.index(letter))
        for operand, own in zip(operands, letters, strict=True)
        if letter in own and operand.shape[own.index(letter)] > 1
    ]
    present = [labels for labels in tracked if labels is not None]
    # Where heads of queries share those of keys, the two are not equally many.
    if len(present) < len(tracked) or len({labels.size for labels in present}) > 1:
        for labels in present:
            call.ledger.pin(labels, f"is multiplied with a tensor that cannot shrink ({call.place})")
        return None
    for labels in present[1:]:
        call.ledger.equate(present[0], labels, f"is multiplied with a tensor that cannot shrink ({call.place})")
    return present[0] if present else None


@operator("linear")
def linear(call: Call) -> Labels:
    """Y = x Wᵀ + b on the last dimension."""
    x, w, name = call.labels("input"), call.labels("weight"), call.state("weight")
    batch = "abcdefgh"[: len(x.shape) - 1]
    if len(w.shape) == 1:  # a product with one vector, which computes no channels
        return contraction(call, [x, w], [batch + "i", "i"], batch)
    out = contraction(call, [x, w], [batch + "i", "oi"], batch + "o", name)
    rows, columns = w.along(0), x.along(-1)
    if name and rows is not None:
        call.trace.producers.append(Producer(call.node, name, rows))
    if name and columns is not None:
        call.trace.consumers.append(Consumer(call.node, name, columns))
    if call.given("bias"):
        out = broadcast(call.ledger, [out, call.labels("bias")], call.shape, f"has a fixed bias ({call.place})")
    return out


@operator("matmul", "mm", "bmm", counts=always)
def matmul(call: Call) -> Labels:
    """Matrix product with broadcast batch dimensions."""
    left, right = call.tensors if len(call.tensors) == 2 else (call.tensors[0], call.tensors[0])
    return _matmul(call, left, right)


@operator("addmm", "baddbmm")
def addmm(call: Call) -> Labels:
    """Self + a @ b."""
    names = ("mat1", "mat2") if call.op.startswith("addmm") else ("batch1", "batch2")
    product = _matmul(call, *(call.labels(name) for name in names))
    return broadcast(call.ledger, [call.labels("self"), product], call.shape, f"meets a fixed tensor ({call.place})")


def _matmul(call: Call, left: Labels, right: Labels) -> Labels:
    if min(len(left.shape), len(right.shape)) < 2:
        call.ledger.pin_all([left, right], f"is multiplied with a vector ({call.place})")
        return Labels(call.shape)
    batch = "abcdefgh"[: max(len(left.shape), len(right.shape)) - 2]
    outer = [batch[len(batch) - (len(own.shape) - 2) :] for own in (left, right)]
    return contraction(call, [left, right], [outer[0] + "mk", outer[1] + "kn"], batch + "mn")


@operator("einsum", counts=always)
def einsum(call: Call) -> Labels:
    """Any einsum without ellipsis or repeated letters."""
    equation = call["equation"].replace(" ", "")
    operands = [call.trace.labels[node] for node in call["tensors"]]
    left, arrow, out = equation.partition("->")
    letters = left.split(",")
    if not arrow or "." in equation or any(len(set(own)) < len(own) for own in letters):
        call.ledger.pin_all(operands, f"enters an einsum without a rule ({equation})")
        return Labels(call.shape)
    while len(operands) > 2:  # torch multiplies two at a time, from the left
        pair, letters = letters[:2], letters[2:]
        product = "".join(letter for letter in dict.fromkeys("".join(pair)) if letter in out + "".join(letters))
        operands = [contraction(call, operands[:2], pair, product), *operands[2:]]
        letters = [product, *letters]
    return contraction(call, operands, letters, out)


def _scale(call: Call) -> Iterator[Size]:
    """Without an explicit scale, the width of q and k sets it: 1/√width."""
    query = call.labels("query")
    if call["scale"] is None and (width := query.along(-1)) is not None:
        yield Size("scale", None, width, left_out=query.shape[-1] ** -0.5)


def _own_call(call: Call) -> bool:
    """Whether the forward pass calls the operator itself, and not a function of torch's around it."""
    return call.node.site is not None and call.node.site.function == SCALED


@operator("scaled_dot_product_attention", counts=always, sizes=_scale)
def attention(call: Call) -> Labels:
    """softmax(q kᵀ · scale) v."""
    q, k, v = (call.labels(name) for name in ("query", "key", "value"))
    if call["scale"] is None and not _own_call(call):
        for size in _scale(call):
            call.ledger.pin(size.labels, f"sets the scale of an attention that is out of reach ({call.place})")
    for operand in (q, k):
        if (tokens := operand.along(-2)) is not None:
            call.ledger.pin(tokens, f"is normalised over by a softmax ({call.place})")
    batch = "abcdefgh"[: len(q.shape) - 2]
    weights = contraction(call, [q.only(*range(len(q.shape) - 2), -1), k.only(*range(len(k.shape) - 2), -1)],
                          [batch + "md", batch + "nd"], batch + "mn")  # fmt: skip
    if call.given("attn_mask"):
        mask = call.labels("attn_mask")
        weights = broadcast(call.ledger, [weights, mask], weights.shape, f"meets a fixed mask ({call.place})")
    return contraction(call, [weights, v], [batch + "mn", batch + "nv"], batch + "mv")


@operator("cdist")
def distances(call: Call) -> Labels:
    """Distances between vectors: left to a rule of its own when a model needs it."""
    call.ledger.pin_all(call.tensors, f"enters {call.place}, which has no rule")
    return Labels(call.shape)


@module_integers("linear", nn.Linear)
def linear_integers(module: Any, weight: tuple[int, ...]) -> Integers:
    """Of linear layers."""
    return {"in_features": weight[1], "out_features": weight[0]}


def positions(shape: tuple[int, ...]) -> int:
    """Number of positions of a feature map (N, C, ...): all but the channels."""
    return shape[0] * math.prod(shape[2:])
