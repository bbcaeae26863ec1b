"""What nets and graphs have to compute and to move."""

from __future__ import annotations

import pytest
import torch
from helpers.small_nets import make_net

from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.cost import Cost, graph_costs, net_costs, total_cost
from repvgg_deploy.graphs.repvgg import FloatLayers, GraphOptions, to_onnx
from repvgg_deploy.nets.baselines import build_baseline
from repvgg_deploy.nets.cards import load_baselines


@pytest.mark.slow
def test_a_convolution_costs_two_operations_a_product_and_each_tensor_once() -> None:
    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    (cost,) = net_costs(torch.nn.Sequential(conv), 2, (4, 5, 6), "fp16").values()
    products = 2 * 8 * 5 * 6 * 4 * 9
    assert cost == Cost(2 * products, 2 * (2 * 4 * 5 * 6 + 8 * 4 * 9 + 2 * 8 * 5 * 6))


@pytest.mark.slow
def test_the_graph_costs_what_the_net_costs() -> None:
    net = fuse(make_net(groups=2), torch.float32)
    graph = to_onnx(net, FloatLayers(), GraphOptions(32, 32), {}).to_proto()  # type: ignore[arg-type]
    of_graph, of_net = graph_costs(graph, 3, "fp32"), net_costs(net, 3, (3, 32, 32), "fp32")
    assert len(of_graph) == len(of_net)
    assert total_cost(of_graph) == total_cost(of_net)


@pytest.mark.slow
def test_costs_leave_the_net_as_it_is() -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net_costs(net, 1, (3, 32, 32), "fp32")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.slow
def test_resnet50_has_its_published_operations() -> None:
    card = load_baselines()["ResNet-50"]
    with torch.device("meta"):
        net = build_baseline(card).eval()
    cost = total_cost(net_costs(net, 1, (3, 224, 224), "fp32"))
    assert cost.flops / 2e9 == pytest.approx(card.published.gflops, rel=2e-3)
