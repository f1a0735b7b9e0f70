"""What the commands print, and when they keep quiet."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scap_hub.cli.signals import Stopped, stopping
from scap_hub.progress import clear_bars, set_quiet, tell

_PACKAGE = Path(__file__).parents[1]


def show_report(report: Any) -> None:
    """Prints the table of a run, and that of its files for other runtimes."""
    print_table(["", "dense", "pruned", "change"], report.rows(), report.notes())
    if report.deploy is not None:
        show_deployment(report.deploy)


def show_deployment(deployment: Any) -> None:
    """Prints what was measured of files for other runtimes."""
    print(f"{deployment.title}:")
    print_table(deployment.head, deployment.rows(), deployment.notes())


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = (), fitted: bool = True
) -> None:
    """Prints a table with a head, and sentences below; fitted to the terminal, or as wide as it needs to be."""
    table = Table()
    for name in head:
        table.add_column(name, overflow="fold")  # a name that is cut is of no use
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=None if fitted else 100_000)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def print_report(report: Any, document: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """Prints a run, as a table or as JSON."""
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(document))
    elif not quiet:
        show_report(report)


def print_forecast(forecast: Any, quiet: bool, as_json: bool) -> None:
    """Prints what a run would do, in lines or as JSON."""
    if as_json and is_main_process():
        print(json.dumps(asdict(forecast)))
    say("\n".join(forecast.lines()), quiet or as_json)


def say(text: str, quiet: bool) -> None:
    """Prints a line, once."""
    if not quiet and is_main_process():
        print(text)


def fail(message: str, code: int) -> None:
    """Ends the process with a line on standard error, from one process alone, and an exit code.

    Where JSON was asked for, it is on standard output too.
    """
    clear_bars()
    if _tells():
        print(f"scap-hub: {message}", file=sys.stderr)
        say_json(message, code)
    sys.exit(code)


def say_json(message: str, code: int) -> None:
    """Prints an error as JSON where JSON was asked for."""
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": code}))


@contextlib.contextmanager
def output(quiet: bool) -> Iterator[None]:
    """Keeps quiet where asked, and on all processes but the main one; the libraries too, which read this on import.

    Warnings are lines of their own, above the bars.
    """
    quiet = quiet or not is_main_process()
    if quiet:
        for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ[variable] = "1"
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    set_quiet(quiet)
    shown, warnings.showwarning = warnings.showwarning, _tell_warning
    try:
        with stopping():
            yield
    except KeyboardInterrupt as reason:
        end_if_lost()
        number = reason.number if isinstance(reason, Stopped) else signal.SIGINT
        by = f" by {reason}" if isinstance(reason, Stopped) else ""
        fail(f"interrupted{by}; with the same --out, the same command goes on where it was", 128 + number)
    finally:
        clear_bars()
        warnings.showwarning = shown
        set_quiet(False)
        logging.disable(logging.NOTSET)


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are sentences to the user; of others it matters where they come from."""
    ours = Path(filename).is_relative_to(_PACKAGE)
    tell(f"warning: {message}" if ours else warnings.formatwarning(message, category, filename, lineno).rstrip())


def _tells() -> bool:
    """Whether this process says why the run ends: of several the first that ends, which need not be the main one."""
    if not _is_one_of_many():
        return True
    from scap_hub.training.heartbeat import first_to_tell

    return first_to_tell()


def end_if_told_or_lost() -> None:
    """Ends the process if something failed because another process is lost, or has failed and said so."""
    end_if_lost()
    if not _tells():
        sys.exit(1)


def end_if_lost() -> None:
    """Ends the process if another one is lost, and says which."""
    if _is_one_of_many():
        from scap_hub.training import heartbeat

        heartbeat.end_if_lost()


def _is_one_of_many() -> bool:
    """Whether torchrun or the like has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this is the process that prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
