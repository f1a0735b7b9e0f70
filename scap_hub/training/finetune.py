"""Fine-tuning: what a pruned model lost, training gives back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from scap_hub.errors import DataError, RecipeError, TrainingError
from scap_hub.placement import lower_precision, raise_precision
from scap_hub.private import versioned
from scap_hub.progress import tell, track
from scap_hub.recipe import DataSettings, FinetuneSettings, Recipe
from scap_hub.tasks import Task, task_of
from scap_hub.training import checkpoints
from scap_hub.training.callbacks import Callback, Tracking, check_tracker
from scap_hub.training.data import Data, load_data
from scap_hub.training.data.first import image_size
from scap_hub.training.distributed import accelerator, average_buffers, from_main
from scap_hub.training.evaluate import evaluate
from scap_hub.training.feed import Feed, feed, steps_at_ends
from scap_hub.training.history import History, Losses
from scap_hub.training.objective import Objective
from scap_hub.training.rate import rate_schedule
from scap_hub.zoo import load_model


def finetune(
    model: nn.Module,
    data: Any,
    settings: FinetuneSettings | None = None,
    teacher: nn.Module | None = None,
    output_dir: str | Path | None = None,
    *,
    seed: int = 0,
    data_settings: DataSettings | None = None,
    input_size: tuple[int, int, int] | None = None,
    task: str | Task | None = None,
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> list[dict[str, float]]:
    """Trains a model in place, on all ranks, and leaves it in eval mode with its best weights.

    The best weights are those with the highest metric (top-1, then the lowest loss) on the validation images, the ones
    it came with included; without validation images, the last ones.

    Args:
        model: Bare, not wrapped for distribution, the same on every rank.
        data: Whatever `prune` takes as a data set; a `Data` is used as it is: its `train` and `validation`.
        settings: The recipe's `finetune` block; its defaults if left out.
        teacher: The dense model; unused where the settings have no distillation. Unlabelled images need one.
        output_dir: Where a checkpoint is kept after each epoch; the same call takes up there and ends with the
            weights of a run that was never interrupted.
        seed: Seeds shuffling, augmentation, mixup and dropout.
        data_settings: The recipe's `data` block, for a data set that is not a `Data` yet.
        input_size: (channels, height, width) in pixels of its images; the model's own if left out.
        task: What the model is for, for a data set that is not a `Data` yet; found from the model if left out.
        callbacks: Called after each epoch, see `Callback`.
        **changes: Keys of the `finetune` block that win: epochs=3, learning_rate=1e-3, ...

    Returns:
        One row per epoch: epoch, seconds; with validation images top1 (0..1) and validation_loss; from epoch 1 on
        loss (mean over the epoch) and learning_rate (at its end). Epoch 0 is the model as it came.

    Raises:
        DataError: No labels and no teacher, or too few images for one batch on each rank.
        RecipeError: A change of an unknown key, or to a wrong value; `log_with` names what is not installed.
        TrainingError: The loss is not finite, or the checkpoint belongs to another run.
    """
    settings = _changed(settings or FinetuneSettings(), changes)
    check_tracker(settings)
    if not isinstance(data, Data):
        # The zoo knows the dense model better than a pruned one.
        data = _read(data, model if teacher is None else teacher, data_settings, input_size, seed, task)
    if not settings.distillation.needs_teacher:
        teacher = None
    _check_fits(data.task, settings, teacher)
    here = accelerator()
    networks = [model, *([teacher] if teacher is not None else [])]
    for network in networks:
        network.to(here.device)
        if settings.channels_last:
            network.to(memory_format=torch.channels_last)
        network.eval()
    precisions = raise_precision(model)
    try:
        training = _prepared(model, data, settings, teacher, Path(output_dir) if output_dir else None, seed)
        with warnings.catch_warnings():
            # accelerate puts the scaler of fp16 between optimizer and schedule, which torch takes for a mistake.
            warnings.filterwarnings("ignore", "Seems like `optimizer.step")
            _train(training, callbacks)
        _warn_if_in_vain(training)
        model.load_state_dict(versioned(model, training.history.best))
        return training.history.rows
    finally:
        here.free_memory()
        here.scaler = None
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
            network.eval()
        lower_precision(model, precisions)


def _check_fits(task: Task, settings: FinetuneSettings, teacher: nn.Module | None) -> None:
    """Refuses settings that mean nothing for a task, and a task that has nothing to learn from."""
    for key in task.refuses:
        if getattr(settings, key):
            raise RecipeError(f"finetune.{key} means nothing for {task.name}: leave it out")
    if task.from_teacher and (teacher is None or not settings.distillation.weight):
        raise DataError(
            f"{task.name} without targets learns from the dense model alone: give it as teacher, leave "
            "finetune.distillation.weight above 0, and train no dense model before (finetune.dense_epochs=0)"
        )


def _changed(settings: FinetuneSettings, changes: Mapping[str, Any]) -> FinetuneSettings:
    """The settings with some keys changed, checked as a recipe's."""
    overrides = {f"finetune_{key}": value for key, value in changes.items()}
    return Recipe.resolve({"finetune": settings.model_dump()}, **overrides).finetune


def _read(
    dataset: Any,
    model: nn.Module,
    settings: DataSettings | None,
    input_size: tuple[int, int, int] | None,
    seed: int,
    task: str | Task | None,
) -> Data:
    """The data set as a model wants it."""
    with warnings.catch_warnings():
        # Whether a pruned model can be built by name does not matter here.
        warnings.simplefilter("ignore")
        loaded = load_model(model, input_size=input_size or image_size(dataset, seed))
    return load_data(
        dataset,
        loaded.preprocessing,
        settings,
        num_classes=loaded.num_classes,
        seed=seed,
        task=task_of(loaded, task),
        model_classes=loaded.labels,
        pixels=loaded.zoo.pixels(loaded),
    )


@dataclass
class _Training:
    """What one call trains with.

    Attributes:
        model: Bare.
        wrapped: The same for distributed training.
        kept: The model whose weights are measured and kept: the moving average, or the model itself.
        data: Its validation images are used.
        feed: This rank's training images.
        ends: Optimiser steps that are done when each epoch ends.
        optimizer: Prepared.
        schedule: Of the learning rate, by optimiser step.
        ema: The moving average, if asked for.
        history: What was done so far.
        objective: What is minimised.
        output_dir: Where checkpoints are kept.
        identity: What must be the same for a checkpoint to be taken up.
    """

    model: nn.Module
    wrapped: nn.Module
    kept: nn.Module
    data: Data
    feed: Feed
    ends: list[int]
    optimizer: Any
    schedule: LRScheduler
    ema: ModelEmaV3 | None
    history: History
    objective: Objective
    output_dir: Path | None
    identity: dict[str, Any]

    @property
    def settings(self) -> FinetuneSettings:
        return self.objective.settings

    @property
    def state(self) -> checkpoints.State:
        """What a checkpoint holds."""
        modules = {"model": self.model} | ({"average": self.kept} if self.ema else {})
        return checkpoints.State(modules, self.optimizer, self.schedule, self.history, self.feed, accelerator().scaler)


def _train(training: _Training, callbacks: Sequence[Callback]) -> None:
    """Epoch by epoch, from the last checkpoint on if there is one."""
    settings, history, output_dir = training.settings, training.history, training.output_dir
    resumed = output_dir is not None and checkpoints.resume(output_dir, training.identity, training.state)
    if not resumed:
        history.record(training.kept, {"epoch": 0, "seconds": 0.0, **_validate(training)})
    tracking = Tracking(settings)
    for row in history.rows:
        tracking.log(row)
    try:
        # Whether they wanted to end the training is not in the checkpoint.
        stop = resumed and history.epoch > 0 and _wants_to_end(callbacks, training)
        while not stop and history.epoch < len(training.ends) and not history.is_stale(settings.patience):
            row = _epoch_and_row(training, history.epoch + 1)
            history.record(training.kept, row)
            tell(_line(row, len(training.ends), training.data))
            tracking.log(row)
            if output_dir is not None:
                checkpoints.save(output_dir, history.epoch, training.identity, training.state)
            stop = _wants_to_end(callbacks, training)
    finally:
        tracking.finish()
        training.feed.close()


def _warn_if_in_vain(training: _Training) -> None:
    history, metric = training.history, training.data.task.metric
    if history.epoch and not history.best_epoch:
        before, after = history.rows[0][metric.key], history.rows[-1][metric.key]
        warnings.warn(
            f"no epoch made the model better on the validation images: {metric.title} was {before:.2%} before and "
            f"{after:.2%} after the last one, so its weights are those from before; lower finetune.learning_rate (now "
            f"{training.settings.learning_rate:g}), or train for longer",
            stacklevel=3,
        )


def _wants_to_end(callbacks: Sequence[Callback], training: _Training) -> bool:
    """Tells all of them of the last epoch; returns whether one of the main process wants to end the training."""
    wishes = [callback.on_epoch_end(dict(training.history.rows[-1]), training.kept) for callback in callbacks]
    return from_main(lambda: any(wishes)) if callbacks else False


def _epoch_and_row(training: _Training, epoch: int) -> dict[str, float]:
    """Trains for one epoch, and says how it went."""
    start = time.perf_counter()
    try:
        mean_loss = _epoch(training, epoch)
    except FloatingPointError as error:
        raise _not_finite(training, epoch, error) from None
    for network in (training.model, training.kept):
        average_buffers(network)
    row = {"epoch": epoch, "loss": mean_loss, "learning_rate": float(training.schedule.get_last_lr()[0])}
    row |= _validate(training)
    row["seconds"] = time.perf_counter() - start
    return row


def _line(row: Mapping[str, float], epochs: int, data: Data) -> str:
    """One epoch in words, with the time that the others will take."""
    metric = data.task.metric
    told = [f"loss {row['loss']:.4g}"]
    if metric.key in row:
        told.append(f"{metric.title} {row[metric.key]:.2%}, validation loss {row['validation_loss']:.4g}")
    told.append(f"learning rate {row['learning_rate']:.2g}")
    left = timedelta(seconds=round(row["seconds"] * (epochs - row["epoch"])))
    return f"epoch {row['epoch']} of {epochs}: {', '.join(told)}; {left} left"


def _prepared(
    model: nn.Module,
    data: Data,
    settings: FinetuneSettings,
    teacher: nn.Module | None,
    output_dir: Path | None,
    seed: int,
) -> _Training:
    here = accelerator()
    here.gradient_accumulation_steps, here.step = settings.gradient_accumulation, 0
    here.dataloader_config.use_seedable_sampler = True
    here.dataloader_config.data_seed = seed
    set_seed(seed, device_specific=True)

    optimizer = create_optimizer_v2(
        model, opt=settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay, momentum=0.9
    )
    # Gradients of fp16 are too small without it; accelerate and its optimizers look for it here.
    here.scaler = torch.amp.GradScaler(here.device.type) if settings.precision == "fp16" else None
    steps_at_ends(data.train, settings)  # refuses what no rank could train on, before anything is shared out
    batches = feed(data.train)
    wrapped, optimizer = here.prepare(model, optimizer)
    ends = steps_at_ends(data.train, settings, batches.batches)
    schedule = rate_schedule(optimizer.optimizer, settings, ends[-1] if ends else 0)
    ema = ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema else None
    history = History(data.task.metric.key, data.task.metric.lower_is_better)
    identity = settings.model_dump(mode="json", exclude={"log_with"})
    return _Training(
        model=model,
        wrapped=wrapped,
        kept=ema.module if ema else model,
        data=data,
        feed=batches,
        ends=ends,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        history=history,
        objective=Objective(data.task, settings, teacher),
        output_dir=output_dir,
        identity=identity | {"seed": seed, "processes": here.num_processes},
    )


def _epoch(training: _Training, epoch: int) -> float:
    """Trains for one epoch; returns the mean loss.

    Raises:
        FloatingPointError: Naming the step whose loss, or after which a weight, is not finite.
    """
    here, settings, losses = accelerator(), training.settings, Losses()
    training.wrapped.train()
    begin, end = training.history.steps, training.ends[epoch - 1]
    title = f"fine-tuning, epoch {epoch} of {len(training.ends)}"
    bar = track(training.feed, title, (end - begin) * settings.gradient_accumulation)
    for batch in bar:
        with here.accumulate(training.wrapped):
            loss = _loss(training, batch)
            here.backward(loss)
            training.optimizer.step()
            training.optimizer.zero_grad()
        if here.sync_gradients:
            if not training.optimizer.step_was_skipped:  # as the scaler does while it finds its scale
                training.schedule.step()
            training.history.steps += 1
            if training.ema:
                training.ema.update(training.model, step=training.history.steps)
        if losses.add(loss):
            bar.set_postfix(loss=f"{losses.mean:.3f}")
        if here.sync_gradients and training.history.steps >= end:
            break
    losses.check()
    if not all(bool(weight.isfinite().all()) for weight in training.model.parameters()):
        raise FloatingPointError("the last step")
    return losses.mean


def _loss(training: _Training, batch: Any) -> Tensor:
    try:
        return training.objective(training.wrapped, batch)
    except ValueError as error:
        if len(batch[0]) > 1:
            raise
        # Batch norm has no variance over one value.
        raise DataError(
            f"a batch of one image cannot be trained on ({' '.join(str(error).split())}): give batches of two or more"
        ) from error


def _not_finite(training: _Training, epoch: int, error: FloatingPointError) -> TrainingError:
    """The error to raise when a training goes astray; the best weights are restored."""
    history = training.history
    training.model.load_state_dict(versioned(training.model, history.best))
    kept = checkpoints.checkpoints(training.output_dir) if training.output_dir is not None else []
    kept_in = f" and kept in {str(kept[-1])!r}" if kept else ""
    return TrainingError(
        f"the loss is not finite at {error} of epoch {epoch}; the weights of epoch {history.best_epoch} are "
        f"restored{kept_in}; lower finetune.learning_rate (now {training.settings.learning_rate:g}) or check the images"
    )


def _validate(training: _Training) -> dict[str, float]:
    """The metric and the loss on the validation images; nothing where there are none."""
    data = training.data
    if data.validation is None:
        return {}
    teacher = training.objective.teacher
    result = evaluate(training.kept, data.validation, training.settings.precision, data.task, teacher)
    metric = data.task.metric.key
    return {metric: result[metric], "validation_loss": result["loss"]}
