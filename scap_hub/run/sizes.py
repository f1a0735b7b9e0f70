"""Several sizes of one model, and smaller models of the zoo beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scap_hub.errors import CheckpointError
from scap_hub.files import making
from scap_hub.hub.checkpoint import check_output
from scap_hub.hub.collection import collect
from scap_hub.page import FAMILY, family_json
from scap_hub.run.report import Measures, Report, legend
from scap_hub.run.result import Result
from scap_hub.tables import html_table, in_lines, text_table
from scap_hub.text import one_line


@dataclass(repr=False)
class Family:
    """Several sizes of one model.

    Attributes:
        members: What `prune` would have given for each target, by name: "macs-0.5" for the target macs=0.5.
        siblings: What was measured of smaller models of the zoo, trained in the same way, by name.
    """

    members: dict[str, Result]
    siblings: dict[str, Measures] = field(default_factory=dict)

    def head(self) -> list[str]:
        """What the columns of `rows` are, with the task's own names for what it measures."""
        report = self._first.report
        others = report.before.others | _wholes(report, 0)
        return ["model", "MACs", "parameters", report.metric.name, *others, "latency"]

    def rows(self) -> list[list[str]]:
        """The table a person reads: the dense model, its sizes, smaller models of the zoo."""
        found = self.to_dict()
        return [_row(model) for model in (found["dense"], *found["members"], *found["siblings"])]

    def notes(self) -> list[str]:
        """What the table does not say, in sentences."""
        report = self._first.report
        notes = [
            legend(report.before, report.metric, report.about),
            f"Each size is named after its target, which says what stays of {self._first.loaded.name}.",
        ]
        if self.siblings:
            names = " and ".join(self.siblings)
            notes.append(f"Beside them {names}, not pruned: trained like the dense and then like the pruned models.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """What was measured of the dense model, of each size and of each sibling, as plain values; largest first."""
        report = self._first.report
        dense = {"name": self._first.loaded.name, "target": None, **_figures(report.before, _wholes(report, 0))}
        members = [
            {
                "name": name,
                "target": str(own.recipe.target.target),
                **_figures(own.report.after, _wholes(own.report, 1)),
            }
            for name, own in self.members.items()
        ]
        siblings = [{"name": name, **_figures(own, {})} for name, own in self.siblings.items()]
        return {
            "metric": report.metric.name,
            "dense": dense,
            "members": sorted(members, key=lambda member: -member["macs"]),
            "siblings": sorted(siblings, key=lambda sibling: -sibling["macs"]),
        }

    @property
    def _first(self) -> Result:
        return next(iter(self.members.values()))

    def __repr__(self) -> str:
        return "\n".join([text_table([self.head(), *self.rows()]), *in_lines(self.notes())])

    def _repr_html_(self) -> str:
        return html_table(f"family of {self._first.loaded.name}", self.head(), self.rows(), self.notes())

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


def _figures(measures: Measures, whole: dict[str, float]) -> dict[str, Any]:
    keys = ("macs", "params", "bytes", "top1", "latency_ms")
    return {**{key: getattr(measures, key) for key in keys}, "others": measures.others | whole}


def _wholes(report: Report, which: int) -> dict[str, float]:
    """The metrics of the whole that a part belongs to, dense (0) or pruned (1), by the names that tables give them."""
    return {f"{name}, whole": both[which] for name, both in report.whole.figures.items()} if report.whole else {}


def _row(model: Mapping[str, Any]) -> list[str]:
    metrics = [model["top1"], *model["others"].values()]
    shown = ["" if value is None else f"{100 * value:.2f} %" for value in metrics]
    ms = "" if model["latency_ms"] is None else f"{model['latency_ms']:.2f} ms"
    return [model["name"], f"{model['macs'] / 1e6:,.2f} M", f"{model['params']:,}", *shown, ms]
