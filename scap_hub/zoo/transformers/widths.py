"""transformers' numbers for how wide a model's features are: sizes in its config, `num_features` of a backbone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scap_hub.zoo.described import Features, Shape, Widths, block_widths, merged, narrowed, observed


@dataclass
class TransformersFeatures(Features):
    """Shapes of what transformers' conventions describe.

    Attributes:
        hidden: Of the `hidden_states` in the model's output, from the embedding to the last stage; empty where there
            are none, as in models for detection, whose sizes in the config then describe the dense model.
    """

    hidden: list[Shape] = field(default_factory=list)


def transformers_features(model: Any, inputs: tuple[Any, ...]) -> TransformersFeatures:
    """Runs a model once, for the shapes alone; leaves it as it was."""
    options = {"output_hidden_states": True} if _takes_hidden_states(model) else {}
    calls, output = observed(model, inputs, **options)
    # The attribute is absent in outputs of DETR and its like, and in the tuples that `return_dict=False` asks for.
    states = getattr(output, "hidden_states", None) or () if options else ()
    return TransformersFeatures(calls, [tuple(state.shape) for state in states if isinstance(state, Tensor)])


def transformers_widths(model: Any, dense: TransformersFeatures, small: TransformersFeatures) -> Widths:
    """New values of the numbers that transformers' conventions describe, by module path and attribute.

    Args:
        model: The dense model.
        dense: Its features.
        small: Those of the pruned model.
    """
    own = _hidden_widths(model, dense.hidden, small.hidden) if dense.hidden else {}
    return merged(block_widths(model, dense.calls, small.calls), {"": own})


def _hidden_widths(model: Any, dense: list[Shape], small: list[Shape]) -> dict[str, Any]:
    """What the model and its config say of the widths of the hidden states."""
    own: dict[str, Any] = {}
    for prefix, holder in (("", model), ("config.", model.config)):
        for name, value in vars(holder).items():
            listed = isinstance(value, list | tuple) and all(type(item) is int for item in value)
            if listed and ("hidden_sizes" in name or "embed_dim" in name or name == "num_features"):
                own[prefix + name] = _last_stages(value, dense, small)
    for name, state in (("embedding_size", 0), ("hidden_size", -1)):
        width = vars(model.config).get(name)
        if type(width) is int:
            own[f"config.{name}"] = narrowed(width, dense[state], small[state])
    return own


def _takes_hidden_states(model: Any) -> bool:
    """Whether the forward pass can be asked for hidden states, by name or among its further options."""
    parameters = inspect.signature(model.forward).parameters
    if "output_hidden_states" in parameters:
        return True
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return open_ended and "output_hidden_states" in vars(model.config)


def _last_stages(values: Sequence[int], before: Sequence[Shape], after: Sequence[Shape]) -> list[int]:
    """The widths of the last stages of a model as they have become; unchanged if the list describes something else."""
    new: list[int] = []
    stage = len(before)
    for value in reversed(values):
        stage = next((index for index in reversed(range(stage)) if value in before[index]), -1)
        if stage < 0:
            return list(values)
        new.append(narrowed(value, before[stage], after[stage]))
    return new[::-1]
