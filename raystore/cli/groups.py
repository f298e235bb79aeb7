"""`raystore groups`: those that match, with what their members have come to."""

from __future__ import annotations

from typing import Any

import click

from raystore.cli.drawing import Column
from raystore.cli.reading import COUNT, View, Words, reading
from raystore.cli.text import duration, figure
from raystore.core.lifecycle import FINISHED, GROUP_STATUSES

COLUMNS = [
    Column("group"), Column("status"), Column("done", right=True), Column("of", 1, True),
    Column("rewards", 2, least=12), Column("age", 3, True), Column("took", 4, True),
    Column("queue", 6), Column("mode", 7), Column("why", 5, least=16),
]  # fmt: skip


async def members_of(view: View, groups: list[Any]) -> dict[str, Any]:
    """The rollouts of groups by id."""
    ids = [rollout_id for group in groups for rollout_id in group.members]
    found = await view.store.query_rollouts(rollout_id_in=ids) if ids else []
    return {rollout.rollout_id: rollout for rollout in found}


def row(group: Any, members: dict[str, Any], view: View) -> list[Any]:
    """The cells of a group."""
    own = [members[one] for one in group.members if one in members]
    rewards = [one.reward for one in own if one.reward is not None]
    ended = group.end_time
    return [
        group.group_id, group.status, sum(one.status in FINISHED for one in own), len(group.members),
        " ".join(figure(reward) for reward in rewards[:8]) + (" …" if len(rewards) > 8 else ""),
        duration(view.age(group.start_time)), duration(ended - group.start_time) if ended else "", group.queue,
        group.mode, group.why,
    ]  # fmt: skip


@reading("raystore groups --status open,failed")
@click.option("--status", type=Words(GROUP_STATUSES, "status"), help="One or several, separated by commas.")
@click.option("--id", "ids", multiple=True, metavar="ID", help="This group; may be repeated.")
@click.option("--limit", **COUNT, default=20, help="So many at most.")
@click.option("--follow", is_flag=True, help="Go on with those that change, as they change.")
async def groups(view: View, *, status: list[Any] | None, ids: tuple[str, ...], limit: int, follow: bool) -> None:
    """The groups that match, one line each; the newest first."""
    wanted: dict[str, Any] = {"status_in": status, "group_id_in": list(ids) or None}
    changed = await view.following() if follow else None
    count = (await view.store.query_groups(**wanted, limit=0)).total
    page = await view.store.query_groups(**wanted, limit=limit, offset=max(count - limit, 0))
    found = list(page.items)[::-1]
    if not follow and view.wants_json:
        view.give({"total": page.total, "groups": found})
        return
    if view.wants_json:
        view.give_lines(found)
    else:
        members = await members_of(view, found)
        view.screen.table(COLUMNS, [row(group, members, view) for group in found])
        if len(found) < page.total:
            view.screen.print(f"{len(found):,} of {page.total:,}; --limit shows more")
        elif not page.total:
            view.screen.print("no group matches")
    if changed is None:
        return
    async for changes in changed:
        named = [(change.detail or {}).get("group_id") for change in changes]
        touched = list(dict.fromkeys(name for name in named if name and (not ids or name in ids)))
        if not touched:
            continue
        now = await view.store.query_groups(status_in=status, group_id_in=touched)
        if view.wants_json:
            view.give_lines(now)
        elif now:
            members = await members_of(view, list(now))
            view.screen.table(COLUMNS, [row(group, members, view) for group in now])
