"""The forward passes of a model that its channels are found from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scap_hub.channels.operators import Trace, has_rule
from scap_hub.channels.proof import Run
from scap_hub.channels.repeats import matched
from scap_hub.channels.trace import retrace, trace
from scap_hub.errors import ModelError
from scap_hub.graph.copies import copied, index_buffers, without_weights
from scap_hub.graph.record import Capture, LooksAtValues, capture
from scap_hub.graph.values import is_tensor, on_meta
from scap_hub.private import ConvNd, NormBase, tree_map


@dataclass(eq=False)
class Passes:
    """The recorded forward passes of one model, with the trace of all of them.

    Attributes:
        model: The model without weights, or a copy where it does not run without.
        inputs: Its example inputs.
        numbers: Values of its integer buffers, see `index_buffers`.
        runs: Its forward passes, the one in eval mode first.
        found: Their trace.
        training_only: Channels that are computed in training mode only.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    numbers: Mapping[str, Tensor]
    runs: list[Run] = field(default_factory=list)
    found: Trace = field(default_factory=Trace)
    training_only: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...]) -> Passes:
        """Records a model in eval mode, and in training mode if it runs in it; without weights where it runs so.

        Raises:
            ModelError: It does not run in eval mode, or cannot be recorded.
        """
        numbers = index_buffers(model)
        passes, failure = cls(without_weights(model), on_meta(inputs), numbers)._recorded()
        # It makes tensors on a device of its own, or looks at their values: in one mode, or in both. At values that
        # depend on the input it would look with weights, too.
        if failure is not None and not isinstance(failure.__cause__, LooksAtValues):
            whole, with_weights = cls(copied(model), inputs, numbers)._recorded()
            if passes is None or with_weights is None:
                passes, failure = whole, with_weights
        if passes is None:
            assert failure is not None
            raise failure
        return passes

    def add_batch(self) -> bool:
        """Records it once more with twice as many images; whether it runs so, and was not recorded so before."""
        if any(not run.training for run in self.runs[1:]):
            return False
        twice = _twice(self.inputs)
        try:
            captured = capture(self.model, twice, numbers=self.numbers, known=has_rule)
        except ModelError:
            return False
        self._add(captured, twice, training=False)
        return True

    def _recorded(self) -> tuple[Passes | None, ModelError | None]:
        """Itself, recorded in eval mode, unless that fails; and what failed in eval mode or in training mode."""
        try:
            captured = capture(self.model, self.inputs, numbers=self.numbers, known=has_rule)
        except ModelError as error:
            return None, error
        self.runs.append(Run(captured, trace(captured, self.found), self.inputs))
        self._hold_together()
        return self, self._trained()

    def _hold_together(self) -> None:
        """A layer of torch's keeps the same outputs in all its tensors, those that the forward pass leaves out too."""
        states = {node.state: self.found.labels[node] for node in self.runs[0].captured.given if node.state}
        for path, module in self.model.named_modules():
            names = [f"{path}.{own}".lstrip(".") for own in ("weight", "bias", "running_mean", "running_var")]
            if not isinstance(module, nn.Linear | ConvNd | NormBase | nn.GroupNorm):
                continue
            transposed = isinstance(module, ConvNd) and module.transposed
            if isinstance(module, ConvNd) and transposed and module.groups > 1:
                names = names[1:]  # the rows of its weight are its inputs
            rows = [states[own].along(int(transposed and own == names[0])) for own in names if own in states]
            tracked = [own for own in rows if own is not None]
            for own in tracked[1:]:
                self.found.ledger.equate(tracked[0], own, f"is an output of {path!r}, which cannot shrink")

    def _trained(self) -> ModelError | None:
        """Records it in training mode; why it does not run in it. Norms of single numbers want more than one image."""
        failure = None
        for inputs in (self.inputs, _twice(self.inputs)) if any(True for _ in self.model.children()) else ():
            try:
                captured = capture(self.model, inputs, training=True, numbers=self.numbers, known=has_rule)
            except ModelError as error:
                failure = error
            else:
                self._add(captured, inputs, training=True)
                return None
        return failure

    def _add(self, captured: Capture, inputs: tuple[Any, ...], training: bool) -> None:
        """Adds a further forward pass, and to the trace what layers that run only then read and compute."""
        found = self.found
        if (same := matched(captured, self.runs[0].captured)) is not None:
            retrace(captured, found, same)
            self.runs.append(Run(captured, found, inputs, training, repeats=True))
            return
        costs, producers, consumers = len(found.costs), len(found.producers), len(found.consumers)
        outputs = list(found.outputs)
        trace(captured, found)
        del found.costs[costs:]  # a forward pass costs what it does in eval mode, on the images that were given
        found.outputs = outputs
        known = {producer.weight for producer in found.producers[:producers]}
        extra = [producer for producer in found.producers[producers:] if producer.weight not in known]
        found.producers[producers:] = extra
        self.training_only += [producer.labels for producer in extra]
        known = {consumer.weight for consumer in found.consumers[:consumers]}
        found.consumers[consumers:] = [own for own in found.consumers[consumers:] if own.weight not in known]
        self.runs.append(Run(captured, found, inputs, training))


def _twice(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs with every image twice."""
    return tree_map(lambda leaf: torch.cat([leaf, leaf]) if is_tensor(leaf) and leaf.ndim else leaf, inputs)
