"""The import check finds what it is there to find; the size script counts what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(tool, *arguments):
    ran = subprocess.run([sys.executable, ROOT / "tools" / tool, *arguments], capture_output=True, text=True)
    assert not ran.stderr, ran.stderr
    return ran.returncode, ran.stdout


@pytest.fixture
def package(tmp_path):
    """Writes files of a package that is laid out like ours; returns its folder."""

    def write(files):
        for name, text in {"__init__": "", "errors": "", **files}.items():
            path = tmp_path / "scap_hub" / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path / "scap_hub"

    return write


def test_imports_that_run_downwards_are_fine(package):
    code, output = run(
        "imports.py", package({"plan": "from scap_hub.errors import E\nimport torch", "cli": "import scap_hub"})
    )
    assert code == 0 and "2 imports" in output


@pytest.mark.parametrize(
    "text",
    [
        "\nfrom scap_hub.run.prune import prune",
        "\nfrom scap_hub.run import prune",
        "\nimport scap_hub.run.prune",
        "\nfrom .run.prune import prune",
        "\nfrom . import run",
        "\nif TYPE_CHECKING: from scap_hub.run.prune import prune",
        "\ndef late(): from scap_hub.run.prune import prune",
        "\nprune = importlib.import_module('scap_hub.run.prune')",
        "\nfrom scap_hub import __version__",
    ],
)
def test_an_import_that_runs_up_is_named_with_its_line(package, text):
    folder = package({"plan": text, "run/__init__": "", "run/prune": ""})
    code, output = run("imports.py", folder)
    assert code == 1 and "scap_hub/plan.py:2: plan imports scap_hub" in output, output


@pytest.mark.parametrize("under", ["", "if TYPE_CHECKING: ", "def late(): "])
def test_a_cycle_inside_a_layer_is_printed_once(package, under):
    folder = package(
        {
            "channels/a": "from scap_hub.channels import b",
            "channels/b": "from scap_hub.channels.c import X",
            "channels/c": f"import ast\n{under}from scap_hub.channels import a",
        }
    )
    code, output = run("imports.py", folder)
    assert code == 1 and output.count("a cycle") == 1
    assert (
        "a.py:1: a cycle: scap_hub.channels.a -> scap_hub.channels.b -> scap_hub.channels.c -> scap_hub.channels.a"
        in output
    )


def test_a_package_that_a_file_of_it_imports_is_a_cycle(package):
    files = {
        "__init__": "from scap_hub.channels.groups import verify",
        "groups": "from scap_hub.channels import verify",
    }
    code, output = run("imports.py", package({f"channels/{name}": text for name, text in files.items()}))
    assert code == 1 and "scap_hub.channels -> scap_hub.channels.groups -> scap_hub.channels" in output


def test_a_file_without_a_layer_is_named(package):
    code, output = run("imports.py", package({"helpers": ""}))
    assert code == 1 and "no layer names 'helpers'" in output


def test_the_picture_shows_every_layer(package):
    code, output = run(
        "imports.py", package({"plan": "import scap_hub.errors", "cli": "import scap_hub.plan"}), "--picture"
    )
    rows = [line.split(maxsplit=1) for line in output.splitlines()]
    assert code == 0 and ["cli", "plan"] in rows and ["plan", "errors"] in rows
    assert rows.index(["cli", "plan"]) < rows.index(["plan", "errors"]) < rows.index(["errors"])


def test_size_counts_without_docstrings(tmp_path):
    body = "\n".join(f"    x{i} = {i}" for i in range(60))
    (tmp_path / "long.py").write_text(f"def long():\n{body}\n")
    (tmp_path / "told.py").write_text('def told():\n    """' + "\n" * 60 + '    """\n    return 1\n' + "\n" * 400)
    _, output = run("size.py", tmp_path)
    assert output.startswith("524 lines in 2 files, 2 functions")
    assert "1 files over 400 lines" in output and "1 functions over 50 lines" in output
    assert "long.py:1 long" in output and "  61 " in output
