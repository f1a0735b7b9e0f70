"""Pruned models on disk: safetensors, the zoo's own config.json, and the plan that shrinks the rebuilt model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from scap_hub.documents import LARGEST, own_file, parse_json, read_document
from scap_hub.errors import CheckpointError, ModelError, PlanError
from scap_hub.files import making
from scap_hub.hub.layout import cut_of
from scap_hub.plan import PruningPlan
from scap_hub.surgery import apply_plan
from scap_hub.zoo import LoadedModel, Zoo, modeling_scap, pruned_entry, rebuild, skeleton, zoo_named
from scap_hub.zoo.base import CODE, FORMAT, one_line
from scap_hub.zoo.remote import fetch

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CONFIG = "config.json"
PLAN = "pruning_plan.json"
RECIPE = "recipe.yaml"
IMAGE_PROCESSOR = "preprocessor_config.json"
SHARD = "5GB"
"""Largest file of weights, where a library reads several."""
UNIFORM = "uniform"
"""Layout of a checkpoint whose config builds the pruned model with nothing of ours."""
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
    extra_files: Mapping[str, str | bytes] | None = None,
    plain: dict[str, Any] | None = None,
) -> Path:
    """Writes a pruned model: all of the folder, or nothing.

    Args:
        folder: Absent or empty.
        model: The pruned model; its tensors keep their names and dtypes.
        loaded: The dense model that it was made from.
        plan: What was removed.
        recipe_yaml: The recipe of the run.
        extra_files: More files by name, such as README.md.
        plain: Config that builds the pruned model with nothing of ours, from `plain_config`.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds something, or cannot be written.
    """
    folder = check_output(folder)
    documents = _documents(loaded, model, plan, recipe_yaml, plain) | {**(extra_files or {})}
    try:
        with making(folder) as unfinished:
            for name, content in documents.items():
                (unfinished / name).write_bytes(content.encode() if isinstance(content, str) else content)
            shard_size = SHARD if loaded.zoo.shards else 2**63
            save_torch_model(model, unfinished, max_shard_size=shard_size, metadata={"format": "pt"})
            for weights in unfinished.glob("*.safetensors"):
                # safetensors writes files that only their owner can read.
                weights.chmod((unfinished / CONFIG).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {one_line(error)}") from error
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
    folder = _local(folder_or_repo_id, revision, token)
    config = _read_config(folder)
    zoo = _zoo(config)
    # Everything is compared on tensors without memory first: a foreign file may claim any size.
    dense = copy.deepcopy(model) if model is not None else skeleton(zoo, zoo.dense_config(config))
    cut = None if _is_uniform(config) else _cut(zoo, config)
    if cut is not None:
        if (folder / PLAN).is_file():
            _check_plan(dense, PruningPlan.from_json(_read(folder, PLAN)), cut)
        _shrink(dense, cut)
    files = weight_files(folder)
    _check_weights(dense, files)
    small = copy.deepcopy(model) if model is not None else rebuild(zoo, zoo.dense_config(config))
    if cut is not None:
        _shrink(small, cut)
    _load_tensors(small, files, config["scap"].get("buffer_dtypes", {}))
    return small.eval()


def is_pruned(name: str | Path) -> bool:
    """Whether this names a pruned checkpoint: a folder, or a Hub id, whose files are then fetched."""
    if not Path(name).expanduser().is_dir() and (str(name).count("/") != 1 or ":" in str(name)):
        return False
    try:
        config = parse_json(_read(_local(name), CONFIG))
    except (CheckpointError, ValueError):
        return False
    return isinstance(config, dict) and pruned_entry(config) is not None


def dense_model(folder_or_repo_id: str | Path) -> nn.Module | None:
    """The dense model that a pruned one was made from, untrained; None where the config no longer tells.

    Raises:
        CheckpointError: Not a pruned checkpoint.
        ModelError: A model that only its owner can build.
    """
    config = _read_config(_local(folder_or_repo_id))
    if _is_uniform(config):
        return None
    zoo = _zoo(config)
    return rebuild(zoo, zoo.dense_config(config)).eval()


def input_size(folder_or_repo_id: str | Path) -> tuple[int, int, int]:
    """(channels, height, width) that a pruned model was made for.

    Raises:
        CheckpointError: Not a pruned checkpoint, or one that was saved again without that entry.
    """
    config = _read_config(_local(folder_or_repo_id))
    try:
        channels, height, width = config["scap"]["preprocessing"]["input_size"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{CONFIG} of {folder_or_repo_id} does not say the input size: save it again") from None
    return channels, height, width


def _local(folder_or_repo_id: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder itself, or the downloaded one."""
    folder = Path(folder_or_repo_id).expanduser()
    if folder.is_dir():
        return folder
    return fetch(
        str(folder_or_repo_id),
        (CONFIG, PLAN, "model*.safetensors*"),
        revision=revision,
        token=token,
        advice="connect, or give a local folder",
        error=CheckpointError,
    )


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
    precisions = {dtype: name for name, dtype in _PRECISIONS.items()}
    rebuilt = {name: buffer.dtype for name, buffer in model.named_buffers() if name not in saved}
    if dtypes := {name: precisions[dtype] for name, dtype in rebuilt.items() if dtype in precisions}:
        entry["buffer_dtypes"] = dtypes
    if plain is not None:
        return loaded.zoo.write_config(plain, {**entry, "layout": UNIFORM}, None, loaded, model)
    return loaded.zoo.write_config(loaded.config, entry, cut_of(plan, loaded), loaded, model)


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _read(folder: Path, name: str) -> str:
    try:
        return read_document(folder, name)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder} is no complete pruned checkpoint: cannot read {name} ({one_line(error)}); save it again"
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json(_read(folder, CONFIG))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is not JSON ({error}): save the checkpoint again") from None
    entry = pruned_entry(config) if isinstance(config, dict) else None
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{folder / CONFIG} has no 'scap' entry: not a pruned model; load it with its own library"
        )
    if entry.get("version") != FORMAT:
        raise CheckpointError(
            f"{folder} has layout version {entry.get('version')!r}, this scap_hub reads {FORMAT}: upgrade scap_hub"
        )
    return {**config, "scap": entry}


def _zoo(config: dict[str, Any]) -> Zoo:
    try:
        return zoo_named(config["scap"].get("library"))
    except ModelError as error:
        raise CheckpointError(f"config.json cannot be read: {error}") from None


def _is_uniform(config: dict[str, Any]) -> bool:
    """Whether the zoo itself builds the pruned model."""
    return config["scap"].get("layout") == UNIFORM


def _cut(zoo: Zoo, config: dict[str, Any]) -> dict[str, Any]:
    """The sizes that pruning left."""
    cut = zoo.cut_in(config)
    if cut is None:
        raise CheckpointError("config.json lacks the sizes of the pruned model ('cut'): save the checkpoint again")
    return cut


def _shrink(model: nn.Module, cut: dict[str, Any]) -> None:
    try:
        modeling_scap.shrink(model, cut)
    except ValueError as error:
        raise PlanError(one_line(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"'cut' in config.json is malformed ({error!r}): save the checkpoint again") from None


def _check_plan(dense: nn.Module, plan: PruningPlan, cut: dict[str, Any]) -> None:
    """The plan is the record of what was done; config.json repeats the sizes that it leaves."""
    small, shrunk = apply_plan(dense, plan), copy.deepcopy(dense)
    planned = {name: tensor.shape for name, tensor in small.state_dict().items()}
    _shrink(shrunk, cut)
    for name, tensor in shrunk.state_dict().items():
        if tensor.shape != planned[name]:
            raise CheckpointError(
                f"{PLAN} leaves {tuple(planned[name])} of {name!r}, {CONFIG} leaves {tuple(tensor.shape)}: "
                "they belong to different models; save the checkpoint again"
            )
    numbers = {path: [list(dict(change).values()) for change in changes] for path, changes in plan.calls.items()}
    differs = next(
        (path for path in plan.attributes if _integers(small, path, plan) != _integers(shrunk, path, plan)), None
    )
    for path, values in cut["attributes"].items():
        if any(plan.attributes.get(path, {}).get(name) != value for name, value in values.items()):
            differs = path
    if differs is not None or cut.get("calls", {}) != numbers:
        raise CheckpointError(
            f"{PLAN} and {CONFIG} give different numbers to {differs or 'calls'!r}: they belong to different models; "
            "save the checkpoint again"
        )


def _integers(model: nn.Module, path: str, plan: PruningPlan) -> dict[str, Any]:
    """What a module has where the plan gives it numbers; a config keeps the dense ones."""
    held = vars(model.get_submodule(path))
    return {name: held[name] for name in plan.attributes[path] if not name.startswith("config.")}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or the shards that the index lists; they need not exist.

    Raises:
        CheckpointError: The index is malformed.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():  # in the order of transformers
        return [folder / WEIGHTS]
    try:
        names = set(parse_json(_read(folder, index.name))["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} lists no weights ({error!r}): save the checkpoint again") from None


def _check_weights(model: nn.Module, files: list[Path]) -> None:
    """Compares the files' headers with the model, before any weight is read."""
    wanted = model.state_dict(keep_vars=True)
    found: dict[str, list[int]] = {}
    for path in files:
        try:
            _check_header(own_file(path.parent, path.name))
            with safe_open(path, "pt") as file:
                found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {one_line(error)}") from None
    # Of tied tensors only one is stored.
    stored = {id(tensor) for name, tensor in wanted.items() if name in found}
    problems = [f"{name} is missing" for name, tensor in wanted.items() if id(tensor) not in stored]
    for name, shape in found.items():
        if name not in wanted:
            problems.append(f"{name} is unknown")
        elif list(wanted[name].shape) != shape:
            problems.append(f"{name} has {tuple(shape)} instead of {tuple(wanted[name].shape)}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{files[0]} does not fit the rebuilt model: {', '.join(problems[:3])}{more}")


def _check_header(path: Path) -> None:
    """The header is read into memory, so it must be no longer than the file that it claims to describe."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(LARGEST, path.stat().st_size):
        raise OSError(f"its header claims {length} bytes")


def _load_tensors(model: nn.Module, files: list[Path], buffer_dtypes: Mapping[str, str]) -> None:
    """Loads weights in the precision in which they were saved."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        for name, dtype in buffer_dtypes.items():
            tensors[name].data = tensors[name].data.to(_PRECISIONS[dtype])
    except KeyError as error:
        raise CheckpointError(f"'buffer_dtypes' in config.json does not fit the rebuilt model: {error}") from None
    state = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for name in state.keys() & tensors.keys():
        tensors[name].data = tensors[name].data.to(state[name].dtype)
    # Checked already; what is missing is tied to what is there.
    model.load_state_dict(state, strict=False)
