"""Runs that are interrupted: what is taken up, what is refused, and who may write where."""

import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import scap_hub
from scap_hub import criteria
from scap_hub.errors import CheckpointError, PublishError, ScapHubError, TargetError
from scap_hub.run.fingerprints import of_images
from scap_hub.run.result import Result
from scap_hub.training.data import load_data
from scap_hub.zoo.base import Preprocessing
from tests.nets import Residual
from tests.test_cli import TINY
from tests.test_pruning import QUICK, images


def stop(*_, **__):
    raise KeyboardInterrupt


def prune(folder, data=None, width=16, seed_of_model=0, kind=Residual, **changes):
    torch.manual_seed(seed_of_model)
    arguments = {"model_input_size": (3, 32, 32), "output_dir": folder / "out", "data_batch_size": 8, **changes}
    return scap_hub.prune(kind(width=width), data or images(), QUICK, **arguments)


def cut(monkeypatch, folder, at="scap_hub.run.pruning.Result", **changes):
    """A run that is interrupted when it calls something; by default when all but the saving is done."""
    with monkeypatch.context() as patch:
        patch.setattr(at, stop)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, **changes)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run that was interrupted when all but the saving was done."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, folder, criterion_options={})
    return folder


RESUMED = {"criterion_diagnostics": True, "schedule_steps": 2, "target": "macs=0.6", "finetune_epochs": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with the result of a run, and the result."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, prune(folder, **RESUMED)


def plain(report):
    """A report without its seconds."""
    history = [{**row, "seconds": 0} for row in report.history]
    return replace(report, stages={}, history=history)


def same_weights(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def coloured(seed):
    pixels = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(pixels, torch.arange(16) % 5), batch_size=8)


def relabelled():
    return DataLoader(TensorDataset(images().dataset.tensors[0], torch.arange(16) % 4), batch_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "random"}, "recipe key criterion.name: was 'scap', now 'random'"),
        ({"target": "macs=0.7"}, "recipe key target.macs: was 0.5, now 0.7"),
        ({"seed": 1}, "recipe key seed: was 0, now 1"),
        ({"finetune_learning_rate": 0.5}, "recipe key finetune.learning_rate: was 0.001, now 0.5"),
        (
            {"data_calibration_images": 4},
            "data.calibration_images: was 8, now 4; the calibration images differ",
        ),
        ({"data": coloured(7)}, "the calibration images differ; the train set differs"),
        ({"data": relabelled()}, "the train set differs"),
        ({"seed_of_model": 5}, "differs: the model's weights differ; repeat"),
        ({"width": 24}, "the model's architecture differs"),
    ],
)
def test_another_run_is_refused_and_begins_anew_only_if_told(change, message, tmp_path, interrupted):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(CheckpointError) as error:
        prune(tmp_path, criterion_options={}, **change)
    assert message in str(error.value) and "--restart" in str(error.value) and "\n" not in str(error.value)
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert prune(tmp_path, restart=True, criterion_options={}, **change).report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_int8_makes_another_run_where_latency_is_measured_in_a_runtime(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    options = {"target": {"ratio": 0.5, "runtime": "onnxruntime"}}
    cut(monkeypatch, tmp_path, **options)
    with pytest.raises(CheckpointError, match=r"differs: recipe key deploy\.int8: was False, now True"):
        prune(tmp_path, deploy_int8=True, **options)


@pytest.mark.parametrize("at", ["select_step", "refine", "verified", "repaired", "finetune", "measure_after", "Result"])
def test_a_resumed_run_equals_an_undisturbed_one(at, tmp_path, monkeypatch, undisturbed):
    folder, whole = undisturbed
    if at == "measure_after":
        measured = []
        measure = scap_hub.run.pruning.measure
        with monkeypatch.context() as patch:
            patch.setattr(
                scap_hub.run.pruning, "measure", lambda *a: stop() if measured else measured.append(1) or measure(*a)
            )
            with pytest.raises(KeyboardInterrupt):
                prune(tmp_path / "cut", **RESUMED)
    else:
        cut(monkeypatch, tmp_path / "cut", f"scap_hub.run.pruning.{at}", **RESUMED)
    torch.rand(3)
    resumed = prune(tmp_path / "cut", **RESUMED)
    assert plain(resumed.report) == plain(whole.report) and resumed.plan == whole.plan
    same_weights(resumed.model, whole.model)
    left, right = (load_file(own / "out" / "model.safetensors") for own in (tmp_path / "cut", folder))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_nothing_is_computed_twice(tmp_path, monkeypatch):
    cut(monkeypatch, tmp_path, criterion_diagnostics=True)
    for name in ("select_step", "refine", "verified", "repaired", "measure"):
        monkeypatch.setattr(f"scap_hub.run.pruning.{name}", stop)
    monkeypatch.setattr("scap_hub.run.score_cache.diagnose", stop)
    monkeypatch.setattr(criteria.Scap, "score", stop)
    monkeypatch.setattr("scap_hub.training.finetune._epoch", stop)
    assert prune(tmp_path, criterion_diagnostics=True).report.groups


def test_a_data_set_is_read_once_for_the_identity_of_a_run(monkeypatch):
    data = load_data("digits", Preprocessing((1, 32, 32), (0.5,), (0.5,)))
    read = []
    monkeypatch.setattr("scap_hub.run.fingerprints._add_rows", lambda _, rows: read.append(len(rows)))
    found = of_images({"train": data.train, "validation": data.validation, "test": data.test, "no": None})
    assert sorted(read) == [360, 1437] and len(set(found.values())) == 4 and found["no"] == "none"


class Named(Dataset):
    """A data set of one's own, of files by name."""

    def __init__(self, folder):
        self.names = np.array(sorted(str(path) for path in folder.rglob("*.bmp")))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return transforms.functional.to_tensor(Image.open(self.names[index])), index % 2


PICTURES = transforms.Compose([transforms.ToTensor()])


@pytest.mark.parametrize("limit", [2**28, 10_000])
@pytest.mark.parametrize(
    "source",
    [
        str,
        lambda folder: ImageFolder(folder / "train"),
        lambda folder: DataLoader(ConcatDataset([ImageFolder(folder / "train", PICTURES)]), batch_size=2),
        lambda folder: DataLoader(Named(folder), batch_size=2),
    ],
    ids=["folder", "ImageFolder", "loader", "own"],
)
def test_an_image_that_another_of_the_same_size_replaces_makes_another_data_set(source, limit, tmp_path, monkeypatch):
    monkeypatch.setattr("scap_hub.run.fingerprints.WHOLE", limit)
    files = [tmp_path / "train" / name / f"{i}.bmp" for name in ("left", "right") for i in range(3)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (0, 0, 200)).save(file)

    def found():
        return of_images({"train": load_data(source(tmp_path), Preprocessing((3, 32, 32), (0.5,), (0.5,))).train})

    before = found()
    assert found() == before
    size = files[4].stat().st_size
    Image.new("RGB", (40, 40), (0, 0, 201)).save(files[4])
    assert files[4].stat().st_size == size and found() != before


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_file_of_an_unfinished_run_can_run_code(tmp_path, monkeypatch):
    cut(monkeypatch, tmp_path / "run", criterion_diagnostics=True, evaluate_latency=True)
    kept = tmp_path / "run" / ".out.unfinished"
    files = [path.relative_to(kept) for path in kept.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {"", ".json", ".safetensors", ".pt"} and len(files) > 8
    read = 0
    for how in (pickle.dumps, lambda value: _saved(value, tmp_path)):
        for file in files:
            shutil.copytree(tmp_path / "run", tmp_path / "trial")
            (tmp_path / "trial" / ".out.unfinished" / file).write_bytes(how(Planted(tmp_path / "executed")))
            try:
                prune(tmp_path / "trial", criterion_diagnostics=True, evaluate_latency=True)
            except ScapHubError as error:
                read += 1
                assert file.name in str(error) or "checkpoint-" in str(error)
            else:
                assert file.name in ("lock", "holder.json"), file
            assert not (tmp_path / "executed").exists(), file
            shutil.rmtree(tmp_path / "trial")
    assert read == 2 * (len(files) - len([file for file in files if file.name in ("lock", "holder.json")]))


def _saved(value, folder):
    torch.save(value, folder / "planted.pt")
    return (folder / "planted.pt").read_bytes()


def test_a_kill_between_saving_and_cleaning_up_is_finished(tmp_path, monkeypatch):
    whole = prune(tmp_path / "whole")
    cut(monkeypatch, tmp_path, "scap_hub.run.unfinished._remove")
    saved = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(CheckpointError, match="differs: recipe key seed"):
        prune(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="holds a finished model"):
        prune(tmp_path, restart=True)
    same_weights(prune(tmp_path).model, whole.model)
    assert (tmp_path / "out" / "report.json").read_bytes() == saved
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, PublishError("no network")])
@pytest.mark.parametrize("epochs", [0, 1])
def test_what_was_not_published_is_published_by_the_same_call(tmp_path, monkeypatch, error, epochs):
    pushed = []

    def push(*arguments):
        pushed.append(arguments)
        if len(pushed) == 1:
            raise error
        return "https://me/x"

    monkeypatch.setattr("scap_hub.run.pruning.push_to_hub", push)
    options = {"publish_repo_id": "me/x", "publish_private": True, "finetune_epochs": epochs}
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        prune(tmp_path, **options)
    saved = (tmp_path / "out" / "report.json").read_bytes()
    prune(tmp_path, **options)
    assert pushed == [(tmp_path / "out", "me/x", True)] * 2
    assert (tmp_path / "out" / "report.json").read_bytes() == saved
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_cleaning_up_leaves_a_finished_run(tmp_path, monkeypatch):
    whole = shutil.rmtree

    def killed(folder, **options):
        if not (saved := Path(folder) / "saved.json").exists():
            return whole(folder, **options)
        saved.unlink()
        stop()

    with monkeypatch.context() as patch:
        patch.setattr("scap_hub.files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path)
    [left] = [path for path in tmp_path.iterdir() if path.name != "out"]
    left.rename(left.with_name(left.name.replace(f".{os.getpid()}.", f".{gone()}.")))
    with pytest.raises(CheckpointError, match="holds a finished model"):
        prune(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def gone():
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_kill_while_saving_leaves_nothing_for_ever(tmp_path, monkeypatch):
    cut(monkeypatch, tmp_path)
    from scap_hub.files import _HOST

    dead = tmp_path / f".out.{_HOST}.{gone()}.unfinished"
    dead.mkdir()
    again = tmp_path / f".out.{_HOST}.{os.getpid()}.unfinished"
    again.mkdir()  # a container that starts again gives its processes the same numbers
    alive = tmp_path / f".out.{_HOST}.{os.getppid()}.unfinished"
    alive.mkdir()
    prune(tmp_path)
    assert alive.exists() and not dead.exists() and not again.exists()


@functools.lru_cache
def table(channels):
    return torch.linspace(0.5, 1.5, channels)


class Remembering(Residual):
    """Multiplies by a table that a function remembers, as RT-DETR does with its anchors."""

    def forward(self, x):
        return super().forward(x * table(3).view(1, 3, 1, 1))


def test_a_kill_before_the_pruned_model_is_measured(tmp_path, monkeypatch):
    whole = prune(tmp_path / "whole", kind=Remembering)
    cut(monkeypatch, tmp_path, "scap_hub.run.pruning.lower_precision", kind=Remembering)
    table.cache_clear()  # the process that goes on has computed nothing yet
    again = prune(tmp_path, kind=Remembering)
    same_weights(again.model, whole.model)
    assert again.report.after == whole.report.after
    assert type(table(3)) is torch.Tensor


def test_one_run_a_folder(tmp_path, monkeypatch):
    inside, whole = [], Result.report_json

    def again(self):
        with pytest.raises(CheckpointError, match=rf"another run \(process {os.getpid()} on .*is writing to"):
            prune(tmp_path)
        inside.append(1)
        return whole(self)

    monkeypatch.setattr(Result, "report_json", again)
    prune(tmp_path)
    assert inside and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mistake_after_a_resume_loses_nothing(tmp_path, monkeypatch):
    cut(monkeypatch, tmp_path, "scap_hub.run.pruning.select_step")
    with pytest.raises(ScapHubError):
        prune(tmp_path, data_dataset="no-such", data=datasets.Dataset.from_dict({"x": [1]}))
    assert list((tmp_path / ".out.unfinished" / "scores").iterdir())
    with pytest.raises(TargetError):
        prune(tmp_path / "a" / "b", target="params=0.0001")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("place", ["here", "above", "file", "link", "missing"])
def test_where_a_result_cannot_go_is_told_before_any_work(place, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    (tmp_path / "file").write_text("")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if place in ("link", "missing"):
        prune(
            tmp_path / place / "deep" if place == "missing" else tmp_path,
            **({} if place == "missing" else {"output_dir": tmp_path / "link"}),
        )
        out = tmp_path / ("real" if place == "link" else "missing/deep/out")
        assert scap_hub.load(out, model=Residual(width=16)) and (tmp_path / "link").is_symlink()
        return
    out = {"here": ".", "above": "..", "file": tmp_path / "file" / "out"}[place]
    with pytest.raises(CheckpointError):
        scap_hub.prune("no-such-model", "no-such-data", output_dir=out)


def test_a_full_disk_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    monkeypatch.setattr("scap_hub.run.pruning.prune_loaded", stop)
    with pytest.raises(CheckpointError, match=r"the run needs up to .* MB are free; make room"):
        prune(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/dev/full", "/dev/full is no folder"), ("file/out", "file is no folder"), ("file", "file is no folder"),
        ("~nobody-there/out", "is no path"), ("long" * 100, "is no path: File name too long"),
        (" ", "is blank"), ("below/ ", "has a blank name"), ("round", "a link that leads back to itself"),
    ],
)  # fmt: skip
def test_a_dry_run_too_says_where_a_result_cannot_go(out, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to("round")
    for call in (scap_hub.prune, scap_hub.forecast):
        with pytest.raises(ScapHubError, match=message):
            call("no-such-model", "no-such-data", output_dir=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "file", "round"]


@pytest.mark.parametrize("name", ["", " ", "long" * 100, "~nobody-there/x"])
def test_names_that_can_be_no_path_are_told(name):
    message = "is no path|is blank"
    for arguments in ({"model": name}, {"dataset": name}, {"recipe": name or " "}, {"checkpoint": name or " "}):
        with pytest.raises(ScapHubError, match=message):
            scap_hub.forecast(**{"model": "test_resnet", "dataset": "digits", **arguments}, model_pretrained=False)


@pytest.mark.parametrize(("options", "message"), [("ro", "is read-only, or not yours"), ("size=64k", "make room")])
def test_a_real_read_only_or_full_disk_is_told_before_any_work(options, message, tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only an administrator may mount a file system")
    try:
        monkeypatch.setattr("scap_hub.run.pruning.prune_loaded", stop)
        with pytest.raises(CheckpointError, match=message):
            prune(tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        *(pytest.param(*own, marks=pytest.mark.slow) for own in ((signal.SIGHUP, 129), (signal.SIGINT, 130))),
    ],
)
def test_signals_end_a_command_with_one_line_and_it_goes_on(number, code, tmp_path):
    command = [sys.executable, "-m", "scap_hub", *TINY, "--set", "finetune_epochs=500", "--out", str(tmp_path / "out")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.unfinished/training-0/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == code, error
    last = error.splitlines()[-1].rpartition("\r")[2]
    assert "interrupted" in last and "with the same --out" in last and "Traceback" not in error
    assert json.loads((tmp_path / ".out.unfinished" / "run.json").read_text())
    assert list(tmp_path.glob(".out.unfinished/training-0/checkpoint-*"))
