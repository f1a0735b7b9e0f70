"""Which of transformers' auto classes build a model; imports transformers."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto

from scap_hub.private import models_of


def auto_classes(model: Any) -> list[str]:
    """The names of the auto classes that build a model of this class from its config, in transformers' own order."""
    names = [name for name in vars(modeling_auto) if name.startswith("Auto")]
    kind = type(model).__name__
    return [name for name in names if kind in models_of(getattr(modeling_auto, name), type(model.config))]
