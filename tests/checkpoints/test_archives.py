"""Zip files: a bit that flipped, a directory that lies, entries that overlap or claim more than there is."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.checkpoints.archives import Archive, ArchiveError
from repvgg_deploy.checkpoints.sources import MemorySource
from repvgg_deploy.errors import CheckpointError

State = dict[str, Tensor]
Save = Callable[..., Path]


def storages(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of a checkpoint that hold the net's floating-point numbers."""
    with zipfile.ZipFile(path) as archive:
        return [info for info in archive.infolist() if "/data/" in info.filename and info.file_size > 8]


def data_start(path: Path, info: zipfile.ZipInfo) -> int:
    header = path.read_bytes()[info.header_offset : info.header_offset + 30]
    name, extra = struct.unpack_from("<2H", header, 26)
    return info.header_offset + 30 + int(name) + int(extra)


@pytest.mark.slow
def test_every_flipped_bit_in_the_weights_is_an_error(checkpoint_file: Path, tmp_path: Path) -> None:
    content = checkpoint_file.read_bytes()
    generator = np.random.default_rng(5)
    path = tmp_path / "flipped.pth"
    entries = storages(checkpoint_file)
    for index in generator.choice(len(entries), 24, replace=False):
        start = data_start(checkpoint_file, entries[index])
        place = start + int(generator.integers(entries[index].file_size))
        # The lowest bits of a mantissa as well: nothing but the checksum tells.
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{entries[index].filename} in the file is damaged: its checksum"):
            load_checkpoint(path)


def test_file_saved_without_checksums_is_read_with_a_note(state: State, save: Save) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        path = save(state)
    finally:
        torch.serialization.set_crc32_options(before)
    assert any("without checksums" in note for note in load_checkpoint(path).notes)


def archive_of(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return bytearray(buffer.getvalue())


def opened(content: bytearray) -> Archive:
    return Archive(MemorySource(bytes(content)))


def test_archive_gives_what_was_put_in() -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = opened(archive_of(("a", b"x" * 100), ("b", b"yy"), method=method))
        assert archive.names == ("a", "b")
        assert archive.read("a") == archive.blob("a").load().tobytes() == b"x" * 100


LOCAL, CENTRAL = b"PK\3\4", b"PK\1\2"
# Header, offset in it, the bytes put there: method, flags, size, name, place of the local header.
LIES = {
    "another method in the entry": (LOCAL, 8, b"\x08\0"),
    "another method in the directory": (CENTRAL, 10, b"\x08\0"),
    "a method that is not known": (CENTRAL, 10, b"\x0c\0"),
    "another checksum in the entry": (LOCAL, 14, b"\1\2\3\4"),
    "another size in the entry": (LOCAL, 22, b"\x63\0\0\0"),
    "two sizes in the directory": (CENTRAL, 24, b"\x63\0\0\0"),
    "a size behind the end": (CENTRAL, 20, b"\xff\0\0\0\xff\0\0\0"),
    "another name in the entry": (LOCAL, 30, b"z"),
    "encryption": (CENTRAL, 8, b"\1\0"),
    "a place behind the end": (CENTRAL, 42, b"\xff\xff\0\0"),
    "the place of no entry": (CENTRAL, 42, b"\3\0\0\0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_directory_and_entries_must_agree(lie: str) -> None:
    content = archive_of(("a", b"x" * 100), ("b", b"y" * 50))
    header, offset, value = LIES[lie]
    start = content.index(header) + offset
    content[start : start + len(value)] = value
    with pytest.raises((ArchiveError, zipfile.BadZipFile)):
        opened(content)


def test_two_entries_of_one_place_are_an_overlap() -> None:
    content = archive_of(("a", b"x" * 100), ("b", b"y" * 100))
    content = bytearray(content.replace(b"b", b"a"))
    with pytest.raises(ArchiveError, match="the same name"):
        opened(content)
    first, second = content.index(CENTRAL), content.rindex(CENTRAL)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    content[second + 16 : second + 28] = content[first + 16 : first + 28]
    with pytest.raises(ArchiveError, match="overlap"):
        opened(content)


def test_what_unpacks_to_far_more_than_the_file_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repvgg_deploy.checkpoints.archives._EXPANSION_FREE_BYTES", 1 << 20)
    content = archive_of(("a", bytes(4 << 20)), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ArchiveError, match="claim to unpack to 4194304"):
        opened(content)


def test_storage_that_is_shorter_than_its_tensor_is_an_error(checkpoint_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.pth"
    longest = max(storages(checkpoint_file), key=lambda info: info.file_size).filename
    with zipfile.ZipFile(checkpoint_file) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name)[: 16 if name == longest else None])
    with pytest.raises(CheckpointError, match="shorter than the pickle says"):
        load_checkpoint(path)


def test_big_endian_file_is_read(state: State, save: Save, tmp_path: Path) -> None:
    source = save(state)
    path = tmp_path / "big.pth"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as target:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            elif "/data/" in name:
                width = 8 if len(content) == 8 else 4
                content = np.frombuffer(content, f"<u{width}").byteswap().tobytes()
            target.writestr(name, content)
    expected = load_checkpoint(source).tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_checkpoint(path).tensors.items())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", ["npz", "a checkpoint in an archive"])
def test_damaged_bytes_are_one_error_wherever_they_are(method: int, kind: str, state: State, tmp_path: Path) -> None:
    path, inner = tmp_path / "net.npz", io.BytesIO()
    torch.save(state, inner)
    with zipfile.ZipFile(path, "w", method) as archive:
        if kind == "npz":
            for name, tensor in state.items():
                array = io.BytesIO()
                np.save(array, tensor.numpy())
                archive.writestr(f"{name}.npy", array.getvalue())
        else:
            archive.writestr("net.pth", inner.getvalue())
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    assert raised.value.hint
