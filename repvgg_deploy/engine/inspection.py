"""What an engine is: from its sidecar anywhere, from the library's inspector where it can be deserialized."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repvgg_deploy.engine.context import create_context, set_batch
from repvgg_deploy.engine.loading import LoadedEngine, check_plan, load_plan
from repvgg_deploy.engine.sidecar import Sidecar
from repvgg_deploy.errors import DeployError

# What the inspector writes of a tensor's format, over the releases: "Row major linear FP16 format", "Half NHWC8".
_FORMATS = (
    ("int8", re.compile(r"int8", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8|float8|e4m3", re.IGNORECASE)),
    # Before fp16: "BFloat16" also holds "float16".
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),
    ("fp16", re.compile(r"fp16|half|float16", re.IGNORECASE)),
    ("fp32", re.compile(r"fp32|float", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Layer:
    """A layer as the builder chose it: the convolutions of the graph that it contains, and the types it takes."""

    name: str
    kind: str
    precision: str
    tactic: str
    onnx_nodes: tuple[str, ...]


@dataclass(frozen=True)
class EngineReport:
    """What can be said of an engine here.

    Attributes:
        plan: the file; its bytes are those that the sidecar was written for.
        side: what the sidecar says.
        layers: of the deserialized engine; None if it cannot be deserialized here.
        why_no_layers: the reason, empty if there are layers.
    """

    plan: Path
    side: Sidecar
    layers: tuple[Layer, ...] | None
    why_no_layers: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As `inspect --json` prints it."""
        values: dict[str, Any] = json.loads(self.side.to_json())
        # The object has a schema of its own.
        values["sidecar_schema"] = values.pop("schema")
        layers = None if self.layers is None else [vars(layer) for layer in self.layers]
        return {"kind": "engine", "file": str(self.plan), **values, "layers": layers, "note": self.why_no_layers}


def inspect_engine(plan: Path) -> EngineReport:
    """What `plan` is. Its bytes are held against the sidecar first; its layers need a GPU and the library.

    Raises:
        DeployError: there is no such plan or no sidecar, or the plan is not what was built.
    """
    _, side = check_plan(plan)
    assert side is not None  # Only a trusted plan has none.
    try:
        loaded = load_plan(plan)
    except DeployError as error:
        return EngineReport(plan, side, None, error.message)
    try:
        return EngineReport(plan, side, read_layers(loaded))
    finally:
        loaded.close()


def read_layers(loaded: LoadedEngine) -> tuple[Layer, ...]:
    """The layers of a deserialized engine, from the library's EngineInspector; of a dynamic batch at the best one.

    Raises:
        DeployError: the inspector's text is not the JSON that is known, or the GPU has too little memory.
    """
    inspector = loaded.engine.create_engine_inspector()
    if loaded.inputs[0].shape[0] < 0:
        # Without a batch the types of the tensors are "N/A due to dynamic shapes".
        context = create_context(loaded)
        set_batch(loaded, context, loaded.profile[1])
        inspector.execution_context = context
    return parse_layers(str(inspector.get_engine_information(loaded.backend.module.LayerInformationFormat.JSON)))


def parse_layers(text: str) -> tuple[Layer, ...]:
    """The layers in the inspector's JSON; those of an engine without detailed information have a name only.

    Raises:
        DeployError: `text` is not the JSON that is known.
    """
    try:
        values = json.loads(text)["Layers"]
        return tuple(_layer(value) for value in values)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DeployError(f"the engine inspector's output cannot be parsed: {error}", "report the versions") from error


def _layer(value: str | Mapping[str, Any]) -> Layer:
    if isinstance(value, str):
        return Layer(value, "", "unknown", "", ())
    # The inspector separates the ONNX nodes of a fused layer by U+001E or a comma.
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(value.get("Metadata", "")))
    return Layer(
        name=str(value.get("Name", "")),
        kind=str(value.get("LayerType", "")),
        precision=_precision(value.get("Inputs", ())),
        tactic=str(value.get("TacticName", "")),
        onnx_nodes=tuple(nodes),
    )


def _precision(inputs: Any) -> str:
    """The type of a layer's first input, which is what it computes in."""
    if not isinstance(inputs, list) or not inputs or not isinstance(inputs[0], dict):
        return "unknown"
    first = inputs[0]
    text = str(first.get("Format/Datatype") or f"{first.get('Format', '')} {first.get('Datatype', '')}")
    return next((name for name, pattern in _FORMATS if pattern.search(text)), "unknown")


def convolution_precisions(layers: tuple[Layer, ...], convolutions: tuple[str, ...]) -> dict[str, str]:
    """The precision that the engine computes each of the graph's `convolutions` in, by its ONNX name.

    `not found` for one that no layer names.
    """
    found = dict.fromkeys(convolutions, "not found")
    for layer in layers:
        for name in convolutions:
            if name in layer.onnx_nodes or name in layer.name.split(" + "):
                found[name] = layer.precision
    return found
