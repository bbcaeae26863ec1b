"""Scales of training: observed ones, and the file that keeps learned ones for their checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.small_nets import Segmenter, make_net
from torch import Tensor, nn

from repvgg_deploy import prepare_qat
from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.quantization.qat import QatOptions, quantizers
from repvgg_deploy.quantization.qat_scales import (
    ScalesOrigin,
    TrainedAs,
    load_scales,
    observe_scales,
    save_scales,
)


def images_of(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_an_image_with_extreme_activations_does_not_decide_the_scales() -> None:
    net = make_net()
    images = images_of(32)
    extreme = torch.cat([images, 200 * images[:1]])
    for options in (QatOptions(), QatOptions(activation_bits=6)):
        usual, other = (observe_scales(net, [batch], options) for batch in (images, extreme))
        # The image itself is not clipped: what is large there is no outlier of the net's.
        inner = [name for name in usual.layers if name != "stages.0.0"]
        for name in inner:
            assert other.layers[name].input == pytest.approx(usual.layers[name].input, rel=0.3), name
        assert usual.pool is not None
        assert other.pool == pytest.approx(usual.pool, rel=0.3)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([torch.rand(2, 3, 32, 32), torch.zeros(2)], "a batch is a list that is no tensor"),
        ({"images": torch.rand(2, 3, 32, 32)}, "a batch is a dict that is no tensor"),
        (torch.full((2, 3, 32, 32), math.nan), "activations before stages.0.0 are not finite"),
        (torch.full((2, 3, 32, 32), math.inf), "activations before stages.0.0 are not finite"),
    ],
)
def test_batches_that_are_no_inputs_are_told_of(batch, said) -> None:
    with pytest.raises(DeployError, match=said):
        observe_scales(make_net(), [batch])


def test_a_block_that_took_no_part_is_named() -> None:
    net = nn.ModuleList(list(make_net().blocks())[:2])
    net.forward = lambda x: net[0](x)
    with pytest.raises(DeployError, match="1 did not receive a batch"):
        observe_scales(net, [images_of(2)])


def test_a_model_that_trains_is_observed_in_evaluation_mode_and_left_as_it_was() -> None:
    net, images = make_net(), images_of(4)
    wanted = observe_scales(net.eval(), [images])
    net.train()
    net.stages[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = observe_scales(net, [images])
    assert all(found.layers[name].input == layer.input for name, layer in wanted.layers.items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert net.stages[1].training
    assert not net.stages[0].training


@pytest.mark.slow
def test_observed_scales_have_the_range_that_is_asked_for() -> None:
    net, images = make_net(), [images_of(8)]
    narrow, wide = (observe_scales(net, images, QatOptions(full_range=full)) for full in (False, True))
    assert (narrow.full_range, wide.full_range) == (False, True)
    inner = [name for name in narrow.layers if name != "stages.0.0"]
    assert all(wide.layers[name].input < 0.8 * narrow.layers[name].input for name in inner)
    # What the quantizers keep at 127 has scales for 127: images without a negative value, and blocks of other modules.
    positive = [images_of(8).abs()]
    narrow, wide = (observe_scales(net, positive, QatOptions(full_range=full)) for full in (False, True))
    assert wide.layers["stages.0.0"].input == narrow.layers["stages.0.0"].input
    narrow, wide = (observe_scales(Segmenter().eval(), positive, QatOptions(full_range=full)) for full in (False, True))
    assert not wide.full_range
    assert all(wide.layers[name].input == layer.input for name, layer in narrow.layers.items())


@pytest.mark.slow
@pytest.mark.parametrize("net", [make_net, Segmenter], ids=["a classifier", "another module"])
def test_observed_scales_are_for_the_integers_that_the_quantizer_has(net: Callable[[], nn.Module]) -> None:
    # Below 8 bits a signed quantizer has half of the integers, also for images without a negative value.
    images, options = images_of(8).abs(), QatOptions(activation_bits=6)
    model = net().eval()
    prepared = prepare_qat(model, observe_scales(model, [images], options), options)
    first = next(quantizers(prepared))

    def error(factor: float) -> float:
        scale = first.scale * factor
        rounded = (images / scale).round().clamp(first.lowest, first.highest) * scale
        return float((rounded - images).square().sum())

    assert error(1.0) < 1.02 * min(error(factor) for factor in (0.5, 0.75, 1.5, 2.0))


def test_scales_are_kept_for_one_checkpoint(tmp_path: Path) -> None:
    scales = observe_scales(make_net(), [images_of(8)])
    path = tmp_path / "scales.npz"
    trained_as = TrainedAs.of(make_net().spec, Preprocessing())
    kept = ScalesOrigin("fast", 5, 1, trained_as)
    save_scales(scales, path, "a" * 64, kept)
    found = load_scales(path, "a" * 64)
    assert found is not None
    read, origin = found
    assert origin == kept
    assert read.pool == pytest.approx(scales.pool)
    assert all(torch.equal(read.layers[name].weight, layer.weight) for name, layer in scales.layers.items())
    assert origin.trained_as.differences(trained_as) == {}
    other = TrainedAs.of(make_net().spec, Preprocessing(mean=(0.5, 0.5, 0.5)))
    assert trained_as.differences(other).keys() == {"mean"}
    assert trained_as.differences(replace(trained_as, strides="2,2,2")) == {}
    assert trained_as.differences(replace(trained_as, strides="1,2,2")) == {"strides": "2,2,2,2,2"}
    with pytest.raises(DeployError, match="another checkpoint"):
        load_scales(path, "b" * 64)
    assert load_scales(tmp_path / "none.npz", "a" * 64) is None
    assert not read.full_range
    save_scales(replace(scales, full_range=True), path, "a" * 64, kept)
    wide = load_scales(path, "a" * 64)
    assert wide is not None
    assert wide[0].full_range
