"""Names beside points, placed so that they cover neither points nor each other."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import BboxBase
from numpy.typing import NDArray

from evaclip.report.theme import PALETTE

_SIZE = 8.0
_DISTANCES = (7.0, 14.0, 24.0, 36.0, 50.0)
_DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
_ALIGN = {1: "left", 0: "center", -1: "right"}
Point = tuple[float, float]
Numbers = NDArray[np.float64]


def place_labels(axes: Axes, anchors: Mapping[str, Sequence[Point]], obstacles: Iterable[Point]) -> None:
    """Writes each name beside one of its points.

    Args:
        axes: with its final limits.
        anchors: for each name the points it may stand beside, the best first.
        obstacles: points that shall stay visible.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles where the axes are
    scale = figure.dpi / 72
    taken = [_box(axes.transData.transform(point), (5 * scale, 5 * scale), (0, 0)) for point in obstacles]
    for name, points in anchors.items():
        size = (0.62 * _SIZE * len(name) * scale, 1.3 * _SIZE * scale)
        places = [
            (point, (distance * direction[0], distance * direction[1]))
            for distance, direction, point in product(_DISTANCES, _DIRECTIONS, points)
        ]
        boxes = np.array([_box(axes.transData.transform(p) + scale * np.array(o), size, o) for p, o in places])
        best = int(np.argmin(_costs(boxes, np.array(taken), axes.bbox)))
        taken.append(boxes[best])
        _write(axes, name, *places[best])


def _box(place: Numbers, size: Point, direction: Point) -> Numbers:
    """Left, bottom, right and top of a box of the given size that lies in that direction of a place."""
    corner = place + np.array(size) * (np.sign(direction) - 1) / 2
    return np.concatenate([corner, corner + size])


def _costs(boxes: Numbers, taken: Numbers, inside: BboxBase) -> Numbers:
    """How bad each box is: outside of the axes is worst, then what it covers; the first of equals is nearest."""
    outside = (boxes[:, :2] < inside.min).any(1) | (boxes[:, 2:] > inside.max).any(1)
    apart = (boxes[:, None, :2] >= taken[None, :, 2:]).any(2) | (boxes[:, None, 2:] <= taken[None, :, :2]).any(2)
    costs: Numbers = 1e3 * outside + (~apart).sum(1)
    return costs


def _write(axes: Axes, name: str, point: Point, offset: Point) -> None:
    far = max(map(abs, offset)) > _DISTANCES[1]
    axes.annotate(
        name,
        point,
        xytext=offset,
        textcoords="offset points",
        ha=_ALIGN[_sign(offset[0])],
        va={1: "bottom", 0: "center", -1: "top"}[_sign(offset[1])],
        fontsize=_SIZE,
        arrowprops={"arrowstyle": "-", "color": PALETTE.muted, "linewidth": 0.6} if far else None,
        zorder=5,
    )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
