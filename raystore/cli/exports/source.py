"""What is exported, read from a store page by page, so that memory is bounded however large the store is.

Finished rollouts come in the order in which they finished, by the cursor of the completion log: an export that goes on
from a cursor repeats nothing and leaves nothing out, also while the store lives. Rollouts that have not finished have
no such log; they come as they are at that moment. Groups come in the order of their creation, once they have ended.
Not here: what becomes of it (`records` and the formats), where it goes (`targets`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raystore.errors import SpansEvictedError
from raystore.types.spans import Span

PAGE = 256  #: rollouts of which the records are read at once
CHUNK = 16  #: rollouts of which the spans are in memory at once
GROUPS = 512  #: groups of which the records are read at once
OVERLAP = 256  #: records that are read again, to notice that others have gone meanwhile
REMEMBERED = 4096  #: ids by which a place is found again

FINISHED = ("succeeded", "failed", "cancelled")
UNFINISHED = ("queuing", "preparing", "running", "requeuing")
GROUP_STATUSES = ("open", "complete", "trained", "filtered", "stale", "failed", "cancelled")


@dataclass(slots=True)
class Whole:
    """A rollout with everything that belongs to it.

    Attributes:
        rollout: its record.
        attempts: all of its attempts, in their order.
        spans: of each attempt, by its id; with those that it has taken over from an attempt before it.
        recorded: what each attempt itself has recorded, by its id: each span once.
        is_partial: whether spans were evicted, so that some are missing.
    """

    rollout: Any
    attempts: list[Any]
    spans: dict[str, list[Span]]
    is_partial: bool = False
    recorded: dict[str, list[Span]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Filters:
    """Which rollouts, or groups, are exported.

    Attributes:
        status: these only.
        mode: this one only; None: any.
        tags: which they must have.
        since: what ended, or was enqueued and has not ended, at this time or later; None: any.
    """

    status: tuple[str, ...] = FINISHED
    mode: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    since: float | None = None

    def fit(self, record: Any) -> bool:
        """Whether a rollout or group is wanted; mode and tags are looked at by the store where it can."""
        if record.status not in self.status or (self.mode is not None and record.mode != self.mode):
            return False
        if any(record.tags.get(name) != value for name, value in self.tags.items()):
            return False
        time = record.end_time if record.end_time is not None else record.start_time
        return self.since is None or time >= self.since


async def finished(store: Any, filters: Filters, cursor: int | None) -> AsyncIterator[tuple[list[Any], int | None]]:
    """Pages of the rollouts that have finished behind a cursor, and the cursor behind each; until there is none."""
    if not {*filters.status} & {*FINISHED}:
        return
    while True:
        page = await store.completed(cursor, limit=PAGE)  # a filter of the store's would walk on to what matches
        if not page.items:
            return
        cursor = page.cursor
        yield [rollout for rollout in page.items if filters.fit(rollout)], cursor


async def unfinished(store: Any, filters: Filters) -> AsyncIterator[list[Any]]:
    """Pages of the rollouts that have not finished, each once, as they are now."""
    wanted = [status for status in filters.status if status in UNFINISHED]

    async def read(limit: int, offset: int) -> tuple[Sequence[Any], int]:
        page = await store.query_rollouts(
            status_in=wanted, mode=filters.mode, tags=filters.tags or None, limit=limit, offset=offset
        )
        return page.items, page.total

    place = Place()
    while wanted and (found := await place.next(read, PAGE, "rollout_id")):
        yield [rollout for rollout in found if filters.fit(rollout)]


class Place:
    """A place in records that are read by offset while others before it may disappear.

    Attributes:
        offset: behind the last record that was read.
        ids: of the last records that were read, by which the place is found again.
    """

    def __init__(self, offset: int = 0, ids: Sequence[str] = ()) -> None:
        self.offset: int = offset
        self.ids: deque[str] = deque(ids, maxlen=REMEMBERED)

    async def next(self, read: Any, limit: int, key: str) -> list[Any]:
        """The next records; empty if there are no more. `read(limit, offset)` gives records and how many there are."""
        while True:
            begin = max(self.offset - OVERLAP, 0)
            items, total = await read(limit + OVERLAP, begin)
            known = {*self.ids}
            last = next((at for at in range(len(items) - 1, -1, -1) if getattr(items[at], key) in known), -1)
            if begin and last < 0:  # so many have gone that this is behind the place
                self.offset = begin
                continue
            found = list(items[last + 1 :])
            self.offset = begin + len(items)
            self.ids.extend(getattr(item, key) for item in found)
            if found or self.offset >= total:
                return found


async def whole(store: Any, rollouts: Sequence[Any]) -> AsyncIterator[Whole]:
    """These rollouts with their attempts and spans, a few at a time."""
    for first in range(0, len(rollouts), CHUNK):
        some = rollouts[first : first + CHUNK]
        attempts = await asyncio.gather(*(_attempts_of(store, rollout) for rollout in some))
        spans = await _spans_of(store, [rollout.rollout_id for rollout in some], latest=False)
        for rollout, made in zip(some, attempts, strict=True):
            found, is_partial = spans.pop(rollout.rollout_id)
            recorded: dict[str, list[Span]] = {}
            for span in found:
                recorded.setdefault(span.attempt_id, []).append(span)
            counted = dict(recorded)
            for attempt in made:
                if attempt.resumed_from is not None:
                    page = await store.query_spans(rollout.rollout_id, attempt.attempt_id, allow_partial=True)
                    counted[attempt.attempt_id] = list(page)
            yield Whole(rollout, made, counted, is_partial, recorded)


async def _attempts_of(store: Any, rollout: Any) -> list[Any]:
    """The attempts of a rollout; one that was tried once has its attempt with it."""
    attempt = getattr(rollout, "attempt", None)
    if attempt is None:
        return []
    return [attempt] if attempt.sequence_id == 1 else list(await store.query_attempts(rollout.rollout_id))


async def _spans_of(store: Any, rollout_ids: Sequence[str], *, latest: bool) -> dict[str, tuple[list[Span], bool]]:
    """The spans of each rollout, and whether some were evicted."""
    which = "latest" if latest else None
    try:
        found = await store.query_many_spans(rollout_ids, which)
        return {rollout_id: (found[rollout_id], False) for rollout_id in rollout_ids}
    except SpansEvictedError:
        pass
    told: dict[str, tuple[list[Span], bool]] = {}
    for rollout_id in rollout_ids:
        try:
            told[rollout_id] = (await store.query_many_spans([rollout_id], which))[rollout_id], False
        except SpansEvictedError:
            left = await store.query_many_spans([rollout_id], which, allow_partial=True)
            told[rollout_id] = left[rollout_id], True
    return told


# -- groups ------------------------------------------------------------------------------------------------------------


async def groups(store: Any, filters: Filters, place: Place, left_open: set[str]) -> AsyncIterator[list[Any]]:
    """Pages of the groups that have ended behind a place; `left_open` are those before it that had not.

    `place` and `left_open` are moved on before each page, so that another export goes on behind it.
    """
    waiting = sorted(left_open)
    for first in range(0, len(waiting), GROUPS):
        page = waiting[first : first + GROUPS]
        found = (await store.query_groups(group_id_in=page)).items
        left_open.difference_update(page)
        left_open.update(group.group_id for group in found if group.status == "open")
        yield [group for group in found if group.status != "open" and filters.fit(group)]

    async def read(limit: int, offset: int) -> tuple[Sequence[Any], int]:
        page = await store.query_groups(limit=limit, offset=offset)
        return page.items, page.total

    while found := await place.next(read, GROUPS, "group_id"):
        left_open.update(group.group_id for group in found if group.status == "open")
        yield [group for group in found if group.status != "open" and filters.fit(group)]


async def members(store: Any, group: Any) -> list[Whole]:
    """The rollouts of a group that are still there, each with its latest attempt and the spans of that."""
    found = (await store.query_rollouts(rollout_id_in=group.members)).items
    by_id = {rollout.rollout_id: rollout for rollout in found}
    ids = [rollout_id for rollout_id in group.members if rollout_id in by_id]
    spans = await _spans_of(store, ids, latest=True)
    made = []
    for rollout_id in ids:
        rollout, (its, is_partial) = by_id[rollout_id], spans[rollout_id]
        attempt = getattr(rollout, "attempt", None)
        attempts, by_attempt = ([], {}) if attempt is None else ([attempt], {attempt.attempt_id: its})
        made.append(Whole(rollout, attempts, by_attempt, is_partial))
    return made
