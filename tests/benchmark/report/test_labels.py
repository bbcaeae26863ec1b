"""Names in a plot: each is there, beside its point, and none lies over another."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from repvgg_deploy.benchmark.report.labels import label_points


def test_names_of_crowded_points_do_not_overlap() -> None:
    generator = np.random.default_rng(0)
    points = [(x, y, f"net {n}") for n, (x, y) in enumerate(generator.normal(0, 1, (12, 2)) / 8)]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(-1, 1)
    axes.set_ylim(-1, 1)
    label_points(axes, points, fontsize=6.5)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert [text.get_text() for text in axes.texts] == [name for *_, name in points]
    boxes = []
    for (x, y, _), text in zip(points, axes.texts, strict=True):
        box = Text.get_window_extent(text, renderer)
        centre = axes.transData.transform((x, y))
        assert np.hypot(*(np.array(box.get_points()).mean(0) - centre)) < 60
        boxes.append(Bbox(box.get_points()))
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
