"""Pickles: what is known is read, all else is a record, and nothing runs, whatever the instructions."""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evil_pickles import KINDS, make_evil_pickle, works
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repvgg_deploy.checkpoints import load_checkpoint
from repvgg_deploy.checkpoints.inert import Inert
from repvgg_deploy.checkpoints.known_globals import StorageType, StoredArray, make_globals
from repvgg_deploy.checkpoints.number_types import NumberType
from repvgg_deploy.checkpoints.sources import MemorySource
from repvgg_deploy.checkpoints.stored import Storage, StoredTensor
from repvgg_deploy.checkpoints.torch_files import read_pickles
from repvgg_deploy.checkpoints.unpickling import Maker, PickleError, Stateful, read_pickle
from repvgg_deploy.errors import CheckpointError

State = dict[str, Tensor]
Save = Callable[..., Path]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

_HARMLESS = {"object.__getattr__", "sys._getframe", "gc.collect", "array.__new__"}
_events: list[str] | None = None


def _hear(event: str, _: Any) -> None:
    if _events is not None and event not in _HARMLESS:
        _events.append(event)


sys.addaudithook(_hear)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail if the interpreter imports, compiles, opens, starts or calls out to anything in the block."""
    global _events
    _events = []
    try:
        yield
        heard = list(_events)
    finally:
        _events = None
    assert heard == []


def read(content: bytes) -> Any:
    return read_pickles(MemorySource(content)).value


def refuse(_: Any) -> Any:
    raise PickleError("no storages here")


@pytest.mark.parametrize("kind", KINDS)
def test_malicious_pickle_runs_nothing(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "was_here"
    content = make_evil_pickle(kind, canary)
    assert works(content, canary), "the pickle does nothing, so it proves nothing"
    with suppress(PickleError), nothing_runs():
        read(content)
    assert not canary.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", ["zip", "legacy", "keys of the storages", "bare"])
def test_file_with_a_malicious_pickle_runs_nothing(kind: str, container: str, state: State, tmp_path: Path) -> None:
    canary, path = tmp_path / "was_here", tmp_path / "a.pth"
    evil = make_evil_pickle(kind, canary)
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=container == "zip")
    if container == "zip":
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, evil if name.endswith("data.pkl") else content)
    elif container == "bare":
        path.write_bytes(evil)
    else:
        # The magic number, the version, the machine and the value come before the keys.
        parts = list(_pickles(path.read_bytes()))
        kept = 4 if container == "keys of the storages" else 3
        path.write_bytes(b"".join(parts[:kept]) + evil + b"".join(parts[kept + 1 :]))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not canary.exists()


def _pickles(content: bytes) -> Iterator[bytes]:
    """The five pickles at the beginning of a file of torch before 1.6, then the rest."""
    stream = io.BytesIO(content)
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        yield content[start : stream.tell()]
    yield content[stream.tell() :]


def test_malicious_object_beside_the_weights_is_named_and_not_run(state: State, tmp_path: Path) -> None:
    canary, path = tmp_path / "was_here", tmp_path / "a.pkl"

    class Payload:
        def __reduce__(self) -> Any:
            return exec, (f"import os; os.mkdir({str(canary)!r})",)

    path.write_bytes(pickle.dumps({"state_dict": state, "hook": Payload()}))
    checkpoint = load_checkpoint(path)
    assert not canary.exists()
    assert any("builtins.exec" in note for note in checkpoint.notes)


_ARGUMENTS: dict[str, st.SearchStrategy[bytes]] = {
    "BININT1": st.binary(min_size=1, max_size=1),
    "BININT": st.binary(min_size=4, max_size=4),
    "BINGET": st.sampled_from([bytes([n]) for n in range(6)]),
    "BINPUT": st.sampled_from([bytes([n]) for n in range(6)]),
    "GLOBAL": st.sampled_from(
        [b"os\nmkdir\n", b"builtins\neval\n", b"collections\nOrderedDict\n", b"torch._utils\n_rebuild_tensor_v2\n",
         b"torch\nFloatStorage\n", b"torch\nfloat32\n", b"numpy\ndtype\n", b"numpy\nndarray\n", b"builtins\nset\n",
         b"numpy._core.multiarray\n_reconstruct\n", b"numpy._core.multiarray\nscalar\n", b"_codecs\nencode\n",
         b"torch._tensor\n_rebuild_from_type_v2\n", b"torch.storage\n_load_from_bytes\n", b"builtins\nbytearray\n",
         b"copyreg\n_reconstructor\n", b"collections\ndeque\n", b"x\ny\n"]),
    "SHORT_BINUNICODE": st.sampled_from(
        [bytes([len(w)]) + w for w in (b"os", b"mkdir", b"storage", b"0", b"cpu", b"f4", b"O", b"latin1", b"<")]),
    "SHORT_BINBYTES": st.sampled_from([bytes([len(w)]) + w for w in (b"", b"b", b"\0\0\0\0", b"\x80\x02N.")]),
    "INST": st.just(b"os\nmkdir\n"),
}  # fmt: skip
_OPCODES = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
_PLAIN = [opcode.name for opcode in pickletools.opcodes if opcode.arg is None and opcode.name != "STOP"]
_instruction = st.one_of(
    st.sampled_from(_PLAIN).map(lambda name: _OPCODES[name]),
    *(arguments.map(lambda tail, name=name: _OPCODES[name] + tail) for name, arguments in _ARGUMENTS.items()),
)
_MADE = (
    type(None),
    bool,
    int,
    float,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    Inert,
    StoredTensor,
    Storage,
    StoredArray,
)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.lists(_instruction, max_size=40), st.integers(0, 5))
def test_arbitrary_instructions_do_not_escape(instructions: list[bytes], protocol: int) -> None:
    content = b"\x80" + bytes([protocol]) + b"".join(instructions) + b"."
    try:
        with nothing_runs():
            value = read(content)
    except AssertionError:
        raise
    except Exception:
        # As a damaged file; how `load_checkpoint` says so is tested with damaged files.
        return
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        assert type(item) in _MADE or isinstance(item, Maker | StorageType | Stateful | NumberType), type(item)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Inert):
            stack += [item.args, item.state, *item.items, *item.items.values(), *item.elements]
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            stack += item


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.binary(max_size=80), st.integers(0, 5))
def test_arbitrary_bytes_do_not_escape(content: bytes, protocol: int) -> None:
    with suppress(Exception), nothing_runs():
        read_pickle(
            io.BytesIO(b"\x80" + bytes([protocol]) + content), make_globals(lambda _: None, len(content)), refuse
        )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_read_as_they_are(protocol: int) -> None:
    value = {"a": [1, -2.5, 10**30, None, True, "é", b"\x00\xff"], "b": (1, (2,)), "c": {"d": ()}}
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_of_the_standard_library_become_plain_ones(protocol: int) -> None:
    value = [OrderedDict(a=1), defaultdict(list, {"b": [2]}), deque([3, 4], 5), {5}, frozenset({6}), bytearray(b"7")]
    assert read(pickle.dumps(value, protocol)) == [{"a": 1}, {"b": [2]}, [3, 4], [5], (6,), b"7"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["float32", ">f8", "int64", "bool", "float16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numbers_are_read(protocol: int, dtype: str, order: Any) -> None:
    array = np.asfortranarray if order == "F" else np.ascontiguousarray
    value = array(np.arange(24).reshape(2, 3, 4).astype(dtype))
    found = read(pickle.dumps(value, protocol))
    assert np.array_equal(found.tensor.load("x"), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_of_numpy_are_numbers(protocol: int) -> None:
    assert read(pickle.dumps([np.float32(0.5), np.int64(-3), np.bool_(True)], protocol)) == [0.5, -3, True]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_array_of_objects_is_not_read(protocol: int) -> None:
    found = read(pickle.dumps(np.array([{}, Path("x")], dtype=object), protocol))
    assert isinstance(found, StoredArray)
    assert found.tensor is None


class Thing:
    def __init__(self) -> None:
        self.lr = 0.1


class Config(dict[str, Any]):
    pass


class Numbers(list[int]):
    pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_become_records_of_what_they_hold(protocol: int) -> None:
    config = Config(size=32)
    config.frozen = True  # type: ignore[attr-defined]
    thing, mapping, numbers = read(pickle.dumps([Thing(), config, Numbers([1, 2])], protocol))
    assert (thing.name, thing.state) == ("Thing", {"lr": 0.1})
    assert mapping.name == "Config"
    assert mapping.state == {"frozen": True}
    if protocol >= 2:
        assert (mapping.items, numbers.elements) == ({"size": 32}, [1, 2])


def test_value_that_contains_itself_is_read() -> None:
    value: list[Any] = []
    value.append(value)
    found = read(pickle.dumps(value))
    assert found[0] is found


def test_keys_whose_hashes_collide_take_no_quadratic_time() -> None:
    modulus = (1 << 61) - 1
    content = pickle.dumps({str(n): n for n in range(2)})
    body = b"".join(pickle.dumps(n * modulus, 2)[2:-1] + b"N" for n in range(1, 20_000))
    found = read(b"\x80\x02}(" + body + b"u.")
    assert len(found) == 19_999
    assert read(content) == {"0": 0, "1": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02(",
        b"\x80\x02R.",
        b"\x80\x02h\x07.",
        b"\x80\x02N)R.",
        b"\x80\x02}NNs",
        b"\x80\x02N]a.",
        b"\x80\x05\x97.",
    ],
)
def test_pickle_without_sense_is_an_error(content: bytes) -> None:
    with pytest.raises((PickleError, ValueError, KeyError, IndexError, TypeError)):
        read(content)


def test_more_instructions_than_any_checkpoint_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repvgg_deploy.checkpoints.unpickling._MAX_INSTRUCTIONS", 100)
    with pytest.raises(PickleError, match="more instructions"):
        read(b"\x80\x02" + b"N0" * 200 + b"N.")


@pytest.mark.slow
def test_a_list_that_is_kept_once_cannot_be_copied_for_ever(tmp_path: Path) -> None:
    """Half a megabyte that would take terabytes: one list, turned into a tuple again and again."""
    many = b"](" + b"N" * 300_000 + b"eq\x00"
    copies = b"cbuiltins\ntuple\nq\x01" + b"h\x01h\x00\x85R" * 50_000 + b"0" * 50_000
    path = tmp_path / "net.pth"
    path.write_bytes(b"\x80\x02" + many + copies + b".")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()
