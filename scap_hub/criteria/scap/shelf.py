"""A tensor that grows image by image, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scap_hub.errors import CalibrationError


class Shelf:
    """Rows of equal shape, one an image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._row: tuple[tuple[int, ...], np.dtype] | None = None

    def put(self, first: int, rows: Tensor) -> None:
        """Writes rows from number `first` on; what is there is replaced.

        Args:
            first: Number of rows before these.
            rows: (n, *shape).

        Raises:
            CalibrationError: The disk is full, or cannot be written to.
        """
        data = rows.contiguous().cpu().numpy()
        self._row = data.shape[1:], data.dtype
        try:
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.seek(first * data[0].nbytes)
                file.write(data.data)
        except OSError as error:
            raise CalibrationError(
                f"cannot keep spectra in {str(self.path.parent)!r}: {error.strerror}; set the environment variable "
                "TMPDIR to a folder with more space, or take fewer calibration images"
            ) from error

    def get(self) -> Tensor | None:
        """All rows, (N, *shape), on the CPU; None if there are none."""
        if self._row is None:
            return None
        shape, dtype = self._row
        return torch.from_numpy(np.fromfile(self.path, dtype)).view(-1, *shape)
