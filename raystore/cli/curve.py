"""`raystore curve`: whether it learns, by the rewards of all finished rollouts.

Unfiltered: also of those that were not trained on, since the curve of what passes a filter is flat by construction.
Train, validation and test are apart. Rollouts that finished without a reward are in no mean, and are counted. An
evaluation has a curve of its own, of its results, which are there when its rollouts are not any more; in them a sample
without a reward counts as failed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from raystore.cli.drawing import Column, Screen
from raystore.cli.endings import WrongUse
from raystore.cli.reading import View, Word, attempt_of, reading
from raystore.cli.text import counted, duration, figure, means, sparkline
from raystore.core.lifecycle import FINISHED
from raystore.reports.svg import Points, draw
from raystore.types.evaluations import EvaluationScore, is_sample

HEIGHT = 10  #: of a picture in the terminal, in rows
BUCKETS = 40  #: of a curve over time
_LEVELS = " ▁▂▃▄▅▆▇█"
_COLUMNS = [
    Column("curve"), Column("from", 1, True), Column("to", right=True), Column("best", 2, True),
    Column("means", 3, True), Column("rollouts", 4, True), Column("without reward", 5, True), Column("", 1),
]  # fmt: skip


class Series:
    """The rewards of one mode, by policy version or by time."""

    def __init__(self) -> None:
        self.rewards: dict[float, list[float]] = {}
        self.count: int = 0
        self.without_reward: int = 0

    def add(self, at: float, reward: float | None) -> None:
        """Count a finished rollout."""
        self.count += 1
        if reward is None or not math.isfinite(reward):
            self.without_reward += 1
        else:
            self.rewards.setdefault(at, []).append(reward)

    def measure(self, at: float, score: EvaluationScore) -> None:
        """Add what an evaluation came to."""
        self.count += score.samples
        self.without_reward += score.failed
        if score.mean is not None:
            self.rewards[at] = [score.mean]

    def points(self) -> Points:
        """The mean at each place."""
        return [(at, sum(got) / len(got)) for at, got in sorted(self.rewards.items())]


async def collect(view: View, by: str, mode: Any) -> tuple[dict[str, Series], int, str]:
    """The curves by mode, how many rollouts were left out for want of a version, and by what the curves are."""
    evaluated = [one for one in await view.store.evaluations() if one.status == "finished" and not one.undone]
    everything = [one async for one in view.rollouts(FINISHED - {"cancelled"}) if mode in (None, one.mode)]
    finished = [one for one in everything if not is_sample(one)]
    versions = [attempt.policy_version if (attempt := attempt_of(one)) else None for one in finished]
    if by == "version" and finished and all(version is None for version in versions):
        by = "time"  # nobody says which policy it was
    ends = [one.end_time for one in (*finished, *evaluated) if one.end_time is not None]
    first, last = min(ends, default=0.0), max(ends, default=0.0)
    width = max(last - first, 1e-6) / BUCKETS
    series: dict[str, Series] = {}
    left_out = 0
    for rollout, version in zip(finished, versions, strict=True):
        at = version
        if by == "time":
            at = None if rollout.end_time is None else int(min((rollout.end_time - first) / width, BUCKETS - 1)) * width
        if at is None:
            left_out += 1
        else:
            series.setdefault(rollout.mode or "no mode", Series()).add(at, rollout.reward)
    order = ["train", "val", "test", "no mode"]
    found = {name: series[name] for name in order if name in series}
    for one in evaluated if mode in (None, "val") else ():
        at = one.version if by == "version" else (one.end_time or first) - first
        if at is not None:
            found.setdefault(f"eval {one.name}", Series()).measure(at, one.overall)
    return found, left_out, by


@reading("raystore curve --by version --svg reward.svg")
@click.option(
    "--by", type=Word(["version", "time"], "way"), default="version", help="version of the policy (default), or time."
)
@click.option("--mode", type=Word(["train", "val", "test"], "mode"), help="Only of this mode.")
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a picture.")
async def curve(view: View, *, by: str, mode: str | None, svg: Path | None) -> None:
    """The mean reward of all finished rollouts, by policy version or over time; train and validation apart.

    Evaluations have curves of their own: of each the mean of its items.
    """
    series, left_out, by = await collect(view, by, mode)
    curves = {name: points for name, one in series.items() if (points := one.points())}
    below = "policy version" if by == "version" else "seconds since the first rollout finished"
    if svg is not None:
        try:
            svg.write_text(draw(curves, title="mean reward of all finished rollouts", below=below))  # noqa: ASYNC240
        except OSError as error:
            raise WrongUse(f"cannot write {svg}: {error.strerror}") from None
    if view.wants_json:
        view.give(
            {
                "by": by,
                "left_out": left_out,
                "curves": {
                    name: {"points": one.points(), "rollouts": one.count, "without_reward": one.without_reward}
                    for name, one in series.items()
                },
            }
        )
        return
    screen = view.screen
    if not curves:
        screen.print("no rollout has finished with a reward yet")
        return
    for name, points in curves.items():
        screen.heading(name, f"mean reward by {below}")
        plot(screen, points, by)
    screen.print("")
    rows = []
    for name, one in series.items():
        got = [y for _, y in one.points()]
        rows.append([
            name, figure(got[0]) if got else "", figure(got[-1]) if got else "",
            figure(max(got)) if got else "", len(got), f"{one.count:,}", one.without_reward or "",
            sparkline(got, 20),
        ])  # fmt: skip
    screen.table(_COLUMNS, rows)
    if left_out:
        screen.print(f"{counted(left_out, 'rollout')} without a policy version left out; --by time has them")
    if svg is not None:
        screen.print(f"wrote {svg}")


def resampled(values: Sequence[float], width: int) -> list[float]:
    """As many values as there are columns: means of several if there are more, each repeated if there are fewer."""
    if len(values) <= width:
        times = max(min(width // len(values), 4), 1)
        return [value for value in values for _ in range(times)]
    return means(values, width)


def plot(screen: Screen, points: Points, by: str) -> None:
    """A curve as blocks, with its bounds at the sides."""
    values = [y for _, y in points]
    least, most = min(values), max(values)
    if least >= 0 and most <= 1:
        least, most = 0.0, 1.0  # as most rewards are
    span = (most - least) or 1.0
    labels = [figure(most), figure(least)]
    margin = max(map(len, labels)) + 1
    columns = resampled(values, screen.width - margin - 1)
    for row in range(HEIGHT - 1, -1, -1):
        label = labels[0] if row == HEIGHT - 1 else labels[1] if row == 0 else ""
        drawn = ""
        for value in columns:
            filled = (value - least) / span * HEIGHT - row
            drawn += _LEVELS[min(max(round(filled * 8), 1 if row == 0 else 0), 8)]
        screen.print(Text.assemble((label.rjust(margin - 1) + " ", "dim"), (drawn.rstrip(), "cyan")))
    ends = [figure(points[0][0]), figure(points[-1][0])]
    if by == "time":
        ends = [duration(points[0][0]), duration(points[-1][0])]
    gap = max(len(columns) - len(ends[0]) - len(ends[1]), 1)
    screen.print(Text(" " * margin + ends[0] + (" " * gap + ends[1] if len(points) > 1 else ""), style="dim"))
