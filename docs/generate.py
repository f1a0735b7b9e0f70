"""Writes what follows from the code: docs/recipes.md and recipes/recipe.schema.json. `--check` only compares."""

import json
import sys
from pathlib import Path
from typing import Any

from scap_hub.recipe import recipe_schema, shipped_recipes

ROOT = Path(__file__).parents[1]
HEAD = """\
<!-- Written by docs/generate.py from the code; do not edit. -->
# Recipes

A recipe is one YAML document that says everything a run does. Every block and every key may be left out. It is saved
beside the weights, and running it again repeats the run: `scap_hub.prune(recipe="out/recipe.yaml")`.

```yaml
model: {name: resnet50.a1_in1k}
data: {dataset: me/flowers}
target: {macs: 0.5}
finetune:
  epochs: 10
  distillation: {weight: 0.7}
```

Later wins: the defaults, then the recipe, then the keyword overrides in the order given. An override is
`<block>_<key>`, such as `finetune_epochs=3` in Python or `--set finetune_epochs=3` on the command line. Short forms:
`criterion="l1"`, `target="macs=0.5"`, `target={group name: fraction}`, `round_to=8`. A new budget replaces the old
one; a new criterion replaces the old one's options. A wrong key or value is refused with the line, the key and the
nearest valid one.

```bash
scap-hub recipe list                                # shipped recipes, and when to use each
scap-hub recipe show half-macs > mine.yaml          # every default filled in
scap-hub recipe schema > recipe.schema.json         # for editors that complete YAML
```

An editor with the YAML language server completes and checks a recipe whose first lines hold
`# yaml-language-server: $schema=recipe.schema.json`.
"""


def reference() -> str:
    """The page of all recipes and all keys."""
    schema = recipe_schema()
    lines = [HEAD, "## Shipped recipes", "", "| name | when | what it does |", "|---|---|---|"]
    for name, path in shipped_recipes().items():
        when, what = (line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()[:2])
        lines.append(f"| `{name}` | {when.removeprefix('When: ')} | {what} |")
    loose = {}
    for name, key in schema["properties"].items():
        if "$ref" in key:
            lines += _block(name, _resolved(schema, key), schema)
        else:
            loose[name] = key
    lines += ["", "## protect and seed", "", *_table(loose, schema)]
    return "\n".join(lines) + "\n"


def _block(name: str, block: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    about = [block["description"], ""] if "description" in block else []
    return ["", f"## {name}", "", *about, *_table(block["properties"], schema)]


def _table(keys: dict[str, Any], schema: dict[str, Any], above: str = "") -> list[str]:
    rows = [] if above else ["| key | values | default | |", "|---|---|---|---|"]
    for name, key in keys.items():
        if "$ref" in key:
            rows += _table(_resolved(schema, key)["properties"], schema, f"{above}{name}.")
            continue
        default = json.dumps(key["default"]) if key.get("default") is not None else ""
        description = " ".join(key["description"].split())
        rows.append(f"| `{above}{name}` | {_values(key)} | {default and f'`{default}`'} | {description} |")
    return rows


def _values(key: dict[str, Any]) -> str:
    """The allowed values in words."""
    if "enum" in key:
        return ", ".join(f"`{value}`" for value in key["enum"])
    if "anyOf" in key:
        return " or ".join(_values(kind) for kind in key["anyOf"] if kind["type"] != "null")
    if key["type"] == "array":
        count = f"{key['minItems']} values" if "minItems" in key else "list"
        return f"{count}, each {_values((key.get('prefixItems') or [key.get('items')])[0])}"
    if key["type"] == "object":
        inner = key.get("additionalProperties")
        return f"mapping to {_values(inner)}" if isinstance(inner, dict) else "mapping"
    limits = {"minimum": ">= ", "exclusiveMinimum": "> ", "maximum": "<= ", "exclusiveMaximum": "< "}
    bounds = ", ".join(f"{sign}{key[limit]}" for limit, sign in limits.items() if limit in key)
    name = {"string": "text", "boolean": "true or false"}.get(key["type"], key["type"])
    return f"{name} {bounds}".strip()


def _resolved(schema: dict[str, Any], key: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][key["$ref"].rpartition("/")[2]]


def main(check: bool) -> int:
    texts = {
        ROOT / "docs" / "recipes.md": reference(),
        ROOT / "recipes" / "recipe.schema.json": json.dumps(recipe_schema(), indent=1) + "\n",
    }
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: run docs/generate.py", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
