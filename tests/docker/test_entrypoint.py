"""The GPU image's entrypoint: NVIDIA's runs first, and standard output holds nothing but the command's own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "gpu-entrypoint.sh"


@pytest.mark.parametrize("status", [0, 3])
def test_the_banner_is_on_standard_error_and_the_commands_output_and_status_are_its_own(
    status: int, tmp_path: Path
) -> None:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    banner = write("nvidia_entrypoint.sh", 'echo "== NVIDIA =="\nexport COMPATIBLE=yes\nexec "$@"')
    write("repvgg-deploy", f'echo "$COMPATIBLE|$#|$1|$2"\necho note >&2\nexit {status}')
    environment = {**os.environ, "NVIDIA_ENTRYPOINT": str(banner), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", str(SCRIPT), "inspect", "a b"], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout) == (status, "yes|2|inspect|a b\n")
    assert done.stderr == "== NVIDIA ==\nnote\n"
