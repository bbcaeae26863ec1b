"""The settings that files of this program keep in their metadata."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.small_nets import make_net
from safetensors.torch import save_file

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.checkpoints.writing import describe_in_metadata, name_state_dict, write_state_dict
from repvgg_deploy.checkpoints.written_settings import KEY, read_written, settings_metadata
from repvgg_deploy.nets.settings import NO_SETTINGS, StructureOptions

STRUCTURE = StructureOptions((1, 1, 2, 2, 2), "leaky_relu:0.1", 1e-3)
IMAGES = PreprocessingOptions((32, 48), 40, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), "bicubic", "bgr", 0.9)


def test_what_is_written_is_read() -> None:
    found = read_written(settings_metadata(STRUCTURE, IMAGES)[KEY])
    assert (found.structure, found.preprocessing) == (STRUCTURE, IMAGES)
    assert settings_metadata(StructureOptions(), PreprocessingOptions()) == {}


@pytest.mark.parametrize("text", [None, 3, "", "[]", "{", '{"strides": [0, 0, 0]}', '{"mean": ["a"]}', "\ud800"])
def test_what_others_write_there_is_not_taken(text) -> None:
    assert read_written(text) == NO_SETTINGS


@pytest.mark.parametrize("source", ["configuration", "options"])
def test_a_file_made_from_a_checkpoint_is_read_as_the_same_net(source, tmp_path: Path) -> None:
    net = make_net(0)
    state = {"state_dict": name_state_dict(net, "official")}
    options = StructureOptions(activation="silu", bn_eps=1e-3)
    if source == "configuration":
        state["hyper_parameters"] = {"activation": "SiLU", "bn_eps": 1e-3, "mean": [0.4] * 3, "std": [0.2] * 3}
        options = StructureOptions()
    torch.save(state, tmp_path / "net.ckpt")
    checkpoint = load_checkpoint(tmp_path / "net.ckpt", structure=options)
    copy = tmp_path / "copy.safetensors"
    write_state_dict(state["state_dict"], copy, describe_in_metadata(checkpoint))
    again = load_checkpoint(copy)
    assert again.spec == checkpoint.spec
    assert str(again.spec.activation) == "silu"
    assert again.settings.preprocessing == checkpoint.settings.preprocessing
    # Where nobody has said anything, nothing is.
    save_file(state["state_dict"], tmp_path / "plain.safetensors")
    assert describe_in_metadata(load_checkpoint(tmp_path / "plain.safetensors")) == {}
