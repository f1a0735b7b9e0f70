"""Recipe: one validated document that says everything a run does."""

from scap_hub.recipe.document import Recipe, recipe_schema
from scap_hub.recipe.files import shipped_recipes
from scap_hub.recipe.settings import (
    CriterionSettings,
    DataSettings,
    DeploySettings,
    DistillationSettings,
    EvaluateSettings,
    FinetuneSettings,
    ModelSettings,
    PublishSettings,
    RepairSettings,
    ScheduleSettings,
    TargetSettings,
)

__all__ = [
    "CriterionSettings",
    "DataSettings",
    "DeploySettings",
    "DistillationSettings",
    "EvaluateSettings",
    "FinetuneSettings",
    "ModelSettings",
    "PublishSettings",
    "Recipe",
    "RepairSettings",
    "ScheduleSettings",
    "TargetSettings",
    "recipe_schema",
    "shipped_recipes",
]
