"""Fine-tuning: what a pruned model lost, training gives back."""

from __future__ import annotations

import json
import math
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributions import Beta
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from scap_hub.errors import DataError, TrainingError
from scap_hub.private import forget_registered
from scap_hub.progress import track
from scap_hub.recipe import FinetuneSettings
from scap_hub.training.data import Data
from scap_hub.training.distillation import Maps, attention_loss, divergence, feature_maps
from scap_hub.training.distributed import accelerator, average_buffers
from scap_hub.training.evaluate import autocast, evaluate
from scap_hub.zoo.base import logits

CHECK_EVERY = 20
"""Batches between looks at the losses."""


def finetune(
    model: nn.Module,
    data: Data,
    settings: FinetuneSettings,
    teacher: nn.Module | None = None,
    output_dir: str | Path | None = None,
    *,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Trains a model in place, on all ranks, and leaves it in eval mode with its best weights.

    The best weights are those with the highest top-1 (then the lowest loss) on `data.validation`, the ones it came
    with included; without validation images, the last ones.

    Args:
        model: Bare, not wrapped for distribution, the same on every rank.
        data: Its `train` and `validation` are used.
        settings: The recipe's `finetune` block.
        teacher: The dense model; unused where the settings have no distillation. Unlabelled images need one.
        output_dir: Where a checkpoint is kept after each epoch; the same call takes up there and ends with the
            weights of a run that was never interrupted.
        seed: Seeds shuffling, augmentation, mixup and dropout.

    Returns:
        One row per epoch: epoch, seconds; with validation images top1 (0..1) and validation_loss; from epoch 1 on
        loss (mean over the epoch) and learning_rate (at its end). Epoch 0 is the model as it came.

    Raises:
        DataError: No labels and no teacher, or too few images for one batch on each rank.
        TrainingError: The loss is not finite, or the checkpoint belongs to another run.
    """
    here = accelerator()
    if not settings.distillation.needs_teacher:
        teacher = None
    networks = [model, *([teacher] if teacher is not None else [])]
    for network in networks:
        network.to(here.device)
        if settings.channels_last:
            network.to(memory_format=torch.channels_last)
        network.eval()
    try:
        return _finetune(model, data, settings, teacher, Path(output_dir) if output_dir else None, seed)
    finally:
        here.free_memory()
        forget_registered(here)
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
            network.eval()


def _finetune(
    model: nn.Module,
    data: Data,
    settings: FinetuneSettings,
    teacher: nn.Module | None,
    output_dir: Path | None,
    seed: int,
) -> list[dict[str, float]]:
    here = accelerator()
    here.gradient_accumulation_steps = settings.gradient_accumulation
    here.dataloader_config.use_seedable_sampler = True
    here.dataloader_config.data_seed = seed
    set_seed(seed, device_specific=True)

    optimizer = create_optimizer_v2(
        model, opt=settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay, momentum=0.9
    )
    wrapped, optimizer, loader = here.prepare(model, optimizer, data.train)
    try:
        batches = len(loader)
    except TypeError as error:
        raise DataError(
            f"cannot fine-tune on a stream of unknown length: {error}; set data.streaming to false"
        ) from None
    if not batches:
        raise DataError(
            f"too few training images for a batch of {data.train.batch_size} on each of {here.num_processes} "
            "processes; lower data.batch_size"
        )
    schedule = _schedule(optimizer.optimizer, settings, math.ceil(batches / settings.gradient_accumulation))
    ema = ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema else None
    kept = ema.module if ema else model
    run = _Run()
    here.register_for_checkpointing(schedule, run, *([ema] if ema else []))
    identity = {**settings.model_dump(mode="json"), "seed": seed, "processes": here.num_processes}

    if output_dir is None or not _resume(output_dir, identity):
        run.record(kept, {"epoch": 0, "seconds": 0.0, **_validate(kept, data, settings)})
    while run.epoch < settings.epochs and not run.is_stale(settings.patience):
        epoch, start = run.epoch + 1, time.perf_counter()
        losses = _Losses()
        wrapped.train()
        loader.set_epoch(epoch)
        bar = track(loader, f"fine-tuning, epoch {epoch} of {settings.epochs}")
        try:
            for batch in bar:
                with here.accumulate(wrapped):
                    loss = _loss(wrapped, batch, settings, teacher)
                    here.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if here.sync_gradients:
                    schedule.step()
                    run.steps += 1
                    if ema:
                        ema.update(model, step=run.steps)
                if losses.add(loss):
                    bar.set_postfix(loss=f"{losses.mean:.3f}")
            losses.check()
            if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
                raise FloatingPointError("the last step")
        except FloatingPointError as error:
            model.load_state_dict(run.best)
            checkpoints = _checkpoints(output_dir) if output_dir is not None else []
            kept_in = f" and kept in {str(checkpoints[-1])!r}" if checkpoints else ""
            raise TrainingError(
                f"the loss is not finite at {error} of epoch {epoch}; the weights of epoch {run.best_epoch} are "
                f"restored{kept_in}; lower finetune.learning_rate (now {settings.learning_rate:g}) or check the images"
            ) from None
        for network in (model, kept):
            average_buffers(network)
        row = {"epoch": epoch, "loss": losses.mean, "learning_rate": float(schedule.get_last_lr()[0])}
        row |= _validate(kept, data, settings)
        run.record(kept, {**row, "seconds": time.perf_counter() - start})
        if output_dir is not None:
            _save(output_dir, epoch, identity)
    model.load_state_dict(run.best)
    return run.history


class _Losses:
    """Losses of an epoch, looked at only now and then because each look waits for the device."""

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []
        self.steps = 0
        self.sum = 0.0

    @property
    def mean(self) -> float:
        return self.sum / self.steps

    def add(self, loss: Tensor) -> bool:
        """Returns whether it looked."""
        self.waiting.append(loss.detach())
        if len(self.waiting) < CHECK_EVERY:
            return False
        self.check()
        return True

    def check(self) -> None:
        """Means over ranks, so that all of them stop at the same step.

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


class _Run:
    """How far a run has come: what a checkpoint holds beside weights, optimiser and random states."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.steps = 0

    @property
    def epoch(self) -> int:
        return int(self.history[-1]["epoch"])

    def is_stale(self, patience: int | None) -> bool:
        return patience is not None and self.epoch - self.best_epoch >= patience

    def record(self, model: nn.Module, row: dict[str, float]) -> None:
        """Adds an epoch, and keeps its weights on the CPU if they are the best so far."""
        self.history.append(row)
        best = self.history[self.best_epoch]
        if "top1" not in row or len(self.history) == 1 or _quality(row) > _quality(best):
            self.best_epoch = self.epoch
            self.best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _quality(row: dict[str, float]) -> tuple[float, float]:
    return row["top1"], -row["validation_loss"]


def _validate(model: nn.Module, data: Data, settings: FinetuneSettings) -> dict[str, float]:
    if data.validation is None:
        return {}
    result = evaluate(model, data.validation, settings.precision)
    return {"top1": result["top1"], "validation_loss": result["loss"]}


def _schedule(optimizer: Optimizer, settings: FinetuneSettings, steps_per_epoch: int) -> LRScheduler:
    """The learning rate by optimiser step."""
    steps = max(1, settings.epochs * steps_per_epoch)
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


def _loss(model: nn.Module, batch: Any, settings: FinetuneSettings, teacher: nn.Module | None) -> Tensor:
    """Cross-entropy with the labels, mixed with what the teacher says."""
    images, labels = batch if len(batch) == 2 else (batch[0], None)
    learn = settings.distillation
    weight = learn.weight if teacher is not None else 0.0
    if labels is None and not weight:
        raise DataError(
            "these images have no labels: training the dense model (finetune.dense_epochs) needs them, fine-tuning the "
            "pruned one does not if finetune.distillation.weight is above 0"
        )
    share = 1.0
    if settings.mixup:
        # mixup (Zhang et al., arXiv 1710.09412); the batch is shuffled, so its reverse is a random partner.
        share = float(Beta(settings.mixup, settings.mixup).sample())
        images = images.lerp(images.flip(0), 1 - share)
    if settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def run(network: nn.Module) -> tuple[Tensor, Maps]:
        watches = teacher is not None and learn.features
        watched: AbstractContextManager[Maps] = feature_maps(network) if watches else nullcontext({})
        with autocast(settings.precision), watched as maps:
            return logits(network(images)).float(), maps

    output, maps = run(model)
    loss = output.new_zeros(())
    if labels is not None and weight < 1:
        smoothing = settings.label_smoothing
        loss = share * F.cross_entropy(output, labels, label_smoothing=smoothing)
        if share < 1:
            loss = loss + (1 - share) * F.cross_entropy(output, labels.flip(0), label_smoothing=smoothing)
    if teacher is None:
        return loss
    with torch.no_grad():
        guide, theirs = run(teacher)
    if weight:
        soft = divergence(output, guide, learn.temperature)
        loss = soft if labels is None else (1 - weight) * loss + weight * soft
    return loss + learn.features * attention_loss(maps, theirs) if learn.features else loss


def _save(output_dir: Path, epoch: int, identity: dict[str, Any]) -> None:
    """Writes a checkpoint under another name first; an interrupted write leaves the last one."""
    here = accelerator()
    unfinished = output_dir / "checkpoint.unfinished"
    if here.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "run.json").write_text(json.dumps(identity))
    here.wait_for_everyone()
    here.save_state(str(unfinished))
    here.wait_for_everyone()
    if here.is_main_process:
        old = _checkpoints(output_dir)
        unfinished.rename(output_dir / f"checkpoint-{epoch:05d}")
        for folder in old:
            shutil.rmtree(folder)
    here.wait_for_everyone()


def _resume(output_dir: Path, identity: dict[str, Any]) -> bool:
    """Loads the last checkpoint, if there is one, into everything that was prepared or registered."""
    found = _checkpoints(output_dir)
    if not found:
        return False
    advice = "delete it or choose another folder"
    try:
        theirs = json.loads((found[-1] / "run.json").read_text())
        changed = [key for key, value in identity.items() if theirs.get(key) != value]
        if changed:
            raise TrainingError(f"{str(found[-1])!r} is of a run with another {', '.join(changed)}; {advice}")
        accelerator().load_state(str(found[-1]))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"cannot resume from {str(found[-1])!r}: {str(error).splitlines()[0]}; {advice}") from error
    return True


def _checkpoints(output_dir: Path) -> list[Path]:
    return sorted(output_dir.glob("checkpoint-[0-9]*"))
