"""What a consumer that is no feed trained on and left, of what the store still has.

A feed counts what becomes of each rollout that it starts. Of another consumer the store knows only what it took. So all
rollouts are read here, page by page, and those count that the consumer's filter selects; deleted ones do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from raystore.core.fates import UNDER_WAY, told, values_of
from raystore.core.lifecycle import FINISHED, TRAINABLE, is_cut_off
from raystore.core.selection import Ended, Fate, Window
from raystore.core.training import GROUPS, fits
from raystore.types.contract import AnyRollout, Group, LedgerEntry
from raystore.types.evaluations import is_sample

PAGE = 2_000  #: rollouts that are asked for at once


class Store(Protocol):
    """What is read of a store."""

    async def statistics(self) -> Any:
        """Its statistics."""

    async def ledger(self, consumer: str) -> list[LedgerEntry]:
        """What a consumer took."""

    async def query_rollouts(self, *, limit: int = -1, offset: int = 0) -> Any:
        """A page of its rollouts."""

    async def query_groups(self) -> Any:
        """Its groups."""


async def selection_of(store: Store, consumer: str, since: float | None, now: float) -> dict[str, Any]:
    """What `core.fates.selection` says of a feed, of a consumer that is none."""
    known = (await store.statistics())["consumers"][consumer]
    taken = {entry.rollout_id: entry.step for entry in await store.ledger(consumer)}
    takes_groups = known["takes"] == GROUPS
    groups = {group.group_id: group for group in await store.query_groups()} if takes_groups else {}
    decided, under_way = Window(now if since is None else since, now), Window(now, now)
    counted: set[tuple[str, str]] = set()
    offset, total = 0, 1
    while offset < total:
        page = await store.query_rollouts(limit=PAGE, offset=offset)
        offset, total = offset + PAGE, page.total
        for rollout in page.items:
            if (
                is_sample(rollout)
                or not fits(known["filter"], rollout)
                or (takes_groups and rollout.group_id not in groups)
            ):
                continue
            if since is not None and rollout.end_time is not None and rollout.end_time < since:
                continue
            fate = _fate(rollout, groups.get(rollout.group_id or ""), taken, known["filter"], now)
            if fate is None:
                continue
            window = under_way if fate.ending == UNDER_WAY else decided
            window.add([fate], values_of(str(rollout.tags.get("env", rollout.queue)), rollout.tags), 1)
            if since is None:
                decided.since = min(decided.since, rollout.start_time)
            unit = (fate.ending, rollout.group_id or rollout.rollout_id)
            if unit not in counted:
                counted.add(unit)
                window.endings.setdefault(fate.ending, Ended()).groups += 1
    return told(consumer, decided, under_way, now)


def _fate(
    rollout: AnyRollout, group: Group | None, taken: Mapping[str, int | None], wanted: Any, now: float
) -> Fate | None:
    """What became of a rollout; None if it was never started."""
    latest = getattr(rollout, "attempt", None)
    if latest is None:
        return None
    outcome = latest.outcome or rollout.status
    statuses = TRAINABLE if wanted is None else wanted["status_in"]
    if taken.get(rollout.rollout_id) is not None:
        ending, reason = "trained", outcome
    elif rollout.status not in FINISHED:
        ending, reason = UNDER_WAY, "runs"
    elif outcome == "dropped":
        ending, reason = "dropped", outcome
    elif rollout.status == "cancelled":
        ending, reason = "cancelled", "still ran"
    elif rollout.status not in statuses:
        ending, reason = "failed", outcome
    elif group is not None and group.status in ("failed", "cancelled"):
        ending, reason = group.status, outcome
    elif group is not None and group.status == "trained":
        ending, reason = "spare", outcome
    else:
        ending, reason = UNDER_WAY, "waits"
    end = now if rollout.end_time is None else rollout.end_time
    is_whole = latest.resumed_from is None  # else it went on from an attempt that is not read here
    seconds = max(end - latest.start_time, 0.0) if is_whole else None
    is_cut = is_cut_off(rollout.status, latest)
    return Fate(ending, reason, is_cut, seconds, None, None, rollout.reward, latest.policy_version)
