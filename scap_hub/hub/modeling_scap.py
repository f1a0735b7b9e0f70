"""Builds pruned models on top of timm and transformers; this file travels with the weights and needs no scap_hub.

The "cut" in config.json lists the sizes that pruning left. The zoo builds the dense model, `shrink` narrows its tensors
to these sizes, and the weights load as usual. scap_hub imports this very file; without it, transformers runs the copy
in the repository once `trust_remote_code=True` allows it.
"""

import dataclasses
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

VERSION = 1


def shrink(model, cut, prefix=""):
    """Narrows a dense model in place; its values are to be overwritten by the pruned weights.

    Args:
        model: The dense model; parts that it lacks, such as the classifier of a headless one, are passed over.
        cut: {"version": 1, "shapes": {tensor: "32,*,3,3"} with * where the size stays, "attributes": {module:
            {name: integer or list}}, "buffers": {tensor: {dim: "0-3,5"}}, the kept indices of what no weight overwrites}.
        prefix: Leading part of the names that the model lacks.

    Raises:
        ValueError: An unknown version, or sizes that the dense model does not have; nothing has been changed then.
    """
    if not isinstance(cut, dict) or cut.get("version") != VERSION:
        raise ValueError("config.json was written by a newer scap_hub: upgrade scap_hub")
    modules = dict(model.named_modules())
    smaller, values = {}, []
    for name, text in cut["shapes"].items():
        path, _, leaf = name.removeprefix(prefix).rpartition(".")
        module = modules.get(path, nn.Module())
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is not None:
            # Tied names share one tensor before, and must share one after.
            smaller[id(old)] = (old, _shape(name, text, old.shape), cut.get("buffers", {}).get(name, {}))
    for name, attributes in cut["attributes"].items():
        module = modules.get(f"{name}.".removeprefix(prefix)[:-1])
        for attribute, value in attributes.items() if module is not None else ():
            old = vars(module).get(attribute)
            if not _fits(old, value):
                raise ValueError(f"config.json cannot set {attribute!r} of {name!r} from {old!r} to {value!r}")
            values.append((module, attribute, type(old)(value)))
    tensors = {key: _narrowed(*job) for key, job in smaller.items()}
    for module in modules.values():
        for table in (module._parameters, module._buffers):
            table.update({leaf: tensors[id(old)] for leaf, old in table.items() if id(old) in tensors})
    for module, attribute, value in values:
        setattr(module, attribute, value)


def _shape(name, text, old):
    sizes = [size if part == "*" else int(part) for part, size in zip(text.split(","), old)]
    if text.count(",") + 1 == len(old) and all(0 < new <= size for new, size in zip(sizes, old)):
        return sizes
    raise ValueError(f"config.json cuts {name!r} to {text}, but the dense model has {tuple(old)}")


def _fits(old, value):
    if isinstance(old, (list, tuple)):
        return isinstance(value, list) and len(old) == len(value) and all(map(_fits, old, value))
    return type(old) is int and type(value) is int and 0 < value <= old


def _narrowed(old, shape, kept):
    new = old.detach()
    for dim, size in enumerate(shape):
        if str(dim) in kept and size < new.shape[dim]:
            pairs = [part.split("-") for part in kept[str(dim)].split(",")]
            indices = [index for pair in pairs for index in range(int(pair[0]), int(pair[-1]) + 1)]
            new = new.index_select(dim, torch.tensor(indices, device=new.device))
        new = new.narrow(dim, 0, size)
    new = new.clone()
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def scap_pruned(
    pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, base="", cut=None,
    features_only=False, feature_cls=None, pretrained_model_args=None, **arguments,
):  # fmt: skip
    """timm entry point: `base`, cut to size; features come through timm's FeatureGetterNet."""
    timm = import_module("timm.models")
    if isinstance(pretrained_cfg, dict):
        pretrained_cfg = timm.PretrainedCfg(**pretrained_cfg)
    if pretrained_cfg:
        pretrained_cfg = _safetensors_only(dataclasses.replace(pretrained_cfg, **(pretrained_cfg_overlay or {})))

    def finish(model, num_classes):
        shrink(model, cut)
        if pretrained:
            in_chans = arguments.get("in_chans", 3)
            timm.load_pretrained(model, pretrained_cfg.to_dict(), num_classes, in_chans, cache_dir=cache_dir)
        return model

    def features(model, out_indices, **options):
        # timm hands over the dense model here, before it would wrap it.
        net = import_module("timm.models._features").FeatureGetterNet(finish(model, 0), out_indices=out_indices)
        size = arguments.get("img_size") or model.pretrained_cfg["input_size"][-1]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        with torch.no_grad():
            maps = net.eval()(next(net.parameters()).new_zeros(1, arguments.get("in_chans", 3), height, width))
        for index, feature in zip(net.feature_info.out_indices, maps):
            net.feature_info.info[index]["num_chs"] = feature.shape[1]
        return net.train()

    if pretrained_cfg:
        arguments["pretrained_cfg"] = pretrained_cfg
    if features_only:
        return timm.create_model(base, features_only=True, feature_cls=features, **arguments)
    model = timm.create_model(base, **arguments)
    return finish(model, model.num_classes)


def _safetensors_only(cfg):
    """timm would fall back on pickle files."""
    if cfg.source == "hf-hub":
        return dataclasses.replace(cfg, hf_hub_filename="model.safetensors")
    if cfg.source == "local-dir":
        return dataclasses.replace(cfg, source="file", file=str(Path(cfg.file) / "model.safetensors"))
    return cfg


def register():
    """Makes the architecture known to timm, once."""
    timm = import_module("timm.models")
    if not timm.is_model("scap_pruned"):
        timm.register_model(scap_pruned)


def shrink_pretrained(model):
    """Shrinks a transformers model, or the headless part of one, if its config says so."""
    cut = (getattr(model.config, "scap", None) or {}).get("cut")
    if cut:
        whole = type(model).__name__ in (model.config.architectures or ())
        shrink(model, cut, "" if whole else f"{model.base_model_prefix}.")


def __getattr__(name):
    """The transformers class of that name, with the pruned sizes; what auto_map in config.json asks for."""
    if not name.endswith("ForImageClassification"):
        raise AttributeError(name)
    base = getattr(import_module("transformers"), name)
    if name.startswith("TimmWrapper"):
        register()

    def __init__(self, config, *inputs, **options):
        base.__init__(self, config, *inputs, **options)
        shrink_pretrained(self)

    return globals().setdefault(name, type(name, (base,), {"__init__": __init__, "__module__": __name__}))
