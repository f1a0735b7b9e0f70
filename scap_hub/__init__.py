"""Compress the vision models you already use: structured pruning for timm and Hugging Face models with SCAP."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scap_hub.version import __version__ as __version__
from scap_hub.zoo import import_hooks

if TYPE_CHECKING:
    from scap_hub.channels import ChannelGroup, ChannelGroups, channel_groups, verify
    from scap_hub.channels.verified import apply_plan
    from scap_hub.compensation import repair
    from scap_hub.criteria import Criterion, score
    from scap_hub.errors import ScapHubError
    from scap_hub.hub.checkpoint import load
    from scap_hub.plan import PruningPlan
    from scap_hub.recipe import Recipe
    from scap_hub.run.bench import bench
    from scap_hub.run.compare import compare
    from scap_hub.run.comparison import Comparison
    from scap_hub.run.export import export
    from scap_hub.run.family import prune_family
    from scap_hub.run.family_forecast import FamilyForecast, forecast_family
    from scap_hub.run.forecast import Forecast, forecast
    from scap_hub.run.pruning import prune
    from scap_hub.run.report import Report
    from scap_hub.run.result import Result
    from scap_hub.run.sizes import Family
    from scap_hub.run.steps import refine, tune
    from scap_hub.scores import Scores
    from scap_hub.selection.select import select
    from scap_hub.selection.target import Target
    from scap_hub.timing.table import latency_table
    from scap_hub.training.finetune import finetune

# Where each public name lives; imported when first asked for, because timm and transformers are slow to import.
_HOMES = {
    "ChannelGroup": "channels",
    "ChannelGroups": "channels",
    "Comparison": "run.comparison",
    "Criterion": "criteria",
    "Family": "run.sizes",
    "FamilyForecast": "run.family_forecast",
    "Forecast": "run.forecast",
    "PruningPlan": "plan",
    "Recipe": "recipe",
    "Report": "run.report",
    "Result": "run.result",
    "ScapHubError": "errors",
    "Scores": "scores",
    "Target": "selection.target",
    "apply_plan": "channels.verified",
    "bench": "run.bench",
    "channel_groups": "channels",
    "compare": "run.compare",
    "export": "run.export",
    "finetune": "training.finetune",
    "forecast": "run.forecast",
    "forecast_family": "run.family_forecast",
    "latency_table": "timing.table",
    "load": "hub.checkpoint",
    "prune": "run.pruning",
    "prune_family": "run.family",
    "refine": "run.steps",
    "repair": "compensation",
    "score": "criteria",
    "select": "selection.select",
    "tune": "run.steps",
    "verify": "channels",
}

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "Comparison",
    "Criterion",
    "Family",
    "FamilyForecast",
    "Forecast",
    "PruningPlan",
    "Recipe",
    "Report",
    "Result",
    "ScapHubError",
    "Scores",
    "Target",
    "apply_plan",
    "bench",
    "channel_groups",
    "compare",
    "export",
    "finetune",
    "forecast",
    "forecast_family",
    "latency_table",
    "load",
    "prune",
    "prune_family",
    "refine",
    "repair",
    "score",
    "select",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


import_hooks.install()
