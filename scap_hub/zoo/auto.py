"""transformers' auto classes: a way into published models of its own, and into timm's through its wrapper of them."""

from __future__ import annotations

from pathlib import Path

from scap_hub.zoo.base import CODE, Door

AUTO_CLASS = "AutoModelForImageClassification"
"""Classification only: models for another task load through another class."""


def auto_map(model_class: str) -> dict[str, str]:
    """The entry of config.json that says where transformers finds a model's code, if it is allowed to run it."""
    return {AUTO_CLASS: f"{Path(CODE).stem}.{model_class}"}


def auto_door(place: str) -> Door:
    """The call that loads a model from a folder or a Hub id."""
    call = f'model = {AUTO_CLASS}.from_pretrained("{place}"{{}})'
    return Door(f"from transformers import {AUTO_CLASS}", call.format(""), call.format(", trust_remote_code=True"))
