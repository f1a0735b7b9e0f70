"""Numbers in a forward pass that must follow the channels, beyond those that follow from a weight's shape.

A graph shows the number that a reshape, split or slice was called with, and how many of these channels stay; not where
the number came from. If the forward pass reads it off a tensor's shape it adapts by itself. If it is an attribute of
the calling module (`width`, `head_dim`, `splits[1]`) the attribute must change. If it is written into the code, the
call must get another one. So a pruned copy without weights is run: where it fails, the attributes of that module that
held the number are tried, the same ones in all modules of its class, and then the call itself: first module by module
in one run (`mending`), then in runs of the whole.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from scap_hub.channels.attempts import better, use_of
from scap_hub.channels.forward import ENTERS, AttributeUse, CallUse, Choice, Forward, Integer
from scap_hub.channels.mending import guessed
from scap_hub.channels.operators import Call
from scap_hub.channels.proof import Left, Number, Outcome, Run, expected_numbers, prove
from scap_hub.errors import PlanError
from scap_hub.graph.modes import untouched
from scap_hub.graph.node import Node
from scap_hub.plan import CallNumber, PruningPlan
from scap_hub.surgery import SCALES, apply_plan, earlier_calls, set_attributes, set_calls
from scap_hub.zoo.registry import zoo_of


class StuckError(PlanError):
    """A pruned model that would not run, whatever attribute is changed."""

    def __init__(
        self, failed: tuple[str, ...], message: str, chosen: Choice = frozenset(), wrong: tuple[Number, ...] = ()
    ) -> None:
        place = failed[0] or "the model's forward()"
        super().__init__(
            f"the pruned model would not compute the same: {message} in {place!r}, which works with a fixed number of "
            "channels; protect it, or report the model"
        )
        self.failed = failed
        self.chosen = chosen
        """What had to change before it got stuck."""
        self.scales = any(number.node.site and number.node.site.function in SCALES for number in wrong)
        """Whether it computes with a wrong scale."""
        self.gone = np.zeros(0, dtype=np.int64)
        """The channels that leave in its plan."""


def left_of(forward: Forward, stays: np.ndarray) -> tuple[Left, ...]:
    """What is left of the recorded forward passes.

    Args:
        forward: The model without weights.
        stays: Of every channel, whether it stays.
    """
    labels = stays[forward.partition.channel_of]
    return tuple(Left(run, labels) for run in forward.runs)


def completed(
    forward: Forward, plan: PruningPlan, stays: np.ndarray, left: Sequence[Left]
) -> tuple[PruningPlan, Choice]:
    """The plan with all numbers that must change so that the pruned model computes what is left of the dense one.

    Args:
        forward: The model without weights.
        plan: What is cut, and the integers that follow from shapes.
        stays: Of every channel, whether it stays.
        left: What is left of its forward passes then; learns what was seen to be right.

    Returns:
        The plan, proven; and the choice that it took.

    Raises:
        StuckError: No choice makes it compute the same.
    """
    trial = _Trial(forward, plan, stays, left)
    chosen = forward.chosen
    outcome = trial(chosen)
    if outcome.failed is not None and not chosen:  # nothing is known of this model yet
        guess = trial.guess()
        if trial(guess).finished > outcome.finished:
            chosen, outcome = guess, trial(guess)
    while outcome.failed is not None:
        larger = better(trial, forward, stays, chosen, outcome)
        if larger is None:
            raise StuckError(outcome.failed, outcome.message, chosen, outcome.wrong)
        chosen, outcome = larger, trial(larger)
    return trial.completed(chosen), chosen


def described(forward: Forward, plan: PruningPlan, left: Sequence[Left]) -> PruningPlan:
    """The plan with the numbers that describe a model's widths to other code, where a plan that runs changes them.

    A class of modules whose forward pass reads such a number, and means something else by it, keeps its own.

    Args:
        forward: The model without weights.
        plan: A plan that runs.
        left: What it leaves of the forward passes, with what was seen to be right.
    """
    zoo, small = zoo_of(forward.model), apply_plan(forward.model, plan)
    values = zoo.widths(forward.model, forward.features, zoo.features(small, forward.inputs))
    shrinks = forward.narrower(plan)
    values = {path: own for path, own in values.items() if shrinks(path)}
    for path, known in plan.attributes.items():
        values[path] = {name: value for name, value in values.get(path, {}).items() if name not in known}
    while values:
        with untouched(small):
            set_attributes(small, values)
            outcome = prove(small, left)
        if outcome.failed is None:
            break
        blamed = next((forward.kinds[path] for path in outcome.failed if values.get(path)), None)
        # Whatever fails without being one of the blamed: nothing is described then.
        values = {path: own for path, own in values.items() if blamed and forward.kinds[path] is not blamed}
    merged = {path: dict(own) for path, own in plan.attributes.items()}
    for path, own in values.items():
        if own:
            merged.setdefault(path, {}).update(own)
    return plan.model_copy(update={"attributes": merged})


class _Arrival:
    """Stands for any number, and remembers which ones were compared with it."""

    def __init__(self) -> None:
        self.numbers: set[float] = set()

    def __ne__(self, other: object) -> bool:
        self.numbers.add(other)  # type: ignore[arg-type]
        return False

    __hash__ = None  # type: ignore[assignment]


_Changing = dict[AttributeUse, list[tuple[int, Integer, int]]]
"""By use the integers that can change: their order in the model, and what they become."""
_Change = tuple[str, int, int, float]
"""Of a call: its function, which call of it, the position in it, and the new number."""
_Arrivals = dict[tuple[str, str, int, int], _Arrival]
_Tried = tuple[Outcome, _Arrivals]
"""How far the model came, and the numbers that arrived at the calls that were changed."""


class _Trial:
    """A pruned model without weights, run with one choice after another."""

    def __init__(self, forward: Forward, plan: PruningPlan, stays: np.ndarray, left: Sequence[Left]) -> None:
        self.forward, self.plan, self.stays, self.left = forward, plan, stays, left
        self.small = apply_plan(forward.model, plan)
        self.shrinks = forward.narrower(plan)
        self.earlier: dict[str, dict[tuple[str, int, int], tuple[float | None, float]]] = {
            path: {(function, call, at): (old, new) for function, call, at, old, new in earlier_calls(module)}
            for path, module in forward.model.named_modules()
        }
        """By path and place, what an earlier plan changed in calls: the old number and the new one."""
        self.tried: dict[Choice, _Tried] = {}
        self.alike: dict[str, _Tried] = {}
        """What was tried, by what it changes: several choices may come to the same."""

    def __call__(self, chosen: Choice) -> Outcome:
        if chosen not in self.tried:
            attributes, calls = self._attributes(chosen), self._calls(chosen)
            changes = repr((sorted((path, sorted(own.items())) for path, own in attributes.items()),
                            sorted((path, sorted(own)) for path, own in calls.items())))  # fmt: skip
            if changes not in self.alike:
                self.alike[changes] = self._run(attributes, calls)
            self.tried[chosen] = self.alike[changes]
        return self.tried[chosen][0]

    def guess(self) -> Choice:
        """What has to change, as far as modules show one by one."""

        def change(chosen: Choice) -> None:
            self._change(self._attributes(chosen), self._calls(chosen))

        return guessed(self.small, self.left[0], self.forward, self.stays, change)

    def _run(self, attributes: dict[str, dict[str, Any]], calls: dict[str, list[_Change]]) -> _Tried:
        """How far the model comes, and the numbers that arrived at the calls that were changed."""
        with untouched(self.small):
            arrivals = self._change(attributes, calls)
            return prove(self.small, self.left), arrivals

    def _change(self, attributes: dict[str, dict[str, Any]], calls: dict[str, list[_Change]]) -> _Arrivals:
        """Changes numbers in the model; what stands for those that arrive at its calls."""
        arrivals: _Arrivals = {}
        set_attributes(self.small, attributes)
        for path, changes in calls.items():
            noted: list[Any] = []
            for function, call, position, new in changes:
                arrival = arrivals.setdefault((path, function, call, position), _Arrival())
                noted.append((function, call, position, arrival, new))
            set_calls(self.small, {path: noted})
        return arrivals

    def completed(self, chosen: Choice) -> PruningPlan:
        """The plan with the numbers of a choice that was tried."""
        _, arrivals = self.tried[chosen]
        attributes = {path: dict(own) for path, own in self.plan.attributes.items()}
        for path, values in self._attributes(chosen).items():
            attributes.setdefault(path, {}).update(values)
        calls: dict[str, list[CallNumber]] = {}
        for path, changes in self._calls(chosen).items():
            for function, call, position, new in changes:
                # What an earlier plan changed there is undone, even where the number that arrives is right by now.
                known = self.earlier.get(path, {}).get((function, call, position), (new, new))
                arrived = arrivals[path, function, call, position].numbers
                if len(arrived) > 1:
                    raise StuckError((path,), f"{function} is called with several numbers, {sorted(arrived)}")
                for old in arrived:
                    if (old, new) != known:
                        own = CallNumber(function=function, call=call, position=position, old=old, new=new)
                        calls.setdefault(path, []).append(own)
        # Torch's transformer layers compute attentions past their forward passes, unless a mode is looking on.
        past = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
        layers = [path for path, kind in self.forward.kinds.items() if issubclass(kind, past)]
        for around in layers:
            if any(path.startswith(f"{around}.") for path in calls):
                calls.setdefault(around, [])
        return self.plan.model_copy(
            update={"attributes": attributes, "calls": {path: tuple(own) for path, own in calls.items()}}
        )

    def _attributes(self, chosen: Choice) -> dict[str, dict[str, Any]]:
        """New values of attributes, by module path."""
        values: dict[str, dict[str, Any]] = {}
        reads_width = any(isinstance(use, AttributeUse) and use.role == ENTERS for use in chosen)
        uses = {**self._held, **(self._entering if reads_width else {})}
        changing = itertools.chain.from_iterable(own for use, own in uses.items() if use in chosen)
        for _, integer, new in sorted(changing, key=operator.itemgetter(0)):
            own = values.setdefault(integer.path, {})
            if integer.index is None:
                own[integer.name] = new
            else:
                if integer.name not in own:
                    own[integer.name] = list(getattr(self.forward.model.get_submodule(integer.path), integer.name))
                own[integer.name][integer.index] = new
        return values

    @functools.cached_property
    def _held(self) -> _Changing:
        """The integers that modules hold."""
        return self._changing(self.forward.integers)

    @functools.cached_property
    def _entering(self) -> _Changing:
        """The widths of what enters modules."""
        return self._changing(self.forward.widths)

    def _changing(self, integers: Sequence[Integer]) -> _Changing:
        """Those that can change."""
        found: _Changing = {}
        for number, integer in enumerate(integers):
            left = self.stays[integer.channels]
            if not left.all() and self.shrinks(integer.path):
                new = int(int(left.sum()) * integer.times)
                found.setdefault(use_of(self.forward.kinds[integer.path], integer), []).append((number, integer, new))
        return found

    def _calls(self, chosen: Choice) -> dict[str, list[_Change]]:
        """New numbers in calls, by module path: function, call, position, number.

        Those of an earlier plan stay, whatever number arrives there from a width that changes.
        """
        values: dict[str, dict[tuple[str, int, int], set[float]]] = {}
        for use in chosen:
            if isinstance(use, AttributeUse):
                continue
            for node, run in self.forward.sites.get((use.kind, use.function, use.call), ()):
                number = self._number(node, run, use)
                if number is not None:
                    own = values.setdefault(node.owner, {})
                    own.setdefault((use.function, use.call, use.position), set()).add(number)
        found = {path: {place: new for place, (_, new) in own.items()} for path, own in self.earlier.items() if own}
        for path, own in values.items():
            found.setdefault(path, {}).update({place: min(new) for place, new in own.items() if len(new) == 1})
        # In order: a choice is a set, whose own order is another one in every process.
        return {path: sorted((*place, new) for place, new in own.items()) for path, own in sorted(found.items())}

    def _number(self, node: Node, run: Run, use: CallUse) -> float | None:
        """What an argument of an operator must be in the pruned model; None if the operator has no such number."""
        for number in expected_numbers(Call(node, run.found), self.left[0].stays):
            if (number.argument, number.index) == (use.argument, use.item):
                return number.pruned
        value = node.arguments.get(use.argument)
        if use.item is not None:  # another branch of the same code may call it with a shorter list
            value = value[use.item] if isinstance(value, list | tuple) and use.item < len(value) else None
        return value if type(value) in (int, float) else None
