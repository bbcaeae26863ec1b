"""How a benchmark opens what it runs: a baseline is built and sized like the model that it is compared with."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_graphs import write_onnx
from small_nets import make_net

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.benchmark import Group, _with_precisions
from repvgg_deploy.contestants import Contestant, Entry, _build_plan, comparable_options
from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.engine.side_file import read_side_file
from repvgg_deploy.errors import DeployError
from repvgg_deploy.fuse import fuse
from repvgg_deploy.measure import Label
from repvgg_deploy.onnx_export import GraphOptions

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
PLAN = BuildOptions(batch_range=(1, 128, 512), optimization_level=2)


def opened(
    entry: Entry, size: tuple[int, int], precision: str = "fp32", build: BuildOptions | None = None
) -> Contestant:
    label = Label(entry.model, entry.backend or "tensorrt", "1", precision, 0, entry.form, "", size)
    return Contestant(label, lambda _: pytest.fail("nothing is run"), build)


def twins(group: Group, *contestants: Contestant) -> tuple[Entry, ...]:
    return _with_precisions(group, lambda *_: list(contestants))[len(group.entries) :]


def test_the_baseline_of_an_engine_is_built_with_its_options_and_size() -> None:
    entry = Entry("a.plan")
    group = Group("batch 512", (entry,), 512, "resnet50")
    (twin,) = twins(group, opened(entry, (64, 64), "tf32", PLAN))
    assert (twin.model, twin.backend, twin.precision) == ("resnet50", "tensorrt", "tf32")
    assert (twin.size, twin.build) == (64, PLAN)


def test_models_of_two_sizes_have_a_baseline_each() -> None:
    entries = (Entry("a.onnx", "onnxruntime-cpu"), Entry("b.onnx", "onnxruntime-cpu"))
    group = Group("batch 1", entries, 1, "resnet50")
    found = twins(group, opened(entries[0], (64, 64)), opened(entries[1], (224, 224)))
    assert [twin.size for twin in found] == [64, 224]


def test_a_baseline_that_is_named_among_the_models_is_not_run_twice() -> None:
    entries = tuple(Entry(name, "torch-cpu", "fp32") for name in ("A0", "resnet50"))
    group = Group("batch 1", entries, 1, "resnet50")
    assert not twins(group, *(opened(entry, (224, 224)) for entry in entries))


def test_a_model_of_another_shape_has_no_baseline() -> None:
    entry = Entry("a.onnx", "onnxruntime-cpu")
    with pytest.raises(DeployError, match="takes 64x96 pixels") as raised:
        twins(Group("batch 1", (entry,), 1, "resnet50"), opened(entry, (64, 96)))
    assert "--baseline" in raised.value.hint


def test_what_is_compared_with_a_stripped_engine_can_run() -> None:
    options = comparable_options(replace(PLAN, strip_weights=True, timing_cache=False))
    assert options == replace(PLAN, refittable=True)


@needs_rtx
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True)])
def test_an_engine_is_built_as_the_entry_says(precision: str, tf32: bool, tmp_path: Path) -> None:
    net: Any = fuse(make_net(), torch.float32)
    graph = write_onnx(tmp_path, net, Precision.FP32, GraphOptions(32, 32))
    plan = _build_plan(Entry("net", "tensorrt-rtx", precision, build=PLAN), graph, tmp_path)
    side = read_side_file(plan)
    assert side.options == replace(PLAN, tf32=tf32)
    assert side.profile == (1, 128, 512)
