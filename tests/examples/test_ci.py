"""The example pipelines: the steps that they run, on the demo model, with every limit met and then missed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from repvgg_deploy.images.synthetic import write_image_folder

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "examples" / "ci"
SCRIPT = CI / "pipeline.sh"
STEPS = ["export", "eval", "verify", "bench", "package"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with images, and with the command `repvgg-deploy` of this checkout in `bin/`."""
    write_image_folder(tmp_path / "calib", 48, seed=4, size=64)
    write_image_folder(tmp_path / "val", 96, seed=3, size=64)
    command = tmp_path / "bin" / "repvgg-deploy"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m repvgg_deploy "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(work: Path, step: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One step of the pipeline, as a job runs it."""
    settings = {
        "CHECKPOINT": str(ROOT / "models" / "demo.safetensors"), "CALIB": "calib", "VAL": "val", "MIN_TOP1": "80",
        "MAX_DISAGREEMENT": "10", "MIN_RATIO": "1.2", "BASELINE": "resnet18",
        "EXPORT_OPTIONS": "--recipe fast --engine none", "REPVGG_DEPLOY_BENCH_DURATION": "0.5",
    }  # fmt: skip
    path = os.pathsep.join([str(work / "bin"), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # What a user of the tests has set for the commands is not the pipeline's.
    own = {name: value for name, value in os.environ.items() if not name.startswith("REPVGG_DEPLOY_")}
    return subprocess.run(
        ["bash", str(SCRIPT), step],
        cwd=work,
        env={**own, "PATH": path, "PYTHONPATH": python_path, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def failures(work: Path, step: str) -> list[str]:
    """The names of the test cases that failed, of a step's JUnit report."""
    cases = ElementTree.parse(work / "out" / "reports" / f"{step}.xml").getroot().iter("testcase")
    return [case.get("name", "") for case in cases if case.find("failure") is not None]


@pytest.mark.exhaustive
def test_the_steps_in_order_on_the_demo_model_and_every_gate_when_it_is_missed(work: Path) -> None:
    for step in STEPS:
        done = run(work, step)
        assert done.returncode == 0, f"{step}: {done.stderr}"
    out = work / "out"
    assert {path.name for path in out.iterdir()} >= {
        "demo.fp32.onnx", "demo.fp16.onnx", "demo.int8.onnx", "MODEL_CARD.md", "deploy.toml", "demo.provenance.json",
    }  # fmt: skip
    assert list((out / "models").rglob("config.pbtxt"))
    for step in STEPS[:-1]:
        assert failures(work, step) == []
    assert json.loads((out / "reports" / "eval.json").read_text())["top1"] >= 80
    again = [work / "bin" / "repvgg-deploy", "export", "--from", "out/deploy.toml", "-o", "again"]
    subprocess.run(again, cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    for graph in out.glob("*.onnx"):
        assert (work / "again" / graph.name).read_bytes() == graph.read_bytes()
    missed = {
        "eval": ({"MIN_TOP1": "100.1"}, "demo.int8.onnx: top-1 in percent, --min-top1"),
        "verify": ({"MAX_DISAGREEMENT": "-1"}, "other top-1 classes in percent, --max-disagreement"),
        "bench": ({"MIN_RATIO": "1e6"}, "ratio to ResNet-18, --min-ratio"),
    }
    for step, (limit, name) in missed.items():
        done = run(work, step, **limit)
        assert done.returncode == 3, f"{step}: {done.stderr}"
        (found,) = failures(work, step)
        assert found.endswith(name)
    value = json.loads((out / "reports" / "verify.json").read_text())
    assert (value["exit_status"], value["images"]) == (3, 96)


@pytest.mark.slow
def test_a_step_before_its_time_and_one_that_is_none_say_so(work: Path) -> None:
    stale = work / "out" / "reports" / "eval.xml"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    early = run(work, "eval")
    assert (early.returncode, "there is no int8 graph in out" in early.stderr) == (1, True)
    assert not stale.exists()
    wrong = run(work, "deploy")
    assert (wrong.returncode, "usage: " in wrong.stderr) == (2, True)


def fake_command(work: Path, status: dict[str, int]) -> Path:
    """In place of `repvgg-deploy`: notes that it was called, and ends with the status of each command."""
    log = work / "calls"
    lines = [f"{name}) exit {code} ;;" for name, code in status.items()]
    script = f'#!/bin/sh\necho "$1" >> {shlex.quote(str(log))}\ncase $1 in\n' + "\n".join(lines) + "\nesac\n"
    (work / "bin" / "repvgg-deploy").write_text(script)
    (work / "out").mkdir()
    (work / "out" / "net.int8.onnx").touch()
    return log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "called", "expected"),
    [
        ({}, ["export", "eval", "verify", "bench", "package"], 0),
        ({"export": 1}, ["export"], 1),
        ({"eval": 3, "verify": 1}, ["export", "eval", "verify", "bench"], 3),
        ({"bench": 3}, ["export", "eval", "verify", "bench"], 3),
    ],
)
def test_all_gates_are_run_and_the_entry_is_made_only_if_none_was_missed(
    status: dict[str, int], called: list[str], expected: int, work: Path
) -> None:
    log = fake_command(work, status)
    assert run(work, "all").returncode == expected
    assert log.read_text().split() == called


def load(name: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((CI / name).read_text(encoding="utf-8"))


def test_the_pipelines_set_what_the_script_reads_and_run_its_steps() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    known = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+)\b", script))
    needed = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):\?\}", script))
    action = load("action/action.yml")
    steps = {step["name"]: step for step in action["runs"]["steps"]}
    given = steps["Export, gates, entry"]["env"]
    assert needed <= given.keys() <= known
    inputs = {re.search(r"inputs\.([a-z0-9-]+)", value)[1] for value in given.values()}
    assert inputs == action["inputs"].keys()
    assert "inputs." not in " ".join(step["run"] for step in steps.values()), "inputs are no part of a script"
    assert (CI / "action" / ".." / "pipeline.sh").is_file()

    workflow = load("github-workflow.yml")
    (used,) = [step for step in workflow["jobs"]["gates"]["steps"] if "repvgg-deploy" in step.get("uses", "")]
    assert used["with"].keys() <= action["inputs"].keys()
    required = {name for name, about in action["inputs"].items() if about.get("required")}
    assert required <= used["with"].keys()

    gitlab = load("gitlab-ci.yml")
    assert needed <= gitlab["variables"].keys()
    assert [gitlab[step]["script"] for step in STEPS] == [f"bash ci/pipeline.sh {step}" for step in STEPS]
    stages = [gitlab[step].get("stage", gitlab[".gate"]["stage"]) for step in STEPS]
    assert stages == sorted(stages, key=gitlab["stages"].index)
