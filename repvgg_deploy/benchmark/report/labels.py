"""Names beside the points of a plot, where they hide neither points nor each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

_DISTANCES = (6.0, 11.0, 17.0, 24.0)
_DIRECTIONS = (-30, 30, 90, -90, 150, -150, 0, 180)
_POINT = 3.5


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]], **style: Any) -> None:
    """Write each (x, y, name) near its point; those that have to stand further off get a thin line to it.

    The limits and scales of `axes` are set before; `style` goes to the text. Distances are in points, 1/72 inch.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    # Only a drawn figure knows where its axes lie.
    canvas.draw()  # type: ignore[no-untyped-call]
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    reach = _POINT * figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in centres]
    inside = axes.get_window_extent(renderer)
    for x, y, name in points:
        for distance, direction in _places():
            angle = math.radians(direction)
            offset = (distance * math.cos(angle), distance * math.sin(angle))
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#888888", "shrinkB": 2} if distance > 12 else None
            text = axes.annotate(
                name, (x, y), offset, textcoords="offset points", va="center", arrowprops=line,
                ha="left" if offset[0] > 1 else "right" if offset[0] < -1 else "center", **style,
            )  # fmt: skip
            # The text alone: the line to the point may cross what it likes.
            text.update_positions(renderer)
            box = Bbox(super(type(text), text).get_window_extent(renderer).get_points())
            if not box.count_overlaps(taken) and inside.x0 < box.x0 and box.x1 < inside.x1:
                taken.append(box)
                break
            if (distance, direction) != (_DISTANCES[-1], _DIRECTIONS[-1]):
                text.remove()


def _places() -> Iterator[tuple[float, int]]:
    """Near places first, and of those the right ones."""
    for distance in _DISTANCES:
        for direction in _DIRECTIONS:
            yield distance, direction
