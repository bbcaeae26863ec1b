"""Names behind any prefix and between any wrappers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_nets import NETS, make_net, name_in_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.repvgg import RepVGG

Save = Callable[..., Path]
State = dict[str, Tensor]


def same(path: Path, net: RepVGG, **options: Any) -> bool:
    tensors = load_checkpoint(path, **options).tensors
    expected = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[k], v) for k, v in expected.items())


_word = st.from_regex(r"[a-z_][a-z0-9_]{0,9}|\d{1,3}", fullmatch=True)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(_word, max_size=4), layout=st.sampled_from(sorted(NETS)))
def test_whatever_prefix_all_names_share_is_taken_off(words: list[str], layout: str, save: Save) -> None:
    net = make_net(blocks=(1, 2), widths=(4, 8, 8), **NETS[layout])
    state = name_in_layout(net, layout)
    prefix = "".join(f"{word}." for word in words)
    assert same(save({"state_dict": {prefix + key: tensor for key, tensor in state.items()}}), net)


@pytest.mark.parametrize(
    "prefix", ["cnn.", "1.", "base_model.", "_forward_module.model.", "net_1.", "feature_extractor.0.", "stage.stem."]
)
def test_prefixes_of_the_field(prefix: str, net: RepVGG, state: State, save: Save) -> None:
    assert same(save({prefix + key: tensor for key, tensor in state.items()}), net)


@pytest.mark.parametrize("layout", ["official", "timm", "openmmlab", "holocron"])
@pytest.mark.parametrize(
    "wrapper", ["_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "module", "inner"]
)
def test_wrappers_in_the_middle_of_names_are_taken_out(layout: str, wrapper: str, save: Save) -> None:
    net = make_net(**NETS[layout])
    state = {}
    for key, tensor in name_in_layout(net, layout).items():
        words = key.split(".")
        # Around each block, as FSDP and torch.compile do: in front of the part's name.
        start = next((n for n, word in enumerate(words) if word in _PARTS), None)
        if start is not None:
            words.insert(start, wrapper)
        state[".".join(words)] = tensor
    assert sum(f".{wrapper}." in key for key in state) > len(state) / 2
    assert same(save(state), net)


_PARTS = {
    "rbr_dense", "rbr_1x1", "rbr_identity", "conv_kxk", "conv_1x1", "identity", "branch_3x3", "branch_1x1",
    "branch_norm", "branches", "attn", "se_layer", "se",
}  # fmt: skip


def test_wrapper_around_some_blocks_only_is_taken_out(net: RepVGG, state: State, save: Save) -> None:
    wrapped = {key.replace("stage3.", "stage3._orig_mod."): tensor for key, tensor in state.items()}
    assert same(save(wrapped), net)


def test_word_around_one_tensor_is_no_wrapper(state: State, save: Save) -> None:
    state["stage2.1.extra.rbr_dense.conv.weight"] = state["stage2.1.rbr_dense.conv.weight"] + 1
    with pytest.raises(CheckpointError, match=r"1 tensor does not belong to the net: stage2\.1\.extra"):
        load_checkpoint(save(state))


def test_nested_dicts_are_as_good_as_dotted_names(net: RepVGG, state: State, save: Save) -> None:
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[leaf] = tensor
    assert same(save({"params": tree, "epoch": 3}), net)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "have_one_storage"),
    [
        ("stage1.{}.weight", True),
        ("stage1.{}.weight", False),
        ("stage1.0.rbr_dense.conv.weight{}", True),
        ("stage1.x{}.rbr_dense.bn.bias", True),
    ],
)
def test_thousands_of_surplus_names_take_no_quadratic_time(
    key: str, have_one_storage: bool, state: State, save: Save
) -> None:
    zero = torch.zeros(1)
    seconds = []
    for count in (5_000, 20_000):
        path = save(state | {key.format(n): zero if have_one_storage else zero.clone() for n in range(10, count)})
        start = time.process_time()
        with pytest.raises(CheckpointError, match="do not belong"):
            load_checkpoint(path)
        seconds.append(time.process_time() - start)
    # Four times as many names: quadratic work would take sixteen times as long.
    assert seconds[1] < 10 * seconds[0]


def test_name_of_many_words_is_read_in_a_moment(state: State, save: Save) -> None:
    path = save(state | {".".join(["stage1"] * 50_000): torch.zeros(1), "stage1.0." * 9_000 + "weight": torch.zeros(1)})
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert len(caught.value.message) < 2000
    assert time.process_time() - start < 20
