"""Ceilings of this machine, and the points under them."""

from __future__ import annotations

import pytest

from repvgg_deploy.benchmark.roofline import Ceiling, RooflinePoint, measure_ceiling
from repvgg_deploy.errors import DeployError
from repvgg_deploy.graphs.cost import Cost


@pytest.mark.parametrize(("intensity", "bound", "attainable"), [(100.0, "compute", 1e12), (2.0, "memory", 2e11)])
def test_the_lower_ceiling_binds(intensity: float, bound: str, attainable: float) -> None:
    ceiling = Ceiling(1e12, 1e11, "")
    point = RooflinePoint.of(Cost(intensity * 1e6, 1e6), 1.0, ceiling)
    assert (point.bound, point.attainable_tflops) == (bound, pytest.approx(attainable / 1e12))


def test_the_share_is_of_what_is_attainable() -> None:
    point = RooflinePoint.of(Cost(5e11, 1e6), 1.0, Ceiling(1e12, 1e11, ""))
    assert (point.tflops, point.share) == (pytest.approx(0.5), pytest.approx(0.5))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_ceiling_is_measured_and_no_product_is_faster(precision: str) -> None:
    ceiling = measure_ceiling(precision, seconds=0.05)
    # Between a thousandth and a thousand times what a present core does.
    assert 1e8 < ceiling.flops_per_sec < 1e15
    assert 1e7 < ceiling.bytes_per_sec < 1e13


def test_of_two_ceilings_the_higher_counts() -> None:
    assert Ceiling(2.0, 3.0, "a").best_of(Ceiling(1.0, 4.0, "a")) == Ceiling(2.0, 4.0, "a")


def test_an_unknown_precision_has_no_ceiling() -> None:
    with pytest.raises(DeployError, match="int4"):
        measure_ceiling("int4")
