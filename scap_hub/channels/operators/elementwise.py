"""Operators that work element by element: ids pass through, operands that meet leave together."""

from __future__ import annotations

from scap_hub.channels.labels import Ids, broadcast
from scap_hub.channels.operators.table import Call, rule


@rule(
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "hardsigmoid", "hardswish",
    "hardtanh", "tanh", "softplus", "softsign", "log_sigmoid", "threshold", "exp", "expm1", "log", "log1p", "sqrt",
    "rsqrt", "reciprocal", "neg", "abs", "square", "sin", "cos", "erf", "floor", "ceil", "round", "sign", "clamp",
    "clamp_min", "clamp_max", "add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where", "addcmul",
    "addcdiv", "lerp", "eq", "ne", "lt", "gt", "le", "ge", "logical_not", "logical_and", "logical_or", "masked_fill",
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy",
    "type_as", "float", "nan_to_num", "remainder", "fmod",
)  # fmt: skip
def elementwise(call: Call) -> Ids:
    """Any number of operands, broadcast as usual."""
    return broadcast(call.ledger, call.tensors, call.shape, f"meets a tensor that cannot shrink ({call.place})")


@rule("prelu")
def prelu(call: Call) -> Ids:
    """The slope belongs to dimension 1 of the input, or is one for all."""
    x, slope = call.ids("self"), call.ids("weight")
    if len(x.shape) > 1:
        layers = tuple(layer.reshape((-1,) + (1,) * (len(x.shape) - 2)) for layer in slope.layers)
        slope = Ids((slope.shape[0],) + (1,) * (len(x.shape) - 2), layers)
    return broadcast(call.ledger, [x, slope], call.shape, f"meets a slope that cannot shrink ({call.place})")


@rule(
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "zeros", "ones", "full", "arange", "linspace", "scalar_tensor", "tensor", "meshgrid",
    "eye", "empty",
)  # fmt: skip
def constant(call: Call) -> Ids | list[Ids]:
    """Made from sizes alone: carries no ids, and pins what it meets."""
    value = call.node.value
    return [Ids(shape) for shape in call.shapes] if isinstance(value, list | tuple) else Ids(call.shape)


@rule("_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size")
def assertion(call: Call) -> None:
    """Checked while exporting; says nothing about channels."""
