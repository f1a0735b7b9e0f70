"""Models of every zoo, loaded through one call; what is particular to a zoo stands in its object, a `Zoo`."""

from scap_hub.zoo.base import Door, LoadedModel, Preprocessing, Uniform, Wanted, Zoo, logits
from scap_hub.zoo.building import rebuild, skeleton
from scap_hub.zoo.loading import load_model
from scap_hub.zoo.registry import pruned_entry, register, zoo_named, zoo_of

__all__ = [
    "Door",
    "LoadedModel",
    "Preprocessing",
    "Uniform",
    "Wanted",
    "Zoo",
    "load_model",
    "logits",
    "pruned_entry",
    "rebuild",
    "register",
    "skeleton",
    "zoo_named",
    "zoo_of",
]
