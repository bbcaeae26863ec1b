"""The benchmark with torch on a real GPU: every mode gives the net's logits, and its clocks agree with each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.small_nets import logits_of, make_net, relative

from repvgg_deploy.benchmark.cases import Case
from repvgg_deploy.benchmark.measure import Label, MeasureOptions, measure
from repvgg_deploy.benchmark.opening import open_case
from repvgg_deploy.benchmark.record import check_record
from repvgg_deploy.benchmark.roofline import measure_ceiling
from repvgg_deploy.benchmark.run import BenchRequest, Group, run_benchmark
from repvgg_deploy.benchmark.workloads import StreamWorkload, require_sound
from repvgg_deploy.errors import VerificationError
from repvgg_deploy.nets.seeding import seeded_inputs
from repvgg_deploy.runtime.torch import (
    TorchEvents,
    TorchMode,
    TorchOptions,
    TorchPrecision,
    TorchRunner,
    TorchStream,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
    # Of torch's own: TF32 switches that are to be renamed, cuDNN plans that were tried and failed.
    pytest.mark.filterwarnings("ignore"),
]
# Shares of the logits' norm; fp32 convolutions may go through Winograd's transforms.
LIMITS = {"fp32": 2e-5, "tf32": 0.01, "bf16": 0.05, "fp16": 0.01}
SHORT = MeasureOptions(warmup_s=0.1, min_duration_s=0.3, min_rounds=3)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", get_args(TorchMode))
@pytest.mark.parametrize("precision", get_args(TorchPrecision))
def test_every_mode_gives_the_nets_logits(precision: TorchPrecision, mode: TorchMode, channels_last: bool) -> None:
    net, images = make_net(), torch.from_numpy(seeded_inputs((4, 3, 64, 64)))
    stream = TorchStream(TorchRunner(net, TorchOptions("cuda", precision, mode, channels_last)), images.numpy())
    for _ in range(2):
        stream.upload()
        stream.enqueue()
        stream.download()
    stream.synchronize()
    assert relative(stream._results.float(), logits_of(net, images)) < LIMITS[precision]


def test_precisions_that_take_turns_keep_to_their_own() -> None:
    """TF32 is a switch of the whole process: fp32 must not be faster and rougher for having run beside it."""
    net, images = make_net(), torch.from_numpy(seeded_inputs((4, 3, 64, 64)))
    expected = logits_of(net, images)
    runners = {p: TorchRunner(net, TorchOptions("cuda", p)) for p in ("fp32", "tf32")}  # type: ignore[arg-type]
    for _ in range(3):
        errors = {
            p: relative(torch.from_numpy(runner.run(images.numpy())["logits"]), expected)
            for p, runner in runners.items()
        }
        assert errors["fp32"] < LIMITS["fp32"] < errors["tf32"] < LIMITS["tf32"]


@pytest.mark.parametrize("mode", ["eager", "cuda-graph"])
def test_a_net_that_gives_no_numbers_is_not_measured(mode: TorchMode) -> None:
    net, label = make_net(), Label("net", "torch-cuda", torch.__version__, "fp16", 4)
    images = seeded_inputs((4, 3, 64, 64))
    workload = StreamWorkload(
        label, [TorchStream(TorchRunner(net, TorchOptions("cuda", "fp16", mode)), images)], TorchEvents()
    )
    require_sound([workload])
    with torch.no_grad():
        # Beyond what float16 holds.
        net.classifier.weight.fill_(1e5)
    workload = StreamWorkload(
        label, [TorchStream(TorchRunner(net, TorchOptions("cuda", "fp16", mode)), images)], TorchEvents()
    )
    with pytest.raises(VerificationError, match="gives NaN or Inf"):
        require_sound([workload])


@pytest.mark.parametrize("mode", ["eager", "cuda-graph"])
def test_images_per_second_are_batch_over_compute_time_where_the_gpu_limits(mode: TorchMode, tmp_path: Path) -> None:
    case = Case("B1", "torch-cuda", "fp16", mode=mode, channels_last=True)
    workload = open_case(case, tmp_path).at_batch(128)
    (result,) = measure([workload], MeasureOptions(min_duration_s=1.0))
    assert not any("host" in warning for warning in result.warnings)
    assert result.images_per_sec == pytest.approx(128 / result.compute.mean * 1e3, rel=0.02)


def test_the_events_agree_with_the_hosts_clock(tmp_path: Path) -> None:
    workload = open_case(Case("B1", "torch-cuda", "fp16", channels_last=True), tmp_path).at_batch(128)
    workload.run(5)
    start = time.perf_counter()
    queries = workload.run(50)
    assert queries[-1].end_s - queries[0].start_s == pytest.approx(time.perf_counter() - start, rel=0.05)


def test_copies_are_measured_and_streams_run_side_by_side() -> None:
    runner = TorchRunner(make_net(), TorchOptions("cuda", "fp16", "cuda-graph"))
    images = seeded_inputs((64, 3, 64, 64))
    label = Label("net", "torch-cuda", torch.__version__, "fp16", 64)
    streams = [TorchStream(runner, images) for _ in range(2)]
    with_copies = StreamWorkload(label, streams[:1], TorchEvents(), transfers=True)
    (query, *_) = measure([with_copies], SHORT)[0].queries
    assert query.h2d_ms > 0 < query.d2h_ms
    (both,) = measure([StreamWorkload(label, streams, TorchEvents())], SHORT)
    assert both.images_per_sec > 0
    assert relative(streams[0]._logits.float().cpu(), streams[1]._logits.float().cpu()) == 0


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "int8"])
def test_no_net_is_faster_than_the_ceilings_allow(precision: str) -> None:
    ceiling = measure_ceiling(precision, "cuda", seconds=0.3)
    # Between a small card and ten times the fastest one of 2026.
    assert 1e12 < ceiling.flops_per_sec < 5e16
    assert 1e11 < ceiling.bytes_per_sec < 1e14


def test_a_benchmark_with_its_baseline_is_recorded() -> None:
    cases = tuple(Case("A0", "torch-cuda", "fp16", form, channels_last=True) for form in ("deploy", "training"))
    groups = tuple(Group(f"A0 batch {batch}", cases, batch, "resnet18") for batch in (1, 8))
    record = check_record(run_benchmark(BenchRequest("test", groups, SHORT, roofline=True)))
    assert {result["backend"] for result in record["results"]} == {"torch-cuda"}
    assert all(0 < result["roofline"]["share"] < 2 for result in record["results"])
    assert {(r["form"], r["baseline"]) for r in record["ratios"]} >= {("deploy", "ResNet-18"), ("deploy", "RepVGG-A0")}
    assert record["machine"]["gpus"]
    assert np.isfinite([ratio["ratio"] for ratio in record["ratios"]]).all()
