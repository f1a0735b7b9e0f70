"""A proof, for one plan, that the pruned model computes what is left of the dense one.

A pruned copy without weights runs beside the record of the dense model, operator by operator. Each operator must be the
same one, read the same tensors, compute with the same numbers (or, where a number counts channels, with the number of
those that stay), make the shape that is left, and, by its rule, read every channel where the plan says that it is. The
first operator that does not is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from scap_hub.channels.labels import STAYS, Labels, Ledger, restricted, support
from scap_hub.channels.operators import Call, Trace, flat, has_rule, operator_of, sizes_of
from scap_hub.channels.trace import label
from scap_hub.graph.constants import VALUES
from scap_hub.graph.modes import emptied_caches, running, untouched
from scap_hub.graph.node import Form, Node, mapped, rebuilt
from scap_hub.graph.record import Capture, Recorder


@dataclass(frozen=True, eq=False)
class Run:
    """A recorded forward pass of the dense model, with its trace.

    Attributes:
        captured: The forward pass.
        found: Its trace.
        inputs: What it was recorded with.
        training: Whether it was recorded in training mode.
        repeats: Whether it only repeats the one in eval mode.
    """

    captured: Capture
    found: Trace
    inputs: tuple[Any, ...]
    training: bool = False
    repeats: bool = False


@dataclass(frozen=True, eq=False)
class Number:
    """A number that a call has in the dense model, and the one that it must have in the pruned one.

    Attributes:
        node: The call in the dense model.
        argument: Name of the argument.
        index: Position in it, if it is a list.
        dense: The number in the dense model; None where the call leaves it to torch.
        pruned: The number that the pruned model must compute with.
    """

    node: Node
    argument: str
    index: int | None
    dense: float | None
    pruned: float | None


@dataclass(eq=False)
class Left:
    """What is left of a recorded forward pass: known once for all pruned models that keep the same channels.

    Attributes:
        run: The forward pass.
        stays: Of every label of its trace, whether it stays.
        agreed: Calls that were seen to do what the channels say, each by its place, its operator, the dense model's
            nodes for the tensors that it reads, and its numbers. These settle what it does, so it need not be checked
            again when the next numbers are tried further on.
    """

    run: Run
    stays: np.ndarray
    agreed: set[tuple[Any, ...]] = field(default_factory=set)
    _labels: dict[Node, Any] = field(default_factory=dict)
    _single: dict[Node, bool] = field(default_factory=dict)

    def labels(self, node: Node) -> Any:
        """The labels that are left of a dense node's: `Labels`, a list of them, or None.

        Raises:
            ValueError: The elements that stay fill no rectangle.
        """
        if node not in self._labels:
            labels = self.run.found.labels[node]
            self._labels[node] = mapped(labels, lambda own: own and restricted(own, self.stays))
        return self._labels[node]

    def single(self, node: Node) -> bool:
        """Whether a dimension of a dense node's that is tracked has a single channel left."""
        if node not in self._single:
            lines = (
                line[self.stays[line]] for labels in flat(self.run.found.labels[node]) for _, line in labels.lines()
            )
            self._single[node] = any(line.size and (line == line[0]).all() for line in lines)
        return self._single[node]


@dataclass(frozen=True)
class Outcome:
    """How far a pruned model came.

    Attributes:
        finished: How many operators did as they should; infinite if all did.
        failed: The modules around the failure, innermost first.
        message: What went wrong.
        wrong: The numbers that the failing call should have had.
    """

    finished: float
    failed: tuple[str, ...] | None = None
    message: str = ""
    wrong: tuple[Number, ...] = ()


def prove(small: nn.Module, left: Sequence[Left]) -> Outcome:
    """Runs a pruned model without weights beside what was recorded of the dense one.

    Args:
        small: The pruned model, with the attributes and call numbers to try; left as it was.
        left: What is left of the dense model's forward passes, in eval mode and perhaps in training mode.
    """
    finished = 0.0
    for run in left:
        proof = Proof(small, run)
        try:
            with untouched(small), emptied_caches(small):
                proof.run()
                proof.finish()
        except Exception as error:
            outcome = proof.failure(error)
            return replace(outcome, finished=finished + outcome.finished)
        finished += proof.position
    return Outcome(float("inf"))


def expected_numbers(call: Call, stays: np.ndarray) -> Iterator[Number]:
    """The numbers of a call that count channels, with what they become.

    Args:
        call: In the dense model, its rule has run.
        stays: Of every label, whether it stays.
    """
    for size in sizes_of(call):
        if size.argument:
            if size.left_out is not None:
                shrinks = not stays[size.labels].all()
                yield Number(call.node, size.argument, None, None, size.left_out if shrinks else None)
                continue
            value = call[size.argument]
            dense = value if size.item is None else value[size.item]
            left = int(stays[size.labels].sum())
            # A bound that is counted from the end is negative.
            yield Number(call.node, size.argument, size.item, dense, -left if dense < 0 else left)


class Proof(Recorder):
    """Runs a pruned model and stops at the first operator that does not do what the channels say."""

    def __init__(self, model: nn.Module, left: Left) -> None:
        dense = left.run
        self.left, self.dense, self.stays = left, dense, left.stays
        self.position = 0
        self.told: tuple[Any, ...] | None = None
        self.wrong: list[Number] = []
        self.found = Trace(_Replay())
        self.states = {node.state: node for node in dense.captured.given if node.state}
        self.others = iter([node for node in dense.captured.given if not node.state])
        self.same: dict[Node, Node] = {}
        super().__init__(model, dense.inputs, dense.training, has_rule)
        for node in self._given:  # parameters, buffers and inputs
            self._same(node)

    def place(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nobody asks a pruned model where it calls a function; see `Recorder.place`."""

    def called(self, target: Any, form: Form, leaves: list[Any]) -> None:
        """Checks the call before it runs, because torch may refuse wrong numbers; see `Recorder.called`."""
        if target in VALUES:
            return
        self.told = self._told(target, form, leaves)
        if self.told in self.left.agreed:
            return
        call = Node(target, *rebuilt(form, leaves))
        for source in call.sources:  # it is not part of the graph
            source.users.remove(call)
        self._check_arguments(call, self._expected(call))

    def made(self, node: Node, value: Any) -> None:
        """See `Recorder.made`."""
        expected = self._expected(node)
        if not node.is_operator:
            self._check_sources(node.args, expected.args)
        self.same[node] = expected
        told = self.told if node.is_operator else None
        if told not in self.left.agreed:
            self._check_labels(node, expected)
            if told is not None:
                self.left.agreed.add(told)
        self.found.labels[node] = self.left.labels(expected)
        self.position += 1

    def _told(self, target: Any, form: Form, leaves: list[Any]) -> tuple[Any, ...] | None:
        """What a call is known by, see `Left.agreed`; None if it reads a tensor not known yet, or lists of lists."""
        if any(leaf not in self.same if isinstance(leaf, Node) else isinstance(leaf, list | dict) for leaf in leaves):
            return None
        told = (self.same[leaf] if isinstance(leaf, Node) else (type(leaf), leaf) for leaf in leaves)
        return self.position, target, form, *told

    def _expected(self, node: Node) -> Node:
        """What the dense model does next, which must be the same operator."""
        if self.position == len(self.dense.captured.called):
            raise RuntimeError(f"{node.target} runs after the last operator of the dense model")
        expected = self.dense.captured.called[self.position]
        if node.target is not expected.target:
            raise RuntimeError(f"{node.target} runs instead of {expected.target}")
        return expected

    def finish(self) -> None:
        """Checks that the forward pass did all that it should, and returns the same."""
        if self.position < len(self.dense.captured.called):
            missing = self.dense.captured.called[self.position]
            raise RuntimeError(f"it ends before {missing.target}")
        ours = [(self._same(node), tuple(node.value.shape)) for node in self._outputs]
        theirs = [(node, tuple(node.value.shape)) for node in self.dense.captured.outputs]
        if ours != theirs:
            raise RuntimeError(
                f"outputs of shapes {[shape for _, shape in ours]} instead of {[shape for _, shape in theirs]}"
            )

    def failure(self, error: Exception) -> Outcome:
        """How far it came, and what went wrong."""
        message = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        failed = tuple(running(self.model, error))
        return Outcome(self.position, failed, message, tuple(self.wrong or self.changing()))

    def changing(self) -> list[Number]:
        """The numbers that change in the call that the dense model makes where this one has failed."""
        if self.position == len(self.dense.captured.called):
            return []
        expected = self.dense.captured.called[self.position]
        numbers = expected_numbers(Call(expected, self.dense.found), self.stays) if expected.is_operator else ()
        return [number for number in numbers if number.pruned != number.dense]

    def _same(self, node: Node) -> Node:
        """The dense model's node that a node of the pruned model stands for."""
        if node not in self.same:
            dense = self.states[node.state] if node.state else next(self.others, None)
            if dense is None:
                raise RuntimeError("it uses a constant that the dense model does not have")
            self.same[node] = dense
            labels = self.left.labels(dense)
            if node.state in self.dense.found.indices:
                labels, node.numbers = self._numbers(dense)
            self.found.labels[node] = labels
            if not node.state and not node.varies and not _alike(node, dense):
                raise RuntimeError("a constant that it computes without operators has changed")
        return self.same[node]

    def _numbers(self, dense: Node) -> tuple[Labels, np.ndarray]:
        """Labels of a buffer of channel numbers, and the numbers that it holds in the pruned model."""
        assert dense.state is not None and dense.numbers is not None
        channels = self.dense.found.indices[dense.state]
        labels = channels[dense.numbers]
        kept = np.flatnonzero(self.stays[channels])
        left = restricted(Labels(labels.shape, (labels,)), self.stays)
        return left, np.searchsorted(kept, dense.numbers[self.stays[labels]])

    def _check_arguments(self, node: Node, expected: Node) -> None:
        """The call must read the same tensors and compute with the right numbers."""
        call = Call(expected, self.dense.found)
        numbers = {(number.argument, number.index): number for number in expected_numbers(call, self.stays)}
        known = operator_of(expected)
        idle = known.idle if known else frozenset()
        for name, dense in expected.arguments.items():
            ours = node.arguments[name]
            self._check_sources((ours,), (dense,))
            theirs = dense if isinstance(dense, list | tuple) else [dense]
            for index, (own, other) in enumerate(zip(ours if theirs is dense else [ours], theirs, strict=True)):
                place = index if theirs is dense else None
                number = numbers.get((name, place)) or Number(expected, name, place, other, other)
                if not isinstance(own, Node) and (name, place) not in idle and not self._agrees(node, number, own):
                    self.wrong.append(number)
        if self.wrong:
            told = [f"{number.argument} = {_held(node, number)} instead of {number.pruned}" for number in self.wrong]
            raise RuntimeError(f"{node.target} computes with {', '.join(told)}")

    def _agrees(self, node: Node, number: Number, own: Any) -> bool:
        """Whether the pruned model's number is right; the end of a slice may lie beyond the tensor."""
        if own == number.pruned and type(own) is type(number.pruned if number.dense is None else number.dense):
            return True
        if node.name == "slice" and number.argument == "end" and isinstance(own, int):
            size = node.arguments["self"].value.shape[node.arguments["dim"]]
            return own >= size and number.pruned is not None and number.pruned >= size
        return False

    def _check_sources(self, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
        for own, other in zip(ours, theirs, strict=True):
            for leaf, dense in zip(*(part if isinstance(part, list | tuple) else [part] for part in (own, other)),
                                   strict=True):  # fmt: skip
                if isinstance(leaf, Node) and self._same(leaf) is not dense:
                    raise RuntimeError("it reads another tensor than the dense model")

    def _check_labels(self, node: Node, expected: Node) -> None:
        """What comes out must be what is left of what came out of the dense model, channel by channel."""
        assert isinstance(self.found.ledger, _Replay)
        fresh = self.dense.found.fresh.get(expected, [])
        self.found.ledger.next = iter([array[self.stays[array]] for array in fresh])
        shapes = mapped(node.value, lambda value: tuple(value.shape) if isinstance(value, torch.Tensor) else None)
        left = self.left.labels(expected)
        for shape, labels in zip(shapes if isinstance(shapes, list) else [shapes], _listed(left), strict=False):
            if labels is not None and shape is not None and shape != labels.shape:
                raise RuntimeError(f"{node.target} makes shape {list(shape)} instead of {list(labels.shape)}")
        for own, labels in zip(flat(label(self.found, node)), flat(left), strict=True):
            if not all(_found_in(array, own.arrays) for array in labels.arrays) and not self._single(expected):
                raise RuntimeError(f"{node.target} reads other channels than those that stay")

    def _single(self, expected: Node) -> bool:
        """Whether a dimension that is tracked has a single channel left, of which rules cannot tell which it is.

        It may be there in several elements: in the rows of two shuffles, one after the other.
        """
        return any(map(self.left.single, (expected, *expected.sources)))


def _held(node: Node, number: Number) -> Any:
    """The number that a call has in the place of one that it should have."""
    value = node.arguments[number.argument]
    return value if number.index is None else value[number.index]


class _Replay(Ledger):
    """Gives out the labels that the dense model's trace made anew; what the rules say was said there."""

    next: Iterator[np.ndarray] = iter(())

    def fresh(self, *shape: int) -> np.ndarray:
        # A dimension with a single element left is not stretched any more, so no rule asks for its labels.
        fitting = (labels for labels in self.next if labels.size == math.prod(shape) or labels.size != 1)
        return next(fitting, np.zeros(0, dtype=np.int64)).reshape(shape)

    def equate(self, left: np.ndarray, right: np.ndarray, reason: str) -> None:
        if left.shape != right.shape:
            np.broadcast_shapes(left.shape, right.shape)

    def pin(self, labels: np.ndarray, reason: str) -> None: ...

    def balance(self, blocks: Any, reason: str) -> None: ...


def _found_in(left: np.ndarray, arrays: tuple[np.ndarray, ...]) -> bool:
    """Whether one of the arrays says the same; along a dimension with a single element left nothing is to be said."""
    if not support(left):
        return True
    return any(
        all(own in (1, size) for own, size in zip(array.shape, left.shape, strict=True))
        and _agree(np.broadcast_to(array, left.shape), left)
        for array in arrays
    )


def _agree(ours: np.ndarray, left: np.ndarray) -> bool:
    """Whether labels are the same; of a part with a single element left a rule says STAYS."""
    return bool(((ours == left) | (ours == STAYS)).all())


def _alike(node: Node, dense: Node) -> bool:
    """Whether two constants are the same, as far as they have values."""
    ours, theirs = node.tensor, dense.tensor
    if ours is None or theirs is None or ours.is_meta or theirs.is_meta:
        return node.value.shape == dense.value.shape
    return torch.equal(ours, theirs)


def _listed(labels: Any) -> list[Labels | None]:
    return list(labels) if isinstance(labels, list | tuple) else [labels]
