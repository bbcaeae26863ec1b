"""Costs of nets and graphs, ceilings, and the points under them."""

from __future__ import annotations

import pytest
import torch
from helpers.small_nets import make_net

from repvgg_deploy.benchmark.roofline import (
    Ceiling,
    Cost,
    RooflinePoint,
    graph_costs,
    measure_ceiling,
    net_costs,
    total_cost,
)
from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.repvgg import FloatLayers, GraphOptions, to_onnx
from repvgg_deploy.nets.baselines import load_baselines


def test_a_convolution_costs_two_operations_a_product_and_each_tensor_once() -> None:
    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    (cost,) = net_costs(torch.nn.Sequential(conv), 2, (4, 5, 6), "fp16").values()
    products = 2 * 8 * 5 * 6 * 4 * 9
    assert cost == Cost(2 * products, 2 * (2 * 4 * 5 * 6 + 8 * 4 * 9 + 2 * 8 * 5 * 6))


def test_the_graph_costs_what_the_net_costs() -> None:
    net = fuse(make_net(groups=2), torch.float32)
    graph = to_onnx(net, FloatLayers(), GraphOptions(32, 32), {}).to_proto()  # type: ignore[arg-type]
    of_graph, of_net = graph_costs(graph, 3, "fp32"), net_costs(net, 3, (3, 32, 32), "fp32")
    assert len(of_graph) == len(of_net)
    assert total_cost(of_graph) == total_cost(of_net)


def test_costs_leave_the_net_as_it_is() -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net_costs(net, 1, (3, 32, 32), "fp32")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_resnet50_has_its_published_operations() -> None:
    card = load_baselines()["ResNet-50"]
    with torch.device("meta"):
        net = card.build().eval()
    cost = total_cost(net_costs(net, 1, (3, 224, 224), "fp32"))
    assert cost.flops / 2e9 == pytest.approx(card.gflops, rel=2e-3)


@pytest.mark.parametrize(("intensity", "bound", "attainable"), [(100.0, "compute", 1e12), (2.0, "memory", 2e11)])
def test_the_lower_ceiling_binds(intensity: float, bound: str, attainable: float) -> None:
    ceiling = Ceiling(1e12, 1e11, "")
    point = RooflinePoint.of(Cost(intensity * 1e6, 1e6), 1.0, ceiling)
    assert (point.bound, point.attainable_tflops) == (bound, pytest.approx(attainable / 1e12))


def test_the_share_is_of_what_is_attainable() -> None:
    point = RooflinePoint.of(Cost(5e11, 1e6), 1.0, Ceiling(1e12, 1e11, ""))
    assert (point.tflops, point.share) == (pytest.approx(0.5), pytest.approx(0.5))


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
