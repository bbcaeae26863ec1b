"""Nets in torch: every mode that this machine has gives the net's logits, and the others are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from helpers.small_nets import logits_of, make_net, relative

from repvgg_deploy.errors import DeployError
from repvgg_deploy.runtime.torch import TorchEvents, TorchOptions, TorchRunner, TorchStream


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (TorchOptions(), 5e-6),
        (TorchOptions(channels_last=True), 5e-6),
        (TorchOptions(precision="bf16", channels_last=True), 0.05),
        (TorchOptions(precision="fp16"), 0.01),
    ],
    ids=["fp32", "channels-last", "bf16", "fp16"],
)
def test_every_mode_gives_the_nets_logits(options: TorchOptions, limit: float, images: torch.Tensor) -> None:
    net = make_net()
    runner = TorchRunner(net, options)
    logits = torch.from_numpy(runner.run(images.numpy())["logits"])
    assert relative(logits, logits_of(net, images)) < limit
    assert (runner.backend, runner.precision) == ("torch-cpu", options.precision)


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_net_gives_the_same_logits(images: torch.Tensor) -> None:
    net = make_net(blocks=(1, 1, 1, 1))
    runner = TorchRunner(net, TorchOptions(mode="compiled"))
    logits = torch.from_numpy(runner.run(images.numpy())["logits"])
    assert relative(logits, logits_of(net, images)) < 5e-6


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_no_batch_falls_back_to_eager_however_many_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts the compilations of all nets of a class together, and stops after eight of them in silence."""
    import torch._dynamo

    torch._dynamo.reset()
    batches = range(1, 12)
    compiled_runs = []

    def compile_for_test(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*inputs: object) -> object:
            compiled_runs.append(graph)
            return graph(*inputs)

        return run

    compile_net = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: compile_net(net, backend=compile_for_test, **options))
    runner = TorchRunner(make_net(blocks=(1, 1, 1, 1)), TorchOptions(mode="compiled"))
    for _ in range(2):
        for batch in batches:
            runner.forward(torch.zeros(batch, 3, 32, 32))
    assert len(set(map(id, compiled_runs))) == len(batches)
    assert len(compiled_runs) == 2 * len(batches)


def test_options_leave_the_net_as_it_is() -> None:
    net = make_net()
    TorchRunner(net, TorchOptions(precision="fp16", channels_last=True))
    assert net.classifier.weight.dtype == torch.float32


def test_without_options_the_net_runs_in_its_own_type(images: torch.Tensor) -> None:
    runner = TorchRunner(make_net().double())
    assert runner.precision == "fp64"
    assert runner.run(images.double().numpy())["logits"].dtype == "float64"


@pytest.mark.parametrize(
    "options",
    [
        TorchOptions(precision="tf32"),
        TorchOptions(mode="cuda-graph"),
        TorchOptions(device="tpu"),
        TorchOptions(precision="int4"),  # type: ignore[arg-type]
        TorchOptions(mode="fast"),  # type: ignore[arg-type]
    ],
)
def test_what_the_cpu_cannot_do_is_refused(options: TorchOptions) -> None:
    with pytest.raises(DeployError):
        TorchRunner(make_net(), options)


def test_a_missing_gpu_is_no_silent_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeployError, match="no CUDA GPU"):
        TorchRunner(make_net(), TorchOptions(device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "cuda-graph"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_stream_gives_the_nets_logits(mode: str, precision: str, images: torch.Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use")
    net = make_net()
    options = TorchOptions("cuda", precision, mode)  # type: ignore[arg-type]
    stream = TorchStream(TorchRunner(net, options), images.numpy())
    events = TorchEvents()
    start, end = events.create_event(), events.create_event()
    stream.record(start)
    stream.upload()
    stream.enqueue()
    stream.download()
    stream.record(end)
    stream.synchronize()
    assert events.elapsed_ms(start, end) > 0
    limit = {"fp32": 5e-6, "tf32": 0.01, "bf16": 0.05, "fp16": 0.01}[precision]
    assert relative(stream._results, logits_of(net, images)) < limit
