"""Waiting for rollouts, completions and changes; no polling, one parked call for each.

Not here: what each method means (`raystore.api`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from time import monotonic

from raystore.client.connection import Connection
from raystore.errors import AnswerGoneError, RolloutNotFoundError
from raystore.types import (
    AnyRollout,
    Change,
    Page,
    RolloutMode,
    TagValue,
)
from raystore.wire import checks, convert
from raystore.wire.checks import validated

LOOK_AGAIN_SECONDS = 10.0  #: after which `as_completed` asks whether what it waits for still exists


class WaitingMethods(Connection):
    """Waiting for rollouts, completions and changes; no polling, one parked call for each."""

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[AnyRollout]:
        finished, _ = await self._wait(checks.identifiers("rollout_ids", rollout_ids), timeout)
        return finished

    async def _wait(self, rollout_ids: list[str], timeout: float | None) -> tuple[list[AnyRollout], int]:
        if timeout is not None:
            timeout = max(checks.number("timeout", timeout), 0.0)
        finished, cursor = await self._many("wait", {"rollout_ids": rollout_ids, "timeout": timeout})
        return [convert.to_any_rollout(item) for item in finished], cursor

    async def wait_for_rollout(self, rollout_id: str, timeout: float | None = None) -> AnyRollout | None:
        finished, _ = await self._wait([checks.identifier("rollout_id", rollout_id)], timeout)
        return finished[0] if finished else None

    async def as_completed(
        self, rollout_ids: Sequence[str], *, timeout: float | None = None
    ) -> AsyncIterator[AnyRollout]:
        missing = set(checks.identifiers("rollout_ids", rollout_ids))
        deadline = None if timeout is None else monotonic() + checks.duration("timeout", timeout)
        asked = set(missing)
        finished, cursor, token = await self._sort_out(missing)
        if unknown := sorted(asked - missing):
            raise RolloutNotFoundError(*unknown)
        while True:
            for rollout in finished:
                if rollout.rollout_id in missing:
                    missing.discard(rollout.rollout_id)
                    yield rollout
            if not missing:
                return
            left = LOOK_AGAIN_SECONDS if deadline is None else min(deadline - monotonic(), LOOK_AGAIN_SECONDS)
            if left <= 0:
                raise TimeoutError(f"{len(missing)} of the rollouts had not finished after {timeout} s")
            wanted = {"cursor": cursor, "limit": 256, "timeout": left, "filters": {}, "among": token}
            try:
                items, after = await self._many("completed", wanted)
                finished, cursor = [convert.to_any_rollout(item) for item in items], after or cursor
            except AnswerGoneError:  # the store does not know any more what is waited for
                finished = []
            if not finished:  # some may have been deleted, and will never finish
                finished, cursor, token = await self._sort_out(missing, token)

    async def _sort_out(
        self, missing: set[str], instead_of: int | None = None
    ) -> tuple[list[AnyRollout], int, int | None]:
        """Those that are finished, and how to ask for the others: by a cursor, and by a token of the store's.

        What does not exist is dropped from `missing`.
        """
        items, (cursor, unfinished, token) = await self._many(
            "sort_out", {"rollout_ids": list(missing), "instead_of": instead_of}
        )
        finished = [convert.to_any_rollout(item) for item in items]
        missing &= {*unfinished, *(rollout.rollout_id for rollout in finished)}
        return finished, cursor, token

    async def completed(
        self,
        cursor: int | None = None,
        *,
        limit: int = 256,
        timeout: float = 0.0,
        group_id: str | None = None,
        tags: Mapping[str, TagValue] | None = None,
        queue: str | None = None,
        mode: RolloutMode | None = None,
    ) -> Page[AnyRollout]:
        filters = {
            "group_id": checks.optional_identifier("group_id", group_id),
            "tags": checks.tag_dict("tags", tags),
            "queue": checks.optional_identifier("queue", queue),
            "mode": validated("mode", RolloutMode | None, mode),
        }
        arguments = {
            "cursor": None if cursor is None else checks.whole("cursor", cursor, at_least=0),
            "limit": checks.whole("limit", limit, at_least=1),
            "timeout": checks.duration("timeout", timeout),
            "filters": {name: value for name, value in filters.items() if value is not None},
        }
        items, after = await self._many("completed", arguments)
        return convert.build(Page, {"items": [convert.to_any_rollout(item) for item in items], "cursor": after})

    async def changes(
        self,
        cursor: int | None = None,
        *,
        kinds: Sequence[str] | None = None,
        limit: int = 1024,
        timeout: float = 0.0,
    ) -> Page[Change]:
        arguments = {
            "cursor": None if cursor is None else checks.whole("cursor", cursor, at_least=0),
            "kinds": None if kinds is None else checks.identifiers("kinds", kinds),
            "limit": checks.whole("limit", limit, at_least=1),
            "timeout": checks.duration("timeout", timeout),
        }
        items, after = await self._many("changes", arguments)
        return convert.build(Page, {"items": [convert.to_change(item) for item in items], "cursor": after})
