"""One rule an operator family: how ids flow from an operator's inputs to its outputs.

A rule is `rule(call) -> Ids | list[Ids]`. It may equate, pin and balance ids through `call.ledger`. An operator
without a rule pins everything that it reads: an unpruned channel is only a loss, a wrong prune is a bug.
"""

from scap_hub.channels.operators import contract, conv, elementwise, join, norm, reduce, spatial, view
from scap_hub.channels.operators.table import Call, Consumer, Cost, Producer, Trace, rule_for

__all__ = [
    "Call",
    "Consumer",
    "Cost",
    "Producer",
    "Trace",
    "contract",
    "conv",
    "elementwise",
    "join",
    "norm",
    "reduce",
    "rule_for",
    "spatial",
    "view",
]
