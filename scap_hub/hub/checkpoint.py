"""Pruned models on disk: safetensors, the zoo's own config.json, and the plan that shrinks the rebuilt model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_model
from safetensors import SafetensorError
from torch import nn

from scap_hub.errors import CheckpointError
from scap_hub.files import making, path_of
from scap_hub.hub.layout import cut_of
from scap_hub.plan import PruningPlan
from scap_hub.text import one_line
from scap_hub.zoo import LoadedModel, modeling_scap
from scap_hub.zoo.base import CODE, FORMAT
from scap_hub.zoo.pruned import (
    CONFIG,
    IMAGE_PROCESSOR,
    PLAN,
    UNIFORM,
    dense_model,
    input_size,
    is_pruned,
    load,
)
from scap_hub.zoo.weights import INDEX, PRECISIONS, WEIGHTS, not_finite, weight_files

__all__ = [
    "CONFIG",
    "IMAGE_PROCESSOR",
    "INDEX",
    "PLAN",
    "WEIGHTS",
    "check_output",
    "dense_model",
    "input_size",
    "is_pruned",
    "load",
    "save_checkpoint",
    "weight_files",
]

RECIPE = "recipe.yaml"
SHARD = "5GB"
"""Largest file of weights, where a library reads several."""


def placed(folder: str | Path) -> Path:
    """The folder that a path stands for, where links lead; it can be replaced in one step.

    Raises:
        CheckpointError: It cannot.
    """
    resolved, here = Path(os.path.realpath(path_of(folder))), Path.cwd()
    if resolved == here or resolved in here.parents or os.path.ismount(resolved):
        raise CheckpointError(
            f"output folder {str(folder)!r} is the folder that you are in, holds it, or where a disk is mounted; it "
            "cannot be replaced in one step: name a new folder inside it"
        )
    if not resolved.name.strip():
        raise CheckpointError(f"output folder {str(folder)!r} has a blank name: choose another")
    if resolved.is_symlink():
        raise CheckpointError(f"output folder {str(folder)!r} is a link that leads back to itself: choose another")
    return resolved


def check_output(folder: str | Path) -> Path:
    """Returns the folder, which must be absent or empty, where one can be made; ask before long work.

    Raises:
        CheckpointError: It holds something, is a file, or cannot be made or replaced in one step.
    """
    resolved, folder = placed(folder), path_of(folder)
    above = next(path for path in resolved.parents if path.exists())
    for path in (above, resolved):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"cannot write output folder {folder}: {path} is no folder; choose another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"cannot write output folder {folder}: {above} is read-only, or not yours; choose another"
        )
    if resolved.exists() and any(resolved.iterdir()):
        held = "holds a finished model, which scap_hub.load opens" if is_pruned(resolved) else "is not empty"
        raise CheckpointError(f"output folder {folder} exists and {held}: choose another, or remove it first")
    return folder


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    loaded: LoadedModel,
    plan: PruningPlan,
    recipe_yaml: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    plain: dict[str, Any] | None = None,
    allow_nan: bool = False,
) -> Path:
    """Writes a pruned model: all of the folder, or nothing.

    Args:
        folder: Absent or empty.
        model: The pruned model; its tensors keep their names and dtypes.
        loaded: The model that it was made from; what was removed from that before is added to the plan.
        plan: What was removed from it.
        recipe_yaml: The recipe of the run.
        extra_files: More files by name, such as README.md.
        plain: Config that builds the pruned model with nothing of ours, from `plain_config`.
        allow_nan: Whether to save weights that are NaN or infinite.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds something, or cannot be written; or a weight is not finite.
        PlanError: The plan does not follow on what was removed before.
    """
    folder = check_output(folder)
    if not allow_nan and (name := not_finite(model)):
        raise CheckpointError(
            f"{name!r} holds NaN or infinite numbers, so {folder} would be of no use and is not written; "
            "save_checkpoint(..., allow_nan=True) writes it all the same"
        )
    plan = loaded.earlier.then(plan) if loaded.earlier else plan
    documents = _documents(loaded, model, plan, recipe_yaml, plain) | {**(extra_files or {})}
    try:
        with making(folder) as unfinished:
            for name, content in documents.items():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / name).write_bytes(content.encode() if isinstance(content, str) else content)
            shard_size = SHARD if loaded.zoo.shards else 2**63
            save_torch_model(model, unfinished, max_shard_size=shard_size, metadata={"format": "pt"})
            for weights in unfinished.glob("*.safetensors"):
                # safetensors writes files that only their owner can read.
                weights.chmod((unfinished / CONFIG).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {one_line(error)}") from error
    return folder


def _documents(
    loaded: LoadedModel, model: nn.Module, plan: PruningPlan, recipe_yaml: str | None, plain: dict[str, Any] | None
) -> dict[str, str | bytes]:
    """The files that lie beside the weights, by name."""
    config = _config(loaded, model, plan, plain)
    documents: dict[str, str | bytes] = {CONFIG: _dump(config), PLAN: plan.to_json()}
    if "auto_map" in config:
        documents[CODE] = Path(modeling_scap.__file__).read_text(encoding="utf-8")
    if recipe_yaml is not None:
        documents[RECIPE] = recipe_yaml
    if loaded.image_processor is not None:
        documents[IMAGE_PROCESSOR] = _dump(loaded.image_processor)
    return documents


def _config(loaded: LoadedModel, model: nn.Module, plan: PruningPlan, plain: dict[str, Any] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "version": FORMAT,
        "library": loaded.zoo.name,
        "name": loaded.name,
        "base_model": loaded.base_model,
        "license": loaded.license,
        "preprocessing": asdict(loaded.preprocessing),
    }
    # Buffers outside the state dict are rebuilt, so only their precision has to be told.
    saved = model.state_dict().keys()
    precisions = {dtype: name for name, dtype in PRECISIONS.items()}
    rebuilt = {name: buffer.dtype for name, buffer in model.named_buffers() if name not in saved}
    if dtypes := {name: precisions[dtype] for name, dtype in rebuilt.items() if dtype in precisions}:
        entry["buffer_dtypes"] = dtypes
    if plain is not None:
        return loaded.zoo.write_config(plain, {**entry, "layout": UNIFORM}, None, loaded, model)
    return loaded.zoo.write_config(loaded.config, entry, cut_of(plan, loaded), loaded, model)


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"
