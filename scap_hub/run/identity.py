"""What a run is: only the same run takes up where one was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scap_hub.criteria.base import Criterion
from scap_hub.recipe import Recipe
from scap_hub.run import fingerprints
from scap_hub.run.parts import LoadedPart
from scap_hub.timing.clock import device_name
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator
from scap_hub.version import __version__
from scap_hub.zoo import LoadedModel

_LIBRARIES = ("torch", "timm", "transformers", "accelerate")
_HASH = "sha256:"


def identity(loaded: LoadedModel, data: Data, recipe: Recipe, criterion: Criterion) -> dict[str, Any]:
    """Everything that the result of a run follows from, as plain values by readable names.

    Args:
        loaded: The dense model as it was loaded, before any tuning.
        data: Its data.
        recipe: All of it counts but what changes no result: `publish`, `deploy` (of which int8 counts where latency is
            measured in a runtime), `finetune.log_with`, and whether to insist on verification.
        criterion: What scores the channels.
    """
    if isinstance(loaded, LoadedPart):
        loaded = loaded.whole  # what reaches the part follows from all of it
    deploy: Any = True if recipe.target.runtime == "torch" else {"max_loss"}
    document = recipe.model_dump(
        mode="json", exclude={"publish": True, "deploy": deploy, "evaluate": {"verify"}, "finetune": {"log_with"}}
    )
    found = _flat(document, "recipe key ")
    found |= _flat(asdict(loaded.preprocessing), "preprocessing ")
    found |= {f"version of {name}": version(name) for name in _LIBRARIES}
    found["number of processes"] = accelerator().num_processes
    found["kind of device"] = accelerator().device.type
    hashes = {
        "the code of scap_hub": _own_code(),
        "the code of the criterion": fingerprints.of_tensors([], fingerprints.source_of(type(criterion))),
        "the model's architecture": fingerprints.of_architecture(loaded.module),
        "the model's weights": fingerprints.of_weights(loaded.module),
        "the calibration images": _calibration(data),
    }
    loaders = {f"the {name} set": getattr(data, name) for name in ("train", "validation", "test")}
    hashes |= fingerprints.of_images(loaders)
    return _plain(found) | {name: _HASH + text for name, text in hashes.items()}


def weights_of(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """What a run's result follows from, where other models by these names take part in it."""
    return {f"{name}'s weights": _HASH + fingerprints.of_weights(model) for name, model in models.items()}


def about_run(loaded: LoadedModel, data: Data, recipe: Recipe) -> dict[str, Any]:
    """What a run was of, for its report; a path to data says nothing to others, so its last part stands for it."""
    dataset = recipe.data.dataset
    return {
        "model": loaded.name,
        "library": loaded.zoo.name,
        "base_model": loaded.base_model,
        "task": data.task.name,
        "data": Path(dataset).name if dataset is not None and Path(dataset).exists() else dataset or data.name,
        "target": str(recipe.target.target),
        "criterion": recipe.criterion.name,
        "input_size": list(loaded.preprocessing.input_size),
        "device": device_name(accelerator().device),
        "latency_batch_size": recipe.evaluate.batch_size,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of this package and of the libraries that a result depends on."""
    return {"scap_hub": __version__, **{name: version(name) for name in _LIBRARIES}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    return [
        _difference(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)
    ]


def _difference(name: str, old: Any, new: Any) -> str:
    if str(new).startswith(_HASH) or str(old).startswith(_HASH):
        return f"{name} differ{'' if name.endswith('s') and not name.endswith('ss') else 's'}"
    return f"{name}: was {old!r}, now {new!r}"


def _calibration(data: Data) -> str:
    # Drawing a loader's workers takes a number from torch's generator; the run's own order of draws stays.
    with torch.random.fork_rng(devices=[]):
        parts = [part for batch in data.calibration for part in batch]
    return fingerprints.of_tensors([part for part in parts if isinstance(part, torch.Tensor)])


def _own_code() -> str:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return fingerprints.of_tensors([], [(file.name, file.read_bytes()) for file in files])


def _flat(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Nested values by the dotted names of their keys."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        inner = f"{name}{key}"
        flat |= _flat(value, f"{inner}.") if isinstance(value, Mapping) and value else {inner: value}
    return flat


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
