"""What the page of a run shows beside its measurements: layers, other targets, spectra, answers that changed."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scap_hub.channels.groups import ChannelGroups
from scap_hub.criteria.scap.portrait import Portrait, portraits
from scap_hub.errors import TargetError
from scap_hub.placement import fed
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.run.fingerprints import of_tensors
from scap_hub.scores import Scores
from scap_hub.selection.select import Choosing, importance_of
from scap_hub.selection.target import Target
from scap_hub.tasks import Task
from scap_hub.text import one_line
from scap_hub.timing.layers import layer_milliseconds
from scap_hub.training.data import Data
from scap_hub.zoo import LoadedModel

SHARES = [share / 100 for share in range(95, 0, -5)]
"""Of the dense model, what the targets of `Details.choices` leave."""
_SPECTRA, _ANSWERS, _THUMBNAILS = 32, 256, 12
_SIDE = 64  # pixels of a thumbnail


@dataclass(frozen=True)
class Layer:
    """One layer that computes products, dense and pruned.

    Attributes:
        path: Module path.
        kind: Class, with the kernel of a convolution.
        groups: Channel groups that its outputs belong to.
        before: Its outputs in the dense model.
        after: Those that are left.
        macs_before: Multiply-accumulates for one image in the dense model.
        macs_after: Those that are left.
        ms_before: Milliseconds in one forward pass of the dense model; None if latency was not measured.
        ms_after: The same of the pruned model.
    """

    path: str
    kind: str
    groups: list[str]
    before: int
    after: int
    macs_before: int
    macs_after: int
    ms_before: float | None = None
    ms_after: float | None = None


@dataclass(frozen=True)
class Choice:
    """What another target would leave, by the scores of the dense model and in one step.

    Attributes:
        target: Its short form, "macs=0.5".
        widths: Channels that stay, by group, in the order of `Details.groups`.
        macs: Multiply-accumulates for one image that stay.
        params: Parameters that stay.
        loss: Share of all importance in the channels that go, 0 to 1.
    """

    target: str
    widths: list[int]
    macs: int
    params: int
    loss: float


@dataclass(frozen=True)
class Answer:
    """A calibration image that the two models answer differently.

    Attributes:
        before: The dense model's class.
        after: The pruned model's.
        sure_before: Probability that the dense model gives its answer.
        sure_after: The same of the pruned model.
        jpeg: The image, base64; None where it is neither grey nor RGB.
    """

    before: int
    after: int
    sure_before: float
    sure_after: float
    jpeg: str | None


@dataclass(frozen=True)
class Answers:
    """How far the two models agree on calibration images.

    Attributes:
        images: How many were shown to both.
        changed: How many of them got another answer.
        shown: Of these, where the dense model was most sure.
    """

    images: int
    changed: int
    shown: list[Answer]


@dataclass(frozen=True)
class Details:
    """What the page shows beside measurements.

    Attributes:
        layers: In the order of the forward pass; "" stands for the products of no layer, as in attention.
        groups: Sizes of the groups that `choices` are about, by name.
        choices: What other targets would leave, from the largest model to the smallest; the run's own is among them.
        steps: Of the run's schedule; `choices` are of one.
        portraits: Spectra of some layers.
        answers: None where a task has no single answer for an image.
        classes: Names of the classes that the report tells of, by number; None where they are not known.
    """

    layers: list[Layer]
    groups: dict[str, int]
    choices: list[Choice]
    steps: int = 1
    portraits: list[Portrait] = field(default_factory=list)
    answers: Answers | None = None
    classes: dict[int, str] | None = None


def details_of(
    loaded: LoadedModel,
    small: nn.Module,
    groups: ChannelGroups,
    scores: Scores,
    plan: PruningPlan,
    calibration: Sequence[Tensor],
    recipe: Recipe,
    data: Data,
    choices: Choices,
    classes: Collection[int] = (),
) -> Details | None:
    """Details of a run, on one process; None, with a warning, where something of them fails.

    Args:
        loaded: The dense model.
        small: The finished one.
        groups: Channel groups of the dense model.
        scores: Of the first step.
        plan: What all steps did to the dense model.
        calibration: This process's calibration batches.
        recipe: Of the run.
        data: Of the run.
        choices: Gives those of the details.
        classes: Numbers of those that the report tells of.
    """
    kept = {name: plan.kept(name) for name in plan.groups}
    images = torch.cat(list(calibration))
    try:
        answers = _answers(loaded, small, images[:_ANSWERS], data.task)
        return Details(
            layers=_layers(loaded.module, small, groups, kept, images[:1] if recipe.evaluate.latency else None),
            groups=_scored(groups, scores),
            choices=choices(groups, scores, recipe),
            steps=recipe.schedule.steps,
            portraits=portraits(loaded.module, groups, scores, kept, images[:_SPECTRA]) if len(images) > 1 else [],
            answers=answers,
            classes=_names(loaded.labels, classes, answers),
        )
    except Exception as error:
        # By now the model is finished: hours of work must not be lost for want of a picture.
        warnings.warn(f"the report has no details: {type(error).__name__}: {one_line(error)}", stacklevel=2)
        return None


class Choices:
    """What other targets would leave; what runs with the same scores have in common is computed once."""

    def __init__(self) -> None:
        self._shared: dict[str, tuple[Choosing, dict[Target, Choice]]] = {}

    def __call__(self, groups: ChannelGroups, scores: Scores, recipe: Recipe) -> list[Choice]:
        """What `select` would leave at other targets, with the same rounding, floor and scope; see `Details`."""
        settings = recipe.target
        own = settings.target
        kind = own.kind if own.kind in ("macs", "params", "ratio") and not isinstance(own.value, Mapping) else "macs"
        targets = {Target(kind, share) for share in SHARES} | ({own} if own.kind == kind else set())
        scope = scores.scope if settings.scope == "auto" else settings.scope
        names = list(_scored(groups, scores))
        about = (scope, settings.multiple, settings.floor, [(name, groups.by_name[name].size) for name in names])
        key = of_tensors([scores[name] for name in names], repr(about))
        if key not in self._shared:
            self._shared[key] = Choosing(groups, scores, settings.multiple, settings.floor, scope), {}
        choosing, known = self._shared[key]
        found = [_choice(groups, kind + "=1.0", {}, scores, names)]
        for target in sorted(targets, key=lambda target: -target.number):
            if target not in known:
                try:
                    known[target] = _choice(groups, str(target), choosing(target), scores, names)
                except TargetError:
                    break  # every smaller one is out of reach as well
            found.append(known[target])
        return found


def _scored(groups: ChannelGroups, scores: Scores) -> dict[str, int]:
    """Sizes of the groups that could be chosen from, by name."""
    return {group.name: group.size for group in groups if group.prunable and group.name in scores}


def _choice(
    groups: ChannelGroups, target: str, keep: Mapping[str, Sequence[int]], scores: Scores, names: Sequence[str]
) -> Choice:
    stays, sizes = groups.staying(keep), groups.by_name
    widths = [len(keep[name]) if name in keep else sizes[name].size for name in names]
    return Choice(target, widths, groups.macs(stays), groups.params(stays), 1 - importance_of(keep, scores))


def _layers(
    dense: nn.Module,
    small: nn.Module,
    groups: ChannelGroups,
    kept: Mapping[str, Sequence[int]],
    images: Tensor | None,
) -> list[Layer]:
    before, after = groups.layer_macs(), groups.layer_macs(groups.staying(kept))
    owners: dict[str, list[str]] = {}
    for group in groups:
        for name, dim in group.members:
            if dim == 0:
                owners.setdefault(name, []).append(group.name)
    paths = [path for path in before if path]
    old, new = ({} if images is None else layer_milliseconds(model, paths, images) for model in (dense, small))
    return [
        Layer(
            path, _kind(dense, path), owners.get(f"{path}.weight", []), _width(dense, path), _width(small, path),
            before[path], after[path], old.get(path), new.get(path),
        )
        for path in before
    ]  # fmt: skip


def _kind(model: nn.Module, path: str) -> str:
    if not path:
        return "products without weights"
    module = model.get_submodule(path)
    kernel = getattr(module, "kernel_size", None)
    size = " " + "x".join(map(str, kernel)) if isinstance(kernel, tuple) else ""
    return type(module).__name__ + size


def _width(model: nn.Module, path: str) -> int:
    module: Any = model.get_submodule(path) if path else None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return 0
    return weight.shape[1] * module.groups if getattr(module, "transposed", False) else weight.shape[0]


@torch.no_grad()
def _answers(loaded: LoadedModel, small: nn.Module, images: Tensor, task: Task) -> Answers | None:
    if task.from_teacher:
        return None
    outputs: list[list[Tensor]] = [[], []]
    for batch in images.split(64):
        for found, model in zip(outputs, (loaded.module, small), strict=True):
            sure = task.confidence(task.output(model, fed(model, batch)))
            if sure is None:
                return None
            found.append(sure.cpu())
    before, after = (torch.cat(found) for found in outputs)
    one, other = before.argmax(1), after.argmax(1)
    changed = (one != other).nonzero()[:, 0]
    surest = changed[before[changed].amax(1).argsort(descending=True)][:_THUMBNAILS]
    shown = [
        Answer(
            int(one[i]), int(other[i]), round(float(before[i].max()), 4), round(float(after[i].max()), 4),
            thumbnail(images[i], loaded.preprocessing.mean, loaded.preprocessing.std),
        )
        for i in surest.tolist()
    ]  # fmt: skip
    return Answers(len(images), len(changed), shown)


def _names(labels: Sequence[str] | None, told: Collection[int], answers: Answers | None) -> dict[int, str] | None:
    """Names of the classes that are told of; a page of thousands of others would be large, and say no more."""
    if labels is None:
        return None
    shown = {number for answer in (answers.shown if answers else ()) for number in (answer.before, answer.after)}
    return {number: str(labels[number]) for number in sorted({*told, *shown}) if number < len(labels)}


def thumbnail(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> str | None:
    """A small JPEG of a normalised image, (C, H, W), base64; None unless it is grey or RGB."""
    channels = image.shape[0]
    if channels not in (1, 3):
        return None
    shift, scale = (torch.tensor([*values, *[values[-1]] * channels][:channels]) for values in (mean, std))
    pixels = (image.float().cpu() * scale[:, None, None] + shift[:, None, None]).clamp(0, 1) * 255
    array = pixels.round().byte().movedim(0, -1).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if channels == 1 else array))
    ratio = _SIDE / max(picture.size)
    picture = picture.resize([max(1, round(side * ratio)) for side in picture.size])
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
