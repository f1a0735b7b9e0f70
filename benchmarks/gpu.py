"""All that a GPU is needed for, in one command of less than eight minutes: `make bench-gpu`.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --quick --json out/gpu.json                     # tiny, on the CPU too

Parts, in processes of their own; what a part has found is written when it ends, and what would go on after --minutes is
stopped and named:

- latency, scoring, repair: `latency.py`, `scoring.py` and `repair.py`, which say more. They come first, because what is
  timed has the device for itself.
- parity: scores and plans of four networks on the GPU and on the CPU, in float32 without TF32.
- ranks: the plan of two processes that share the device beside that of one.
- trained: as many cells of `accuracy.py` as the time left allows, where Fashion-MNIST is there.

`--parts latency,scoring` measures only these, and they get all of the time.

Other weights and images are random, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from fashion_mnist import FOLDER

import scap_hub
from scap_hub.progress import set_quiet
from scap_hub.run import peers
from scap_hub.timing.clock import device_name

HERE = Path(__file__).parent
NETWORKS = ("resnet50", "mobilenetv2_100", "convnext_tiny", "vgg16_bn")
TIMED = ("resnet50", "vgg16", "mobilenetv2_100", "convnext_tiny")
TRAINED = [
    *("--nets", "mobilenetv2,resnet56,vgg16", "--targets", "macs=0.1,macs=0.3,macs=0.5"),
    *("--variants", "repaired and tuned", "--epochs", "2", "--precision", "no"),
    *("--criteria", f"scap-set,obs,l1,random,{'torch-pruning,' * peers.available()}scratch"),
    *("--images", "12000", "--dense-epochs", "5", "--calibration", "256", "--jobs", str(os.cpu_count())),
]
QUICKLY = ["--seconds", "0.3", "--plan-seconds", "0.02"]
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
            rows.append({
                "network": name,
                "criterion": criterion,
                "rank_correlation": min(ranks),
                "kept_by_both": kept_by_both(one, two),
            })  # fmt: skip
            print(*rows[-1].values(), sep="  ", flush=True)
    return rows


def kept_by_both(*plans: scap_hub.PruningPlan) -> float:
    """The share of channels that two plans keep among those that one of them keeps, in groups that lose any."""
    both = either = 0
    for group in plans[0].groups.keys() | plans[1].groups.keys():
        size = next(plan.groups[group].size for plan in plans if group in plan.groups)
        one, two = (set(plan.kept(group) if group in plan.groups else range(size)) for plan in plans)
        both, either = both + len(one & two), either + len(one | two)
    return both / either


_RANK = """
import sys, torch
from accelerate import PartialState
torch.distributed.init_process_group("gloo")  # NCCL refuses two processes on one device
sys.path.insert(0, sys.argv[1])
import gpu
gpu.set_quiet(True)
if torch.cuda.is_available():
    torch.cuda.set_device(0)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
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
    """How far two processes on one device choose the channels that one chooses."""
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
            rows.append({"network": name, "kept_by_both": kept_by_both(*plans)})
            print(*rows[-1].values(), sep="  ", flush=True)
    return rows


Command = tuple[list[str], Path]
"""What runs, and where it writes."""
WAVES = ((("latency",), 6), (("scoring",), 2), (("repair",), 1), (("parity", "ranks", "trained"), 3))
"""Parts that run at once, and their share of the time. What a part leaves over goes to the next ones."""


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[Command]]:
    """The commands of each part, which run at once."""
    quick = ["--quick"] if options.quick else []
    tested, timed = (("mobilenetv2_035",), ("mobilenetv2",)) if options.quick else (NETWORKS, TIMED)
    # Each batch size by itself, so that the many compilations run at once. Half of the time is sought at a large batch
    # only: for a small one a GPU takes the same time however few channels there are.
    settings = [quick] if options.quick else [
        ["--dtypes", dtype, "--batches", size, *QUICKLY, "--latency-batch", size, "--plans",
         "half,any,latency" if (dtype, size) == ("bf16", "256") else "half"]
        for dtype in ("bf16", "fp16") for size in ("256", "64", "1")
    ]  # fmt: skip
    lock = ["--lock", str(folder / "lock")]
    found: dict[str, list[list[str]]] = {
        "parity": [["gpu.py", *quick, "--part", "parity", "--only", name] for name in tested],
        "ranks": [["gpu.py", *quick, "--part", "ranks", "--only", name] for name in tested],
        "latency": [["latency.py", "--only", name, *lock, *setting] for name in timed for setting in settings],
        "scoring": [["scoring.py", *(quick or ["--what", "forward,scap-set"])]],
        "repair": [["repair.py", *quick]],
    }
    if options.data.is_dir():
        weights = ["--mobilenet-weights", str(options.mobilenet_weights)] if options.mobilenet_weights else []
        given = [*weights, "--data", str(options.data), "--out", str(options.out), *(quick or TRAINED)]
        found["trained"] = [["accuracy.py", *given]]
    return {
        part: [
            ([sys.executable, str(HERE / script), *rest, "--json", str(folder / f"{part}-{number}.json")],
             folder / f"{part}-{number}.json")
            for number, (script, *rest) in enumerate(listed)
        ]
        for part, listed in found.items()
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parts one after the other, and writes after each what has been found."""
    start, whole = time.perf_counter(), 60 * options.minutes
    command = f"python benchmarks/gpu.py --minutes {options.minutes:g} --parts {options.parts}"
    about = {"command": command, "device": device_name(torch.device(device())), "torch": torch.__version__}
    found: dict[str, Any] = {**about, "left_out": [], **{part: [] for wave, _ in WAVES for part in wave}}
    with tempfile.TemporaryDirectory() as folder:
        parts = commands(options, Path(folder))
        waves = [([part for part in wave if part in options.parts.split(",")], share) for wave, share in WAVES]
        waves = [(wave, share) for wave, share in waves if wave]
        end = start
        for together, share in waves:
            end += whole * share / sum(share for _, share in waves)
            print(f"\n{', '.join(together)}; {max(0, end - time.perf_counter()):.0f} seconds at most", flush=True)
            running = {part: [_started(command, end) for command, _ in parts.get(part, [])] for part in together}
            for part, processes in running.items():
                ends = [_end(process, end) for process in processes]
                wrong = sorted({text for text in ends if text}) if ends else ["no data"]
                found["left_out"] += [f"{part}: {text}" for text in wrong]
                found[part] = [row for _, out in parts.get(part, []) if out.exists() for row in _rows(out)]
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} seconds; not finished: {', '.join(found['left_out']) or 'nothing'}")
    return found


def _started(command: list[str], end: float) -> subprocess.Popen | None:
    """The command in processes of its own, unless the time is over."""
    seconds = end - time.perf_counter()
    limit = ["--minutes", f"{(seconds - 20) / 60:.2f}"] if command[1].endswith("accuracy.py") else []
    return subprocess.Popen([*command, *limit], start_new_session=True) if seconds > 0 else None


def _end(process: subprocess.Popen | None, end: float) -> str:
    """Waits till then at most. Returns what is wrong with how it ended, if anything."""
    if process is None:
        return "no time left"
    try:
        code = process.wait(max(end - time.perf_counter(), 0.001))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "stopped"
    return f"exit code {code}" if code else ""


def _rows(path: Path) -> list[Any]:
    """What a part has written, as rows."""
    document = json.loads(path.read_text())
    return document if isinstance(document, list) else document.get("rows", [document])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing is begun or goes on")
    parser.add_argument(
        "--quick", action="store_true", help="one network at 32 pixels, and the quick form of each part"
    )
    parser.add_argument("--data", type=Path, default=FOLDER, help="of the part that trains, as for accuracy.py")
    parser.add_argument("--mobilenet-weights", type=Path, help="as for accuracy.py")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="as for accuracy.py")
    parser.add_argument("--parts", default=",".join(part for wave, _ in WAVES for part in wave), help="what to measure")
    parser.add_argument("--part", choices=("parity", "ranks"), help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_quiet(True)
    if options.part:
        measured = {"parity": parity, "ranks": ranks}[options.part]
        options.json.write_text(json.dumps(measured([options.only], 16, 32 if options.quick else 64), indent=1))
        return None
    if not torch.cuda.is_available() and not options.quick:
        parser.error("there is no GPU here; --quick tries the parts on the CPU")
    return run(options)


if __name__ == "__main__":
    main()
