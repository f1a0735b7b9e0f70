"""Runs on a part of a model whose whole cannot be recorded: taken out, pruned by itself, put back."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from scap_hub.channels.oracle import compare_whole
from scap_hub.channels.part import Part, by_image, reaching
from scap_hub.errors import DataError, ModelError, RecipeError, UnverifiableError, VerificationError
from scap_hub.placement import fed
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.run.report import Whole
from scap_hub.run.result import Result
from scap_hub.run.verification import IMAGES, Verdict
from scap_hub.tasks.part import PartOutputs
from scap_hub.timing.clock import milliseconds
from scap_hub.training.data import Data
from scap_hub.training.distributed import accelerator, from_main
from scap_hub.zoo import LoadedModel
from scap_hub.zoo.base import remember
from scap_hub.zoo.registry import PLAIN


@dataclass(kw_only=True)
class LoadedPart(LoadedModel):
    """A part of a model, as a model: fed with what reaches it, and known by the names that it has in the whole.

    Attributes:
        whole: The dense model that it is a part of.
        images: A few calibration images of the whole.
        targets: Its data, where there are targets by which the whole can be trained and measured; else None.
    """

    whole: LoadedModel
    images: Tensor
    targets: Data | None = None

    @property
    def path(self) -> str:
        """Where it is in the whole."""
        return self.module.scap_part  # type: ignore[return-value]

    def within(self, part: nn.Module) -> nn.Module:
        """A copy of the whole with another part in this one's place: (pruned) copies of `module`."""
        dense = self.whole.module.get_submodule(self.path)
        return copy.deepcopy(self.whole.module, {id(dense): part.get_submodule(self.path)})


def check_part(recipe: Recipe, task: object = None) -> None:
    """Makes sure that a recipe asks of a part what can be done with one; ask before any work.

    Args:
        recipe: Of the run.
        task: What the caller gave as the task, beside the recipe's.

    Raises:
        RecipeError: There is a task, or int8, which want outputs that a part does not have.
    """
    if recipe.model.part is None:
        return
    if recipe.task is not None or task is not None:
        raise RecipeError(f"model.part={recipe.model.part!r}: a part is measured by its outputs, so leave out task")
    if recipe.deploy.int8:
        raise RecipeError(f"model.part={recipe.model.part!r}: a model that needs it cannot be exported: no deploy.int8")


def on_part(loaded: LoadedModel, data: Data, path: str) -> tuple[LoadedPart, Data]:
    """A part of a model with what it is fed from the model's data.

    Args:
        loaded: The whole, dense.
        data: Images of the whole.
        path: Of the part.

    Raises:
        ModelError: There is no such part, or it is not called with one tensor that has a row for each image, or other
            modules use its weights too.
        DataError: There are no images.
    """
    whole = loaded.module.to(accelerator().device).eval()
    with torch.random.fork_rng(devices=[]):  # a loader's workers draw a number
        images = next((batch[0] for batch in data.calibration if len(batch[0])), None)
    if images is None:
        raise DataError("there are no calibration images: none of them can be read, or there are none")
    images = images[:IMAGES]
    first, *constants = _reached(whole, path, images)
    sizes = tuple(first.shape[1:])
    _check_alone(whole, path)

    def reached(images: Tensor) -> Tensor:
        found = _reached(whole, path, images)[0]
        if found.shape[1:] != sizes:
            raise ModelError(
                f"{path!r} is given {tuple(found.shape[1:])} of some images, {sizes} of others: give images of one size"
            )
        return found.to(images.device)

    known: dict[str, Any] = {own.name: getattr(loaded, own.name) for own in fields(loaded)}
    known |= {
        "module": Part(whole, path, tuple(constants)), "zoo": PLAIN, "num_classes": 0, "labels": None, "config": {},
        "preprocessing": replace(loaded.preprocessing, input_size=sizes),
    }  # fmt: skip
    part = LoadedPart(**known, whole=loaded, images=images, targets=data if data.task.by_part else None)
    return part, replace(data, task=PartOutputs(reached), labels=None)


def _reached(whole: nn.Module, path: str, images: Tensor) -> tuple[Any, ...]:
    arguments = reaching(whole, path, (fed(whole, images),))
    if not by_image(arguments, len(images)):
        shown = ", ".join(
            f"{type(value).__name__}{f' {tuple(value.shape)}' if isinstance(value, Tensor) else ''}"
            for value in arguments
        )
        raise ModelError(
            f"the part {path!r} is called with ({shown}) for {len(images)} images, and can be pruned by itself if that "
            "is one tensor with a row for each image: choose a part before it, such as the backbone"
        )
    return arguments


def _check_alone(whole: nn.Module, path: str) -> None:
    inside = set(whole.get_submodule(path).modules())
    own = {id(weight) for module in inside for weight in module.parameters(recurse=False)}
    for name, module in whole.named_modules():
        if module not in inside and any(id(weight) in own for weight in module.parameters(recurse=False)):
            raise ModelError(f"{name!r} uses weights of the part {path!r} too: choose a part that holds both")


def verified_within(part: LoadedPart, dense: nn.Module, plan: PruningPlan, verdict: Verdict, insist: bool) -> Verdict:
    """What is known of a plan of a part, once it is tried in the whole too.

    Args:
        part: The part, and where it belongs.
        dense: The part that the plan is for.
        plan: The plan.
        verdict: What is known of it by itself.
        insist: As for `verified`.

    Raises:
        VerificationError: The plan is right for the part, and wrong for the whole.
        UnverifiableError: The whole cannot be compared, and `insist` is true.
    """
    if verdict.fault is not None or verdict.unverified is not None:
        return verdict
    whole = part.within(dense)
    try:
        found = from_main(lambda: compare_whole(whole, plan, (fed(whole, part.images),), part.path))
    except VerificationError as error:
        error.plan = plan
        raise
    except (UnverifiableError, ModelError) as error:
        if insist:
            raise UnverifiableError(f"{error}; with evaluate.verify=false the run goes on without it") from error
        warnings.warn(f"the whole model is not verified: {error}", stacklevel=2)
        return replace(verdict, unverified=str(error), difference=None)
    return replace(verdict, difference=max(verdict.difference or 0.0, found.difference))


def put_back(result: Result) -> Result:
    """A finished run's result, with the pruned part in its model; any other as it is."""
    part = result.loaded
    if not isinstance(part, LoadedPart):
        return result
    whole, model = part.whole, part.within(result.model)
    report = result.report
    report.whole = _measured(part, model, result.recipe)
    report.about |= {"part": part.path, "library": whole.zoo.name, "input_size": list(whole.preprocessing.input_size)}
    earlier = whole.earlier.then(result.plan) if whole.earlier else result.plan
    remember(replace(whole, module=model, earlier=earlier))
    return replace(result, model=model, loaded=whole)


def _measured(part: LoadedPart, model: nn.Module, recipe: Recipe) -> Whole:
    dense = part.whole.module
    before, after = (sum(weight.numel() for weight in own.parameters()) for own in (dense, model))
    latency = None
    if recipe.evaluate.latency:
        images = fed(dense, part.images[:1])
        first, second = milliseconds([(dense, images), (model, images)])
        latency = (first, second)
    return Whole(part.path, (before, after), latency)
