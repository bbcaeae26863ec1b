"""The commands `inspect`, `archs`, `verify` and `eval`: what they print, and their limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from helpers.commands import failed, object_of, run
from helpers.small_nets import make_net, name_in_layout

Save = Callable[..., Path]


def test_wrong_arch_names_the_right_one(checkpoint_file: Path) -> None:
    assert "contains custom RepVGG" in failed(run("inspect", checkpoint_file, "--arch", "B1g4"))


def test_inspect_describes_a_checkpoint(checkpoint_file: Path) -> None:
    value = object_of(run("inspect", checkpoint_file, "--json"))
    assert {key: value[key] for key in ("kind", "layout", "form", "ema", "classes", "in_channels", "blocks")} == {
        "kind": "checkpoint",
        "layout": "official",
        "form": "train",
        "ema": False,
        "classes": 5,
        "in_channels": 3,
        "blocks": [1, 2, 2, 4, 1],
    }


def test_inspect_describes_a_graph_with_its_provenance(graph: Path, checkpoint_file: Path) -> None:
    value = object_of(run("inspect", graph, "--json"))
    assert value["kind"] == "onnx"
    assert value["inputs"] == [{"name": "images", "dtype": "float", "shape": ["batch", 3, 32, 32]}]
    assert value["outputs"] == [{"name": "logits", "dtype": "float", "shape": ["batch", 5]}]
    assert value["ops"] == {"Conv": 10, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1, "Relu": 10}
    assert value["provenance"]["sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()


def test_inspect_tells_in_lines_what_was_assumed_for_a_graph(graph: Path) -> None:
    lines = run("inspect", graph).stdout.splitlines()
    assert any(line.startswith("checkpoint sha256  ") for line in lines)
    choices = [line.split()[0] for line in lines[-9:]]
    assert choices == ["strides", "activation", "bn", "size", "resize", "mean", "std", "interpolation", "color"]
    assert "strides        2,2,2,2,2 (assumed)" in lines
    assert max(map(len, lines)) < 120


@pytest.mark.parametrize(
    "assumed",
    [
        "x",
        {"size": 3, "resize": {}},
        {"size": {"value": 3, "source": "a"}, "resize": {"value": 1, "source": "b"}},
        {"size": {"value": [{}], "source": "a"}, "resize": {"value": ["\u2028"], "source": "\nerror: b"}},
    ],
)
def test_inspect_of_a_graph_with_odd_metadata(graph: Path, assumed: object) -> None:
    model = onnx.load(graph)
    for entry in model.metadata_props:
        if entry.key == "repvgg_deploy.assumed":
            entry.value = json.dumps(assumed)
    onnx.save(model, graph)
    result = run("inspect", graph)
    assert result.exit_code == 0
    assert not any(line.startswith("error: ") for line in result.stdout.splitlines())


def test_inspect_of_a_damaged_graph_fails(graph: Path) -> None:
    graph.write_bytes(graph.read_bytes()[:300])
    assert "ONNX" in failed(run("inspect", graph))


def test_archs_lists_every_card() -> None:
    names = [row["arch"] for row in object_of(run("archs", "--json"))["archs"]]
    assert {"RepVGG-A0", "RepVGG-B3g4", "RepVGG-D2se"} <= set(names)
    text = run("archs").stdout
    assert all(name in text for name in names)


def test_ema_option_is_passed_on(state, save: Save) -> None:
    path = save({"model": state, "model_ema": name_in_layout(make_net(seed=2), "official")})
    assert object_of(run("inspect", path, "--ema", "--json"))["ema"] is True
    assert object_of(run("inspect", path, "--no-ema", "--json"))["ema"] is False
    assert object_of(run("inspect", path, "--json"))["notes"] == ["the file also has an EMA copy; --ema selects it"]


@pytest.mark.slow
def test_verify_prints_the_differences(graph: Path, checkpoint_file: Path) -> None:
    value = object_of(run("verify", checkpoint_file, graph, "--json"))
    assert value["relative"] < 1e-5
    assert "top-1 agreement  100.0 %" in run("verify", checkpoint_file, graph).stdout
    assert value.keys() == {"schema", "version", "a", "b", "max_abs", "relative", "cosine", "top1_agreement", "images"}


@pytest.mark.parametrize(
    "limits", [["--max-relative", "1e-3"], ["--max-abs", "1e-3"], ["--max-disagreement", "-1"], []]
)
def test_verify_fails_beyond_its_limits(limits: list[str], checkpoint_file: Path, save: Save) -> None:
    other = save(name_in_layout(make_net(seed=4), "official"), "other.pth")
    loose = [] if not limits or limits[0] == "--max-relative" else ["--max-relative", "1e9"]
    result = run("verify", checkpoint_file, other, "--size", 32, *loose, *limits)
    assert result.exit_code == (3 if limits else 1)
    assert result.stderr.startswith("error: ")


def test_eval_prints_the_promised_keys(checkpoint_file: Path, image_folder: Path) -> None:
    value = object_of(run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--json"))
    assert {"model", "backend", "images", "top1", "top5", "images_per_sec"} <= value.keys()
    assert value["images"] == 15


@pytest.mark.parametrize(("limit", "code"), [("0", 0), ("100.1", 3), ("nan", 3)])
def test_eval_fails_below_the_accuracy_asked_for(
    limit: str, code: int, checkpoint_file: Path, image_folder: Path
) -> None:
    result = run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--json", "--min-top1", limit)
    assert result.exit_code == code
    value = json.loads(result.stdout)
    assert value["images"] == 15
    assert ("error: top-1 is" in result.stderr) is bool(code)
    assert value.get("exit_status", 0) == code
    assert ("below --min-top1" in value.get("error", "")) is bool(code)


def test_eval_names_the_broken_images_on_stderr(checkpoint_file: Path, image_folder: Path) -> None:
    (image_folder / "class1" / "bad.png").write_bytes(b"no image")
    result = run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--json")
    assert "bad.png" in result.stderr
    assert list(object_of(result)["broken"]) == [str(image_folder / "class1" / "bad.png")]
    error = failed(run("eval", checkpoint_file, "--data", image_folder, "--size", 32, "--strict"))
    assert "bad.png is not an image" in error


def test_arch_is_a_check_of_graphs_too(graph: Path) -> None:
    assert "not RepVGG-B3" in failed(run("inspect", graph, "--arch", "B3"))
    assert "not RepVGG-B3" in failed(run("eval", graph, "--arch", "B3", "--data", graph.parent))


def test_ema_is_for_checkpoints(graph: Path) -> None:
    assert "is an exported file" in failed(run("eval", graph, "--ema", "--data", graph.parent))
