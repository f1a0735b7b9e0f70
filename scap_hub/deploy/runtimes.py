"""Exported files that run: each is a module, so that whatever measures and times models takes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scap_hub.deploy.capture import INPUT, OUTPUT
from scap_hub.errors import ModelError
from scap_hub.text import one_line

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

Outputs = Tensor | tuple[Tensor, ...]


def parts(file: Path) -> list[Path]:
    """The files that an exported one consists of: OpenVINO keeps weights beside the graph."""
    weights = file.with_suffix(".bin")
    return [file, weights] if file.suffix == ".xml" else [file]


class Runtime(nn.Module):
    """A file in its own runtime on the CPU: images in, its outputs out, with the threads that torch has.

    Attributes:
        name: Of the runtime.
        file: What runs.
        outputs: Names of its outputs.
    """

    name: str
    file: Path
    outputs: tuple[str, ...] = (OUTPUT,)

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        # Tells where images are to come from and logits to go to, as a model's weights do.
        self.register_buffer("_place", torch.zeros(()), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor | ModelOutput:
        """Images, float32 (N, C, H, W), to the output, or to several by name."""
        found = self.run(pixel_values.detach().cpu().float().contiguous())
        if isinstance(found, Tensor):
            return found.to(pixel_values.device)
        from transformers.utils import ModelOutput  # takes a second to import, and runs may do without

        return ModelOutput(zip(self.outputs, (tensor.to(pixel_values.device) for tensor in found), strict=True))

    def run(self, images: Tensor) -> Outputs:
        """The same on the CPU, in the order of `outputs`.

        Raises:
            ModelError: The runtime refuses these images, such as those of another size than the file's.
        """
        try:
            return self._computed(images)
        except Exception as error:
            size = "x".join(map(str, images.shape[1:]))
            raise ModelError(
                f"{self.name} does not run {self.file.name} on images of {size}: {one_line(error)}; if the model is "
                "for another size, give images of that one, or set model.input_size to theirs"
            ) from error

    def _computed(self, images: Tensor) -> Outputs:
        raise NotImplementedError


def _unpacked(tensors: Iterable[Tensor]) -> Outputs:
    found = tuple(tensors)
    return found[0] if len(found) == 1 else found


class OnnxRuntime(Runtime):
    """ONNX Runtime."""

    name = "onnxruntime"

    def __init__(self, file: Path, threads: int | None = None) -> None:
        """Opens a file; with `threads`, or as many as torch has."""
        import onnxruntime

        super().__init__(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 4  # what fails is raised
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"onnxruntime cannot open {file.name}: {one_line(error)}") from error
        self.outputs = tuple(output.name for output in self.session.get_outputs())

    def _computed(self, images: Tensor) -> Outputs:
        return _unpacked(map(torch.from_numpy, self.session.run(self.outputs, {INPUT: images.numpy()})))


class OpenVino(Runtime):
    """OpenVINO, in float32: where the CPU has bf16, its default is that, which not all models bear."""

    name = "openvino"

    def __init__(self, file: Path, threads: int | None = None) -> None:
        """Opens a file, .xml or .onnx; with `threads`, or as many as torch has."""
        import openvino

        super().__init__(file)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        try:
            self.compiled = openvino.Core().compile_model(str(file), "CPU", options)
        except Exception as error:
            raise ModelError(f"openvino cannot open {file.name}: {one_line(error)}") from error

        if len(self.compiled.outputs) > 1:
            self.outputs = tuple(port.get_any_name() for port in self.compiled.outputs)

    def _computed(self, images: Tensor) -> Outputs:
        found = self.compiled(images.numpy())
        return _unpacked(torch.from_numpy(found[number].copy()) for number in range(len(self.outputs)))


class ExecuTorch(Runtime):
    """ExecuTorch; its program takes one image."""

    name = "executorch"

    def __init__(self, file: Path) -> None:
        """Opens a file."""
        from executorch.runtime import Runtime as Loader

        super().__init__(file)
        self._program = Loader.get().load_program(file)
        self._method = self._program.load_method("forward")

    def _computed(self, images: Tensor) -> Outputs:
        return torch.cat([self._method.execute([image[None].contiguous()])[0].clone() for image in images])


_OUTPUTS = "outputs.json"


def save_program(program: torch.export.ExportedProgram, names: Sequence[str], file: Path) -> None:
    """Writes a program of torch.export with the names of its outputs, which `TorchExport` opens."""
    torch.export.save(program, file, extra_files={_OUTPUTS: json.dumps(list(names))})


class TorchExport(Runtime):
    """A program of torch.export, in torch."""

    name = "torch"

    def __init__(self, file: Path) -> None:
        """Opens a file."""
        super().__init__(file)
        notes = {_OUTPUTS: ""}
        self._program: Any = torch.export.load(file, extra_files=notes).module()
        self.outputs = tuple(json.loads(notes[_OUTPUTS]))

    def _computed(self, images: Tensor) -> Outputs:
        return self._program(images)
