"""The public API: every name is there, costs nothing before it is used, and is typed for a user's own checker."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import repvgg_deploy
from repvgg_deploy.files.places import data_folder
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.workflows.fuse_checkpoint import write_fused


def test_every_public_name_is_what_its_module_defines() -> None:
    for name in repvgg_deploy.__all__:
        value = getattr(repvgg_deploy, name)
        assert name == "__version__" or value.__module__.startswith("repvgg_deploy."), name
        assert name == "__version__" or (value.__doc__ or "").strip(), name
    assert set(repvgg_deploy.__all__) <= set(dir(repvgg_deploy))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        repvgg_deploy.nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, repvgg_deploy; print([m for m in ('torch', 'onnx', 'numpy', 'click') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples of the docstrings name: the embedded model in both forms, and a folder of images."""
    folder = tmp_path_factory.mktemp("examples")
    torch.save(load_file(data_folder("models") / "demo.safetensors"), folder / "net.pth")
    write_fused(folder / "net.pth", folder / "deploy.pth")
    write_image_folder(folder / "images", 36, seed=5, size=64)
    return folder


EXAMPLES = [name for name in repvgg_deploy.__all__ if name != "__version__"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*calibration images are few")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_each_public_name_runs(
    name: str, example_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("export_module", "ModuleExportResult") and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    monkeypatch.chdir(example_folder)
    names = {"torch": torch, "np": np, "Path": Path}
    found = doctest.DocTestParser().get_doctest(
        inspect.getdoc(getattr(repvgg_deploy, name)) or "", names, name, None, 0
    )
    assert found.examples, f"{name} has no example"
    failed = doctest.DocTestRunner().run(found).failed
    assert not failed, capsys.readouterr().out


SCRIPT = """
from pathlib import Path
from typing import assert_type

import torch
from repvgg_deploy import (
    CheckpointExportResult,
    DeployError, ExportRequest, ExportResult, Precision, build, equivalent_kernel_bias, export, fuse, load_checkpoint,
    load_recipe, open_model, quantize,
)

net = build(load_checkpoint(Path("net.pth")))
deploy = fuse(net)
kernel, bias = equivalent_kernel_bias(net.get_submodule("stages.0.0"))
assert_type(kernel, torch.Tensor)
try:
    result = export(ExportRequest(Path("net.pth"), Path("out"), precision=Precision.FP16))
except DeployError as error:
    print(error.hint)
assert_type(result, CheckpointExportResult)
written: ExportResult = result
scores = open_model(result.onnx).run_images(torch.zeros(1, 3, 224, 224).numpy())
wrong: int = load_recipe("fast")
"""


@pytest.mark.slow
def test_a_users_script_is_checked_with_the_types_of_the_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    (tmp_path / "script.py").write_text(SCRIPT)
    # That of `make test` where it ran: what mypy knows of torch alone takes it half a minute.
    cache = Path(__file__).resolve().parents[1] / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in result.stdout.splitlines() if "error:" in line]
    # The one mistake in it, and nothing else.
    assert len(errors) == 1, result.stdout + result.stderr
    assert 'has type "Recipe", variable has type "int"' in errors[0]


@pytest.mark.slow
def test_the_readmes_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks of Python but the last, which needs a GPU, on the demo model."""
    pytest.importorskip("onnxscript")
    readme = Path(__file__).resolve().parents[1] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    checkpoint = data_folder("models") / "demo.safetensors"
    write_image_folder(tmp_path / "images", 36, seed=5, size=64)
    monkeypatch.chdir(tmp_path)
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(repvgg_deploy.build(repvgg_deploy.load_checkpoint(checkpoint)), nn.Softmax(1)).eval()
    names: dict[str, object] = {"batch": images.numpy(), "batches": [images], "model": model}
    for block in blocks[:3]:
        exec(compile(block.replace("net.pth", str(checkpoint)), "README.md", "exec"), names)
    assert names["logits"].shape == (32, 12)
    assert names["int8"](images).shape == (32, 12)
    assert len(names["prediction"].classes) == 5
    assert names["whole"].onnx.is_file()
