"""Noise pictures, and files, archives and folders of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg_deploy.artifacts import Preprocessing


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def square(size: int, resize: int | None = None) -> Preprocessing:
    return Preprocessing(height=size, width=size, resize=resize or size)


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 32)) -> bytes:
    """A JPEG file of smooth noise."""
    small = Image.fromarray(noise(5, 4, seed=seed))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """An uncompressed archive of `members`, in their order."""
    path.write_bytes(tar_bytes(members))
    return path


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()
