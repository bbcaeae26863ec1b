"""Mutated texts: sidecars, results, configurations, recipes, suites, labels; and the files of calibration."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import numpy as np

from fuzzing.cases import Case, Format
from fuzzing.checkpoints import whole_safetensors
from fuzzing.graphs import class_folders, whole_graph
from fuzzing.mutations import NAMES, dumps, mutate_bytes, mutate_text, mutate_tree, write_json
from fuzzing.weights import mutate_npy
from fuzzing.zips import make_entry, mutate_zip, read_zip, write_zip

Tree = dict[str, Any]

_PREPROCESSING = {"height": 32, "width": 32, "resize": 32, "mean": [0.5] * 3, "std": [0.2] * 3,
                  "interpolation": "bilinear", "color_order": "rgb"}  # fmt: skip
_PROVENANCE = {"sha256": "1" * 64, "arch": "custom RepVGG", "layout": "official", "form": "train", "precision": "fp16",
               "preprocessing": _PREPROCESSING, "class_names": ["a", "b"], "tools": {}, "extra": {}}  # fmt: skip
_SIDECAR = {
    "schema": 1, "sha256": hashlib.sha256(b"plan").hexdigest(), "bytes": 4, "backend": "tensorrt",
    "backend_version": "10.16.1.11", "gpu": None, "driver": "", "profile": [1, 32, 256],
    "inputs": [{"name": "images", "dtype": "float32", "shape": [-1, 3, 224, 224]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 1000]}],
    "options": {}, "convolutions": {"fp16": 22}, "onnx_sha256": "1" * 64, "provenance": _PROVENANCE,
    "seconds": {"total": 1.25}, "warnings": ["one"], "has_weights": True,
}  # fmt: skip
_LATENCY = {"p50": 1.0, "p90": 1.0, "p95": 1.0, "p99": 1.0, "mean": 1.0, "min": 1.0, "max": 1.0, "cv": 0.0}
_RESULT = {
    "group": "batch 1", "model": "RepVGG-A0", "form": "deploy", "backend": "onnxruntime-cpu", "backend_version": "1",
    "precision": "fp32", "mode": "eager", "batch": 1, "parameters": 1000, "top1": 72.4, "images_per_sec": 1000.0,
    "latency_ms": _LATENCY, "compute_ms": 1.0, "h2d_ms": 0.0, "d2h_ms": 0.0, "enqueue_ms": None, "iterations": 3,
    "duration_s": 0.1, "unstable": False, "warnings": [],
    "roofline": {"tflops": 0.1, "flops_per_byte": 50.0, "attainable_tflops": 1.0, "share": 0.1, "bound": "compute"},
    "samples": {"round_queries": [1, 2], "latency_ms": [1.0, 1.0, 1.0]},
}  # fmt: skip
_RATIO = {"group": "batch 1", "model": "RepVGG-A0", "form": "deploy", "baseline": "ResNet-50",
          "baseline_form": "deploy", "backend": "onnxruntime-cpu", "precision": "fp32", "mode": "eager", "batch": 1,
          "ratio": 2.0, "low": 1.9, "high": 2.1, "confidence": 0.95, "rounds": 2}  # fmt: skip
_MACHINE = {"cpu": {"model": "CPU", "usable_cores": 2, "flags": ["avx2"]}, "gpus": [], "versions": {"torch": "2"}}
_RECORD = {
    "schema": "repvgg-deploy/bench", "version": 2, "name": "made up", "created": "2026-01-02T03:04:05+00:00",
    "machine": _MACHINE, "method": {"warmup_s": 0.2}, "results": [_RESULT],
    "ratios": [_RATIO],
    "ceilings": {"cpu fp32": {"flops_per_sec": 1e12, "bytes_per_sec": 2e10, "source": ""}},
}  # fmt: skip
_CONFIGURATION = {
    "architecture": "repvgg_a0", "num_classes": 5, "label_names": ["a", "b", "c", "d", "e"],
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 0.875,
                       "interpolation": "bicubic", "num_classes": 5},
}  # fmt: skip
_RECIPE = {
    "name": "own", "count": 8, "seed": 0, "augmentations": 1, "dead_inputs": 1e-3, "equalize": 0.5,
    "scales": {"thresholds": [0.5, 1.0]}, "rounding": {"images": 8, "samples": 64, "damping": 1.0},
    "learning": {"steps": 0, "batch": 4, "rate": 0.02, "features": 1.0},
    "pictures": {"count": 4, "batch": 2, "steps": 1},
}  # fmt: skip
_SUITE = {
    "name": "own", "measure": {"warmup_s": 0.0, "min_iterations": 1, "min_duration_s": 0.0, "min_rounds": 1,
                               "pause_s": 0.0, "settle_s": 0.0, "slice_s": 0.0},
    "group": [{"models": ["net.onnx"], "backends": ["onnxruntime-cpu"], "precisions": ["fp32"], "batches": [1]}],
}  # fmt: skip
_OPTIONS = {"export": {"size": "32x32", "mean": [0.5, 0.5, 0.5], "fp16": True, "opset": 17, "batch": 2, "labels": "x"}}


def write_toml(tree: Any) -> str:
    """A tree as TOML; tables are written inline, and what TOML lacks as JSON has it."""
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in tree.items())


def _key(key: str) -> str:
    return dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return dumps(value)


def _mutate_json(tree: Tree, rng: Random) -> tuple[bytes, str]:
    if rng.random() < 0.25:
        content, name = mutate_text(write_json(tree, rng), rng)
        return content, f"text: {name}"
    changed, name = mutate_tree(tree, rng)
    return write_json(changed, rng), name


def mutate_toml(tree: Tree, rng: Random) -> tuple[bytes, str]:
    """A tree as TOML, changed as a tree or as a text, and how."""
    if rng.random() < 0.25:
        content, name = mutate_text(write_toml(tree).encode(), rng)
        return content, f"text: {name}"
    changed, name = mutate_tree(tree, rng)
    changed = changed if isinstance(changed, dict) else {"x": changed}
    return write_toml(changed).encode("utf-8", "surrogatepass"), name


def _sidecar(rng: Random) -> Case:
    content, name = _mutate_json(_SIDECAR, rng)
    command = rng.choice((("inspect", "IN/net.plan"), ("inspect", "IN/net.plan", "--json")))
    return Case(command, {"net.plan": b"plan", "net.plan.json": content}, name)


def _record(rng: Random) -> Case:
    content, name = _mutate_json(_RECORD, rng)
    return Case(("report", "IN/result.json", "-o", "OUT/page.html"), {"result.json": content}, name)


def _configuration(rng: Random) -> Case:
    content, name = _mutate_json(_CONFIGURATION, rng)
    files = {"net.safetensors": whole_safetensors(), rng.choice(("config.json", "preprocessor_config.json")): content}
    command = rng.choice(
        (("inspect", "IN/net.safetensors"), ("export", "IN/net.safetensors", "-o", "OUT", "--engine", "none"))
    )
    return Case(command, files, name)


def _qat_scales(rng: Random) -> Case:
    content, name = _mutate_cache(_scales_file(), rng)
    return _int8("--calib-cache", "scales.npz", content, name)


def _statistics(rng: Random) -> Case:
    content, name = _mutate_cache(_statistics_file(), rng)
    return _int8("--calib-cache", "cache.npz", content, name)


def _int8(option: str, file: str, content: bytes, name: str) -> Case:
    """An export with INT8; where the file is accepted, calibrating on ten small pictures is quick."""
    files = {"net.safetensors": whole_safetensors(), "recipe.toml": write_toml(_RECIPE).encode(), **class_folders()}
    files[file] = content
    recipe = () if option == "--recipe" else ("--recipe", "IN/recipe.toml")
    arguments = ("export", "IN/net.safetensors", "--int8", "--calib", "IN/data", "-o", "OUT", "--engine", "none",
                 "--size", "32", *recipe, option, f"IN/{file}")  # fmt: skip
    return Case(arguments, files, name)


def _mutate_cache(content: bytes, rng: Random) -> tuple[bytes, str]:
    archive = read_zip(content)
    kind = rng.choice(("about", "about", "array", "array", "zip", "bytes"))
    if kind == "zip":
        changed, name = mutate_zip(archive, rng)
        return write_zip(changed), f"zip: {name}"
    if kind == "bytes":
        raw, name = mutate_bytes(content, rng)
        return raw, f"bytes: {name}"
    entries = list(archive.entries)
    if kind == "array":
        place = rng.randrange(len(entries))
        data, name = mutate_npy(entries[place].data, rng)
        entries[place] = make_entry(entries[place].local.name, data)
        return write_zip(type(archive)(tuple(entries))), name
    place = next(n for n, entry in enumerate(entries) if entry.local.name == b"about.npy")
    tree, name = mutate_tree(_about(), rng)
    entries[place] = make_entry(b"about.npy", _npy(write_json(tree, rng).decode("utf-8", "replace").replace("\0", " ")))
    return write_zip(type(archive)(tuple(entries))), f"about: {name}"


def _npy(text: str) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(text))
    return stream.getvalue()


def _about() -> Tree:
    sha256 = hashlib.sha256(whole_safetensors()).hexdigest()
    return {"kind": "qat", "recipe": "fast", "steps": 10, "seed": 0, "sha256": sha256, "images": 10, "augmentations": 1,
            "images_sha256": "0" * 64}  # fmt: skip


_CHANNELS = {"stages.0.0": 3, "stages.1.0": 4, "stages.2.0": 4, "stages.2.1": 6, "stages.3.0": 6, "stages.4.0": 6,
             "pool": 8, "classifier": 8}  # fmt: skip
"""Of what flows into each layer of the net."""


@cache
def _scales_file() -> bytes:
    arrays: dict[str, Any] = {"about": np.array(json.dumps(_about()))}
    for stage, (blocks, width) in enumerate(((1, 4), (1, 4), (2, 6), (1, 6), (1, 8))):
        for block in range(blocks):
            arrays[f"stages.{stage}.{block}/weight"] = np.full(width, 0.01, np.float32)
            arrays[f"stages.{stage}.{block}/input"] = np.float32(0.02)
    arrays |= {"classifier/weight": np.full(5, 0.01, np.float32), "classifier/input": np.float32(0.02)}
    arrays["pool/input"] = np.float32(0.02)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@cache
def _statistics_file() -> bytes:
    arrays: dict[str, Any] = {
        "about": np.array(json.dumps({key: value for key, value in _about().items() if key != "kind"}))
    }
    for point, channels in _CHANNELS.items():
        for key in ("lowest", "highest", "mean", "mean_square", "usual"):
            arrays[f"{point}/{key}"] = np.full(channels, 0.5)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def whole_recipe() -> bytes:
    """A recipe with which calibrating on ten small pictures is quick."""
    return write_toml(_RECIPE).encode()


def _recipe(rng: Random) -> Case:
    content, name = mutate_toml(_RECIPE, rng)
    return _int8("--recipe", "own.toml", content, name)


def _suite(rng: Random) -> Case:
    content, name = mutate_toml(_SUITE, rng)
    files = {"own.toml": content}
    return Case(("bench", "--suite", "IN/own.toml", "-o", "OUT/result.json"), files, name)


def _options(rng: Random) -> Case:
    content, name = mutate_toml(_OPTIONS, rng)
    files = {"net.safetensors": whole_safetensors(), "own.toml": content}
    return Case(
        ("export", "IN/net.safetensors", "-o", "OUT", "--engine", "none", "--config", "IN/own.toml"), files, name
    )


def _labels(rng: Random) -> Case:
    lines = [f"class {n}" for n in range(5)]
    content, name = _mutate_lines(lines, rng)
    files = {"net.safetensors": whole_safetensors(), "names.txt": content}
    arguments = (
        "export",
        "IN/net.safetensors",
        "-o",
        "OUT",
        "--engine",
        "none",
        "--size",
        "32",
        "--labels",
        "IN/names.txt",
    )
    return Case(arguments, files, name)


def _mutate_lines(lines: list[str], rng: Random) -> tuple[bytes, str]:
    kind = rng.choice(("name", "name", "drop", "double", "bytes", "long"))
    place = rng.randrange(len(lines))
    if kind == "bytes":
        content, name = mutate_bytes("\n".join(lines).encode(), rng)
        return content, f"bytes: {name}"
    if kind == "name":
        lines[place] = rng.choice(NAMES)
    elif kind == "drop":
        del lines[place]
    elif kind == "double":
        lines.insert(place, lines[place])
    else:
        lines[place:place] = [lines[place]] * 20_000
    return "\n".join(lines).encode("utf-8", "surrogatepass"), kind


def _ground_truth(rng: Random) -> Case:
    files = {f"flat/{n}.png": content for n, content in enumerate(class_folders().values())}
    lines = [f"{n}.png {n % 5}" for n in range(10)] if rng.random() < 0.5 else [str(n % 5) for n in range(10)]
    content, name = _mutate_lines(lines, rng)
    files |= {"net.onnx": whole_graph(), "truth.txt": content}
    return Case(("eval", "IN/net.onnx", "--data", "IN/flat", "--ground-truth", "IN/truth.txt"), files, name)


def _image_list(rng: Random) -> Case:
    lines = [f"data/{'abcde'[n % 5]}/{n}.png" for n in range(10)]
    content, name = _mutate_lines(lines, rng)
    files = {**class_folders(), "net.onnx": whole_graph(), "list.txt": content}
    return Case(("predict", "IN/net.onnx", "IN/list.txt", "-o", "OUT/rows.csv"), files, name)


_MAKERS: tuple[tuple[str, Callable[[Random], Case], int], ...] = (
    ("sidecar of a plan", _sidecar, 1),
    ("result of bench", _record, 1),
    ("config.json", _configuration, 1),
    ("scales of qat", _qat_scales, 1),
    ("calibration cache", _statistics, 1),
    ("recipe", _recipe, 1),
    ("suite", _suite, 1),
    ("--config", _options, 1),
    ("--labels", _labels, 1),
    ("--ground-truth", _ground_truth, 1),
    ("list of images", _image_list, 1),
)
FORMATS = tuple(Format(*each) for each in _MAKERS)
