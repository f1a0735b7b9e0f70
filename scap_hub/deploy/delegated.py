"""Formats that exporters of others write: timmx for timm models, transformers.exporters for transformers models."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from scap_hub.deploy.capture import INPUT
from scap_hub.deploy.source import Source
from scap_hub.errors import ModelError, ScapHubError
from scap_hub.files import path_of
from scap_hub.text import one_line

_TIMM_OPTIONS: dict[str, dict[str, Any]] = {"openvino": {"dynamic_batch": True, "fp16": False}, "executorch": {}}


def write_openvino(source: Source, path: Path) -> None:
    """Writes OpenVINO's .xml with its .bin beside it, for any batch size; see `_write`."""
    _write(source, "openvino", path)


def write_executorch(source: Source, path: Path) -> None:
    """Writes an ExecuTorch program for the XNNPACK delegate and one image at a time; see `_write`."""
    _write(source, "executorch", path)


def _write(source: Source, name: str, path: Path) -> None:
    """Has a format written by the exporter of the library that the model comes from.

    Raises:
        ScapHubError: That exporter is not installed; names what to install.
        ModelError: The exporter fails, or the model comes from neither library.
    """
    if source.zoo not in ("timm", "transformers"):
        raise ModelError(
            f"{name} files are made by timmx and by transformers.exporters, for timm and transformers models; this one "
            "is neither: export to onnx, which OpenVINO and others read"
        )
    if len(source.net.names) > 1:
        raise ModelError(
            f"{name} files are written here for models with one output, this one has {', '.join(source.net.names)}: "
            "export to onnx, which OpenVINO and others read"
        )
    try:
        (_by_timmx if source.zoo == "timm" else _by_transformers)(source, name, path)
    except ScapHubError:
        raise
    except Exception as error:
        raise ModelError(f"{source.zoo}'s exporter to {name} fails: {one_line(error)}") from error


def _by_timmx(source: Source, name: str, path: Path) -> None:
    if importlib.util.find_spec("timmx") is None:
        raise ScapHubError(f"{name} of a timm model needs timmx: pip install 'scap-hub[{name},timmx]'")
    import timmx

    where = "local-dir" if path_of(source.folder).is_dir() else "hf-hub"
    options = {"pretrained": True, "verify": False, "input_size": tuple(source.images.shape[1:]), **_TIMM_OPTIONS[name]}
    timmx.export_model(name, f"{where}:{source.folder}", output=str(path), **options)
    if name == "openvino":
        _name_ports(path, source.net.names[0])


def _name_ports(path: Path, output: str) -> None:
    """Gives input and output the names that other exporters give them; whoever feeds by name would feed nothing."""
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        model = openvino.Core().read_model(path)
        model.inputs[0].get_tensor().set_names({INPUT})
        model.outputs[0].get_tensor().set_names({output})
        openvino.save_model(model, Path(scratch, path.name), compress_to_fp16=False)
        for file in Path(scratch).iterdir():
            file.replace(path.parent / file.name)


def _by_transformers(source: Source, name: str, path: Path) -> None:
    """Also writes what `transformers.exporters.ExportedModel.from_pretrained` reads; it names the file itself."""
    try:
        from transformers import exporters
    except ImportError:
        raise ScapHubError(
            f"{name} of a transformers model needs transformers.exporters: pip install 'transformers>=5.24'"
        ) from None
    model: Any = source.net.model
    if name == "openvino":
        batch = {INPUT: {0: torch.export.Dim("batch")}}
        exporter: Any = exporters.OpenVINOExporter()
        config: Any = exporters.OpenVINOConfig(dynamic_shapes=batch)
        images = source.images
    else:
        exporter, config, images = exporters.ExecutorchExporter(), exporters.ExecutorchConfig(), source.images[:1]
    exporter.export(model, {INPUT: images}, config).save_pretrained(path.parent)
