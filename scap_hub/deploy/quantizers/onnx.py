"""Static int8 of an ONNX file, by ONNX Runtime's own quantiser: weights and activations in eight bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scap_hub.deploy.capture import INPUT
from scap_hub.deploy.quantizers.base import PERCENTILE, Quantizer, Scheme, quiet
from scap_hub.errors import CalibrationError, ModelError
from scap_hub.progress import track
from scap_hub.text import one_line

OPERATORS = (
    "Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Concat", "Split", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Pad", "Resize",
)  # fmt: skip
"""What ONNX Runtime computes in int8 on a CPU, or moves without computing. Elsewhere rounding would buy no time."""


class OnnxQuantizer(Quantizer):
    """Writes int8 variants of one ONNX file; `layers` are the nodes that it can quantise.

    What the calibration images tell is found once for each kind of ranges.
    """

    def __init__(self, source: Path, images: Sequence[Tensor], scratch: Path) -> None:
        """Prepares a file.

        Args:
            source: In float32.
            images: Batches of calibration images, float32 (N, C, H, W).
            scratch: Folder for files in between.

        Raises:
            CalibrationError: There are no images.
            ModelError: ONNX Runtime cannot read the file.
        """
        import onnx
        from onnxruntime.quantization import quant_pre_process

        if not images:
            raise CalibrationError("int8 needs calibration images, and there are none: give a data set")
        self._images, self._scratch = images, scratch
        self._prepared = scratch / "prepared.onnx"
        self._ranges: dict[str, Any] = {}
        try:
            with quiet():
                quant_pre_process(str(source), str(self._prepared), skip_symbolic_shape=True)
            graph = onnx.load(str(self._prepared)).graph
        except Exception as error:
            raise ModelError(f"onnxruntime cannot prepare {source.name} for int8: {one_line(error)}") from error
        self.layers = [node.name for node in graph.node if node.op_type in OPERATORS]

    def write(self, target: Path, scheme: Scheme, kept: Collection[str] = (), only: Collection[str] = ()) -> None:
        """See `Quantizer.write`."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        try:
            with quiet():
                quantizer = QDQQuantizer(
                    onnx.load(str(self._prepared)), scheme.per_channel, False, QuantType.QInt8, QuantType.QUInt8,
                    self._found(scheme.ranges), list(only), list(kept), list(OPERATORS), {},
                )  # fmt: skip
                quantizer.quantize_model()
                quantizer.model.save_model_to_file(str(target), False)
        except CalibrationError:
            raise
        except Exception as error:
            raise ModelError(f"onnxruntime cannot quantise the model with {scheme}: {one_line(error)}") from error

    def _found(self, ranges: str) -> Any:
        """The ranges of all activations on the calibration images."""
        if ranges not in self._ranges:
            self._ranges[ranges] = self._calibrated(ranges)
        return self._ranges[ranges]

    def _calibrated(self, ranges: str) -> Any:
        from onnxruntime.quantization import CalibrationMethod, create_calibrator

        minmax = ranges == "minmax"
        # The default of percentiles is symmetric, which wastes half of the numbers after a ReLU.
        options = {} if minmax else {"percentile": PERCENTILE, "symmetric": False}
        calibrator = create_calibrator(
            self._prepared,
            OPERATORS,
            str(self._scratch / "augmented.onnx"),
            CalibrationMethod.MinMax if minmax else CalibrationMethod.Percentile,
            extra_options=options,
        )
        for batch in track(self._images, f"int8 {ranges} ranges"):
            # One batch at a time, because all that is collected at once stays in memory.
            calibrator.collect_data(_Reader(batch))
        with quiet():
            found = calibrator.compute_data()
        if any(not _finite(data) for data in found.values()):
            raise CalibrationError("an activation is NaN or infinite on the calibration images: int8 has no range then")
        return found


class _Reader:
    """One batch in the form that ONNX Runtime asks for."""

    def __init__(self, images: Tensor) -> None:
        self._feeds = iter([{INPUT: images.float().cpu().contiguous().numpy()}])

    def get_next(self) -> dict[str, Any] | None:
        """The next feed; None at the end."""
        return next(self._feeds, None)


def _finite(data: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(np.asarray(data.range_value, dtype=np.float64)).all())
