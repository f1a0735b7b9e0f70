"""ONNX files: written by torch's exporter, with the model's own module names and nothing of this machine."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from scap_hub.deploy.capture import INPUT, Named
from scap_hub.errors import ModelError
from scap_hub.text import one_line


def write_onnx(net: Named, program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes a model in float32; the exporter folds batch norm into the convolutions before it.

    Args:
        net: The model.
        program: What was recorded of it; whether it holds for other sizes is for the caller to find out.
        path: The file.

    Raises:
        ModelError: ONNX has no such operator, which is named with its module, or the exporter fails otherwise.
    """
    try:
        # torch 2.9 prints what it optimises, whatever it is asked: between the lines of a --json, too.
        with contextlib.redirect_stdout(io.StringIO()):
            exported = torch.onnx.export(
                program,
                (),
                input_names=[INPUT],
                output_names=list(net.names),
                dynamo=True,
                verbose=False,
                optimize=True,
            )
    except Exception as error:
        raise ModelError(_refused(net, program, error)) from error
    assert exported is not None
    graph = exported.model_proto
    _rename(graph)
    path.write_bytes(graph.SerializeToString())


def _rename(graph: Any) -> None:
    """Names nodes after the modules that they come from, and drops the exporter's notes: paths of this machine."""
    seen: Counter[str] = Counter()
    for node in graph.graph.node:
        module = _module(node) or "graph"
        seen[f"{module}/{node.op_type}"] += 1
        number = seen[f"{module}/{node.op_type}"]
        node.name = f"{module}/{node.op_type}" + (f"_{number}" if number > 1 else "")
        del node.metadata_props[:]
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]


def _module(node: Any) -> str:
    """Path of the module that a node was recorded in, without our wrapper around the model."""
    notes = {note.key: note.value for note in node.metadata_props}
    try:
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    return scopes[-2].removeprefix("model").lstrip(".") if len(scopes) > 1 else ""


def _refused(net: Named, program: torch.export.ExportedProgram, error: Exception) -> str:
    """Which operator ONNX lacks and where it is called, if the exporter names one."""
    name = type(net.model).__name__
    # The chain of causes ends with the operator that has no translation.
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    found = re.search(r"OpOverload\(op='(?:\w+\.)?(\w+)'", str(cause))
    for node in program.graph.nodes if found else ():
        # ATen operators are taken apart before they are translated; a part has the end of the name.
        if found[1] in str(node.target):  # type: ignore[index]
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            module = stack[-1][0].removeprefix("model").lstrip(".") if stack else ""
            where = f"in module {module!r}" if module else "in the model itself"
            return f"ONNX has no operator for {node.target}, {where} of {name}: export to torch-export instead"
    return f"torch.onnx cannot export {name}: {one_line(error)}"
