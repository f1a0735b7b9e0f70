"""After surgery, before training: make up for the channels that were removed, without labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from scap_hub.compensation.batch_norm import recalibrate
from scap_hub.compensation.least_squares import compensate
from scap_hub.compensation.tuning import tune
from scap_hub.plan import PruningPlan

PASSES = 4.0
"""As how many forward passes over the calibration images a repair takes about as long, for the forecast of a run."""

__all__ = ["compensate", "recalibrate", "repair", "tune"]


def repair(
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    least_squares: bool = True,
    ridge: float = 1e-2,
    batch_norm: bool = True,
) -> dict[str, tuple[float, float]]:
    """Repairs a pruned model in place, as `prune` does: weights by least squares, then batch-norm statistics.

    Args:
        dense: The model before surgery.
        small: `apply_plan(dense, plan)`; changed in place.
        plan: What stays.
        batches: Calibration batches (this process's share); images only are used.
        least_squares: Whether to re-solve the layers that lost inputs, see `compensate`.
        ridge: See `compensate`.
        batch_norm: Whether batch norms take their statistics anew on the calibration images.

    Returns:
        For each re-solved layer the relative squared output error on its patches, before and after.

    Raises:
        CalibrationError: Fewer than 2 images, or images that give NaN or Inf.
        RecipeError: The ridge is negative, or not finite.
    """
    if least_squares:
        return compensate(dense, small, plan, batches, ridge, batch_norm=batch_norm)
    if batch_norm:
        recalibrate(small, batches)
    return {}
