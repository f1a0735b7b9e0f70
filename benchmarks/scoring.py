"""What scoring costs, against a plain forward pass and against SCAP with every field materialised.

    python benchmarks/scoring.py --json out/scoring.json
    python benchmarks/scoring.py --quick                        # VGG16 and small inputs

Each figure is seconds (CPU time of all threads, in a process of its own, or a GPU's wall clock), and peak memory above
what the model and the images take. The materialised reference scores VGG16's convolutions only, on as many images
as fit; "scap" beside it scores the same. "Spectra" is SCAP without autoencoders: the forward passes, what is kept of
them, and its normalisation. Weights are random: the cost does not depend on them. Runs on the GPU where
there is one; `OMP_NUM_THREADS` is yours.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = (("vgg16_bn", 32), ("resnet50", 224), ("convnext_tiny", 224), ("mobilenetv2_100", 224))
CRITERIA = {
    "scap": ("scap", {}),
    "scap, pca": ("scap", {"autoencoder": "pca"}),
    "l1": ("l1", {}),
    "taylor": ("taylor", {}),
    "activation": ("activation", {}),
    "hrank": ("hrank", {}),
    "obs": ("obs", {}),
    "scap-set": ("scap-set", {}),
}
LATENT, BINS = 16, 7


def materialised(model: Any, taps: list[Any], batches: list[Any]) -> None:
    """SCAP with every complex field built, as the paper describes it; PCA is the cheapest autoencoder there is."""
    import torch

    from scap_hub.criteria.calibration import watch

    def fidelity(x: Any, y: Any) -> Any:
        y = torch.nn.functional.interpolate(y, x.shape[2:], mode="bilinear")
        field = x[:, None] + 1j * y[:, :, None]  # (N, K, C, H, W)
        field = torch.fft.fft2(field, norm="ortho")
        for axis in (3, 4):
            low = torch.fft.fftfreq(min(BINS, field.shape[axis])) * min(BINS, field.shape[axis])
            field = field.index_select(axis, (low.round().long() % field.shape[axis]).to(field.device))
        field = field - field.mean(0)
        samples = torch.view_as_real(field).flatten(2).flatten(0, 1)
        samples = samples / samples.norm(dim=1, keepdim=True).clamp(min=1e-30)
        directions = torch.svd_lowrank(samples, LATENT + 8)[2][:, :LATENT]
        return (
            torch.cosine_similarity(samples, samples @ directions @ directions.T).unflatten(0, field.shape[:2]).mean(0)
        )

    for tap in taps:
        pairs = [both for (both,) in watch(model, [tap], batches, lambda _, x: x, lambda _, x, y: (x, y))]
        fidelity(*(torch.cat(part) for part in zip(*pairs, strict=True)))


def measure(name: str, size: int, images: int, batch: int, what: str) -> dict[str, Any]:
    """Seconds and peak bytes of one job in this process."""
    import timm
    import torch

    from scap_hub import channel_groups, score
    from scap_hub.criteria.scap.sweep import fields
    from scap_hub.progress import set_quiet

    set_quiet(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).eval()
    batches = list(torch.randn(images, 3, size, size, device=device).split(batch))
    if what.startswith("convolutions"):
        model = model.features
    groups = [group for group in channel_groups(model, batches[0][:1]) if group.prunable]
    with torch.no_grad():
        model(batches[0][:2])

    def job() -> None:
        if what == "forward":
            with torch.no_grad():
                for images in batches:
                    model(images)
        elif what == "spectra":
            taps = [tap for group in groups for tap in group.taps]
            list(fields(model, taps, batches, BINS, True, lambda tap, field: None))
        elif what == "convolutions, materialised":
            materialised(model, [tap for group in groups for tap in group.taps], batches)
        else:
            criterion, options = CRITERIA[what.removeprefix("convolutions, ")]
            score(model, batches, criterion, groups=groups, **options)
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        job()  # kernels are compiled and tuned on their first run
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _kilobytes("VmRSS") * 1024
    # On the CPU its own time, or whoever else computes there would count.
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    job()
    seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _kilobytes("VmHWM") * 1024
    chip = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {"seconds": seconds, "bytes": max(peak - before, 0), "device": chip}


def _kilobytes(key: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


def _apart(name: str, size: int, images: int, batch: int, what: str) -> dict[str, Any] | str:
    """As `measure`, in a process of its own on the CPU, whose memory is the process's; or what went wrong."""
    import torch

    if torch.cuda.is_available():
        try:
            return measure(name, size, images, batch, what)
        except torch.cuda.OutOfMemoryError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--one", name, str(size), str(images), str(batch), what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:150] if done.stderr else "killed"
    return json.loads(done.stdout)


def jobs(quick: bool, images: int, only: str, extended: bool, asked: str) -> list[tuple[str, int, int, int, str]]:
    """(model, size, images, batch size, what) of every row."""
    rows: list[tuple[str, int, int, int, str]] = []
    for name, size in MODELS:
        if only not in name or (quick and name not in ("vgg16_bn", "mobilenetv2_100")):
            continue
        count, size = (64, min(size, 64)) if quick else (images, size)
        if asked:
            rows += [(name, size, count, min(count, 64), what) for what in asked.split(",")]
            continue
        if name == "vgg16_bn":
            for fits in (8,) if quick else (16,):
                rows += [(name, size, fits, fits, f"convolutions, {what}") for what in ("materialised", "scap, pca")]
        listed = ["spectra", *(CRITERIA if extended else ("scap", "scap, pca", "scap-set"))]
        rows += [(name, size, count, min(count, 64), what) for what in ("forward", *listed)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two models, 64 images of at most 64 x 64")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--extended", action="store_true", help="the rivals too")
    parser.add_argument("--what", default="", help="only these, such as forward,scap-set")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, size, images, batch, what = options.one
        print(json.dumps(measure(name, int(size), int(images), int(batch), what)))
        return
    rows: list[dict[str, Any]] = []
    reference: dict[str, Any] = {}
    print(f"{'model':18} {'images':>12} {'':28} {'seconds':>9} {'MB':>9} {'time':>8} {'memory':>8}")
    for name, size, images, batch, what in jobs(
        options.quick, options.images, options.only, options.extended, options.what
    ):
        measured = _apart(name, size, images, batch, what)
        if isinstance(measured, str):
            print(f"{name:18} {what}: {measured}", flush=True)
            continue
        row = {"model": name, "size": size, "images": images, "batch": batch, "what": what} | measured
        if what in ("forward", "convolutions, materialised"):
            reference = row
        row["times_reference"] = {key: row[key] / max(reference[key], 1) for key in ("seconds", "bytes")}
        row["times_reference"]["seconds"] = row["seconds"] / reference["seconds"]
        rows.append(row)
        times = row["times_reference"]
        print(
            f"{name:18} {f'{images} x {size}':>12} {what:28} {row['seconds']:9.2f} {row['bytes'] / 1e6:9.0f} "
            f"{times['seconds']:7.3f}x {times['bytes']:7.3f}x",
            flush=True,
        )
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
