"""Everything of timm that is private, or that older releases lack, down to 1.0.20."""

from __future__ import annotations

from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import FeatureInfo
from torch import nn

NOTES_ARGUMENTS = hasattr(timm.models, "get_model_args")
"""Whether timm notes what a model was made with; without that, a module's arguments are unknown."""

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
        """What `note_model_args` noted; of a module that somebody else built, only which features it returns."""
        info = getattr(model, "feature_info", None)
        features = {"features_only": True, "out_indices": info.out_indices} if isinstance(info, FeatureInfo) else {}
        return features | getattr(model, "_model_args", {})


__all__ = ["NOTES_ARGUMENTS", "arguments_known", "get_model_args", "note_model_args", "resolve_input_data_config"]


def arguments_known(model: nn.Module) -> bool:
    """Whether timm, or `note_model_args`, noted what the model was made with; never of what an entrypoint made."""
    return hasattr(model, "_model_args")


def note_model_args(model: Any, arguments: dict[str, Any]) -> None:
    """Notes what a model was made with, as timm itself does since 1.0.31."""
    if not hasattr(model, "_model_args"):
        model._model_args = {name: value for name, value in arguments.items() if value is not None}
