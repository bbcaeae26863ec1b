"""Files of other kinds: what is read all the same, and hints whose commands make a checkpoint of the rest."""

from __future__ import annotations

import io
import pickle
import shlex
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.small_nets import make_net, name_in_layout
from torch import Tensor, nn

from repvgg_deploy.checkpoints import build, load_checkpoint
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.nets.repvgg import RepVGG

Save = Callable[..., Path]
State = dict[str, Tensor]


def is_net(path: Path, state: State) -> bool:
    tensors = load_checkpoint(path).tensors
    return torch.equal(tensors["classifier.weight"], state["linear.weight"]) and len(tensors) > 100


def follow_hint(path: Path, match: str, folder: Path) -> Path:
    """Run the command of the error's hint as it stands, and return the file that it made."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path)
    command = shlex.split(caught.value.hint[caught.value.hint.index("python ") :])
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Path(command[-1])


def arrays(state: State) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_of_named_arrays_is_read(write: Any, state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path, **arrays(state))
    assert is_net(path, state)


def test_npz_with_an_array_of_objects_is_refused_without_unpickling(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays(state), extra=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match=r"extra\.npy is an array of object"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "header", ["(" * 5000, "{'descr': ", "[" * 199, "{'descr': (), 'fortran_order': 0, 'shape': 1}"]
)
def test_npz_whose_header_is_no_literal_is_refused(header: str, state: State, tmp_path: Path) -> None:
    np.savez(tmp_path / "net.npz", **arrays(state))
    raw = header.encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "net.npz", "a") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\1\0" + len(raw).to_bytes(2, "little") + raw)
    with pytest.raises(CheckpointError, match=r"x\.npy is damaged") as raised:
        load_checkpoint(tmp_path / "net.npz")
    assert raised.value.hint


def test_npz_whose_header_claims_gigabytes_is_refused(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 30, 24)})
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays(state).items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", header.getvalue() if name == "linear.weight" else buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"shapes contradict|claim|needs"):
        load_checkpoint(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_state_dict_of_numpy_arrays_is_read(protocol: int, writer: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    value = {"net": arrays(state), "acc": np.float64(0.7)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(value, protocol))
    else:
        torch.save(value, path, pickle_protocol=protocol)
    assert is_net(path, state)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["ckpt.pth", "folder/model.safetensors"])
def test_zipped_checkpoint_is_read(method: int, name: str, state: State, save: Save, tmp_path: Path) -> None:
    inner = save(state, Path(name).name)
    path = tmp_path / "upload.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(inner, name)
        archive.writestr("readme.txt", "the weights")
    assert is_net(path, state)


def test_zip_with_two_checkpoints_names_them(checkpoint_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "upload.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(checkpoint_file, "a.pth")
        archive.write(checkpoint_file, "b.pth")
    with pytest.raises(CheckpointError, match=r"it holds a\.pth, b\.pth"):
        load_checkpoint(path)


@pytest.mark.slow
def test_sharded_folder_of_torch_distributed_is_converted_by_the_hint(state: State, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "it's sharded"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state}, checkpoint_id=folder)
    assert is_net(follow_hint(folder, "is a sharded checkpoint", tmp_path), state)
    with pytest.raises(CheckpointError, match="is a sharded checkpoint"):
        load_checkpoint(next(folder.glob("*.distcp")))


class Official(nn.Module):
    """A net whose state dict has the names of the official code."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            module: nn.Module = self
            *path, leaf = name.split(".")
            for word in path:
                if not hasattr(module, word):
                    module.add_module(word, nn.Module())
                module = module.get_submodule(word)
            module.register_buffer(leaf, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_buffer("stage0.rbr_dense.conv.weight").sum() + self.get_buffer("linear.weight").sum()


@pytest.mark.slow
def test_torchscript_archive_is_converted_by_the_hint(state: State, tmp_path: Path) -> None:
    path = tmp_path / "it's a script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Official(state).eval(), torch.zeros(1)).save(str(path))
    converted = follow_hint(path, "is a TorchScript archive", tmp_path)
    # Of the tensors only those that the traced code uses are left.
    assert torch.load(converted)["linear.weight"].equal(state["linear.weight"])


@pytest.mark.slow
def test_program_of_torch_export_is_converted_by_the_hint(state: State, tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Official(state).eval(), (torch.zeros(1),)), path)
    assert is_net(follow_hint(path, r"is a program of torch\.export", tmp_path), state)


def test_messagepack_of_flax_is_converted_by_the_hint(state: State, tmp_path: Path) -> None:
    def pack(array: Any) -> msgspec.msgpack.Ext:
        return msgspec.msgpack.Ext(1, msgspec.msgpack.encode([list(array.shape), array.dtype.name, array.tobytes()]))

    tree: dict[str, Any] = {}
    for name, array in arrays(state).items():
        *path, leaf = name.split(".")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[leaf] = pack(array)
    file = tmp_path / "net.msgpack"
    file.write_bytes(msgspec.msgpack.encode({"params": tree}))
    assert is_net(follow_hint(file, "is a MessagePack file", tmp_path), state)


def test_hdf5_file_is_converted_by_the_hint(state: State, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        for name, array in arrays(state).items():
            file[name.replace(".", "/")] = array
    assert is_net(follow_hint(path, "is an HDF5 file", tmp_path), state)


def test_hdf5_file_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "net.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(CheckpointError, match="is an HDF5 file"):
        load_checkpoint(path)


def test_folder_of_deepspeed_names_the_file_to_give(state: State, tmp_path: Path) -> None:
    inner = tmp_path / "run.ckpt" / "checkpoint"
    inner.mkdir(parents=True)
    torch.save(
        {"module": {f"_forward_module.model.{k}": t for k, t in state.items()}}, inner / "mp_rank_00_model_states.pt"
    )
    with pytest.raises(CheckpointError, match="a folder of DeepSpeed") as caught:
        load_checkpoint(tmp_path / "run.ckpt")
    assert is_net(Path(caught.value.hint.split(": ")[1]), state)


def test_folder_names_the_checkpoints_in_it(checkpoint_file: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory") as caught:
        load_checkpoint(checkpoint_file.parent)
    assert checkpoint_file.name in caught.value.hint


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\x1f\x8b\x08", "gzip"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")],
)
def test_packed_file_is_called_by_its_name(head: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(head + bytes(50))
    with pytest.raises(CheckpointError, match=f"is packed with {kind}"):
        load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_whole_pickled_net_is_read_without_its_class(zipped: bool, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    net = make_net(seed=3)
    torch.save({"epoch": 3, "model": net.half(), "ema": None}, path, _use_new_zipfile_serialization=zipped)
    # A net of this package has the canonical names, which are no library's: what is told is that it was read.
    with pytest.raises(CheckpointError, match="is not a RepVGG checkpoint: its first tensors are stages"):
        load_checkpoint(path)
    module = Official(name_in_layout(net.float(), "official"))
    torch.save({"epoch": 3, "model": module.half(), "ema": None}, path, _use_new_zipfile_serialization=zipped)
    read: RepVGG = build(load_checkpoint(path))
    assert torch.allclose(read(images), make_net(seed=3)(images), atol=0.05)
