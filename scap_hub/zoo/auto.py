"""transformers' auto classes: a way into published models of its own, and into timm's through its wrapper of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from scap_hub.zoo.base import CODE, Door


def auto_map(model_class: str, auto_classes: Iterable[str]) -> dict[str, str]:
    """The entry of config.json that says where transformers finds a model's code, if it is allowed to run it."""
    return dict.fromkeys(auto_classes, f"{Path(CODE).stem}.{model_class}")


def auto_door(place: str, auto_class: str) -> Door:
    """The call that loads a model from a folder or a Hub id."""
    door = class_door(place, auto_class)
    return door._replace(code_call=f'model = {auto_class}.from_pretrained("{place}", trust_remote_code=True)')


def class_door(place: str, model_class: str) -> Door:
    """The same for a class that no auto class stands for; its code comes from the installed libraries alone."""
    return Door(f"from transformers import {model_class}", f'model = {model_class}.from_pretrained("{place}")')
