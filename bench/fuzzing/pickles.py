"""Pickles taken apart into instructions and put together otherwise."""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from itertools import pairwise
from random import Random

from fuzzing.mutations import NAMES, choose_integer, mutate_bytes

Instruction = bytes
_GLOBALS = (
    *("os system", "posix system", "builtins eval", "builtins exec", "builtins __import__", "subprocess Popen"),
    *("torch load", "torch._utils _rebuild_nested_tensor", "torch._utils _rebuild_sparse_tensor", "torch FloatStorage"),
    *("torch LongStorage", "torch HalfStorage", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *("collections OrderedDict", "collections defaultdict", "collections deque", "numpy dtype", "numpy ndarray"),
    *("numpy.core.multiarray _reconstruct", "torch.storage _load_from_bytes", "pickle loads", "_codecs encode"),
    *("torch._tensor _rebuild_from_type_v2", "builtins list", "builtins bytearray", "torch Size", "functools partial"),
    *("argparse Namespace", "torch.nn.modules.container Sequential", "omegaconf.dictconfig DictConfig", " ", "a.b c.d"),
)
_COMMAND = "touch canary"


def split_pickle(content: bytes) -> tuple[list[Instruction], bytes]:
    """The instructions of the first pickle in `content`, and what follows it."""
    starts = [position for _, _, position in pickletools.genops(content) if position is not None]
    end = starts[-1] + 1
    bounds = [*starts, end]
    return [content[a:b] for a, b in pairwise(bounds)], content[end:]


def mutate_pickle(content: bytes, rng: Random) -> tuple[bytes, str]:
    """The first pickle in `content` with one to three mutations, and their names; what follows it stays."""
    instructions, rest = split_pickle(content)
    # A frame's length would tell of each change.
    instructions = [each for each in instructions if each[:1] != b"\x95"]
    names = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(_MUTATIONS))
        names.append(name)
        instructions = _MUTATIONS[name](instructions, rng)
    return b"".join(instructions) + rest, " + ".join(names)


def _any(instructions: list[Instruction], rng: Random) -> int:
    return rng.randrange(len(instructions)) if instructions else 0


def _swap(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    one, two = _any(instructions, rng), _any(instructions, rng)
    if rng.random() < 0.5:
        two = min(one + 1, len(instructions) - 1)
    if instructions:
        instructions[one], instructions[two] = instructions[two], instructions[one]
    return instructions


def _double(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    one = _any(instructions, rng)
    length = rng.choice((1, 1, 4, 30))
    return [*instructions[: one + length], *instructions[one:]]


def _remove(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    one = _any(instructions, rng)
    return [*instructions[:one], *instructions[one + rng.choice((1, 1, 3)) :]]


def _insert(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    codes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes if opcode.arg is None]
    return _put(instructions, rng, rng.choice(codes))


def _put(instructions: list[Instruction], rng: Random, new: bytes) -> list[Instruction]:
    one = _any(instructions, rng)
    return [*instructions[:one], new, *instructions[one:]]


def _call(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    """Code that leaves a trace if it is run, in one of the ways in which a pickle can have code run."""
    command = b"X" + struct.pack("<I", len(_COMMAND)) + _COMMAND.encode()
    new = rng.choice((
        b"cos\nsystem\n" + command + b"\x85R0",
        b"(" + command + b"ios\nsystem\n0",
        b"(cos\nsystem\n" + command + b"o0",
        b"cbuiltins\neval\nX\x22\x00\x00\x00__import__('os').system('touch c')\x85R0",
        b"cos\nsystem\n" + command + b"\x85\x810",
    ))  # fmt: skip
    return _put(instructions, rng, new)


def _other_global(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    places = [place for place, each in enumerate(instructions) if each[:1] in b"c\x93"]
    new = b"c" + rng.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"
    if not places:
        return _put(instructions, rng, new)
    instructions[rng.choice(places)] = new
    return instructions


def _length(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    size = choose_integer(rng)
    return _put(instructions, rng, rng.choice((
        b"X" + struct.pack("<I", size % 2**32),
        b"B" + struct.pack("<I", size % 2**32),
        b"\x8d" + struct.pack("<Q", size % 2**64),
        b"\x8e" + struct.pack("<Q", size % 2**64),
        b"\x96" + struct.pack("<Q", size % 2**64),
        b"\x8b" + struct.pack("<I", size % 2**32),
        b"\x95" + struct.pack("<Q", size % 2**64),
        b"I" + b"9" * 6_000 + b"\n",
        b"L" + b"9" * 6_000 + b"L\n",
        b"\x8a\xff" + b"\x7f" * 255,
    )))  # fmt: skip


def _memo(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    slot = choose_integer(rng) % 2**32
    return _put(instructions, rng, rng.choice((
        b"h" + bytes([slot % 256]), b"j" + struct.pack("<I", slot), b"q" + bytes([slot % 256]),
        b"r" + struct.pack("<I", slot), b"p-1\n", b"g1x\n", b"\x94",
    )))  # fmt: skip


def _number(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    places = [place for place, each in enumerate(instructions) if each[:1] in (b"K", b"M", b"J", b"\x8a")]
    if places:
        number = choose_integer(rng)
        raw = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
        instructions[rng.choice(places)] = b"\x8a" + bytes([len(raw)]) + raw
    return instructions


def _text(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    places = [place for place, each in enumerate(instructions) if each[:1] in (b"X", b"\x8c")]
    if places:
        raw = rng.choice(NAMES).encode("utf-8", "surrogatepass")
        instructions[rng.choice(places)] = b"X" + struct.pack("<I", len(raw)) + raw
    return instructions


def _deep(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    depth = rng.choice((60, 2_000, 200_000))
    return _put(instructions, rng, rng.choice((
        b"(" * depth, b"]" * depth + b"a" * (depth - 1), b"N" + b"\x85" * depth, b"}" * depth,
        b"]\x94" + b"2a" * depth, b"2" * depth,
        # A tuple that holds itself twice, again and again.
        b"N" + b"2\x86" * 64,
    )))  # fmt: skip


def _itself(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    return _put(
        instructions, rng, rng.choice((b"]q\x00h\x00a", b"}q\x00X\x01\x00\x00\x00xh\x00s", b"]q\x01(h\x01h\x01e"))
    )


def _protocol(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    return [b"\x80" + bytes([rng.choice((0, 1, 3, 5, 6, 255))]), *instructions[1:]]


def _bytes(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    return [mutate_bytes(b"".join(instructions), rng)[0]]


def _end(instructions: list[Instruction], rng: Random) -> list[Instruction]:
    return _put(instructions, rng, b".")


_MUTATIONS: dict[str, Callable[[list[Instruction], Random], list[Instruction]]] = {
    "swapped": _swap,
    "doubled": _double,
    "removed": _remove,
    "inserted": _insert,
    "call": _call,
    "other global": _other_global,
    "length": _length,
    "memo": _memo,
    "number": _number,
    "text": _text,
    "deep": _deep,
    "contains itself": _itself,
    "protocol": _protocol,
    "bytes": _bytes,
    "ends early": _end,
}
