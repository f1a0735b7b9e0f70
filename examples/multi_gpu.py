"""Prune on every GPU of a machine, or of several machines.

    torchrun --nproc_per_node 4 examples/multi_gpu.py resnet50.a1_in1k me/flowers
    accelerate launch --multi_gpu --num_processes 4 examples/multi_gpu.py resnet50.a1_in1k me/flowers
    sbatch examples/multi_node.slurm resnet50.a1_in1k me/flowers --out /shared/resnet50-half

Nothing in the script says how many there are: images are shared out, the plan is decided once, and every process ends
with the same model. The batch size is that of one process. Without a script, `-m scap_hub prune ...` does the same.
"""

import argparse
from pathlib import Path

from accelerate import PartialState

import scap_hub
from scap_hub.cli import show_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="timm name, Hub id or folder")
    parser.add_argument("images", help="Hub id or folder, the same on every machine")
    parser.add_argument("--recipe", default="half-macs", help="shipped name or YAML file")
    parser.add_argument("--epochs", type=int, default=10, help="fine-tuning of the pruned model")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step, per process")
    parser.add_argument("--out", type=Path, default=Path("out/multi_gpu"), help="absent or empty, on a shared disk")
    options = parser.parse_args(arguments)

    result = scap_hub.prune(
        options.model,
        options.images,
        options.recipe,
        finetune_epochs=options.epochs,
        data_batch_size=options.batch_size,
        output_dir=options.out,
    )
    processes = PartialState()
    if processes.is_main_process:
        show_report(result.report)
        print(f"saved in {options.out} by {processes.num_processes} processes")
    processes.destroy_process_group()


if __name__ == "__main__":
    main()
