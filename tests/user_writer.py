"""Writes the source of a network: what the blocks of `tests.user_networks` add to."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SIZE = 8
"""Height and width of the input images."""


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
