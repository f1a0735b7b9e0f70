"""Scores that outlive the call: what the same model, images and criterion were once found to score."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria import score
from scap_hub.criteria.base import Criterion
from scap_hub.files import replacing
from scap_hub.scores import Scores
from scap_hub.training.distributed import accelerator, from_main

_IMPORTANCE, _FIDELITY = "importance:", "fidelity:"


def kept_scores(
    folder: Path | None,
    model: nn.Module,
    batches: Sequence[Tensor],
    criterion: Criterion,
    groups: Sequence[ChannelGroup],
) -> Scores:
    """`score`, read from a folder if they are there, kept in it if they are not.

    Args:
        folder: Of the main process; None to keep nothing.
        model: As for `score`.
        batches: This process's calibration images.
        criterion: As for `score`.
        groups: As for `score`.
    """
    if folder is None:
        return score(model, batches, criterion, groups=groups)
    path, scores = from_main(lambda: _find(folder, _fingerprint(model, batches, criterion, groups)))
    if scores is None:
        scores = score(model, batches, criterion, groups=groups)
        if accelerator().is_main_process:
            _write(path, scores)
    return scores


def _find(folder: Path, fingerprint: str) -> tuple[Path, Scores | None]:
    path = folder / f"{fingerprint}.safetensors"
    return path, _read(path) if path.is_file() else None


def _write(path: Path, scores: Scores) -> None:
    tensors = {f"{_IMPORTANCE}{name}": values for name, values in scores.items()}
    tensors |= {f"{_FIDELITY}{layer}": values for layer, values in scores.fidelity.items()}
    with replacing(path) as unfinished:
        # Of their own, because several layers may share memory, which the format refuses.
        save_file({name: values.clone() for name, values in tensors.items()}, unfinished, {"scope": scores.scope})


def _read(path: Path) -> Scores:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scope = file.metadata()["scope"]
    importance, fidelity = (
        {name.removeprefix(kind): values for name, values in tensors.items() if name.startswith(kind)}
        for kind in (_IMPORTANCE, _FIDELITY)
    )
    return Scores(importance, scope, fidelity)


def _fingerprint(
    model: nn.Module, batches: Sequence[Tensor], criterion: Criterion, groups: Sequence[ChannelGroup]
) -> str:
    """Of everything that scores follow from; of the images, this process's."""
    names = [(group.name, group.size, group.prunable) for group in groups]
    about = (criterion, names, accelerator().num_processes, torch.initial_seed())
    digest = hashlib.sha256(repr(about).encode())
    for tensor in (*model.state_dict().values(), *batches):
        digest.update(repr(tensor.shape).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
