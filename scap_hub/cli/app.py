"""The command line: a thin skin over the same calls."""

from __future__ import annotations

import inspect
import sys
from importlib import metadata
from typing import Annotated

import typer

from scap_hub.cli import folders, models, runs
from scap_hub.cli.family import family
from scap_hub.cli.output import end_if_told_or_lost, fail, say_json
from scap_hub.cli.recipes import recipes
from scap_hub.cli.verify import verify
from scap_hub.errors import ScapHubError, UnverifiableError, VerificationError
from scap_hub.version import __version__

EXIT_CODES = (
    "Exit code 0: done; 1: a fault of scap_hub; 2: a mistake in what it was given, named in one line; "
    "130: interrupted by Ctrl-C; 143: by SIGTERM; 129: by SIGHUP."
)


def print_version(wanted: bool) -> None:
    """Prints the version of scap_hub and of the libraries that a result depends on, and ends."""
    if wanted:
        libraries = (f"{name} {metadata.version(name)}" for name in ("torch", "timm", "transformers", "accelerate"))
        print(", ".join((f"scap_hub {__version__}", *libraries)))
        raise typer.Exit


app = typer.Typer(
    help="Compress the vision models you already use: structured pruning for timm and Hugging Face models.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    runs.prune, family, runs.compare, models.inspect, verify, models.bench, folders.report, folders.push,
    folders.export, runs.demo,
):  # fmt: skip
    app.command()(command)
app.add_typer(recipes, name="recipe")
for info in (*app.registered_commands, *recipes.registered_commands):
    # Lists of commands fold it; without it they cut the help after 45 letters.
    info.short_help = inspect.cleandoc(info.callback.__doc__ or "").partition("\n\n")[0]


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print versions and exit.")
    ] = False,
) -> None: ...


# The base of all usage errors has no public name: up to typer 0.25 it is click's, from 0.26 on a private copy of it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point; a user's error is one line on standard error and exit code 2."""
    try:
        sys.exit(app(args=sys.argv[1:] or ["--help"], prog_name="scap-hub", standalone_mode=False))
    except ScapHubError as error:
        ours = isinstance(error, VerificationError) and not isinstance(error, UnverifiableError)
        fail(str(error), 1 if ours else 2)
    except UsageError as error:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "scap-hub"  # type: ignore[attr-defined]
        fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)  # type: ignore[attr-defined]
    except Exception as error:
        end_if_told_or_lost()
        say_json(f"{type(error).__name__}: {error}", 1)
        raise
