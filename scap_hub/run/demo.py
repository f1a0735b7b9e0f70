"""The whole job in two minutes: a small ResNet on the digits that travel in the package."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scap_hub.progress import tell
from scap_hub.recipe import DataSettings, FinetuneSettings
from scap_hub.run.pruning import prune
from scap_hub.run.result import Result
from scap_hub.run.unfinished import check_free
from scap_hub.training.data import load_data
from scap_hub.training.finetune import finetune
from scap_hub.zoo import load_model

INPUT_SIZE = (1, 32, 32)

_RELOAD = """
import sys, scap_hub
from safetensors.torch import load_file, save_file
folder, images, logits = sys.argv[1:]
save_file({"logits": scap_hub.load(folder)(load_file(images)["images"]).detach()}, logits)
"""


def run(output_dir: str | Path) -> tuple[Result, float]:
    """Trains, prunes, saves and reloads.

    Args:
        output_dir: Absent or empty.

    Returns:
        The result, and the largest difference between its logits and those of the reloaded model.
    """
    check_free(output_dir)
    tell("a small ResNet is trained on the digits, then pruned")
    dense = train_dense()
    result = prune(dense, "digits", "quick", output_dir=output_dir, model_input_size=INPUT_SIZE, evaluate_latency=True)
    return result, reload_difference(result.model, Path(output_dir))


def train_dense(epochs: int = 6) -> nn.Module:
    """A timm ResNet-10 with one input channel, trained on the digits from scratch."""
    torch.manual_seed(0)
    grey = {"mean": (0.5,), "std": (0.5,)}
    model = timm.create_model("resnet10t", in_chans=1, num_classes=10, pretrained_cfg_overlay=grey)
    preprocessing = load_model(model, input_size=INPUT_SIZE).preprocessing
    data = load_data("digits", preprocessing, DataSettings())
    finetune(model, data, FinetuneSettings(epochs=epochs, learning_rate=2e-3))
    return model


def reload_difference(model: nn.Module, folder: Path) -> float:
    """Largest absolute difference of the logits when a fresh process loads the folder."""
    images = torch.rand(16, *INPUT_SIZE)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        given, got = Path(scratch, "images.safetensors"), Path(scratch, "logits.safetensors")
        save_file({"images": images}, given)
        subprocess.run([sys.executable, "-c", _RELOAD, str(folder), str(given), str(got)], check=True)
        return float((model(images) - load_file(got)["logits"]).abs().max())
