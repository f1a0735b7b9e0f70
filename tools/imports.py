"""Checks that imports inside the package run downwards and form no cycle; `make imports` runs it.

    python tools/imports.py              check; exit code 1 and one line for each fault
    python tools/imports.py --picture    print which layer imports which, for docs/architecture.md

Every import counts: at the top of a file, inside a function, and under TYPE_CHECKING. So does
`import_module("package.part")` with a literal name. It needs nothing but Python.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "version",
        "documents",
        "text",
        "markdown",
        "files",
        "placement",
        "progress",
        "private",
        "scores",
        "tables",
    ),
    ("graph",),
    ("plan", "surgery"),
    ("zoo",),
    ("channels",),
    ("timing",),
    ("selection",),
    ("criteria",),
    ("compensation",),
    ("tasks",),
    ("recipe",),
    ("training",),
    ("page",),
    ("hub",),
    ("deploy",),
    ("run",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""From the lowest to the highest. Each name is a file or a folder at the top of the package.

A file may import from its own layer and from those before it.
"""

PACKAGE = Path(__file__).resolve().parents[1] / "scap_hub"


class Import(NamedTuple):
    """One import of a file of the package by another one."""

    importer: str
    line: int
    imported: str


def main() -> int:
    """Runs the check on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Checks the direction of the package's imports.")
    parser.add_argument("package", nargs="?", type=Path, default=PACKAGE, help="folder of the package")
    parser.add_argument("--picture", action="store_true", help="print which layer imports which")
    options = parser.parse_args()
    files = {module_name(path, options.package): path for path in sorted(options.package.rglob("*.py"))}
    imports = sorted({found for name in files for found in imports_of(name, files)})
    if options.picture:
        print(picture(imports))
        return 0
    shown = {name: path.relative_to(options.package.parent) for name, path in files.items()}
    faults = [*unplaced(shown), *upward(imports, shown), *cycles(imports, shown)]
    print("\n".join(faults) or f"{len(imports)} imports of {len(files)} files: all run downwards, without a cycle")
    return 1 if faults else 0


def module_name(path: Path, package: Path) -> str:
    """The dotted name of a file; a package's `__init__.py` has the package's name."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(name: str, files: dict[str, Path]) -> Iterator[Import]:
    """All imports of other files of the package by the file `name`."""
    for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
        for target in targets(node, name, files):
            while target and target not in files:  # a name inside a file: the file is what is imported
                target = target.rpartition(".")[0]
            if target and target != name:
                yield Import(name, node.lineno, target)  # type: ignore[attr-defined]


def targets(node: ast.AST, name: str, files: dict[str, Path]) -> list[str]:
    """The dotted names that a statement of the file `name` imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            here = name.split(".") + (["__init__"] if files[name].name == "__init__.py" else [])
            base = here[: -node.level] + base
        return [".".join([*base, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        argument = node.args[0]
        return [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []
    return []


def part(name: str) -> str:
    """The file or folder at the top of the package that a dotted name belongs to."""
    return [*name.split("."), "__init__"][1]


def unplaced(files: dict[str, Path]) -> list[str]:
    """Files that no layer names."""
    known = {name for layer in LAYERS for name in layer}
    strange = {name: path for name, path in files.items() if part(name) not in known}
    return [f"{path}: no layer names {part(name)!r}; add it to LAYERS" for name, path in strange.items()]


def upward(imports: list[Import], files: dict[str, Path]) -> list[str]:
    """Imports of a higher layer by a lower one."""
    height = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    return [
        f"{files[found.importer]}:{found.line}: {part(found.importer)} imports {found.imported}, which is above it"
        for found in imports
        if height.get(part(found.importer), len(LAYERS)) < height.get(part(found.imported), -1)
    ]


def cycles(imports: list[Import], files: dict[str, Path]) -> list[str]:
    """Cycles of imports: for each import that closes one, a shortest way back. No cycle is printed twice."""
    imports_from: dict[str, set[str]] = {name: set() for name in files}
    for found in imports:
        imports_from[found.importer].add(found.imported)
    printed: set[frozenset[str]] = set()
    faults = []
    for found in imports:
        back = shortest(imports_from, found.imported, found.importer)
        if back and frozenset(back) not in printed:
            printed.add(frozenset(back))
            faults.append(f"{files[found.importer]}:{found.line}: a cycle: {' -> '.join([found.importer, *back])}")
    return faults


def shortest(imports_from: dict[str, set[str]], start: str, end: str) -> list[str]:
    """A shortest chain of imports from one file to another, both included; empty if there is none."""
    chains = deque([[start]])
    seen = {start}
    while chains:
        chain = chains.popleft()
        if chain[-1] == end:
            return chain
        for following in sorted(imports_from[chain[-1]] - seen):
            seen.add(following)
            chains.append([*chain, following])
    return []


def picture(imports: list[Import]) -> str:
    """The layers, the highest first, each part with the parts that it imports."""
    below: dict[str, set[str]] = {}
    for found in imports:
        if part(found.importer) != part(found.imported):
            below.setdefault(part(found.importer), set()).add(part(found.imported))
    order = [name for layer in LAYERS for name in layer]
    width = max(map(len, order))
    rows = [
        f"{name:{width}}  {', '.join(sorted(below.get(name, ()), key=order.index, reverse=True))}".rstrip()
        for layer in reversed(LAYERS)
        for name in layer
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
