"""Builds pruned models on top of timm and transformers; this file travels with the weights and needs no scap_hub.

The zoo builds the dense model, `shrink` narrows its tensors to the sizes that config.json lists as "cut", the weights
load as usual. scap_hub imports this very file; transformers runs the repository's copy if `trust_remote_code=True`.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

VERSION = 1
WEIGHTS = "model.safetensors"


def shrink(model: nn.Module, cut: dict[str, Any], prefix: str = "") -> None:
    """Narrows a dense model in place; its values are to be overwritten by the pruned weights.

    Args:
        model: The dense model; what it lacks, such as the classifier of a headless one, is passed over.
        cut: "version"; "shapes", sizes by tensor, with * for those that stay ("32,*,3,3"); "attributes", new integers
            (or lists of them) by module and name; "buffers", kept indices by tensor and dimension ("0-3,5"), of what
            no weight overwrites.
        prefix: Leading part of the names that the model lacks.

    Raises:
        ValueError: An unknown version, or sizes that the dense model does not have; nothing has been changed then.
    """
    if not isinstance(cut, dict) or cut.get("version") != VERSION:
        raise ValueError("config.json was written by another version of scap_hub: upgrade scap_hub")
    modules = dict(model.named_modules())
    smaller: dict[int, tuple[Any, ...]] = {}
    values = []
    for name, text in cut["shapes"].items():
        path, _, leaf = name.removeprefix(prefix).rpartition(".")
        module = modules.get(path, nn.Module())
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is not None:  # tied names share one tensor before, and must share one after
            smaller[id(old)] = (old, _shape(name, text, old.shape), cut.get("buffers", {}).get(name, {}))
    for path, attributes in cut["attributes"].items():
        module = modules.get(f"{path}.".removeprefix(prefix)[:-1], nn.Module())
        for name in attributes.keys() & vars(module).keys():
            values.append((module, name, _value(f"{path}.{name}", vars(module)[name], attributes[name])))
    tensors = {key: _narrowed(*job) for key, job in smaller.items()}
    for module in modules.values():
        for table in (module._parameters, module._buffers):
            table.update({leaf: tensors[id(old)] for leaf, old in table.items() if id(old) in tensors})
    for module, name, value in values:
        setattr(module, name, value)


def _shape(name: str, text: str, old: torch.Size) -> list[int]:
    parts = text.split(",")
    sizes = [size if part == "*" else int(part) for part, size in zip(parts, old, strict=False)]
    if len(parts) == len(old) and all(0 < new <= size for new, size in zip(sizes, old, strict=True)):
        return sizes
    raise ValueError(f"config.json cuts {name!r} to {text}, but the dense model has {tuple(old)}")


def _value(name: str, old: Any, new: Any) -> Any:
    if isinstance(old, list | tuple) and isinstance(new, list) and len(old) == len(new):
        return type(old)(_value(name, *pair) for pair in zip(old, new, strict=True))
    if isinstance(old, dict) and "num_chs" in old:  # timm's feature_info
        return {**old, "num_chs": _value(name, old["num_chs"], new)}
    if type(old) is int and type(new) is int and 0 < new <= old:
        return new
    raise ValueError(f"config.json sets {name!r} to {new!r}, but the dense model has {old!r}")


def _narrowed(old: torch.Tensor, shape: list[int], kept: dict[str, str]) -> torch.Tensor:
    new = old.detach()
    for dim, size in enumerate(shape):
        if str(dim) in kept and size < new.shape[dim]:
            pairs = [part.split("-") for part in kept[str(dim)].split(",")]
            indices = torch.cat([torch.arange(int(pair[0]), int(pair[-1]) + 1) for pair in pairs])
            new = new.index_select(dim, indices.to(new.device))
        new = new.narrow(dim, 0, size)
    return nn.Parameter(new.clone(), old.requires_grad) if isinstance(old, nn.Parameter) else new.clone()


def scap_pruned(
    pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, cache_dir: Any = None,
    base: str = "", cut: Any = None, features_only: bool = False, feature_cls: Any = None,
    pretrained_model_args: Any = None, **arguments: Any,
) -> nn.Module:  # fmt: skip
    """Entry point for timm: `base`, cut to size; features always come through timm's FeatureGetterNet."""
    timm = import_module("timm.models")
    if pretrained_cfg:
        known = pretrained_cfg if isinstance(pretrained_cfg, dict) else vars(pretrained_cfg)
        known = {**known, **(pretrained_cfg_overlay or {}), "architecture": "scap_pruned"}
        arguments["pretrained_cfg"] = cfg = timm.PretrainedCfg(**known)
    in_chans = arguments.get("in_chans", 3)

    def finish(model: Any, num_classes: int) -> Any:
        shrink(model, cut)
        if pretrained:
            weights = cfg.to_dict()
            if cfg.source in ("hf-hub", "local-dir"):  # left to itself, timm falls back on pickle files
                pull = import_module("timm.models._hub").download_from_hf
                file = Path(cfg.file, WEIGHTS) if cfg.source == "local-dir" else pull(cfg.hf_hub_id, WEIGHTS, cache_dir)
                weights |= {"source": "file", "file": str(file), "custom_load": False}
            timm.load_pretrained(model, weights, num_classes, in_chans, cache_dir=cache_dir)
        return model

    def features(model: Any, out_indices: Any, **_: Any) -> nn.Module:
        # timm hands over the dense model here, before it would wrap it.
        net = import_module("timm.models._features").FeatureGetterNet(finish(model, 0), out_indices=out_indices)
        size = arguments.get("img_size") or model.pretrained_cfg["input_size"][1:]
        images = next(net.parameters()).new_zeros(1, in_chans, *import_module("timm.layers").to_2tuple(size))
        with torch.no_grad():
            maps = net.eval()(images)
        for index, feature in zip(net.feature_info.out_indices, maps, strict=True):
            net.feature_info.info[index]["num_chs"] = feature.shape[1]
        return net.train()

    if features_only:
        return timm.create_model(base, features_only=True, feature_cls=features, **arguments)
    model = timm.create_model(base, **arguments)
    return finish(model, model.num_classes)


def register() -> None:
    """Makes the architecture known to timm, once."""
    timm = import_module("timm.models")
    if not timm.is_model("scap_pruned"):
        timm.register_model(scap_pruned)


def shrink_pretrained(model: Any) -> None:
    """Shrinks a transformers model, or the headless part of one, if its config says so."""
    if cut := (getattr(model.config, "scap", None) or {}).get("cut"):
        whole = type(model).__name__ in (model.config.architectures or ())
        shrink(model, cut, "" if whole else f"{model.base_model_prefix}.")


def __getattr__(name: str) -> Any:
    """The transformers class that auto_map in config.json asks for: of the pruned sizes, and saved with this file."""
    if not name.endswith("ForImageClassification"):
        raise AttributeError(name)
    base = getattr(import_module("transformers"), name)
    if name.startswith("TimmWrapper"):
        register()

    def __init__(self: Any, config: Any, *inputs: Any, **options: Any) -> None:
        base.__init__(self, config, *inputs, **options)
        shrink_pretrained(self)

    own = {"__init__": __init__, "__module__": __name__, "_auto_class": "AutoModelForImageClassification"}
    return globals().setdefault(name, type(name, (base,), own))
