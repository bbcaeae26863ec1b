"""Files that are not read here: what they are, and the command that makes a checkpoint of them."""

from __future__ import annotations

import shlex
from pathlib import Path

from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable

_KNOWN = "a checkpoint is a .pth, .pt, .pth.tar, .ckpt, .npz or .safetensors file"

_FROM_TORCHSCRIPT = "import sys, torch; torch.save(torch.jit.load(sys.argv[1], 'cpu').state_dict(), sys.argv[2])"
_FROM_EXPORTED = "import sys, torch; torch.save(torch.export.load(sys.argv[1]).state_dict, sys.argv[2])"
_FROM_HDF5 = (
    "import sys, h5py, numpy; w = {}; take = lambda k, v: w.update({k.replace('/', '.'): v[()]})"
    " if isinstance(v, h5py.Dataset) else None; "
    "h5py.File(sys.argv[1]).visititems(take); numpy.savez(sys.argv[2], **w)"
)
# Flax writes an array as an extension of MessagePack: its shape, type and bytes, packed again.
_FROM_MSGPACK = (
    "import sys, msgspec, numpy; unpack = msgspec.msgpack.decode; "
    "array = lambda s, t, b: numpy.frombuffer(b, t).reshape(s); "
    "walk = lambda p, v: [x for k in v for x in walk(f'{p}.{k}', v[k])] if isinstance(v, dict) else [(p[1:], v)]; "
    "tree = unpack(open(sys.argv[1], 'rb').read(), ext_hook=lambda code, data: array(*unpack(data))); "
    "numpy.savez(sys.argv[2], **dict(walk('', tree)))"
)
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7-Zip"}


def _convert(program: str, source: Path, ending: str) -> str:
    """A command for the shell that converts `source`; the new file is beside it."""
    target = source.with_name(f"{source.stem}.weights{ending}")
    return f"convert it once: python -c {shlex.quote(program)} {shlex.quote(str(source))} {shlex.quote(str(target))}"


def _is_messagepack(head: bytes) -> bool:
    """Whether a file begins with a map whose first key is text (https://msgpack.org, the format's specification)."""
    sizes = {0xDE: 3, 0xDF: 5} | dict.fromkeys(range(0x81, 0x90), 1)
    start = sizes.get(head[0])
    return (
        start is not None and len(head) > start and (0xA1 <= head[start] <= 0xBF or head[start] in (0xD9, 0xDA, 0xDB))
    )


def describe_folder(path: Path) -> CheckpointError:
    """What a folder is that was given instead of a checkpoint."""
    shown = printable(str(path))
    if (path / ".metadata").exists() and any(path.glob("*.distcp")):
        return _describe_sharded(path)
    states = sorted([*path.glob("mp_rank_00_model_states.pt"), *path.glob("*/mp_rank_00_model_states.pt")])
    if states:
        return CheckpointError(f"{shown} is a folder of DeepSpeed", f"give the model's file in it: {states[-1]}")
    files = sorted(p for p in path.iterdir() if p.suffix in (".pth", ".pt", ".ckpt", ".npz", ".safetensors", ".tar"))
    names = ", ".join(printable(file.name) for file in files[:5])
    return CheckpointError(
        f"{shown} is a directory", f"give the checkpoint file inside it{': ' + names if names else ''}"
    )


def _describe_sharded(folder: Path) -> CheckpointError:
    target = folder.absolute().with_name(f"{folder.absolute().name}.pth")
    command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    return CheckpointError(
        f"{printable(str(folder))} is a sharded checkpoint of torch.distributed.checkpoint",
        f"convert it once: {command} {shlex.quote(str(folder))} {shlex.quote(str(target))}",
    )


def describe_archive(names: tuple[str, ...], path: Path) -> CheckpointError | None:
    """What a zip archive is, by the names in it; None if it may be a checkpoint."""
    shown = printable(str(path))
    if path.suffix == ".distcp" and (path.parent / ".metadata").exists():
        return _describe_sharded(path.parent)
    if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
        return CheckpointError(
            f"{shown} is a TorchScript archive, not a state dict", _convert(_FROM_TORCHSCRIPT, path, ".pth")
        )
    exported = ("serialized_exported_program.json", "archive_format", "models/model.json")
    if any(name.endswith(exported) for name in names):
        return CheckpointError(
            f"{shown} is a program of torch.export, not a state dict", _convert(_FROM_EXPORTED, path, ".pth")
        )
    return None


def describe_other_file(head: bytes, path: Path) -> CheckpointError:
    """What a file is that begins with `head`, which is not the beginning of a checkpoint."""
    shown = printable(str(path))
    if path.suffix == ".distcp" and (path.parent / ".metadata").exists():
        return _describe_sharded(path.parent)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return CheckpointError(f"{shown} is an HDF5 file", _convert(_FROM_HDF5, path, ".npz"))
    if _is_messagepack(head):
        return CheckpointError(f"{shown} is a MessagePack file, as Flax writes", _convert(_FROM_MSGPACK, path, ".npz"))
    if head.startswith(b"version https:"):
        return CheckpointError(
            f"{shown} is a Git LFS pointer, not the file itself", "fetch the file: git lfs pull, in its repository"
        )
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            return CheckpointError(f"{shown} is packed with {name}", "unpack it and give the checkpoint inside")
    if head[257:262] == b"ustar":
        return CheckpointError(f"{shown} is a tar archive", "unpack it and give the checkpoint inside")
    what = "an ONNX graph or another protobuf" if head[:1] == b"\x08" else "no checkpoint"
    return CheckpointError(f"{shown} is {what}", _KNOWN)
