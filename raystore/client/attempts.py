"""Attempts: start, query, update.

Not here: what each method means (`raystore.api`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Never

from raystore.api import LightningStore
from raystore.client.connection import Connection
from raystore.core.payload import bounded_error
from raystore.errors.calls import NOT_GIVEN, typed_as, unfit
from raystore.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    Outcome,
    PaginatedResult,
    SortOrder,
    Span,
    Unset,
)
from raystore.wire import convert
from raystore.wire.convert import validated


class AttemptMethods(Connection):
    """Attempts: start, query, update."""

    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        arguments = {
            "rollout_id": convert.identifier("rollout_id", rollout_id),
            "worker_id": convert.optional_identifier("worker_id", worker_id),
        }
        return convert.attempted(await self._transport.call("start_attempt", arguments))

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        arguments = {
            "rollout_id": convert.identifier("rollout_id", rollout_id),
            "sort_by": convert.optional_text("sort_by", sort_by),
            "sort_order": sort_order,
        }
        return await self._page("query_attempts", arguments, limit, offset, convert.attempt)

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        answer = await self._transport.call(
            "get_latest_attempt", {"rollout_id": convert.identifier("rollout_id", rollout_id)}
        )
        return convert.attempt(answer) if answer else None

    async def finish_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        spans: Sequence[Span],
        status: AttemptStatus,
        *,
        outcome: Outcome | None = None,
        error: str | None = None,
        died: bool = False,
    ) -> Attempt:
        """The last spans of an attempt and its final status in one step; spans are numbered by the store.

        For runners. `outcome` says why it ended (None: what the status implies), `error` is kept on the attempt. With
        outcome "runner_lost" the work is given back; `died` says that a process which ran nothing else died of it,
        which counts as a delivery (`max_deliveries`). A span that is refused refuses the whole.
        """
        changes: dict[str, Any] = {"status": convert.attempt_status(status)}
        if outcome is not None:
            changes["outcome"] = validated("outcome", Outcome, outcome)
        if (said := convert.optional_text("error", error)) is not None:
            changes["error"] = bounded_error(said)  # here already: a longer one would not travel
        if convert.flag("died", died):
            changes["died"] = True
        rows = [self._encoder.span(span, numbered=False) for span in convert.spans(spans)]
        arguments = {**convert.names(rollout_id, attempt_id), "spans": rows, "changes": changes}
        attempt, _ = await self._transport.call("finish", arguments)
        return convert.attempt(attempt)

    async def report_unread(
        self, rollout_id: str, attempt_id: str, resources_id: str, version: int, *, error: str
    ) -> None:
        """Say that an attempt could not read its resources: it ends without a charge, and is offered again.

        For runners. Once two processes have said so of a version, or who published it has ended, what waits for it is
        held back until it is published again.
        """
        arguments = {"rollout_id": rollout_id, "attempt_id": attempt_id, "resources_id": resources_id}
        await self._transport.call("unread", arguments | {"version": version, "error": error})

    async def heartbeat(self, attempts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Signs of life for (rollout id, attempt id) pairs, stamped by the store.

        Answers with those whose work is of no use any more: superseded, finished, or deleted.
        """
        useless = await self._transport.call("heartbeat", {"attempts_alive": convert.pairs("attempts", attempts)})
        return [(rollout_id, attempt_id) for rollout_id, attempt_id in useless]

    @typed_as(LightningStore.update_attempt)
    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"],
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | Unset | None = UNSET,
        last_heartbeat_time: float | Unset = UNSET,
        metadata: dict[str, Any] | Unset | None = UNSET,
        *unnamed: Never,
        **unknown: Never,
    ) -> Attempt:
        if unnamed or unknown or attempt_id is NOT_GIVEN or rollout_id is NOT_GIVEN:
            raise unfit(AttemptMethods.update_attempt, unnamed, unknown, rollout_id=rollout_id, attempt_id=attempt_id)
        changes: dict[str, Any] = {}
        if not isinstance(status, Unset):
            changes["status"] = convert.attempt_status(status)
        if not isinstance(worker_id, Unset):
            changes["worker_id"] = convert.optional_identifier("worker_id", worker_id)
        if not isinstance(last_heartbeat_time, Unset):
            changes["last_heartbeat_time"] = convert.finite("last_heartbeat_time", last_heartbeat_time)
        if not isinstance(metadata, Unset):
            changes["metadata"] = self._encoder.mapping("metadata", metadata)
        arguments = {**convert.names(rollout_id, attempt_id), "changes": changes}
        return convert.attempt(await self._transport.call("update_attempt", arguments))
