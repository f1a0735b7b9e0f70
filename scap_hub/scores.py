"""Scores: what a criterion found, as a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

DEFAULT_CRITERION = "scap-set"
"""Name of the criterion that scores where none is named."""


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """The importance of each channel, by group name. Channels with higher importances are kept first.

    Attributes:
        importance: {group.name: (group.size,) importances}, float64 on the CPU. The mapping itself reads from here.
        scope: How importances of different groups are compared; see `select`.
        fidelity: {module path of a layer: (O,) fidelities of its output rows}, NaN for rows of no scored group. Empty
            for criteria that have no fidelity.
    """

    importance: Mapping[str, Tensor]
    scope: str = "global"
    fidelity: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.importance[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.importance)

    def __len__(self) -> int:
        return len(self.importance)
