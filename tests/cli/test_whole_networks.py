"""`export --module`: a net of the user's own code, from the shell."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.evil_pickles import make_evil_pickle
from helpers.whole_networks import PyramidNet
from helpers.wide_statistics import randomize

from repvgg_deploy.cli.main import main

NETS = "from helpers.whole_networks import PyramidNet\n\ndef wrong():\n    return 5\n"


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["export", "-o", str(folder / "out"), "--engine", "none", *options])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_nets.py").write_text(NETS)
    torch.save({"state_dict": randomize(PyramidNet(3)).state_dict()}, tmp_path / "net.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_net_of_the_users_own_code_is_exported(folder) -> None:
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("onnxscript is not installed")
    result = run(
        folder, "--module", "own_nets:PyramidNet", "--kwargs", '{"classes": 3}', "--checkpoint", "net.pth",
        "--example", "1x3x32x32", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["schema"] == "repvgg-deploy/export-module"
    assert Path(values["onnx"]).name == "PyramidNet.fp32.onnx"
    assert len(values["blocks"]) == 6
    assert "running the code of own_nets:PyramidNet" in result.stderr
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(__file__).parents[2] / "docs/schemas/export-module.json").read_text(encoding="utf-8"))
    jsonschema.validate(values, schema)


def test_weights_of_a_net_of_the_users_own_are_read_as_all_others(folder) -> None:
    options = ("--module", "own_nets:PyramidNet", "--kwargs", '{"classes": 3}', "--example", "1x3x32x32")
    state = torch.load(folder / "net.pth", weights_only=True)["state_dict"]
    name = next(key for key, value in state.items() if value.dim() == 4)
    content = (folder / "net.pth").read_bytes()
    place = content.index(state[name].numpy().tobytes())
    (folder / "flipped.pth").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    (folder / "evil.pth").write_bytes(make_evil_pickle("reduce", folder / "made"))
    torch.save({**state, name: torch.zeros(()).expand(1 << 20, 1 << 20)}, folder / "claim.pth")
    torch.save({"model": {"epoch": 3}}, folder / "empty.pth")
    os.mkfifo(folder / "pipe.pth")
    said = {
        "flipped": "its checksum does not match",
        "evil": "does not contain a state dict",
        "claim": "does not fit PyramidNet",
        "empty": "does not contain a state dict",
        "pipe": "is a pipe or a device",
    }
    for file, message in said.items():
        result = run(folder, *options, "--checkpoint", f"{file}.pth")
        assert result.exit_code == 1, result.output
        assert message in result.output
    assert not (folder / "made").exists()
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--module", "own_nets:PyramidNet"], 2, "--module needs --checkpoint"),
        (["--module", "own_nets:PyramidNet", "--checkpoint", "net.pth", "--example", "1x3"], 1, "does not fit"),
        (["--module", "own_nets:wrong", "--checkpoint", "net.pth", "--example", "1x3x8x8"], 1, "returned a int"),
        (
            ["--module", "own_nets:absent", "--checkpoint", "net.pth", "--example", "1x3x8x8"],
            1,
            "did not return a module",
        ),
        (["--module", "own_nets", "--checkpoint", "net.pth", "--example", "1x3x8x8"], 1, "is not of the form"),
        (["--module", "own_nets:PyramidNet", "--checkpoint", "no.pth", "--example", "1x3x8x8"], 1, "no file no.pth"),
        (["--module", "own_nets:PyramidNet", "--softmax"], 2, "--softmax is not for --module"),
        (["net.pth", "--example", "1x3x8x8"], 2, "--example is for --module"),
        ([], 2, "Missing argument 'CKPT'"),
    ],
)
def test_mistakes_are_told(folder, options, status, said) -> None:
    result = run(folder, *options)
    assert result.exit_code == status, result.output
    assert said in result.output
    assert not (folder / "out").exists()
