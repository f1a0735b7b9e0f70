"""What a finished run gives back."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.deploy.deployment import DOCUMENT, with_deployment
from scap_hub.hub.card import PICTURE, Measured, model_card
from scap_hub.hub.checkpoint import save_checkpoint
from scap_hub.hub.picture import channels_picture
from scap_hub.hub.publish import CARD, push_to_hub
from scap_hub.hub.uniform import plain_config
from scap_hub.page import FAMILY, FAMILY_PICTURE, PAGE, REPORT, family_json, family_picture, render
from scap_hub.placement import placement
from scap_hub.plan import PruningPlan
from scap_hub.recipe import Recipe
from scap_hub.run.report import Measures, Report
from scap_hub.tasks import IMAGE_CLASSIFICATION, Task
from scap_hub.timing.clock import device_name
from scap_hub.zoo import LoadedModel


@dataclass(repr=False)
class Result:
    """A finished run.

    Attributes:
        model: The pruned model, in eval mode.
        plan: What was removed from the dense one.
        report: What was measured.
        recipe: What was done; running it again repeats the run.
        loaded: The dense model and where it came from.
        task: What the model is for.
        exported: Folder with the files for other runtimes, where the recipe asks for them; gone with this object.
        family: The sizes that it is one of, see `Family.to_dict`; None for one alone.
    """

    model: nn.Module
    plan: PruningPlan
    report: Report
    recipe: Recipe
    loaded: LoadedModel
    task: Task = IMAGE_CLASSIFICATION
    exported: tempfile.TemporaryDirectory[str] | None = None
    family: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<Result: {self.loaded.name}, pruned to {self.recipe.target.target}>\n{self.report!r}"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def save_pretrained(self, folder: str | Path, allow_nan: bool = False) -> Path:
        """Writes model.safetensors, config.json, pruning_plan.json, recipe.yaml, reports, README.md and code.

        Args:
            folder: Absent or empty.
            allow_nan: Whether to save weights that are NaN or infinite.

        Returns:
            The folder.

        Raises:
            CheckpointError: The folder holds something or cannot be written, or weights are not finite; nothing is left
                behind.
            PlanError: The recipe asks for the uniform layout, and the plan is not expressible in it.
        """
        recipe = self.recipe.to_yaml()
        plain = plain_config(self.loaded, self.model) if self.recipe.publish.layout == "uniform" else None
        files: dict[str, str | bytes] = {REPORT: self.report_json()}
        if picture := channels_picture(self.plan):
            files[PICTURE] = picture
        files[PAGE] = render(json.loads(files[REPORT]), recipe, family=self.family)
        if self.family is not None:
            files[FAMILY] = family_json(self.family)
            if drawn := family_picture(self.family, self.report.metric.name):
                files[FAMILY_PICTURE] = drawn
        card = model_card(
            self.loaded,
            self.plan,
            self._measured(),
            recipe,
            picture=PICTURE in files,
            plain=plain is not None,
            family=FAMILY_PICTURE in files,
        )
        if self.exported is not None and self.report.deploy is not None:
            card = with_deployment(card, self.report.deploy)
            files[DOCUMENT] = self.report.deploy.to_json()
            place = Path(self.exported.name)
            files |= {path.relative_to(place).as_posix(): path.read_bytes() for path in sorted(place.rglob("*.*"))}
        files[CARD] = card
        return save_checkpoint(folder, self.model, self.loaded, self.plan, recipe, files, plain, allow_nan)

    def report_json(self) -> str:
        """The report as it is saved."""
        return json.dumps(self.report.to_dict(), indent=1) + "\n"

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Publishes what `save_pretrained` writes, in one commit; see `scap_hub.hub.publish.push_to_hub`.

        Returns:
            The address of the repository, branch or pull request.

        Raises:
            PublishError: No token, no write access, an invalid name, or a network that fails. Nothing is published
                then, and the folder with the model stays, for the command that the message names.
        """
        # Kept if anything fails: hours of work may lie in it.
        folder = self.save_pretrained(Path(tempfile.mkdtemp(prefix="scap_hub-")) / repo_id.rpartition("/")[2])
        url = push_to_hub(folder, repo_id, private, revision, create_pr, token, commit_message)
        shutil.rmtree(folder.parent)
        return url

    def _measured(self) -> Measured:
        dataset = self.recipe.data.dataset
        return Measured(
            dense=_figures(self.report.before),
            pruned=_figures(self.report.after),
            dataset=shown_name(dataset),
            dataset_id=dataset if _on_hub(dataset) else None,
            device=device_name(placement(self.model).device),
            task=self.task,
            verified=self.report.verified,
            unverified=self.report.unverified,
            missed=self.report.missed,
            tuned=None if self.report.tuned is None else str(self.report.tuned),
            part=None if self.report.whole is None else self.report.whole.part,
            whole=() if self.report.whole is None else self.report.whole.rows(),
            teacher=self.report.about.get("teacher"),
        )


def shown_name(dataset: str | None) -> str | None:
    """What others read of a data set's name: a path says nothing to them, and they need not know it."""
    return dataset if dataset is None or _on_hub(dataset) else Path(dataset).name


def _on_hub(dataset: str | None) -> bool:
    return dataset is not None and not Path(dataset).exists() and dataset.count("/") == 1


def _figures(measures: Measures) -> dict[str, float | None]:
    """What stands on the card; classes do not."""
    values = asdict(measures)
    for name in ("images", "by_class", "mistakes"):
        del values[name]
    return values | values.pop("others")
