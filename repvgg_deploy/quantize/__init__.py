"""INT8 on the equivalent fused kernel: calibration, exact preparation, scales, rounding, and the Q/DQ graph."""

from repvgg_deploy.quantize.quantization import quantize
from repvgg_deploy.quantize.quantized_net import QuantizedNet
from repvgg_deploy.quantize.recipe import Recipe, load_recipe
from repvgg_deploy.quantize.statistics import CalibrationStatistics, collect_statistics

__all__ = [
    "CalibrationStatistics",
    "QuantizedNet",
    "Recipe",
    "collect_statistics",
    "load_recipe",
    "quantize",
]
