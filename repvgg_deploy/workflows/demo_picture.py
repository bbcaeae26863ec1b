"""A picture of what the demo model sees: one image of each class, with what the model takes it for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from repvgg_deploy.artifacts import Array
from repvgg_deploy.files.staging import stage_files
from repvgg_deploy.images.synthetic import CLASS_NAMES, draw_images
from repvgg_deploy.runtime.model import Model, softmax

if TYPE_CHECKING:
    from PIL.Image import Image

_COLUMNS, _CELL, _CAPTION, _MARGIN = 4, 192, 44, 12
_RIGHT, _WRONG = "#007A3D", "#B00020"


def write_predictions(model: Model, path: Path, seed: int) -> None:
    """Write a PNG with one synthetic image per class, and below each its class and the model's answer.

    Raises:
        DeployError: the file cannot be written.
    """
    pixels, labels = draw_images(len(CLASS_NAMES), seed=seed, size=model.preprocessing.height)
    outputs = model.run_pixels(pixels)
    scores = softmax(next(iter(outputs.values())))
    with stage_files(path.absolute().parent) as staging:
        _arrange(pixels, labels, scores).save(staging / path.name)


def _arrange(pixels: Array, labels: Array, scores: Array) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(pixels) // _COLUMNS)
    step_x, step_y = _CELL + _MARGIN, _CELL + _CAPTION + _MARGIN
    page = Image.new("RGB", (_COLUMNS * step_x + _MARGIN, rows * step_y + _MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    for index, (image, label, row) in enumerate(zip(pixels, labels, scores, strict=True)):
        x, y = _MARGIN + index % _COLUMNS * step_x, _MARGIN + index // _COLUMNS * step_y
        page.paste(Image.fromarray(image).resize((_CELL, _CELL), Image.Resampling.NEAREST), (x, y))
        best = int(row.argmax())
        draw.text((x, y + _CELL + 3), CLASS_NAMES[label], "#333333", font)
        answer = f"{CLASS_NAMES[best]}, {row[best]:.0%}"
        draw.text((x, y + _CELL + 22), answer, _RIGHT if best == label else _WRONG, font)
    return page
