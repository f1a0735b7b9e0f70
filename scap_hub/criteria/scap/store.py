"""A tensor that grows image by image, in a file: spectra of one layer on all calibration images."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scap_hub.errors import CalibrationError

Chunk = tuple[Path, int, tuple[int, ...], np.dtype]
"""Where rows are: file, offset in bytes, shape, type."""


class SpectraStore:
    """Rows of equal shape, one an image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chunks: dict[int, Chunk] = {}

    def write(self, first: int, rows: Tensor) -> None:
        """Adds rows, or replaces them.

        Args:
            first: Number of rows before these.
            rows: (n, *shape).

        Raises:
            CalibrationError: The disk is full, or cannot be written to.
        """
        data = rows.contiguous().cpu().numpy()
        try:
            with self.path.open("ab") as file:
                self._chunks[first] = self.path, file.tell(), data.shape, data.dtype
                file.write(data.data)
        except OSError as error:
            raise CalibrationError(
                f"cannot keep spectra in {str(self.path.parent)!r}: {error.strerror}; set the environment variable "
                "TMPDIR to a folder with more space, or take fewer calibration images"
            ) from error

    def share(self, first: int, other: SpectraStore) -> None:
        """Takes over the rows that another store has got from number `first` on."""
        self._chunks[first] = other._chunks[first]

    def read(self) -> Tensor | None:
        """All rows, (N, *shape), on the CPU, read as they are used; None if there are none."""
        if not self._chunks:
            return None
        chunks = [self._chunks[first] for first in sorted(self._chunks)]
        path, offset, shape, dtype = chunks[0]
        rows = list(itertools.accumulate((chunk[2][0] for chunk in chunks), initial=0))
        row = math.prod(shape[1:]) * dtype.itemsize
        if all(chunk[:2] == (path, offset + first * row) for chunk, first in zip(chunks, rows, strict=False)):
            # One after the other: seen as one, without a copy.
            chunks = [(path, offset, (rows[-1], *shape[1:]), dtype)]
        parts = [torch.from_numpy(np.memmap(path, dtype, "c", offset, shape)) for path, offset, shape, dtype in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
