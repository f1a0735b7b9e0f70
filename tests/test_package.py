"""What users install: light to import, and complete outside the checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

import scap_hub

ROOT = Path(__file__).parents[1]
TIMED = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import scap_hub
print(time.perf_counter() - start, *{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_import_is_light():
    seconds, *imported = _python(TIMED, cwd=ROOT).split()
    assert float(seconds) < 0.3
    heavy = {"timm", "transformers", "datasets", "accelerate", "huggingface_hub", "matplotlib", "pydantic"}
    assert not heavy & set(imported)


def test_the_version_stands_in_one_place():
    """A wheel's metadata is compared below; that of an editable install is as old as the install."""
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in settings and '[tool.hatch.version]\npath = "scap_hub/version.py"' in settings
    assert scap_hub.__version__ not in settings
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", scap_hub.__version__)


def test_types_are_marked_as_checked():
    assert (Path(scap_hub.__file__).parent / "py.typed").is_file()


def test_workflow_and_hooks_run_make_targets_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert all(hook["entry"].removeprefix("make ") in targets for hook in hooks)
    for job in workflow["jobs"].values():
        called = [step["run"].split()[:2] for step in job["steps"] if "run" in step]
        assert called and all(make == "make" and target in targets for make, target in called)
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.10,<3.14"' in (ROOT / "pyproject.toml").read_text()


SMOKE = """
import sys
import scap_hub
from importlib.metadata import version
from pathlib import Path
assert version("scap-hub") == scap_hub.__version__
assert (Path(scap_hub.__file__).parent / "py.typed").is_file()
assert Path(scap_hub.__file__).is_relative_to(sys.prefix), scap_hub.__file__
from scap_hub.recipe import shipped_recipes
assert len(shipped_recipes()) >= 7 and all(path.is_relative_to(sys.prefix) for path in shipped_recipes().values())
import torch
from torch import nn
net = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)
result = scap_hub.prune(
    net, "digits", "half-macs", output_dir="out", criterion="l1", finetune_epochs=1, model_input_size=(1, 8, 8),
    evaluate_latency=False,
)
again = scap_hub.load("out", model=net)
x = torch.randn(2, 1, 8, 8)
assert torch.equal(again(x), result.model(x))
assert Path("out/README.md").read_text().startswith("---")
assert "report.css" not in Path("out/report.html").read_text() and "<style>:root" in Path("out/report.html").read_text()
print("well")
"""


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    """Builds it, and installs it beside the dependencies of this environment; nothing is downloaded."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    built = [*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(built, check=True, timeout=300)
    (wheel,) = tmp_path.glob("scap_hub-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(home)})
    # Only the folder itself is added, not the editable install that a .pth file in it names.
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(home / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    assert _python(SMOKE, cwd=tmp_path, python=python) == "well"
    listed = subprocess.run(
        [home / "bin" / "scap-hub", "recipe", "show", "half-macs"], cwd=tmp_path, capture_output=True, text=True
    )
    assert listed.returncode == 0 and "macs: 0.5" in listed.stdout, listed.stderr


def _python(script, cwd, python=sys.executable):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run([python, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.strip()
