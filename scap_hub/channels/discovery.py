"""Finds the channel groups of a model: record, label, solve, try, and mend what does not work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scap_hub.channels.attempts import shared_numbers, stuck_channels
from scap_hub.channels.attributes import StuckError, completed, left_of
from scap_hub.channels.forward import CallUse, Choice, Forward, forward_of
from scap_hub.channels.grouping import grouped
from scap_hub.channels.groups import ChannelGroup, ChannelGroups, WholeModel
from scap_hub.channels.labels import Equal
from scap_hub.channels.part import offered, part_of
from scap_hub.channels.partition import solve
from scap_hub.channels.passes import Passes
from scap_hub.channels.uneven import clusters, uneven
from scap_hub.errors import ModelError
from scap_hub.graph.modes import collecting_seldom

Blamed = Mapping[str, np.ndarray]
"""Channels by the path of the module to blame."""
_ALONE = 12
"""In models with so few prunable groups, each whose channels a number counts is tried alone, too."""


@collecting_seldom()
def channel_groups(
    model: nn.Module | str, inputs: tuple[Any, ...] | Tensor | None = None, part: str | None = None
) -> ChannelGroups:
    """Finds every group of channels of a model, prunable or pinned.

    Args:
        model: Any module whose forward pass does not depend on values, left as it was; or the name, Hub id or folder
            of a model of timm or transformers, of which the architecture is enough.
        inputs: Example positional arguments of its forward pass; a single tensor stands for one argument. May be left
            out for a model given by name, whose own input size is then used.
        part: Path of the part to look at alone, such as "backbone", where the whole cannot be recorded; the inputs are
            still those of the whole, with values. Names are those of the whole, and so a plan of it is applied.

    Returns:
        Groups in the order in which the forward pass first computes them.

    Raises:
        ModelError: The model cannot be captured, or is of a kind that cannot be pruned; says what to do.
    """
    if isinstance(model, str):
        from scap_hub.zoo import load_model

        loaded = load_model(model, pretrained=False)
        model, inputs = loaded.module, inputs or torch.zeros(1, *loaded.preprocessing.input_size)
    if inputs is None:
        raise ModelError("channel_groups needs an example input of this module, such as torch.zeros(1, 3, 224, 224)")
    arguments = (inputs,) if isinstance(inputs, Tensor) else inputs
    if part is not None:
        model, arguments = part_of(model, part, arguments)
    check_plain(model)
    try:
        analysis = _Analysis.of(Passes.of(model, arguments))
    except ModelError as error:
        if part is None and (parts := offered(model, arguments)):
            raise ModelError(f"{error}{parts}") from error
        raise
    groups, stuck = analysis.groups()
    while stuck is not None or analysis.looks_again():
        groups, stuck = analysis.groups() if stuck is None else analysis.mended(groups, stuck)
    return groups


def check_plain(model: nn.Module) -> None:
    """Refuses kinds of models that no plan can be made for.

    Raises:
        ModelError: A scripted, traced or quantised model, or one with lazy layers.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is no torch.nn.Module, so it has no channels to find")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(f"{type(model).__name__} only copies a model to devices: prune its .module")
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{where} is TorchScript, whose forward pass cannot be changed: prune the model it is of")
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise ModelError(f"{where} is quantised: prune the model first, and quantise what is left")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
                raise ModelError(f"{where} has not got its {name!r} yet (a lazy layer): run the model once first")
            if tensor is not None and (tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer)):
                kind = "quantised" if tensor.is_quantized else f"a {type(tensor).__name__}"
                raise ModelError(f"{name!r} of {where} is {kind}: prune the model first, and quantise what is left")


@dataclass(eq=False)
class _Analysis:
    """A recorded model, with what was learned by trying.

    Attributes:
        passes: Its forward passes.
        balances: The balances that the rules asked for.
        added: Balances that trials asked for.
        tried: Names of the numbers that they are for.
        chosen: What has to change in forward passes.
        looked: Whether a pass of more images was asked for.
    """

    passes: Passes
    balances: list[Equal]
    added: list[Equal] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    chosen: Choice = frozenset()
    looked: bool = False

    @classmethod
    def of(cls, passes: Passes) -> _Analysis:
        """Nothing has been tried yet."""
        return cls(passes, list(passes.found.ledger.equal))

    def looks_again(self) -> bool:
        """Adds a pass of more images where numbers in calls have to change; whether it did, which it does once.

        Such a number may count images, too, as 16 does in `x.view(1, b * 16, h, w)` with one image: more show it.
        """
        if self.looked or not any(isinstance(use, CallUse) for use in self.chosen):
            return False
        self.looked, asked = True, len(self.passes.found.ledger.equal)
        if not self.passes.add_batch():
            return False
        self.balances += self.passes.found.ledger.equal[asked:]
        return True

    def groups(self) -> tuple[ChannelGroups, StuckError | None]:
        """The groups as far as they are known, and how a plan of them fails, if one does."""
        passes, runs = self.passes, tuple(self.passes.runs)
        passes.found.ledger.equal = [*self.balances, *self.added]
        partition = solve(runs[0].captured, passes.found, passes.model)
        forward = replace(forward_of(passes.model, passes.inputs, runs, partition), chosen=self.chosen)
        groups = grouped(runs[0], partition, passes.training_only)
        channels = {group.name: group.channels for group in groups}
        whole = WholeModel(partition, forward, channels, {g.name: g.pinned_because for g in groups if g.pinned_because})
        stuck = self._stuck(groups, whole)
        whole = replace(whole, forward=replace(forward, chosen=self.chosen))
        return ChannelGroups([replace(group, whole=whole) for group in groups], whole), stuck

    def _stuck(self, groups: Sequence[ChannelGroup], whole: WholeModel) -> StuckError | None:
        """Tries uneven plans; how the first one fails that does."""
        runs = [run for run in self.passes.runs if not run.repeats]
        trial = replace(whole.forward, runs=tuple(runs))
        for gone in _plans(groups, whole):
            try:
                self.chosen = self._tried(whole, trial, gone)
            except StuckError as error:
                self.chosen = error.chosen or self.chosen  # what comes before the failure need not be found again
                if not error.scales or not self._learned(groups, whole, trial, gone):
                    error.gone = gone
                    return error
            # A plan is proven in all passes when it is made; one trial shows what the others add to the first.
            trial = replace(trial, runs=tuple(runs[:1]))
        return None

    def _tried(self, whole: WholeModel, trial: Forward, gone: np.ndarray) -> Choice:
        """What has to change where some channels leave.

        Raises:
            StuckError: Nothing makes the model without them compute the same.
        """
        stays = whole.partition.everything()
        stays[gone] = False
        keep = {name: np.flatnonzero(stays[channels]) for name, channels in whole.channels.items()}
        plan = whole.partition.cut(whole.channels, keep)
        if not plan.tensors:
            return self.chosen
        return completed(replace(trial, chosen=self.chosen), plan, stays, left_of(trial, stays))[1]

    def _learned(self, groups: Sequence[ChannelGroup], whole: WholeModel, trial: Forward, gone: np.ndarray) -> bool:
        """Whether a plan works after all, once others have shown that sizes change where a scale does.

        Sizes that are computed from a width, such as `width // heads`, may be right by chance.
        """
        free = _free(groups)
        for some in (free[::2], free[1::2]):
            try:
                self.chosen = self._tried(whole, trial, uneven(some, whole.partition.balances, (0.3, 0.6), seed=0))
                self.chosen = self._tried(whole, trial, gone)
            except StuckError as error:
                self.chosen = error.chosen or self.chosen
            else:
                return True
        return False

    def _guilty(self, whole: WholeModel, gone: np.ndarray, suspects: list[np.ndarray]) -> list[np.ndarray]:
        """Of suspects with which a plan gets stuck, those that are enough for it; all of them, if it takes all.

        Args:
            whole: The model.
            gone: The channels that leave in the plan.
            suspects: Channels of groups; those that must stay balanced with each other are one suspect.
        """
        if len(suspects) == 1:
            return suspects
        half = len(suspects) // 2
        halves = [own for own in (suspects[:half], suspects[half:]) if self._sticks(whole, gone, own)]
        found = [guilty for own in halves for guilty in self._guilty(whole, gone, own)]
        return found if 0 < len(found) < len(suspects) else suspects

    def _sticks(self, whole: WholeModel, gone: np.ndarray, suspects: list[np.ndarray]) -> bool:
        """Whether the model gets stuck if nothing else leaves than what a plan takes from the suspects."""
        try:
            self._tried(whole, whole.forward, np.intersect1d(gone, np.concatenate(suspects)))
        except StuckError:
            return True
        return False

    def mended(self, groups: ChannelGroups, stuck: StuckError) -> tuple[ChannelGroups, StuckError | None]:
        """The groups after a failure was made good: one number that counts in several places balances them, or else
        what it counts is pinned.
        """
        self.looks_again()  # before the next trial: with each further pass the ones that it has are proven anew
        forward, partition = groups.whole.forward, groups.whole.partition
        free = np.zeros(partition.count, dtype=bool)
        for group in groups.prunable:
            free[group.channels] = True
        shared = shared_numbers(forward, stuck.failed, free)
        if fresh := shared.keys() - self.tried:
            self.tried |= fresh
            label_of = np.unique(partition.channel_of, return_index=True)[1]
            before = list(self.added)
            for name in sorted(fresh):
                blocks = tuple(label_of[channels] for channels in shared[name])
                self.added.append(Equal(blocks, f"places of {name}"))
            better, again = self.groups()
            if again is None or again.failed[0] != stuck.failed[0]:
                return better, again
            self.added = before  # they did not help
        blamed, held = self._blamed(groups, stuck, list(stuck_channels(forward, stuck.failed, free)))
        for place, channels in blamed.items():
            labels = np.flatnonzero(np.isin(partition.channel_of, np.intersect1d(channels, held)))
            self.passes.found.ledger.pin(
                labels, f"is counted by a number fixed in {place!r}, or changes what it computes"
            )
        return self.groups()

    def _blamed(
        self, groups: ChannelGroups, stuck: StuckError, candidates: Sequence[Blamed]
    ) -> tuple[Blamed, np.ndarray]:
        """The first candidates that bring a failure about, and which of their channels do."""
        if not candidates:
            raise ModelError(f"cannot find channels that can leave: {stuck}")
        whole = groups.whole
        units = [np.concatenate(own) for own, _ in clusters(_free(groups), whole.partition.balances)]
        for blamed in candidates:
            here = _touching(units, *(blamed[path] for path in stuck.failed if path in blamed))
            everywhere = _touching(units, *blamed.values())
            for suspects in (here, everywhere):
                if len(suspects) <= _ALONE and self._sticks(whole, stuck.gone, suspects):
                    guilty = self._guilty(whole, stuck.gone, suspects)
                    # What all fails in one module fails in all that run the same code.
                    all_here = suspects is here and len(guilty) == len(here)
                    return blamed, np.concatenate(everywhere if all_here else guilty)
            if len(everywhere) > _ALONE:
                break  # too many to try one by one, and later candidates hold even more
        return candidates[0], np.concatenate(list(candidates[0].values()))


def _touching(units: Sequence[np.ndarray], *channels: np.ndarray) -> list[np.ndarray]:
    """Those of the units that have one of the channels."""
    return [unit for unit in units if np.isin(np.concatenate(channels), unit).any()]


def _free(groups: Sequence[ChannelGroup]) -> list[np.ndarray]:
    """The channels of each group that can lose some."""
    return [group.channels for group in groups if group.prunable and group.size > 1]


def _plans(groups: Sequence[ChannelGroup], whole: WholeModel) -> list[np.ndarray]:
    """The channels that leave in each plan that is tried.

    One plan shows whether the model depends on its widths in a way that its operators do not tell. Numbers that count
    channels may be right by chance, so there other plans follow.
    """
    partition = whole.partition
    free = _free(groups)
    if not free:
        return []
    plans = [uneven(free, partition.balances, (0.3, 0.6), seed=0)]
    counted = np.zeros(partition.count, dtype=bool)
    for _, channels in whole.forward.counted:
        counted[channels] = True
    if counted.any():
        plans.append(uneven(free[::2], partition.balances, (0.05, 0.3), seed=1))
    if len(free) <= _ALONE:
        alone = [own for own in free if counted[own].any()]
        plans += [uneven([own], partition.balances, (0.2, 0.5), seed=2 + i) for i, own in enumerate(alone)]
    return [gone for gone in plans if gone.size]
