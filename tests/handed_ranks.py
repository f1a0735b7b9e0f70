"""Run by torchrun from test_ranks.py: prunes with data that is handed over, and writes what each rank got."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.datasets import ImageFolder

import scap_hub
from scap_hub.errors import DataError
from scap_hub.progress import set_quiet
from scap_hub.training.distributed import accelerator, from_main
from tests.nets import Residual

SIZE = (3, 32, 32)


def images(count):
    pixels = torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))
    return TensorDataset(pixels, torch.arange(count) % 5)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images(9))


def paint(folder):
    for name in "abcde":
        (folder / name).mkdir(parents=True)
        for k in range(4):
            pixels = np.random.default_rng(k).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")


def pruned(data, **options):
    torch.manual_seed(0)
    result = scap_hub.prune(
        Residual(), data, criterion="l1", model_input_size=SIZE, data_batch_size=8, finetune_epochs=1,
        evaluate_latency=False, criterion_diagnostics=False, **options,
    )  # fmt: skip
    weights = sum(float(parameter.sum()) for parameter in result.model.parameters())
    return result.plan.to_json(), [row.get("loss") for row in result.report.history], weights


def main(folder: Path) -> None:
    from_main(lambda: paint(folder / "data"))
    found = {
        "a last batch for one rank alone": pruned(DataLoader(images(9), batch_size=8)),
        "less than a batch": pruned(DataLoader(images(5), batch_size=8)),
        "a data set of less than a batch": pruned(images(7)),
        "an ImageFolder": pruned(ImageFolder(folder / "data")),
        "a stream": pruned(Stream(), finetune_steps=3),
        "one image for validation": pruned({"train": images(16), "validation": images(1)}),
    }
    try:
        scap_hub.finetune(Residual(), DataLoader(images(12), batch_size=8, drop_last=True), epochs=1, input_size=SIZE)
    except DataError as error:
        found["too few"] = str(error)
    (folder / f"{accelerator().process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    set_quiet(True)
    main(Path(sys.argv[1]))
