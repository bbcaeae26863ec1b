"""Mixed precision: the ranking of layers, and the smallest set kept float within a limit."""

from __future__ import annotations

import pytest
import torch
from helpers.quantized_nets import QUICK, draw_images, fused_net

from repvgg_deploy.quantization import QuantizedNet, quantize
from repvgg_deploy.quantization.layer_report import signal_to_noise_db
from repvgg_deploy.quantization.mixed_precision import (
    DropLimit,
    LayerSensitivity,
    layers_within,
    lead_at_risk,
    quantize_within,
    rank_layers,
)
from repvgg_deploy.quantization.quantize import quantize_apart


@pytest.mark.slow
def test_the_ranking_holds_every_layer_once_by_error_per_mac() -> None:
    net, images = fused_net(), draw_images(64)
    quantized = quantize_apart(net, [images], QUICK)
    ranking = rank_layers(quantized, images)
    assert {layer.name for layer in ranking} == set(quantized.integers())
    assert [layer.gain for layer in ranking] == sorted((layer.gain for layer in ranking), reverse=True)
    assert sum(layer.macs_share for layer in ranking) == pytest.approx(1.0)
    assert all(layer.error > 0 for layer in ranking)


@pytest.mark.slow
def test_a_layer_by_itself_errs_less_than_the_net() -> None:
    """Each is quantized as if the others were float; were it to make up for their error, alone it would err more."""
    net, images = fused_net(), draw_images(64)
    ranking = rank_layers(quantize_apart(net, [images], QUICK), images)
    whole = lead_at_risk(net(images), quantize(net, [images], QUICK)(images))
    assert max(layer.error for layer in ranking) < whole


def test_the_lead_at_risk_is_that_of_the_doubtful_images() -> None:
    exact = torch.tensor([[5.0, 4.0, 0.0], [0.0, 100.0, 50.0]])
    assert lead_at_risk(exact, exact) == 0.0
    # Both leads change by one: half of the one is left, and nearly all of the other.
    changed = exact + torch.tensor([[0.0, 1.0, 9.0], [0.0, 0.0, 1.0]])
    assert lead_at_risk(exact, changed) == pytest.approx((1 / 2 + 1 / 51) / 2)
    assert lead_at_risk(exact, exact * 1e6) == pytest.approx(1.0, abs=1e-5)
    assert lead_at_risk(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0
    assert lead_at_risk(torch.tensor([[3.0]]), torch.tensor([[2.0]])) == pytest.approx(1 / 4)


@pytest.mark.slow
def test_a_layer_with_a_bad_scale_has_the_largest_error() -> None:
    net, images = fused_net(), draw_images(64)
    quantized = quantize_apart(net, [images], QUICK)
    name = "stages.2.1"
    layer = quantized.integer_layer(name)
    assert layer is not None
    layer.input_scale *= 40
    assert max(rank_layers(quantized, images), key=lambda ranked: ranked.error).name == name


def test_layers_are_taken_until_the_share_is_used_up() -> None:
    ranking = tuple(LayerSensitivity(n, e, s) for n, e, s in [("a", 3.0, 0.2), ("b", 2.0, 0.5), ("c", 0.1, 0.1)])
    assert layers_within(ranking, 0.0) == ()
    assert layers_within(ranking, 0.35) == ("a", "c")
    assert layers_within(ranking, 1.0) == ("a", "b", "c")


@pytest.mark.slow
def test_a_limit_that_int8_keeps_leaves_nothing_float() -> None:
    found = quantize_within(fused_net(), [draw_images(32)], QUICK, DropLimit(lambda _: 0.1, 0.5))
    assert found.kept_float == ()
    assert found.macs_share == 0.0


@pytest.mark.slow
def test_the_smallest_set_within_the_limit_is_kept_float() -> None:
    net, images = fused_net(), draw_images(64)
    exact = net(images)

    def noise(candidate: QuantizedNet) -> float:
        return -signal_to_noise_db(exact, candidate(images))

    everything = noise(quantize(net, [images], QUICK))
    found = quantize_within(net, [images], QUICK, DropLimit(noise, everything - 2.0))
    assert found.drop <= everything - 2.0
    assert 0 < len(found.kept_float) < len(found.net.integers()) + len(found.kept_float)
    assert found.net.float_layers() == tuple(n for n in _order(found.net) if n in found.kept_float)
    assert 0 < found.macs_share < 1
    assert torch.isfinite(found.net(images)).all()


@pytest.mark.slow
def test_layers_that_stay_float_do_so_in_every_candidate() -> None:
    seen: list[tuple[str, ...]] = []

    def never_enough(candidate: QuantizedNet) -> float:
        seen.append(candidate.float_layers())
        return 1.0

    named = ("stages.2.1", "stages.1.0", "stages.2.1")
    found = quantize_within(fused_net(), [draw_images(32)], QUICK, DropLimit(never_enough, 0.5), keep_float=named)
    assert len(seen) > 3
    assert all({*named} <= {*layers} for layers in seen)
    assert len(found.kept_float) == len({*found.kept_float})


def _order(net: QuantizedNet) -> list[str]:
    return [*(name for name, _ in net.float_net.named_blocks()), "classifier"]
