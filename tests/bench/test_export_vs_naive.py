"""The benchmark of an export as a whole process: every flow runs, and the record says how they compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "export_vs_naive.py"
FLOWS = {
    "naive": {"naive", "naive-torchscript"},
    "import-torch": {"import-torch", "inspect"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("against", FLOWS)
def test_every_flow_is_run_and_compared_with_the_export(against: str, tmp_path: Path) -> None:
    if against == "naive":
        pytest.importorskip("onnxscript")
    command = [sys.executable, str(SCRIPT), "--arch", "A0", "--rounds", "1", "--against", against, "-o", str(tmp_path)]
    subprocess.run(command, check=True, cwd=SCRIPT.parents[1])
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["kind"] == f"export_vs_{against.replace('-', '_')}"
    assert record["samples"].keys() == FLOWS[against] | {"repvgg-deploy"}
    assert {len(runs) for runs in record["samples"].values()} == {1}
    assert record["ratio"].keys() == FLOWS[against]
    # Python alone takes 10 MB, a process with torch 200: a child does not begin with what its parent holds.
    assert against == "naive" or record["samples"]["inspect"][0]["peak_bytes"] < 120e6
    assert all(value > 0 for ratio in record["ratio"].values() for value in ratio.values())
