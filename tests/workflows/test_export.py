"""`export` as a whole: verified or not written."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.requests import make_request
from helpers.wide_statistics import narrow, randomize

from repvgg_deploy.artifacts import Precision, Preprocessing, PreprocessingOptions
from repvgg_deploy.checkpoints.writing import name_state_dict
from repvgg_deploy.errors import DeployError, VerificationError
from repvgg_deploy.fusion.fuse import fuse, fuse_in_place
from repvgg_deploy.graphs.metadata import read_metadata
from repvgg_deploy.images.decoding import normalize
from repvgg_deploy.nets.cards import find_card
from repvgg_deploy.nets.repvgg import RepVGG
from repvgg_deploy.verification.inputs import choose_small_pixels
from repvgg_deploy.verification.parity import MAX_RELATIVE, compare
from repvgg_deploy.verification.reference import run_fused
from repvgg_deploy.workflows import export as pipeline
from repvgg_deploy.workflows import export_stages
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "net.pth.tar"
    torch.save({"state_dict": name_state_dict(randomize(RepVGG(narrow("A0").spec(7))), "official")}, path)
    return path


def request(checkpoint: Path, **options) -> ExportRequest:
    return make_request(checkpoint, checkpoint.parent / "out", preprocessing=PreprocessingOptions((32, 32)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_export_writes_one_verified_file_named_after_stem_and_precision(checkpoint, precision) -> None:
    result = export(request(checkpoint, precision=precision))
    assert [p.name for p in (checkpoint.parent / "out").iterdir()] == [f"net.{precision}.onnx"]
    assert list(result.parity) == ["fused", "onnx"]
    assert result.parity["fused"].relative < 1e-5
    assert result.parity["onnx"].relative < (1e-5 if precision is Precision.FP32 else 1e-2)
    assert result.parity["onnx"].images >= 2
    assert result.seconds > 0
    assert result.peak_bytes > 1e8


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"uint8_input": True},
        {"uint8_input": True, "precision": Precision.FP16, "softmax": True},
        {"softmax": True, "topk": 3},
        {"topk": 1, "io": Precision.FP16, "precision": Precision.FP16},
        {"batch": 3},
        {"opset": 13},
        {"io": Precision.FP16},
        {"verify_full": True},
    ],
    ids=str,
)
def test_every_option_is_verified_as_well(checkpoint, options) -> None:
    assert export(request(checkpoint, **options)).parity["onnx"].relative < 1e-2


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_file(checkpoint) -> None:
    first = export(request(checkpoint)).onnx.read_bytes()
    assert export(request(checkpoint)).onnx.read_bytes() == first


@pytest.mark.slow
def test_the_file_says_where_it_comes_from(checkpoint) -> None:
    names = tuple(f"class {i}" for i in range(7))
    result = export(request(checkpoint, class_names=names))
    provenance = read_metadata({p.key: p.value for p in onnx.load(result.onnx).metadata_props})
    assert provenance is not None
    assert provenance.sha256 == result.checkpoint.sha256
    assert (provenance.layout, provenance.form, provenance.class_names) == ("official", "train", names)
    assert provenance.preprocessing == result.preprocessing
    assert provenance.tools["torch"] == torch.__version__


@pytest.mark.slow
def test_json_has_the_fields_of_the_contract(checkpoint) -> None:
    values = json.loads(json.dumps(export(request(checkpoint)).to_dict()))
    assert {
        "onnx",
        "engine",
        "arch",
        "layout",
        "form",
        "precision",
        "parameters",
        "sha256",
        "parity",
        "seconds",
    } <= set(values)
    assert values["engine"] is None
    assert set(values["parity"]["onnx"]) == {"max_abs", "relative", "cosine", "top1_agreement", "images"}


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_not_written(checkpoint, monkeypatch) -> None:
    """The verification must see it when the file is not the net: here one weight of the written graph is wrong."""
    out = checkpoint.parent / "out"
    kept = export(request(checkpoint)).onnx.read_bytes()
    write_graph = pipeline.write_graph

    def write_wrong(graph, path, **options) -> None:
        weights = dict(graph.weights)
        weights["classifier.bias"] = weights["classifier.bias"] + np.float32(0.01)
        write_graph(type(graph)(graph.model, weights), path, **options)

    monkeypatch.setattr(pipeline, "write_graph", write_wrong)
    with pytest.raises(VerificationError, match="the ONNX graph"):
        export(request(checkpoint))
    assert [p.name for p in out.iterdir()] == ["net.fp32.onnx"]
    assert (out / "net.fp32.onnx").read_bytes() == kept


@pytest.mark.slow
def test_a_fused_net_that_differs_is_not_exported(checkpoint, monkeypatch) -> None:
    def fuse_wrong(net):
        fused = fuse_in_place(net)
        fused.stages[1][0].conv.weight.data *= 1.001
        return fused

    monkeypatch.setattr(export_stages, "fuse_in_place", fuse_wrong)
    with pytest.raises(VerificationError, match="fusing"):
        export(request(checkpoint))
    assert not (checkpoint.parent / "out").exists()


@pytest.mark.parametrize("tap", [(i, j) for i in range(3) for j in range(3)])
@pytest.mark.parametrize("arch", ["A0", "B3"])
@pytest.mark.slow
def test_every_tap_of_the_last_kernel_has_a_part_in_the_verification(tap, arch) -> None:
    """Checked at the size that the full-width net would be verified at: too small a map shows padding only."""
    preprocessing = Preprocessing()
    pixels = choose_small_pixels(find_card(arch).spec(), preprocessing)
    net = randomize(RepVGG(narrow(arch).spec(7)))
    fused = fuse(net)
    images = normalize(pixels, preprocessing)
    (before,), _ = run_fused(fused, images)
    fused.stages[4][0].conv.weight.data[:, :, tap[0], tap[1]] *= 1.01
    (after,), _ = run_fused(fused, images)
    assert compare(before["logits"], after["logits"]).relative > MAX_RELATIVE["stage"]["fp32"]


@pytest.mark.slow
def test_activations_beyond_fp16_fail(checkpoint) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["stage1.0.rbr_dense.bn.weight"] *= 3e5
    torch.save(state, checkpoint)
    export(request(checkpoint))
    with pytest.raises(DeployError, match="FP16"):
        export(request(checkpoint, precision=Precision.FP16))


@pytest.mark.slow
def test_labels_must_be_one_a_class(checkpoint) -> None:
    with pytest.raises(DeployError, match="--labels has 2 names, but the checkpoint has 7 classes"):
        export(request(checkpoint, class_names=("a", "b")))
    assert not (checkpoint.parent / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_are_verified_too(tmp_path, channels) -> None:
    path = tmp_path / "net.pth"
    torch.save(name_state_dict(randomize(RepVGG(narrow("A0").spec(7, channels))), "official"), path)
    result = export(request(path, uint8_input=True))
    assert result.parity["onnx"].relative < 1e-5


@pytest.mark.slow
def test_real_photographs_verify_an_export(checkpoint, shared) -> None:
    result = export(request(checkpoint, verify_data=shared / "data" / "photos"))
    assert result.parity["onnx"].relative < 1e-5
