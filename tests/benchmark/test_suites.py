"""Suite files: what they expand to, what is refused, and those that the project brings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from helpers.engine_graphs import rtx_backend
from helpers.small_nets import make_net

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.benchmark.graphs import NamedNet, write_net
from repvgg_deploy.benchmark.opening import _build_plan
from repvgg_deploy.benchmark.run import _with_own_plan
from repvgg_deploy.benchmark.suites import load_suite
from repvgg_deploy.engine.sidecar import read_sidecar
from repvgg_deploy.errors import DeployError
from repvgg_deploy.fusion.fuse import fuse
from repvgg_deploy.nets.cards import find_baseline, find_card

SUITES = sorted((Path(__file__).parents[2] / "bench" / "suites").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_of_the_project_names_models_that_there_are(path: Path) -> None:
    request = load_suite(path)
    for group in request.groups:
        for case in group.all_cases():
            assert find_baseline(case.model) or find_card(case.model)


def test_there_are_suites() -> None:
    assert {path.stem for path in SUITES} >= {
        "cpu",
        "cpu_fused_vs_training",
        "paper",
        "gpu_torch",
        "gpu_tensorrt",
        "gpu_tensorrt_rtx",
    }


def test_a_group_is_every_combination_side_by_side(tmp_path: Path) -> None:
    text = """
    [measure]
    min_rounds = 4
    [[group]]
    models = ["A0", "A1"]
    precisions = ["fp32", "int8"]
    forms = ["deploy"]
    batches = [1, 16]
    """
    request = load_suite(write(tmp_path, text))
    assert request.options.min_rounds == 4
    assert [group.batch for group in request.groups] == [1, 16]
    cases = [(case.model, case.precision) for case in request.groups[0].cases]
    assert cases == [("A0", "fp32"), ("A0", "int8"), ("A1", "fp32"), ("A1", "int8")]


def test_together_by_model_makes_a_group_a_model(tmp_path: Path) -> None:
    text = '[[group]]\nmodels = ["A0", "A1"]\nforms = ["training", "deploy"]\ntogether = "model"'
    groups = load_suite(write(tmp_path, text)).groups
    assert [{case.model for case in group.cases} for group in groups] == [{"A0"}, {"A1"}]
    assert len({group.key for group in groups}) == 2


def test_the_baseline_is_run_in_each_way_that_a_model_is(tmp_path: Path) -> None:
    text = '[[group]]\nmodels = ["A0", "A1"]\nprecisions = ["fp32", "int8"]\nbaseline = "resnet50"'
    (group,) = load_suite(write(tmp_path, text)).groups
    extra = group.all_cases()[len(group.cases) :]
    assert [(case.model, case.precision) for case in extra] == [("resnet50", "fp32"), ("resnet50", "int8")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing field `group`"),
        ('[[group]]\nmodels = ["A0"]\nspeed = 1', "unknown field `speed`"),
        ('[[group]]\nmodels = ["A0"]\nbackends = ["abacus"]', "abacus"),
        ('[[group]]\nmodels = ["A0"]\ntogether = "none"', "together"),
        ("[[group]]\nbatches = [1]", "missing field `models`"),
        ('[measure]\nseconds = 3\n[[group]]\nmodels = ["A0"]', "measure: unknown field `seconds`"),
        ("[[group", "cannot read"),
        ("group = 3", "group: Expected `array`"),
        ('[[group]]\nmodels = "A0"', "models: Expected `array`, got `str`"),
        ("[[group]]\nmodels = []", "models: Expected `array` of length >= 1"),
        ('[[group]]\nmodels = ["A0"]\nbatches = [0]', "batches.*: Expected `int` >= 1"),
        ('[[group]]\nmodels = ["A0"]\nbatches = [1.5]', "batches.*: Expected `int`, got `float`"),
        ('[[group]]\nmodels = ["A0"]\nmodes = ["lazy"]', "modes.*'lazy'"),
        ('[[group]]\nmodels = ["A0"]\nstreams = 1000000', "streams: Expected `int` <= 64"),
        ('[[group]]\nmodels = ["A0"]\ntransfers = "no"', "transfers: Expected `bool`, got `str`"),
        ('[measure]\nmin_duration_s = inf\n[[group]]\nmodels = ["A0"]', "min_duration_s: Expected `float` <= 86400"),
        ('[measure]\nwarmup_s = nan\n[[group]]\nmodels = ["A0"]', "warmup_s: Expected `float` >= 0"),
        ("threads = " + "9" * 5000, "threads|cannot read .* limit"),
        ("name = " + "[" * 5000, "cannot read"),
        ('"bad\\u001b[31m\\nerror: forged" = 1', "missing field `group`|unknown field `bad\\?"),
    ],
)
def test_a_wrong_suite_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=message):
        load_suite(write(tmp_path, text))


def test_a_missing_suite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="cannot read"):
        load_suite(tmp_path / "none.toml")


def test_a_group_is_another_one_with_other_copies_streams_threads_or_baseline(tmp_path: Path) -> None:
    plain = '[[group]]\nmodels = ["A0"]\n'
    lines = ("", "transfers = true", "streams = 2", 'baseline = "resnet50"')
    texts = [*(plain + line for line in lines), "threads = 1\n" + plain]
    keys = [load_suite(write(tmp_path, text)).groups[0].key for text in texts]
    assert len(set(keys)) == len(keys)


@pytest.mark.exhaustive
@pytest.mark.parametrize("suite", ["gpu_tensorrt", "gpu_tensorrt_rtx"])
def test_a_suite_of_engines_builds_a_plan_for_each_batch(suite: str, tmp_path: Path) -> None:
    """Built by TensorRT-RTX, which needs no GPU for it, from the layers of a small net."""
    rtx_backend()
    (path,) = (path for path in SUITES if path.stem == suite)
    net = fuse(make_net(), torch.float32)
    seen = set()
    for group in load_suite(path).groups:
        for case in group.cases:
            kind = (case.precision, group.batch)
            if kind in seen:
                continue
            seen.add(kind)
            built = _with_own_plan(replace(case, backend="tensorrt-rtx"), group.batch)
            graph = write_net(NamedNet("net", net, 32), Precision(case.precision), case.form, tmp_path, for_engine=True)
            assert "LeakyRelu" not in {node.op_type for node in onnx.load(graph).graph.node}
            assert read_sidecar(_build_plan(built, graph, tmp_path)).profile == (group.batch,) * 3
    assert {precision for precision, _ in seen} == {"fp16", "int8"}
    assert {128, 256} <= {batch for _, batch in seen}
