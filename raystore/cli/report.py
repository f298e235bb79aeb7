"""`raystore report`: what a feed or consumer trained on, and what it threw away; whether that is biased, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from raystore.cli.consumers import the_consumer
from raystore.cli.drawing import Column
from raystore.cli.endings import WrongUse
from raystore.cli.reading import COUNT, Seconds, View, reading
from raystore.cli.text import clean, counted, duration, figure, share

_ENDINGS = [
    Column("ending"), Column("groups", 4, True), Column("rollouts", right=True), Column("share", right=True),
    Column("cut off", 2, True), Column("ran", 1, True), Column("turns", 4, True), Column("tokens", 4, True),
    Column("reward", 1, True), Column("reasons", 3, least=16),
]  # fmt: skip
_VALUES = [
    Column("of"), Column("value"), Column("started", 1, True), Column("trained on", right=True),
    Column("share", 1, True),
    Column("reward started", 2, True), Column("trained on", 2, True),
]  # fmt: skip


@reading("raystore report train --svg selection.svg")
@click.argument("consumer", required=False, metavar="[CONSUMER]")
@click.option("--last", type=Seconds(), help="Of so long; windows make it somewhat longer.")
@click.option("--values", **COUNT, default=8, help="So many environments, tags and versions of each kind at most.")
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a picture.")
async def report(view: View, *, consumer: str | None, last: float | None, values: int, svg: Path | None) -> None:
    """What a CONSUMER trained on against all that was started: what was dropped, why, and whether that is biased.

    A rollout that was cut off counts as survival analysis has it. A difference is a bias if it is more than chance and
    large enough to matter. The picture shows how durations, turns, tokens and rewards are distributed.
    """
    name, _ = await the_consumer(view, consumer)
    found = await view.store.selection_report(name, since=None if last is None else view.now - last)
    if svg is not None:
        try:
            svg.write_text(found.svg())  # noqa: ASYNC240
        except OSError as error:
            raise WrongUse(f"cannot write {svg}: {error.strerror}") from None
    if view.wants_json:
        view.give({**found.model_dump(exclude={"curves"}), "is_biased": found.is_biased})
        return
    screen = view.screen
    screen.heading(clean(name), f"in {duration(found.until - found.since)}")
    rows: list[list[Any]] = []
    for one in found.endings:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(one.reasons.items())[:4])
        rows.append([
            one.ending, one.groups or "", f"{one.rollouts:,}", share(one.rollouts, found.started), one.cut or "",
            duration(one.duration.mean), figure(one.turns.mean), figure(one.tokens.mean), figure(one.reward.mean),
            clean(reasons, 200),
        ])  # fmt: skip
    screen.table(_ENDINGS, rows)
    screen.print("", *(f"- {sentence}" for sentence in found.sentences))
    shown: dict[str, int] = {}
    rows = []
    for value in found.values:
        shown[value.dimension] = shown.get(value.dimension, 0) + 1
        if shown[value.dimension] <= values:
            rows.append([
                value.dimension, clean(value.value, 60), f"{value.started:,}", f"{value.trained:,}",
                share(value.trained, value.started), figure(value.reward_started), figure(value.reward_trained),
            ])  # fmt: skip
    if len(rows) > 1:
        screen.heading("by environment, tag and policy version")
        screen.table(_VALUES, rows)
        if (left := len(found.values) - len(rows)) > 0:
            screen.print(f"{counted(left, 'value')} more; --values shows more of each")
    if svg is not None:
        screen.print("", f"wrote {svg}")
