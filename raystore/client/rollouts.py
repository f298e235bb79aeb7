"""Rollouts: enqueue, claim, query, update, cancel, release, delete.

Not here: what each method means (`raystore.api`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Never
from uuid import uuid4

from raystore.api import LightningStore
from raystore.client.connection import Connection, cut
from raystore.core.payload import size_of
from raystore.errors import InvalidValueError, StoreError
from raystore.errors.calls import NOT_GIVEN, typed_as, unfit
from raystore.types import (
    UNSET,
    AnyRollout,
    AttemptedRollout,
    EnqueueRolloutRequest,
    FilterLogic,
    FoundRollout,
    PaginatedResult,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    SortOrder,
    TagValue,
    TaskInput,
    Unset,
)
from raystore.wire import convert
from raystore.wire.convert import made, validated

TO_ENQUEUE = "wrap each task: rs.EnqueueRolloutRequest(input=task)"
GROUP_ITEMS = 1_000_000  #: rollouts of one group, made by one call


class RolloutMethods(Connection):
    """Rollouts: enqueue, claim, query, update, cancel, release, delete."""

    def _request(self, **fields: Any) -> dict[str, Any]:
        """What makes a rollout, of the arguments of a call."""
        return self._encoder.request(made(EnqueueRolloutRequest, "", fields))

    async def start_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> AttemptedRollout:
        request = self._request(input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata)
        worker_id = convert.optional_identifier("worker_id", worker_id)
        return convert.attempted(
            await self._transport.call("start_rollout", {"request": request, "worker_id": worker_id})
        )

    @typed_as(LightningStore.enqueue_rollout)
    async def enqueue_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        *unnamed: Never,
        rollout_id: str | None = None,
        group_id: str | None = None,
        queue: str = "default",
        priority: int = 0,
        tags: Mapping[str, TagValue] | None = None,
        **unknown: Never,
    ) -> Rollout:
        if unnamed or unknown or input is NOT_GIVEN:
            raise unfit(RolloutMethods.enqueue_rollout, unnamed, unknown, input=input)
        request = self._request(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata, rollout_id=rollout_id,
            group_id=group_id, queue=queue, priority=priority, tags=convert.tag_dict("tags", tags),
        )  # fmt: skip
        answer = await self._transport.call("enqueue", {"requests": [request]})
        return convert.pair(answer[0])

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        requests = []
        for index, request in enumerate(convert.listed("rollouts", rollouts, "a list of EnqueueRolloutRequest")):
            if type(request) is not EnqueueRolloutRequest:
                request = validated(f"rollouts[{index}]", EnqueueRolloutRequest, request, TO_ENQUEUE)
            try:
                requests.append(self._encoder.request(request))
            except StoreError as error:
                raise type(error)(*convert.within(f"rollouts[{index}]", *error.args)) from error.__cause__
        return await self._enqueue_all(requests)

    async def _enqueue_all(self, requests: list[dict[str, Any]]) -> list[Rollout]:
        named = [request["rollout_id"] for request in requests if "rollout_id" in request]
        if len(named) != len(set(named)):
            twice = next(name for name in named if named.count(name) > 1)
            raise InvalidValueError("rollout_id", twice, "each caller-given id once per call")
        sizes = [size_of(request["input"]) + size_of(request["metadata"]) for request in requests]
        answers = await self._parts(
            "enqueue",
            [{"requests": requests[first:last], "admit": len(requests)} for first, last in cut(sizes)],
        )
        items = answers[-1] if answers else []
        if len(items) > 1 and isinstance(items[1], int):  # a long answer, with how many there are
            items, _ = await self._whole(items)
        return [convert.pair(item) for item in items]

    async def enqueue_group(
        self,
        input: TaskInput,
        n: int,
        *,
        group_id: str | None = None,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        queue: str = "default",
        priority: int = 0,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Sequence[Rollout]:
        n = convert.whole("n", n, at_least=1)
        if n > GROUP_ITEMS:
            raise InvalidValueError("n", n, f"at most {GROUP_ITEMS:,} rollouts in one call")
        group_id = f"group-{uuid4().hex[:12]}" if group_id is None else group_id
        request = self._request(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata,
            group_id=group_id, queue=queue, priority=priority, tags=convert.tag_dict("tags", tags),
        )  # fmt: skip
        return await self._enqueue_all([request] * n)

    @typed_as(LightningStore.dequeue_rollout)
    async def dequeue_rollout(
        self,
        worker_id: str | None = None,
        *unnamed: Never,
        timeout: float = 0.0,
        queues: Sequence[str] = ("default",),
        **unknown: Never,
    ) -> AttemptedRollout | None:
        if unnamed or unknown:
            raise unfit(RolloutMethods.dequeue_rollout, unnamed, unknown)
        claimed = await self._claim(1, worker_id, timeout, queues)
        return claimed[0] if claimed else None

    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        timeout: float = 0.0,
        queues: Sequence[str] = ("default",),
    ) -> Sequence[AttemptedRollout]:
        return await self._claim(limit, worker_id, timeout, queues)

    async def _claim(
        self, limit: int, worker_id: str | None, timeout: float, queues: Sequence[str]
    ) -> list[AttemptedRollout]:
        arguments = {
            "queues": convert.queue_names(queues),
            "limit": convert.whole("limit", limit, at_least=-(2**31)),
            "worker_id": convert.optional_identifier("worker_id", worker_id),
            "timeout": convert.duration("timeout", timeout),
        }
        return [convert.attempted(claim) for claim in await self._transport.call("dequeue", arguments)]

    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus] | None = None,
        rollout_ids: Sequence[str] | None = None,
        group_id: str | None = None,
        tags: Mapping[str, TagValue] | None = None,
        queue: str | None = None,
        worker_id: str | None = None,
        mode: RolloutMode | None = None,
    ) -> PaginatedResult[AnyRollout]:
        statuses = ("status", status) if status_in is None else ("status_in", status_in)
        ids = ("rollout_ids", rollout_ids) if rollout_id_in is None else ("rollout_id_in", rollout_id_in)
        arguments = {
            "status_in": convert.statuses(statuses[0], list[RolloutStatus], statuses[1]),
            "rollout_id_in": None if ids[1] is None else convert.identifiers(*ids),
            "rollout_id_contains": convert.optional_text("rollout_id_contains", rollout_id_contains),
            "filter_logic": filter_logic,
            "must": {
                "group_id": convert.optional_identifier("group_id", group_id),
                "tags": convert.tag_dict("tags", tags),
                "queue": convert.optional_identifier("queue", queue),
                "worker_id": convert.optional_identifier("worker_id", worker_id),
                "mode": validated("mode", RolloutMode | None, mode),
            },
            "sort_by": convert.optional_text("sort_by", sort_by),
            "sort_order": sort_order,
        }
        return await self._page("query_rollouts", arguments, limit, offset, convert.pair)

    async def get_rollout_by_id(self, rollout_id: str) -> FoundRollout:
        answer = await self._transport.call("get_rollout", {"rollout_id": convert.identifier("rollout_id", rollout_id)})
        return convert.pair(answer) if answer else None

    async def update_rollout(
        self,
        rollout_id: str,
        input: TaskInput | Unset = UNSET,
        mode: RolloutMode | Unset | None = UNSET,
        resources_id: str | Unset | None = UNSET,
        status: RolloutStatus | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: dict[str, Any] | Unset | None = UNSET,
    ) -> AnyRollout:
        changes: dict[str, Any] = {}
        if not isinstance(input, Unset):
            changes["input"] = self._encoder.task(input)
        if not isinstance(mode, Unset):
            changes["mode"] = validated("mode", RolloutMode | None, mode)
        if not isinstance(resources_id, Unset):
            changes["resources_id"] = convert.optional_identifier("resources_id", resources_id)
        if not isinstance(status, Unset):
            changes["status"] = validated("status", RolloutStatus, status)
        if not isinstance(config, Unset):
            changes["config"] = self._encoder.config(validated("config", RolloutConfig, config))
        if not isinstance(metadata, Unset):
            changes["metadata"] = self._encoder.mapping("metadata", metadata)
        arguments = {"rollout_id": convert.identifier("rollout_id", rollout_id), "changes": changes}
        return convert.pair(await self._transport.call("update_rollout", arguments))

    async def cancel_rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        group_id: str | None = None,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Sequence[AnyRollout]:
        if rollout_ids is None and group_id is None and not tags:
            raise InvalidValueError("rollout_ids", None, "rollout_ids, group_id or tags, to say what to cancel")
        arguments = {
            "rollout_ids": None if rollout_ids is None else convert.identifiers("rollout_ids", rollout_ids),
            "group_id": convert.optional_identifier("group_id", group_id),
            "tags": convert.tag_dict("tags", tags),
        }
        return [convert.pair(item) for item in await self._transport.call("cancel_rollouts", arguments)]

    async def release(self, rollout_ids: Sequence[str]) -> int:
        ids = convert.identifiers("rollout_ids", rollout_ids)
        return int(await self._transport.call("release", {"rollout_ids": ids}))

    async def delete_rollouts(self, rollout_ids: Sequence[str]) -> int:
        ids = convert.identifiers("rollout_ids", rollout_ids)
        return int(await self._transport.call("delete_rollouts", {"rollout_ids": ids}))
