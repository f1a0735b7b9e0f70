"""One step of a run, and what is told of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scap_hub.channels.groups import ChannelGroups
from scap_hub.criteria.diagnostics import Diagnosis
from scap_hub.plan import PruningPlan
from scap_hub.run.by_class import changed, foremost, most_changed
from scap_hub.run.report import GroupReport, Measures, Report, Selection
from scap_hub.run.stages import Stages
from scap_hub.run.verification import Verified
from scap_hub.scores import Scores
from scap_hub.training.data import Data


@dataclass(frozen=True)
class Step:
    """What one step of the schedule found and did; the channels are those of the model that the step started from."""

    groups: ChannelGroups
    scores: Scores
    diagnoses: dict[str, Diagnosis]
    plan: PruningPlan
    selection: Selection
    verdicts: list[Verified]
    history: list[dict[str, float]]

    @property
    def pinned(self) -> dict[str, str]:
        """Groups that cannot be pruned, with the reason."""
        return {group.name: group.pinned_because for group in self.groups if group.pinned_because}


def still_guilty(groups: ChannelGroups, earlier: Sequence[Step]) -> dict[str, str]:
    """Groups that an earlier step found guilty."""
    names = groups.by_name
    found = {name: why for step in earlier for name, why in step.pinned.items()}
    return {name: why for name, why in found.items() if name in names}


def joined(groups: ChannelGroups, plans: Sequence[PruningPlan]) -> PruningPlan:
    """One plan for the dense model that does what several do one after another."""
    if len(plans) == 1:
        return plans[0]
    kept: dict[str, list[int]] = {}
    for plan in plans:
        for name in plan.groups:
            stays = plan.kept(name)
            kept[name] = [kept[name][index] for index in stays] if name in kept else stays
    return PruningPlan.from_keep(groups, kept)


def report_of(
    before: Measures, after: Measures, plan: PruningPlan, steps: Sequence[Step], stages: Stages, data: Data
) -> Report:
    """What is told of a run; groups, scores and diagnoses are those of the dense model."""
    first = steps[0]
    verdicts = [verdict for step in steps for verdict in step.verdicts]
    unverified = next((verdict.unverified for verdict in verdicts if verdict.unverified), None)
    classes = changed(before.by_class, after.by_class) if before.by_class and after.by_class else None
    before, after = _bounded(before, after)
    return Report(
        before,
        after,
        groups={
            group.name: GroupReport(
                group.size,
                plan.kept(group.name) if group.name in plan.groups else list(range(group.size)),
                first.scores[group.name].tolist(),
                first.diagnoses.get(group.name),
            )
            for group in first.groups
            if group.name in first.scores
        },
        stages=stages.seconds,
        history=[row for step in steps for row in step.history],
        pinned=first.pinned,
        verified=None if unverified else max(verdict.difference or 0.0 for verdict in verdicts),
        unverified=unverified,
        precision=next((verdict.precision for verdict in reversed(verdicts) if verdict.precision), None),
        selections=[step.selection for step in steps],
        metric=data.task.metric,
        skipped=data.skipped(),
        classes=classes,
    )


def _bounded(before: Measures, after: Measures) -> tuple[Measures, Measures]:
    """The same without most of what is told of single classes, where there are thousands."""
    if before.mistakes is not None and after.mistakes is not None:
        old, new = foremost(before.mistakes, after.mistakes)
        before, after = replace(before, mistakes=old), replace(after, mistakes=new)
    if before.by_class is not None and after.by_class is not None:
        counts, others = most_changed(before.by_class, after.by_class)
        before, after = replace(before, by_class=counts), replace(after, by_class=others)
    return before, after
