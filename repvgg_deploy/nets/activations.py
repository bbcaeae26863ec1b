"""The activations that a block may end with: their names, and what holds of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from repvgg_deploy.errors import DeployError


@dataclass(frozen=True)
class Activation:
    """An elementwise function by torch's name in lower case; `slope` is that of `leaky_relu` below zero.

    Every name of `NAMES` is one.
    """

    name: str = "relu"
    slope: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}:{self.slope:g}" if self.name == "leaky_relu" else self.name

    @property
    def is_homogeneous(self) -> bool:
        """Whether f(r·x) = r·f(x) for every r > 0, so that channels may be rescaled on both sides of it."""
        return self.name in ("relu", "leaky_relu")


NAMES = ("relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "elu", "mish")
_OTHER_NAMES = {"swish": "silu", "hswish": "hardswish", "lrelu": "leaky_relu"}
# The default of torch.nn.LeakyReLU.
_DEFAULT_SLOPE = 0.01

RELU = Activation()


def parse_activation(text: str) -> Activation:
    """The activation that `relu`, `SiLU`, `hard_swish` or `leaky_relu:0.1` means.

    Raises:
        DeployError: there is none of that name; the hint lists those there are.
    """
    name, _, parameter = text.partition(":")
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    known = {re.sub("_", "", known): known for known in NAMES}
    found = known.get(plain) or _OTHER_NAMES.get(plain)
    try:
        slope = float(parameter) if parameter else _DEFAULT_SLOPE
    except ValueError:
        found = None
    if found is None or (parameter and found != "leaky_relu"):
        raise DeployError(f"no activation is called {text!r}", f"one of: {', '.join(NAMES)} (leaky_relu:SLOPE)")
    return Activation(found, slope if found == "leaky_relu" else 0.0)
