"""The documentation says what the code does, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from scap_hub.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOOR = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
"""Pages for those who work on it."""


@pytest.mark.skipif(
    "additionalProperties" not in TypeAdapter(dict[str, Any]).json_schema(),
    reason="pages are generated with today's pydantic, which writes schemas otherwise than 2.10 does",
)
def test_generated_pages_are_up_to_date():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    ran = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_code_are_valid(page):
    for language, text in re.findall(r"^```(python|yaml)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if language == "python":
            compile(text, page.name, "exec")
        else:
            Recipe.resolve(yaml.safe_load(text))


@pytest.mark.parametrize("page", [*DOOR, ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_files_and_make_targets_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(
        r"(?<![\w/.-])((?:\.github|benchmarks|docs|examples|scap_hub|tests|tools)/[\w./-]*\w)", text
    ):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target


def test_the_citation_names_the_paper():
    document = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert document["cff-version"] == "1.2.0" and document["authors"] and document["title"] == "scap_hub"
    assert "2601.09352" in document["preferred-citation"]["url"]


def test_the_site_builds_and_a_broken_link_is_an_error(tmp_path):
    pytest.importorskip("mkdocs")

    def build(config):
        command = [sys.executable, "-m", "mkdocs", "build", "--config-file", config, "--site-dir", tmp_path / "site"]
        return subprocess.run(command, capture_output=True, text=True)

    built = build(ROOT / "mkdocs.yml")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "troubleshooting" / "index.html").is_file()
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        (tmp_path / "docs" / page.name).write_text(page.read_text().replace("(data.md)", "(date.md)"))
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    broken = build(tmp_path / "mkdocs.yml")
    assert broken.returncode != 0 and "date.md" in broken.stderr
