"""Synthetic labelled images: the data of the demo model, and the inputs if the user has no images.

An image is one figure (its class) of random colour, position, size, rotation and distortion before a background of
noise whose amplitude falls with the frequency as natural images' does, under uneven light, partly hidden, then
blurred and noisy. Source of the spectrum: Field, "Relations between the statistics of natural images and the
response properties of cortical cells", JOSA A 4, 1987 (amplitude ∝ 1/f).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from repvgg_deploy.errors import ImageError

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SUPERSAMPLING = 3
"""Samples per pixel and axis at which outlines are evaluated."""


def _radial(radius: Array, angle: Array, corners: int, inner: float) -> Mask:
    """A star whose outline runs straight from radius 1 at its `corners` tips to radius `inner` between them."""
    half = np.pi / corners
    turned = np.abs((angle + half) % (2 * half) - half)
    # The line from the tip (1, 0) to the notch at polar (inner, half), solved for the radius at angle `turned`.
    x, y = inner * np.cos(half), inner * np.sin(half)
    inside: Mask = radius * (y * np.cos(turned) + (1 - x) * np.sin(turned)) < y
    return inside


def _polygon(corners: int) -> Callable[[Array, Array], Mask]:
    return lambda x, y: _radial(np.hypot(x, y), np.arctan2(y, x), corners, np.cos(np.pi / corners))


def _spiral(x: Array, y: Array) -> Mask:
    radius = np.hypot(x, y)
    return ((2.5 * radius - np.arctan2(y, x) / (2 * np.pi)) % 1 < 0.45) & (radius < 1)


def _heart(x: Array, y: Array) -> Mask:
    # A square on its corner, and a disc on each of its two upper sides.
    x, y = np.abs(x), y + 0.12
    return (x + np.abs(y) < 0.82) | ((x - 0.41) ** 2 + (y - 0.41) ** 2 < 0.336)


def _bar(_: Array, y: Array) -> Mask:
    return np.abs(y) < 0.4


def _ellipse(x: Array, y: Array) -> Mask:
    return x**2 + y**2 < 1


def _cross(x: Array, y: Array) -> Mask:
    x, y = np.abs(x), np.abs(y)
    return (np.minimum(x, y) < 0.28) & (np.maximum(x, y) < 0.95)


# Each figure fills about the unit circle. The names are sorted, so that an image folder gives the same indices.
_FIGURES: dict[str, Callable[[Array, Array], Mask]] = {
    "checkerboard": lambda x, y: ((np.floor(2.5 * x) + np.floor(2.5 * y)) % 2 == 0) & (np.hypot(x, y) < 1),
    "crescent": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x - 0.5, y) > 0.8),
    "cross": _cross,
    "disc": lambda x, y: np.hypot(x, y) < 0.9,
    "heart": _heart,
    "pentagon": _polygon(5),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) < 0.22,
    "spiral": _spiral,
    "square": _polygon(4),
    "star": lambda x, y: _radial(np.hypot(x, y), np.arctan2(y, x), 5, 0.42),
    "stripes": lambda x, y: ((2.2 * x) % 1 < 0.5) & (np.hypot(x, y) < 1),
    "triangle": _polygon(3),
}

CLASS_NAMES: tuple[str, ...] = tuple(_FIGURES)
"""What a label means: the figure in the image."""


def draw_image(label: int, seed: int, size: int = 64) -> Image.Image:
    """The image of figure `label` that `seed` stands for: RGB, `size` x `size` pixels.

    It depends on nothing but the three arguments. A seed gives the same scene at any size, with other noise.

    Raises:
        ImageError: `label` is not a class, `seed` is negative, or `size` is below 8.
    """
    if not 0 <= label < len(CLASS_NAMES):
        raise ImageError(f"there is no class {label}", f"labels go from 0 to {len(CLASS_NAMES) - 1}")
    if seed < 0 or size < 8:
        raise ImageError(
            f"no image can be drawn with seed {seed} and size {size}", "the seed is at least 0, the size at least 8"
        )
    scene, pixels = (np.random.Generator(np.random.PCG64([part, label, seed])) for part in (0, 1))
    grid = _grid(size)
    ground = (scene.uniform(0.3, 0.7) + scene.uniform(-0.2, 0.2, 3)).astype(np.float32)
    canvas = ground + _texture(scene, pixels, size, 0.03, 0.15)
    centre = scene.uniform(-0.3, 0.3, 2)
    radius = scene.uniform(0.48, 0.82)
    surface = _texture(scene, pixels, size, 0.0, 0.1)
    figure = _coverage(_FIGURES[CLASS_NAMES[label]], *_placed(scene, grid, centre, radius))
    canvas = _blend(canvas, figure, _paint(scene, ground) + surface)
    for _ in range(scene.integers(0, 3)):
        cover = _coverage(*_occluder(scene, grid, centre, radius))
        canvas = _blend(canvas, cover, _paint(scene, ground) + surface)
    canvas = canvas * _light(scene, size)
    return _photograph(canvas, scene, pixels, size)


def draw_images(count: int, seed: int, size: int = 64) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """`count` images, uint8 (count, size, size, 3), and their labels, int64 (count,); the classes take turns.

    Sets of different seeds below 2³¹ have no image in common, and a longer set begins with the shorter one of its seed.

    Raises:
        ImageError: as `draw_image`.
    """
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.arange(count, dtype=np.int64) % len(CLASS_NAMES)
    for index, label in enumerate(labels):
        images[index] = np.asarray(draw_image(int(label), image_seed(seed, index), size))
    return images, labels


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` in the set `seed`."""
    return (seed << 32) + index


def write_image_folder(folder: Path, count: int, seed: int, size: int = 64) -> None:
    """Writes the images of `draw_images` as `folder/<class>/<index>.png`, all of them or none.

    Raises:
        ImageError: `folder` exists and is not an empty folder, or as `draw_image`.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ImageError(f"{folder} exists and is not an empty folder", "name another one, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in CLASS_NAMES:
            (partial / name).mkdir()
        for index in range(count):
            label = index % len(CLASS_NAMES)
            image = draw_image(label, image_seed(seed, index), size)
            image.save(partial / CLASS_NAMES[label] / f"{index:06d}.png")
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _grid(size: int) -> tuple[Array, Array]:
    """The x (1, n) and y (n, 1) of the supersampled pixels' centres; the image goes from −1 to 1."""
    count = size * SUPERSAMPLING
    axis = ((np.arange(count, dtype=np.float32) + 0.5) * (2 / count) - 1).astype(np.float32)
    return axis[None, :], axis[:, None]


def _placed(
    scene: np.random.Generator, grid: tuple[Array, Array], centre: npt.NDArray[np.float64], radius: float
) -> tuple[Array, Array]:
    """The grid in the coordinates of a figure that is turned, stretched, sheared and perhaps mirrored."""
    angle, stretch, shear = scene.uniform(0, 2 * np.pi), np.exp(scene.uniform(-0.25, 0.25)), scene.uniform(-0.25, 0.25)
    mirror = scene.choice((-1.0, 1.0))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = np.array([[mirror * stretch, shear], [0.0, 1 / stretch]]) @ turn / radius
    x, y = grid[0] - np.float32(centre[0]), grid[1] - np.float32(centre[1])
    (a, b), (c, d) = matrix.astype(np.float32)
    return a * x + b * y, c * x + d * y


def _occluder(
    scene: np.random.Generator, grid: tuple[Array, Array], centre: npt.NDArray[np.float64], radius: float
) -> tuple[Callable[[Array, Array], Mask], Array, Array]:
    """Something that hides a part of the figure: an ellipse near its rim, or a bar across the image."""
    direction, distance = scene.uniform(0, 2 * np.pi), scene.uniform(0.5, 1.3) * radius
    at = centre + distance * np.array([np.cos(direction), np.sin(direction)])
    extent = scene.uniform(0.06, 0.26)
    is_bar = bool(scene.random() < 0.4)
    x, y = _placed(scene, grid, at, extent)
    return _bar if is_bar else _ellipse, x, y


def _coverage(figure: Callable[[Array, Array], Mask], x: Array, y: Array) -> Array:
    """The share of each pixel that the figure covers, (size, size, 1)."""
    size = x.shape[0] // SUPERSAMPLING
    samples = figure(x, y).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    share: Array = samples.mean((1, 3), dtype=np.float32)
    return share[..., None]


def _blend(canvas: Array, coverage: Array, paint: Array) -> Array:
    return canvas + coverage * (paint - canvas)


def _paint(scene: np.random.Generator, ground: Array) -> Array:
    """A colour at a random distance from that of the ground, in a random direction."""
    direction = scene.standard_normal(3)
    step = scene.uniform(0.32, 0.62) * direction / np.linalg.norm(direction)
    return np.clip(ground + step, 0.0, 1.0).astype(np.float32)


def _texture(scene: np.random.Generator, pixels: np.random.Generator, size: int, low: float, high: float) -> Array:
    """Brightness and one direction of colour as two noise fields, (size, size, 3), of random strength and slope."""
    slope, strength = scene.uniform(0.8, 1.7), scene.uniform(low, high)
    hue = scene.standard_normal(3)
    hue = 0.6 * hue / np.linalg.norm(hue)
    fields = _noise(pixels, size, slope)
    weights = strength * np.stack([np.ones(3), hue])
    colours: Array = np.einsum("fhw,fc->hwc", fields, weights.astype(np.float32))
    return colours


def _noise(pixels: np.random.Generator, size: int, slope: float) -> Array:
    """Two fields of Gaussian noise with amplitude ∝ 1/f^slope, (2, size, size), each of mean 0 and deviation 1."""
    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    frequency = np.hypot(rows, columns) * size
    # So the constant part is 0, and a texture leaves the mean of what it is added to.
    frequency[0, 0] = np.inf
    real, imaginary = pixels.standard_normal((2, 2, *frequency.shape)) * frequency**-slope
    fields = np.fft.irfft2(real + 1j * imaginary, s=(size, size))
    scaled: Array = (fields / fields.std((1, 2), keepdims=True)).astype(np.float32)
    return scaled


def _light(scene: np.random.Generator, size: int) -> Array:
    """The brightness of the light, falling off linearly in a random direction, (size, size, 1)."""
    direction, fall, level = scene.uniform(0, 2 * np.pi), scene.uniform(0, 0.4), scene.uniform(0.75, 1.2)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    slope = np.float32(np.cos(direction)) * axis[None, :] + np.float32(np.sin(direction)) * axis[:, None]
    return (np.float32(level) * (1 + np.float32(fall) * slope))[..., None].astype(np.float32)


def _photograph(canvas: Array, scene: np.random.Generator, pixels: np.random.Generator, size: int) -> Image.Image:
    """The scene as a camera sees it: blurred, with sensor noise, in 8 bits."""
    blur, noise = scene.uniform(0.0, 1.1) * size / 64, scene.uniform(0.01, 0.06)
    sharp = Image.fromarray((np.clip(canvas, 0.0, 1.0) * 255 + 0.5).astype(np.uint8))
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(blur)), np.float32)
    grain = pixels.standard_normal((size, size, 3), dtype=np.float32) * np.float32(255 * noise)
    return Image.fromarray(np.clip(blurred + grain + 0.5, 0, 255).astype(np.uint8))
