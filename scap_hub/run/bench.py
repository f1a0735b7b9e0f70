"""How fast models really are: latency and throughput, side by side in one process."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from scap_hub.errors import ModelError, RecipeError
from scap_hub.hub.checkpoint import dense_model, input_size, is_pruned, load
from scap_hub.progress import track
from scap_hub.timing.clock import Timer, milliseconds
from scap_hub.training.distributed import accelerator
from scap_hub.zoo import load_model
from scap_hub.zoo.checkpoint_file import load_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Speed:
    """One model in one setting.

    Attributes:
        model: Its name.
        batch: Images at once.
        dtype: Of weights and images.
        mode: "eager" or "compile".
        ms: Median milliseconds of one forward pass.
        images_per_second: Throughput at this batch.
        speedup: How many times faster than the first model in the same setting.
    """

    model: str
    batch: int
    dtype: str
    mode: str
    ms: float
    images_per_second: float
    speedup: float


def bench(
    model: str | Path | nn.Module,
    against: str | Path | nn.Module | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    dtypes: Sequence[str] = ("fp32",),
    compile: bool = False,
    size: Size | None = None,
    timer: Timer = milliseconds,
    checkpoint: str | Path | None = None,
) -> list[Speed]:
    """Times a model, beside another where there is one; weights do not matter, so none are downloaded for a name.

    Args:
        model: timm name, Hub id or folder, of a dense or a pruned model, or a module.
        against: What it is compared with, likewise; for a pruned checkpoint the dense model that it was made from, if
            left out.
        batch_sizes: Images at once.
        dtypes: "fp32", "fp16", "bf16".
        compile: Whether to measure `torch.compile` too.
        size: (channels, height, width) in pixels; the model's own if left out.
        timer: Measures calls that take turns.
        checkpoint: File with the model's weights, which count where they are zero or denormal.

    Returns:
        A row for each model and setting; the model compared with first.

    Raises:
        ScapHubError: A model that cannot be loaded, an unknown dtype, or a batch size below 1.
    """
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown or min(batch_sizes, default=0) < 1:
        wrong = f"dtype {unknown[0]!r}" if unknown else f"batch sizes {list(batch_sizes)}"
        raise RecipeError(f"{wrong}: give dtypes out of {', '.join(DTYPES)}, and batch sizes of 1 or more")
    models, size = models_to_compare(model, against, size, checkpoint)
    return speeds(models, size, batch_sizes, dtypes, ("eager", "compile") if compile else ("eager",), timer)


def models_to_compare(
    model: str | Path | nn.Module,
    against: str | Path | nn.Module | None,
    size: Size | None,
    checkpoint: str | Path | None,
) -> tuple[dict[str, nn.Module], Size]:
    """The models by name, what others are compared with first, and the size of their input; arguments as `bench`."""
    module, own_size, base = _resolved(model, size)
    if checkpoint is not None:
        module = copy.deepcopy(module)
        load_weights(module, checkpoint)
    models = {_name(model, "model"): module}
    if against is not None:
        models = {_name(against, "against"): _resolved(against, own_size)[0], **models}
    elif base is not None:
        models = {"dense": base, **models}
    return models, size or own_size


def speeds(
    models: Mapping[str, nn.Module],
    size: Size,
    batch_sizes: Sequence[int],
    dtypes: Sequence[str] = ("fp32",),
    modes: Sequence[str] = ("eager",),
    timer: Timer = milliseconds,
) -> list[Speed]:
    """Times models in turns, setting by setting; the first is what the others are compared with."""
    device = accelerator().device
    settings = [(dtype, batch, mode) for dtype in dtypes for batch in batch_sizes for mode in modes]
    rows = []
    for dtype, batch, mode in track(settings, "latency"):
        images = torch.randn(batch, *size, device=device, dtype=DTYPES[dtype])
        nets = [copy.deepcopy(model).to(device, DTYPES[dtype]).eval() for model in models.values()]
        if mode == "compile":
            # Else the compiler gives up after some shapes of one class of model, and silently runs it eagerly.
            torch.compiler.reset()
            nets = [torch.compile(net, dynamic=False) for net in nets]  # type: ignore[misc]
        times = timer([(net, images) for net in nets])
        rows += [
            Speed(name, batch, dtype, mode, ms, 1e3 * batch / ms, times[0] / ms)
            for name, ms in zip(models, times, strict=True)
        ]
    return rows


def _resolved(source: str | Path | nn.Module, size: Size | None) -> tuple[nn.Module, Size, nn.Module | None]:
    """The model, its input size, and for a pruned checkpoint the dense model that it was made from."""
    if not isinstance(source, nn.Module) and is_pruned(source):
        try:
            base = dense_model(source)
        except ModelError:
            base = None  # only its owner can build it
        return load(source), size or input_size(source), base
    loaded = load_model(str(source) if isinstance(source, Path) else source, pretrained=False, input_size=size)
    return loaded.module, loaded.preprocessing.input_size, None


def _name(source: str | Path | nn.Module, otherwise: str) -> str:
    return otherwise if isinstance(source, nn.Module) else str(source)
