"""Several sizes of one model, from one scoring."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from scap_hub.criteria.base import criterion as criterion_named
from scap_hub.errors import CheckpointError, TargetError
from scap_hub.files import making
from scap_hub.hub.checkpoint import check_output
from scap_hub.hub.collection import collect
from scap_hub.page import FAMILY, family_json
from scap_hub.recipe import Recipe
from scap_hub.run.identity import identity
from scap_hub.run.inputs import load_dense, recipe_of
from scap_hub.run.kept import Kept, bytes_kept
from scap_hub.run.parts import put_back
from scap_hub.run.pruning import prune_loaded
from scap_hub.run.report import Measures, measure
from scap_hub.run.result import Result
from scap_hub.run.stages import Stages
from scap_hub.run.tuning import tune_dense, warn_if_guessing
from scap_hub.run.unfinished import kept_beside
from scap_hub.run.verification import failing_plan_beside
from scap_hub.tables import html_table, text_table
from scap_hub.text import one_line
from scap_hub.training.callbacks import Callback, check_tracker
from scap_hub.training.distributed import accelerator, from_main

_HEAD = ("", "MACs", "parameters", "metric", "latency")


@dataclass(repr=False)
class Family:
    """Several sizes of one model.

    Attributes:
        members: What `prune` would have given for each target, by name: "macs-0.5" for the target macs=0.5.
    """

    members: dict[str, Result]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table a person reads: size, MACs, parameters, metric, latency."""
        return [_row(member) for member in (self.to_dict()["dense"], *self.to_dict()["members"])]

    def to_dict(self) -> dict[str, Any]:
        """What was measured of the dense model and of each size, as plain JSON-able values; largest first."""
        first = next(iter(self.members.values()))
        dense = {"name": first.loaded.name, "target": None, **_figures(first.report.before)}
        found = [
            {"name": name, "target": str(own.recipe.target.target), **_figures(own.report.after)}
            for name, own in self.members.items()
        ]
        return {"dense": dense, "members": sorted(found, key=lambda member: -member["macs"])}

    def __repr__(self) -> str:
        return text_table([_HEAD, *self.rows()])

    def _repr_html_(self) -> str:
        return html_table(f"family of {self.to_dict()['dense']['name']}", _HEAD, self.rows())

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a folder with one in it for each size, named after its target, and family.json; all of it or nothing.

        Args:
            folder: Absent or empty.

        Returns:
            The folder.

        Raises:
            CheckpointError: As `Result.save_pretrained`.
            PlanError: Likewise.
        """
        folder = check_output(folder)
        try:
            with making(folder) as unfinished:
                for name, member in self.members.items():
                    member.save_pretrained(unfinished / name)
                (unfinished / FAMILY).write_text(family_json(self.to_dict()), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {one_line(error)}") from error
        return folder

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | bool | None = None) -> str:
        """Publishes each size in a repository of its own, "me/name-macs-0.5" and so on, and a collection of them.

        Args:
            repo_id: What the names of the repositories begin with: "owner/name", or "name" for one's own account.
            private: Whether new repositories and the collection are private.
            token: As for `Result.push_to_hub`.

        Returns:
            The address of the collection.

        Raises:
            PublishError: As `Result.push_to_hub`; what was published before it stays, and the same call goes on.
        """
        repos = {f"{repo_id}-{name}": member for name, member in self.members.items()}
        urls = [member.push_to_hub(repo, private, token=token) for repo, member in repos.items()]
        return collect(repo_id, urls, private, token)


def prune_family(
    model: str | Path | nn.Module | None = None,
    dataset: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    targets: Sequence[str],
    output_dir: str | Path | None = None,
    restart: bool = False,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> Family:
    """Prunes one model to several sizes; its channels are scored once, and each size is repaired and trained.

    Each member is what `prune` gives for its target, with the dense model as teacher.

    Args:
        model: As for `prune`.
        dataset: As for `prune`.
        recipe: As for `prune`; its target does not count.
        targets: What stays of each: ["macs=0.75", "macs=0.5", "macs=0.25"].
        output_dir: Folder with a folder for each size, absent or empty; an interrupted call goes on, as for `prune`.
        restart: As for `prune`.
        callbacks: As for `prune`.
        checkpoint: As for `prune`.
        **overrides: As for `prune`.

    Raises:
        ScapHubError: As for `prune`; a mistake in any of the targets is told before any work.
    """
    base = recipe_of(model, dataset, recipe, overrides, checkpoint)
    recipes = _recipes(base, targets)
    check_tracker(base.finetune)
    criterion = criterion_named(base.criterion.name, base.criterion.options, base.seed)
    stages = Stages(base.seed)
    with (
        kept_beside(output_dir, restart) as work,
        failing_plan_beside(output_dir),
        tempfile.TemporaryDirectory(prefix="scap-hub-") as scratch,
    ):
        loaded, data, tuning = load_dense(model, dataset, base, stages)
        if work is not None:
            need = bytes_kept(loaded.module, tuning.trains(base.finetune)) * len(recipes)
            work.begin({**identity(loaded, data, base, criterion), "targets": list(targets)}, restart, need)
        folder = None if work is None else work.folder
        tuned = tune_dense(loaded, data, base, tuning, stages, folder)
        with stages("measure dense"):
            dense, size = loaded.module.to(accelerator().device).eval(), loaded.preprocessing.input_size
            before = Kept(folder).value(
                "dense", Measures, lambda: measure(dense, size, data, loaded.num_classes, dense)
            )
        warn_if_guessing(before, loaded, data, tuned)
        members = {
            name: put_back(prune_loaded(
                *(loaded, data, own, before), tuned=tuned, work=folder and folder / name,
                scores=(folder or Path(scratch)) / "scores", stages=Stages(base.seed), callbacks=callbacks,
            ))
            for name, own in recipes.items()
        }  # fmt: skip
        family = _told(Family(members))
        if work is not None:
            from_main(lambda: family.save_pretrained(work.output))
    if (repo_id := base.publish.repo_id) is not None:
        from_main(lambda: family.push_to_hub(repo_id, base.publish.private))
    return family


def _recipes(base: Recipe, targets: Sequence[str]) -> dict[str, Recipe]:
    """The recipe of each member, by its name; none of them publishes by itself."""
    if isinstance(targets, str) or not targets:
        raise TargetError(f'targets is {targets!r}; give a list such as ["macs=0.75", "macs=0.5"]')
    recipes: dict[str, Recipe] = {}
    for target in targets:
        own = Recipe.resolve(base, target=target, publish_repo_id=None)
        name = str(own.target.target).replace("=", "-")
        if name in recipes:
            raise TargetError(f"target {target!r} is given twice; give each size once")
        recipes[name] = own
    return recipes


def _told(family: Family) -> Family:
    """The same, whose members know of each other."""
    document = family.to_dict()
    return Family({name: replace(member, family=document) for name, member in family.members.items()})


def _figures(measures: Measures) -> dict[str, Any]:
    keys = ("macs", "params", "bytes", "top1", "latency_ms")
    return {key: getattr(measures, key) for key in keys}


def _row(member: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    top1 = "" if member["top1"] is None else f"{100 * member['top1']:.2f} %"
    ms = "" if member["latency_ms"] is None else f"{member['latency_ms']:.2f} ms"
    return member["name"], f"{member['macs'] / 1e6:,.2f} M", f"{member['params']:,}", top1, ms
