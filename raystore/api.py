"""The contract of a store: its methods, what each means, and which errors it raises.

Names and arguments are those of agent-lightning 0.3.0, with the keyword names of 0.2 as well; then come raystore's
additions, whose defaults leave the behaviour of agent-lightning. `raystore.client.client` implements the contract over
a transport; `raystore.client.sync` has its blocking twins.

Rules for every method:

- Methods are `async def`. Arguments are checked and copied before the first suspension, and operations take effect in
  the order in which they were issued, awaited or not.
- A wrong value raises `InvalidValueError`, a call that does not fit the signature TypeError; both change nothing.
- An id is text of 1 to 512 characters without control characters. As an argument, None means "not given".
- Reads and waits skip unknown ids (the answer is empty or None), except `as_completed`. Writes raise a ValueError for
  an unknown id, except `cancel_rollouts`, `release` and `delete_rollouts`, which skip it.
- An answer is a snapshot and does not change later. A rollout with attempts is an `AttemptedRollout`, whose `attempt`
  is the latest one; a rollout without attempts is a plain `Rollout`, which has no `attempt`.
- Times are in seconds since the epoch, by the store's clock. Durations and timeouts are in seconds; a `timeout` that is
  negative or NaN raises `InvalidValueError` unless the method says otherwise.
- A method first applies the timeouts that are due, so that no answer shows an attempt running past its time.
- Queries return a page: `limit` -1 means all, and 0 none; `total` counts all matches. `sort_by` is the name of a field
  and `sort_order` "asc" or "desc"; a missing time comes last in ascending order, any other missing value first.
- Any method may raise `StoreUnavailableError`, `OutcomeUnknownError` (of a write), `StoreClosedError`,
  `StoreOverloadedError` or `PayloadTooLargeError`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from inspect import isfunction
from typing import Any, Literal

from raystore.client.evaluation import Evaluation
from raystore.client.feed import Feed
from raystore.core.schema import LossReason
from raystore.reports.selection import SelectionReport
from raystore.tracing.evidence import Evidence
from raystore.types.contract import (
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
    Outcome,
    Page,
    PaginatedResult,
    QueueLimit,
    QueuePause,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    SortOrder,
    Span,
    StoreMetrics,
    TagValue,
    TaskInput,
    Unset,
    Worker,
    WorkerStatus,
)
from raystore.types.evaluations import EvaluationResult
from raystore.types.feeds import FailureBudget, FailureReward, Sampler
from raystore.wire.evaluations import Overtaken
from raystore.wire.feeds import Changed, Chooser, Late, Order


class LightningStore(ABC):
    """The control plane of agent RL: rollouts, attempts, spans, resources, workers."""

    # -- what a store is ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def capabilities(self) -> LightningStoreCapabilities:
        """What this store allows: several threads, several event loops, zero-copy passing, an OTLP endpoint."""

    @abstractmethod
    def otlp_traces_endpoint(self) -> str:
        """The URL that takes OTLP traces. Raises NotImplementedError if `capabilities["otlp_traces"]` is False."""

    @abstractmethod
    async def statistics(self) -> LightningStoreStatistics:
        """Counts and sizes of the store; sizes are in bytes, durations in seconds."""

    @abstractmethod
    async def metrics(self, *, seconds: float = 3600.0, versions: int = 100) -> StoreMetrics:
        """What happened in the last `seconds` (an hour is kept), and what held the run back.

        Rewards are those of all finished rollouts, of the newest `versions` of the policy, whenever they finished. With
        a journal a restarted store has the counts again; what it sampled it has since its process began.
        """

    @abstractmethod
    async def story(self, rollout_id: str) -> list[str]:
        """What is known of the history of a rollout, or of a group by its id, as lines for people to read."""

    @abstractmethod
    async def why(
        self, *, rollout_id: str | None = None, group_id: str | None = None, consumer: str | None = None
    ) -> list[Finding]:
        """What keeps work from going on now, in words: the binding constraint first, then others, and what may soon.

        Of a rollout: why it has not started or finished. Of a group: why it is not complete. Of a consumer, or a feed
        by its name: why its trainer waits. Of everything, if none is given; then there is at least one finding. Costs
        the store the same however many rollouts it has. The kinds of findings are in docs/why.md.

        Raises `RolloutNotFoundError`, and `InvalidValueError` for an unknown group or consumer, or for several names.
        """

    @abstractmethod
    async def check(self) -> None:
        """Verify the invariants of the store; raises AssertionError if one is broken. For tests: reads everything."""

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
        """Create a rollout that the caller runs itself: "preparing", with a first attempt, never queued.

        `resources_id` None means the latest resources; other ids are not checked. `config` None means the store's
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
        """Create a rollout with status "queuing" at the tail of its queue.

        `rollout_id` makes the call repeatable: with equal content (in any order of keys) it returns the rollout that
        exists; with other content it raises `ConflictError`. A rollout of higher `priority` is claimed first.
        `group_id` and `tags` (at most 16, values str, int, float or bool) are indexed; if they are not given they are
        taken from well-formed entries of `metadata`. `resources_id` and `config` are as in `start_rollout`. Raises
        `OverloadedError` if `max_queued` rollouts wait already.
        """

    @abstractmethod
    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        """Enqueue many rollouts; the answers are in the order of the requests.

        All or none are enqueued. The latest resources are looked up once for all. Requests for rollouts that exist
        already do not count against `max_queued`, so that the call can be repeated. Raises what `enqueue_rollout`
        raises.
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
        deadline_seconds: float | None = None,
        min_size: int | None = None,
        spare: int = 0,
        replace: int = 0,
    ) -> Sequence[Rollout]:
        """Enqueue `n` rollouts with the same input and group id, as GRPO needs them, as a group for `take_groups`.

        The group has `n` places, each held by one of the rollouts, and is complete when all of these have succeeded. If
        a place is lost, the group ends at once: complete nevertheless if at least `min_size` (2 or more) hold their
        places and have succeeded, else failed. Nobody comes to a place by being quick, but only in these ways:

        - `spare` more rollouts are enqueued and returned. They stand in for those that fail, as follows.
        - A member that failed by the infrastructure (outcome "infra" or "runner_lost", after the deliveries that
          `max_deliveries` allows) is replaced by a spare or a new rollout, up to `max_deliveries` times in a group.
        - One that failed otherwise, or after those, is replaced likewise, up to `replace` times. What is trained on
          then is what an agent did when it did not fail: mind that bias. One that was dropped is not replaced.
        - `deadline_seconds` after its enqueueing the group ends with what it has.

        When a group ends, its other members are cancelled. A group that is given none of these arguments is only
        watched: none of its rollouts is added, replaced or cancelled. A group may have 10,000 rollouts with them,
        1,000,000 without.

        `group_id` makes the call repeatable: with equal content it returns the rollouts of the group that exists; with
        other content it raises `GroupConflictError`. None makes a new id. The `group_id` of `enqueue_rollout` makes no
        group. The other arguments are those of `enqueue_rollout`.
        """

    @abstractmethod
    async def enqueue_many_groups(self, groups: Sequence[EnqueueGroupRequest]) -> Sequence[Group]:
        """Enqueue many groups; the answers are in the order of the requests.

        All or none are enqueued, and the latest resources are looked up once for all. Groups that exist already are
        returned as they are. Raises what `enqueue_group` raises.
        """

    @abstractmethod
    async def get_group(self, group_id: str) -> Group | None:
        """The group; None if it is unknown.

        A group is known as long as one of its rollouts is. To delete a member of an open group has the effect of
        cancelling it; a complete group of which that leaves too little has failed.
        """

    @abstractmethod
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
        """A page of the groups that match all filters, in the order of their creation unless `sort_by` is given."""

    @abstractmethod
    async def dequeue_rollout(
        self, worker_id: str | None = None, *, timeout: float = 0.0, queues: Sequence[str] = ("default",)
    ) -> AttemptedRollout | None:
        """Claim the next rollout, or return None if there is none within `timeout`.

        The rollout becomes "preparing" and gets a new attempt. Queues are tried in the given order; one that is paused
        or has reached a limit is passed over. With `worker_id`
        the worker is recorded as busy, or as idle if there is no rollout. The claim is acknowledged automatically once
        the caller has it; if the caller is cancelled or dies before that, the rollout returns to its old place in the
        queue.
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
        """Claim up to `limit` rollouts that wait now; waits up to `timeout` for the first one.

        Returns `[]` if there is none, or if `limit` is 0 or less. Else as `dequeue_rollout`.
        """

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
        """A page of the rollouts that match, in the order of their creation unless `sort_by` is given.

        `filter_logic` ("and" or "or") joins the first three filters; `group_id`, `tags`, `queue`, `worker_id` and
        `mode` must match in any case. An empty list matches nothing. `status` and `rollout_ids` are the names that 0.2
        has for `status_in` and `rollout_id_in`. Raises `InvalidValueError` for a field that cannot be sorted by.
        """

    @abstractmethod
    async def get_rollout_by_id(self, rollout_id: str) -> FoundRollout:
        """The rollout with its latest attempt; None if it is unknown."""

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
        """Set fields of a rollout by hand, and return it. UNSET leaves a field as it is; None sets it to None.

        Neither `status` nor `config` can be None. Any status may follow any other. A finished status sets `end_time`
        and answers those who wait for the rollout; "queuing" and "requeuing" clear `end_time` and put the rollout at
        the tail of its queue unless it is queued already; one that backs off is handed out from now on. Attempts and
        workers stay as they are, but the holder of a running attempt is notified. Raises `RolloutNotFoundError`, and
        `SealedError` for a new status of a rollout that a consumer has taken.
        """

    @abstractmethod
    async def cancel_rollouts(
        self,
        rollout_ids: Sequence[str] | None = None,
        *,
        group_id: str | None = None,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Sequence[AnyRollout]:
        """Cancel rollouts that have not finished, and return them. A rollout must match all filters that are given.

        Cancelling by `group_id` alone ends an open group of this id, with status "cancelled". A running attempt fails
        with outcome "cancelled", and its holder is notified. Later reports of a cancelled
        attempt do not change the rollout's status; only `update_rollout` and `start_attempt` do. Raises
        `InvalidValueError` if no filter is given.
        """

    @abstractmethod
    async def requeue(self, rollout_ids: Sequence[str]) -> list[AnyRollout]:
        """Put rollouts that have failed or were cancelled at the tail of their queues again, with fresh allowances.

        All of them, or none. `max_attempts`, `retry_rules` and `max_deliveries` start anew; attempts and spans are
        kept. A rollout that a consumer has taken, or whose group has ended, stays as it is: a new one is enqueued in
        its place with the same content, whose `requeued_from` names it, and which is no member of the group.

        Returns, in the order of the ids, the rollout that now stands for each. A rollout that has not finished is
        returned unchanged, and so is one that was made for it by an earlier call, unless that has failed or was
        cancelled itself: then it is what is put into the queue. So the call can be repeated.

        Raises `RolloutNotFoundError`, `RolloutSucceededError` for a rollout that has succeeded, `OverloadedError` if
        more rollouts would wait than `max_queued` allows, and `InvalidValueError` for more than 10,000 ids.
        """

    @abstractmethod
    async def release(self, rollout_ids: Sequence[str]) -> int:
        """Mark rollouts as no longer needed, to be evicted or deleted first; returns how many were not marked yet.

        Rollouts that a known consumer awaits or holds (see `take`) are kept until it is done with them.
        """

    @abstractmethod
    async def delete_rollouts(self, rollout_ids: Sequence[str]) -> int:
        """Delete rollouts with their attempts and spans, and return how many existed.

        The holder of a running attempt is notified. Raises `SealedError`, and deletes none, if a consumer has taken
        one.
        """

    # -- waiting -----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def wait_for_rollouts(
        self, *, rollout_ids: Sequence[str], timeout: float | None = None, progress: bool = False
    ) -> list[AnyRollout]:
        """Wait until all rollouts have finished, or for `timeout`; returns the finished ones in the given order.

        `timeout` None waits without limit; 0 or less does not wait. Unknown ids are skipped. Costs one waiting call,
        however many ids there are. Raises `PoolFailedError` if all of the unfinished ones wait for pools that cannot
        start a runner.

        With `progress` a driver draws on its terminal how many have finished and failed, how fast, and how long it will
        take; and why nothing is claimed, if nothing is for 30 s. Elsewhere it changes nothing.
        """

    @abstractmethod
    async def wait_for_rollout(self, rollout_id: str, timeout: float | None = None) -> AnyRollout | None:
        """Wait until the rollout has finished, and return it; None if it does not within `timeout` or is unknown.

        `timeout` and errors are those of `wait_for_rollouts`.
        """

    @abstractmethod
    def as_completed(self, rollout_ids: Sequence[str], *, timeout: float | None = None) -> AsyncIterator[AnyRollout]:
        """Iterate over the rollouts in the order in which they finish.

        Raises TimeoutError if some have not finished after `timeout` (None: no limit). Raises `RolloutNotFoundError`
        before the first rollout if some do not exist. Rollouts that are deleted later are left out.
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
        """A page of the rollouts that finished after `cursor`, in that order; None starts at the beginning.

        Waits up to `timeout` if there is none. A rollout that finishes again comes again. Pass the cursor of the answer
        to go on exactly there, also from another process. Raises `PoolFailedError` as `wait_for_rollouts` does.
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
        """A page of what the store did after `cursor`, in order; None starts at the oldest change that is kept.

        The last 100,000 are kept. `kinds` limits them to these kinds. Waits up to `timeout` if there is none. Raises
        `CursorTooOldError`, which names the oldest cursor, if changes after `cursor` are not kept any longer.
        """

    # -- holding work back -------------------------------------------------------------------------------------------

    @abstractmethod
    async def pause(self, queues: Sequence[str] | None = None, keep: bool = False) -> list[QueuePause]:
        """Hand out no work of these queues, until `resume`; None means all queues, also those that come later.

        What is handed out already goes on. Rollouts can still be enqueued, and keep their places. A parked dequeue
        stays parked and is answered at once when the queue is resumed; one without `timeout` returns None. Attempts
        that are started by hand start. Whoever waits for the rollouts waits, as long as its own timeout; the deadlines
        of groups go on.

        A pause belongs to this process and ends with it, however it ends: by `close`, by a crash, or after 60 s in
        which it was not heard. With `keep` it belongs to nobody, and only `resume` ends it; with a journal it lasts
        over restarts of the store. A queue is paused as long as there is one pause of it, or of all queues. To pause
        again what this process has paused changes nothing, except that `keep` makes it a kept pause.

        Returns all pauses that there are now, the oldest first, as `statistics()["paused"]` does. Raises
        `StoreOverloadedError` if there would be more than 10,000.
        """

    @abstractmethod
    async def resume(self, queues: Sequence[str] | None = None, *, others: bool = False) -> list[QueuePause]:
        """End the pauses of these queues, or (None) of all: those that this process made, and those that are kept.

        A pause that another process made is ended with `others=True` only. A pause of all queues ends if `queues` is
        None. To resume what is not paused changes nothing.

        Returns the pauses that are left, the oldest first: a queue that one of them names, or that a pause of all
        queues covers, still hands out nothing.
        """

    @abstractmethod
    async def limit_queue(
        self, queue: str, *, max_running: int | None = None, per_minute: int | None = None
    ) -> QueueLimit:
        """Hand out work of a queue only as far as its limits allow. None lifts a limit; each call says both.

        `max_running`: no claim while so many rollouts of the queue are preparing or running. Those that were started by
        hand, or that run again after a late span, count and are not refused, so there may be more.
        `per_minute` (at most 100,000): so many claims in any 60 seconds, from now on. Claims that are taken back count.
        A claim is held back as by `pause`: the rollout keeps its place, and a parked dequeue is answered as soon as the
        limits allow.

        Limits belong to the store, not to this process, and with a journal they last over its restarts. Returns the
        limits as they are now. Raises `StoreOverloadedError` if more than 10,000 queues would have limits.
        """

    # -- attempts ----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        """Start another attempt by hand: the rollout becomes "preparing", whatever its status and `max_attempts`.

        An attempt that still runs is superseded, and its holder is notified. Raises `RolloutNotFoundError` and
        `SealedError`.
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
        """A page of the attempts of a rollout; empty if the rollout is unknown."""

    @abstractmethod
    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """The attempt of a rollout with the highest sequence id; None if there is none."""

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
        """Set fields of an attempt, and return it. UNSET leaves a field as it is.

        Rollout and worker follow the status of the attempt. `attempt_id` may be "latest". For the latest attempt,
        "preparing", "running" and "succeeded" become the status of the rollout, too. "failed", "timeout" and
        "unresponsive" queue the rollout again if its `retry_condition` names the status and `max_attempts` allows
        another attempt, and else fail it. Raises `RolloutNotFoundError`, `AttemptNotFoundError`, and `ClaimLostError`
        if the claim was lost because it was acknowledged too late.
        """

    # -- spans -------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """The next span number of a rollout. Numbers start at 1, and none is given twice.

        All attempts of a rollout share its numbers. Unknown ids are not refused.
        """

    @abstractmethod
    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        """The next span numbers of many (rollout id, attempt id) pairs, in their order."""

    @abstractmethod
    async def add_span(self, span: Span) -> Span | None:
        """Store a span, and return the same object; None if it is stored already.

        A duplicate is logged as an ERROR. A span counts as a heartbeat: an attempt that is preparing or unresponsive
        becomes running, and so does its rollout if the attempt is the latest. Raises `RolloutNotFoundError`,
        `AttemptNotFoundError`, `ClaimLostError`.
        """

    @abstractmethod
    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        """Store spans, and return those that were not stored already; both attempt by attempt, by first appearance.

        If an attempt is refused, the error is raised, and spans of later attempts are not stored. Raises what
        `add_span` raises.
        """

    @abstractmethod
    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: Any, sequence_id: int | None = None
    ) -> Span | None:
        """Store a `ReadableSpan` of OpenTelemetry; returns it as a `Span`, or None if it is stored already.

        `sequence_id` None takes the next number of the rollout, in the same step.
        """

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
        """A page of the spans of a rollout, or of one of its attempts.

        "latest" is the newest attempt, even if it has no spans. `filter_logic` ("and" or "or") joins the filters after
        `attempt_id`. `sort_by` None gives the order of arrival. Raises `SpansEvictedError` if spans of the rollout were
        evicted; `allow_partial` returns those that are left.
        """

    @abstractmethod
    async def query_many_spans(
        self,
        rollout_ids: Sequence[str],
        attempt_id: Literal["latest"] | None = "latest",
        *,
        allow_partial: bool = False,
    ) -> dict[str, list[Span]]:
        """The spans of many rollouts by rollout id, each list in the order of span numbers.

        `attempt_id` "latest" gives those of the newest attempts, None those of all. An unknown id has an empty list.
        Evicted spans are treated as in `query_spans`.
        """

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
        """Take up to `n` finished rollouts for `consumer`, in the order in which they finished, each once.

        Waits up to `timeout` for `n` rollouts. Returns fewer if the time is over, if no rollout that waits or runs
        could be one more, or if memory is full and nothing is started. With none at all, waits for the whole `timeout`
        and returns an empty batch with number 0.

        `mode`, `tags`, `queue`, `group_id` and `status_in` are the filter of the consumer. A rollout must equal all of
        them and have succeeded; `status_in=["succeeded", "failed"]` includes failed ones; cancelled and dropped ones
        never come. The first take fixes the filter, or `consumers=` at the start of the store: a later take may leave
        it out, and raises `ConsumerFilterError` if it names another.

        The first take makes a consumer *known*: rollouts that it awaits or holds are not deleted by retention, and
        without a journal they are not evicted. If they fill the memory, the store hands out no work until the consumer
        has gone on, and says so (log, `statistics`, change "memory_full"). `forget_consumer` ends this.

        A batch is held by the process that took it until `ack` or `nack`. If it holds `max_open` batches, another take
        raises `BatchHeldError`; if another process holds one of them, once that has shown that it lives, or after
        `timeout`. A batch that did not reach its caller is given back; a batch of a process that has ended comes again
        to the next take, before anything else. The rollouts of a batch are sealed: later reports change their attempts
        only, and to run or delete such a rollout raises `SealedError`.

        Raises `PoolFailedError` as `wait_for_rollouts` does.
        """

    @abstractmethod
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
        """Take up to `n` complete groups for `consumer`, in the order in which they became complete, each once.

        As `take`, with groups in place of rollouts: it waits for `n` groups, and for as long as open ones could still
        become complete; its filter is compared with what the groups were enqueued with; and the batch goes to `ack`,
        `nack`, `checkpoint` and `rewind`, which count in rollouts. A group is never given in part: with it come those
        of its members that are to be trained on, `n` of them or no fewer than its `min_size`.

        A consumer takes rollouts or groups: the first take fixes which, and another kind of take raises
        `ConsumerUnitError`. Raises what `take` raises.
        """

    @abstractmethod
    async def ack(self, batch: Batch, *, step: int, note: str | None = None) -> None:
        """Tell that step `step` of the consumer's model has consumed a batch.

        The batch is kept until a checkpoint covers the step. `note` is kept in the ledger. May be repeated. Raises
        `BatchConflictError` if the consumer does not hold the batch.
        """

    @abstractmethod
    async def nack(self, batch: Batch) -> None:
        """Give a batch back unconsumed: its rollouts come again before all others.

        Raises `BatchConflictError` if the consumer does not hold the batch.
        """

    @abstractmethod
    async def checkpoint(self, consumer: str, step: int) -> int:
        """Tell that the consumer's model of step `step` is durable; returns how many rollouts that releases.

        Rollouts that it consumed up to this step are not kept for it any longer. They are kept for other consumers that
        await or hold them. Raises `BatchConflictError` if an earlier checkpoint has a higher step.
        """

    @abstractmethod
    async def rewind(self, consumer: str, step: int) -> int:
        """Tell that the consumer's model is at step `step` again; returns how many rollouts come again.

        Those are the ones that later steps consumed, and those that it took and no step consumed. They come in the
        order in which they were taken. A trainer calls this after each start, with the step of the model it has loaded.
        Raises `BatchConflictError` for a step before the last checkpoint.
        """

    @abstractmethod
    async def forget_consumer(self, name: str) -> int:
        """Keep nothing for a consumer any longer; returns how many rollouts it awaited or held.

        Rollouts that it held may be run again or deleted. Its ledger keeps what its checkpoints cover. If it takes
        again, it begins anew, with any filter, and without those rollouts.
        """

    @abstractmethod
    async def ledger(self, consumer: str) -> list[LedgerEntry]:
        """The rollouts that a consumer took, in that order, as far as they are still kept."""

    # -- a training loop ---------------------------------------------------------------------------------------------

    @abstractmethod
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
        eval_share: float = 0.25,
    ) -> Feed:
        """A feed: it enqueues a group of `size` rollouts for each item of a dataset, and gives them in whole batches.

        The same call again, in this process or in another one, goes on where the feed of this name is. Only one at a
        time may: another one raises `FeedHeldError`, but waits for the end of a process that has died. This method
        checks its arguments and does nothing else: the feed begins with the first `restore`, `publish` or `batches`.

        *Items.* `data` is a dataset, or datasets by name (environments). Each has a length and can be indexed, or is an
        iterable; an iterable with `state_dict` and `load_state_dict` goes on from its own state, another is read from
        the start. Each item of each of the `epochs` (None: without end) comes to one ending: trained, filtered, failed,
        stale, skipped (it is None, or reading it raises) or cancelled. Several datasets are one, in an order for each
        epoch that `seed` fixes (None: that of the datasets); with `mix={"math": 0.7, "code": 0.3}` batches hold these
        shares. A `sampler` gives the items instead, with `data` None. The id of a group is `name/epoch/index`, or
        `name/environment/epoch/index`; the tag "env" of a rollout names its environment. A dataset of another length,
        or with other items, than before raises `DatasetChangedError`, unless `changed` is "continue".

        *How far ahead.* At most `(max_lag + 1) * batch` groups are under way, from the draw to the `ack`, and at most
        `max_running` rollouts run. The lag of a group is the number of batches acknowledged between its earliest claim
        and its training. `late` says what becomes of one that would lag more than `max_lag`: the next batch waits for
        it ("wait"), it is trained on nevertheless ("train"), or it is given up ("drop"), and its item is enqueued again
        up to 3 times ("requeue"). `order` of the groups in batches: the "oldest" first; those first that were complete
        first ("ready_first"); exactly that of the items ("in_order"); or a function that takes complete groups
        (`FeedGroup`) and gives those of the next batch.

        *What fails.* A member that the infrastructure failed is replaced. For one whose agent raised, or ran out of
        time, `on_failure` says: it is trained on with a reward, `rs.reward(0)`; it is left out ("mask"); or it is
        replaced ("replace"), up to `replace` times in a group (None: `size` times), which favours what does not fail. A
        group needs `min_size` members to train on (None: 2 with "mask", else `size`) and ends after
        `deadline_seconds` with what it has. `spare` more rollouts stand in for what the infrastructure failed; with
        `race=True` the first `size` of all are taken and the others cancelled, which favours what is short. If more
        fail than `budget` allows (None: any number may), the feed pauses and `batches` raises `FailureBudgetError`.

        *What can be trained on.* `require` says what each recorded model call must have: "token_ids" (of prompt and
        response), "logprobs", "sampling" (parameters such as the temperature). A rollout without is left out, logged,
        and counts as a failure. `batch_tokens` bounds the tokens of a batch. After `max_filtered` groups in a row that
        `keep` filtered (None: 10 batches, at least 100), the feed pauses with `FilteredTooManyError`.

        The other arguments are those of `enqueue_rollout`. Rollouts run with the newest version of `resources_id` that
        `Feed.publish` published. `eval_share` is that of `Feed.evaluate`.
        """

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @abstractmethod
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
        eval_share: float = 0.25,
        overtaken: Overtaken = "finish",
        config: RolloutConfig | None = None,
        queue: str = "default",
        priority: int = 0,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Evaluation:
        """Run `samples` rollouts of each item to measure a policy; returns once all are enqueued, and waits for none.

        `items` is a list, another dataset or a finite iterable; or several by the names of their environments, which
        are scored apart as well. Each sample is a rollout of mode "val", with the tags "eval" (the name) and "env".
        What is measured changes nothing of training: no consumer is ever given these rollouts, and no feed counts them.

        *Which policy.* With `version`, all attempts run with the newest of the `resources_id` (None: what was published
        last) that have this `policy_version`; they are kept until the evaluation has ended. Raises
        `VersionNotFoundError` if there are none. Without, attempts run with what is newest at their claim, and the
        result has the least and the greatest version that samples ran with.

        *How much runs.* While other work waits as well, evaluations have `eval_share` of the rollouts that run, and one
        at least; otherwise they have all that is free. `priority` orders them among themselves.

        *What counts.* A sample passes if its reward is above `threshold`. One that failed for good, was cancelled or
        deleted, or has no reward counts as not passed, with `failure_reward`: it stays in the denominator.

        *Again.* An evaluation is known by its name and its version; without one, by the newest version at the first
        call. The same call again gives it as it is, finished or not, and goes on with enqueuing after a crash. Other
        items, `samples`, `threshold` or `failure_reward` raise `EvaluationConflictError`: take another name. When a
        later one of a name begins, those that still run finish, or are dropped (`overtaken="drop"`).
        """

    @abstractmethod
    async def evaluations(self, name: str | None = None) -> list[EvaluationResult]:
        """The evaluations of a name, the newest version last, so that they are a curve; or (None) of all names.

        Of those that have ended, the newest 1,000 of a name are kept.
        """

    @abstractmethod
    async def drop_evaluation(self, name: str, version: int | None = None) -> int:
        """Drop what still runs of a name, or of one version of it; returns how many evaluations that are.

        What waits and runs of them is cancelled, and what was scored stays: `evaluate` gives such a one again as it is.
        Those that have ended stay as they are.
        Raises `EvaluationNotFoundError` for an unknown name or version.
        """

    @abstractmethod
    async def selection_report(self, consumer: str, *, since: float | None = None) -> SelectionReport:
        """What a feed, or another consumer, trained on, compared with all that was started for it: is that biased?

        By environment, tag, policy version, duration, turns, tokens and reward; by ending and reason; with the items
        that were never trained on. Rollouts that were cut off count as survival analysis has it. Counts are exact, of
        the whole run, through restarts; the store keeps sketches of numbers, within 5 %, of a bounded size.

        `since` is a time in seconds since the epoch; None: from the beginning. The store counts in windows, of ten
        minutes and, further back, of more, so that it may count from somewhat earlier on.

        Of a consumer that is no feed, the rollouts count that its filter selects and that the store still has; these
        are read page by page, and turns and tokens are not known.

        Raises `InvalidValueError` if there is no consumer of this name.
        """

    # -- resources ---------------------------------------------------------------------------------------------------

    @abstractmethod
    async def add_resources(self, resources: NamedResources, *, policy_version: int | None = None) -> ResourcesUpdate:
        """Publish resources under a new id, which becomes the latest.

        `policy_version` says which weights they stand for; an attempt has that of its resources when it is claimed.
        """

    @abstractmethod
    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, policy_version: int | None = None
    ) -> ResourcesUpdate:
        """Publish a new version under an id, which becomes the latest. An unknown id gets version 1.

        `policy_version` is as in `add_resources`.
        """

    @abstractmethod
    async def get_resources_by_id(self, resources_id: str, version: int | None = None) -> ResourcesUpdate | None:
        """One version of resources (None: the newest); None if it is unknown.

        Raises `PayloadLostError` if that version was freed.
        """

    @abstractmethod
    async def get_latest_resources(self) -> ResourcesUpdate | None:
        """The resources that were published last; None if there are none."""

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
        """A page of resources: the newest version of each id that matches, in the order in which the ids came."""

    @abstractmethod
    async def delete_resources(self, resources_id: str) -> None:
        """Delete all versions of an id. Raises `ResourcesNotFoundError`."""

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
        """A page of the workers that match, in the order of their first appearance.

        The store knows all busy workers, and of the others the 10,000 that it heard of last.
        """

    @abstractmethod
    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """The worker; None if it is unknown."""

    @abstractmethod
    async def update_worker(self, worker_id: str, heartbeat_stats: dict[str, Any] | Unset = UNSET) -> Worker:
        """Record a heartbeat of a worker and return it; an unknown worker is added.

        `heartbeat_stats` replaces its statistics, if given; None raises TypeError.
        """


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
        calls: Mapping[str, Any] | None = None,
    ) -> Attempt:
        """Store the last spans of an attempt and its final status in one step; the store numbers the spans.

        `outcome` says why the attempt ended (None: as the status implies); `error` is kept on the attempt. With outcome
        "runner_lost" the rollout is offered again; `died` says that a process died which ran nothing else, and counts
        against `max_deliveries`. `calls` says for `metrics` how many models were called: "turns", "prompt_tokens",
        "response_tokens", and "finish_reasons" with a count each. If one span is refused, nothing is stored. Raises
        what `update_attempt` raises.
        """

    @abstractmethod
    async def save_state(self, rollout_id: str, attempt_id: str, state: Any, spans: Sequence[Span] = ()) -> None:
        """Keep a state of an attempt that runs, with the spans that it has recorded by now, which the store numbers.

        It is durable when this returns, as `durability` says, and replaces the one before. The next attempt of the
        rollout goes on from it (`Attempt.resumed_from`): the spans of this attempt until now count as its own. None
        means that the next attempt begins anew; then those that this attempt has taken over count no longer, either.
        It is a sign of life, as a span is. States that travel encoded are `raystore.wire.codec.Encoded`.

        Raises what `add_span` raises; `AttemptOverError` if the attempt has ended or is not the newest (its spans are
        stored, as late ones are); and `PayloadTooLargeError` (`limits["state_bytes"]`) or `PayloadNotPicklableError`.
        Whatever is raised, the state before stays.
        """

    @abstractmethod
    async def get_saved_state(self, rollout_id: str, attempt_id: str, *, encoded: bool = False) -> Any:
        """The state that an attempt that runs goes on from, or has saved itself since; None if there is none.

        `encoded` returns it as an `Encoded`, for another process. Raises `PayloadNotReadableError` if it cannot be
        decoded here, and `AttemptOverError` if the attempt has ended or is not the newest.
        """

    @abstractmethod
    async def refresh_attempt(self, rollout_id: str, attempt_id: str) -> tuple[str, int, int | None] | None:
        """Let an attempt that runs switch to the newest version of the resources of its rollout.

        Returns their id, version and policy version; None if the attempt has the newest. The version stays as long as
        the attempt lives, or until it switches again. `Attempt.resources_version` and `policy_version` stay those of
        the claim. Raises `AttemptOverError` if the attempt has ended or is not the newest.
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
    async def report_spans_lost(self, counts: Mapping[LossReason, int]) -> None:
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
