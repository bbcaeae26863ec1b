"""Engines built for real by TensorRT-RTX, without a GPU: every card, every precision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.engine_graphs import (
    PIXELS,
    PREPROCESSING,
    make_net,
    narrow_spec,
    rtx_backend,
    small_onnx,
    write_onnx,
)
from helpers.progress import Heard

from repvgg_deploy.artifacts import Precision
from repvgg_deploy.engine import BuildOptions, build_engine
from repvgg_deploy.engine.building import _configure
from repvgg_deploy.engine.network import parse_onnx, read_convolution_precisions
from repvgg_deploy.engine.sidecar import read_sidecar
from repvgg_deploy.errors import DeployError, GraphError
from repvgg_deploy.files.kinds import hash_file
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.graphs.repvgg import GraphOptions
from repvgg_deploy.nets.cards import find_card, load_cards

CARDS = list(load_cards())
NO_CACHE = BuildOptions(timing_cache=False)

# What a graph can be asked for, spread over the precisions so that each card meets all of it.
VARIANTS = {
    "fp32-dynamic": (Precision.FP32, GraphOptions(PIXELS, PIXELS)),
    "fp16-static-uint8": (Precision.FP16, GraphOptions(PIXELS, PIXELS, batch=4, uint8_input=PREPROCESSING)),
    "int8-dynamic-topk": (Precision.INT8, GraphOptions(PIXELS, PIXELS, topk=3, softmax=True)),
}
# One card of each depth, and of each kind of block; the others differ from them in widths, and are built in one variant
# each here.
KINDS = ("RepVGG-demo", "RepVGG-A0", "RepVGG-B1", "RepVGG-B1g4", "RepVGG-D2se", "RepVGGplus-L2pse")


def build_cases() -> Iterator[Any]:
    """Every card in every variant; what repeats a kind is left to the exhaustive run."""
    for index, card in enumerate(CARDS):
        for number, variant in enumerate(VARIANTS):
            is_needed = card in KINDS or index % len(VARIANTS) == number
            yield pytest.param(card, variant, marks=[] if is_needed else [pytest.mark.exhaustive])


@pytest.mark.slow
@pytest.mark.parametrize(("card", "variant"), list(build_cases()))
def test_every_card_builds_in_every_precision(card: str, variant: str, tmp_path: Path) -> None:
    precision, options = VARIANTS[variant]
    spec = narrow_spec(card)
    onnx = write_onnx(tmp_path, make_net(spec), precision, options)
    engine = build_engine(onnx, rtx_backend(), NO_CACHE, tmp_path)
    side = engine.side
    assert engine.plan.stat().st_size == side.bytes > 0
    squeeze_convolutions = 2 * sum(block.squeeze_excite is not None for block in spec.blocks)
    expected = {str(precision): len(spec.blocks) + squeeze_convolutions}
    if precision is Precision.INT8 and squeeze_convolutions:
        expected = {"fp32": squeeze_convolutions, "int8": len(spec.blocks)}
    assert side.convolutions == expected
    assert side.profile == ((4, 4, 4) if options.batch else (1, 32, 256))
    assert side.inputs[0].shape == ((4, PIXELS, PIXELS, 3) if options.uint8_input else (-1, 3, PIXELS, PIXELS))
    assert [output.name for output in side.outputs] == (["scores", "classes"] if options.topk else ["logits"])


def test_an_engine_of_tensorrt_rtx_leaves_its_memory_to_the_caller(tmp_path: Path) -> None:
    """Without it a run may allocate memory, and then no CUDA graph can hold it."""
    backend = rtx_backend()
    parsed = parse_onnx(backend, small_onnx(tmp_path))
    config, _ = _configure(backend, parsed, NO_CACHE)
    assert config.get_flag(backend.module.BuilderFlag.REQUIRE_USER_ALLOCATION)


@pytest.mark.slow
@pytest.mark.parametrize(("card", "precision"), [("A0", Precision.FP32), ("B1g4", Precision.FP16)])
def test_full_size_nets_build(card: str, precision: Precision, tmp_path: Path) -> None:
    net = make_net(find_card(card).spec().fused())
    onnx = write_onnx(tmp_path, net, precision, GraphOptions(224, 224))
    side = build_engine(onnx, rtx_backend(), NO_CACHE, tmp_path).side
    weights = sum(parameter.numel() for parameter in net.parameters()) * (4 if precision is Precision.FP32 else 2)
    assert weights < side.bytes < 1.3 * weights
    assert side.convolutions == {str(precision): len(net.spec.blocks)}


@pytest.mark.slow
def test_the_sidecar_says_what_the_plan_is(tmp_path: Path) -> None:
    onnx = small_onnx(tmp_path, Precision.FP16)
    backend = rtx_backend()
    engine = build_engine(onnx, backend, replace(NO_CACHE, batch_range=(2, 3, 5)), tmp_path)
    assert engine.plan == tmp_path / "net.fp16.plan"
    values = json.loads((tmp_path / "net.fp16.plan.json").read_text(encoding="utf-8"))
    assert values["backend"] == "tensorrt-rtx"
    assert values["backend_version"] == backend.version
    assert values["profile"] == [2, 3, 5]
    assert values["sha256"] == hash_file(engine.plan)
    assert values["onnx_sha256"] == hash_file(onnx)
    assert values["provenance"]["arch"] == "RepVGG-A0"
    assert values["provenance"]["precision"] == "fp16"
    assert values["provenance"]["preprocessing"]["height"] == PIXELS
    assert read_sidecar(engine.plan) == engine.side


@pytest.mark.slow
def test_the_plan_is_a_plain_plan_of_the_library(tmp_path: Path) -> None:
    engine = build_engine(small_onnx(tmp_path), rtx_backend(), NO_CACHE, tmp_path)
    # The mark that the library's own serializer puts in front.
    assert engine.plan.read_bytes()[1:4] == b"trt"


@pytest.mark.slow
def test_progress_begins_at_zero_ends_at_one_and_never_falls(tmp_path: Path) -> None:
    heard = Heard()
    build_engine(small_onnx(tmp_path), rtx_backend(), NO_CACHE, tmp_path, heard)
    shares = [done / total for _, done, total in heard.steps]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    assert len(set(shares)) > 3
    assert {name for name, _, _ in heard.steps} == {"building the engine"}


@pytest.mark.slow
def test_options_reach_the_builder(tmp_path: Path) -> None:
    options = replace(NO_CACHE, workspace_bytes=1 << 28, optimization_level=0, tf32=False)
    engine = build_engine(small_onnx(tmp_path), rtx_backend(), options, tmp_path)
    assert read_sidecar(engine.plan).options == options


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("7.5",), ("8.9", "12.0")])
def test_a_plan_is_built_for_the_gpus_that_were_named(targets: tuple[str, ...], tmp_path: Path) -> None:
    options = replace(NO_CACHE, compute_capabilities=targets)
    onnx, backend = small_onnx(tmp_path, Precision.FP16), rtx_backend()
    everywhere = build_engine(onnx, backend, NO_CACHE, tmp_path).plan.read_bytes()
    engine = build_engine(onnx, backend, options, tmp_path)
    assert read_sidecar(engine.plan).options.compute_capabilities == targets
    assert engine.plan.read_bytes() != everywhere


def test_a_failed_build_leaves_nothing_in_the_output_folder(tmp_path: Path) -> None:
    backend = rtx_backend()
    onnx = small_onnx(tmp_path, declared=Precision.INT8)
    output = tmp_path / "out"
    with pytest.raises(GraphError, match="metadata say int8"), stage_files(output) as staging:
        build_engine(onnx, backend, NO_CACHE, staging)
    assert not output.exists()


@pytest.mark.parametrize("declared", [Precision.FP16, Precision.INT8])
def test_a_graph_in_another_precision_than_it_says_is_refused(declared: Precision, tmp_path: Path) -> None:
    onnx = small_onnx(tmp_path, declared=declared)
    with pytest.raises(GraphError, match=f"metadata say {declared}"):
        build_engine(onnx, rtx_backend(), NO_CACHE, tmp_path)
    assert not list(tmp_path.glob("*.plan*"))


def test_precisions_are_read_by_the_name_of_the_convolution(tmp_path: Path) -> None:
    backend = rtx_backend()
    parsed = parse_onnx(backend, small_onnx(tmp_path, Precision.INT8))
    precisions = read_convolution_precisions(backend, parsed.network)
    assert precisions["stages.0.0.conv"] == "int8"
    assert set(precisions) == {f"{name}.conv" for name, _ in make_net(narrow_spec("A0")).named_blocks()}


def test_a_batch_range_out_of_order_is_refused(tmp_path: Path) -> None:
    options = replace(NO_CACHE, batch_range=(8, 4, 16))
    with pytest.raises(DeployError, match="not in order"):
        build_engine(small_onnx(tmp_path), rtx_backend(), options, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (BuildOptions(version_compatible=True), "no version-compatible plans"),
        (BuildOptions(hardware_compatibility="ampere+"), "no hardware compatibility levels"),
        (BuildOptions(compute_capabilities=("9.0",)), "build for compute capability 9.0"),
        (BuildOptions(optimization_level=6), "no optimization level 6"),
        (BuildOptions(workspace_bytes=-1), "cannot be negative"),
    ],
)
def test_what_the_library_cannot_do_is_said_before_the_build(options: BuildOptions, said: str, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=said) as raised:
        build_engine(small_onnx(tmp_path), rtx_backend(), options, tmp_path)
    assert raised.value.hint
