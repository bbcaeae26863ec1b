"""Mutated image files and tar archives, given to `predict` and `eval`."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from fuzzing.cases import Case, Format
from fuzzing.checkpoints import make_tensors
from fuzzing.graphs import whole_graph
from fuzzing.mutations import NAMES, choose_integer, mutate_bytes, overwrite_field

_SIZES = (0, 1, 2, 13_300, 65_535, 2**31 - 1, 2**32 - 1)


@cache
def whole_picture(form: str, mode: str = "RGB") -> bytes:
    """A picture of 40 × 32 smooth pixels."""
    noise = np.random.default_rng(5).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((40, 32), Image.Resampling.BICUBIC).convert("RGB")
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif.tobytes()} if form in ("JPEG", "PNG", "WEBP") else {}
    if form == "GIF":
        image.save(stream, form, save_all=True, append_images=[image.rotate(9), image.rotate(18)])
    elif form == "TIFF":
        image.save(stream, form, compression=None)
    else:
        image.save(stream, form, **more)
    return stream.getvalue()


def mutate_jpeg(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A JPEG file of which a segment is changed, dropped, doubled or moved."""
    segments, scan = _split_jpeg(content)
    kind = rng.choice(("length", "drop", "double", "swap", "marker", "size", "data", "insert"))
    place = rng.randrange(len(segments))
    marker, data = segments[place]
    if kind == "drop":
        del segments[place]
    elif kind == "double":
        segments[place:place] = [segments[place]] * rng.choice((1, 500))
    elif kind == "swap":
        other = rng.randrange(len(segments))
        segments[place], segments[other] = segments[other], segments[place]
    elif kind == "marker":
        segments[place] = (rng.randrange(256), data)
    elif kind == "size":
        for index, (each, found) in enumerate(segments):
            if each in (0xC0, 0xC2):
                sizes = struct.pack(">HH", *(rng.choice(_SIZES) % 65536 for _ in range(2)))
                segments[index] = (each, found[:1] + sizes + found[5:])
    elif kind == "insert":
        segments.insert(
            place, (rng.choice((0xE1, 0xE2, 0xED, 0xFE, 0xDD, 0xDA, 0xC4)), rng.randbytes(rng.choice((0, 6, 600))))
        )
    else:
        segments[place] = (marker, mutate_bytes(data, rng)[0])
    parts = [b"\xff\xd8"]
    for index, (each, found) in enumerate(segments):
        length = len(found) + 2
        if kind == "length" and index == place:
            length = choose_integer(rng, length)
        parts.append(bytes([0xFF, each]) + struct.pack(">H", length % 65536) + found)
    return b"".join(parts) + scan, kind


def _split_jpeg(content: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    segments, place = [], 2
    while content[place + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", content, place + 2)
        segments.append((content[place + 1], content[place + 4 : place + 2 + length]))
        place += 2 + length
    return segments, content[place:]


def mutate_png(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A PNG file of which a chunk is changed, dropped, doubled or moved; its CRCs are right, mostly."""
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    kind = rng.choice(("header", "header", "drop", "double", "swap", "insert", "data", "pixels", "length", "crc"))
    place = rng.randrange(len(chunks))
    name, data = chunks[place]
    if kind == "header":
        header = chunks[0][1]
        layout, offset = rng.choice(((">I", 0), (">I", 4), (">B", 8), (">B", 9), (">B", 10), (">B", 11), (">B", 12)))
        header = overwrite_field(header, layout, offset, rng)
        if rng.random() < 0.5:
            header = struct.pack(">II", *(rng.choice(_SIZES) for _ in range(2))) + header[8:]
        chunks[0] = (chunks[0][0], header)
    elif kind == "drop":
        del chunks[place]
    elif kind == "double":
        chunks[place:place] = [chunks[place]] * rng.choice((1, 500))
    elif kind == "swap":
        other = rng.randrange(len(chunks))
        chunks[place], chunks[other] = chunks[other], chunks[place]
    elif kind == "insert":
        chunks.insert(1, _png_chunk(rng))
    elif kind == "pixels":
        pixels = mutate_bytes(zlib.decompress(chunks[-2][1]), rng)[0]
        chunks[-2] = (b"IDAT", zlib.compress(rng.choice((pixels, pixels * 100, b""))))
    elif kind == "data":
        chunks[place] = (name, mutate_bytes(data, rng)[0])
    parts = [content[:8]]
    for index, (each, found) in enumerate(chunks):
        length, crc = len(found), zlib.crc32(each + found)
        if index == place:
            length, crc = (choose_integer(rng, length) if kind == "length" else length), (0 if kind == "crc" else crc)
        parts.append(struct.pack(">I", length % 2**32) + each + found + struct.pack(">I", crc))
    return b"".join(parts), kind


def _png_chunk(rng: Random) -> tuple[bytes, bytes]:
    bomb = zlib.compress(bytes(64 << 20))
    return rng.choice((
        (b"zTXt", b"key\0\0" + bomb), (b"iCCP", b"key\0\0" + bomb), (b"iTXt", b"key\0\1\0\0\0" + bomb),
        (b"acTL", struct.pack(">II", 2**31 - 1, 0)), (b"fcTL", rng.randbytes(26)), (b"PLTE", rng.randbytes(769)),
        (b"tRNS", rng.randbytes(300)), (b"eXIf", rng.randbytes(64)), (b"IHDR", rng.randbytes(13)), (b"gAMA", b""),
    ))  # fmt: skip


def mutate_tiff(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A TIFF file of which a tag is another one, or has another type, count or value."""
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    kind = rng.choice(("tag", "type", "count", "value", "value", "size", "compression", "entries", "next", "bytes"))
    entry = start + 2 + 12 * rng.randrange(count)
    if kind == "tag":
        tag = rng.choice((256, 257, 258, 259, 262, 273, 277, 278, 279, 320, 322, 324, 325, 330, 338, 339, 34665, 700))
        return content[:entry] + struct.pack("<H", tag) + content[entry + 2 :], kind
    if kind == "type":
        return overwrite_field(content, "<H", entry + 2, rng), kind
    if kind == "count":
        return overwrite_field(content, "<I", entry + 4, rng), kind
    if kind == "value":
        return overwrite_field(content, "<I", entry + 8, rng), kind
    if kind in ("size", "compression"):
        wanted = {"size": (256, 257), "compression": (259, 262, 258, 277, 339)}[kind]
        for number in range(count):
            place = start + 2 + 12 * number
            if struct.unpack_from("<H", content, place)[0] in wanted:
                value = (
                    rng.choice(_SIZES) if kind == "size" else rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 32, 32773, 34712))
                )
                content = content[: place + 8] + struct.pack("<I", value) + content[place + 12 :]
        return content, kind
    if kind == "entries":
        return overwrite_field(content, "<H", start, rng), kind
    if kind == "next":
        place = start + 2 + 12 * count
        return content[:place] + struct.pack("<I", rng.choice((start, 8, 2**31))) + content[place + 4 :], kind
    return mutate_bytes(content, rng)


def mutate_fields(content: bytes, rng: Random, layouts: tuple[tuple[str, int], ...]) -> tuple[bytes, str]:
    """A file of which a number of its header is another one."""
    if rng.random() < 0.4:
        changed, name = mutate_bytes(content, rng)
        return changed, f"bytes: {name}"
    for _ in range(rng.choice((1, 1, 2))):
        layout, offset = rng.choice(layouts)
        content = overwrite_field(content, layout, offset, rng)
    return content, "header"


_BMP = (
    ("<I", 2),
    ("<I", 10),
    ("<I", 14),
    ("<i", 18),
    ("<i", 22),
    ("<H", 26),
    ("<H", 28),
    ("<I", 30),
    ("<I", 34),
    ("<I", 46),
)
_GIF = (("<H", 6), ("<H", 8), ("<B", 10), ("<B", 11), ("<B", 12), ("<B", 13), ("<H", 785), ("<H", 790), ("<B", 800))
_WEBP = (("<I", 4), ("<I", 16), ("<B", 20), ("<H", 24), ("<H", 26), ("<I", 12), ("<I", 30), ("<H", 40))
_FORMS: dict[str, tuple[Callable[[bytes, Random], tuple[bytes, str]], tuple[str, ...]]] = {
    "JPEG": (mutate_jpeg, ("RGB", "L", "CMYK")),
    "PNG": (mutate_png, ("RGB", "L", "RGBA", "P", "I;16")),
    "WEBP": (lambda content, rng: mutate_fields(content, rng, _WEBP), ("RGB", "RGBA")),
    "TIFF": (mutate_tiff, ("RGB", "L", "I;16", "F", "CMYK")),
    "BMP": (lambda content, rng: mutate_fields(content, rng, _BMP), ("RGB", "P", "L")),
    "GIF": (lambda content, rng: mutate_fields(content, rng, _GIF), ("P", "L")),
}
_OTHERS: Mapping[str, bytes] = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile showpage\n",
    "PPM": b"P6 4 4 255\n" + bytes(48),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/x"/></svg>',
    "FITS": b"SIMPLE  =                    T" + bytes(3000),
    "ICO": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(64),
}


def _mutated(form: str, rng: Random) -> tuple[bytes, str]:
    mutate, modes = _FORMS[form]
    mode = rng.choice(modes)
    if rng.random() < 0.25:
        content, name = mutate_bytes(whole_picture(form, mode), rng)
        return content, f"{mode}, bytes: {name}"
    content, name = mutate(whole_picture(form, mode), rng)
    return content, f"{mode}, {name}"


def _make(form: str, rng: Random) -> Case:
    content, name = _mutated(form, rng)
    files = {"net.onnx": whole_graph(), "data/a/whole.png": whole_picture("PNG"), "data/b/x.jpg": content}
    if rng.random() < 0.1:
        other = rng.choice(sorted(_OTHERS))
        files["data/c/y.jpg"], name = _OTHERS[other], f"{name}; {other} as well"
    decoder = ("--decoder", rng.choice(("auto", "pillow")))
    if rng.random() < 0.7:
        arguments = ("predict", "IN/net.onnx", "IN/data", "-o", "OUT/rows.jsonl", "--logits", *decoder)
        return Case(arguments, files, name, lambda _, out: _check_rows(out, len(files) - 1))
    strict = rng.choice(((), ("--strict",)))
    return Case(("eval", "IN/net.onnx", "--data", "IN/data", *decoder, *strict), files, name)


def _check_rows(out: Path, count: int) -> str | None:
    """One row per image; the whole one as it is alone, and each with an error or with five numbers."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(rows) != count:
        return f"{len(rows)} rows for {count} images"
    whole = next(row for row in rows if row["path"].endswith("whole.png"))
    if "error" in whole or np.abs(np.asarray(whole["logits"]) - _expected_logits()).max() > 1e-4:
        return "the whole image beside it has another result"
    odd = [row for row in rows if "error" not in row and not np.isfinite(row["logits"]).all()]
    return f"logits that are no numbers for {odd[0]['path']}" if odd else None


@cache
def _expected_logits() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The logits of the whole picture, prepared with Pillow and computed in float64 from the graph's weights."""
    image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(whole_picture("PNG"))))
    short = min(image.size)
    size = (32, int(32 * image.height / short)) if image.width <= image.height else (int(32 * image.width / short), 32)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    pixels = np.asarray(image.crop((left, top, left + 32, top + 32)), np.float64)
    value = torch.from_numpy((pixels / 255 - 0.5) / 0.2).permute(2, 0, 1)[None]
    tensors = {name: tensor.double() for name, tensor in make_tensors().items()}
    conv, bias = tensors["stage0.rbr_dense.conv.weight"], tensors["stage0.rbr_1x1.bn.bias"]
    pooled = functional.conv2d(value, conv, bias, 2, 1).relu().mean((2, 3))
    logits = functional.linear(pooled, tensors["linear.weight"][:, :4], tensors["linear.bias"])
    return np.asarray(logits[0].numpy())


def _tar(rng: Random) -> Case:
    members = {f"{'ab'[n % 2]}/{n}.png": whole_picture("PNG") for n in range(4)}
    if rng.random() < 0.3:
        members |= {f"{n}.cls": str(n % 2).encode() for n in range(4)}
    content, name = mutate_tar(members, rng)
    files = {"net.onnx": whole_graph(), "data/shard.tar": content}
    if rng.random() < 0.6:
        return Case(("predict", "IN/net.onnx", "IN/data/shard.tar", "-o", "OUT/rows.jsonl"), files, name)
    return Case(("eval", "IN/net.onnx", "--data", "IN/data/shard.tar"), files, name)


def mutate_tar(members: Mapping[str, bytes], rng: Random) -> tuple[bytes, str]:
    """An archive of which one header is changed, with its checksum, or any byte."""
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w:", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    ) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(rng.choice((name, name, name, rng.choice(NAMES)[:80] + name)))
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):
                continue
    content = stream.getvalue()
    kind = rng.choice(("header", "header", "header", "pax", "nested", "bytes", "cut"))
    if kind == "header":
        return _change_header(content, 0, rng), kind
    if kind == "pax":
        size = rng.choice(
            (b"18 size=9999999999\n", b"11 path=\xff\n", b"9" * 40 + b" x=y\n", b"28 GNU.sparse.map=0,9999999\n")
        )
        info = tarfile.TarInfo("pax")
        info.type, info.size = rng.choice((b"x", b"g", b"L", b"K", b"S")), len(size)
        return info.tobuf(tarfile.USTAR_FORMAT) + size.ljust(512, b"\0") + content, kind
    if kind == "nested":
        info = tarfile.TarInfo("inner.tar")
        inner = mutate_bytes(content, rng)[0]
        info.size = rng.choice((len(inner), 1 << 32))
        return info.tobuf(tarfile.USTAR_FORMAT) + inner + bytes(-len(inner) % 512) + bytes(1024), kind
    if kind == "cut":
        return content[: rng.randrange(len(content))], kind
    return mutate_bytes(content, rng)


def _change_header(content: bytes, start: int, rng: Random) -> bytes:
    header = bytearray(content[start : start + 512])
    offset, length = rng.choice(((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    field = rng.choice((
        b"77777777777", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"", b"0", b"00000000001", rng.randbytes(length),
        bytes([rng.choice(b"0123456789gxLKSVDN")]), b"../../outside\nerror: x\x1b[31m",
    ))[:length]  # fmt: skip
    header[offset : offset + length] = field.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


def _maker(form: str) -> Callable[[Random], Case]:
    return lambda rng: _make(form, rng)


FORMATS = (
    *(Format(f"image, {form}", _maker(form), 2 if form in ("JPEG", "PNG") else 1) for form in _FORMS),
    Format("tar archive", _tar, 1),
)
