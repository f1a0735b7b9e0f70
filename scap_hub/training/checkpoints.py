"""Checkpoints of a training, one an epoch, of which the last is kept: safetensors, JSON, and tensors in containers.

No file of a checkpoint can run code when it is read: `training.pt` holds tensors and numbers in plain containers, and
is loaded with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scap_hub.errors import ScapHubError, TrainingError
from scap_hub.files import making
from scap_hub.private import versioned
from scap_hub.text import one_line
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.training.feed import Feed
from scap_hub.training.history import History
from scap_hub.training.random_states import random_states, set_random_states

_DOCUMENT, _STATES = "run.json", "training.pt"
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError)
"""What reading a damaged file, or loading what does not fit, raises."""


@dataclass(frozen=True)
class State:
    """Everything that a training goes on from.

    Attributes:
        modules: The networks that change, by name: the model, and its moving average if there is one.
        optimizer: Has a state_dict.
        schedule: Has a state_dict.
        history: What was done, and the best weights.
        feed: The training batches, whose place is kept.
        scaler: Of the loss, in fp16.
    """

    modules: Mapping[str, nn.Module]
    optimizer: Any
    schedule: Any
    history: History
    feed: Feed
    scaler: torch.amp.GradScaler | None


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, the last one last."""
    return sorted(folder.glob("checkpoint-[0-9]*"))


def save(folder: Path, epoch: int, identity: dict[str, Any], state: State) -> None:
    """Writes the state of all ranks; an interrupted write leaves the last checkpoint as it is.

    Args:
        folder: Where checkpoints are kept.
        epoch: The last one that is done.
        identity: What the training is; only the same training takes up there.
        state: What to keep.

    Raises:
        TrainingError: It cannot be written.
    """
    ranks = gather_object([{"place": state.feed.state_dict(), **random_states(state.feed.generators)}])
    from_main(lambda: _write(folder, epoch, identity, state, ranks))


def resume(folder: Path, identity: dict[str, Any], state: State) -> bool:
    """Loads the last checkpoint; returns whether there is one.

    Raises:
        TrainingError: It is of another training, or cannot be read.
    """
    found = from_main(lambda: _read(folder, identity))
    if found is None:
        return False
    path, document, weights, states = found
    try:
        for name, module in state.modules.items():
            module.load_state_dict(versioned(module, weights[name]))
        state.optimizer.load_state_dict(states["optimizer"])
        state.schedule.load_state_dict(states["schedule"])
        state.history.load_state_dict({**document["history"], "best": weights["best"]})
        if state.scaler is not None:
            state.scaler.load_state_dict(states["scaler"])
        own = states["ranks"][accelerator().process_index]
        state.feed.load_state_dict(own["place"])
        set_random_states(own, state.feed.generators)
    except ScapHubError:
        raise
    except _UNREADABLE as error:
        raise _unusable(path, error) from error
    return True


def _write(folder: Path, epoch: int, identity: dict[str, Any], state: State, ranks: list[dict[str, Any]]) -> None:
    history = state.history.state_dict()
    best = history.pop("best")
    old = checkpoints(folder)
    try:
        with making(folder / f"checkpoint-{epoch:05d}") as unfinished:
            for name, module in state.modules.items():
                save_file(separate(module.state_dict()), unfinished / f"{name}.safetensors")
            save_file(separate(best), unfinished / "best.safetensors")
            states = {"optimizer": state.optimizer.state_dict(), "schedule": state.schedule.state_dict()}
            if state.scaler is not None:
                states["scaler"] = state.scaler.state_dict()
            torch.save({**states, "ranks": ranks}, unfinished / _STATES)
            (unfinished / _DOCUMENT).write_text(json.dumps({"identity": identity, "history": history}))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(f"cannot write a checkpoint to {str(folder)!r}: {one_line(error)}") from error
    for path in old:
        shutil.rmtree(path)


def _read(folder: Path, identity: dict[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Any], Any] | None:
    """The last checkpoint: its folder, its document, weights by name, and the states of everything else."""
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    try:
        document = json.loads((path / _DOCUMENT).read_text())
        theirs = document["identity"]
        changed = [key for key, value in identity.items() if theirs.get(key) != value]
        if changed:
            raise TrainingError(f"{str(path)!r} is of a run with another {', '.join(changed)}; {_ADVICE}")
        weights = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        states = torch.load(path / _STATES, map_location="cpu", weights_only=True)
    except ScapHubError:
        raise
    except (*_UNREADABLE, SafetensorError, pickle.UnpicklingError) as error:
        raise _unusable(path, error) from error
    return path, document, weights, states


_ADVICE = "delete it or choose another folder"


def _unusable(path: Path, error: Exception) -> TrainingError:
    return TrainingError(f"cannot resume from {str(path)!r}: {one_line(error)}; {_ADVICE}")


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
