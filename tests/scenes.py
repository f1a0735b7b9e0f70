"""Small pictures with bright shapes on a dark ground, and what is to be found in them."""

import datasets
import numpy as np
import torch
import transformers as hf
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

import scap_hub.compensation

SIZE = (3, 64, 64)
FAST = dict(
    model_input_size=SIZE, data_batch_size=16, round_to=1, evaluate_latency=False, criterion="l1",
    criterion_diagnostics=False, finetune_learning_rate=3e-3,
)  # fmt: skip


def scenes(count, seed=0, size=64):
    """Pictures with a red and a green square each; its mask (1 red, 2 green) and its boxes in COCO's form."""
    draw, pictures = np.random.default_rng(seed), []
    for _ in range(count):
        image = draw.integers(0, 60, (size, size, 3)).astype(np.uint8)
        mask, boxes = np.zeros((size, size), np.uint8), []
        for number in (1, 2):
            top, left = draw.integers(0, size - 24, 2)
            mask[top : top + 24, left : left + 24] = number
            boxes.append([float(left), float(top), 24.0, 24.0])
        for number in (1, 2):
            image[mask == number, number - 1] += 180
        pictures.append((Image.fromarray(image), Image.fromarray(mask), boxes))
    return pictures


def rows(**columns):
    """A `datasets.Dataset`; lists of PIL images become image columns."""
    kinds = {name: datasets.Image() if isinstance(values[0], Image.Image) else None for name, values in columns.items()}
    found = datasets.Dataset.from_dict(
        {name: values for name, values in columns.items() if kinds[name] is None}
        | {name: values for name, values in columns.items() if kinds[name] is not None}
    )
    for name, kind in kinds.items():
        if kind is not None:
            found = found.cast_column(name, kind)
    return found


def masked(count, seed=0, **more):
    """With columns image and annotation."""
    pictures = scenes(count, seed)
    return rows(image=[image for image, _, _ in pictures], annotation=[mask for _, mask, _ in pictures], **more)


def segmenter(**config):
    """An untrained one, whose batch norm knows these pictures."""
    torch.manual_seed(0)
    small = dict(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=16, num_labels=3, image_size=64,
    )  # fmt: skip
    return settled(hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**{**small, **config})))


def settled(model):
    """The model, its batch norms with the statistics of these pictures."""
    images = torch.stack([to_dtype(pil_to_tensor(image), torch.float32, True) for image, _, _ in scenes(8)])
    scap_hub.compensation.recalibrate(model, [(images - 0.45) / 0.23])
    return model.eval()
