"""Run by torchrun from test_training.py: trains and evaluates on every rank, and writes what each one saw."""

import atexit
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed
from torch.utils.data import DataLoader, TensorDataset

from scap_hub.errors import TrainingError
from scap_hub.recipe import DataSettings, FinetuneSettings
from scap_hub.run.report import measure
from scap_hub.training.data import load_data
from scap_hub.training.distributed import accelerator, from_main, shard
from scap_hub.training.evaluate import evaluate
from scap_hub.training.finetune import finetune
from scap_hub.zoo.base import Preprocessing
from tests.nets import tiny_net


def main(folder: Path) -> None:
    # What is registered first runs last.
    atexit.register(lambda: (folder / f"left-open{rank}").write_text(str(torch.distributed.is_initialized())))
    rank, ranks = accelerator().process_index, accelerator().num_processes
    data = load_data("digits", Preprocessing((1, 8, 8), (0.5,), (0.5,)), DataSettings(batch_size=32), num_classes=10)
    seen: list[int] = []
    uneven = DataLoader(TensorDataset(torch.arange(70).float().reshape(70, 1, 1, 1)), batch_size=16)
    for (images,) in shard(uneven):
        seen += images.flatten().int().tolist()
    shuffled = DataLoader(TensorDataset(torch.arange(70)), batch_size=16, shuffle=True)
    mixed = [index for (batch,) in shard(shuffled) for index in batch.tolist()]

    before = evaluate(tiny_net(), data.test)
    model = tiny_net()
    settings = FinetuneSettings(epochs=4, learning_rate=0.01, ema=0.9)
    history = finetune(model, data, settings, teacher=tiny_net(1), output_dir=folder / "run")
    resumed = tiny_net()
    finetune(resumed, data, settings, teacher=tiny_net(1), output_dir=folder / "run")

    broken = DataLoader(TensorDataset(torch.full((64, 1, 8, 8), float("nan" if rank else 0)), torch.zeros(64).long()))
    try:
        finetune(tiny_net(), load_data(broken, None), FinetuneSettings(epochs=1))
        error = ""
    except TrainingError as raised:
        error = str(raised)
    torch.save(
        {
            "ranks": ranks,
            "from_main": from_main(lambda: rank),
            "seen": seen,
            "mixed": mixed,
            "before": before,
            "measured": asdict(measure(tiny_net(), (1, 8, 8), data, 10)),
            "after": evaluate(model, data.test),
            "history": history,
            "state": model.state_dict(),
            "resumed": resumed.state_dict(),
            "wrapped": type(model).__name__,
            "error": error,
        },
        folder / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
