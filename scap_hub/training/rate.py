"""How the learning rate goes."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from scap_hub.recipe import FinetuneSettings


def rate_schedule(optimizer: Optimizer, settings: FinetuneSettings, steps: int) -> LRScheduler:
    """The learning rate by optimiser step, for so many of them."""
    steps = max(1, steps)
    if settings.schedule == "onecycle":
        # Momentum stays what the optimiser was given, and AdamW has betas instead.
        return OneCycleLR(
            optimizer, settings.learning_rate, total_steps=steps + 1, pct_start=settings.warmup, cycle_momentum=False
        )
    rise = round(settings.warmup * steps)
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, steps - rise))
    if not rise:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (rise + 1), total_iters=rise), cosine], milestones=[rise])
