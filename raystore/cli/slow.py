"""`raystore slow`: the rollouts that run longest, and ran longest, against the median; and where their time goes."""

from __future__ import annotations

from statistics import median
from typing import Any

import click

from raystore.cli.drawing import Column
from raystore.cli.reading import COUNT, View, attempt_of, environment_of, reading, took
from raystore.cli.show import tree, walk
from raystore.cli.text import clean, counted, duration, share
from raystore.core.lifecycle import ACTIVE, FINISHED

_COLUMNS = [
    Column("rollout"), Column("took", right=True), Column("x median", 1, True),
    Column("where the time goes", 2, least=20), Column("environment", 4), Column("status", 5), Column("runner", 3),
]  # fmt: skip


def where_time_goes(spans: list[Any], seconds: float) -> tuple[str, float]:
    """The name of the spans in which most of the time went, without those within them, and how much it was."""
    own: dict[str, float] = {}
    for node, _ in walk(tree(spans)):
        own[node.span.name] = own.get(node.span.name, 0.0) + node.own_seconds()
    outside = seconds - sum(own.values())
    name, most = max(own.items(), key=lambda item: item[1], default=("", 0.0))
    return (name, most) if most >= outside else ("", outside)


def silence(spans: list[Any], now: float) -> str:
    """What the last sign of a running rollout was, and how long ago."""
    ended = [span for span in spans if span.end_time is not None]
    if not ended:
        return "no span has ended yet"
    last = max(ended, key=lambda span: span.end_time)
    return f"nothing since {clean(last.name, 60)} ended {duration(max(now - last.end_time, 0.0))} ago"


@reading("raystore slow --limit 5")
@click.option("--limit", **COUNT, default=10, help="So many of each kind at most.")
async def slow(view: View, *, limit: int) -> None:
    """What takes longest: of the rollouts that run, and of those that have finished; against the median.

    The time of an attempt, from its claim, counts; the time in the queue does not.
    """
    running: list[tuple[float, Any]] = []
    finished: list[tuple[float, Any]] = []
    async for rollout in view.rollouts(ACTIVE | FINISHED):
        if (seconds := took(rollout, view.now)) is not None:
            (running if rollout.status in ACTIVE else finished).append((seconds, rollout))
    usual = median(seconds for seconds, _ in finished) if finished else None
    for kind in (running, finished):
        kind.sort(key=lambda pair: -pair[0])
    shown = {"running": running[:limit], "finished": finished[:limit]}
    ids = [rollout.rollout_id for pairs in shown.values() for _, rollout in pairs]
    spans = await view.store.query_many_spans(ids, allow_partial=True) if ids else {}
    if view.wants_json:
        told: dict[str, Any] = {"median_seconds": usual, "finished_count": len(finished), "running_count": len(running)}
        for kind_name, pairs in shown.items():
            told[kind_name] = [
                {
                    "rollout_id": rollout.rollout_id, "seconds": seconds,
                    "times_median": seconds / usual if usual else None,
                    **dict(zip(("span", "span_seconds"), _where(spans, rollout, seconds), strict=True)),
                }
                for seconds, rollout in pairs
            ]  # fmt: skip
        view.give(told)
        return
    median_said = f"median of {counted(len(finished), 'finished rollout')}: {duration(usual)}" if finished else ""
    view.screen.print(median_said or "no rollout has finished yet")
    for kind_name, pairs in shown.items():
        if not pairs:
            continue
        view.screen.heading(f"{kind_name} longest")
        rows = []
        for seconds, rollout in pairs:
            if kind_name == "running":
                where = silence(spans.get(rollout.rollout_id, []), view.now)
            else:
                name, part = _where(spans, rollout, seconds)
                where = f"{name or 'outside of spans'} {duration(part)} ({share(part, seconds)})"
            attempt = attempt_of(rollout)
            times = f"{seconds / usual:.1f}" if usual else ""
            rows.append([
                rollout.rollout_id, duration(seconds), times, where, environment_of(rollout), rollout.status,
                attempt.worker_id,
            ])  # fmt: skip
        view.screen.table(_COLUMNS, rows)


def _where(spans: dict[str, list[Any]], rollout: Any, seconds: float) -> tuple[str, float]:
    return where_time_goes(spans.get(rollout.rollout_id, []), seconds)
