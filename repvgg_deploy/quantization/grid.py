"""Which integers weights and activations are rounded to: those of an INT8 graph, or fewer bits, for studies."""

from __future__ import annotations

from dataclasses import dataclass

from repvgg_deploy.errors import DeployError
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.quantization.pair_sums import LEVELS
from repvgg_deploy.quantization.points import point_names
from repvgg_deploy.quantization.target import CLIPPING, FULL_CLIPPING, UNSIGNED_HIGHEST, unsigned_points


@dataclass(frozen=True)
class Grid:
    """The integers of weights and activations; by default those of an INT8 graph.

    Attributes:
        weight_bits: of weights, 2 to 8.
        activation_bits: of activations, 2 to 8.
        per_tensor: one scale for all filters of a layer, instead of one per filter.
        full_range: where none is negative, activations of 8 bits use all integers to 255. ONNX Runtime and OpenVINO
            have them; TensorRT does not, and saturates at 127.

    Raises:
        DeployError: there are fewer bits, or more.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    per_tensor: bool = False
    full_range: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise DeployError(f"{name} cannot be {getattr(self, name)}", "2 to 8")

    @property
    def levels(self) -> int:
        """The largest integer of a weight; the smallest is its negative."""
        return int(2 ** (self.weight_bits - 1)) - 1

    @property
    def in_pairs(self) -> bool:
        """Whether no pair of neighbours may be too large for a CPU's kernel, as in every INT8 graph."""
        return self.levels == LEVELS

    @property
    def is_int8(self) -> bool:
        """Whether an INT8 graph has these integers, if only for some of the engines."""
        return (self.weight_bits, self.activation_bits, self.per_tensor) == (8, 8, False)

    def highest(self, unsigned: bool) -> int:
        """The integer of the clipping threshold of an activation; `unsigned` where none is negative.

        No engine runs fewer than 8 bits, so there is no signed format to fit: all integers from 0 are used then.
        """
        if self.activation_bits == 8:
            return FULL_CLIPPING if unsigned and self.full_range else CLIPPING
        return int(2**self.activation_bits) - 1 if unsigned else int(2 ** (self.activation_bits - 1)) - 1

    @property
    def saturations(self) -> tuple[int, ...]:
        """Where activations of 8 bits that are never negative saturate, in the engines that these integers are for."""
        return (UNSIGNED_HIGHEST,) if self.full_range else (CLIPPING, UNSIGNED_HIGHEST)

    def highest_of_points(self, net: RepVGG) -> dict[str, int]:
        """`highest` of each quantization point of a fused net."""
        unsigned = unsigned_points(net)
        return {name: self.highest(name in unsigned) for name in point_names(net)}


INT8 = Grid()
