"""The script of the GPU's records: its steps are commands that there are, and its claims follow from the records."""

from __future__ import annotations

import sys
from pathlib import Path

import gpu
import pytest
from helpers.records import make_record

from repvgg_deploy.benchmark.suites import load_suite


def test_every_suite_and_test_of_its_steps_is_there(tmp_path: Path) -> None:
    suites = [word for step in gpu.steps(tmp_path) for word in step.command if word.endswith(".toml")]
    assert len(suites) == 5
    for suite in suites:
        assert load_suite(Path(suite)).groups
    files = [word for step in gpu.steps(tmp_path) for word in step.command if word.endswith(".py")]
    assert files
    assert all((gpu.ROOT / file).is_file() for file in files)


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_stopped_and_one_that_fails_is_told() -> None:
    slow = gpu.run(gpu.Step("slow", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 60), 2.0)
    assert (slow.status, slow.tail) == (None, ("begun",))
    assert slow.seconds < 30
    failed = gpu.run(gpu.Step("failed", ("-c", "import sys; print('why'); sys.exit(3)"), 60), 60.0)
    assert (failed.status, failed.tail) == (3, ("why",))


def test_what_was_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "steps", lambda _: (gpu.Step("one", ("-c", "print('one')"), 60),))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "-o", str(tmp_path)])
    for said in ("one: status 0", "one: done before"):
        gpu.main()
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(("ratio", "holds"), [(1.9, True), (1.7, False)])
def test_the_claims_are_held_against_the_records(ratio: float, holds: bool) -> None:
    assert {claim.holds for claim in gpu.check_claims({})} == {None}
    record = make_record()
    record["ratios"] = [
        {**record["ratios"][0], "form": "deploy", "baseline": "ResNet-50", "baseline_form": "deploy", "low": ratio},
        {**record["ratios"][0], "form": "deploy", "baseline": "RepVGG-A2", "baseline_form": "training", "low": ratio},
    ]
    for result in record["results"]:
        result.update(unstable=False, mode="cuda-graph", images_per_sec=1e3 * result["batch"] / result["compute_ms"])
    claims = gpu.check_claims({"a2_fp16": record})
    assert [claim.holds for claim in claims] == [holds, True, True]
    record["results"][0]["images_per_sec"] *= 1.1
    assert gpu.check_claims({"a2_fp16": record})[2].holds is False
