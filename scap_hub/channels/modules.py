"""Modules whose own integers (in_channels, num_features, ...) follow from their weight's shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class Layer:
    """A module whose own integers follow from its weight's shape.

    Attributes:
        path: Module path.
        kind: "conv", "linear", "norm" (num_features), "group_norm" or "layer_norm".
        weight: Full name of its weight.
        groups: Groups of a convolution.
        depthwise: Whether each group reads one channel, so that the groups shrink with the channels.
        transposed: Whether the weight is laid (in, out / groups, ...).
        rows_a_group: Output channels of each group of a depthwise convolution.
    """

    path: str
    kind: str
    weight: str
    groups: int = 1
    depthwise: bool = False
    transposed: bool = False
    rows_a_group: int = 1

    def attributes(self, shape: tuple[int, ...]) -> dict[str, int | list[int]]:
        """The module's integers once its weight has `shape`."""
        if self.kind == "conv":
            rows, columns = (shape[1], shape[0]) if self.transposed else shape[:2]
            if self.depthwise:
                width = rows // self.rows_a_group
                return {"in_channels": width, "out_channels": rows, "groups": width}
            if self.transposed:
                return {"in_channels": columns, "out_channels": rows * self.groups}
            return {"in_channels": columns * self.groups, "out_channels": rows}
        if self.kind == "linear":
            return {"in_features": shape[1], "out_features": shape[0]}
        if self.kind == "layer_norm":
            return {"normalized_shape": list(shape)}
        return {"num_channels" if self.kind == "group_norm" else "num_features": shape[0]}


def layers_of(model: nn.Module) -> list[Layer]:
    """Every such module of the model."""
    layers = []
    for path, module in model.named_modules():
        weight = f"{path}.weight" if path else "weight"
        if getattr(module, "weight", None) is None:
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            depthwise = module.groups > 1 and module.in_channels == module.groups
            layers.append(
                Layer(
                    path,
                    "conv",
                    weight,
                    module.groups,
                    depthwise,
                    module.transposed,
                    module.out_channels // module.groups,
                )
            )
        elif isinstance(module, nn.Linear):
            layers.append(Layer(path, "linear", weight))
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            layers.append(Layer(path, "norm", weight))
        elif isinstance(module, nn.GroupNorm):
            layers.append(Layer(path, "group_norm", weight))
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            layers.append(Layer(path, "layer_norm", weight))
    return layers
