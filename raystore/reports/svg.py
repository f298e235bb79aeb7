"""Curves as SVG pictures: one line for each name, axes with round numbers. No library, so that they can go anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#06c", "#c50", "#283", "#a0a", "#777", "#b80")
WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 580, 40, 260  #: of the area with the lines
DIGITS = 6  #: of a number at an axis
LEAST = 1e-6  #: on a logarithmic axis

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes; points of one curve are in the order of their first coordinate.

    Attributes:
        curves: by name.
        title: above them.
        below: what the first coordinate is.
        is_logarithmic: whether its axis shows powers of ten.
    """

    curves: Mapping[str, Points]
    title: str
    below: str
    is_logarithmic: bool = False


def ticks(least: float, most: float, count: int = 4) -> list[float]:
    """Round numbers that cover a range."""
    if most <= least:
        least, most = least - 0.5, most + 0.5
    rough = (most - least) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def powers(least: float, most: float) -> list[float]:
    """Powers of ten that cover a range of logarithms."""
    first, last = math.floor(least + 1e-9), math.ceil(most - 1e-9)
    return [float(power) for power in range(first, max(last, first + 1) + 1)]


def draw(curves: Mapping[str, Points], *, title: str, below: str) -> str:
    """The picture of one chart."""
    return _picture(WIDTH, HEIGHT, _drawn(Chart(curves, title, below)))


def charts(made: Sequence[Chart], *, title: str) -> str:
    """One picture of several charts, two in a row."""
    parts = [f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>']
    for number, chart in enumerate(made):
        across, down = number % 2 * WIDTH, 30 + number // 2 * HEIGHT
        parts += [f'<g transform="translate({across} {down})">', *_drawn(chart), "</g>"]
    rows = (len(made) + 1) // 2
    return _picture(WIDTH * min(max(len(made), 1), 2), 30 + HEIGHT * rows, parts)


def _picture(width: int, height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    )
    return "".join([head, *parts, "</svg>\n"])


def _drawn(chart: Chart) -> list[str]:
    """The elements of a chart."""

    def place(x: float) -> float:
        return math.log10(max(x, LEAST)) if chart.is_logarithmic else x

    curves = {name: [(place(x), y) for x, y in curve] for name, curve in chart.curves.items()}
    points = [point for curve in curves.values() for point in curve] or [(0.0, 0.0)]
    rows = ticks(min(y for _, y in points), max(y for _, y in points))
    spaced = powers if chart.is_logarithmic else ticks
    columns = spaced(min(x for x, _ in points), max(x for x, _ in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (RIGHT - LEFT) * (x - columns[0]) / (columns[-1] - columns[0])
        return across, BOTTOM - (BOTTOM - TOP) * (y - rows[0]) / (rows[-1] - rows[0])

    parts = []
    for y in rows:
        height = at(columns[0], y)[1]
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 10}" y="{height + 4:.1f}" text-anchor="end">{y:.{DIGITS}g}</text>')
    for x in columns:
        label = f"{10.0**x if chart.is_logarithmic else x:.{DIGITS}g}"
        parts.append(f'<text x="{at(x, rows[0])[0]:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{label}</text>')
    middle = (LEFT + RIGHT) // 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.below)}</text>')
    parts.append(f'<text x="{LEFT}" y="24">{escape(chart.title)}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = " ".join(f"{across:.1f},{height:.1f}" for across, height in (at(x, y) for x, y in curve))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{RIGHT}" y="{24 + 16 * number}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
    return parts
