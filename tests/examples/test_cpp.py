"""The C++ example, compiled against a stub of TensorRT, finds what agrees with its golden files and what does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parents[2] / "examples" / "cpp" / "check_golden.cpp"
STUB = Path(__file__).parent / "tensorrt_stub"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    target = tmp_path_factory.mktemp("cpp") / "check_golden"
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([compiler, *strict, "-isystem", STUB, "-o", target, SOURCE], check=True)
    return target


def check(program: Path, folder: Path, plan: str, inputs: np.ndarray, outputs: np.ndarray) -> tuple[int, str]:
    (folder / "model.plan").write_text(plan)
    inputs.tofile(folder / "input_0.bin")
    outputs.tofile(folder / "output_0.bin")
    arguments = ("model.plan", "images:input_0.bin", "logits:output_0.bin")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, cwd=folder)
    return done.returncode, done.stdout + done.stderr


PLAN = "input images {0} -1 3 2 2\noutput logits {0} -1 5\n"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("half", np.float16), ("int32", np.int32)])
def test_golden_outputs_agree_and_others_do_not(program: Path, tmp_path: Path, name: str, dtype: type) -> None:
    plan = PLAN.format(name)
    images = np.random.default_rng(0).integers(-300, 300, (3, 3, 2, 2)).astype(dtype)
    logits = images.reshape(3, 12)[:, :5].copy()
    status, said = check(program, tmp_path, plan, images, logits)
    assert (status, said) == (0, "logits: ok, differs by 0 relative\n")
    logits[2, 4] += logits[2, 4] * 0 + 200
    status, said = check(program, tmp_path, plan, images, logits)
    assert (status, "logits: FAILED" in said) == (1, True)


@pytest.mark.slow
def test_a_small_difference_agrees_and_nan_does_not(program: Path, tmp_path: Path) -> None:
    plan = PLAN.format("float")
    images = np.random.default_rng(0).standard_normal((2, 3, 2, 2)).astype(np.float32)
    logits = images.reshape(2, 12)[:, :5].copy()
    assert check(program, tmp_path, plan, images, logits * np.float32(1.001))[0] == 0
    logits[0, 0] = np.nan
    assert check(program, tmp_path, plan, images, logits)[0] == 1


def make_toolkits(folder: Path, compiler: str) -> list[str]:
    """CUDA and TensorRT as they are installed, of the stub's headers and empty libraries; CMake's options for them."""
    cuda, tensorrt = folder / "cuda", folder / "tensorrt"
    (folder / "empty.cpp").touch()
    for root, header, library in (
        (cuda, "cuda_runtime_api.h", "libcudart.so"),
        (tensorrt, "NvInfer.h", "libnvinfer.so"),
    ):
        for name in ("include", "lib"):
            (root / name).mkdir(parents=True)
        shutil.copy(STUB / header, root / "include")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", root / "lib" / library, folder / "empty.cpp"], check=True)
    # By these CMake knows CUDA's folder and release; without a compiler there it would take one that is installed.
    (cuda / "include" / "cuda_runtime.h").write_text("#include <cuda_runtime_api.h>\n")
    (cuda / "bin").mkdir()
    nvcc = cuda / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.0'\n")
    nvcc.chmod(0o755)
    return [f"-DTENSORRT_ROOT={tensorrt}", f"-DCUDAToolkit_ROOT={cuda}"]


@pytest.mark.slow
def test_cmake_finds_both_libraries_and_builds_the_program(tmp_path: Path) -> None:
    cmake, compiler = shutil.which("cmake"), shutil.which("g++") or shutil.which("clang++")
    if cmake is None or compiler is None:
        pytest.skip("no cmake or no C++ compiler is installed")
    build, options = tmp_path / "build", make_toolkits(tmp_path, compiler)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CXXFLAGS": "-Wall -Wextra -Werror"}
    for step in ([cmake, "-S", SOURCE.parent, "-B", build, *options], [cmake, "--build", build]):
        done = subprocess.run(step, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    images = np.random.default_rng(0).standard_normal((2, 3, 2, 2)).astype(np.float32)
    logits = images.reshape(2, 12)[:, :5].copy()
    assert check(build / "check_golden", tmp_path, PLAN.format("float"), images, logits)[0] == 0


@pytest.mark.slow
def test_what_cannot_be_run_is_an_error(program: Path, tmp_path: Path) -> None:
    images, logits = np.zeros((2, 3, 2, 2), np.float32), np.zeros((2, 5), np.float32)
    for plan, said in (
        ("input images\n", "another TensorRT or for another GPU"),
        ("input pixels float -1 3 2 2\noutput logits float -1 5\n", "no file is given for the input pixels"),
        ("input images float -1 3 2 5\noutput logits float -1 5\n", "another size than images"),
        ("input images float -1 3 2 2\noutput scores float -1 5\n", "no file is given for an output"),
    ):
        status, text = check(program, tmp_path, plan, images, logits)
        assert (status, said in text) == (2, True), text
    status, text = check(program, tmp_path, PLAN.format("float"), np.zeros((9, 3, 2, 2), np.float32), logits)
    assert (status, "refuses this batch" in text) == (2, True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, "usage" in done.stderr) == (2, True)


def test_the_example_stays_readable() -> None:
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) <= 190
