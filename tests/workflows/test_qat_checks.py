"""`qat`: what it tells before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.qat_commands import DEMO, qat, run
from helpers.small_nets import make_net, name_in_layout
from safetensors.torch import load_file

from repvgg_deploy.errors import DeployError
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.quantization.qat_training import TrainingOptions
from repvgg_deploy.workflows.qat_checks import load_trainable
from repvgg_deploy.workflows.qat_request import QatRequest, state_path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "images"
    write_image_folder(folder, 48, seed=11, size=64)
    return folder


def test_a_batch_has_an_image_for_every_process(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "9")
    request = QatRequest(DEMO, tmp_path / "out.pth", images, images, TrainingOptions(1, 8))
    with pytest.raises(DeployError, match="a batch of 8 is too small for 9 processes"):
        load_trainable(request)


def test_what_is_likely_to_be_wrong_is_told_as_by_export(images, tmp_path) -> None:
    checkpoint = tmp_path / "net.pth"
    torch.save(name_in_layout(make_net(), "official"), checkpoint)
    given = qat(checkpoint, images, tmp_path / "given.pth", "--size", "64").stderr
    assert "another size" not in given
    assert f"training on 48 images of {images}, read as 64x64 px" in given.replace("\n", "")
    told = qat(checkpoint, tmp_path / "absent", tmp_path / "assumed.pth", code=1).stderr
    exported = run("export", checkpoint, "--engine", "none", "-o", tmp_path / "out").stderr
    (warning,) = (line for line in exported.splitlines() if "its images may have had another size" in line)
    assert warning in told.splitlines()


def test_what_does_not_fit_is_told_before_any_work(images, tmp_path) -> None:
    run("fuse", DEMO, "-o", tmp_path / "fused.pth")
    out = tmp_path / "out.pth"
    assert "in deploy form: it has no branches" in qat(tmp_path / "fused.pth", images, out, code=1).stderr
    assert "in training form" in qat(DEMO, images, out, "--from-deploy", code=1).stderr
    assert "has no file extension of a checkpoint" in qat(DEMO, images, tmp_path / "out.onnx", code=1).stderr
    (tmp_path / "few" / "a").mkdir(parents=True)
    first = next(path for path in sorted(images.rglob("*.png")))
    (tmp_path / "few" / "a" / "x.png").write_bytes(first.read_bytes())
    assert "1 classes, but the model has 12" in qat(DEMO, tmp_path / "few", out, "--label-weight", "1", code=1).stderr
    assert not out.exists()
    assert not state_path(out).exists()
    qat(DEMO, images, out, "--epochs", "1", code=2)
    for option, value in (("--seed", str(1 << 32)), ("--rate", "1e308"), ("--label-weight", "1e308")):
        assert option in qat(DEMO, images, out, option, value, code=2).stderr


@pytest.mark.parametrize("name", ["out.pth", "out.scales.npz", "out.curves.csv", "out.qat-state.pt"])
def test_a_directory_in_the_place_of_a_file_is_told_before_any_work(name, images, tmp_path) -> None:
    (tmp_path / name).mkdir()
    refused = qat(DEMO, images, tmp_path / "out.pth", code=1).stderr
    assert refused.startswith(f"error: {tmp_path / name} is a directory")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("output", ["net.pth", "link.pth", "new/../net.pth"])
def test_the_checkpoint_itself_is_not_replaced(output, images, tmp_path) -> None:
    checkpoint = tmp_path / "net.pth"
    torch.save(load_file(DEMO), checkpoint)
    before = checkpoint.read_bytes()
    (tmp_path / "link.pth").symlink_to(checkpoint)
    assert "is the checkpoint itself" in qat(checkpoint, images, tmp_path / output, code=1).stderr
    assert checkpoint.read_bytes() == before


def test_a_name_that_is_too_long_is_told_before_any_work(images, tmp_path) -> None:
    refused = qat(DEMO, images, tmp_path / f"{'x' * 248}.pth", code=1).stderr
    assert "cannot be written: File name too long" in refused


def test_a_net_that_no_layout_has_names_for_is_told_before_any_work(images, tmp_path) -> None:
    tensors = {key: value for key, value in load_file(DEMO).items() if not key.startswith("linear.")}
    width = tensors["stage4.0.rbr_dense.conv.weight"].shape[0]
    for number, (features, outputs) in {"0": (width, 16), "2": (16, 12)}.items():
        tensors[f"linear.{number}.weight"] = torch.zeros(outputs, features)
        tensors[f"linear.{number}.bias"] = torch.zeros(outputs)
    torch.save(tensors, tmp_path / "deep.pth")
    result = qat(tmp_path / "deep.pth", images, tmp_path / "out.pth", "--head-act", "relu", code=1)
    assert result.stderr.startswith(f"error: {tmp_path / 'deep.pth'} cannot be trained, as the result")
