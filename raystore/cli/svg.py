"""Curves as an SVG picture: one line for each name, axes with round numbers. No library, so that it can go anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#06c", "#c50", "#283", "#a0a", "#777", "#b80")
WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 580, 40, 260  #: of the area with the lines
DIGITS = 6  #: of a number at an axis

Points = Sequence[tuple[float, float]]


def ticks(least: float, most: float, count: int = 4) -> list[float]:
    """Round numbers that cover a range."""
    if most <= least:
        least, most = least - 0.5, most + 0.5
    rough = (most - least) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def draw(curves: Mapping[str, Points], *, title: str, below: str) -> str:
    """The picture of curves; points of one curve are in the order of their first coordinate."""
    points = [point for curve in curves.values() for point in curve] or [(0.0, 0.0)]
    rows = ticks(min(y for _, y in points), max(y for _, y in points))
    columns = ticks(min(x for x, _ in points), max(x for x, _ in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (RIGHT - LEFT) * (x - columns[0]) / (columns[-1] - columns[0])
        return across, BOTTOM - (BOTTOM - TOP) * (y - rows[0]) / (rows[-1] - rows[0])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for y in rows:
        height = at(columns[0], y)[1]
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 10}" y="{height + 4:.1f}" text-anchor="end">{y:.{DIGITS}g}</text>')
    for x in columns:
        parts.append(f'<text x="{at(x, rows[0])[0]:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{x:.{DIGITS}g}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) // 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(below)}</text>')
    parts.append(f'<text x="{LEFT}" y="24">{escape(title)}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = " ".join(f"{across:.1f},{height:.1f}" for across, height in (at(x, y) for x, y in curve))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{RIGHT}" y="{24 + 16 * number}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>\n"])
