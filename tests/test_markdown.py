"""Names in model cards are text, whatever they hold; cards of others are read, whatever they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from scap_hub.hub.card import BEGIN, END, Measured, merged_card, model_card
from scap_hub.markdown import code, escaped, fenced, metadata
from tests.test_checkpoint import pruned

HOSTILE = [
    "a|b", "`tick`", "``two``", "<script>alert(1)</script>", "[text](http://x)", "*bold*", "__init__", "_a_", "x\ny",
    "# title", END, BEGIN, "```\nfence", "a\\", "&lt;b&gt;", "![i](x)", "~~gone~~", "---", "| x |",
]  # fmt: skip


def text_of(markdown: str) -> str:
    """What a reader sees of Markdown, and nothing but text and code in it."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
    seen = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in seen} <= {"text", "code_inline", "text_special", "softbreak"}, seen
    return "".join(child.content for child in seen)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is(name):
    line = " ".join(name.split())
    assert text_of(f"name {escaped(name)} end") == f"name {line} end"
    assert text_of(f"| {code(name)} |\n|---|\n| {code(name)} |") == line * 2
    assert text_of(f"| {escaped(name)} |\n|---|\n| {escaped(name)} |") == line * 2


@pytest.mark.parametrize("name", HOSTILE)
def test_a_block_of_code_holds_anything(name):
    tokens = MarkdownIt().parse(fenced(f"a\n{name}", "yaml"))
    assert [(token.type, token.content) for token in tokens] == [("fence", f"a\n{name}\n")]


@pytest.fixture(scope="module")
def resnet():
    return pruned("test_resnet", num_classes=4, labels=["a", "b", "c", "d"])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_survives_hostile_names(name, resnet):
    _, loaded, plan = resnet
    loaded = replace(loaded, name=name)
    measured = Measured({"top1": 0.9, "latency_ms": 2.0}, {"top1": 0.8, "latency_ms": 1.0}, name, device=name)
    text = model_card(loaded, plan, measured, f"model:\n  name: x\n# {name!r}\n")
    assert ModelCard(text).data.model_name == f"{name}, pruned"
    merged = merged_card(f"# Mine\n\n{text.partition('---')[2].partition('---')[2]}\n\nlast words", text)
    again = merged_card(merged, text)
    assert again == merged and merged.startswith("---") and merged.rstrip().endswith("last words")
    assert sum(line == BEGIN for line in merged.splitlines()) == 1


@pytest.mark.parametrize(
    "theirs",
    ["a: [", "a: 2024-13-45", "a: " + "9" * 5000, "? [x]\n: 1", "[" * 5000, "- 1", "a: !!python/name:os.system"],
)
def test_a_broken_card_is_text_alone(theirs):
    assert metadata(f"---\n{theirs}\n---\nwords") == ({}, "words")
    assert "words" in merged_card(f"---\n{theirs}\n---\nwords", f"---\nlicense: mit\n---\n{BEGIN}\nours\n{END}\n")
