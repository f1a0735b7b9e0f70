"""A forward pass of a pruned model that is mended as it goes.

What has to change is mostly found where a module fails, and that module alone is run again with each choice; the pass
then goes on with what helped. So a model that has much to change is run once or twice, not once for every choice. What
is found is a guess: what a later module needs may harm an earlier one, which has run by then.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from scap_hub.channels.attempts import better
from scap_hub.channels.forward import Choice, Forward
from scap_hub.channels.proof import Left, Outcome, Proof
from scap_hub.graph.modes import emptied_caches, untouched

Change = Callable[[Choice], None]
"""Gives the pruned model the numbers of a choice."""
_DONE = Outcome(float("inf"))


def guessed(small: nn.Module, left: Left, forward: Forward, stays: np.ndarray, change: Change) -> Choice:
    """What has to change so that a pruned model comes further, as far as its modules show one by one.

    Args:
        small: The pruned model, without weights; left as it was.
        left: What is left of its first forward pass.
        forward: Where the numbers are.
        stays: Of every channel, whether it stays.
        change: Gives the pruned model the numbers of a choice.
    """
    with untouched(small), emptied_caches(small):
        mending = _Mending(small, left, forward, stays, change)
        with contextlib.suppress(Exception):  # it comes no further
            mending.run()
    return mending.chosen


class _Mending(Proof):
    """Runs a pruned model, and each module that fails again and again."""

    def __init__(self, small: nn.Module, left: Left, forward: Forward, stays: np.ndarray, change: Change) -> None:
        super().__init__(small, left)
        self.chosen: Choice = frozenset()
        self._forward, self._stays, self._change = forward, stays, change
        self._trying = self._given_up = False
        counting = {path for path, _ in forward.counted if path}
        self._modules = {path: small.get_submodule(path) for path in sorted(counting)}
        self._as_it_was = {module: dict(vars(module)) for module in small.modules()}
        self._passes: dict[str, Any] = {}
        self._set(self.chosen)

    def _set(self, chosen: Choice) -> None:
        """Changes the model, and takes the place of its modules' forward passes."""
        for module, values in self._as_it_was.items():
            vars(module).clear()
            vars(module).update(values)
        self._change(chosen)
        self._passes = {path: module.forward for path, module in self._modules.items()}
        for path, module in self._modules.items():
            module.forward = functools.partial(self._mended, path)

    def _mended(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a module; what it needs is found where it fails."""
        if self._trying:
            return self._passes[path](*args, **kwargs)
        before = self._state()

        @functools.cache
        def tried(chosen: Choice) -> Outcome:
            self._go_back(before)
            self._set(chosen)
            self._trying = True
            try:
                self._passes[path](*args, **kwargs)
            except Exception as error:
                return self.failure(error)
            finally:
                self._trying = False
            return _DONE

        try:
            return self._passes[path](*args, **kwargs)
        except Exception as error:
            if self._given_up or not self._mends(tried, self.failure(error)):
                self._given_up = True  # the modules around it would run all of this again
                raise
        self._go_back(before)
        self._set(self.chosen)
        return self._passes[path](*args, **kwargs)

    def _mends(self, tried: Callable[[Choice], Outcome], outcome: Outcome) -> bool:
        """Whether a module runs after all, with what is chosen then."""
        while outcome.failed is not None:
            larger = better(tried, self._forward, self._stays, self.chosen, outcome)
            if larger is None:
                return False
            self.chosen, outcome = larger, tried(larger)
        return True

    def _state(self) -> dict[str, Any]:
        """What is known at this place of the forward pass."""
        kept = ("position", "told", "wrong", "others", "same", "_nodes", "_stale", "_given", "_called")
        state = {name: copy.copy(getattr(self, name)) for name in kept}
        state["_sharing"] = {memory: list(tensors) for memory, tensors in self._sharing.items()}
        return {**state, "labels": dict(self.found.labels)}

    def _go_back(self, state: dict[str, Any]) -> None:
        """Forgets what was seen since."""
        self._sharing = {memory: list(tensors) for memory, tensors in state["_sharing"].items()}
        self.found.labels = dict(state["labels"])
        for name in state.keys() - {"_sharing", "labels"}:
            setattr(self, name, copy.copy(state[name]))
