"""Calibration caches that are damaged or made by others: one error that names file and array, and nothing unpickled."""

from __future__ import annotations

import io
import json
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.damage import UNREADABLE, find, places, replaced, truncated, without, wrong_for
from helpers.quantized_nets import draw_images, fused_net

from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import DeployError
from repvgg_deploy.quantization import CalibrationStatistics, collect_statistics
from repvgg_deploy.quantization.array_files import save_arrays
from repvgg_deploy.quantization.points import fused_blocks
from repvgg_deploy.quantization.qat import LayerScales, QatScales
from repvgg_deploy.quantization.qat_scales import ScalesOrigin, TrainedAs, apply_scales, load_scales, save_scales

SHA256 = "a" * 64
NET, IMAGES = fused_net(), draw_images(4)
TRAINED_AS = TrainedAs.of(NET.spec, Preprocessing())
Content = dict[str, Any]


def load_statistics(path: Path) -> CalibrationStatistics:
    return CalibrationStatistics.load(path, NET, SHA256, [IMAGES])


def load_learned(path: Path) -> object:
    found = load_scales(path, SHA256)
    if found is not None:
        apply_scales(NET, found[0])
    return found


def write_statistics(path: Path) -> None:
    collect_statistics(NET, [IMAGES], SHA256).save(path)


def write_learned(path: Path) -> None:
    widths = {name: len(block.conv.weight) for name, block in fused_blocks(NET)} | {"classifier": NET.spec.classes}
    layers = {name: LayerScales(torch.full((width,), 0.5), 0.25) for name, width in widths.items()}
    save_scales(QatScales(layers, 0.125), path, SHA256, ScalesOrigin("fast", 5, 1, TRAINED_AS))


KINDS = {"statistics": (write_statistics, load_statistics), "scales": (write_learned, load_learned)}
Load = Callable[[Path], object]


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Load]:
    """A whole file, and its reader."""
    write, load = KINDS[request.param]
    path = tmp_path / "cache.npz"
    write(path)
    assert load(path) is not None
    return path, load


def content_of(path: Path) -> tuple[Any, Content]:
    """What is known of the arrays, and the arrays."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("about"))), arrays


def refused(path: Path, load: Load, *said: str) -> None:
    with pytest.raises(DeployError) as raised:
        load(path)
    message = raised.value.message
    assert str(path) in message or "the file has no scale" in message
    assert message.isprintable()
    assert raised.value.hint
    assert all(text in message for text in said), message


@pytest.mark.slow
def test_each_array_is_needed_in_its_shape_and_type(cache: tuple[Path, Load]) -> None:
    path, load = cache
    about, arrays = content_of(path)
    for key, values in list(arrays.items())[-10:]:
        other = np.full((*values.shape, 2), 1.0)
        bad = {
            "has the shape": other,
            "of int64": np.ones(values.shape, np.int64),
            "not finite": np.full(values.shape, np.nan),
            "not of numbers": np.full(values.shape, "1.0"),
            "cannot be loaded|not of numbers": np.full(values.shape, {}, dtype=object),
        }
        for said, wrong in bad.items():
            save_arrays(path, about, {**arrays, key: wrong})
            refused(path, load, key, said.rpartition("|")[2])
        save_arrays(path, about, {name: kept for name, kept in arrays.items() if name != key})
        refused(path, load)


def test_values_that_no_statistics_can_have_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.npz"
    write_statistics(path)
    about, arrays = content_of(path)
    for key in ("pool/mean_square", "pool/usual", "pool/highest"):
        save_arrays(path, about, {**arrays, key: arrays[key] - 1e6})
        refused(path, load_statistics, "the values of pool contradict one another")
    write_learned(path)
    about, arrays = content_of(path)
    for value in (0.0, -1.0):
        save_arrays(path, about, {**arrays, "classifier/weight": np.full(NET.spec.classes, value)})
        refused(path, load_learned, "classifier/weight has scales that are not positive")


@pytest.mark.slow
def test_each_field_that_is_known_of_them_is_needed_and_none_may_be_wrong(cache: tuple[Path, Load]) -> None:
    path, load = cache
    about, arrays = content_of(path)
    # A file of another kind is for the other reader.
    for place in places({key: value for key, value in about.items() if key != "kind"}):
        save_arrays(path, without(about, place), arrays)
        refused(path, load, "about", str(place[-1]))
        for wrong in wrong_for(find(about, place)):
            if place[-1] == "seed" and wrong == -(10**30):
                continue
            save_arrays(path, replaced(about, place, wrong), arrays)
            refused(path, load, "about")


def test_text_that_is_no_json_is_refused(cache: tuple[Path, Load]) -> None:
    path, load = cache
    _, arrays = content_of(path)
    for content in UNREADABLE:
        np.savez(path, about=np.array(content.decode("latin-1")), **arrays)
        refused(path, load, "about")


def test_a_truncated_file_is_refused(cache: tuple[Path, Load]) -> None:
    path, load = cache
    for content in truncated(path.read_bytes()):
        path.write_bytes(content)
        refused(path, load, "cannot read the calibration cache")


@pytest.mark.slow
def test_a_flipped_bit_is_found_or_changes_nothing(cache: tuple[Path, Load]) -> None:
    path, load = cache
    whole, expected = path.read_bytes(), str(load(path))
    found = 0
    for position in range(0, len(whole), len(whole) // 150):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            # Of dates and of attributes, which say nothing of the values.
            assert str(load(path)) == expected
        except DeployError:
            found += 1
            refused(path, load)
    assert found > 100


def replace_entry(path: Path, name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
    """Write the archive anew with other bytes for one entry."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for entry, old in {**entries, name: content}.items():
            archive.writestr(entry, old)


class Evil:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def test_nothing_is_unpickled(cache: tuple[Path, Load], tmp_path: Path) -> None:
    path, load = cache
    stream = io.BytesIO()
    np.save(stream, np.array([Evil(tmp_path / "canary")], dtype=object), allow_pickle=True)
    replace_entry(path, "classifier/input.npy" if load is load_learned else "pool/mean.npy", stream.getvalue())
    refused(path, load, "not of numbers")
    path.write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    refused(path, load, "not a zip file")
    assert not (tmp_path / "canary").exists()


def test_a_claim_of_gigabytes_takes_no_memory(cache: tuple[Path, Load]) -> None:
    path, load = cache
    name = "classifier/weight.npy" if load is load_learned else "pool/mean.npy"
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (1 << 32, 1 << 62, 1 << 70):
        text = (header % length).encode()
        replace_entry(path, name, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 64)
        refused(path, load, name.removesuffix(".npy"))
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refused(path, load, "is too large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.slow
def test_what_is_unpacked_is_bounded_by_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.npz"
    write_statistics(path)
    replace_entry(path, "pool/mean.npy", b"\0" * (300 << 20), zipfile.ZIP_DEFLATED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, load_statistics, "claim to unpack to")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_missing_file_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="there is no file"):
        load_statistics(tmp_path / "none.npz")
    assert load_learned(tmp_path / "none.npz") is None
