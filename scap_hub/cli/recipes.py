"""Commands about recipes: recipe list, show, schema."""

from __future__ import annotations

import json

import typer

from scap_hub.cli.options import AsJson, Quiet, RecipeSource, Settings, overrides
from scap_hub.cli.output import print_table

recipes = typer.Typer(help="List, resolve and describe recipes.", rich_markup_mode=None)


@recipes.command("list")
def list_recipes(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the shipped recipes, and when to use each.

    Example: scap-hub recipe list
    """
    from scap_hub.recipe import shipped_recipes

    purposes = {
        name: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# When: ")
        for name, path in shipped_recipes().items()
    }
    if as_json:
        print(json.dumps(purposes))
    elif not quiet:
        print_table(["recipe", "when"], purposes.items())


@recipes.command("show")
def show_recipe(recipe: RecipeSource, settings: Settings = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Print a recipe with every default filled in, as `scap-hub prune` would run it; --quiet only checks it.

    Example: scap-hub recipe show half-macs --set finetune_epochs=20 > mine.yaml
    """
    from scap_hub.recipe import Recipe

    resolved = Recipe.resolve(recipe, **overrides(settings))
    if as_json:
        print(resolved.model_dump_json())
    elif not quiet:
        print(resolved.to_yaml(), end="")


@recipes.command("schema")
def show_schema(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Print the JSON schema of recipes, with which editors complete and check the YAML.

    Example: scap-hub recipe schema > recipe.schema.json
    """
    from scap_hub.recipe import recipe_schema

    if as_json or not quiet:
        print(json.dumps(recipe_schema(), indent=None if as_json else 1))
