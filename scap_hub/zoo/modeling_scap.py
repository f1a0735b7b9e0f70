"""Builds pruned models on top of timm and transformers; this file travels with the weights and needs no scap_hub.

The zoo builds the dense model, `shrink` narrows it to the "cut" in config.json, the weights load as usual. scap_hub
imports this very file; transformers runs the repository's copy if `trust_remote_code=True`.
"""

from functools import partial
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

VERSION, WEIGHTS = 2, "model.safetensors"

_SIZED = (
    "view", "reshape", "unflatten", "expand", "repeat", "tile", "narrow", "split", "split_with_sizes", "__getitem__",
    "__setitem__", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "layer_norm", "rms_norm", "group_norm",
    "conv1d", "conv2d", "conv3d", "pad",
)  # fmt: skip
SCALED, SCALES = "scaled_dot_product_attention", ("mul", "mul_", "div", "div_")
_WIDTHS = frozenset((
    "in_channels", "out_channels", "groups", "num_channels", "num_groups", "in_features", "out_features",
    "num_features", "normalized_shape", "num_parameters", "kdim", "vdim", "unflattened_size", "embedding_dim",
))  # fmt: skip


def exchangeable(function: str, old: Any, new: Any) -> bool:
    """Whether a call's number may become another: a size, or a scale that is the root of a width."""
    if function == SCALED:  # left to torch, which takes it from a width: it gets the dense one's, after its numbers
        return old is None and type(new) is float and 0 < new <= 1
    if function in SCALES:
        widths = [max(own, 1 / own) ** 2 for own in (old, new) if type(own) is float and 1e-9 < own < 1e9]
        return len(widths) == 2 and all(abs(own - round(own)) < 1e-9 * own for own in widths)
    return function in _SIZED and type(old) is type(new) in (int, float) and -1e18 < old - new < 1e18


def changeable(module: nn.Module, name: str) -> bool:
    """Whether pruning may change an integer: in torch's layers only a count of channels, elsewhere any public size."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn") and kind is not nn.Module]
    fixed = {*nn.Conv2d.__constants__, *(own for kind in kinds for own in getattr(kind, "__constants__", ()))}
    return name in _WIDTHS or not (name in fixed or name.startswith("_") or type(module) in kinds)


def narrower(model: nn.Module, cut: Any) -> Any:
    """Whether something shrinks at a module's path; one without tensors goes by the nearest around it that has some.

    `cut`: ids of the tensors that shrink.
    """
    held: dict[str, bool] = {}
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in (pair for pairs in tensors for pair in pairs):
        while name and tensor.numel() > 1:  # a single number belongs to no channel
            name = name.rpartition(".")[0]
            held[name] = held.get(name, False) or id(tensor) in cut

    def shrinks(path: str) -> bool:
        while path and path not in held:
            path = path.rpartition(".")[0]
        return held.get(path, False)

    return shrinks


def opened(function: Any) -> Any:
    """Torch's attention for modes to see the calls in it, without its check of the projections' shapes."""
    names: dict[str, Any] = {**function.__globals__, "has_torch_function": lambda _: False}
    names["_in_projection"] = lambda *parts: tuple(map(nn.functional.linear, parts[:3], parts[3:6], parts[6:]))
    made = FunctionType(function.__code__, names, None, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Numbers(TorchFunctionMode):
    """Gives calls of torch functions other numbers than the forward pass has for them."""

    def __init__(self, changes: Any) -> None:
        super().__init__()
        self.changes = {tuple(change[:3]): tuple(change[3:]) for change in changes}
        self.calls = {function: 0 for function, _, _ in self.changes}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.multi_head_attention_forward:
            with self:
                return opened(func)(*args, **kwargs or {})
        if (name := getattr(func, "__name__", "")) in self.calls:
            place = iter(range(2**31))
            self.calls[name] += 1
            args = self.changed(args, name, place)
            kwargs = {key: self.changed(value, name, place) for key, value in (kwargs or {}).items()}
            if (scale := self.number(kwargs.get("scale"), name, place)) is not None:
                kwargs["scale"] = scale
        return func(*args, **kwargs or {})

    def number(self, value: Any, name: str, place: Any) -> Any:
        old, new = self.changes.get((name, self.calls[name], next(place)), (value, value))
        if value is not old and value != old:
            raise ValueError(f"pruned for a forward pass that computes {old} where it now computes {value}")
        return new

    def changed(self, value: Any, name: str, place: Any) -> Any:
        traced = torch.jit.is_tracing() and getattr(value, "ndim", 1) == 0 and value.dtype == torch.int64
        if traced or (isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)):
            return self.number(value, name, place)
        if isinstance(value, slice):
            return slice(*(self.changed(part, name, place) for part in (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            parts = [self.changed(part, name, place) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        return value


def renumbered(module: nn.Module, changes: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a module's class, with other numbers in some calls of torch functions."""
    with Numbers(changes):
        return type(module).forward(module, *args, **kwargs)


def shrink(model: nn.Module, cut: dict[str, Any], prefix: str = "") -> None:
    """Narrows a dense model in place; its values are to be overwritten by the pruned weights.

    `cut`: "shapes", sizes by tensor ("32,*,3,3"); "attributes", integers by module; "buffers", kept indices ("0-3,5")
    of what no weight overwrites; "calls", numbers that forward passes give to torch functions. The model may lack some,
    and the names' `prefix`. ValueError leaves it unchanged.
    """
    if not isinstance(cut, dict) or cut.get("version") != VERSION:
        raise ValueError("config.json was written by another version of scap_hub: upgrade scap_hub")
    modules, smaller, values = dict(model.named_modules()), {}, []
    for name, text in cut["shapes"].items():
        path, _, leaf = name.removeprefix(prefix).rpartition(".")
        module = modules.get(path, nn.Module())
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is not None:  # tied names share one tensor before, and must share one after
            sizes = [size if part == "*" else int(part) for part, size in zip(text.split(","), old.shape, strict=False)]
            if text.count(",") + 1 != old.dim() or any(not 0 < n <= o for n, o in zip(sizes, old.shape, strict=True)):
                raise ValueError(f"config.json cuts {name!r} to {text}, but the dense model has {tuple(old.shape)}")
            smaller[id(old)] = (old, sizes, cut.get("buffers", {}).get(name, {}))
    shrinks = narrower(model, smaller)
    for path, attributes in cut["attributes"].items():
        place = f"{path}.".removeprefix(prefix)[:-1]
        module = modules.get(place, nn.Module())
        for name in attributes.keys() & vars(module).keys():
            old, new = vars(module)[name], _value(f"{path}.{name}", vars(module)[name], attributes[name])
            if not changeable(module, name) or (old != new and not shrinks(place)):
                raise ValueError(f"config.json sets {name!r} in {path!r}, which pruning does not change")
            values.append((module, name, new))
    for path, changes in cut.get("calls", {}).items():
        if (module := modules.get(f"{path}.".removeprefix(prefix)[:-1])) is not None:
            values.append((module, "forward", partial(renumbered, module, [_change(*change) for change in changes])))
    tensors = {key: _narrowed(*job) for key, job in smaller.items()}
    for module in modules.values():
        for table in (module._parameters, module._buffers):
            table.update({leaf: tensors[id(old)] for leaf, old in table.items() if id(old) in tensors})
    for module, name, value in values:
        setattr(module, name, value)


def _change(function: str, call: int, position: int, old: Any, new: Any) -> tuple[Any, ...]:
    if {type(call), type(position)} != {int} or not exchangeable(function, old, new):
        raise ValueError(f"config.json changes numbers of {function!r}, which it may not")
    return function, call, position, old, new


def _value(name: str, old: Any, new: Any, least: int = 1) -> Any:
    if isinstance(old, list | tuple) and isinstance(new, list) and len(old) == len(new):
        return type(old)(_value(name, *pair, least=0) for pair in zip(old, new, strict=True))
    if isinstance(old, dict) and "num_chs" in old:  # timm's feature_info
        return {**old, "num_chs": _value(name, old["num_chs"], new)}
    if type(old) is int and type(new) is int and (new == old or least <= new <= old):
        return new
    raise ValueError(f"config.json sets {name!r} to {new!r}, but the dense model has {old!r}")


def _narrowed(old: torch.Tensor, shape: list[int], kept: dict[str, str]) -> torch.Tensor:
    new = old.detach()
    for dim, size in enumerate(shape):
        if str(dim) in kept and size < new.shape[dim]:
            pairs = [part.split("-") for part in kept[str(dim)].split(",")]
            ends = [int(end) for pair in pairs for end in (pair[0], pair[-1])]
            spans = list(zip(ends[::2], ends[1::2], strict=True))
            apart = all(b < a for b, a in zip(ends[1::2], ends[2::2], strict=False)) and ends == sorted(ends)
            if not apart or ends[-1] >= new.shape[dim] or sum(b - a + 1 for a, b in spans) != size:
                raise ValueError(f"config.json keeps {kept[str(dim)][:40]!r} where it cuts {new.shape[dim]} to {size}")
            indices = torch.cat([torch.arange(a, b + 1) for a, b in spans])
            new = new.index_select(dim, indices.to(new.device))
        new = new.narrow(dim, 0, size)
    return nn.Parameter(new.clone(), old.requires_grad) if isinstance(old, nn.Parameter) else new.clone()


def scap_pruned(
    pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, cache_dir: Any = None,
    base: str = "", cut: Any = None, features_only: bool = False, feature_cls: Any = None,
    pretrained_model_args: Any = None, wrapped: bool = False, **arguments: Any,
) -> nn.Module:  # fmt: skip
    """Entry point for timm: `base`, cut to size; features always come through timm's FeatureGetterNet.

    `wrapped`: what was cut and saved was a model with features_only.
    """
    timm = import_module("timm.models")
    if base.partition(".")[0] == "scap_pruned" or not timm.is_model(base.partition(".")[0]):
        raise ValueError(f"config.json prunes {base!r}, which is no model of timm's")  # nor one of another repository
    if pretrained_cfg:
        known = pretrained_cfg if isinstance(pretrained_cfg, dict) else vars(pretrained_cfg)
        known = {**known, **(pretrained_cfg_overlay or {}), "architecture": "scap_pruned"}
        arguments["pretrained_cfg"] = cfg = timm.PretrainedCfg(**known)

    def finish(model: Any, num_classes: int) -> Any:
        shrink(model, cut)
        if pretrained:
            weights = cfg.to_dict()
            if cfg.source in ("hf-hub", "local-dir"):  # left to itself, timm falls back on pickle files
                pull = import_module("timm.models._hub").download_from_hf
                file = Path(cfg.file, WEIGHTS) if cfg.source == "local-dir" else pull(cfg.hf_hub_id, WEIGHTS, cache_dir)
                weights |= {"source": "file", "file": str(file), "custom_load": False}
            timm.load_pretrained(model, weights, num_classes, arguments.get("in_chans", 3), cache_dir=cache_dir)
        return model

    def features(model: Any, out_indices: Any, **_: Any) -> nn.Module:  # timm would wrap the dense model
        return import_module("timm.models._features").FeatureGetterNet(finish(model, 0), out_indices=out_indices)

    if wrapped:
        return finish(timm.create_model(base, features_only=True, **arguments), 0)
    wrapper = {"features_only": True, "feature_cls": features} if features_only else {}
    model = timm.create_model(base, **wrapper, **arguments)
    return model if features_only else finish(model, model.num_classes)


def register() -> None:
    """Makes the architecture known to timm, once."""
    if not import_module("timm.models").is_model("scap_pruned"):
        import_module("timm.models").register_model(scap_pruned)


def shrink_pretrained(model: Any) -> None:
    """Shrinks a transformers model, or the headless part of one, if its config says so."""
    if cut := (getattr(model.config, "scap", None) or {}).get("cut"):
        own = type(model).__name__ in (model.config.architectures or ())
        shrink(model, cut, "" if own else f"{model.base_model_prefix}.")


def __getattr__(name: str) -> Any:
    """The transformers class that auto_map in config.json asks for: of the pruned sizes, and saved with this file."""
    base: Any = getattr(import_module("transformers"), name, None) if name[:1].isupper() else None
    if not hasattr(base, "register_for_auto_class"):
        raise AttributeError(name)
    if name.startswith("TimmWrapper"):
        register()

    def __init__(self: Any, config: Any, *inputs: Any, **options: Any) -> None:
        base.__init__(self, config, *inputs, **options)
        shrink_pretrained(self)
        autos = {ref.rpartition(".")[2]: auto for auto, ref in (getattr(config, "auto_map", None) or {}).items()}
        self._auto_class = autos.get(name, self._auto_class)  # or older transformers save it without this file

    own = {"__init__": __init__, "__module__": __name__}
    return globals().setdefault(name, type(name, (base,), own))
