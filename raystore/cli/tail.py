"""`raystore tail`: the changes of a store, as they happen."""

from __future__ import annotations

import time

import click
from rich.text import Text

from raystore.cli.reading import View, reading
from raystore.cli.text import clean
from raystore.types.contract import Change

_STYLES = {"succeeded": "green", "failed": "red", "claimed": "cyan", "requeuing": "yellow", "cancelled": "yellow"}


def line_of(change: Change) -> Text:
    """A change as one line: time of day, kind, whom it is about, and what more there is to say."""
    clock = time.strftime("%H:%M:%S", time.localtime(change.time)) + f".{int(change.time % 1 * 1000):03}"
    whom = " ".join(filter(None, [change.rollout_id, change.attempt_id]))
    detail = " ".join(f"{name}={value}" for name, value in (change.detail or {}).items() if value is not None)
    return Text.assemble(
        (clock, "dim"), "  ", (clean(change.kind).ljust(15), _STYLES.get(change.kind, "")), " ",
        " ".join(filter(None, [clean(whom), clean(detail, 300)])),
    )  # fmt: skip


@reading("raystore tail --kind failed,requeuing")
@click.option(
    "--kind", "kinds", metavar="KIND,...", help="Only these: enqueued, claimed, succeeded, failed, taken, ..."
)
@click.option(
    "--last", type=click.IntRange(0, 100_000), default=20, show_default=True, help="Begin so many changes before now."
)
@click.option("--rollout", "rollout_id", metavar="ID", help="Only of this rollout.")
@click.option("--no-follow", is_flag=True, help="Do not wait for more.")
async def tail(view: View, *, kinds: str | None, last: int, rollout_id: str | None, no_follow: bool) -> None:
    """Changes, as they happen; first the last ones. With --json one line each.

    A journal is read to its end.
    """
    wanted = [kind.strip() for kind in kinds.split(",")] if kinds else []
    before, cursor = await view.recent(last, wanted)
    _give(view, before, rollout_id)
    if no_follow or view.is_journal:
        return
    async for changes in await view.following(*wanted, since=cursor):
        _give(view, changes, rollout_id)


def _give(view: View, changes: list[Change], rollout_id: str | None) -> None:
    for change in changes:
        if rollout_id is not None and change.rollout_id != rollout_id:
            continue
        if view.wants_json:
            view.give_lines([change])
        else:
            view.screen.print(line_of(change))
