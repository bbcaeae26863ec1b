"""The fast path from a JPEG file to prepared pixels: libjpeg-turbo through simplejpeg, torch's resize of uint8.

Decoded pixels are those of Pillow; resized ones are within 2 of 255 of Pillow's, since torch rounds its filter's
weights otherwise.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

# The EXIF tag of the orientation.
_ORIENTATION = 0x0112
_TURNS = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


@cache
def find_simplejpeg() -> ModuleType | None:
    """The module `simplejpeg`, or None if it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    module: ModuleType = simplejpeg
    return module


def decode_jpeg(data: bytes, header: Image.Image) -> NDArray[np.uint8] | None:
    """The pixels (H, W, 3 or 1) of a JPEG file, turned as its EXIF orientation says.

    None if Pillow must decode it: simplejpeg is not installed, or the file is CMYK, damaged or otherwise unusual.

    Args:
        data: the file.
        header: the same file as Pillow opened it, not yet decoded.
    """
    library = find_simplejpeg()
    if library is None or header.format not in ("JPEG", "MPO") or header.mode not in ("RGB", "L"):
        return None
    try:
        pixels: NDArray[np.uint8] = library.decode_jpeg(data, "RGB" if header.mode == "RGB" else "GRAY")
        turn = _TURNS.get(header.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Damaged pixels or EXIF data: Pillow decides whether the file can still be decoded.
        return None
    if pixels.shape[:2] != (header.height, header.width):
        return None
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def resize_bilinear(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Pixels (H, W, C) resized with an antialiasing bilinear filter, as Pillow's, in bytes."""
    import torch

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
    result: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return result
