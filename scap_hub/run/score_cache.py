"""Scores, and what is told of them, that outlive the call: of the same model, images and criterion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroup
from scap_hub.criteria import score
from scap_hub.criteria.base import Criterion
from scap_hub.criteria.diagnostics import Diagnosis, diagnose
from scap_hub.files import replacing
from scap_hub.run import fingerprints
from scap_hub.run.kept import Kept, damaged, unwritable
from scap_hub.scores import Scores
from scap_hub.training.distributed import accelerator, from_main

_FORMAT = 2  # of the files; part of the fingerprint, so that files of another format are not found
_IMPORTANCE, _FIDELITY = "importance/", "fidelity/"


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
    path, scores = from_main(lambda: _find(folder, _fingerprint(model, batches, criterion, groups), groups))
    if scores is None:
        scores = score(model, batches, criterion, groups=groups)
        found = scores
        from_main(lambda: _save(path, found))
    return scores


def kept_diagnoses(
    folder: Path | None,
    model: nn.Module,
    batches: Sequence[Tensor],
    criterion: Criterion,
    groups: Sequence[ChannelGroup],
    scores: Scores,
) -> dict[str, Diagnosis]:
    """`diagnose`, read from a folder if it is there, kept in it if it is not.

    Args:
        folder: As for `kept_scores`.
        model: As for `diagnose`.
        batches: This process's calibration images.
        criterion: As for `diagnose`.
        groups: As for `diagnose`.
        scores: As for `diagnose`.
    """
    name = folder and from_main(lambda: f"diagnostics-{_fingerprint(model, batches, criterion, groups)}")
    return Kept(folder).value(
        str(name), dict[str, Diagnosis], lambda: diagnose(model, groups, batches, criterion, scores)
    )


def _find(folder: Path, fingerprint: str, groups: Sequence[ChannelGroup]) -> tuple[Path, Scores | None]:
    path = folder / f"{fingerprint}.safetensors"
    return path, _load(path, groups) if path.is_file() else None


def _save(path: Path, scores: Scores) -> None:
    tensors = {f"{_IMPORTANCE}{name}": values for name, values in scores.items()}
    tensors |= {f"{_FIDELITY}{layer}": values for layer, values in scores.fidelity.items()}
    try:
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, {"scope": scores.scope})
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def _load(path: Path, groups: Sequence[ChannelGroup]) -> Scores:
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
            scope = file.metadata()["scope"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    importance = _named(tensors, _IMPORTANCE)
    in_order = {group.name: importance[group.name] for group in groups if group.name in importance}
    return Scores(in_order, scope, _named(tensors, _FIDELITY))


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): values for key, values in tensors.items() if key.startswith(prefix)}


def _fingerprint(
    model: nn.Module, batches: Iterable[Tensor], criterion: Criterion, groups: Sequence[ChannelGroup]
) -> str:
    """Of everything that scores follow from; of the images, this process's."""
    names = [(group.name, group.size, group.prunable) for group in groups]
    source = fingerprints.source_of(type(criterion))
    about = repr((_FORMAT, criterion, source, names, accelerator().num_processes, torch.initial_seed()))
    return fingerprints.of_tensors([*model.state_dict().values(), *batches], about)
