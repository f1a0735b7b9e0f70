"""Scores: what a criterion found, as a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

DEFAULT_CRITERION = "scap-set"
"""Name of the criterion that scores where none is named."""


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """Importances of the channels of a model's groups, by group name; the higher, the rather a channel is kept.

    Attributes:
        importance: {group.name: (group.size,) importances}, float64 on the CPU; what the mapping gives.
        scope: How importances of different groups are compared, as `select` reads it.
        fidelity: SCAP's fidelity by module path of the layer, (O,), where the criterion has one; NaN for output rows
            that no scored group holds.
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
