"""`raystore diff`: what changed between two steps of a consumer, or between two runs; the largest effect first.

An effect is the difference of two means in standard deviations (Cohen's d), or of two shares on the same scale (Cohen's
h): rewards, lengths and shares of errors can be put into one order by it. 0.2 is small, 0.5 middling, 0.8 large.
Not here: whether a difference is chance. The numbers of rollouts stand beside it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.text import Text

from raystore.cli.consumers import metrics_of, the_consumer
from raystore.cli.drawing import Column
from raystore.cli.endings import WrongUse
from raystore.cli.errors import INFRASTRUCTURE, POLICY
from raystore.cli.finding import Where, opened
from raystore.cli.reading import COUNT, JSON, STORE_OPTIONS, View, attempt_of, command_of, environment_of, run_on, took
from raystore.cli.resources import lines_of
from raystore.cli.show import calls_of, tokens_of
from raystore.cli.text import clean, counted, duration, figure, last_line
from raystore.core.lifecycle import FINISHED
from raystore.errors import PayloadLostError
from raystore.types.contract import AnyRollout

READ = 256  #: rollouts of a side of which the spans are read, for tokens and turns
_COLUMNS = [
    Column("effect", 1, True), Column("what", least=12), Column("before", right=True), Column("after", right=True),
    Column("of", 3, True),
]  # fmt: skip


@dataclass
class Side:
    """One of the two: measured values by name, things that are so or not by name, and what its rollouts ran with."""

    name: str
    count: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)  # of `count`
    resources: list[str] = field(default_factory=list)  # lines of the newest version that was used
    metrics: dict[str, float] = field(default_factory=dict)  # what the trainer said of the step

    def measure(self, what: str, value: float | None) -> None:
        """Add a measured value."""
        if value is not None:
            self.values.setdefault(what, []).append(value)

    def note(self, notes: Sequence[str | None]) -> None:
        """Take the metrics in the notes of a step: of the whole of it if all are equal, else of each rollout."""
        told = [metrics_of(note) for note in notes]
        for name in dict.fromkeys(name for metrics in told for name in metrics):
            values = [metrics[name] for metrics in told if name in metrics]
            if len(set(values)) == 1:
                self.metrics[name] = values[0]
            else:
                self.values[f"metric {name}"] = values

    def count_flag(self, what: str) -> None:
        """Count a rollout of which this is so."""
        self.flags[what] = self.flags.get(what, 0) + 1


@dataclass(frozen=True)
class Difference:
    """How much one figure differs."""

    what: str
    before: float | None
    after: float | None
    effect: float
    counts: tuple[int, int]
    unit: str

    def shown(self, value: float | None) -> str:
        """A value in its unit."""
        if value is None:
            return "none"
        return f"{value:.1%}" if self.unit == "share" else duration(value) if self.unit == "seconds" else figure(value)


# -- measuring ---------------------------------------------------------------------------------------------------------


async def side_of(view: View, name: str, rollouts: Sequence[AnyRollout], steps: dict[str, int]) -> Side:
    """What there is to compare of some rollouts; `steps` are those that consumed them."""
    side = Side(name, len(rollouts))
    for rollout in rollouts:
        environment, attempt = environment_of(rollout), attempt_of(rollout)
        side.measure("reward", rollout.reward)
        side.measure(f"reward in {environment}", rollout.reward)
        side.count_flag(f"share from {environment}")
        side.count_flag(f"ended as {rollout.status}")
        if rollout.reward is None:
            side.count_flag("without a reward")
        if attempt is None:
            continue
        if attempt.outcome in (*INFRASTRUCTURE, *POLICY):
            side.count_flag(f"outcome {attempt.outcome}")
            side.count_flag(f"error: {clean(last_line(attempt.error), 80) or attempt.outcome}")
        side.measure("seconds that an attempt took", took(rollout, view.now))
        side.measure("attempts of a rollout", float(attempt.sequence_id))
        if attempt.sequence_id == 1:
            side.measure("seconds in the queue", max(attempt.start_time - rollout.start_time, 0.0))
        step = steps.get(rollout.rollout_id)
        if step is not None and attempt.policy_version is not None:
            side.measure("lag: step less policy version", float(step - attempt.policy_version))
    await _measure_spans(view, side, rollouts)
    side.resources = await _resources_of(view, rollouts)
    return side


async def _measure_spans(view: View, side: Side, rollouts: Sequence[AnyRollout]) -> None:
    """Spans, model calls and tokens, of the first rollouts."""
    ids = [rollout.rollout_id for rollout in rollouts[:READ]]
    found = await view.store.query_many_spans(ids, allow_partial=True) if ids else {}
    for spans in found.values():
        side.measure("spans", float(len(spans)))
        if calls := calls_of(spans):
            side.measure("model calls", float(len(calls)))
            side.measure("tokens generated", float(tokens_of(calls)))
            reasons = {call.finish_reason for call in calls}
            if "length" in reasons:
                side.measure("truncated by length", 1.0)
            else:
                side.measure("truncated by length", 0.0)


async def _resources_of(view: View, rollouts: Sequence[AnyRollout]) -> list[str]:
    """The newest resources that these rollouts ran with, as lines."""
    used = {
        (rollout.resources_id, attempt.resources_version)
        for rollout in rollouts
        if (attempt := attempt_of(rollout)) is not None and attempt.resources_version is not None
    }
    lines: list[str] = []
    newest: dict[str | None, int] = {}
    for resources_id, version in used:
        newest[resources_id] = max(newest.get(resources_id, 0), version)
    for resources_id, version in sorted(newest.items(), key=str):
        if resources_id is None:
            continue
        try:
            found = await view.store.get_resources_by_id(resources_id, version)
        except PayloadLostError:
            continue
        if found is not None:
            lines += [f"[{clean(resources_id)}]", *lines_of(found)]
    return lines


# -- comparing ---------------------------------------------------------------------------------------------------------


def differences(before: Side, after: Side) -> list[Difference]:
    """All figures that differ, the largest effect first."""
    found = []
    for what in dict.fromkeys([*before.values, *after.values]):
        one, other = before.values.get(what, []), after.values.get(what, [])
        means = [sum(side) / len(side) if side else None for side in (one, other)]
        unit = "seconds" if what.startswith("seconds") else "share" if what.startswith("truncated") else ""
        found.append(Difference(what, means[0], means[1], _cohens_d(one, other), (len(one), len(other)), unit))
    for what in dict.fromkeys([*before.flags, *after.flags]):
        shares = [side.flags.get(what, 0) / side.count if side.count else 0.0 for side in (before, after)]
        effect = 2 * (math.asin(math.sqrt(shares[1])) - math.asin(math.sqrt(shares[0])))
        found.append(Difference(what, shares[0], shares[1], effect, (before.count, after.count), "share"))
    differing = [one for one in found if one.before != one.after]
    return sorted(differing, key=lambda one: -abs(one.effect))


def _cohens_d(one: Sequence[float], other: Sequence[float]) -> float:
    """The difference of means in standard deviations; 0 if a side has no value; infinite if neither varies."""
    if not one or not other:
        return 0.0
    means = [sum(side) / len(side) for side in (one, other)]
    squares = sum(sum((x - mean) ** 2 for x in side) for side, mean in zip((one, other), means, strict=True))
    deviation = math.sqrt(squares / max(len(one) + len(other) - 2, 1))
    apart = means[1] - means[0]
    if abs(apart) < 1e-12:
        return 0.0
    return apart / deviation if deviation > 1e-12 else math.copysign(math.inf, apart)


def draw_difference(view: View, before: Side, after: Side, limit: int) -> None:
    """The table of differences, and what changed in the resources."""
    found = differences(before, after)
    changed = list(difflib.unified_diff(before.resources, after.resources, before.name, after.name, lineterm="", n=1))
    if view.wants_json:
        view.give(
            {
                "before": {"name": before.name, "rollouts": before.count},
                "after": {"name": after.name, "rollouts": after.count},
                "metrics": {"before": before.metrics, "after": after.metrics},
                "differences": [vars(one) for one in found],
                "resources": changed,
            }
        )
        return
    screen = view.screen
    screen.heading(
        f"{before.name} → {after.name}",
        f"{counted(before.count, 'rollout')} → {counted(after.count, 'rollout')}; the largest effect first",
    )
    rows = []
    for one in found[:limit]:
        effect = f"{one.effect:+.1f} sd" if math.isfinite(one.effect) else "+∞" if one.effect > 0 else "-∞"
        style = "bold" if abs(one.effect) >= 0.8 else "dim" if abs(one.effect) < 0.2 else ""
        rows.append([
            Text(effect, style=style), Text(clean(one.what), style=style), one.shown(one.before), one.shown(one.after),
            "{}, {}".format(*one.counts),
        ])  # fmt: skip
    if rows:
        screen.table(_COLUMNS, rows)
    else:
        screen.print("nothing that is measured differs")
    if len(found) > limit:
        screen.print(f"… and {len(found) - limit} more; --limit shows them")
    if before.metrics or after.metrics:
        screen.heading("what the trainer said")
        names = dict.fromkeys([*before.metrics, *after.metrics])
        told = [[name, figure(before.metrics.get(name)), figure(after.metrics.get(name))] for name in names]
        screen.table([Column("metric"), Column("before", right=True), Column("after", right=True)], told)
    if changed:
        screen.heading("resources")
        screen.print(*changed[2:])


# -- the command -------------------------------------------------------------------------------------------------------


async def _steps(view: View, steps: tuple[int, int], consumer: str | None, limit: int) -> None:
    name, _ = await the_consumer(view, consumer)
    ledger = await view.store.ledger(name)
    known = sorted({entry.step for entry in ledger if entry.step is not None})
    sides = []
    for step in steps:
        ids = [entry.rollout_id for entry in ledger if entry.step == step]
        if not ids:
            there = f"it has steps {known[0]} to {known[-1]}" if known else "it has none"
            raise WrongUse(f"consumer {name!r} has no step {step} in its ledger; {there}")
        rollouts = list(await view.store.query_rollouts(rollout_id_in=ids))
        sides.append(await side_of(view, f"step {step}", rollouts, dict.fromkeys(ids, step)))
        sides[-1].note([entry.note for entry in ledger if entry.step == step])
    draw_difference(view, sides[0], sides[1], limit)


async def _whole_run(view: View, name: str) -> Side:
    steps: dict[str, int] = {}
    for consumer in (await view.store.statistics())["consumers"]:
        steps |= {one.rollout_id: one.step for one in await view.store.ledger(consumer) if one.step is not None}
    finished = [one async for one in view.rollouts(FINISHED)]
    return await side_of(view, name, finished, steps)


async def _runs(view: View, other: Path, limit: int) -> None:
    """Compare the run that is open with another."""
    before = await _whole_run(view, str(view.where.journal))
    with opened(Where(journal=other)) as store:
        after = await _whole_run(View(store, view.screen, view.wants_json, view.now, True), str(other))
    draw_difference(view, before, after, limit)


def _diff(
    before: str, after: str, consumer: str | None, limit: int, name: str | None, namespace: str, address: str | None,
    journal: Path | None, json: bool,
) -> None:  # fmt: skip
    """What changed between two steps of a consumer, or between two runs by the directories of their journals.

    Rewards by environment, lengths, endings, lag, errors, resources: the largest effect first. An effect is in standard
    deviations, shares on the same scale: 0.2 is small, 0.8 large.
    """
    if before.isdecimal() and after.isdecimal():
        steps = int(before), int(after)
        run_on(
            Where(name, namespace, address, journal), lambda view: _steps(view, steps, consumer, limit), wants_json=json
        )
        return
    for one in (before, after):
        if not Path(one).is_dir():
            raise WrongUse(f"{one!r} is neither a step nor a directory; write two steps, or the journals of two runs")
    run_on(Where(journal=Path(before)), lambda view: _runs(view, Path(after), limit), wants_json=json)


diff: click.Command = command_of(_diff, "raystore diff 400 412 --consumer trainer", [
        click.Argument(["before"]),
        click.Argument(["after"]),
        click.Option(["--consumer"], metavar="NAME", help="Whose steps; needed if there are several consumers."),
        click.Option(["--limit"], **COUNT, default=25, help="So many lines at most."),
        *STORE_OPTIONS, JSON,
    ])  # fmt: skip
