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
_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


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
        for name, text in {**documents, **(extra_files or {})}.items():
            (partial / name).write_text(text, encoding="utf-8")
        save_tensors(model, str(partial / WEIGHTS), metadata={"format": "pt"})
        # safetensors writes files that only their owner can read.
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)
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
    dense = _rebuild(config) if model is None else model
    small = apply_plan(dense, plan)
    _load_tensors(small, folder / WEIGHTS, config["scap"].get("buffer_dtypes", {}))
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
    # Buffers outside the state dict are rebuilt, so only their precision has to be told.
    saved = model.state_dict().keys()
    precisions = {dtype: name for name, dtype in _PRECISIONS.items()}
    rebuilt = {name: buffer.dtype for name, buffer in model.named_buffers() if name not in saved}
    if dtypes := {name: precisions[dtype] for name, dtype in rebuilt.items() if dtype in precisions}:
        scap["buffer_dtypes"] = dtypes
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
        names = {}
        if loaded.labels:
            id2label = dict(enumerate(loaded.labels))
            names = {"id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}
        return {**config, **names, "dtype": str(model.dtype).removeprefix("torch."), "scap": scap}
    return {"scap": {**scap, "num_classes": loaded.num_classes, "labels": loaded.labels, **config}}


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder} is no complete pruned checkpoint: cannot read {name} ({type(error).__name__}); save it again"
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(folder, CONFIG))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is not JSON ({error}): save the checkpoint again") from None
    scap = config.get("scap") if isinstance(config, dict) else None
    if not isinstance(scap, dict):
        raise CheckpointError(
            f"{folder / CONFIG} has no 'scap' entry: not a pruned model; load it with its own library"
        )
    if scap.get("version") != FORMAT:
        raise CheckpointError(
            f"{folder} has layout version {scap.get('version')!r}, this scap_hub reads {FORMAT}: upgrade scap_hub"
        )
    return config


def _rebuild(config: dict[str, Any]) -> nn.Module:
    """The untrained dense model."""
    library = config["scap"].get("library")
    if library == "module":
        return rebuild(library, config["scap"])
    dense = {key: value for key, value in config.items() if key != "scap"}
    if library == "timm":
        try:
            arguments = dict(dense["model_args"])
            labels = {"label_names": dense["label_names"]} if "label_names" in dense else {}
            dense |= {"architecture": arguments.pop("base"), "model_args": arguments}
            dense["pretrained_cfg"] = dense["pretrained_cfg"] | labels
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json lacks what it takes to rebuild a timm model: {error!r}") from None
    elif library != "transformers":
        raise CheckpointError(f"config.json names the unknown library {library!r}: upgrade scap_hub")
    return rebuild(library, dense)


def _load_tensors(model: nn.Module, path: Path, buffer_dtypes: Mapping[str, str]) -> None:
    """Loads weights strictly, in the precision in which they were saved."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        for name, dtype in buffer_dtypes.items():
            tensors[name].data = tensors[name].data.to(_PRECISIONS[dtype])
        with safe_open(path, "pt") as file:
            for name in file.keys() & tensors.keys():
                tensors[name].data = tensors[name].data.to(file.get_tensor(name).dtype)
        load_tensors(model, path, strict=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(error)}") from None
    except (RuntimeError, KeyError) as error:
        problems = " ".join(str(error).split()).partition(": ")[2][:300]
        raise CheckpointError(f"{path} does not fit the rebuilt model: {problems}") from None
