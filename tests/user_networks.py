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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import user_blocks_computed, user_blocks_in_place, user_blocks_literal, user_blocks_parts
from tests.independent import StandardisedConv2d, random_values
from tests.user_writer import BLOCKS, SIZE, Writer


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


assert user_blocks_literal and user_blocks_parts and user_blocks_computed and user_blocks_in_place  # they fill BLOCKS


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
