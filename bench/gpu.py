"""Every check and record of the GPU, the most telling first, within a time limit; what it has done it does not repeat.

    python bench/gpu.py -o OUT [--seconds 540] [--only NAME …]

Each step is a process of its own: one that fails, or is stopped by the limit, keeps nothing from the next. Suites save
after every group, so a second call with the same OUT goes on where the first one ended. `summary.json` says what every
step did, and how the figures compare with what is claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repvgg_deploy.benchmark.record import read_record
from repvgg_deploy.errors import DeployError
from repvgg_deploy.hardware.gpus import find_gpus

ROOT = Path(__file__).resolve().parents[1]
_HEADLINE = "a2_fp16"


@dataclass(frozen=True)
class Step:
    """A command line; `record` is the file that it writes, if it is a benchmark."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    record: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a step did: the exit status (None: it was stopped by the limit), its seconds, and its last lines."""

    name: str
    status: int | None
    seconds: float
    tail: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A claim and what was measured; `holds` is None where nothing was."""

    what: str
    measured: float | None
    holds: bool | None


def steps(out: Path) -> tuple[Step, ...]:
    """All steps, in the order in which they are worth their time."""

    def bench(name: str, limit_s: float, *arguments: str) -> Step:
        path = str(out / f"{name}.json")
        return Step(name, ("-m", "repvgg_deploy", "bench", *arguments, "-o", path), limit_s, path)

    def suite(name: str, limit_s: float) -> Step:
        return bench(name, limit_s, "--suite", str(ROOT / "bench" / "suites" / f"{name}.toml"))

    def tests(name: str, limit_s: float, *paths: str) -> Step:
        return Step(name, ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *paths), limit_s)

    how = ("--form", "both", "--backend", "torch-cuda", "--precision", "fp16", "--mode", "cuda-graph")
    return (
        Step("doctor", ("-m", "repvgg_deploy", "doctor", "--json"), 60),
        bench(_HEADLINE, 120, "A2", *how, "--batch", "128", "--baseline", "resnet50", "--roofline"),
        tests("streams", 90, "tests/gpu/test_gpu_streams.py"),
        tests("tests", 240, "tests/gpu", "--deselect", "tests/gpu/test_gpu_streams.py"),
        suite("gpu_torch", 420),
        suite("paper", 300),
        suite("gpu_onnxruntime", 180),
        suite("gpu_tensorrt_rtx", 240),
        suite("gpu_tensorrt", 420),
    )


def run(step: Step, limit_s: float) -> Outcome:
    """Run a step in the repository's root for at most `limit_s`, and show its last lines."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        # A suite's record is whole after each of its groups.
        process.terminate()
        said, _ = process.communicate()
        status = None
    tail = tuple(line for line in said.splitlines() if line.strip())[-25:]
    return Outcome(step.name, status, round(time.monotonic() - start, 1), tail)


def check_claims(records: dict[str, dict[str, Any]]) -> tuple[Claim, ...]:
    """What is claimed of RepVGG on a GPU, against the records by the name of their step."""
    ratios = records.get(_HEADLINE, {}).get("ratios", [])
    over_resnet = [r["low"] for r in ratios if r["form"] == "deploy" and r["baseline"] == "ResNet-50"]
    over_training = [r["low"] for r in ratios if r["form"] == "deploy" and r["baseline_form"] == "training"]
    apart = list(_differences(records))
    return (
        _claim("A2 in fp16 at batch 128 is at least 1.83 x as fast as ResNet-50", over_resnet, lambda v: v >= 1.83),
        _claim("fused, it is at least 1.5 x as fast as its training form", over_training, lambda v: v >= 1.5),
        _claim("images per second are within 2 % of batch over compute time", apart, lambda v: v <= 0.02),
    )


def _claim(what: str, values: list[float], holds: Callable[[float], bool]) -> Claim:
    if not values:
        return Claim(what, None, None)
    worst = min(values, key=holds)
    return Claim(what, worst, holds(worst))


def _differences(records: dict[str, dict[str, Any]]) -> Iterator[float]:
    """The largest difference of a stable result of one stream without copies to a GPU that always computes."""
    found = [
        abs(r["images_per_sec"] * r["compute_ms"] / (1e3 * r["batch"]) - 1)
        for record in records.values()
        for r in record["results"]
        if not r["unstable"] and "copies" not in r["mode"] and "streams" not in r["mode"]
    ]
    yield from [max(found)] if found else []


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """The records of the steps that have one."""
    return {
        step.name: read_record(Path(step.record)) for step in steps(out) if step.record and Path(step.record).is_file()
    }


def main() -> None:
    """Run what the arguments ask for, and write `summary.json` after every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0, help="limit for all steps together")
    parser.add_argument("--only", nargs="+", help="names of steps")
    parser.add_argument("--repeat", action="store_true", help="also steps that an earlier call finished")
    asked = parser.parse_args()
    out: Path = asked.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary_path = out / "summary.json"
    known = json.loads(summary_path.read_text(encoding="utf-8"))["steps"] if summary_path.is_file() else {}
    end = time.monotonic() + asked.seconds
    for step in steps(out):
        if asked.only and step.name not in asked.only:
            continue
        if known.get(step.name, {}).get("status") == 0 and not asked.repeat:
            print(f"{step.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < 10:
            print(f"{step.name}: no time left", flush=True)
            continue
        outcome = run(step, min(step.limit_s, left))
        print(f"{step.name}: status {outcome.status}, {outcome.seconds} s", *outcome.tail, sep="\n  ", flush=True)
        known[step.name] = asdict(outcome)
        found = find_gpus()
        claims = [asdict(claim) for claim in check_claims(read_records(out))]
        summary = {
            "gpus": [asdict(gpu) for gpu in found.gpus],
            "driver": found.driver,
            "steps": known,
            "claims": claims,
        }
        summary_path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for claim in check_claims(read_records(out)):
        held = {True: "holds", False: "does not hold", None: "not measured"}[claim.holds]
        print(f"{held}: {claim.what}" + ("" if claim.measured is None else f" ({claim.measured:.3f})"))


if __name__ == "__main__":
    try:
        main()
    except DeployError as error:
        sys.exit(f"error: {error.message}")
