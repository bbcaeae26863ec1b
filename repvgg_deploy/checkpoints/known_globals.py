"""The few names of a pickle that stand for something: containers, torch's tensors and storages, numpy's arrays.

Each is a function of this package that makes data of data: dicts, lists, `StoredTensor`s. What it cannot make of what
the pickle gives becomes an inert record as all the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from repvgg_deploy.checkpoints.inert import Inert
from repvgg_deploy.checkpoints.number_types import NUMBER_TYPES, NumberType
from repvgg_deploy.checkpoints.stored import Deferred, Storage, StoredTensor, contiguous_stride
from repvgg_deploy.checkpoints.unpickling import Globals, Maker, PickleError, Stateful

_STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "UntypedStorage": "uint8",
}
_QUANTIZED = "is a sparse or quantized tensor"
_PROBLEMS = {
    "_rebuild_sparse_tensor": _QUANTIZED,
    "_rebuild_sparse_csr_tensor": _QUANTIZED,
    "_rebuild_qtensor": _QUANTIZED,
    "_rebuild_nested_tensor": "is a nested tensor",
    "_rebuild_meta_tensor_no_storage": "has a shape, but no values",
    "_rebuild_wrapper_subclass": "is an instance of a tensor subclass",
}
_NUMBERS = re.compile(r"(f2|f4|f8|i1|i2|i4|i8|u1|u2|u4|u8|b1|c8|c16)")


class StorageType:
    """A storage class of torch: what type its numbers have."""

    def __init__(self, dtype: NumberType) -> None:
        self.dtype = dtype


class _DType(Stateful):
    """A numpy dtype of plain numbers, whose byte order comes in a BUILD."""

    def __init__(self, code: str) -> None:
        self.code = code

    def set_state(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        if order in ("<", ">", "=", "|"):
            self.code = order + self.code

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self.code)


class StoredArray(Stateful):
    """A numpy array whose contents come in a BUILD; `tensor` is None if it is not an array of numbers."""

    def __init__(self) -> None:
        self.tensor: StoredTensor | None = None

    def set_state(self, state: Any) -> None:
        """Take numpy's own state: version, shape, dtype, whether the first index runs fastest, the bytes."""
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, is_fortran, content = state
            self.tensor = _array(content, dtype, shape, bool(is_fortran))


_COPIES_FREE = 10_000_000


class _Copies:
    """Counts what calls copy: a few bytes of a pickle may ask for a large list, kept once, to be copied for ever."""

    def __init__(self, size: int) -> None:
        self._left = _COPIES_FREE + 4 * size

    def count(self, values: tuple[Any, ...]) -> None:
        """Take note of the arguments of a call; raise PickleError beyond four times the size of the file."""
        self._left -= sum(
            len(value) for value in values if isinstance(value, str | bytes | bytearray | list | tuple | dict)
        )
        if self._left < 0:
            raise PickleError("it copies more data than it contains")


def make_globals(load_nested: Callable[[bytes], Any], size: int) -> Globals:
    """The table for one file of `size` bytes; `load_nested` reads a file that lies in the pickle as bytes."""
    copies = _Copies(size)
    makers: dict[tuple[str, str], Callable[..., Any]] = {
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): _make_dict,
        ("collections", "Counter"): _make_dict,
        ("collections", "defaultdict"): lambda *_: {},
        ("collections", "deque"): _make_list,
        ("copyreg", "_reconstructor"): _reconstruct_object,
        ("copy_reg", "_reconstructor"): _reconstruct_object,
        ("torch", "Size"): lambda sizes=(): tuple(sizes),
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): lambda data, *_: data,
        ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): lambda data, *_: data,
        ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
        ("torch._tensor", "_rebuild_from_type"): _of_type,
        ("torch.storage", "_load_from_bytes"): lambda content: load_nested(_as_bytes(content)),
    }
    makers |= {("torch._utils", name): _problem(text) for name, text in _PROBLEMS.items()}
    for module in ("builtins", "__builtin__"):
        makers |= {(module, name): _make_list for name in ("set", "list")}
        makers |= {(module, name): lambda items=(): tuple(items) for name in ("frozenset", "tuple")}
        makers |= {(module, name): _make_bytes for name in ("bytearray", "bytes")}
        makers[module, "dict"] = _make_dict
    for core in ("numpy.core", "numpy._core"):
        makers[f"{core}.multiarray", "_reconstruct"] = lambda *_: StoredArray()
        makers[f"{core}.multiarray", "scalar"] = _scalar
        makers[f"{core}.numeric", "_frombuffer"] = _frombuffer
    makers["numpy", "dtype"] = _dtype
    known: dict[tuple[str, str], Any] = {
        (module, name): Maker(module, name, _or_inert(module, name, call, copies))
        for (module, name), call in makers.items()
    }
    known |= {("torch", name): dtype for name, dtype in NUMBER_TYPES.items()}
    for module in ("torch", "torch.cuda", "torch.storage"):
        known |= {(module, name): StorageType(NUMBER_TYPES[dtype]) for name, dtype in _STORAGES.items()}
    # Mentioned by what is known, and nothing by themselves.
    known["numpy", "ndarray"] = Inert("numpy", "ndarray")
    known["torch.nn.parameter", "Parameter"] = Inert("torch.nn.parameter", "Parameter")
    return Globals(known)


def _or_inert(module: str, name: str, call: Callable[..., Any], copies: _Copies) -> Callable[..., Any]:
    def make(*arguments: Any) -> Any:
        copies.count(arguments)
        try:
            return call(*arguments)
        except (TypeError, ValueError, AttributeError):
            return Inert(module, name, arguments)

    return make


def _make_dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, Mapping) else [tuple(pair) for pair in items]
    return {key: value for key, value in pairs if isinstance(key, str)}


def _make_list(items: Iterable[Any] = (), *_: Any) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise TypeError
    return list(items)


def _make_bytes(content: Any = b"", encoding: Any = "latin-1") -> bytes:
    return _encode(content, encoding) if isinstance(content, str) else _as_bytes(content)


def _encode(text: Any, encoding: Any = "latin-1") -> bytes:
    """Bytes as protocol 2 has them: text of the first 256 characters."""
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise TypeError
    return text.encode("latin-1")


def _as_bytes(content: Any) -> bytes:
    if isinstance(content, str):
        # The bytes of Python 2.
        return content.encode("latin-1")
    if not isinstance(content, bytes | bytearray):
        raise TypeError
    return bytes(content)


def _reconstruct_object(kind: Any, _base: Any, state: Any = None) -> Any:
    if not isinstance(kind, Inert):
        raise TypeError
    return Inert(kind.module, kind.name, (state,))


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise PickleError("a tensor's shape is not made of numbers")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise TypeError
    problem = None
    metadata = rest[2] if len(rest) > 2 else None
    if isinstance(metadata, Mapping) and any(metadata.get(bit) for bit in ("conj", "neg")):
        problem = "is stored conjugated or negated"
    (start,) = _ints((offset,))
    return StoredTensor(_ints(shape), storage.dtype, _ints(stride), start, storage, problem)


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    # What follows: whether it needs a gradient, hooks, the type of the numbers, metadata.
    dtype = rest[2] if len(rest) > 2 else None
    if not isinstance(storage, Storage) or not isinstance(dtype, NumberType):
        raise TypeError
    typed = Storage(storage.blob, dtype, storage.big_endian)
    return _tensor(typed, offset, shape, stride, None, None, *rest[3:])


def _of_type(function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    if not isinstance(function, Maker) or not isinstance(arguments, tuple):
        raise TypeError
    return function.call(*arguments)


def _problem(text: str) -> Callable[..., StoredTensor]:
    return lambda *_: StoredTensor((), NUMBER_TYPES["float32"], problem=text)


def _dtype(code: Any, *_: Any) -> _DType:
    if not isinstance(code, str) or _NUMBERS.fullmatch(code) is None:
        raise TypeError
    return _DType(code)


def _scalar(dtype: Any, content: Any = None) -> Any:
    if not isinstance(dtype, _DType):
        raise TypeError
    return np.frombuffer(_as_bytes(content), dtype.resolve(), 1)[0].item()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> StoredArray:
    array = StoredArray()
    array.tensor = _array(content, dtype, shape, order == "F")
    return array


def _array(content: Any, dtype: Any, shape: Any, is_fortran: bool) -> StoredTensor | None:
    if not isinstance(dtype, _DType) or not isinstance(content, str | bytes | bytearray):
        return None
    # Text is encoded when the array is asked for.
    return array_tensor(len(content), lambda: _as_bytes(content), dtype.resolve(), _ints(shape), is_fortran)


def array_tensor(
    size: int, read: Callable[[], bytes], dtype: np.dtype[Any], shape: tuple[int, ...], is_fortran: bool
) -> StoredTensor:
    """A numpy array as a tensor; `read` gives its `size` bytes."""
    stride = contiguous_stride(shape[::-1])[::-1] if is_fortran else contiguous_stride(shape)
    storage = Storage(Deferred(size, read), NUMBER_TYPES[dtype.name], dtype.newbyteorder("=") != dtype)
    return StoredTensor(shape, storage.dtype, stride, 0, storage)
