"""`.safetensors`: the header must describe every byte behind it once, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save

from repvgg_deploy.checkpoints.safetensors_files import HeaderError, read_safetensors
from repvgg_deploy.checkpoints.sources import MemorySource

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def file_of(header: Any, content: bytes) -> MemorySource:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MemorySource(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool],
)
def test_what_the_library_writes_is_read(dtype: torch.dtype) -> None:
    tensors = {"x.y": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.zeros(0, 2), "scalar": torch.tensor(2.5)}
    found, metadata = read_safetensors(MemorySource(save(tensors, {"format": "pt"})))
    assert metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(torch.from_numpy(found[name].load(name)), expected)
    assert found.keys() == tensors.keys()


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD: dict[str, tuple[Any, bytes]] = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "the same place twice": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)),
    "hole": ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, bytes(16)),
    "hole in front": ({"a": entry(4, 8, [1])}, bytes(8)),
    "bytes behind the last": ({"a": entry(0, 8, [2])}, bytes(9)),
    "file too short": ({"a": entry(0, 8, [2])}, bytes(7)),
    "shape and bytes differ": ({"a": entry(0, 8, [3])}, bytes(8)),
    "claim of terabytes": ({"a": entry(0, 8, [1 << 40])}, bytes(8)),
    "claim beyond 64 bits": ({"a": entry(0, 8, [1 << 70])}, bytes(8)),
    "negative size": ({"a": entry(0, 8, [-2, -1])}, bytes(8)),
    "backwards": ({"a": entry(8, 0, [2])}, bytes(8)),
    "fraction": ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, bytes(8)),
    "truth value": ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, bytes(8)),
    "type": ({"a": entry(0, 8, [2], "F3")}, bytes(8)),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no description": ({"a": 3}, bytes(8)),
    "list": ([], b""),
    "metadata": ({"__metadata__": {"a": 1}}, b""),
    "name twice": (b'{"a":{"shape":[1]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "no JSON": (b"{nonsense", b""),
    "NaN": (b'{"a":NaN}', b""),
    "5,000 digits": (b'{"a":' + b"9" * 5000 + b"}", b""),
    "depth": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "no text": (b"{\xff}", b""),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_header_that_does_not_describe_the_file_is_refused(case: str) -> None:
    with pytest.raises(HeaderError):
        read_safetensors(file_of(*BAD[case]))


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 10_000])
def test_header_longer_than_the_file_is_refused(length: int) -> None:
    with pytest.raises(HeaderError, match="longer than the file"):
        read_safetensors(MemorySource(length.to_bytes(8, "little") + b"{}"))
