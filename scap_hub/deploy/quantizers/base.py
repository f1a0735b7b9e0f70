"""What a quantiser is asked for, whoever made it."""

from __future__ import annotations

import contextlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PERCENTILE = 99.99
"""Of an activation's values, that "percentile" ranges represent."""


@dataclass(frozen=True)
class Scheme:
    """How numbers are mapped to eight bits.

    Attributes:
        ranges: What of an activation's values is represented: "minmax" all of them, "percentile" but for the largest
            one in ten thousand, "histogram" as many as make the least error.
        per_channel: Whether each output channel of a weight has its own scale, or the whole tensor one.
    """

    ranges: str
    per_channel: bool

    def __str__(self) -> str:
        return f"{self.ranges} ranges, weights per {'channel' if self.per_channel else 'tensor'}"


SCHEMES = (Scheme("minmax", True), Scheme("percentile", True), Scheme("minmax", False))
"""In the order in which they are tried."""


class Quantizer(ABC):
    """Writes int8 variants of one model.

    Attributes:
        schemes: Those that it knows, in the order in which they are tried.
        layers: Names of what it can leave in float32, in the order in which they run.
    """

    schemes: Sequence[Scheme] = SCHEMES
    layers: Sequence[str] = ()

    @abstractmethod
    def write(self, target: Path, scheme: Scheme, kept: Collection[str] = (), only: Collection[str] = ()) -> None:
        """Writes a variant.

        Args:
            target: The file.
            scheme: One of `schemes`.
            kept: Layers that stay in float32.
            only: Layers that are quantised; all others if left out.

        Raises:
            ModelError: The model cannot be quantised.
        """


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Quantisers print, and warn through the root logger of what is no fault of the user's."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
