"""The LightningStore contract: every method a store has, and what an implementation must do.

Signatures are agent-lightning 0.3.0's with the keyword names of both generations, then raystore's additions, whose
defaults give the contract's behaviour. `raystore.client` implements them once, over a transport; `raystore._sync` is
generated from this file.

Rules that hold for every method:

- It is `async def`; arguments are validated and taken by value before the first suspension, so that calls take effect
  in the order in which they were issued, also when they are not awaited.
- A malformed value raises `InvalidValueError`, a call that does not fit a TypeError, and both change nothing. Ids are
  text of 1 to 512 characters without control characters, wherever one is asked for; None clears, or leaves open.
- Reads and waits are lenient about unknown ids (empty, None, or skipped), but for `as_completed`; writes raise a
  `ValueError`.
- Answers are snapshots. A rollout comes with its latest attempt, as an `AttemptedRollout`; one that has none comes as a
  plain `Rollout`, which has no `attempt`.
- Times are in seconds since the epoch, by the store's clock; durations are in seconds.
- Time is caught up with first: what has timed out by now is seen as timed out.
- `StoreUnavailableError`, `StoreClosedError` and `OutcomeUnknownError` may come from any method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from inspect import isfunction
from typing import Any, Literal

from raystore.tracing.losses import Reason
from raystore.types import (
    UNSET,
    AnyRollout,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    Batch,
    Change,
    EnqueueRolloutRequest,
    FilterLogic,
    FoundRollout,
    LedgerEntry,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    NamedResources,
    Outcome,
    Page,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    SortOrder,
    Span,
    TagValue,
    TaskInput,
    Unset,
    Worker,
    WorkerStatus,
)


class LightningStore(ABC):
    """The control plane of agent RL: rollouts, attempts, spans, resources, workers."""

    # -- what a store is ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def capabilities(self) -> LightningStoreCapabilities:
        """What this store allows: use from several threads and event loops, zero-copy passing, an OTLP endpoint."""

    @abstractmethod
    def otlp_traces_endpoint(self) -> str:
        """URL that takes OTLP traces; raises NotImplementedError unless the capability is offered."""

    @abstractmethod
    async def statistics(self) -> LightningStoreStatistics:
        """Counts and sizes of the store."""

    @abstractmethod
    async def story(self, rollout_id: str) -> list[str]:
        """What is still known of a rollout's history, a line for each thing, for people to read."""

    @abstractmethod
    async def check(self) -> None:
        """Verify every invariant of the store; raises AssertionError. For tests: it walks everything."""

    # -- rollouts ----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def start_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> AttemptedRollout:
        """Make a rollout that its caller runs now: status preparing with a first attempt, never queued.

        `resources_id` None means the latest resources; no other id is checked. `config` None means the store's
        `default_config`. With `worker_id` the worker is recorded as busy.
        """

    @abstractmethod
    async def enqueue_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        *,
        rollout_id: str | None = None,
        group_id: str | None = None,
        queue: str = "default",
        priority: int = 0,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Rollout:
        """Put a rollout at the tail of its queue, status queuing.

        `rollout_id` makes the call repeatable: the same content again (in any order of keys; see `values.content`)
        returns the rollout that exists, other content raises `ConflictError`. A higher `priority` is
        claimed first. `group_id` and `tags` (at most 16) are indexed; when absent, a well-formed one is lifted from
        `metadata`. Raises `OverloadedError` when `max_queued` is reached.
        """

    @abstractmethod
    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        """Enqueue many, in order; the answers are in the order of the requests.

        Validated, admitted against `max_queued` and enqueued as a whole; "latest resources" is resolved once. What
        exists already does not count against `max_queued`, so that the call can be repeated.
        """

    @abstractmethod
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
        """Enqueue `n` rollouts of one prompt under one group id (made up when None), as GRPO needs them."""

    @abstractmethod
    async def dequeue_rollout(
        self, worker_id: str | None = None, *, timeout: float = 0.0, queues: Sequence[str] = ("default",)
    ) -> AttemptedRollout | None:
        """Claim the next rollout: it gets a new attempt and becomes preparing. None if none comes within `timeout`.

        Queues are tried in the order given. The claim is acknowledged behind the scenes once its caller has it;
        a caller that is cancelled or dies before that loses nothing: the rollout goes back to its old place.
        A negative or NaN `timeout` raises `ValueError`.
        """

    @abstractmethod
    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        timeout: float = 0.0,
        queues: Sequence[str] = ("default",),
    ) -> Sequence[AttemptedRollout]:
        """Claim up to `limit` rollouts that wait now; waits up to `timeout` for the first. `[]` when there is none."""

    @abstractmethod
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
        """Rollouts that match, in insertion order unless sorted; with attempts as `AttemptedRollout`.

        `filter_logic` joins the first three filters; group, tags, queue, worker and mode always apply. An empty list
        matches nothing. `limit` -1 means all. `status` and `rollout_ids` are the 0.2 names of the first two.
        """

    @abstractmethod
    async def get_rollout_by_id(self, rollout_id: str) -> FoundRollout:
        """The rollout, with its latest attempt if it has one; None when unknown."""

    @abstractmethod
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
        """Set fields by hand; UNSET leaves a field as it is, None is a value (not for status and config).

        Any status may follow any other. A finished status sets `end_time` and wakes waiters; queuing and requeuing put
        the rollout at the tail of its queue unless it waits already, and clear `end_time`. Attempts and workers stay
        as they are; the holder of a running attempt is told. Raises `RolloutNotFoundError`.
        """

    @abstractmethod
    async def cancel_rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        group_id: str | None = None,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Sequence[AnyRollout]:
        """Cancel those that have not finished and return them; what is given of ids, group and tags must all match.

        A running attempt fails with outcome "cancelled" and its holder is told. A cancelled rollout is never
        resurrected by late reports; only `update_rollout` and `start_attempt` leave cancelled.
        """

    @abstractmethod
    async def release(self, rollout_ids: Sequence[str]) -> int:
        """Say that nobody needs these rollouts any longer: first to be evicted or deleted. How many were newly so.

        What a known consumer awaits or holds (`take`) is kept for it all the same, until it is done with it.
        """

    @abstractmethod
    async def delete_rollouts(self, rollout_ids: Sequence[str]) -> int:
        """Delete rollouts with their attempts and spans; how many there were."""

    # -- waiting -----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[AnyRollout]:
        """Those of the rollouts that are finished when all are, or after `timeout`; in the order given.

        None waits without limit, `timeout` <= 0 is a snapshot, NaN raises `ValueError`. Unknown ids are skipped.
        Costs one parked call whatever the number of ids.
        """

    @abstractmethod
    async def wait_for_rollout(self, rollout_id: str, timeout: float | None = None) -> AnyRollout | None:
        """The rollout once it has finished, None if it has not within `timeout` or does not exist."""

    @abstractmethod
    def as_completed(self, rollout_ids: Sequence[str], *, timeout: float | None = None) -> AsyncIterator[AnyRollout]:
        """Iterate over the rollouts as they finish. Raises TimeoutError when `timeout` passes before all have.

        Raises `RolloutNotFoundError` at once, and gives none, if some do not exist. What is deleted while it is waited
        for is not waited for any longer.
        """

    @abstractmethod
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
        """Finished rollouts that follow `cursor`, in completion order; None starts at the beginning.

        Waits up to `timeout` when there is none. A rollout that finishes again comes again. The cursor of the answer
        resumes exactly, also in another process.
        """

    @abstractmethod
    async def changes(
        self,
        cursor: int | None = None,
        *,
        kinds: Sequence[str] | None = None,
        limit: int = 1024,
        timeout: float = 0.0,
    ) -> Page[Change]:
        """What the store did after `cursor`, in order; None starts at the oldest change that is kept (100,000).

        Waits up to `timeout` when there is nothing. Raises `CursorTooOldError`, which names the oldest.
        """

    # -- attempts ----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        """Start another attempt by hand, from any status and whatever `max_attempts` says; the rollout is preparing.

        An attempt that still ran is superseded. Raises `RolloutNotFoundError`.
        """

    @abstractmethod
    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        """The attempts of a rollout; empty when unknown."""

    @abstractmethod
    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """The attempt with the highest sequence id; None when there is none."""

    @abstractmethod
    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"],
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | Unset | None = UNSET,
        last_heartbeat_time: float | Unset = UNSET,
        metadata: dict[str, Any] | Unset | None = UNSET,
    ) -> Attempt:
        """Set fields of an attempt; rollout and worker follow its status.

        If it is the latest attempt: preparing, running and succeeded set the rollout's status too; failed, timeout and
        unresponsive queue it again if its `retry_condition` names the status and `max_attempts` allows, else fail it.
        Raises `RolloutNotFoundError`, `AttemptNotFoundError`, `ClaimLostError`.
        """

    # -- spans -------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """The next span number of a rollout: one counter for each rollout, from 1, never given twice."""

    @abstractmethod
    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        """The next span numbers of many (rollout, attempt) pairs, in order."""

    @abstractmethod
    async def add_span(self, span: Span) -> Span | None:
        """Store a span and return the caller's own object; None, with an ERROR log, for a duplicate.

        The span is a heartbeat: a preparing or unresponsive attempt becomes running, with its rollout if it is the
        latest. Raises `RolloutNotFoundError`, `AttemptNotFoundError`, `ClaimLostError`, `PayloadTooLargeError`.
        """

    @abstractmethod
    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        """Store spans, grouped by attempt in order of first appearance; returns the stored ones in that order.

        A group that fails raises, and later groups are not tried.
        """

    @abstractmethod
    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: Any, sequence_id: int | None = None
    ) -> Span | None:
        """Store an OpenTelemetry `ReadableSpan`; with no `sequence_id` it takes the next number in the same call."""

    @abstractmethod
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
        """Spans of a rollout, or of one attempt ("latest": the newest attempt, with or without spans).

        `sort_by` None gives the order of arrival. Raises `SpansEvictedError` if spans were evicted, for ever;
        `allow_partial` returns what is left.
        """

    @abstractmethod
    async def query_many_spans(
        self,
        rollout_ids: Sequence[str],
        attempt_id: Literal["latest"] | None = "latest",
        *,
        allow_partial: bool = False,
    ) -> dict[str, list[Span]]:
        """Spans of many rollouts in one call, by sequence number; unknown ids give an empty list."""

    # -- training on each rollout exactly once -----------------------------------------------------------------------

    @abstractmethod
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
        """Up to `n` finished rollouts for `consumer`, in completion order; it sees each of them once.

        Waits up to `timeout` until there are `n`, or until nothing that waits or runs could be one more (or the store
        is full and starts nothing), and then gives what there is; with nothing at all it waits its time, and the batch
        has number 0.

        `mode`, `tags`, `queue`, `group_id` and `status_in` say what the consumer is for: rollouts that are equal in all
        of them, and have succeeded; failed ones only with `status_in=["succeeded", "failed"]`, cancelled and dropped
        ones never. That filter is the consumer's own from its first take on, or from `consumers=` at the start of the
        store: a take that names none means it, one that names another raises `ConsumerFilterError`.

        From its first word on a consumer is *known*: what it awaits or holds is not deleted by the retention rule, and
        without a journal not evicted. If memory is full of it, the store hands out no work until the consumer has gone
        on, and says so (log, `statistics`, the change "memory_full"). `forget_consumer` ends that.

        A batch belongs to the process that took it, until `ack` or `nack`. While it holds `max_open` of them another
        take raises `BatchHeldError`. A batch that its caller never received is given back; one whose process has ended
        comes again to the next take, before anything else. What is in a batch is sealed: late reports are kept on their
        attempts only, and running it again or deleting it raises `SealedError`.
        """

    @abstractmethod
    async def ack(self, batch: Batch, *, step: int, note: str | None = None) -> None:
        """Step `step` of the consumer's model has consumed a batch. It is kept until a checkpoint covers that step.

        To be said again without harm. Raises `BatchConflictError` if the consumer does not hold the batch.
        """

    @abstractmethod
    async def nack(self, batch: Batch) -> None:
        """Give a batch back unconsumed; its rollouts come again before all others. Raises `BatchConflictError`."""

    @abstractmethod
    async def checkpoint(self, consumer: str, step: int) -> int:
        """The consumer's model is durable at `step`: what was acknowledged up to it is not kept for it any longer.

        Answers with how many rollouts that are. One that other consumers await or hold is kept for them. Raises
        `BatchConflictError` for a step before its last checkpoint.
        """

    @abstractmethod
    async def rewind(self, consumer: str, step: int) -> int:
        """The consumer's model is at `step` again: what later steps consumed, or none did, comes again; how many.

        To be said after each start of a trainer, with the step of the model that it loaded. They come in the order in
        which they were taken. Raises `BatchConflictError` for a step before its last checkpoint.
        """

    @abstractmethod
    async def forget_consumer(self, name: str) -> int:
        """Keep nothing for a consumer any longer: it will not come again. How many rollouts it awaited or held.

        What it held can be run again or deleted; its ledger stays for what its checkpoints covered. If it does take
        again it begins anew, with whatever filter it names then, and without what those checkpoints covered.
        """

    @abstractmethod
    async def ledger(self, consumer: str) -> list[LedgerEntry]:
        """What a consumer took of the rollouts that are still kept, in the order in which it took them."""

    # -- resources ---------------------------------------------------------------------------------------------------

    @abstractmethod
    async def add_resources(self, resources: NamedResources, *, policy_version: int | None = None) -> ResourcesUpdate:
        """Publish resources under a new id, which becomes the latest.

        `policy_version` says which weights they stand for; attempts carry it from their claim on.
        """

    @abstractmethod
    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, policy_version: int | None = None
    ) -> ResourcesUpdate:
        """Publish a new version under an id, which becomes the latest; an unknown id starts at version 1."""

    @abstractmethod
    async def get_resources_by_id(self, resources_id: str, version: int | None = None) -> ResourcesUpdate | None:
        """One version of resources (None: the newest); None when unknown. Raises `PayloadLostError` if it was freed."""

    @abstractmethod
    async def get_latest_resources(self) -> ResourcesUpdate | None:
        """What was published last; None when nothing was."""

    @abstractmethod
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
        """The newest version of each id that matches, in the order in which the ids came."""

    @abstractmethod
    async def delete_resources(self, resources_id: str) -> None:
        """Forget an id with all versions. Raises `ResourcesNotFoundError`."""

    # -- workers -----------------------------------------------------------------------------------------------------

    @abstractmethod
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
        """Workers that match, in the order of their first appearance.

        All that are busy are there, and of the others the 10,000 that were heard of last.
        """

    @abstractmethod
    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """The worker; None when unknown."""

    @abstractmethod
    async def update_worker(self, worker_id: str, heartbeat_stats: dict[str, Any] | Unset = UNSET) -> Worker:
        """Record a heartbeat of a worker, with statistics if given; `heartbeat_stats=None` raises TypeError."""


NoticeHandler = Callable[[str, str, str], None]  #: takes the kind of a notice, a rollout id and an attempt id


class RunnerStore(LightningStore):
    """A store for runners, pools and integrations: what they need besides, and agents and trainers do not."""

    @property
    @abstractmethod
    def session_id(self) -> str:
        """The session of this process: what its operations belong to, and what holds the attempts that it runs."""

    @abstractmethod
    def listen_for_notices(self, handler: NoticeHandler) -> Callable[[], None]:
        """Call `handler` when an attempt that this process runs is of no use any longer; returns a function that stops.

        The handler takes (kind, rollout id, attempt id). Kinds are "cancelled", "superseded", "timeout" and
        "unresponsive". It runs on any thread, must be quick, and may use the store.
        """

    @abstractmethod
    async def heartbeat(self, attempts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Record a heartbeat of many attempts, (rollout id, attempt id) each, at the time of the store.

        Returns those that are of no use any longer: superseded, finished or deleted.
        """

    @abstractmethod
    async def add_unnumbered_spans(self, spans: Sequence[Span]) -> None:
        """Store spans of one attempt; the store numbers them in the order given. Raises what `add_span` raises."""

    @abstractmethod
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
        """Store the last spans of an attempt and its final status in one step; the store numbers the spans.

        `outcome` says why the attempt ended (None: as the status implies); `error` is kept on the attempt. With outcome
        "runner_lost" the rollout is offered again; `died` says that a process died which ran nothing else, and counts
        against `max_deliveries`. If one span is refused, nothing is stored. Raises what `update_attempt` raises.
        """

    @abstractmethod
    async def report_unread(
        self, rollout_id: str, attempt_id: str, resources_id: str, version: int, *, error: str
    ) -> None:
        """Tell that an attempt could not read its resources: it ends, is not charged, and its rollout is offered again.

        Rollouts that wait for this version are held back until it is published again, once two processes have told so
        or its publisher has ended.
        """

    @abstractmethod
    async def report_spans_lost(self, counts: Mapping[Reason, int]) -> None:
        """Add numbers of lost spans, by reason, to `statistics()["spans_lost"]`."""

    @abstractmethod
    async def report_ended(
        self, session_id: str | None, *, worker_id: str | None = None, stopped: bool = False
    ) -> bool:
        """Tell that a process has ended: the rollouts that it held are offered again at once.

        The process is named by its session, or by the worker it worked as if the session is unknown (None). If it was
        `stopped`, its attempts are withdrawn and not charged. Returns whether it had a live session.
        """

    @abstractmethod
    async def report_pool(self, pool_id: str, queues: Sequence[str], *, failures: int, error: str | None) -> None:
        """Tell that the runners of a pool fail before they are ready (`error`), or that one is ready (None).

        `failures` is the number of those that failed in a row. Callers that wait only for work in queues which failing
        pools serve get `PoolFailedError`.
        """


#: The names of the methods of the contract.
METHODS = tuple(name for name, method in vars(LightningStore).items() if name[0] != "_" and isfunction(method))
