"""Files that are damaged, unsafe or something else: always a CheckpointError with a hint, and no code is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_nets import make_net, name_in_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import CheckpointError

Save = Callable[..., Path]
State = dict[str, Tensor]

ONCE = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def refused(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path)
    assert caught.value.hint
    return caught.value


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "there is no file")


def test_directory(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.touch()
    refused(path, "is empty")


def test_broken_link(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.symlink_to(tmp_path / "gone.pth")
    refused(path, "there is no file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(checkpoint_file: Path) -> None:
    checkpoint_file.chmod(0)
    refused(checkpoint_file, "cannot read")


@pytest.mark.parametrize("name", ["n" * 300 + ".pth", "a\0b.pth"])
def test_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    refused(tmp_path / name, "there is no file|cannot read")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    refused(path, "a Git LFS pointer, not the file itself")


@pytest.mark.parametrize("content", [b"\n", b"<!DOCTYPE html><html>", b"\x89PNG\r\n\x1a\n0000", b"\0" * 5000])
def test_something_else_altogether(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    refused(path, "is no checkpoint")


def test_onnx_graph_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"\x08\x0a\x12\x00")
    refused(path, "an ONNX graph or another protobuf")


def test_zip_without_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "weights are elsewhere")
    refused(path, "a zip archive without a checkpoint")


def test_checkpoint_that_was_zipped_again_with_compression_gives_the_same_tensors(
    checkpoint_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "again.pth"
    with zipfile.ZipFile(checkpoint_file) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    expected = load_checkpoint(checkpoint_file).tensors
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_checkpoint(path).tensors.items())


def test_torchscript_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/__torch__.py"):
            archive.writestr(name, b"\x80\x02N.")
    error = refused(path, "a TorchScript archive")
    assert "state_dict" in error.hint


class Payload:
    """Unpickled by pickle.load it makes a file; a reader of weights must not."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_pickled_code_is_never_run(zipped: bool, name: str, state: State, tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    path = tmp_path / name
    with path.open("wb") as file:
        torch.save({"state_dict": state, "x": Payload(marker)}, file, _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(path)
    assert not marker.exists()
    assert any("mkdir" in note and "not executed" in note for note in checkpoint.notes)


def test_bare_pickle_with_code_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    refused(path, "contains no named tensors")
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the payload does nothing, so it proves nothing"


def test_whole_pickled_module_of_another_net_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    refused(path, "is not a RepVGG checkpoint")


def _contents(zipped: bool | None) -> bytes:
    """A small checkpoint: a zip file, a legacy pickle, or safetensors."""
    state = name_in_layout(make_net(blocks=(1, 1), widths=(4, 4, 4), classes=2), "official")
    if zipped is None:
        from safetensors.torch import save

        return bytes(save(state))
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


CONTAINERS = pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "safetensors"])


@pytest.mark.slow
@CONTAINERS
@ONCE
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused_wherever_it_ends(zipped: bool | None, share: float, tmp_path: Path) -> None:
    content = _contents(zipped)
    path = tmp_path / "a.pth"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@CONTAINERS
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 64, -1, -2, -16, -22, -23])
def test_truncated_at_an_edge_of_the_format(zipped: bool | None, length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(_contents(zipped)[:length])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.slow
@CONTAINERS
@ONCE
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_give_a_net_or_an_error_never_a_traceback(
    zipped: bool | None, changes: list[tuple[float, int]], tmp_path: Path
) -> None:
    content = bytearray(_contents(zipped))
    for place, value in changes:
        # Names and structure come first (safetensors, legacy) and last (zip); half of the changes are put there.
        content[int(place**3 * len(content))] = value
    path = tmp_path / "a.pth"
    path.write_bytes(bytes(content))
    with contextlib.suppress(CheckpointError):
        assert build(load_checkpoint(path)).spec.classes > 0


@pytest.mark.slow
@ONCE
@given(content=st.binary(max_size=400), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{"]))
def test_noise_is_refused(content: bytes, head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(head + content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [None, 3, [1, 2], torch.ones(3), {}, {"epoch": 3}, {1: torch.ones(2)}])
def test_file_without_a_state_dict(value: Any, save: Save) -> None:
    refused(save(value), "contains no named tensors")


def test_dictionary_that_contains_itself_ends(save: Save) -> None:
    value: dict[str, Any] = {}
    value |= {f"k{i}": value for i in range(60)}
    refused(save(value), "contains no named tensors")
