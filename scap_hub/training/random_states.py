"""The states of a process's random generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from scap_hub.training.distributed import accelerator


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The states of this rank's random generators."""
    states = {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state(),
        "loader": {name: generator.get_state() for name, generator in generators.items()},
    }
    device = accelerator().device
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    """Puts them back."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    for name in generators.keys() & states["loader"].keys():
        generators[name].set_state(states["loader"][name])
    if "device" in states:
        device = accelerator().device
        torch.get_device_module(device).set_rng_state(states["device"], device)


def generators(loader: DataLoader) -> dict[str, torch.Generator]:
    """Those that belong to a loader, by name; ask before accelerate prepares it, which gives samplers new ones."""
    owners = {"loader": loader, "sampler": loader.sampler, "batch sampler": loader.batch_sampler}
    found = {name: getattr(owner, "generator", None) for name, owner in owners.items()}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}
