"""`export --features`: a backbone's pooled features or maps, in every precision."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from helpers.small_nets import make_net, name_in_layout

from repvgg_deploy.checkpoints import CheckpointOptions, build, load_checkpoint
from repvgg_deploy.cli.main import main
from repvgg_deploy.errors import DeployError
from repvgg_deploy.images.synthetic import write_image_folder
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.nets.settings import StructureOptions
from repvgg_deploy.quantization import load_recipe, quantize
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.verification.models import VerifyOptions, verify_models
from repvgg_deploy.workflows.evaluate import evaluate

_FAST = load_recipe("fast")
QUICK = replace(_FAST, learning=replace(_FAST.learning, steps=2), augmentations=1)


def command(*arguments, code: int = 0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def export(path, *options, code: int = 0):
    arguments = ("--size", 32, "--engine", "none", "-o", path.parent / "out", *options)
    return command("export", path, *arguments, code=code)


def run(graph, images) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(graph), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


@pytest.fixture
def backbone(net, save):
    state = name_in_layout(net, "official")
    return save({name: tensor for name, tensor in state.items() if not name.startswith("linear.")})


@pytest.mark.slow
def test_a_checkpoint_without_head_is_inspected_fused_and_exported(backbone, net, images) -> None:
    described = json.loads(command("inspect", backbone, "--json").stdout)
    assert described["classes"] == 0
    assert described["form"] == "train"
    fused = backbone.parent / "fused.safetensors"
    command("fuse", backbone, "-o", fused)
    export(backbone)
    expected = net.stages[4](net.stages[3](net.stages[2](net.stages[1](net.stages[0](images))))).mean((2, 3))
    again = build(load_checkpoint(fused))(images)
    given = run(backbone.parent / "out" / "checkpoint.fp32.onnx", images.numpy())
    assert list(given) == ["features"]
    assert np.abs(given["features"] - expected.numpy()).max() < 1e-5
    assert torch.allclose(again, expected, atol=1e-5)


@pytest.mark.parametrize("options", [(), ("--fp16",), ("--fp16", "--io", "fp16")])
def test_maps_are_those_of_the_stages(checkpoint_file, net, images, options) -> None:
    export(checkpoint_file, "--features", "1,3", *options)
    (graph,) = (checkpoint_file.parent / "out").iterdir()
    x, expected = images, {}
    for number, stage in enumerate(net.stages):
        x = stage(x)
        expected[f"stage{number}"] = x.numpy()
    half = "fp16" in options
    given = run(graph, images.numpy().astype(np.float16 if half else np.float32))
    assert list(given) == ["stage1", "stage3"]
    for name, values in given.items():
        assert values.shape == expected[name].shape
        assert np.abs(values - expected[name]).max() < (2e-2 if options else 1e-5) * np.abs(expected[name]).max()


@pytest.mark.parametrize("options", [("--fp16",), ("--fp16", "--io", "fp16"), ("--fp16", "--uint8-input")])
def test_pooled_features_are_the_output_in_half_precision_too(checkpoint_file, net, images, options) -> None:
    export(checkpoint_file, "--features", *options)
    (graph,) = (checkpoint_file.parent / "out").iterdir()
    if "--uint8-input" in options:
        assert [item.name for item in onnx.load(graph).graph.output] == ["features"]
        return
    given = run(graph, images.numpy().astype(np.float16 if "fp16" in options else np.float32))
    expected = net.stages[4](net.stages[3](net.stages[2](net.stages[1](net.stages[0](images))))).mean((2, 3)).numpy()
    assert list(given) == ["features"]
    assert np.abs(given["features"] - expected).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("maps", [(), (4,), (0, 2, 3)])
def test_int8_features_are_integer_for_integer_what_is_simulated(checkpoint_file, images, tmp_path, maps) -> None:
    from repvgg_deploy.fusion.fuse import fuse
    from repvgg_deploy.graphs.builder import write_graph
    from repvgg_deploy.graphs.repvgg import GraphOptions
    from repvgg_deploy.quantization.qdq import to_qdq_onnx

    fused = fuse(build(load_checkpoint(checkpoint_file).backbone(maps)), torch.float32).requires_grad_(False)
    calibration = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()
    quantized = quantize(fused, [calibration], QUICK)
    assert quantized.float_layers() == ()
    graph = to_qdq_onnx(quantized, GraphOptions(32, 32), {})
    write_graph(graph, tmp_path / "g.onnx")
    given, simulated, exact = run(tmp_path / "g.onnx", images.numpy()), quantized.outputs(images), fused.outputs(images)
    assert list(given) == list(simulated) == list(exact)
    for name, values in given.items():
        reference = exact[name].numpy()
        assert np.linalg.norm(values - simulated[name].numpy()) < 0.01 * np.linalg.norm(reference)
        assert np.linalg.norm(values - reference) < 0.2 * np.linalg.norm(reference)
    # Every kernel is int8, and every map comes out of an integer kernel.
    assert graph.op_histogram()["QuantizeLinear"] == len(list(fused.named_blocks())) + 1


@pytest.mark.slow
def test_int8_features_from_the_command_line(checkpoint_file, tmp_path) -> None:
    write_image_folder(tmp_path / "images", 40, seed=1, size=32)
    options = ("--int8", "--calib", tmp_path / "images", "--recipe", "fast", "--json")
    values = json.loads(export(checkpoint_file, "--features", *options).stdout)
    assert list(values["parity"]) == ["fused", "quantized", "onnx"]
    model = open_model(checkpoint_file.parent / "out" / "checkpoint.int8.onnx")
    assert model.classes == 0


@pytest.mark.slow
def test_stages_may_follow_the_option_or_a_checkpoint_may(checkpoint_file) -> None:
    out = ("--size", 32, "--engine", "none", "-o", checkpoint_file.parent / "out")
    for options in (
        ("--features", checkpoint_file),
        (checkpoint_file, "--features"),
        (checkpoint_file, "--features=2"),
    ):
        command("export", *out, *options)
    command("export", *out, checkpoint_file, "--features=two", code=2)
    assert "stage 7" in command("export", *out, checkpoint_file, "--features", "7", code=1).stderr


@pytest.mark.parametrize("option", ["--softmax", "--topk=2"])
def test_features_have_no_classes(checkpoint_file, option) -> None:
    assert "class" in export(checkpoint_file, "--features", option, code=1).stderr


@pytest.mark.slow
def test_two_graphs_of_features_are_compared_and_not_evaluated(checkpoint_file, image_folder) -> None:
    export(checkpoint_file, "--features", "2,4")
    export(checkpoint_file, "--features", "2,4", "--fp16")
    graphs = [checkpoint_file.parent / "out" / f"checkpoint.{precision}.onnx" for precision in ("fp32", "fp16")]
    parity = verify_models(*graphs)
    assert 1e-6 < parity.relative < 3e-2
    with pytest.raises(DeployError, match="gives features"):
        evaluate(open_model(graphs[0]), image_folder)


@pytest.mark.slow
def test_verify_takes_strides_and_activation_of_a_checkpoint_from_the_graph(net, save) -> None:
    path = save(name_in_layout(net, "official"))
    export(path, "--act", "silu", "--strides", "1,2,2,2,2")
    graph = path.parent / "out" / "checkpoint.fp32.onnx"
    assert verify_models(path, graph).relative < 1e-5
    said = CheckpointOptions(structure=StructureOptions(activation="relu"))
    with pytest.raises(DeployError):
        verify_models(path, graph, VerifyOptions(checkpoint=said))
    assert open_model(graph).structure.strides == (1, 2, 2, 2, 2)


@pytest.mark.slow
def test_softmax_of_one_logit_is_refused(save) -> None:
    path = save(name_in_layout(make_net(classes=1), "official"))
    assert "sigmoid" in export(path, "--softmax", code=1).stderr
    export(path)


@pytest.mark.slow
def test_what_nobody_said_ends_the_export_and_is_warned_of(checkpoint_file) -> None:
    result = command("export", checkpoint_file, "--engine", "none", "-o", checkpoint_file.parent / "out", "--size", 32)
    assert "strides        2,2,2,2,2 (assumed)" in result.stdout
    assert "size           32x32 px (option)" in result.stdout
    assert "warning: with the strides assumed" in result.stderr
    assert "classes, not" not in result.stderr
    command("export", checkpoint_file, "--engine", "none", "-o", checkpoint_file.parent / "out", "--size", 32,
            "--strides", "1,1,2,2,2")  # fmt: skip
    inspected = command("inspect", checkpoint_file).stdout
    assert "activation     relu (assumed)" in inspected


def test_timms_feature_lists_are_read(net, save, images) -> None:
    """`features_only=True` names the stages `stages_0`, …, and has no head."""
    state = {k: v for k, v in name_in_layout(net, "timm").items() if not k.startswith("head.")}
    path = save({re.sub(r"^stages\.(\d)", r"stages_\1", key): tensor for key, tensor in state.items()})
    checkpoint = load_checkpoint(path)
    assert (checkpoint.layout, checkpoint.spec.classes) == ("timm", 0)
    assert torch.equal(build(checkpoint)(images), net.stages[4](_up_to(net, 4, images)).mean((2, 3)))


def _up_to(net: RepVGG, stage: int, images: torch.Tensor) -> torch.Tensor:
    for number in range(stage):
        images = net.stages[number](images)
    return images
