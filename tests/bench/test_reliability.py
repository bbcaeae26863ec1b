"""Commands under faults: at each system call of their publishing, on a full disk, several at once, for long."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.engine_graphs import rtx_backend
from helpers.faults import CRASHED, FAILED, fail, send
from helpers.faulty_commands import FaultyPublishing, commands, judge, make_inputs, snapshot
from helpers.sidecars import make_side
from reliability import SIGNALS, fill_disk, kill_command, measure_growth, run_together

from repvgg_deploy.cli.main import main
from repvgg_deploy.engine.building import Engine
from repvgg_deploy.engine.sidecar import sidecar_path
from repvgg_deploy.files import publishing
from repvgg_deploy.runtime.onnxruntime import OnnxRunner
from repvgg_deploy.workflows import refit
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest

FAULTS = {"error": fail, "sigkill": send(signal.SIGKILL)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("reliability") / "inputs")


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyPublishing]:
    """Every publication meets each fault at each of its calls; nothing is ever left mixed."""
    (tmp_path / "copies").mkdir()
    publish = FaultyPublishing(tmp_path / "copies", FAULTS)
    monkeypatch.setattr(publishing, "publish", publish)
    yield publish
    assert publish.rows
    for row in publish.rows:
        expected = {0: ("new",), FAILED: ("old",), CRASHED: ("old",), -signal.SIGKILL: ("old", "new", "mixed")}
        assert row.found in expected[row.status], row
        assert row.found_next in ("old", "new"), row
        assert not row.leftovers_next, row
    killed = [row for row in publish.rows if row.fault == "sigkill"]
    assert {row.found_next for row in killed} == {"old", "new"}


def run(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "export",
        "fuse",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("export --int8", "predict", "bench --suite", "package", "qat")
        ),
    ],
)
def test_a_fault_at_any_call_of_a_command_leaves_the_files_of_one_run(
    name: str, inputs: Path, tmp_path: Path, faulty: FaultyPublishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "export":
        rtx_backend()
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "publish", faulty.real)
        run(commands(inputs, "old", tmp_path / "out")[name])
    run(commands(inputs, "new", tmp_path / "out")[name])
    if name == "export":
        assert ("net.fp32.onnx", "net.fp32.plan", "net.fp32.plan.json") in {row.files for row in faulty.rows}
    if name == "qat":
        parts = ("curves.csv", "curves.png", "safetensors", "scales.npz")
        assert tuple(f"trained.{part}" for part in parts) in {row.files for row in faulty.rows}


@pytest.mark.slow
def test_a_fault_at_any_call_of_refit_leaves_the_plan_with_its_own_sidecar(
    inputs: Path, tmp_path: Path, faulty: FaultyPublishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library refits on a GPU only: here the new plan is bytes, published as `refit` does."""

    def write(folder: Path, content: bytes) -> Engine:
        plan, side = folder / "net.plan", make_side(hashlib.sha256(content).hexdigest(), len(content))
        plan.write_bytes(content)
        sidecar_path(plan).write_text(side.to_json(), encoding="utf-8")
        return Engine(plan, side)

    (tmp_path / "out").mkdir()
    write(tmp_path / "out", b"old plan")
    monkeypatch.setattr(refit, "require_refittable", lambda _: None)
    monkeypatch.setattr(refit, "refit_engine", lambda *given: write(given[2], b"new plan"))
    monkeypatch.setattr(refit, "_check_refitted", lambda *_: None)
    refit.refit_in_place(tmp_path / "out" / "net.plan", inputs / "new" / "net.fp32.onnx")
    assert {row.files for row in faulty.rows} == {("net.plan", "net.plan.json")}
    assert "mixed" in {row.found for row in faulty.rows}


@pytest.mark.exhaustive
def test_a_full_disk_leaves_the_old_files(inputs: Path, tmp_path: Path) -> None:
    rtx_backend()
    try:
        found = fill_disk(tmp_path, 4, inputs)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    assert found["faults"] == []
    assert {"status 1, old", "status 0, new"} == found["outcomes"].keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["export", "fuse", "predict", "package"])
def test_a_command_killed_at_a_random_moment_leaves_the_files_of_one_run(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    row = kill_command(name, inputs, tmp_path / "runs", len(SIGNALS), random.Random(name))
    assert row["faults"] == []


@pytest.mark.exhaustive
def test_exports_at_once_leave_whole_sets(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx_backend()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoints = [inputs / run / "net.safetensors" for run in ("old", "new")]
    assert run_together(tmp_path / "logs", [*checkpoints, *checkpoints], tmp_path / "out") == []


@pytest.mark.exhaustive
def test_memory_stays_flat(inputs: Path, tmp_path: Path) -> None:
    runner = OnnxRunner(inputs / "new" / "net.fp32.onnx")
    images = np.zeros((1, 3, 64, 64), np.float32)
    assert measure_growth(lambda: runner.run(images), 1000)["growth_percent"] <= 2
    request = ExportRequest(inputs / "new" / "net.safetensors", tmp_path / "out", engine="none")
    assert measure_growth(lambda: export(request), 12)["growth_percent"] <= 2


@pytest.mark.slow
def test_growing_memory_is_seen() -> None:
    held = []
    assert measure_growth(lambda: held.append(os.urandom(1 << 20)), 100)["growth_percent"] > 2


def test_files_of_two_runs_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    before = snapshot(tmp_path)
    (tmp_path / "a").write_text("2")
    mixed = snapshot(tmp_path)
    (tmp_path / "b").write_text("2")
    after = snapshot(tmp_path)
    assert judge(tmp_path, before, after) == "new"
    (tmp_path / "b").write_text("1")
    assert (judge(tmp_path, before, after), judge(tmp_path, mixed, after)) == ("mixed", "old")


def run_restricted(prefix: list[str], arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """The program in a process with fewer rights; skipped where such a process cannot be made."""
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{prefix[0]} is not allowed here")
    root = str(Path(__file__).parents[2])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **variables}
    command = [*prefix, sys.executable, "-m", "repvgg_deploy", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["export", "export --int8", "fuse", "predict", "bench --suite", "package", "qat"])
def test_a_folder_without_the_right_to_write_is_an_error_with_a_hint(name: str, inputs: Path, tmp_path: Path) -> None:
    # The superuser writes everywhere unless this right is taken away.
    prefix = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    (tmp_path / "out").mkdir(mode=0o555)
    done = run_restricted(prefix, commands(inputs, "new", tmp_path / "out")[name], HOME=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    assert "hint: " in done.stderr
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.exhaustive
def test_a_user_without_a_home_folder_exports_without_a_timing_cache(inputs: Path, tmp_path: Path) -> None:
    rtx_backend()
    prefix = ["unshare", "--user", "--map-user=54321"]
    done = run_restricted(prefix, commands(inputs, "new", tmp_path / "out")["export"])
    assert done.returncode == 0, done.stderr
    assert "no timing cache: there is no home folder" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"net.fp32.{ending}" for ending in ("onnx", "plan", "plan.json")
    }
