"""`raystore workers`: the runners, what each works on, and since when."""

from __future__ import annotations

from typing import Any

import click

from raystore.cli.drawing import Column
from raystore.cli.reading import COUNT, View, Words, reading
from raystore.cli.text import duration, size
from raystore.core.lifecycle import WORKER_STATUSES

COLUMNS = [
    Column("runner"), Column("status"), Column("for", 1, True), Column("rollout", 2), Column("heard", 3, True),
    Column("host", 5), Column("running", 4, True), Column("memory", 6, True), Column("pid", 7, True),
]  # fmt: skip


def heard(worker: Any) -> float | None:
    """When the store last heard of a runner."""
    times = [worker.last_heartbeat_time, worker.last_dequeue_time, worker.last_busy_time, worker.last_idle_time]
    return max((time for time in times if time is not None), default=None)


def row(worker: Any, view: View) -> list[Any]:
    """The cells of a runner."""
    stats = worker.heartbeat_stats if isinstance(worker.heartbeat_stats, dict) else {}
    since = worker.last_busy_time if worker.status == "busy" else worker.last_idle_time
    rss = stats.get("rss_bytes")
    return [
        worker.worker_id, worker.status, duration(view.age(since)), worker.current_rollout_id,
        duration(view.age(heard(worker))), stats.get("host"), stats.get("running"),
        size(rss) if isinstance(rss, (int, float)) else None, stats.get("pid"),
    ]  # fmt: skip


@reading("raystore workers --status busy")
@click.option("--status", type=Words(WORKER_STATUSES, "status"), help="One or several, separated by commas.")
@click.option("--id", "contains", metavar="TEXT", help="Whose id contains this.")
@click.option("--limit", **COUNT, default=50, help="So many at most.")
@click.option("--follow", is_flag=True, help="Go on with those that change, as they change.")
async def workers(view: View, *, status: list[Any] | None, contains: str | None, limit: int, follow: bool) -> None:
    """The runners, what each works on, and since when; those first that the store heard of last."""
    wanted: dict[str, Any] = {"status_in": status, "worker_id_contains": contains}
    changed = await view.following("claimed", "succeeded", "failed", "requeuing", "cancelled") if follow else None
    page = await view.store.query_workers(**wanted, sort_by="last_dequeue_time", sort_order="desc", limit=limit)
    if not follow and view.wants_json:
        view.give({"total": page.total, "workers": page.items})
        return
    if view.wants_json:
        view.give_lines(page.items)
    else:
        view.screen.table(COLUMNS, [row(worker, view) for worker in page.items])
        if len(page) < page.total:
            view.screen.print(f"{len(page):,} of {page.total:,}; --limit shows more")
        elif not page.total:
            view.screen.print("no runner matches")
    if changed is None:
        return
    async for changes in changed:
        ids = list(dict.fromkeys(change.rollout_id for change in changes if change.rollout_id))
        rollouts = await view.store.query_rollouts(rollout_id_in=ids)
        names = {attempt.worker_id for one in rollouts if (attempt := getattr(one, "attempt", None)) is not None}
        every = await view.store.query_workers(**wanted)
        kept = [worker for worker in every if worker.worker_id in names]
        if view.wants_json:
            view.give_lines(kept)
        elif kept:
            view.screen.table(COLUMNS, [row(worker, view) for worker in kept])
