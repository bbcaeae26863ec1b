"""Golden inputs and outputs beside a model: for ONNX's own tests, for trtexec, and for programs in any language."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import numpy_helper

from repvgg_deploy.artifacts import Array

GOLDEN_FOLDER = "test_data_set_0"

# What trtexec can compare; it passes over an output of another type with a warning.
_COMPARED = (np.float32, np.float16, np.int32, np.int8)
# 1 − cosine: twice the square root of it is about the relative difference, of which `self_test.py` allows 0.02.
_MOST_COSINE_LOSS = "2e-4"


@dataclass(frozen=True)
class GoldenSet:
    """What a model gives for what it was given, by tensor.

    Attributes:
        files: names of the plans, or of the graph, that trtexec can run on it; none for a graph that TensorRT refuses.
        dynamic_batch: whether trtexec has to be told the shape of the input.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    files: Sequence[str] = ()
    dynamic_batch: bool = True

    def write(self, version: Path) -> None:
        """Into a version's folder: protobufs, and for trtexec raw values and the commands."""
        folder = version / GOLDEN_FOLDER
        folder.mkdir()
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for index, (name, values) in enumerate(tensors.items()):
                exact = np.ascontiguousarray(values)
                proto = numpy_helper.from_array(exact, name)
                (folder / f"{kind}_{index}.pb").write_bytes(proto.SerializeToString(deterministic=True))
                if self.files:
                    # Little-endian, which is what TensorRT's machines read.
                    raw = exact.astype(exact.dtype.newbyteorder("<"), copy=False)
                    (folder / f"{kind}_{index}.bin").write_bytes(raw.tobytes())
        if self.files:
            (folder / "README.md").write_text(self._readme(), encoding="utf-8")

    def _readme(self) -> str:
        commands = "".join(f"    {shlex.join(self.command(file, is_new=True))}\n" for file in self.files)
        older = "".join(f"    {shlex.join(self.command(file, is_new=False))}\n" for file in self.files)
        rows = "".join(
            f"| `{kind}_{index}.bin` | `{name}` | {values.dtype} | {'x'.join(map(str, values.shape))} |\n"
            for kind, tensors in (("input", self.inputs), ("output", self.outputs))
            for index, (name, values) in enumerate(tensors.items())
        )
        return _README.format(commands=commands, older=older, rows=rows, limit=_MOST_COSINE_LOSS)

    def command(self, file: str, is_new: bool) -> list[str]:
        """What trtexec is called with in the version's folder.

        TensorRT 11.1 and newer compares; an older one writes its outputs, and `self_test.py` compares them.
        """
        # An older trtexec builds a weakly typed engine of a graph, in precisions of its own, unless told otherwise.
        source = [f"--onnx={file}", "--stronglyTyped"] if file.endswith(".onnx") else [f"--loadEngine={file}"]
        words = ["trtexec", *source]
        if self.dynamic_batch:
            shapes = (f"{_quote(name)}:{'x'.join(map(str, values.shape))}" for name, values in self.inputs.items())
            words.append(f"--shapes={','.join(shapes)}")
        words.append(f"--loadInputs={_files('input', self.inputs)}")
        if not is_new:
            return [*words, "--exportOutput=found.json"]
        compared = _files("output", self.outputs)
        return [
            *words,
            f"--loadRefOutputs={compared}",
            "--accuracyAlgorithm=cos",
            f"--accuracyThreshold={_MOST_COSINE_LOSS}",
        ]


def _files(kind: str, tensors: Mapping[str, Array]) -> str:
    return ",".join(
        f"{_quote(name)}:{GOLDEN_FOLDER}/{kind}_{index}.bin"
        for index, (name, values) in enumerate(tensors.items())
        if kind == "input" or values.dtype.type in _COMPARED
    )


def _quote(name: str) -> str:
    """A tensor's name in trtexec's lists; one with a colon needs quotes."""
    return f"'{name}'" if ":" in name or "," in name else name


_README = """# Golden inputs and outputs

`*.pb` are ONNX tensors, which `self_test.py` of the model repository reads. `*.bin` are the same values, raw and
little-endian:

| file | tensor | type | shape |
| --- | --- | --- | --- |
{rows}
With trtexec, in the folder of the version (the one above this). TensorRT 11.1 or newer compares by itself; it fails if
1 − cosine reaches {limit}:

{commands}
An older TensorRT writes its outputs, and `self_test.py` compares them:

{older}    python ../../self_test.py --exported found.json .
"""
