"""Weights from a file that somebody trained: safetensors, or what torch.save wrote; no code in it runs."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scap_hub.errors import ModelError
from scap_hub.files import path_of
from scap_hub.private import versioned
from scap_hub.text import first_few, one_line

_INSIDE = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the state dict, beside the optimiser's."""
_AROUND = ("module.", "_orig_mod.")
"""What wrappers put before each name: for several devices, and for compiling."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Gives a model the weights in a file, in place and in its own precision.

    Args:
        model: With the names and shapes that the file has.
        path: A .safetensors file; or a .pth, .pt, .bin with a state dict, alone or under "state_dict", "model" or
            "model_state_dict".

    Raises:
        ModelError: The file cannot be read without running code, or its weights do not fit the model.
    """
    state, wanted = _read(path_of(path)), model.state_dict(keep_vars=True)
    # Of tied tensors one is enough; a counter of batches says nothing.
    there = {id(tensor) for name, tensor in wanted.items() if name in state}
    wrong = [f"{name!r} is unknown to the model" for name in state if name not in wanted]
    wrong += [
        f"{name!r} is missing"
        for name, tensor in wanted.items()
        if id(tensor) not in there and not name.endswith("num_batches_tracked")
    ]
    shapes = {name: (tuple(state[name].shape), tuple(wanted[name].shape)) for name in state if name in wanted}
    other = [f"{name!r} is {found}, not {own}" for name, (found, own) in shapes.items() if found != own]
    if wrong or other:
        rows = {(found[0], own[0]) for found, own in shapes.values() if found != own and found and own}
        hint = ""
        if not wrong and len(rows) == 1:
            hint = f"; if it has {rows.copy().pop()[0]} classes, set model.num_classes to that"
        raise ModelError(f"checkpoint {str(path)!r} does not fit the model: {first_few([*wrong, *other])}{hint}")
    broken = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise ModelError(f"checkpoint {str(path)!r} has NaN or Inf in {broken!r}: take one from before that")
    model.load_state_dict(versioned(model, state), strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, with the names that the model itself gives."""
    if not path.is_file():
        raise ModelError(f"checkpoint {str(path)!r} is no file; a folder or a Hub id is given as the model itself")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise ModelError(
            f"checkpoint {str(path)!r} cannot be read as weights alone ({one_line(error)}): save model.state_dict()"
        ) from None
    for key in _INSIDE:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())
    if not tensors or not all(isinstance(name, str) for name in state):
        raise ModelError(f"checkpoint {str(path)!r} holds no state dict: save model.state_dict()")
    for prefix in _AROUND:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)
