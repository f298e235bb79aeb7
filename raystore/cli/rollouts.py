"""`raystore rollouts`: those that match, newest first, or as they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from raystore.cli.drawing import Column
from raystore.cli.reading import COUNT, Tag, View, Word, Words, attempt_of, environment_of, reading, took
from raystore.cli.text import clean, duration, figure, last_line
from raystore.core.lifecycle import ROLLOUT_STATUSES
from raystore.core.queries import ROLLOUT_SORT

COLUMNS = [
    Column("rollout"), Column("status"), Column("outcome", 3), Column("reward", 1, True), Column("took", 2, True),
    Column("age", 4, True), Column("environment", 5), Column("mode", 8), Column("try", 7, True),
    Column("version", 9, True), Column("runner", 10), Column("group", 11), Column("error", 6, least=20),
]  # fmt: skip


def row(rollout: Any, view: View) -> list[Any]:
    """The cells of a rollout."""
    attempt = attempt_of(rollout)
    cells = [
        rollout.rollout_id, rollout.status, None, figure(rollout.reward), duration(took(rollout, view.now)),
        duration(view.age(rollout.start_time)), environment_of(rollout), rollout.mode, None, None, None,
        rollout.group_id, None,
    ]  # fmt: skip
    if attempt is not None:
        cells[2], cells[8] = attempt.outcome, attempt.sequence_id
        cells[9], cells[10] = attempt.policy_version, attempt.worker_id
        cells[12] = clean(last_line(attempt.error), 80)
    return cells


@reading("raystore rollouts --status failed --tag env=math --limit 20")
@click.option("--status", type=Words(ROLLOUT_STATUSES, "status"), help="One or several, separated by commas.")
@click.option("--id", "contains", metavar="TEXT", help="Whose id contains this.")
@click.option("--group", metavar="ID", help="Of this group.")
@click.option("--tag", "tags", type=Tag(), multiple=True, metavar="NAME=VALUE", help="With this tag; may be repeated.")
@click.option("--queue", metavar="NAME", help="Of this queue.")
@click.option("--worker", metavar="ID", help="Whose latest attempt this runner has or had.")
@click.option("--mode", type=Word(["train", "val", "test"], "mode"), help="train, val or test.")
@click.option("--sort", type=Word(sorted(ROLLOUT_SORT), "field"), default="start_time", help="By this field.")
@click.option("--ascending", is_flag=True, help="The smallest or oldest first.")
@click.option("--limit", **COUNT, default=20, help="So many at most.")
@click.option("--offset", type=click.IntRange(0), metavar="N", default=0, help="Without the first ones.")
@click.option("--follow", is_flag=True, help="Go on with those that change, as they change.")
async def rollouts(
    view: View,
    *,
    status: list[str] | None,
    contains: str | None,
    group: str | None,
    tags: Sequence[tuple[str, Any]],
    queue: str | None,
    worker: str | None,
    mode: Any,
    sort: str,
    ascending: bool,
    limit: int,
    offset: int,
    follow: bool,
) -> None:
    """The rollouts that match, one line each; the newest first."""
    filters: dict[str, Any] = {
        "status_in": status, "rollout_id_contains": contains, "group_id": group, "tags": dict(tags) or None,
        "queue": queue, "worker_id": worker, "mode": mode,
    }  # fmt: skip
    changed = await view.following() if follow else None
    order: Any = "asc" if ascending else "desc"
    page = await view.store.query_rollouts(**filters, sort_by=sort, sort_order=order, limit=limit, offset=offset)
    if not follow and view.wants_json:
        view.give({"total": page.total, "rollouts": page.items})
        return
    if view.wants_json:
        view.give_lines(page.items)
    else:
        view.screen.table(COLUMNS, [row(rollout, view) for rollout in page.items])
        if len(page) < page.total:
            view.screen.print(f"{len(page):,} of {page.total:,}; --limit shows more")
        elif not page.total:
            view.screen.print("no rollout matches")
    if changed is None:
        return
    async for changes in changed:
        ids = list(dict.fromkeys(change.rollout_id for change in changes if change.rollout_id))
        found = await view.store.query_rollouts(**filters | {"rollout_id_contains": None}, rollout_id_in=ids)
        kept = [one for one in found.items if contains is None or contains in one.rollout_id]
        if view.wants_json:
            view.give_lines(kept)
        elif kept:
            view.screen.table(COLUMNS, [row(one, view) for one in kept])
