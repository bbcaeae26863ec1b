"""INT8 on the equivalent fused kernel: calibration, exact preparation, scales, rounding, and the Q/DQ graph."""

from repvgg_deploy.quantization.net import QuantizedNet
from repvgg_deploy.quantization.quantize import quantize
from repvgg_deploy.quantization.recipe import Recipe, load_recipe
from repvgg_deploy.quantization.statistics import CalibrationStatistics, collect_statistics

__all__ = [
    "CalibrationStatistics",
    "QuantizedNet",
    "Recipe",
    "collect_statistics",
    "load_recipe",
    "quantize",
]
