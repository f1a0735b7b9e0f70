"""How a training goes: its losses, its history and its best weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.training.distributed import accelerator

CHECK_EVERY = 20
"""Batches between looks at the losses."""


class Losses:
    """Losses of an epoch, looked at only now and then because each look waits for the device."""

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []
        self.steps = 0
        self.sum = 0.0

    @property
    def mean(self) -> float:
        """Over the steps that were looked at."""
        return self.sum / self.steps

    def add(self, loss: Tensor) -> bool:
        """Returns whether it looked."""
        self.waiting.append(loss.detach())
        if len(self.waiting) < CHECK_EVERY:
            return False
        self.check()
        return True

    def check(self) -> None:
        """Looks at the means over the ranks, so that all of them stop at the same step.

        Raises:
            FloatingPointError: Naming the first step whose loss is not finite.
        """
        if not self.waiting:
            return
        values = accelerator().reduce(torch.stack(self.waiting), reduction="mean")
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise FloatingPointError(f"step {self.steps + int(bad[0]) + 1}")
        self.steps += len(values)
        self.sum += values.sum().item()
        self.waiting = []


def kept_epoch(rows: Sequence[Mapping[str, float]], metric: str, lower_is_better: bool = False) -> int:
    """The epoch whose weights a training keeps: the best one, of equal ones the first; the last if none was measured.

    Args:
        rows: One an epoch; row 0 is the model as it came.
        metric: Key of what decides.
        lower_is_better: Whether the lowest is the best.
    """

    def quality(row: Mapping[str, float]) -> tuple[float, float]:
        return -row[metric] if lower_is_better else row[metric], -row["validation_loss"]

    return int((max(rows, key=quality) if metric in rows[-1] else rows[-1])["epoch"])


def last_training(rows: Sequence[dict[str, float]]) -> Sequence[dict[str, float]]:
    """The rows of the last of several trainings, which begin with epoch 0, the model as it came."""
    return rows[max((number for number, row in enumerate(rows) if row["epoch"] == 0), default=0) :]


class History:
    """How far a training has come: what a checkpoint holds beside weights, optimiser and random states.

    Attributes:
        rows: One an epoch; row 0 is the model as it came.
        best: The weights of the best epoch, on the CPU.
        steps: Optimiser steps so far.
    """

    def __init__(self, metric: str, lower_is_better: bool = False) -> None:
        """Starts at nothing; `metric` is the key of what decides which weights are the best."""
        self.metric, self.lower_is_better = metric, lower_is_better
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.steps = 0

    @property
    def epoch(self) -> int:
        """The last epoch that is done."""
        return int(self.rows[-1]["epoch"])

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights are the best."""
        return kept_epoch(self.rows, self.metric, self.lower_is_better)

    def is_stale(self, patience: int | None) -> bool:
        """Whether so many epochs went by without a better one."""
        return patience is not None and self.epoch - self.best_epoch >= patience

    def record(self, model: nn.Module, row: dict[str, float]) -> None:
        """Adds an epoch, and keeps its weights if they are the best so far; the last ones if nothing was measured."""
        self.rows.append(row)
        if self.best_epoch == self.epoch:
            self.best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From checkpoints."""
        vars(self).update(state)
