"""Everything of timm that is private, or that older releases lack, down to 1.0.20."""

from __future__ import annotations

from typing import Any

from timm.data import resolve_data_config
from torch import nn

try:
    from timm.data import resolve_input_data_config
    from timm.models import get_model_args
except ImportError:

    def resolve_input_data_config(model: nn.Module, args: dict[str, Any]) -> dict[str, Any]:  # type: ignore[misc]
        """Without the checks of newer timm; statistics of other channels than three are averages."""
        data = resolve_data_config({key: value for key, value in args.items() if value}, model=model)
        averages = {key: (sum(data[key]) / len(data[key]),) for key in ("mean", "std")}
        return data if data["input_size"][0] == 3 else data | averages

    def get_model_args(model: nn.Module) -> dict[str, Any]:  # type: ignore[misc]
        """What `note_model_args` noted; of a module that somebody else built, nothing is known."""
        return dict(getattr(model, "_model_args", {}))


__all__ = ["get_model_args", "note_model_args", "resolve_input_data_config"]


def note_model_args(model: Any, arguments: dict[str, Any]) -> None:
    """Notes what a model was made with, as timm itself does since 1.0.31."""
    if not hasattr(model, "_model_args"):
        model._model_args = {name: value for name, value in arguments.items() if value is not None}
