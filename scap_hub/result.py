"""What a finished run gives back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from scap_hub.adapters import LoadedModel
from scap_hub.hub.card import model_card
from scap_hub.hub.checkpoint import save_checkpoint
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.report import Report


@dataclass
class Result:
    """A finished run.

    Attributes:
        model: The pruned model, in eval mode.
        plan: What was removed from the dense one.
        report: What was measured.
        recipe: What was done; running it again repeats the run.
        loaded: The dense model and where it came from.
    """

    model: nn.Module
    plan: PruningPlan
    report: Report
    recipe: Recipe
    loaded: LoadedModel

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes model.safetensors, config.json, pruning_plan.json, recipe.yaml, report.json and README.md.

        Args:
            folder: Absent or empty.

        Returns:
            The folder.

        Raises:
            CheckpointError: The folder holds something, or cannot be written; nothing is left behind.
        """
        recipe = self.recipe.to_yaml()
        measurements = {"dense": asdict(self.report.before), "pruned": asdict(self.report.after)}
        files = {
            "report.json": json.dumps(self.report.to_dict(), indent=1) + "\n",
            "README.md": model_card(self.loaded, self.plan, measurements, recipe),
        }
        return save_checkpoint(folder, self.model, self.loaded, self.plan, recipe, files)
