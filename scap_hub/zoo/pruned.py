"""Reads pruned models from disk: config.json, the plan that shrinks the rebuilt model, and safetensors."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.documents import parse_json, read_document
from scap_hub.errors import CheckpointError, ModelError, PlanError
from scap_hub.files import path_of
from scap_hub.graph.copies import copied, without_parameters, without_weights
from scap_hub.plan import PruningPlan
from scap_hub.surgery import apply_plan
from scap_hub.text import one_line
from scap_hub.zoo import modeling_scap
from scap_hub.zoo.base import FORMAT, LoadedModel, Preprocessing, Wanted, Zoo, remember, remembered
from scap_hub.zoo.building import hollow, rebuild
from scap_hub.zoo.checkpoint_file import load_weights
from scap_hub.zoo.complete import check_complete
from scap_hub.zoo.registry import pruned_entry, zoo_named
from scap_hub.zoo.weights import check_fit, fill, stored_in, weight_files

CONFIG = "config.json"
PLAN = "pruning_plan.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
UNIFORM = "uniform"
"""Layout of a checkpoint whose config builds the pruned model with nothing of ours."""


def load(
    folder_or_repo_id: str | Path,
    model: nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_nan: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Loads a pruned model, in eval mode; runs no code from the folder and unpickles nothing.

    Args:
        folder_or_repo_id: Folder that `save_checkpoint` wrote, or Hub id of one.
        model: The dense model, trained or not, where it comes from no zoo; untouched.
        revision: Branch, tag or commit of a Hub id.
        token: Hub token; None uses the stored one.
        allow_nan: Whether to load weights that are NaN or infinite.
        checkpoint: File with other weights for this pruned model, trained further: .safetensors, or .pth with a state
            dict.

    Raises:
        CheckpointError: Not a pruned checkpoint, incomplete, or its weights do not fit or are not finite.
        ModelError: The dense model cannot be rebuilt.
        PlanError: The plan is malformed or made for another model.
    """
    folder = _local(folder_or_repo_id, revision, token)
    config = _read_config(folder)
    zoo, plan, files = _zoo(config), _plan(folder), weight_files(folder)
    stored = stored_in(files)
    # A stranger's folder may claim any size: until all of it fits together, parameters have no memory.
    dense = without_parameters(model) if model is not None else hollow(zoo, zoo.dense_config(config), stored)
    small = _smaller(dense, zoo, config, plan)
    check_fit(small, stored, files[0])
    # Another network than the zoo's may stand in for it; then there is nothing to be told of it.
    known = _described(folder, zoo, config, plan, dense) if not zoo.rebuilds or zoo.knows_module(dense) else None
    if known is not None and not _is_uniform(config):
        check_complete(dense, small, known.preprocessing.input_size)
    fill(small, stored, files, config["scap"].get("buffer_dtypes", {}), allow_nan)
    if known is not None:
        remember(replace(known, module=small, source=str(folder_or_repo_id)))
    if checkpoint is not None:
        load_weights(small, checkpoint)
    return small.eval()


def check_loadable(folder: Path) -> None:
    """Makes sure that `load` loads a pruned model, as far as that can be known without its owner's dense one.

    Args:
        folder: Written by `save_checkpoint`.

    Raises:
        CheckpointError, ModelError, PlanError: As `load`.
    """
    if _zoo(_read_config(folder)).rebuilds:
        load(folder, allow_nan=True)


def read_pruned(folder: Path, wanted: Wanted) -> LoadedModel:
    """A pruned model and its description, as `load_model` gives them of a dense one.

    Args:
        folder: Written by `save_checkpoint`.
        wanted: What the model shall be; its number of classes is not looked at.

    Raises:
        CheckpointError: As `load`; also where nothing tells what was removed.
        ModelError: The dense model cannot be rebuilt, or does not take the input size.
        PlanError: As `load`.
    """
    config = _read_config(folder)
    zoo, plan = _zoo(config), _plan(folder)
    if plan is None and not _is_uniform(config):
        raise CheckpointError(f"{folder} has no {PLAN}, which says what was removed; scap_hub.load does without")
    if wanted.pretrained:
        module = load(folder)
        known = remembered(module)
        assert known is not None  # a dense model was built, by the zoo that describes it
        loaded = LoadedModel(module=module, **{**known, "zoo": zoo})
    else:
        dense = _dense(folder, zoo, config)
        loaded = _described(folder, zoo, config, plan, dense)
        loaded = replace(loaded, module=_smaller(dense, zoo, config, plan).eval())
        remember(loaded)
    return resized(loaded, wanted.input_size) if wanted.input_size else loaded


def resized(loaded: LoadedModel, input_size: tuple[int, int, int]) -> LoadedModel:
    """A pruned model for images of another size: (channels, height, width) in pixels.

    Raises:
        ModelError: The model does not take it.
    """
    own = loaded.preprocessing.input_size
    if input_size[0] != own[0]:
        raise ModelError(f"input_size {input_size}: the model takes {own[0]} channels; build it with that many")
    if loaded.zoo.rebuilds and input_size != own:
        dense = rebuild(loaded.zoo, loaded.config)
        sized = loaded.zoo.describe(dense, loaded.config, loaded.image_processor, loaded.source, input_size)
        loaded = replace(loaded, config=sized.config, image_processor=sized.image_processor)
    return replace(loaded, preprocessing=replace(loaded.preprocessing, input_size=input_size))


def _described(
    folder: Path, zoo: Zoo, config: dict[str, Any], plan: PruningPlan | None, dense: nn.Module
) -> LoadedModel:
    """What is known of a pruned model, with the dense one that it is made from."""
    entry, processor = config["scap"], None
    if (folder / IMAGE_PROCESSOR).is_file():
        try:
            processor = parse_json(_read(folder, IMAGE_PROCESSOR))
        except ValueError as error:
            raise CheckpointError(f"{folder / IMAGE_PROCESSOR} is not JSON ({error}): save it again") from None
    preprocessing = _preprocessing(entry.get("preprocessing"))
    loaded = zoo.describe(dense, config, processor, str(folder), preprocessing.input_size if preprocessing else None)
    return replace(
        loaded,
        preprocessing=preprocessing or loaded.preprocessing,
        base_model=entry.get("base_model"),
        license=entry.get("license"),
        earlier=None if _is_uniform(config) else plan,
    )


_LARGEST_SIZE = 2**16
"""Channels or pixels of an image that are above suspicion."""


def _preprocessing(entry: Any) -> Preprocessing | None:
    """Our entry; None where it was lost and the zoo's own entries tell."""
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(Preprocessing)}:
        return None
    size, mean, std = (entry[name] for name in ("input_size", "mean", "std"))
    sizes = _numbers(size, int) and len(size) == 3 and all(0 < own <= _LARGEST_SIZE for own in size)
    if not (sizes and _numbers(mean, int, float) and _numbers(std, int, float)):
        raise CheckpointError("'preprocessing' in config.json is malformed: save the checkpoint again")
    return Preprocessing(**{**entry, "input_size": tuple(size), "mean": tuple(mean), "std": tuple(std)})


def _numbers(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


def _plan(folder: Path) -> PruningPlan | None:
    """The record of what was removed; not all who save a model again keep it."""
    return PruningPlan.from_json(_read(folder, PLAN)) if (folder / PLAN).is_file() else None


def _smaller(dense: nn.Module, zoo: Zoo, config: dict[str, Any], plan: PruningPlan | None) -> nn.Module:
    """The pruned model; by the plan if it is there, which also tells the widths in a config."""
    if _is_uniform(config):
        return dense
    cut = _cut(zoo, config)
    if plan is None:
        small = copied(dense)
        _shrink(small, cut)
        return small
    small, shrunk = apply_plan(dense, plan), without_weights(dense)
    _shrink(shrunk, cut)
    _check_plan(small, plan, shrunk, cut)
    return small


def is_pruned(name: str | Path) -> bool:
    """Whether this names a pruned checkpoint: a folder, or a Hub id, whose files are then fetched."""
    if not path_of(name).is_dir() and (str(name).count("/") != 1 or ":" in str(name)):
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
    folder = _local(folder_or_repo_id)
    config = _read_config(folder)
    if _is_uniform(config):
        return None
    return _dense(folder, _zoo(config), config).eval()


def _dense(folder: Path, zoo: Zoo, config: dict[str, Any]) -> nn.Module:
    """The dense model with memory, no larger than the pruned weights can come from, if these are there."""
    document, files = zoo.dense_config(config), weight_files(folder)
    if all(file.is_file() for file in files):
        hollow(zoo, document, stored_in(files))
    return rebuild(zoo, document)


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
    folder = path_of(folder_or_repo_id)
    if folder.is_dir():
        return folder
    from scap_hub.zoo.remote import fetch  # huggingface_hub is slow to import

    return fetch(
        str(folder_or_repo_id),
        (CONFIG, PLAN, IMAGE_PROCESSOR, "model*.safetensors*"),
        revision=revision,
        token=token,
        advice="connect, or give a local folder",
        error=CheckpointError,
    )


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


def _check_plan(small: nn.Module, plan: PruningPlan, shrunk: nn.Module, cut: dict[str, Any]) -> None:
    """The plan is the record of what was done; config.json repeats the sizes that it leaves.

    Args:
        small: The dense model after the plan.
        plan: The record.
        shrunk: The dense model after the sizes in the config.
        cut: These sizes.
    """
    planned = {name: tensor.shape for name, tensor in small.state_dict().items()}
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
