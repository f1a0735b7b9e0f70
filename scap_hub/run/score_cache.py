"""Scores, and what is told of them, that outlive the call: of the same model, images and criterion."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Scoring:
    """A scoring whose results are read from a folder if they are there, and kept in it if they are not.

    Attributes:
        folder: Of the main process; None to keep nothing.
        model: As for `score`.
        batches: This process's calibration images.
        criterion: As for `score`.
        groups: As for `score`.
    """

    folder: Path | None
    model: nn.Module
    batches: Sequence[Tensor]
    criterion: Criterion
    groups: Sequence[ChannelGroup]

    def scores(self) -> Scores:
        """What `score` finds."""
        if self.folder is None:
            return self._scored()
        path, groups = self.folder / f"{self._name}.safetensors", self.groups
        scores = from_main(lambda: _load(path, groups) if path.is_file() else None)
        if scores is None:
            scores = found = self._scored()
            from_main(lambda: _save(path, found))
        return scores

    def diagnoses(self, scores: Scores) -> dict[str, Diagnosis]:
        """What `diagnose` says of these scores."""
        if self.folder is None:
            return self._diagnosed(scores)
        return Kept(self.folder).value(self._name, dict[str, Diagnosis], lambda: self._diagnosed(scores))

    def _scored(self) -> Scores:
        return score(self.model, self.batches, self.criterion, groups=self.groups)

    def _diagnosed(self, scores: Scores) -> dict[str, Diagnosis]:
        return diagnose(self.model, self.groups, self.batches, self.criterion, scores)

    @functools.cached_property
    def _name(self) -> str:
        """A fingerprint of everything that the scores follow from; of the images, the main process's."""
        return from_main(lambda: _fingerprint(self.model, self.batches, self.criterion, self.groups))


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
