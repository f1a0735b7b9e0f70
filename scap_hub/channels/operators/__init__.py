"""One rule an operator family: how labels flow from an operator's inputs to its outputs.

A rule is `rule(call) -> Labels | list[Labels]`. It may equate, pin and balance labels through `call.ledger`. An
operator without a rule pins everything that it reads: an unpruned channel is only a loss, a wrong prune is a bug.
"""

from scap_hub.channels.operators import contract, conv, elementwise, join, norm, parts, reduce, spatial, view
from scap_hub.channels.operators.table import (
    Call,
    Consumer,
    Cost,
    Producer,
    Size,
    Trace,
    adapting,
    flat,
    has_rule,
    known_operators,
    operator_of,
    role_of,
    sizes_of,
)

__all__ = [
    "Call",
    "Consumer",
    "Cost",
    "Producer",
    "Size",
    "Trace",
    "adapting",
    "contract",
    "conv",
    "elementwise",
    "flat",
    "has_rule",
    "join",
    "known_operators",
    "norm",
    "operator_of",
    "parts",
    "reduce",
    "role_of",
    "sizes_of",
    "spatial",
    "view",
]
