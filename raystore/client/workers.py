"""Workers: heartbeat, query.

Not here: what each method means (`raystore.api`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raystore.client.connection import Connection
from raystore.types import (
    UNSET,
    FilterLogic,
    PaginatedResult,
    SortOrder,
    Unset,
    Worker,
    WorkerStatus,
)
from raystore.wire import checks, convert


class WorkerMethods(Connection):
    """Workers: heartbeat, query."""

    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        arguments = {
            "status_in": checks.statuses("status_in", list[WorkerStatus], status_in),
            "worker_id_contains": checks.optional_text("worker_id_contains", worker_id_contains),
            "filter_logic": filter_logic,
            "sort_by": checks.optional_text("sort_by", sort_by),
            "sort_order": sort_order,
        }
        return await self._page("query_workers", arguments, limit, offset, convert.to_worker)

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        answer = await self._transport.call("get_worker", {"worker_id": checks.identifier("worker_id", worker_id)})
        return convert.to_worker(answer) if answer else None

    async def update_worker(self, worker_id: str, heartbeat_stats: dict[str, Any] | Unset = UNSET) -> Worker:
        changes: dict[str, Any] = {}
        if not isinstance(heartbeat_stats, Unset):
            if heartbeat_stats is None:
                raise TypeError("heartbeat_stats=None: expected a dict; leave it out to keep the last statistics")
            changes["heartbeat_stats"] = self._encoder.mapping("heartbeat_stats", heartbeat_stats)
        arguments = {"worker_id": checks.identifier("worker_id", worker_id), "changes": changes}
        return convert.to_worker(await self._transport.call("update_worker", arguments))
