"""Mutations that know nothing of a format, and the numbers and names that parsers trip over."""

from __future__ import annotations

import copy
import json
import struct
import sys
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 100_000),
    *(2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63)),
)
FORGED = "forged by a name"
"""What hostile names try to print as an error of this program."""

NAMES = (
    "",
    ".",
    "..",
    "/",
    "../outside",
    "/tmp/outside",
    "a\\b",
    "a\nb",
    f"x\nerror: {FORGED}\nhint: run it as root",
    f"x\r\nerror: {FORGED}",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "nul\0nul",
    "\u202egnp.exe",
    "\u2028line",
    "\ud800",
    "é" * 200,
    "x" * 70_000,
    "a" + ".a" * 3_000,
    "%s%n{0}{x!r}",
    "[bold red]markup[/]",
    "__class__",
    "stage0.rbr_dense.conv.weight",
    "None",
    "-rf",
)
_DEEP = 100_000
_DIGITS = 5_000


def choose_integer(rng: Random, near: int = 0) -> int:
    """A number that parsers trip over, or one beside `near`."""
    return rng.choice((*INTEGERS, near - 1, near + 1, near * 2, near // 2, -near))


def mutate_bytes(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A damaged copy of `content`, and what was done to it."""
    name = rng.choice(sorted(_BYTES))
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        content = _BYTES[name](content, rng)
    return content, name


def _place(content: bytes, rng: Random) -> int:
    # The beginning and the end of a file hold most of what a parser reads.
    areas = ((0, min(64, len(content))), (max(0, len(content) - 64), len(content)), (0, len(content)))
    first, behind = rng.choice(areas)
    return rng.randrange(first, behind) if behind > first else 0


def _flip(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, rng: Random) -> bytes:
    place, width = _place(content, rng), rng.choice((1, 2, 4, 8))
    number = choose_integer(rng) % (1 << 8 * width)
    order = rng.choice(("little", "big"))
    return content[:place] + number.to_bytes(width, "big" if order == "big" else "little") + content[place + width :]


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _remove(content: bytes, rng: Random) -> bytes:
    place = _place(content, rng)
    return content[:place] + content[place + rng.choice((1, 2, 4, 16, 512)) :]


def _double(content: bytes, rng: Random) -> bytes:
    place, length = _place(content, rng), rng.choice((1, 4, 64, 4096))
    return content[: place + length] + content[place:]


def _zero(content: bytes, rng: Random) -> bytes:
    place, length = _place(content, rng), rng.choice((1, 8, 512, 65536))
    end = min(len(content), place + length)
    return content[:place] + bytes(end - place) + content[end:]


def _append(content: bytes, rng: Random) -> bytes:
    return content + rng.randbytes(rng.choice((1, 16, 5_000)))


def _prepend(content: bytes, rng: Random) -> bytes:
    return rng.randbytes(rng.choice((1, 16, 5_000))) + content


_BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "flip a bit": _flip,
    "overwrite a number": _overwrite,
    "cut": _cut,
    "remove bytes": _remove,
    "double bytes": _double,
    "zero bytes": _zero,
    "append": _append,
    "prepend": _prepend,
}


def mutate_tree(tree: Any, rng: Random) -> tuple[Any, str]:
    """A copy of a tree of dicts and lists with one value changed, removed, doubled, renamed or nested."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return choose_value(rng), "another root"
    holder, key = rng.choice(places)
    name = rng.choice(("value", "value", "remove", "rename", "wrap", "swap"))
    if name == "value":
        holder[key] = choose_value(rng, holder[key])
    elif name == "remove":
        del holder[key]
    elif name == "rename" and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = holder.pop(key)
    elif name == "wrap":
        holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3))
    else:
        other, place = rng.choice(places)
        try:
            holder[key], other[place] = other[place], holder[key]
        except (LookupError, TypeError):
            holder[key] = None
    return tree, f"{name} at {str(key)[:30]!r}"


def _places(tree: Any) -> list[tuple[Any, Any]]:
    keys: Sequence[Any] = ()
    if isinstance(tree, dict):
        keys = list(tree)
    elif isinstance(tree, list):
        # Samples of a record are long lists of numbers.
        keys = range(min(len(tree), 4))
    return [place for key in keys for place in ((tree, key), *_places(tree[key]))]


def choose_value(rng: Random, near: Any = None) -> Any:
    """A value of any type of JSON, some of them huge or deep."""
    number = near if isinstance(near, int) else 0
    return rng.choice((
        lambda: choose_integer(rng, number),
        lambda: choose_integer(rng, number),
        lambda: rng.choice((0.5, -0.0, 1e308, -1e308, 1e-320, float("inf"), float("nan"), float("-inf"))),
        lambda: rng.choice(NAMES),
        lambda: rng.choice((None, True, False)),
        lambda: rng.choice(([], {}, [[]], [None], {"": None})),
        lambda: 10 ** rng.choice((30, 400, _DIGITS)),
        lambda: [0] * rng.choice((1, 3, 1_000)),
        lambda: str(near),
    ))()  # fmt: skip


def dumps(value: object, ensure_ascii: bool = True) -> str:
    """JSON with integers of any length; the limit of this process, and of the cases forked from it, stays."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    finally:
        sys.set_int_max_str_digits(limit)


def write_json(tree: Any, rng: Random) -> bytes:
    """A tree as JSON, with NaN, Infinity and lone surrogates as Python's parser takes them."""
    text = dumps(tree, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def mutate_text(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Mutations of a text in JSON or TOML that no tree can express."""
    name = rng.choice(("deep list", "deep table", "digits", "double", "bom", "utf-16", "invalid", "empty", "bytes"))
    place = content.find(b":" if b":" in content else b"=") + 1
    insert = {
        "deep list": b"[" * _DEEP,
        "deep table": b'{"a":' * _DEEP,
        "digits": b"1" * _DIGITS,
        "invalid": b"\xff\xfe\x80",
    }
    if name in insert:
        return content[:place] + insert[name] + content[place:], name
    if name == "double":
        return content + content, name
    if name == "bom":
        return b"\xef\xbb\xbf" + content, name
    if name == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16"), name
    if name == "empty":
        return b"", name
    return mutate_bytes(content, rng)


def overwrite_field(content: bytes, layout: str, offset: int, rng: Random) -> bytes:
    """`content` with the number at `offset` replaced; `layout` is that of `struct`."""
    size = struct.calcsize(layout)
    if offset + size > len(content):
        return content
    (found,) = struct.unpack_from(layout, content, offset)
    number = choose_integer(rng, int(found)) % (1 << 8 * size)
    unsigned = layout[0] + layout[1].upper()
    return content[:offset] + struct.pack(unsigned, number) + content[offset + size :]
