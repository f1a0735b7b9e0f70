"""Prints how large the package is: lines, files, and which files and functions are longer than we want them.

    python tools/size.py           # the package
    python tools/size.py FOLDER    # any other folder of Python files

A function's lines are counted from `def` to its end, without its docstring. It needs nothing but Python.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

LONG_FILE = 400
LONG_FUNCTION = 50
PACKAGE = Path(__file__).resolve().parents[1] / "scap_hub"


def main() -> None:
    """Prints the figures on the command line."""
    parser = argparse.ArgumentParser(description="Prints the size of the package.")
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE, help="folder of Python files")
    folder = parser.parse_args().folder
    texts = {path.relative_to(folder.parent): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    functions = [found for path, text in texts.items() for found in functions_of(path, text)]
    print(f"{sum(lines.values())} lines in {len(lines)} files, {len(functions)} functions")
    long_files = sorted(((count, str(path)) for path, count in lines.items() if count > LONG_FILE), reverse=True)
    long_functions = sorted((found for found in functions if found[0] > LONG_FUNCTION), reverse=True)
    for what, found in ((f"files over {LONG_FILE}", long_files), (f"functions over {LONG_FUNCTION}", long_functions)):
        print(f"{len(found)} {what} lines")
        for count, name in found:
            print(f"  {count:4} {name}")


def functions_of(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Lines and name of every function of a file, methods and inner functions included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield (node.end_lineno or 0) - node.lineno + 1 - docstring, f"{path}:{node.lineno} {node.name}"


if __name__ == "__main__":
    main()
