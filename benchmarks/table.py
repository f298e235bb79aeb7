"""Lines of the table, the goals they are held against, and rounds in which parties take turns.

Not here: what is measured (the files of rows).
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NOT_RUN = "not run"


@dataclass
class Goal:
    """A bound that a figure should keep."""

    bound: float
    at_most: bool
    unit: str = "x"

    def is_met(self, value: float) -> bool:
        """Whether the figure keeps the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g} {self.unit}"


def at_least(bound: float, unit: str = "x") -> Goal:
    """The figure should be so large."""
    return Goal(bound, at_most=False, unit=unit)


def at_most(bound: float, unit: str = "x") -> Goal:
    """The figure should be no larger."""
    return Goal(bound, at_most=True, unit=unit)


@dataclass
class Line:
    """One comparison of one row."""

    row: int
    name: str
    ours: str
    against: str
    ratio: float | None
    spread: tuple[float, float] | None
    goal: str
    met: bool | None
    did: str
    samples: dict[str, list[float]] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """The line as text."""
        if self.ratio is None:
            shown = NOT_RUN
        else:
            shown = f"{self.ratio:.3g}"
            if self.spread is not None:
                shown += f" ({self.spread[0]:.3g}-{self.spread[1]:.3g})"
        met = {True: "yes", False: "NO", None: "-"}[self.met]
        return [str(self.row), self.name, self.ours, self.against, shown, self.goal, met, self.did]


HEADER = ["row", "name", "ours", "against", "ratio (spread)", "goal", "met", "did"]


def markdown(lines: list[Line]) -> str:
    """All lines as a table."""
    rows = [HEADER, ["-"] * len(HEADER), *(line.cells() for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_json(lines: list[Line], about: Mapping[str, Any]) -> str:
    """All lines with their samples, and what is known of the run."""
    return json.dumps({"about": dict(about), "lines": [asdict(line) for line in lines]}, indent=1)


Measure = Callable[[], Awaitable[float]]


async def alternate(rounds: int, parties: Mapping[str, Measure | None], *, warm: bool = True) -> dict[str, list[float]]:
    """Let the parties take turns, so that a noisy minute hits all of them; None is a party that is not there.

    A first round warms up and does not count, unless there is only one.
    """
    warm = warm and rounds > 1
    present = {name: measure for name, measure in parties.items() if measure is not None}
    samples: dict[str, list[float]] = {name: [] for name in present}
    for number in range(rounds + warm):
        for name, measure in present.items():
            gc.collect()
            value = await measure()
            if number >= warm:
                samples[name].append(value)
    return samples


def figure(value: float, unit: str) -> str:
    """A value as a person reads it."""
    if abs(value) >= 1000:
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}"


def compare(
    row: int,
    name: str,
    samples: Mapping[str, list[float]],
    against: str,
    goal: Goal,
    *,
    unit: str,
    did: str,
    ours: str = "ours",
) -> Line:
    """Ours against another party: the ratio of each round, their median and their spread."""
    mine, theirs = samples[ours], samples.get(against)
    shown = figure(statistics.median(mine), unit)
    if not theirs:
        return Line(row, name, shown, f"{against}: {NOT_RUN}", None, None, str(goal), None, did, dict(samples))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    ratio = statistics.median(ratios)
    return Line(
        row, name, shown, f"{against}: {figure(statistics.median(theirs), unit)}", ratio, (min(ratios), max(ratios)),
        str(goal), goal.is_met(ratio), did, dict(samples),
    )  # fmt: skip


def bound(row: int, name: str, values: list[float], goal: Goal, *, did: str, against: str = "bound") -> Line:
    """A figure against an absolute bound."""
    value = statistics.median(values)
    spread = (min(values), max(values)) if len(values) > 1 else None
    return Line(
        row, name, figure(value, goal.unit), against, value, spread, str(goal), goal.is_met(value), did,
        {"ours": values},
    )  # fmt: skip
