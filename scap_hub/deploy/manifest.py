"""The note beside an exported file from which transformers' own `ExportedModel.from_pretrained` opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scap_hub.deploy.capture import INPUT, Named
from scap_hub.deploy.source import Source
from scap_hub.private import tree_json

MANIFEST = "export.json"
OPENED = ("onnx", "openvino", "executorch")
"""Formats that it opens without trust in the repository."""


def write_manifest(source: Source, kind: str, file: Path) -> None:
    """Writes `MANIFEST` beside a file, or names the file in the one of transformers' own exporter.

    What opens it takes `pixel_values` and answers as the model does: with logits, or with the output of the model's own
    class for a transformers model.

    Args:
        source: What the file was made from.
        kind: One of `OPENED`.
        file: In int8, the ports of an OpenVINO file are those of the one in float32.
    """
    manifest = file.with_name(MANIFEST)
    document = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    # An ExecuTorch program in int8 is made by ours, whoever made the one in float32.
    if not document or (kind == "executorch" and document["components"]["model"]["file"] != file.name):
        document = _document(source, kind)
    document["components"]["model"]["file"] = file.name
    manifest.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if kind == "onnx":
        # The reader asks for a file of weights beside the graph, even where the graph holds them.
        file.with_name(f"{file.name}.data").touch()


def _document(source: Source, kind: str) -> dict[str, Any]:
    images = source.images
    metadata = {
        "architecture": type(source.net.model).__name__,
        "export_dtype": "float32",
        "export_device": "cpu",
        "kwargs": {INPUT: {"rank": images.dim(), "shape": list(images.shape), "dtype": "float32"}},
        "in_spec": tree_json(((), {INPUT: images})),
        "out_spec": tree_json(_answer(source.net, images)),
    }
    components = {"model": {"file": "", "metadata": metadata}}
    return {"schema_version": 1, "export_format": kind, "components": components}


def _answer(net: Named, images: Tensor) -> Tensor | dict[str, Tensor]:
    """What the file answers, in the form in which transformers hands it out; nobody else's classes can be named."""
    from transformers.utils import ModelOutput  # takes a second to import, and runs may do without

    with torch.no_grad():
        output, tensors = net.model(images), net(images)
    named = dict(zip(net.names, tensors if isinstance(tensors, tuple) else (tensors,), strict=True))
    ours = isinstance(output, ModelOutput) and type(output).__module__.startswith("transformers.")
    # The file's order is what tells one tensor from the other.
    if ours and set(named) <= set(output) and tuple(answer := type(output)(**named)) == net.names:
        return answer
    return named if len(named) > 1 else images
