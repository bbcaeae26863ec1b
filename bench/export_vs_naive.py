"""Time and peak memory of `repvgg-deploy export` against the conversion that everyone writes by hand.

    pip install onnxscript     # what torch.onnx.export needs by default
    python bench/export_vs_naive.py --arch B3 --rounds 3 -o bench/results
    python bench/export_vs_naive.py --arch A0 --rounds 5 --against import-torch

The naive flow is what the conversion scripts in the field do: build the training net, load the checkpoint, fuse every
block in float32 in a copy of the net, save the deploy checkpoint; build the deploy net, load that, `torch.onnx.export`
the whole net, `onnxsim.simplify` the whole graph, save. It verifies nothing. It runs with each of torch's two
exporters: `naive` with the present default, `naive-torchscript` with the older one (`dynamo=False`).

`--against import-torch` holds the export, and `inspect` of the checkpoint, against `python -c 'import torch'`, which
nothing that runs a net in torch can be faster than.

All run as processes of their own, in turn, so that a noisy machine is noisy for all; the figures are those of the
whole process. The first round is not counted: it compiles what is imported, and brings the files into memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

NAIVE = """
import copy, sys, warnings
warnings.simplefilter("ignore")
import onnx, onnxsim, torch
from torch.nn.functional import pad
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import FusedBlock, RepVGG

arch, source, target, exporter = sys.argv[1:]
net = RepVGG(find_card(arch).spec()).eval()
net.load_state_dict(torch.load(source, map_location="cpu", weights_only=True))

def affine(bn):
    t = bn.weight / (bn.running_var + bn.eps).sqrt()
    return t.reshape(-1, 1, 1, 1), bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt()

def fuse(block):
    spec = block.spec
    t, b = affine(block.branch_3x3.bn)
    kernel, bias = block.branch_3x3.conv.weight * t, b
    t, b = affine(block.branch_1x1.bn)
    kernel, bias = kernel + pad(block.branch_1x1.conv.weight * t, [1, 1, 1, 1]), bias + b
    if hasattr(block, "branch_identity"):
        t, b = affine(block.branch_identity.bn)
        identity = torch.zeros_like(kernel)
        for i in range(spec.out_channels):
            identity[i, i % identity.shape[1], 1, 1] = 1
        kernel, bias = kernel + identity * t, bias + b
    fused = FusedBlock.from_spec(spec.fused())
    fused.conv.weight.data, fused.conv.bias.data = kernel.detach(), bias.detach()
    fused.se_before, fused.se_after = block.se_before, block.se_after
    return fused

converted = copy.deepcopy(net)
for stage in converted.stages:
    for i, block in enumerate(stage):
        stage[i] = fuse(block)
torch.save(converted.state_dict(), target + ".pth")
del net, converted
deploy = RepVGG(find_card(arch).spec().fused()).eval()
deploy.load_state_dict(torch.load(target + ".pth", map_location="cpu", weights_only=True))
image = torch.randn(1, 3, 224, 224)
names = {"input_names": ["images"], "output_names": ["logits"]}
if exporter == "torchscript":
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(deploy, (image,), target, opset_version=17, dynamo=False, dynamic_axes=axes, **names)
else:
    torch.onnx.export(deploy, (image,), target, dynamic_shapes=({0: torch.export.Dim("batch")},), **names)
simplified, ok = onnxsim.simplify(onnx.load(target))
assert ok
onnx.save(simplified, target)
"""


def make_checkpoints(arch: str, official: Path, own: Path) -> None:
    """A training form with seeded weights: in the official layout, and under the names of the naive flow's net."""
    import torch

    from repvgg_deploy.checkpoints.writing import name_state_dict
    from repvgg_deploy.nets.cards import find_card
    from repvgg_deploy.nets.seeding import seeded_repvgg

    net = seeded_repvgg(find_card(arch))
    torch.save(name_state_dict(net, "official"), official)
    torch.save(net.state_dict(), own)


def run(command: list[str]) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak bytes of one process and its children; what it prints is dropped."""
    # As on a user's machine, modules are compiled once.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    start = time.perf_counter()
    pid = os.posix_spawn(sys.executable, [sys.executable, *command], environment, file_actions=silent)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{command} failed with status {status}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


EXPORT = "repvgg-deploy"
NAIVE_FLOWS = {"naive": "default", "naive-torchscript": "torchscript"}


def commands(against: str, arch: str, folder: Path) -> dict[str, list[str]]:
    """What is run in each round, by name: the flows to compare with, and `export`."""
    checkpoint, own, script = folder / "net.pth", folder / "own.pth", folder / "naive.py"
    # Not in this process: the peak memory of a child is at least what its parent holds as it starts it.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(make_checkpoints, arch, checkpoint, own).result()
    script.write_text(NAIVE, encoding="utf-8")
    if against == "naive":
        found = {
            name: [str(script), arch, str(own), str(folder / f"{name}.onnx"), exporter]
            for name, exporter in NAIVE_FLOWS.items()
        }
    else:
        inspect = ["-m", "repvgg_deploy", "inspect", str(checkpoint)]
        found = {"import-torch": ["-c", "import torch"], "inspect": inspect}
    out = str(folder / "out")
    found[EXPORT] = ["-m", "repvgg_deploy", "export", str(checkpoint), "-o", out, "--engine", "none", "--quiet"]
    return found


def main() -> None:
    """Run all flows in turn and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="B3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", choices=["naive", "import-torch"], default="naive")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        flows = commands(arguments.against, arguments.arch, Path(scratch))
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in flows}
        for number in range(arguments.rounds + 1):
            for name, command in flows.items():
                measured = run(command)
                if number:
                    samples[name].append(measured)
            if number:
                print({name: round(runs[-1]["seconds"], 2) for name, runs in samples.items()}, file=sys.stderr)
    keys = ("seconds", "cpu_seconds", "peak_bytes")
    ratio = {
        name: {
            key: statistics.median(n[key] / o[key] for n, o in zip(runs, samples[EXPORT], strict=True)) for key in keys
        }
        for name, runs in samples.items()
        if name != EXPORT
    }
    kind = f"export_vs_{arguments.against.replace('-', '_')}"
    record = {
        "schema": 1,
        "kind": kind,
        "arch": arguments.arch,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "samples": samples,
        "ratio": ratio,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    record_path = arguments.output / f"{kind}-{arguments.arch}-{record['date']}.json"
    record_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, values in ratio.items():
        print(f"{name} / {EXPORT}: time {values['seconds']:.2f}, memory {values['peak_bytes']:.2f}")
        if name == "import-torch":
            print(f"{EXPORT} / {name}: time {1 / values['seconds']:.2f}")
    print(f"written {record_path}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
