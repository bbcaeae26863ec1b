"""TF32 and cuDNN's switches: set for a while, and back as they were; they can be read without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from repvgg_deploy.torch_precision import float32


@pytest.mark.parametrize("tf32", [False, True])
def test_the_switches_are_set_and_set_back(tf32: bool) -> None:
    def read() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic

    before = read()
    with float32(tf32, benchmark=True, deterministic=True):
        assert read() == ("high" if tf32 else "highest", tf32, True, True)
        with float32(not tf32):
            assert read()[1] is not tf32
        assert read()[1] is tf32
    assert read() == before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older switches only")
def test_a_process_that_uses_the_newer_switches_keeps_to_them() -> None:
    """In a process of its own: torch refuses the older ones from then on."""
    code = """
import torch
from repvgg_deploy.torch_precision import float32
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
def read():
    return matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark, cudnn.deterministic
matmul.fp32_precision = "tf32"
before = read()
for tf32, name in ((False, "ieee"), (True, "tf32")):
    with float32(tf32, benchmark=True, deterministic=True):
        assert read() == (name, name, True, True), read()
    assert read() == before, read()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
