"""How a benchmark opens what it runs: a baseline is built and sized like the model that it is compared with."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_graphs import small_onnx, write_onnx
from helpers.small_nets import make_net

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.benchmark import opening
from repvgg_deploy.benchmark.cases import Case, OpenedCase
from repvgg_deploy.benchmark.graphs import NamedNet
from repvgg_deploy.benchmark.measure import Label, Measurement, Query, Slice
from repvgg_deploy.benchmark.opening import (
    _build_plan,
    _open_torch,
    _pixels,
    away_from_the_best_batch,
    comparable_options,
    open_case,
)
from repvgg_deploy.benchmark.run import Group, _add_group, _with_precisions
from repvgg_deploy.engine.options import BuildOptions
from repvgg_deploy.engine.sidecar import read_sidecar
from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.graphs.builder import write_graph
from repvgg_deploy.graphs.layers import FloatLayers
from repvgg_deploy.graphs.repvgg import GraphOptions, to_onnx
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.runtime.torch import TorchOptions

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
PLAN = BuildOptions(batch_range=(1, 128, 512), optimization_level=2)


def opened(case: Case, size: tuple[int, int], precision: str = "fp32", build: BuildOptions | None = None) -> OpenedCase:
    label = Label(case.model, case.backend or "tensorrt", "1", precision, 0, case.form, "", size)
    return OpenedCase(label, lambda _: pytest.fail("nothing is run"), build)


def twins(group: Group, *opened_cases: OpenedCase) -> tuple[Case, ...]:
    return _with_precisions(group, lambda *_: list(opened_cases))[len(group.cases) :]


def test_the_baseline_of_an_engine_is_built_with_its_options_and_size() -> None:
    case = Case("a.plan")
    group = Group("batch 512", (case,), 512, "resnet50")
    (twin,) = twins(group, opened(case, (64, 64), "tf32", PLAN))
    assert (twin.model, twin.backend, twin.precision) == ("resnet50", "tensorrt", "tf32")
    assert (twin.size, twin.build) == (64, PLAN)


def test_models_of_two_sizes_have_a_baseline_each() -> None:
    cases = (Case("a.onnx", "onnxruntime-cpu"), Case("b.onnx", "onnxruntime-cpu"))
    group = Group("batch 1", cases, 1, "resnet50")
    found = twins(group, opened(cases[0], (64, 64)), opened(cases[1], (224, 224)))
    assert [twin.size for twin in found] == [64, 224]


def test_a_baseline_that_is_named_among_the_models_is_not_run_twice() -> None:
    cases = tuple(Case(name, "torch-cpu", "fp32") for name in ("A0", "resnet50"))
    group = Group("batch 1", cases, 1, "resnet50")
    assert not twins(group, *(opened(case, (224, 224)) for case in cases))


def test_a_model_of_another_shape_has_no_baseline() -> None:
    case = Case("a.onnx", "onnxruntime-cpu")
    with pytest.raises(DeployError, match="takes 64x96 pixels") as raised:
        twins(Group("batch 1", (case,), 1, "resnet50"), opened(case, (64, 96)))
    assert "--baseline" in raised.value.hint


def test_what_is_compared_with_a_stripped_engine_can_run() -> None:
    options = comparable_options(replace(PLAN, strip_weights=True, timing_cache=False))
    assert options == replace(PLAN, refittable=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [((3, 64, 96), np.float32, (64, 96)), ((3, 64, 96), np.float16, (64, 96)), ((64, 96, 3), np.uint8, (64, 96))],
)
def test_the_size_of_an_input_is_read_by_its_type(shape: tuple[int, ...], dtype: type, size: tuple[int, int]) -> None:
    assert tuple(_pixels(shape, dtype)) == size


def test_each_model_is_compared_with_the_baseline_of_its_size_and_build() -> None:
    other = replace(PLAN, optimization_level=0)
    cases = [Case(name) for name in ("a.plan", "b.plan", "c.plan")]
    plans = [opened(cases[0], (64, 64), build=PLAN), opened(cases[1], (64, 64), build=other)]
    plans.append(opened(cases[2], (224, 224), build=PLAN))
    baselines = [opened(Case("ResNet-50"), size, build=build) for size, build in (
        ((64, 64), PLAN), ((64, 64), other), ((224, 224), PLAN),
    )]  # fmt: skip
    opened_cases = [*plans, *baselines]
    # Of each baseline another speed.
    seconds = [1.0, 1.0, 1.0, 2.0, 3.0, 4.0]
    measured = [
        Measurement(replace(c.label, batch=1), tuple(Slice((Query(n, n + s, 1e3 * s),)) for n in range(6)))
        for c, s in zip(opened_cases, seconds, strict=True)
    ]
    group = Group("batch 1", tuple(cases), 1, "resnet50")
    empty = {"machine": {"under_load": {}}, "results": [], "ratios": []}
    record = _add_group(empty, group, opened_cases, measured, {}, [])
    assert {r["model"]: r["ratio"] for r in record["ratios"]} == {"a.plan": 2.0, "b.plan": 3.0, "c.plan": 4.0}
    assert [r["input"] for r in record["results"]] == ["64x64", "64x64", "224x224"] * 2


def test_a_graph_that_says_no_precision_takes_a_known_one_only(tmp_path: Path) -> None:
    net: Any = fuse(make_net(), torch.float32)
    path = tmp_path / "net.onnx"
    write_graph(to_onnx(net, FloatLayers(), GraphOptions(32, 32), {}), path)
    with pytest.raises(DeployError, match="no precision 'banana'"):
        open_case(Case(str(path), "onnxruntime-cpu", "banana"), tmp_path)
    costs = {}
    for precision in ("fp32", "int8"):
        opened_case = open_case(Case(str(path), "onnxruntime-cpu", precision), tmp_path)
        assert opened_case.label.precision == precision
        assert opened_case.cost is not None
        costs[precision] = opened_case.cost(1).bytes
    assert costs["fp32"] == 4 * costs["int8"]


def test_onnx_runtime_is_measured_as_it_runs_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runners = []

    def run(*arguments: Any, **options: Any) -> OnnxRunner:
        runners.append(OnnxRunner(*arguments, **options))
        return runners[-1]

    monkeypatch.setattr(opening, "OnnxRunner", run)
    open_case(Case(str(small_onnx(tmp_path)), "onnxruntime-cpu"), tmp_path)
    (runner,) = runners
    options = runner._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"


@needs_rtx
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True)])
def test_an_engine_is_built_as_the_entry_says(precision: str, tf32: bool, tmp_path: Path) -> None:
    net: Any = fuse(make_net(), torch.float32)
    graph = write_onnx(tmp_path, net, Precision.FP32, GraphOptions(32, 32))
    plan = _build_plan(Case("net", "tensorrt-rtx", precision, build=PLAN), graph, tmp_path)
    side = read_sidecar(plan)
    assert side.options == replace(PLAN, tf32=tf32)
    assert side.profile == (1, 128, 512)


@needs_rtx
@pytest.mark.parametrize("batch", [1, 128])
def test_what_is_built_for_a_batch_has_its_kernels_chosen_for_it(batch: int, tmp_path: Path) -> None:
    cases = (Case("net", "tensorrt-rtx", "fp16"), Case("net.plan"), Case("net", "torch-cuda", "fp16"))
    built, plan, torch_case = _with_precisions(Group("group", cases, batch), lambda *_: pytest.fail("nothing is run"))
    assert (plan, torch_case) == cases[1:]
    net: Any = fuse(make_net(), torch.float32)
    graph = write_onnx(tmp_path, net, Precision.FP16, GraphOptions(32, 32))
    assert read_sidecar(_build_plan(built, graph, tmp_path)).profile == (batch, batch, batch)


def test_a_plan_that_is_measured_away_from_its_best_batch_has_a_note() -> None:
    assert away_from_the_best_batch((1, 32, 256), 32) == ()
    assert away_from_the_best_batch((1, 32, 256), 128) == ("the kernels of the plan were chosen for a batch of 32",)


@pytest.mark.slow
@pytest.mark.parametrize("input_type", ["float32", "float16", "uint8"])
def test_the_baseline_takes_its_images_as_the_model_does(input_type: str, tmp_path: Path) -> None:
    case = Case("a.onnx", "onnxruntime-cpu", "fp16", size=32)
    model = replace(opened(case, (32, 32), "fp16"), label=Label("a", "onnxruntime-cpu", "1", "fp16", 0, size=(32, 32)))
    model = replace(model, label=replace(model.label, input_type=input_type))
    (twin,) = twins(Group("batch 1", (case,), 1, "resnet18"), model)
    assert twin.input_type == input_type
    baseline = open_case(twin, tmp_path)
    assert baseline.label.input_type == input_type
    assert replace(baseline.label, mode="").conditions == replace(model.label, mode="").conditions
    baseline.at_batch(2).run(1)


def test_models_that_take_other_inputs_are_not_compared() -> None:
    label = Label("a", "tensorrt", "1", "fp16", 1, size=(32, 32), input_type="uint8")
    assert label.conditions != replace(label, input_type="float32").conditions


@pytest.mark.parametrize(("precision", "wanted"), [("fp16", True), ("bf16", True), ("fp32", False), ("tf32", False)])
def test_half_precision_in_torch_on_a_gpu_is_channels_last_unless_told(
    precision: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TorchOptions] = []

    class Opened(Exception):
        pass

    def refuse(_: object, options: TorchOptions) -> None:
        seen.append(options)
        raise Opened

    monkeypatch.setattr(opening, "TorchRunner", refuse)
    named = NamedNet("net", fuse(make_net(), torch.float32), 32)
    for told in (None, False, True):
        with pytest.raises(Opened):
            _open_torch(Case("net", "torch-cuda", precision, channels_last=told), named)
    assert [options.channels_last for options in seen] == [wanted, False, True]
    with pytest.raises(Opened):
        _open_torch(Case("net", "torch-cpu", "bf16"), named)
    assert not seen[-1].channels_last
