"""Sums over processes."""

from __future__ import annotations

from accelerate.state import PartialState
from accelerate.utils import reduce
from torch import Tensor


def one_process() -> bool:
    """Whether this process is the only one."""
    return PartialState().num_processes == 1


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    return value if one_process() else reduce(value, reduction="sum")
