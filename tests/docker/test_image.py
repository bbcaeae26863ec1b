"""The CPU image, built for real: small, without CUDA, and its demo runs as a user that it does not know."""

from __future__ import annotations

import os
from pathlib import Path

import image as images
import pytest

MOST_BYTES = 2_000_000_000


@pytest.mark.exhaustive
def test_the_cpu_image_is_small_and_its_demo_runs_as_any_user(tmp_path: Path) -> None:
    engine = images.find_engine()
    if engine is None:
        pytest.skip("none of docker, podman and buildah works here")
    if not os.environ.get("TORCH_INDEX") and not os.environ.get("PIP_FIND_LINKS"):
        pytest.skip("neither TORCH_INDEX nor PIP_FIND_LINKS is set, and a build downloads half a gigabyte")
    if not images.has_base(engine, "cpu"):
        pytest.skip("the base of the image cannot be had here")
    built, _ = images.build(engine, "cpu")
    tmp_path.chmod(0o777)
    known = built.describe()
    assert known["bytes"] <= MOST_BYTES
    assert known["config"]["User"] == "10001:10001"
    assert "doctor" in known["config"]["Healthcheck"]["Test"]
    components = built.read_components(tmp_path)
    assert [name for name in components if name.startswith(("nvidia-c", "cuda", "triton"))] == []
    assert next(name for name in components if name.startswith("torch ")).endswith("+cpu")
    healthy = built.run(tmp_path, "repvgg-deploy", "doctor", "--quiet", "--require", "onnxruntime")
    assert (healthy.returncode, healthy.stderr) == (0, "")
    demo = built.run(tmp_path, "repvgg-deploy", "demo", "--quiet", "-o", "/work/out")
    assert (demo.returncode, demo.stderr) == (0, "")
    assert {"demo.fp32.onnx", "demo.fp16.onnx", "demo.int8.onnx"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
