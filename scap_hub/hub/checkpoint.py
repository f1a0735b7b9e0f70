"""Pruned models on disk: safetensors, the zoo's own config.json, and the plan that shrinks the rebuilt model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import nn

from scap_hub.adapters import LoadedModel, rebuild
from scap_hub.adapters.base import one_line
from scap_hub.adapters.remote import fetch
from scap_hub.errors import CheckpointError
from scap_hub.plan import PruningPlan
from scap_hub.surgery import apply_plan

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PLAN = "pruning_plan.json"
RECIPE = "recipe.yaml"
IMAGE_PROCESSOR = "preprocessor_config.json"


def check_output(folder: str | Path) -> Path:
    """Returns the folder, which must be absent or empty; ask before long work.

    Raises:
        CheckpointError: It holds something, or is a file.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"output folder {folder} exists and is not empty: choose another, or remove it first")
    return folder


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    loaded: LoadedModel,
    plan: PruningPlan,
    recipe_yaml: str | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> Path:
    """Writes a pruned model: all of the folder, or nothing.

    Args:
        folder: Absent or empty.
        model: The pruned model; its tensors keep their names and dtypes.
        loaded: The dense model that it was made from.
        plan: What was removed.
        recipe_yaml: The recipe of the run.
        extra_files: More text files by name, such as README.md.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds something, or cannot be written.
    """
    folder = check_output(folder)
    documents = {CONFIG: _dump(_config(loaded, model)), PLAN: plan.to_json()}
    if recipe_yaml is not None:
        documents[RECIPE] = recipe_yaml
    if loaded.image_processor is not None:
        documents[IMAGE_PROCESSOR] = _dump(loaded.image_processor)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_tensors(model, str(partial / WEIGHTS), metadata={"format": "pt"})
        for name, text in {**documents, **(extra_files or {})}.items():
            (partial / name).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(
    folder_or_repo_id: str | Path,
    model: nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Loads a pruned model, in eval mode; runs no code from the folder and unpickles nothing.

    Args:
        folder_or_repo_id: Folder that `save_checkpoint` wrote, or Hub id of one.
        model: The dense model, trained or not, where it comes from no zoo; untouched.
        revision: Branch, tag or commit of a Hub id.
        token: Hub token; None uses the stored one.

    Raises:
        CheckpointError: Not a pruned checkpoint, incomplete, or its weights do not fit.
        ModelError: The dense model cannot be rebuilt.
        PlanError: The plan is malformed or made for another model.
    """
    folder = Path(folder_or_repo_id).expanduser()
    if not folder.is_dir():
        folder = fetch(
            str(folder_or_repo_id),
            (CONFIG, PLAN, WEIGHTS),
            revision=revision,
            token=token,
            advice="connect, or give a local folder",
            error=CheckpointError,
        )
    config = _read_config(folder)
    plan = PruningPlan.from_json(_read(folder, PLAN))
    library = config["scap"].get("library")
    dense = rebuild(library, _dense_config(library, config)) if model is None else model
    small = apply_plan(dense, plan)
    for name, dtype in config["scap"].get("buffer_dtypes", {}).items():
        _cast(small, name, getattr(torch, dtype))
    _load_weights(small, folder / WEIGHTS)
    return small.eval()


def _config(loaded: LoadedModel, model: nn.Module) -> dict[str, Any]:
    scap: dict[str, Any] = {
        "version": FORMAT,
        "library": loaded.library,
        "name": loaded.name,
        "base_model": loaded.base_model,
        "license": loaded.license,
        "preprocessing": asdict(loaded.preprocessing),
    }
    # Tensors outside the state dict are rebuilt, so only their dtype has to be told.
    saved = model.state_dict().keys()
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers() if name not in saved}
    scap["buffer_dtypes"] = {
        name: str(dtype).removeprefix("torch.")
        for name, dtype in dtypes.items()
        if dtype.is_floating_point and dtype != torch.float32
    }
    config = loaded.config
    if loaded.library == "timm":
        return {
            **config,
            "architecture": "scap_pruned",
            "model_args": {"base": config["architecture"], **config["model_args"]},
            "num_features": model.num_features,
            **({"label_names": loaded.labels} if loaded.labels else {}),
            "scap": scap,
        }
    if loaded.library == "transformers":
        labels = loaded.labels or []
        return {
            **config,
            **({"id2label": dict(enumerate(labels))} if labels else {}),
            **({"label2id": {label: index for index, label in enumerate(labels)}} if labels else {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "scap": scap,
        }
    return {"scap": {**scap, "num_classes": loaded.num_classes, "labels": loaded.labels, **config}}
