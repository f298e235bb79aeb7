"""The methods of a store over a transport: check and encode the arguments, call, decode the answer.

In the order of `raystore.api`, which says what each method means. One implementation for every kind of store. A method
checks its arguments and issues its operation before it first suspends.
Not here: how operations reach a store (`client.local`, `remote.session`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import isfunction
from time import monotonic, sleep
from typing import Any, Literal, Never, Self, TypeVar, cast

from pydantic import BaseModel, ValidationError

from raystore.api import METHODS, LightningStore, NoticeHandler, RunnerStore
from raystore.client import evaluation as evaluating
from raystore.client.claims import Claims
from raystore.client.datasets import streams_of
from raystore.client.evaluation import EvalChannel, Evaluation
from raystore.client.feed import Feed
from raystore.client.pump import Channel
from raystore.client.sync import SyncStore
from raystore.client.taken import selection_of
from raystore.client.transport import PendingCall, Transport, call_past_the_dead, in_thread, run_blocking
from raystore.core.pauses import MOST_PER_MINUTE, MOST_RUNNING
from raystore.core.payload import Opaque, Payload, bounded_error, size_of
from raystore.core.records import Many
from raystore.core.schema import LossReason
from raystore.core.verbs import VERBS
from raystore.errors import (
    AnswerGoneError,
    AttemptOverError,
    FeedHeldError,
    InvalidValueError,
    RolloutNotFoundError,
    StoreError,
)
from raystore.errors.text import NOT_GIVEN, explain_methods, typed_as, unfit
from raystore.reports.log import a_minute, logger_of
from raystore.reports.progress import Progress
from raystore.reports.selection import SelectionReport, selection_report
from raystore.tracing.evidence import Evidence
from raystore.types.contract import (
    LLM,
    UNSET,
    AnyRollout,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    Batch,
    Change,
    EnqueueGroupRequest,
    EnqueueRolloutRequest,
    FilterLogic,
    Finding,
    FoundRollout,
    Group,
    GroupBatch,
    GroupStatus,
    LedgerEntry,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    NamedResources,
    ObjectResource,
    Outcome,
    Page,
    PaginatedResult,
    PromptTemplate,
    ProxyLLM,
    QueueLimit,
    QueuePause,
    Resource,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    SortOrder,
    Span,
    StoreInfo,
    StoreMetrics,
    TagValue,
    TaskInput,
    Unset,
    Worker,
    WorkerStatus,
    warn_caller,
)
from raystore.types.evaluations import EvaluationResult
from raystore.types.feeds import FailureBudget, FailureReward, Sampler
from raystore.types.options import StoreConfig
from raystore.values.closed import are_closed
from raystore.values.models import refusal
from raystore.values.objects import Kept, Origin, Parts
from raystore.wire import checks, convert
from raystore.wire import evaluations as wire_evaluations
from raystore.wire import feeds as wire_feeds
from raystore.wire import groups as wire_groups
from raystore.wire.checks import model_of, validated
from raystore.wire.codec import LARGE_BYTES, Encoded
from raystore.wire.evaluations import Overtaken
from raystore.wire.feeds import Changed, Chooser, Late, Order

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

logger: logging.Logger = logger_of("raystore")

PART_ITEMS = 512  #: a bulk call is cut into parts of at most so many items ...
PART_BYTES = 1024 * 1024  #: ... and so many bytes, so that one caller cannot hold up the others
READ_AGAIN = 3  #: how often a long read starts over after a restart of the store interrupted it
LOOK_AGAIN_SECONDS = 10.0  #: after which whoever waits for rollouts asks whether they still exist
SHOWN_SECONDS = 1.0  #: after which progress is counted again

# Remedies, told in errors.
TO_ENQUEUE = "wrap each task: rs.EnqueueRolloutRequest(input=task)"
TO_ENQUEUE_GROUPS = "wrap each task: rs.EnqueueGroupRequest(input=task, n=8)"
TO_PUBLISH = (
    "give each its name, {'prompt': rs.PromptTemplate(...)}, and wrap a plain value: rs.ObjectResource(value=...)"
)
TO_DERIVE = (
    "an LLM, ProxyLLM, PromptTemplate or ObjectResource; derive your class from one of these and leave its "
    "resource_type as it is, or put it into one: rs.ObjectResource(value=...)"
)
TO_COUNT = "count the versions; what they are called can be told by resources_id"
TO_TRAIN = "pass what take() gave"

_RESOURCE_TYPES = {"llm": LLM, "proxy_llm": ProxyLLM, "prompt_template": PromptTemplate, "object": ObjectResource}
_chain_ids = itertools.count(1)

#: zero_copy would allow forked children to use a store as it is, which no store here can promise.
CAPABILITIES: LightningStoreCapabilities = {
    "thread_safe": True,
    "async_safe": True,
    "zero_copy": False,
    "otlp_traces": False,
}


def store_info(known: dict[str, Any]) -> StoreInfo:
    """The public part of a store's description."""
    names = ("store_id", "name", "namespace", "epoch", "protocol", "node", "limits", "endpoints")
    return StoreInfo(**{name: known[name] for name in names} | {"capabilities": CAPABILITIES})


#: Arguments of reads of spans, by whether pickles stay closed: who looks at a run so leaves no mark on what is read.
_LEAVES_NO_MARK: dict[bool, dict[str, bool]] = {False: {}, True: {"marks": False}}


@dataclass(slots=True)
class Boxed:
    """Resources as they travel, and where their objects went."""

    resources: NamedResources
    objects: list[Kept] = field(default_factory=list)  # one for each object that travels as a reference
    files: list[tuple[str, Parts]] = field(default_factory=list)  # address and bytes of those that the journal keeps
    asked: tuple[int, str] | None = None  # the store's process and our session there, before they were published


class StoreClient(RunnerStore):
    """A store, reached over a transport; may be used with `with` and `async with`, which close it.

    Attributes:
        sync: the methods as blocking calls, in order with the calls that are awaited.
    """

    sync: SyncStore
    _transport: Transport
    _encoder: convert.Encoder
    _objects_at: Origin  # where to find objects that are not in Ray's object store any more
    _feeds: dict[str, Feed]  # by name, the last of each
    _travels: bool = True  # whether it may be pickled

    def _reach(self, transport: Transport, config: StoreConfig, objects_at: Origin) -> None:
        """Use a store of this configuration over a transport."""
        self._transport = transport
        estimator = None if are_closed() else config.estimator()
        self._encoder = convert.Encoder(config.all_limits(), estimator)
        self._objects_at = objects_at
        self._feeds = {}
        self.sync = SyncStore(self)

    # -- what a store is -----------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return CAPABILITIES.copy()

    def otlp_traces_endpoint(self) -> str:
        raise NotImplementedError("This store has no OTLP endpoint; capabilities['otlp_traces'] says so")

    async def statistics(self) -> LightningStoreStatistics:
        answer = await self._transport.call("statistics", {})
        return {"name": type(self).__name__, **answer}  # type: ignore[typeddict-item]

    async def metrics(self, *, seconds: float = 3600.0, versions: int = 100) -> StoreMetrics:
        asked = {
            "seconds": checks.duration("seconds", seconds),
            "versions": checks.whole("versions", versions, at_least=0),
        }
        return cast(StoreMetrics, await self._transport.call("metrics", asked))

    async def story(self, rollout_id: str) -> list[str]:
        return list(await self._transport.call("story", {"rollout_id": checks.identifier("rollout_id", rollout_id)}))

    async def why(
        self, *, rollout_id: str | None = None, group_id: str | None = None, consumer: str | None = None
    ) -> list[Finding]:
        named = {"rollout_id": rollout_id, "group_id": group_id, "consumer": consumer}
        arguments = {name: checks.optional_identifier(name, value) for name, value in named.items()}
        return [_named(Finding, row) for row in await self._transport.call("why", arguments)]

    async def check(self) -> None:
        await self._transport.call("check", {})

    # -- rollouts ------------------------------------------------------------------------------------------------------

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
        worker_id = checks.optional_identifier("worker_id", worker_id)
        return convert.to_attempted_rollout(
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
            raise unfit(StoreClient.enqueue_rollout, unnamed, unknown, input=input)
        request = self._request(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata, rollout_id=rollout_id,
            group_id=group_id, queue=queue, priority=priority, tags=checks.tag_dict("tags", tags),
        )  # fmt: skip
        answer = await self._transport.call("enqueue", {"requests": [request]})
        return convert.to_any_rollout(answer[0])

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        def encoded(given: tuple[int, EnqueueRolloutRequest]) -> dict[str, Any]:
            index, request = given
            if type(request) is not EnqueueRolloutRequest:
                request = validated(f"rollouts[{index}]", EnqueueRolloutRequest, request, TO_ENQUEUE)
            try:
                return self._encoder.request(request)
            except StoreError as error:
                error.args = checks.within(f"rollouts[{index}]", *error.args)
                raise

        listed = checks.listed("rollouts", rollouts, "a list of EnqueueRolloutRequest")
        return await self._enqueue_all(convert.all_of(encoded, enumerate(listed)))

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
        deadline_seconds: float | None = None,
        min_size: int | None = None,
        spare: int = 0,
        replace: int = 0,
    ) -> Sequence[Rollout]:
        rule = wire_groups.rule(n=n, min_size=min_size, spare=spare, replace=replace, deadline_seconds=deadline_seconds)
        fields = {
            "input": input, "mode": mode, "resources_id": resources_id, "config": config, "metadata": metadata,
            "queue": queue, "priority": priority, "tags": checks.tag_dict("tags", tags),
        }  # fmt: skip
        member = model_of(EnqueueRolloutRequest, "", fields)
        request = wire_groups.request(self._encoder, member, group_id, rule)
        answer = await self._transport.call("enqueue_groups", {"groups": [request], "gives": "rollouts"})
        return convert.all_of(convert.to_any_rollout, await self._whole(answer))

    async def enqueue_many_groups(self, groups: Sequence[EnqueueGroupRequest]) -> Sequence[Group]:
        requests = []
        for index, request in enumerate(checks.listed("groups", groups, "a list of EnqueueGroupRequest")):
            if type(request) is not EnqueueGroupRequest:
                request = validated(f"groups[{index}]", EnqueueGroupRequest, request, TO_ENQUEUE_GROUPS)
            try:
                requests.append(wire_groups.request_of(self._encoder, request))
            except StoreError as error:
                error.args = checks.within(f"groups[{index}]", *error.args)
                raise
        named = [request["group_id"] for request in requests if "group_id" in request]
        if len(named) != len(set(named)):
            twice = next(name for name in named if named.count(name) > 1)
            raise InvalidValueError("group_id", twice, "each caller-given id once per call")
        sizes = [size_of(request["member"]["input"]) + size_of(request["member"]["metadata"]) for request in requests]
        answers = await self._in_parts(
            "enqueue_groups",
            [{"groups": requests[i:j], "gives": "groups", "admit": len(requests)} for i, j in cut(sizes)],
        )
        return [convert.to_group(item) for item in await self._whole(answers[-1] if answers else [])]

    async def get_group(self, group_id: str) -> Group | None:
        answer = await self._transport.call("get_group", {"group_id": checks.identifier("group_id", group_id)})
        return convert.to_group(answer) if answer else None

    async def query_groups(
        self,
        *,
        status_in: Sequence[GroupStatus] | None = None,
        group_id_in: Sequence[str] | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Group]:
        arguments = {
            "status_in": checks.statuses("status_in", list[GroupStatus], status_in),
            "group_id_in": None if group_id_in is None else checks.identifiers("group_id_in", group_id_in),
        }
        return await self._page("query_groups", arguments, sort_by, sort_order, limit, offset, convert.to_group)

    def _request(self, **fields: Any) -> dict[str, Any]:
        """The checked and encoded request for a rollout, of the arguments of a call."""
        return self._encoder.request(model_of(EnqueueRolloutRequest, "", fields))

    async def _enqueue_all(self, requests: list[dict[str, Any]]) -> list[Rollout]:
        named = [request["rollout_id"] for request in requests if "rollout_id" in request]
        if len(named) != len(set(named)):
            twice = next(name for name in named if named.count(name) > 1)
            raise InvalidValueError("rollout_id", twice, "each caller-given id once per call")
        sizes = [size_of(request["input"]) + size_of(request["metadata"]) for request in requests]
        answers = await self._in_parts(
            "enqueue",
            [{"requests": requests[first:last], "admit": len(requests)} for first, last in cut(sizes)],
        )
        return convert.all_of(convert.to_any_rollout, await self._whole(answers[-1] if answers else []))

    async def _whole(self, items: Any) -> Any:
        """The items of the answer to a bulk call; a long answer comes in parts, with how many there are."""
        if len(items) > 1 and isinstance(items[1], int):
            items, _ = await self._all_rows(items)
        return items

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
            raise unfit(StoreClient.dequeue_rollout, unnamed, unknown)
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
        names = list(queues) if type(queues) in (list, tuple) else []
        arguments: dict[str, Any] = {"queues": names, "limit": limit, "worker_id": worker_id, "timeout": timeout}
        if not VERBS["dequeue"].fits(arguments) or not 0 < len(names) == len(set(names)):  # which is rare
            arguments = {
                "queues": checks.queue_names(queues),
                "limit": checks.whole("limit", limit, at_least=-(2**31)),
                "worker_id": checks.optional_identifier("worker_id", worker_id),
                "timeout": checks.duration("timeout", timeout),
            }
        claims = await self._transport.call("dequeue", arguments)
        if len(claims) == 1:
            return [convert.to_attempted_rollout(claims[0])]
        return convert.all_of(convert.to_attempted_rollout, claims)

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
            "status_in": checks.statuses(statuses[0], list[RolloutStatus], statuses[1]),
            "rollout_id_in": None if ids[1] is None else checks.identifiers(*ids),
            "rollout_id_contains": checks.optional_text("rollout_id_contains", rollout_id_contains),
            "filter_logic": filter_logic,
            "must": {
                "group_id": checks.optional_identifier("group_id", group_id),
                "tags": checks.tag_dict("tags", tags),
                "queue": checks.optional_identifier("queue", queue),
                "worker_id": checks.optional_identifier("worker_id", worker_id),
                "mode": validated("mode", RolloutMode | None, mode),
            },
        }
        return await self._page("query_rollouts", arguments, sort_by, sort_order, limit, offset, convert.to_any_rollout)

    async def get_rollout_by_id(self, rollout_id: str) -> FoundRollout:
        answer = await self._transport.call("get_rollout", {"rollout_id": checks.identifier("rollout_id", rollout_id)})
        return convert.to_any_rollout(answer) if answer else None

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
            changes["resources_id"] = checks.optional_identifier("resources_id", resources_id)
        if not isinstance(status, Unset):
            changes["status"] = validated("status", RolloutStatus, status)
        if not isinstance(config, Unset):
            changes["config"] = checks.rollout_config("config", validated("config", RolloutConfig, config))
        if not isinstance(metadata, Unset):
            changes["metadata"] = self._encoder.mapping("metadata", metadata)
        arguments = {"rollout_id": checks.identifier("rollout_id", rollout_id), "changes": changes}
        return convert.to_any_rollout(await self._transport.call("update_rollout", arguments))

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
            "rollout_ids": None if rollout_ids is None else checks.identifiers("rollout_ids", rollout_ids),
            "group_id": checks.optional_identifier("group_id", group_id),
            "tags": checks.tag_dict("tags", tags),
        }
        return convert.all_of(convert.to_any_rollout, await self._transport.call("cancel_rollouts", arguments))

    async def requeue(self, rollout_ids: Sequence[str]) -> list[AnyRollout]:
        ids = checks.identifiers("rollout_ids", rollout_ids)
        answer = await self._transport.call("requeue", {"rollout_ids": ids})
        return convert.all_of(convert.to_any_rollout, await self._whole(answer))

    async def release(self, rollout_ids: Sequence[str]) -> int:
        ids = checks.identifiers("rollout_ids", rollout_ids)
        return int(await self._transport.call("release", {"rollout_ids": ids}))

    async def delete_rollouts(self, rollout_ids: Sequence[str]) -> int:
        ids = checks.identifiers("rollout_ids", rollout_ids)
        return int(await self._transport.call("delete_rollouts", {"rollout_ids": ids}))

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def wait_for_rollouts(
        self, *, rollout_ids: Sequence[str], timeout: float | None = None, progress: bool = False
    ) -> list[AnyRollout]:
        ids = checks.identifiers("rollout_ids", rollout_ids)
        if not checks.flag("progress", progress):
            return await self._wait(ids, timeout)
        until = None if timeout is None else monotonic() + checks.number("timeout", timeout)
        with Progress("rollouts") as shown:
            if shown.can_draw:
                await self._show_waiting(shown, ids, until)
            return await self._wait(ids, None if until is None else until - monotonic())

    async def _show_waiting(self, shown: Progress, rollout_ids: list[str], deadline: float | None) -> None:
        """Show how rollouts finish, until all have, or until the deadline (`monotonic`)."""
        finishing, claims = Finishing(self._rows, rollout_ids), Claims(self)
        found, looked = await finishing.look(), monotonic()
        total, done, failed = len(finishing.missing) + len(found), 0, 0
        while True:
            done += len(found)
            failed += sum(rollout.status != "succeeded" for rollout in found)
            shown.update(done, failed=failed, total=total, note=await claims.why_none())
            left = SHOWN_SECONDS if deadline is None else min(deadline - monotonic(), SHOWN_SECONDS)
            if not finishing.missing or left <= 0:
                return
            found = await finishing.next(left)
            if not found and monotonic() - looked > LOOK_AGAIN_SECONDS:
                found, looked = await finishing.look(), monotonic()

    async def wait_for_rollout(self, rollout_id: str, timeout: float | None = None) -> AnyRollout | None:
        finished = await self._wait([checks.identifier("rollout_id", rollout_id)], timeout)
        return finished[0] if finished else None

    async def _wait(self, rollout_ids: list[str], timeout: float | None) -> list[AnyRollout]:
        if timeout is not None:
            timeout = max(checks.number("timeout", timeout), 0.0)
        finished, _ = await self._rows("wait", {"rollout_ids": rollout_ids, "timeout": timeout})
        return convert.all_of(convert.to_any_rollout, finished)

    async def as_completed(
        self, rollout_ids: Sequence[str], *, timeout: float | None = None
    ) -> AsyncIterator[AnyRollout]:
        asked = checks.identifiers("rollout_ids", rollout_ids)
        deadline = None if timeout is None else monotonic() + checks.duration("timeout", timeout)
        finishing = Finishing(self._rows, asked)
        finished = await finishing.look()
        if unknown := sorted({*asked} - finishing.missing - {rollout.rollout_id for rollout in finished}):
            raise RolloutNotFoundError(*unknown)
        while True:
            for rollout in finished:
                yield rollout
            if not finishing.missing:
                return
            left = LOOK_AGAIN_SECONDS if deadline is None else min(deadline - monotonic(), LOOK_AGAIN_SECONDS)
            if left <= 0:
                raise TimeoutError(f"{len(finishing.missing)} of the rollouts had not finished after {timeout} s")
            # Some may have been deleted, and will never finish.
            finished = await finishing.next(left) or await finishing.look()

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
        arguments = {"filters": checks.filter_arguments(mode=mode, tags=tags, queue=queue, group_id=group_id)}
        return await self._feed("completed", arguments, cursor, limit, timeout, convert.to_any_rollout)

    async def changes(
        self,
        cursor: int | None = None,
        *,
        kinds: Sequence[str] | None = None,
        limit: int = 1024,
        timeout: float = 0.0,
    ) -> Page[Change]:
        arguments = {"kinds": None if kinds is None else checks.identifiers("kinds", kinds)}
        return await self._feed("changes", arguments, cursor, limit, timeout, convert.to_change)

    async def _feed(
        self, verb: str, more: dict[str, Any], cursor: int | None, limit: int, timeout: float, made: Callable[[Any], T]
    ) -> Page[T]:
        arguments = more | {
            "cursor": None if cursor is None else checks.whole("cursor", cursor, at_least=0),
            "limit": checks.whole("limit", limit, at_least=1),
            "timeout": checks.duration("timeout", timeout),
        }
        items, after = await self._rows(verb, arguments)
        return convert.build(Page, {"items": list(map(made, items)), "cursor": after})

    # -- holding work back ---------------------------------------------------------------------------------------------

    async def pause(self, queues: Sequence[str] | None = None, keep: bool = False) -> list[QueuePause]:
        return await self._pauses("pause_queues", queues, keep=checks.flag("keep", keep))

    async def resume(self, queues: Sequence[str] | None = None, *, others: bool = False) -> list[QueuePause]:
        return await self._pauses("resume_queues", queues, others=checks.flag("others", others))

    async def _pauses(self, verb: str, queues: Sequence[str] | None, **how: bool) -> list[QueuePause]:
        names = None if queues is None else checks.queue_names(queues)
        return [_named(QueuePause, row) for row in await self._transport.call(verb, {"queues": names, **how})]

    async def limit_queue(
        self, queue: str, *, max_running: int | None = None, per_minute: int | None = None
    ) -> QueueLimit:
        arguments = {
            "queue": checks.identifier("queue", queue),
            "max_running": checks.queue_limit("max_running", max_running, at_most=MOST_RUNNING),
            "per_minute": checks.queue_limit("per_minute", per_minute, at_most=MOST_PER_MINUTE),
        }
        return _named(QueueLimit, await self._transport.call("limit_queue", arguments))

    # -- attempts ------------------------------------------------------------------------------------------------------

    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        arguments = {
            "rollout_id": checks.identifier("rollout_id", rollout_id),
            "worker_id": checks.optional_identifier("worker_id", worker_id),
        }
        return convert.to_attempted_rollout(await self._transport.call("start_attempt", arguments))

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        arguments = {"rollout_id": checks.identifier("rollout_id", rollout_id)}
        return await self._page("query_attempts", arguments, sort_by, sort_order, limit, offset, convert.to_attempt)

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        answer = await self._transport.call(
            "get_latest_attempt", {"rollout_id": checks.identifier("rollout_id", rollout_id)}
        )
        return convert.to_attempt(answer) if answer else None

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
            raise unfit(StoreClient.update_attempt, unnamed, unknown, rollout_id=rollout_id, attempt_id=attempt_id)
        changes: dict[str, Any] = {}
        if not isinstance(status, Unset):
            changes["status"] = checks.attempt_status(status)
        if not isinstance(worker_id, Unset):
            changes["worker_id"] = checks.optional_identifier("worker_id", worker_id)
        if not isinstance(last_heartbeat_time, Unset):
            changes["last_heartbeat_time"] = checks.number("last_heartbeat_time", last_heartbeat_time)
        if not isinstance(metadata, Unset):
            changes["metadata"] = self._encoder.mapping("metadata", metadata)
        arguments = {**checks.attempt_ids(rollout_id, attempt_id), "changes": changes}
        return convert.to_attempt(await self._transport.call("update_attempt", arguments))

    # -- spans ---------------------------------------------------------------------------------------------------------

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        named = checks.attempt_ids(rollout_id, attempt_id)
        return int((await self._transport.call("next_numbers", {"rollout_ids": [named["rollout_id"]]}))[0])

    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        rollout_ids = [rollout_id for rollout_id, _ in checks.id_pairs("rollout_attempt_ids", rollout_attempt_ids)]
        return list(await self._transport.call("next_numbers", {"rollout_ids": rollout_ids}))

    @typed_as(LightningStore.add_span)
    async def add_span(self, span: Span, *unnamed: Never, **unknown: Never) -> Span | None:
        if unnamed or unknown or span is NOT_GIVEN:
            raise unfit(StoreClient.add_span, unnamed, unknown, span=span)
        if type(span) is not Span:
            span = validated("span", Span, span)
        row = self._encoder.span(span)
        arguments = {"rollout_id": span.rollout_id, "attempt_id": span.attempt_id, "spans": [row]}
        ((stored, _),) = await self._transport.call("add_spans", arguments)
        if stored:
            return span
        _log_duplicate(span)
        return None

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        groups: dict[tuple[str, str], list[tuple[Span, list[Any]]]] = {}
        spans = checks.spans(spans)
        for span, row in zip(spans, convert.all_of(self._encoder.span, spans), strict=True):
            groups.setdefault((span.rollout_id, span.attempt_id), []).append((span, row))
        parts: list[list[Span]] = []
        arguments = []
        for (rollout_id, attempt_id), members in groups.items():
            for first, last in cut([size_of(row[8]) for _, row in members]):
                part = members[first:last]
                parts.append([span for span, _ in part])
                rows = [row for _, row in part]
                arguments.append({"rollout_id": rollout_id, "attempt_id": attempt_id, "spans": rows})
        kept: list[Span] = []
        for answer, part_spans in zip(await self._in_parts("add_spans", arguments), parts, strict=True):
            for span, (stored, _) in zip(part_spans, answer, strict=True):
                if stored:
                    kept.append(span)
                else:
                    _log_duplicate(span)
        return kept

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: Any, sequence_id: int | None = None
    ) -> Span | None:
        arguments = checks.attempt_ids(rollout_id, attempt_id)
        number = 0 if sequence_id is None else checks.whole("sequence_id", sequence_id, at_least=0)
        try:
            span = Span.from_opentelemetry(readable_span, **arguments, sequence_id=number)
        except ValidationError as error:
            raise refusal("readable_span", Span, error) from None
        except StoreError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            expected = f"a ReadableSpan of OpenTelemetry (a Span of raystore goes to add_span); {error}"
            raise InvalidValueError("readable_span", readable_span, expected) from None
        if sequence_id is not None:
            return await self.add_span(span)
        rows = [self._encoder.span(span, numbered=False)]
        ((stored, span.sequence_id),) = await self._transport.call("add_spans", {**arguments, "spans": rows})
        if stored:
            return span
        _log_duplicate(span)
        return None

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"] | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        allow_partial: bool = False,
    ) -> PaginatedResult[Span]:
        arguments = {
            "rollout_id": checks.identifier("rollout_id", rollout_id),
            "attempt_id": checks.optional_identifier("attempt_id", attempt_id),
            "equal": _texts("", trace_id=trace_id, span_id=span_id, parent_id=parent_id, name=name),
            "containing": _texts(
                "_contains", trace_id=trace_id_contains, span_id=span_id_contains, parent_id=parent_id_contains,
                name=name_contains,
            ),
            "filter_logic": filter_logic,
            "allow_partial": checks.flag("allow_partial", allow_partial),
            **_LEAVES_NO_MARK[are_closed()],
        }  # fmt: skip
        return await self._page("query_spans", arguments, sort_by, sort_order, limit, offset, convert.to_span)

    async def query_many_spans(
        self,
        rollout_ids: Sequence[str],
        attempt_id: Literal["latest"] | None = "latest",
        *,
        allow_partial: bool = False,
    ) -> dict[str, list[Span]]:
        ids = checks.identifiers("rollout_ids", rollout_ids)
        if attempt_id is not None and checks.optional_text("attempt_id", attempt_id) != "latest":
            raise InvalidValueError("attempt_id", attempt_id, "'latest' or None")
        arguments = {
            "rollout_ids": ids,
            "attempt_id": attempt_id,
            "allow_partial": checks.flag("allow_partial", allow_partial),
            **_LEAVES_NO_MARK[are_closed()],
        }
        found: dict[str, list[Span]] = {rollout_id: [] for rollout_id in ids}
        items, _ = await self._rows("query_many_spans", arguments)
        for span in convert.all_of(convert.to_span, items):
            found[span.rollout_id].append(span)
        return found

    # -- training on each rollout exactly once -------------------------------------------------------------------------

    async def take(
        self,
        n: int,
        *,
        consumer: str,
        timeout: float = 0.0,
        mode: RolloutMode | None = None,
        tags: Mapping[str, TagValue] | None = None,
        queue: str | None = None,
        group_id: str | None = None,
        status_in: Sequence[RolloutStatus] | None = None,
        max_open: int = 1,
    ) -> Batch:
        arguments: dict[str, Any] = {
            "consumer": checks.identifier("consumer", consumer),
            "count": checks.whole("n", n, at_least=1),
            "timeout": checks.duration("timeout", timeout),
            **checks.filter_arguments(mode=mode, tags=tags, queue=queue, group_id=group_id, status_in=status_in),
        }
        items, number = await self._take("take", arguments, max_open)
        rollouts = convert.all_of(convert.to_any_rollout, items)
        return convert.build(Batch, {"consumer": consumer, "number": number, "rollouts": rollouts})

    async def take_groups(
        self,
        n: int,
        *,
        consumer: str,
        timeout: float = 0.0,
        mode: RolloutMode | None = None,
        tags: Mapping[str, TagValue] | None = None,
        queue: str | None = None,
        group_id: str | None = None,
        max_open: int = 1,
    ) -> GroupBatch:
        arguments: dict[str, Any] = {
            "consumer": checks.identifier("consumer", consumer),
            "count": checks.whole("n", n, at_least=1),
            "timeout": checks.duration("timeout", timeout),
            **checks.filter_arguments(mode=mode, tags=tags, queue=queue, group_id=group_id),
        }
        items, number = await self._take("take_groups", arguments, max_open)
        taken = wire_groups.to_taken_groups(items)
        rollouts = [rollout for group in taken for rollout in group.rollouts]
        return convert.build(
            GroupBatch, {"consumer": consumer, "number": number, "rollouts": rollouts, "groups": taken}
        )

    async def _take(self, verb: str, arguments: dict[str, Any], max_open: int) -> tuple[list[Any], int]:
        """What a take gives, and the number of its batch."""
        if checks.whole("max_open", max_open, at_least=1) != 1:
            arguments["max_open"] = max_open
        answer = await call_past_the_dead(self._transport.call, verb, arguments, arguments["timeout"])
        batch = {"consumer": arguments["consumer"], "batch": answer[1]}
        try:
            items, _ = await self._all_rows(answer)
        except AnswerGoneError:  # the store was restarted between the parts of a long answer
            items, _ = await self._rows("get_batch", batch)
        except GeneratorExit:
            raise
        except BaseException:  # its caller has gone between the parts
            self._transport.post("nack", batch)
            raise
        return items, answer[1]

    async def ack(self, batch: Batch, *, step: int, note: str | None = None) -> None:
        named = _batch_key(batch) | {"at_step": checks.whole("step", step, at_least=0)}
        await self._transport.call("ack", named | {"note": checks.optional_text("note", note)})

    async def nack(self, batch: Batch) -> None:
        await self._transport.call("nack", _batch_key(batch))

    async def checkpoint(self, consumer: str, step: int) -> int:
        return int(await self._transport.call("checkpoint", _at_step(consumer, step)))

    async def rewind(self, consumer: str, step: int) -> int:
        return int(await self._transport.call("rewind", _at_step(consumer, step)))

    async def forget_consumer(self, name: str) -> int:
        return int(await self._transport.call("forget_consumer", {"consumer": checks.identifier("name", name)}))

    async def ledger(self, consumer: str) -> list[LedgerEntry]:
        rows, _ = await self._rows("ledger", {"consumer": checks.identifier("consumer", consumer)})
        return [_named(LedgerEntry, row) for row in rows]

    # -- a training loop -----------------------------------------------------------------------------------------------

    def feed(
        self,
        name: str,
        data: Any,
        *,
        resources_id: str,
        size: int,
        batch: int,
        max_lag: int = 1,
        max_running: int | None = None,
        late: Late = "wait",
        order: Order | Chooser = "oldest",
        on_failure: FailureReward | Literal["mask", "replace"] = "mask",
        min_size: int | None = None,
        spare: int = 0,
        race: bool = False,
        replace: int | None = None,
        deadline_seconds: float | None = None,
        epochs: int | None = 1,
        seed: int | None = 0,
        mix: Mapping[str, float] | None = None,
        sampler: Sampler | None = None,
        require: Sequence[Evidence] | None = ("token_ids", "logprobs"),
        batch_tokens: int | None = None,
        max_filtered: int | None = None,
        budget: FailureBudget | None = FailureBudget(),  # noqa: B008 - it is immutable
        config: RolloutConfig | None = None,
        mode: RolloutMode | None = "train",
        queue: str = "default",
        priority: int = 0,
        tags: Mapping[str, TagValue] | None = None,
        changed: Changed = "refuse",
        eval_share: float = wire_feeds.EVAL_SHARE,
    ) -> Feed:
        plan = wire_feeds.plan(
            name, data, resources_id=resources_id, size=size, batch=batch, max_lag=max_lag, max_running=max_running,
            late=late, order=order, on_failure=on_failure, min_size=min_size, spare=spare, race=race, replace=replace,
            deadline_seconds=deadline_seconds, require=require, batch_tokens=batch_tokens, max_filtered=max_filtered,
            budget=budget, config=config, mode=mode, queue=queue, priority=priority, tags=tags, changed=changed,
            eval_share=eval_share,
        )  # fmt: skip
        drawing = wire_feeds.drawing(epochs=epochs, seed=seed, mix=mix, sampler=sampler, data=data)
        streams = streams_of(plan.feed, data, **drawing)
        if (other := self._feeds.get(plan.feed)) is not None and other.is_pumping:
            raise FeedHeldError(plan.feed, "this process")
        for warning in wire_feeds.biases(plan):
            warn_caller(warning)
        channel = Channel(
            ask=self._transport.call, open=partial(call_past_the_dead, self._transport.call), reader=self,
            encoder=self._encoder, take=self._take, put=self._put, travels=self._travels,
        )  # fmt: skip
        made = self._feeds[plan.feed] = Feed(
            plan, streams, drawing["sampler"], channel, drawing["epochs"], self.evaluating()
        )
        return made

    async def selection_report(self, consumer: str, *, since: float | None = None) -> SelectionReport:
        expected = "a time in seconds since the epoch, or None for all of it"
        name = checks.identifier("consumer", consumer)
        start = None if since is None else checks.number("since", since, expected)
        told = await self._transport.call("selection", {"consumer": name, "since": start})
        if "endings" not in told:
            told = await selection_of(self, name, start, told["until"])
        return selection_report(told)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    async def evaluate(
        self,
        name: str,
        items: Any,
        *,
        resources_id: str | None = None,
        version: int | None = None,
        samples: int = 1,
        threshold: float = 0.0,
        failure_reward: float = 0.0,
        eval_share: float = wire_feeds.EVAL_SHARE,
        overtaken: Overtaken = "finish",
        config: RolloutConfig | None = None,
        queue: str = "default",
        priority: int = 0,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Evaluation:
        plan = wire_evaluations.eval_plan(
            name, feed=None, resources_id=resources_id, version=version, samples=samples, threshold=threshold,
            failure_reward=failure_reward, eval_share=eval_share, overtaken=overtaken, config=config, queue=queue,
            priority=priority, tags=tags,
        )  # fmt: skip
        return await evaluating.begin(plan, items, self.evaluating())

    def evaluating(self) -> EvalChannel:
        """What evaluations need of the store."""
        return EvalChannel(
            self._transport.call, self._encoder, self, partial(in_thread, sleep), run_blocking, self._rows
        )

    async def evaluations(self, name: str | None = None) -> list[EvaluationResult]:
        return await self.evaluating().results(name=checks.optional_identifier("name", name))

    async def drop_evaluation(self, name: str, version: int | None = None) -> int:
        arguments = {
            "name": checks.identifier("name", name),
            "version": None if version is None else checks.whole("version", version, at_least=-(2**63)),
        }
        return int(await self._transport.call("drop_evaluation", arguments))

    # -- resources -----------------------------------------------------------------------------------------------------

    async def add_resources(self, resources: NamedResources, *, policy_version: int | None = None) -> ResourcesUpdate:
        return await self._put_resources(None, resources, policy_version)

    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, policy_version: int | None = None
    ) -> ResourcesUpdate:
        return await self._put_resources(checks.identifier("resources_id", resources_id), resources, policy_version)

    async def _put_resources(
        self, resources_id: str | None, resources: NamedResources, policy_version: int | None
    ) -> ResourcesUpdate:
        _check_types(resources)
        named = validated("resources", NamedResources, resources, TO_PUBLISH)
        version = validated("policy_version", int | None, policy_version, TO_COUNT)
        arguments = {"resources_id": resources_id, "policy_version": version}
        return await self._put("put_resources", resources_id, named, arguments)

    async def _put(
        self, verb: str, resources_id: str | None, resources: NamedResources, arguments: dict[str, Any]
    ) -> ResourcesUpdate:
        """Publish resources by an operation that takes these arguments besides."""
        boxed = await self._boxed(resources_id, resources)
        payload, holds_objects = self._encoder.resources(boxed.resources)
        objects = [(kept.address, kept.size) for kept in boxed.objects]
        if isinstance(payload, Payload):  # references within small values are kept nowhere
            objects += [(None, 0)] * (len(payload.refs) - len(objects))
        boxed_as = {"resources": payload, "holds_objects": holds_objects, "objects": objects}
        answer = await self._transport.call(verb, arguments | boxed_as)
        await self._published(convert.row(answer), payload, boxed)
        return self._opened(answer, payload)

    async def get_resources_by_id(self, resources_id: str, version: int | None = None) -> ResourcesUpdate | None:
        arguments = {
            "resources_id": checks.identifier("resources_id", resources_id),
            "version": None if version is None else checks.whole("version", version, at_least=-(2**31)),
        }
        answer = await self._transport.call("get_resources", arguments)
        return self._opened(answer) if answer else None

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        answer = await self._transport.call("get_latest_resources", {})
        return self._opened(answer) if answer else None

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        arguments = {
            "resources_id": checks.optional_identifier("resources_id", resources_id),
            "resources_id_contains": checks.optional_text("resources_id_contains", resources_id_contains),
        }
        return await self._page("query_resources", arguments, sort_by, sort_order, limit, offset, self._opened)

    async def delete_resources(self, resources_id: str) -> None:
        await self._transport.call(
            "delete_resources", {"resources_id": checks.identifier("resources_id", resources_id)}
        )

    async def _boxed(self, resources_id: str | None, resources: NamedResources) -> Boxed:
        """The resources as they travel; a store on Ray moves large objects to Ray's object store."""
        return Boxed(resources)

    async def _published(self, answer: Any, payload: Opaque, boxed: Boxed) -> None:
        """Called once the store has the version, for what must be done with its objects then."""

    def _opened(self, answer: convert.Row, payload: Opaque = None) -> ResourcesUpdate:
        return convert.to_resources(answer, self._objects_at, payload)

    # -- workers -------------------------------------------------------------------------------------------------------

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
        }
        return await self._page("query_workers", arguments, sort_by, sort_order, limit, offset, convert.to_worker)

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

    # -- for runners, pools and integrations ---------------------------------------------------------------------------

    @property
    def session_id(self) -> str:
        return self._transport.session_id

    def listen_for_notices(self, handler: NoticeHandler) -> Callable[[], None]:
        return self._transport.listen_for_notices(handler)

    async def heartbeat(self, attempts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        useless = await self._transport.call("heartbeat", {"attempts_alive": checks.id_pairs("attempts", attempts)})
        return [(rollout_id, attempt_id) for rollout_id, attempt_id in useless]

    async def add_unnumbered_spans(self, spans: Sequence[Span]) -> None:
        spans = checks.spans(spans)
        for first, last in cut([0] * len(spans)):
            rows = [self._encoder.span(span, numbered=False) for span in spans[first:last]]
            arguments = {"rollout_id": spans[0].rollout_id, "attempt_id": spans[0].attempt_id, "spans": rows}
            await self._transport.call("add_spans", arguments)

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
        calls: Mapping[str, Any] | None = None,
    ) -> Attempt:
        changes: dict[str, Any] = {"status": checks.attempt_status(status)}
        if outcome is not None:
            changes["outcome"] = validated("outcome", Outcome, outcome)
        if (said := checks.optional_text("error", error)) is not None:
            changes["error"] = bounded_error(said)  # here already: a longer one would not travel
        if checks.flag("died", died):
            changes["died"] = True
        if calls is not None:
            changes["calls"] = dict(calls)
        rows = [self._encoder.span(span, numbered=False) for span in checks.spans(spans)]
        arguments = {**checks.attempt_ids(rollout_id, attempt_id), "spans": rows, "changes": changes}
        attempt, _ = await self._transport.call("finish", arguments)
        return convert.to_attempt(attempt)

    async def save_state(self, rollout_id: str, attempt_id: str, state: Any, spans: Sequence[Span] = ()) -> None:
        ids = checks.attempt_ids(rollout_id, attempt_id)
        payload = self._encoder.state(state)
        rows = [self._encoder.span(span, numbered=False) for span in checks.spans(spans)]
        parts = cut([size_of(row[8]) for row in rows])
        calls = []
        try:
            # A journal keeps the bytes of a call as long as a span of it may be read: a large state goes alone.
            if len(parts) > 1 or size_of(payload) > LARGE_BYTES:
                calls = [self._transport.post("add_spans", ids | {"spans": rows[i:j]}) for i, j in parts]
                rows = []
            calls.append(self._transport.post("save", ids | {"saved_state": payload, "spans": rows}))
            for call in calls:
                await call
        except AttemptOverError:  # the state is refused with all that came with it; spans of such an attempt are late
            if rows:
                await self._transport.call("add_spans", ids | {"spans": rows})
            raise
        except BaseException:
            for call in calls:
                self._transport.abandon(call)
            raise

    async def get_saved_state(self, rollout_id: str, attempt_id: str, *, encoded: bool = False) -> Any:
        is_encoded = checks.flag("encoded", encoded)
        payload = await self._transport.call("get_saved", checks.attempt_ids(rollout_id, attempt_id))
        if payload is None:
            return None
        return Encoded(payload) if is_encoded else convert.to_state(payload, rollout_id)

    async def refresh_attempt(self, rollout_id: str, attempt_id: str) -> tuple[str, int, int | None] | None:
        newer = await self._transport.call("refresh", checks.attempt_ids(rollout_id, attempt_id))
        return None if newer is None else (newer[0], newer[1], newer[2])

    async def report_unread(
        self, rollout_id: str, attempt_id: str, resources_id: str, version: int, *, error: str
    ) -> None:
        arguments = {"rollout_id": rollout_id, "attempt_id": attempt_id, "resources_id": resources_id}
        await self._transport.call("unread", arguments | {"version": version, "error": error})

    async def report_spans_lost(self, counts: Mapping[LossReason, int]) -> None:
        lost = {reason: checks.whole(f"counts[{reason!r}]", number, at_least=1) for reason, number in counts.items()}
        await self._transport.call("report_spans_lost", {"counts": lost})

    async def report_ended(
        self, session_id: str | None, *, worker_id: str | None = None, stopped: bool = False
    ) -> bool:
        arguments: dict[str, Any] = {
            "session_id": checks.optional_identifier("session_id", session_id),
            "worker_id": checks.optional_identifier("worker_id", worker_id),
        }
        if checks.flag("stopped", stopped):
            arguments["stopped"] = True
        return bool(await self._transport.call("report_session", arguments))

    async def report_pool(self, pool_id: str, queues: Sequence[str], *, failures: int, error: str | None) -> None:
        arguments = {
            "pool_id": checks.identifier("pool_id", pool_id),
            "queues": checks.queue_names(queues),
            "failures": checks.whole("failures", failures, at_least=0),
            "error": checks.optional_text("error", error),
        }
        await self._transport.call("report_pool", arguments)

    # -- how calls travel ----------------------------------------------------------------------------------------------

    async def _page(
        self,
        verb: str,
        filters: dict[str, Any],
        sort_by: str | None,
        sort_order: SortOrder,
        limit: int,
        offset: int,
        made: Callable[[Any], T],
    ) -> PaginatedResult[T]:
        part = {
            "limit": checks.whole("limit", limit, at_least=-1),
            "offset": checks.whole("offset", offset, at_least=0),
        }
        order = {"sort_by": checks.optional_text("sort_by", sort_by), "sort_order": sort_order}
        items, total = await self._rows(verb, filters | order | part)
        return convert.build(PaginatedResult, {"items": convert.all_of(made, items), **part, "total": total})

    async def _rows(self, verb: str, arguments: dict[str, Any], tries: int = READ_AGAIN) -> tuple[list[Any], Any]:
        """Read all pages of an answer, and the value beside its rows; starts over if the store restarts meanwhile."""
        answer = await self._transport.call(verb, arguments)
        try:
            return await self._all_rows(answer)
        except AnswerGoneError:
            if not tries:
                raise
        return await self._rows(verb, arguments, tries - 1)

    async def _all_rows(self, answer: Any) -> tuple[list[Any], Any]:
        """All rows of an answer, of which an actor has sent the first part. Raises `AnswerGoneError`."""
        if isinstance(answer, Many):
            return answer.items, answer.total
        items, beside, *more = answer
        token = more[0] if more else None
        while token is not None:
            part, _, token = await self._transport.call("more", {"token": token})
            items += part
        return items, beside

    async def _in_parts(self, verb: str, parts: list[dict[str, Any]]) -> list[Any]:
        """Issue the parts of a bulk call together, and return their answers; once one is refused, so are the others.

        If the caller is cancelled, parts that have not left yet are taken back.
        """
        chain_id = next(_chain_ids)
        if len(parts) > 1:
            parts = [part | {"chain": [chain_id, part is parts[-1]]} for part in parts]
        calls = [self._transport.post(verb, part) for part in parts]
        for call in calls[1:]:
            call.leader = calls[0]
        try:
            return [await call for call in calls]
        except BaseException as error:
            for call in calls:
                self._transport.abandon(call)
            if len(calls) > 1 and not isinstance(error, (Exception, GeneratorExit)):
                self._transport.tell("end_chain", {"chain_id": chain_id})
            raise

    # -- ending --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop using the store: calls that wait get what there is, and later ones raise `StoreClosedError`."""
        self._close_feeds()
        self._transport.close()

    def _close_feeds(self) -> None:
        """End the threads of feeds."""
        for feed in self._feeds.values():
            feed.close_now()
        self._feeds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


class Finishing:
    """Rollouts in the order in which they finish, each once.

    Attributes:
        missing: ids of those that have not finished; of those only that exist.
    """

    def __init__(
        self, rows: Callable[[str, dict[str, Any]], Coroutine[Any, Any, tuple[list[Any], Any]]], rollout_ids: list[str]
    ) -> None:
        self.missing: set[str] = set(rollout_ids)
        self._rows = rows
        self._cursor = 0
        self._token: int | None = None  # of the store's, by which it knows which are missing

    async def look(self) -> list[AnyRollout]:
        """Those that have finished by now; also finds out which have been deleted."""
        wanted = {"rollout_ids": list(self.missing), "instead_of": self._token}
        items, (self._cursor, unfinished, self._token) = await self._rows("sort_out", wanted)
        finished = convert.all_of(convert.to_any_rollout, items)
        self.missing.intersection_update(unfinished)
        return finished

    async def next(self, seconds: float) -> list[AnyRollout]:
        """Those that finish next; empty after so many seconds."""
        wanted = {"cursor": self._cursor, "limit": 256, "timeout": seconds, "filters": {}, "among": self._token}
        try:
            items, after = await self._rows("completed", wanted)
        except AnswerGoneError:  # the store has forgotten the token
            return await self.look()
        self._cursor = after or self._cursor
        finished = [one for one in convert.all_of(convert.to_any_rollout, items) if one.rollout_id in self.missing]
        self.missing.difference_update(rollout.rollout_id for rollout in finished)
        return finished


class Testing:
    """What tests may do to a store and production code must not: `store.testing`, for `clock="manual"`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def tick(self, seconds: float, *, sessions: bool = False) -> PendingCall:
        """Move the store's clock on by `seconds`; `sessions` moves the clock of claims and sessions as well.

        Takes effect in the order of this process's operations, awaited or not. Raises `InvalidValueError` if the
        store's clock is not manual.
        """
        return self._transport.post("tick", {"seconds": float(seconds), "sessions": sessions})


def cut(sizes: list[int]) -> list[tuple[int, int]]:
    """Cut a list of items of these sizes in bytes into parts: index of the first item, and behind the last."""
    cuts, size = [0], 0
    for index, item in enumerate(sizes):
        if index > cuts[-1] and (index - cuts[-1] == PART_ITEMS or size + item > PART_BYTES):
            cuts.append(index)
            size = 0
        size += item
    ends = [*cuts[1:], len(sizes)]
    return [(first, last) for first, last in zip(cuts, ends, strict=True) if last > first]


def _texts(suffix: str, **fields: str | None) -> dict[str, str | None]:
    """Those texts to look for that are given, by field; the name of an argument is the field's with the suffix."""
    return {name: checks.optional_text(name + suffix, text) for name, text in fields.items() if text is not None}


def _named(model: type[M], row: Sequence[Any]) -> M:
    """A record of a row with its fields, in their order."""
    return convert.build(model, dict(zip(model.model_fields, row, strict=True)))


def _log_duplicate(span: Span) -> None:
    logger.error(
        "Duplicated span added: span %s of attempt %s of rollout %s is stored already",
        span.span_id, span.attempt_id, span.rollout_id, extra=a_minute("duplicate"),
    )  # fmt: skip


def _batch_key(batch: Batch) -> dict[str, object]:
    fields = validated("batch", Batch, batch, TO_TRAIN).__dict__  # possibly changed since, or made without validation
    return {
        "consumer": checks.identifier("batch.consumer", fields.get("consumer")),
        "batch": checks.whole("batch.number", fields.get("number"), at_least=0),
    }


def _at_step(consumer: str, step: int) -> dict[str, object]:
    return {"consumer": checks.identifier("consumer", consumer), "at_step": checks.whole("step", step, at_least=0)}


def _check_types(resources: Any) -> None:
    """Refuse a type of resource that a user made up; `validated` tells of values that are no resources."""
    for name, resource in resources.items() if isinstance(resources, Mapping) else ():
        if isinstance(resource, Resource) and not isinstance(
            resource, _RESOURCE_TYPES.get(str(vars(resource).get("resource_type")), ())
        ):
            raise InvalidValueError(f"resources[{name!r}]", resource, TO_DERIVE)


def _document() -> None:
    """Give each method the docstring of the contract, for `help` and editors."""
    for name, told in {**vars(LightningStore), **vars(RunnerStore)}.items():
        method = vars(StoreClient).get(name)
        if isfunction(method) and method.__doc__ is None:
            method.__doc__ = told.__doc__


_document()
explain_methods(StoreClient, METHODS)
