"""Static int8 of an OpenVINO file, by NNCF, OpenVINO's own quantiser."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scap_hub.deploy.quantizers.base import PERCENTILE, Quantizer, Scheme, quiet
from scap_hub.errors import ModelError
from scap_hub.text import one_line

_OPERATORS = ("Convolution", "GroupConvolution", "MatMul")


class NncfQuantizer(Quantizer):
    """Writes int8 variants of one OpenVINO file; `layers` are its convolutions and matrix products."""

    def __init__(self, file: Path, images: Sequence[Tensor]) -> None:
        """Reads a file.

        Args:
            file: In float32.
            images: Batches of calibration images, float32 (N, C, H, W).
        """
        self._file, self._images = file, [batch.float().cpu().contiguous().numpy() for batch in images]
        self.layers = [node.get_friendly_name() for node in self._read().get_ordered_ops() if _is_layer(node)]

    def write(self, target: Path, scheme: Scheme, kept: Collection[str] = (), only: Collection[str] = ()) -> None:
        """See `Quantizer.write`."""
        import nncf
        import openvino
        from nncf.quantization.advanced_parameters import QuantizationParameters
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        if only:
            kept = [name for name in self.layers if name not in set(only)]
        ranges = RangeEstimatorParametersSet.MINMAX if scheme.ranges == "minmax" else _percentile()
        advanced = nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=ranges,
            weights_quantization_params=QuantizationParameters(per_channel=scheme.per_channel),
        )
        try:
            with quiet():
                quantized = nncf.quantize(
                    self._read(),
                    nncf.Dataset(self._images),
                    subset_size=len(self._images),
                    model_type=nncf.ModelType.TRANSFORMER,  # convolutions are quantised the same way with it
                    ignored_scope=nncf.IgnoredScope(names=list(kept)),
                    advanced_parameters=advanced,
                )
                for path in (target, target.with_suffix(".bin")):
                    path.unlink(missing_ok=True)  # a runtime that is open maps the old weights into memory
                openvino.save_model(quantized, target, compress_to_fp16=False)
        except Exception as error:
            raise ModelError(f"nncf cannot quantise the model with {scheme}: {one_line(error)}") from error

    def _read(self) -> Any:
        import openvino

        return openvino.Core().read_model(self._file)


def _is_layer(node: Any) -> bool:
    return node.get_type_name() in _OPERATORS


def _percentile() -> Any:
    """Ranges without the largest values."""
    from nncf.quantization import range_estimator as nncf_ranges

    one_side = nncf_ranges.StatisticsCollectorParameters(
        statistics_type=nncf_ranges.StatisticsType.QUANTILE,
        aggregator_type=nncf_ranges.AggregatorType.MEAN,
        quantile_outlier_prob=1 - PERCENTILE / 100,
    )
    return nncf_ranges.RangeEstimatorParameters(min=one_side, max=one_side)
