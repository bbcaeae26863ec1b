"""A reader of pickles under which nothing runs: every class and function is a record, but for a few of our own.

A pickle is a program for a small stack machine, which may import any function and call it. This machine knows the same
instructions (protocols 0 to 5, as `pickletools` reads them), and three differ: GLOBAL imports nothing, it looks the
name up in a table; REDUCE, NEWOBJ, INST and OBJ call only what that table gave, which are functions of this package;
BUILD stores the state as data. All other objects become `Inert` records.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from repvgg_deploy.checkpoints.inert import Inert

_MAX_INSTRUCTIONS = 5_000_000
"""Some sixty times those of large training checkpoints; an empty dict, one byte in a pickle, takes 64 in memory."""

_LITERALS = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split()  # noqa: SIM905
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_FETCHES = frozenset({"GET", "BINGET", "LONG_BINGET"})
_SILENT = frozenset({"PROTO", "FRAME", "READONLY_BUFFER"})


class PickleError(Exception):
    """A pickle that is damaged, or that no library writes."""


@dataclass(frozen=True)
class Maker:
    """A function of this package that stands for one that the pickle names; `call` makes data of data."""

    module: str
    name: str
    call: Callable[..., Any]


class Stateful:
    """A value of our own that a BUILD instruction completes."""

    def set_state(self, state: Any) -> None:
        """Take what the pickle says of this value."""
        raise NotImplementedError


@dataclass(frozen=True)
class Globals:
    """What a pickle's names stand for: `known` by module and name; `unread` counts those that became records."""

    known: dict[tuple[str, str], Any]
    unread: dict[str, int] = field(default_factory=dict)

    def find(self, module: str, name: str) -> Any:
        """The value of our own for a name, or a record."""
        found = self.known.get((module, name))
        if found is not None:
            return found
        full = f"{module}.{name}"
        self.unread[full] = self.unread.get(full, 0) + 1
        return Inert(module, name)


def read_pickle(stream: IO[bytes], names: Globals, find_persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle that begins at `stream`'s position, and move the stream past it.

    Args:
        stream: read forward only.
        names: what the pickle's names stand for.
        find_persistent: the value for a persistent id, which is what torch gives a storage.

    Raises:
        PickleError, or whatever a damaged program ends in: ValueError, KeyError, IndexError, TypeError, ….
    """
    return _Machine(names, find_persistent).run(stream)


class _Machine:
    def __init__(self, names: Globals, find_persistent: Callable[[Any], Any]) -> None:
        self._names = names
        self._find_persistent = find_persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        argument: Any
        instructions = {name: getattr(self, f"_{name.lower()}") for name in _INSTRUCTIONS}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            name = opcode.name
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _STORES:
                self._memo[argument] = self._stack[-1]
            elif name in _FETCHES:
                self._stack.append(self._memo[argument])
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self._stack.pop()
            elif name not in _SILENT:
                if name not in instructions:
                    raise PickleError(f"the instruction {name} has no meaning here")
                instructions[name](argument)
            if count > _MAX_INSTRUCTIONS:
                raise PickleError("it has more instructions than any checkpoint needs")
        raise PickleError("it does not end")

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[Any]:
        taken, self._stack = self._stack, self._below.pop()
        return taken

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_to_mark()

    def _pop_mark(self, _: Any) -> None:
        self._pop_to_mark()

    # Containers. A set is a list here: its elements need no hash, which a hostile file could choose.

    def _empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _empty_list(self, _: Any) -> None:
        self._stack.append([])

    _empty_set = _empty_list

    def _tuple(self, _: Any) -> None:
        taken = tuple(self._pop_to_mark())
        self._stack.append(taken)

    _frozenset = _tuple

    def _tuple1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        first, second = self._stack[-2:]
        self._stack[-2:] = [(first, second)]

    def _tuple3(self, _: Any) -> None:
        first, second, third = self._stack[-3:]
        self._stack[-3:] = [(first, second, third)]

    def _list(self, _: Any) -> None:
        taken = self._pop_to_mark()
        self._stack.append(taken)

    def _dict(self, _: Any) -> None:
        target: dict[Any, Any] = {}
        _set_items(target, self._pop_to_mark())
        self._stack.append(target)

    def _append(self, _: Any) -> None:
        value = self._stack.pop()
        _extend(self._stack[-1], [value])

    def _appends(self, _: Any) -> None:
        values = self._pop_to_mark()
        _extend(self._stack[-1], values)

    _additems = _appends

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _set_items(self._stack[-1], [key, value])

    def _setitems(self, _: Any) -> None:
        values = self._pop_to_mark()
        _set_items(self._stack[-1], values)

    # Names, and what would be calls.

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._names.find(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a name is not text")
        self._stack.append(self._names.find(module, name))

    def _ext1(self, code: int) -> None:
        # A code stands for a name in the registry of the process that wrote the file, which nobody else knows.
        self._stack.append(self._names.find("copyreg", f"extension {code}"))

    _ext2 = _ext4 = _ext1

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(_make(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        keywords, arguments, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise PickleError("a call has no arguments")
        self._stack.append(_make(function, (*arguments, keywords) if keywords else arguments))

    def _inst(self, argument: str) -> None:
        arguments = tuple(self._pop_to_mark())
        self._global(argument)
        self._stack.append(_make(self._stack.pop(), arguments))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._pop_to_mark()
        self._stack.append(_make(function, tuple(arguments)))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        # The attributes of anything else, such as an OrderedDict, are dropped.
        if isinstance(target, Inert | Stateful):
            target.set_state(state)

    def _persid(self, argument: str) -> None:
        self._stack.append(self._find_persistent(argument))

    def _binpersid(self, _: Any) -> None:
        self._stack.append(self._find_persistent(self._stack.pop()))


_INSTRUCTIONS = tuple(
    """MARK MEMOIZE DUP POP POP_MARK EMPTY_DICT EMPTY_LIST EMPTY_SET TUPLE FROZENSET TUPLE1 TUPLE2 TUPLE3 LIST DICT
    APPEND APPENDS ADDITEMS SETITEM SETITEMS GLOBAL STACK_GLOBAL EXT1 EXT2 EXT4 REDUCE NEWOBJ NEWOBJ_EX INST OBJ BUILD
    PERSID BINPERSID""".split()  # noqa: SIM905
)


def _make(function: Any, arguments: Any) -> Any:
    """What takes the place of `function(*arguments)`; only a `Maker`, which is ours, is called."""
    if not isinstance(arguments, tuple):
        raise PickleError("a call has no arguments")
    if isinstance(function, Maker):
        return function.call(*arguments)
    if not isinstance(function, Inert):
        raise PickleError(f"a {type(function).__name__} is called")
    if function.args is None:
        return Inert(function.module, function.name, arguments)
    return Inert("", "result of a call, called", (function, arguments))


def _set_items(target: Any, values: list[Any]) -> None:
    if isinstance(target, Inert):
        target = target.items
    if not isinstance(target, dict):
        raise PickleError(f"a {type(target).__name__} is given items")
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[_harmless_key(key)] = value


def _harmless_key(key: Any) -> Any:
    """`key`, if its hash cannot be chosen so that a dict takes quadratic time; else a record in its place."""
    # Hashes of text are seeded. An integer below Python's modulus 2⁶¹ − 1 is its own hash (−1 alone has that of −2).
    if key is None or isinstance(key, str | bytes) or (isinstance(key, int) and abs(key) < 1 << 60):
        return key
    return Inert("", type(key).__name__, (key,))


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, Inert):
        target = target.elements
    if not isinstance(target, list):
        raise PickleError(f"a {type(target).__name__} is given elements")
    target.extend(values)
