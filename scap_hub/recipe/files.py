"""Recipe files: the shipped ones, reading YAML, and which line says what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scap_hub.errors import RecipeError
from scap_hub.files import path_of
from scap_hub.recipe.keys import NEAR
from scap_hub.text import did_you_mean, one_line


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with scap_hub, by name."""
    package = Path(__file__).parents[1]
    # A wheel carries them inside the package; a checkout has them at the top.
    folder = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a shipped recipe's name, or the path itself.

    Raises:
        RecipeError: It is neither.
    """
    shipped = shipped_recipes()
    if recipe in shipped:
        return shipped[str(recipe)]
    path = path_of(recipe)
    if not path.is_file():
        hint = did_you_mean(recipe, shipped, cutoff=NEAR)
        raise RecipeError(f"no recipe {str(recipe)!r}: neither a file nor one of {', '.join(shipped)}{hint}")
    return path


def read_yaml(path: str | Path) -> tuple[Any, str]:
    """What a YAML file holds, {} where that is nothing, and its text.

    Raises:
        RecipeError: It cannot be read, is not YAML, is too long or nested too deeply, has an alias, or says a key
            twice.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise RecipeError(f"recipe {str(path)!r} is longer than {_LONGEST} bytes: it is no recipe")
        text = content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {one_line(error)}") from None
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader) or {}, text
    except _RefusedError as error:
        raise RecipeError(f"{path}, {error}") from None
    except Exception as error:  # what stands after a tag such as !!int is taken as Python takes it
        raise RecipeError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())[:300]}") from None


_LONGEST = 2**20
_DEEPEST = 30


def _check_events(text: str) -> None:
    """A few lines with aliases can stand for billions of values, and the parser itself takes long for deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError(f"line {line}: a recipe has no aliases; write out what '*{event.anchor}' stands for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise _RefusedError(f"line {line}: nested more than {_DEEPEST} deep")


class _RefusedError(Exception):
    """YAML that a recipe cannot have: an alias, or a key that stands twice, of which the last one would win."""


class _Loader(yaml.SafeLoader):
    """Plain values only, and every key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _RefusedError(f"line {key.start_mark.line + 1}: {key.value!r} stands twice; keep one of them")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line of the deepest part of a path of keys that YAML text spells out."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if key.value == part), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line
