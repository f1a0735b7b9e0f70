"""All that a GPU is needed for, in one command of less than eight minutes: `make bench-gpu`.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --quick --json out/gpu.json                     # tiny, on the CPU too

Parts, each in a process of its own; what a part has found is written when it ends, and a part that would begin after
--minutes is left out and named:

- parity: scores and plans of four networks on the GPU and on the CPU, in float32 without TF32.
- ranks: two processes that share the device give the plan of one.
- scoring, repair, latency: `scoring.py`, `repair.py` and `latency.py`, which say more.

Weights and images are random, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from scipy.stats import spearmanr

import scap_hub
from scap_hub.progress import set_quiet
from scap_hub.timing.clock import device_name

HERE = Path(__file__).parent
NETWORKS = ("resnet50", "mobilenetv2_100", "convnext_tiny", "vgg16_bn")
CRITERIA = ("scap-set", "obs", "scap", "l1")
BUDGET = "macs=0.5"


def device() -> str:
    """The GPU, or the CPU where there is none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def scored(name: str, criterion: str, images: int, size: int, where: str) -> tuple[Any, Any]:
    """Scores of a network on a device, and its plan."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batches = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1)).split(8)
    groups = scap_hub.channel_groups(model, batches[0][:1])
    model.to(where)
    scores = scap_hub.score(model, [batch.to(where) for batch in batches], criterion, groups=groups.prunable)
    return scores, scap_hub.select(groups.prunable, scores, BUDGET)


def parity(networks: Sequence[str], images: int, size: int) -> list[dict[str, Any]]:
    """How far scores and plans of two devices agree."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    for name in networks:
        for criterion in CRITERIA:
            (left, one), (right, two) = (scored(name, criterion, images, size, where) for where in ("cpu", device()))
            ranks = [float(spearmanr(left[key], right[key].cpu()).statistic) for key in left if len(left[key]) > 1]
            kept = [[_kept(plan, key, len(left[key])) for plan in (one, two)] for key in left]
            rows.append({
                "network": name,
                "criterion": criterion,
                "rank_correlation": min(ranks),
                "kept_by_both": sum(len(a & b) for a, b in kept) / sum(len(a | b) for a, b in kept),
            })  # fmt: skip
            print(*rows[-1].values(), sep="  ", flush=True)
    return rows


def _kept(plan: scap_hub.PruningPlan, group: str, size: int) -> set[int]:
    return set(plan.kept(group) if group in plan.groups else range(size))


_RANK = """
import sys, torch
from accelerate import PartialState
torch.distributed.init_process_group("gloo")  # NCCL refuses two processes on one device
sys.path.insert(0, sys.argv[1])
import gpu
gpu.set_quiet(True)
if torch.cuda.is_available():
    torch.cuda.set_device(0)
torch.manual_seed(0)
model = gpu.timm.create_model(sys.argv[2]).eval()
size = int(sys.argv[3])
images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1))
state = PartialState()
groups = gpu.scap_hub.channel_groups(model, images[:1]).prunable
mine = images[state.process_index :: state.num_processes].to(gpu.device())
scores = gpu.scap_hub.score(model.to(gpu.device()), [mine], "scap-set", groups=groups)
plan = gpu.scap_hub.select(groups, scores, gpu.BUDGET)
if state.is_main_process:
    open(sys.argv[4], "w").write(plan.to_json())
"""


def ranks(networks: Sequence[str], images: int, size: int) -> list[dict[str, Any]]:
    """Whether two processes on one device choose the channels that one chooses."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "rank.py")
        script.write_text(_RANK)
        for name in networks:
            plans = []
            for count in (1, 2):
                out = Path(folder, f"{name}-{count}.json")
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
                subprocess.run([*command, str(script), str(HERE), name, str(size), str(out)], check=True)
                plans.append(scap_hub.PruningPlan.from_json(out.read_text()))
            rows.append({"network": name, "same_plan": plans[0] == plans[1]})
            print(*rows[-1].values(), sep="  ", flush=True)
    return rows


def parts(quick: bool, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """The command of each part, and where it writes."""
    own = [str(HERE / "gpu.py"), *(["--quick"] if quick else [])]
    less = ["--quick"] if quick else []
    commands = {
        "parity": [*own, "--part", "parity"],
        "ranks": [*own, "--part", "ranks"],
        "latency": [
            str(HERE / "latency.py"), *(less or ["--batches", "1,64,256", "--dtypes", "bf16,fp16", "--seconds", "0.5"]),
        ],
        "scoring": [str(HERE / "scoring.py"), *(less or ["--extended"])],
        "repair": [str(HERE / "repair.py"), *less],
    }  # fmt: skip
    return {part: ([*command, "--json", str(folder / f"{part}.json")], folder / f"{part}.json")
            for part, command in commands.items()}  # fmt: skip


def run(quick: bool, minutes: float, path: Path | None) -> dict[str, Any]:
    """Runs the parts one after the other."""
    start = time.perf_counter()
    found: dict[str, Any] = {"device": device_name(torch.device(device())), "torch": torch.__version__, "left_out": []}
    with tempfile.TemporaryDirectory() as folder:
        for part, (command, out) in parts(quick, Path(folder)).items():
            left = 60 * minutes - (time.perf_counter() - start)
            print(f"\n{part}, {max(0, left):.0f} seconds left", flush=True)
            try:
                subprocess.run([sys.executable, *command], check=True, timeout=max(left, 0.001), env=os.environ)
            except subprocess.TimeoutExpired:
                found["left_out"].append(part)
            except subprocess.CalledProcessError as error:
                found["left_out"].append(f"{part}: exit code {error.returncode}")
            if out.exists():
                found[part] = json.loads(out.read_text())
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} seconds; not finished: {', '.join(found['left_out']) or 'nothing'}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing is begun or goes on")
    parser.add_argument(
        "--quick", action="store_true", help="one network at 32 pixels, and the quick form of each part"
    )
    parser.add_argument("--part", choices=("parity", "ranks"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_quiet(True)
    if options.part:
        networks, size = (("mobilenetv2_035",), 32) if options.quick else (NETWORKS, 64)
        rows = {"parity": parity, "ranks": ranks}[options.part](networks, 16, size)
        options.json.write_text(json.dumps(rows, indent=1))
    else:
        if not torch.cuda.is_available() and not options.quick:
            parser.error("there is no GPU here; --quick tries the parts on the CPU")
        run(options.quick, options.minutes, options.json)


if __name__ == "__main__":
    main()
