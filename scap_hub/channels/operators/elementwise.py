"""Operators that work element by element: labels pass through, operands that meet leave together."""

from __future__ import annotations

from scap_hub.channels.labels import Labels, broadcast, line
from scap_hub.channels.operators.table import Call, operator, out_sizes


def _pass(call: Call) -> Labels:
    return broadcast(call.ledger, call.tensors, call.shape, f"meets a tensor that cannot shrink ({call.place})")


@operator(
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "hardsigmoid",
    "hardswish", "hardtanh", "tanh", "softplus", "clamp", "dropout", "clone", "contiguous",
    role="activation",
)  # fmt: skip
def activation(call: Call) -> Labels:
    """One operand, or bounds that broadcast."""
    return _pass(call)


@operator(
    "log_sigmoid", "threshold", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "neg", "abs",
    "square", "sin", "cos", "erf", "floor", "ceil", "round", "sign", "clamp_min", "clamp_max", "add", "sub",
    "rsub", "mul", "div", "pow", "maximum", "minimum", "where", "addcmul", "addcdiv", "lerp", "eq", "ne",
    "lt", "gt", "le", "ge", "logical_not", "logical_and", "logical_or", "masked_fill", "feature_dropout",
    "alpha_dropout", "detach", "alias", "to.dtype", "to.device", "to.dtype_layout", "_to_copy", "nan_to_num",
    "remainder", "fmod", "copy", "lift_fresh", "multiply", "subtract", "divide", "true_divide",
    "absolute", "negative", "clip", "greater", "greater_equal", "less", "less_equal", "not_equal", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__", "isnan", "isinf", "isfinite", "max.other",
    "min.other", "tan", "sinh", "cosh", "atan", "exp2", "log2", "log10", "logaddexp", "logit", "hypot", "trunc", "frac",
    "sgn", "hardshrink", "softshrink", "special_expit", "rrelu", "feature_alpha_dropout", "atan2", "asin", "acos",
    "asinh", "acosh", "atanh", "erfc", "sinc", "complex", "polar", "angle", "_conj", "_neg_view",
    "fill", "zero", "floor_divide", "fmax", "fmin", "copysign",
)  # fmt: skip
def elementwise(call: Call) -> Labels:
    """Any number of operands, broadcast as usual."""
    return _pass(call)


@operator("type_as")
def lent_type(call: Call) -> Labels:
    """The second operand lends its type only."""
    return call.labels("self")


@operator("prelu")
def prelu(call: Call) -> Labels:
    """The slope belongs to dimension 1 of the input, or is one for all."""
    x, slope = call.labels("self"), call.labels("weight")
    if len(x.shape) > 1:
        arrays = tuple(array.reshape((-1,) + (1,) * (len(x.shape) - 2)) for array in slope.arrays)
        slope = Labels((slope.shape[0],) + (1,) * (len(x.shape) - 2), arrays)
    return broadcast(call.ledger, [x, slope], call.shape, f"meets a slope that cannot shrink ({call.place})")


@operator("zeros", "new_zeros", "empty", "new_empty", sizes=out_sizes("size"))
def alike(call: Call) -> Labels:
    """Zeros of given sizes are alike: whatever meets them, any of them can go. Of ones, the sum is a width.

    What is empty is written to before it means anything.
    """
    rank = len(call.shape)
    return Labels(
        call.shape,
        tuple(line(call.ledger.fresh(size), dim, rank) for dim, size in enumerate(call.shape) if size > 1),
    )


@operator("zeros_like", "empty_like")
def alike_as(call: Call) -> Labels:
    """Zeros, or room for something, in the shape of another tensor."""
    return call.labels("self")


@operator(
    "ones", "full", "new_ones", "new_full", "ones_like", "full_like",
    "rand_like", "randn_like", "arange", "linspace", "scalar_tensor", "meshgrid", "eye",
    "rand", "randn", "randint", "randperm", "bernoulli", "triu", "tril", "uniform",
)  # fmt: skip
def constant(call: Call) -> Labels | list[Labels]:
    """Every element is another one: carries no labels, and pins what it meets."""
    return call.unlabelled()


@operator("set_.default")
def emptied(call: Call) -> Labels:
    """Gives memory back, as reversible networks do; nothing is left."""
    return Labels(call.shape)


@operator("_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size")
def assertion(call: Call) -> None:
    """Checked on the way; says nothing about channels."""
