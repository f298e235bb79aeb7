"""The public records: what users construct and what the store answers with.

Field names and defaults are the LightningStore contract's (agent-lightning 0.3.0); what raystore adds stands under
"added" in each class. Answers are snapshots: changing one never changes the store.
Not here: the store's own light records (`raystore.core.records`), how these travel (`raystore.wire.convert`).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypedDict, TypeVar, overload

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from raystore.errors import PayloadLostError
from raystore.spans import AttributeValue as AttributeValue
from raystore.spans import Event as Event
from raystore.spans import Link as Link
from raystore.spans import OtelResource as OtelResource
from raystore.spans import Span as Span
from raystore.spans import SpanContext as SpanContext
from raystore.spans import SpanCoreFields as SpanCoreFields
from raystore.spans import StatusCode as StatusCode
from raystore.spans import TraceStatus as TraceStatus
from raystore.values.mistakes import Record
from raystore.values.objects import Kept, Source
from raystore.values.plain import scalar
from raystore.values.unread import Delivered

logger: logging.Logger = logging.getLogger(__name__)

RolloutStatus = Literal["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
AttemptStatus = Literal["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
RolloutMode = Literal["train", "val", "test"]
WorkerStatus = Literal["idle", "busy", "unknown"]
Outcome = Literal[
    "ok",
    "agent_error",
    "infra",
    "runner_lost",
    "withdrawn",
    "timeout",
    "unresponsive",
    "cancelled",
    "superseded",
    "dropped",
]
TaskInput = Any
TagValue = str | bool | int | float


def _tag(value: Any) -> Any:
    """A number of numpy or torch as a plain one; pydantic would make a float of a Decimal, and 1 of numpy's True."""
    found = scalar(value)
    if type(found) not in (str, bool, int, float):
        raise ValueError("expected a str, int, float or bool")
    return found


_Tag = Annotated[TagValue, BeforeValidator(_tag)]
_Seconds = Annotated[float, Field(ge=0), BeforeValidator(scalar)]  # which NaN is not
_Whole = Annotated[int, BeforeValidator(scalar)]
SortOrder = Literal["asc", "desc"]
FilterLogic = Literal["and", "or"]

T = TypeVar("T")


class _UnsetType:
    """The type of `UNSET`, which says "leave this field as it is"; pickling keeps it a singleton."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNSET"

    def __reduce__(self) -> tuple[Callable[[], _UnsetType], tuple[()]]:
        return _get_unset, ()


UNSET = _UnsetType()
Unset = _UnsetType


def _get_unset() -> _UnsetType:
    return UNSET


# -- rollouts ----------------------------------------------------------------------------------------------------------


class RolloutConfig(Record, extra="forbid"):
    """When an attempt of a rollout is given up, and what is tried again.

    An attempt is tried again only if its status is in `retry_condition` *and* `max_attempts` allows another: each of
    the two alone does nothing, which is warned of unless the other is given, too (`retry_condition=[]`). A field that
    does not exist is refused, since `RolloutConfig(timeout=60)` would otherwise mean "no timeout".

    Attributes:
        timeout_seconds: since the start of an attempt, after which it has timed out; None: never.
        unresponsive_seconds: without a span or heartbeat, after which it is unresponsive; None: never.
        max_attempts: attempts in all; those lost with their process, or aborted, do not count.
        retry_condition: attempt statuses ("failed", "timeout", "unresponsive") after which it is tried again.
    """

    timeout_seconds: _Seconds | None = None
    unresponsive_seconds: _Seconds | None = None
    max_attempts: _Whole = Field(default=1, ge=1)
    retry_condition: list[AttemptStatus] = Field(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _has_both_or_neither(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Warn of one that does nothing without the other; not again where a config that was made is passed on.

        What was made decides, since a subclass may have defaults of its own, or take other arguments.
        """
        made = handler(given)
        if type(given) is not dict:
            return made
        said = made.model_fields_set
        if made.max_attempts > 1 and not made.retry_condition and "retry_condition" not in said:
            _warn(
                f"RolloutConfig(max_attempts={made.max_attempts}) tries nothing again, since no retry_condition names "
                "the statuses that are: add retry_condition=['failed', 'timeout', 'unresponsive'], or those of them "
                "that you mean; retry_condition=[] if none"
            )
        elif made.retry_condition and made.max_attempts == 1 and "max_attempts" not in said:
            _warn(
                f"RolloutConfig(retry_condition={made.retry_condition}) tries nothing again, since max_attempts is 1 "
                "unless given: add max_attempts=3, or as many as you mean in all; max_attempts=1 if it is one"
            )
        return made


def _warn(text: str) -> None:
    """Warn whoever made a record: the nearest caller that is neither raystore nor pydantic."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("raystore.", "pydantic.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


class Rollout(Delivered):
    """One task for an agent, and where it stands."""

    rollout_id: str
    input: TaskInput
    start_time: float
    end_time: float | None = None
    mode: RolloutMode | None = None
    resources_id: str | None = None
    status: RolloutStatus = "queuing"
    config: RolloutConfig = Field(default_factory=RolloutConfig)
    metadata: dict[str, Any] | None = None
    # added
    group_id: str | None = None
    queue: str = "default"
    priority: int = 0
    tags: dict[str, TagValue] = Field(default_factory=dict)
    reward: float | None = None


class Attempt(Delivered):
    """One execution of a rollout."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    start_time: float
    end_time: float | None = None
    status: AttemptStatus = "preparing"
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    metadata: dict[str, Any] | None = None
    # added
    outcome: Outcome | None = None
    error: str | None = None
    resources_version: int | None = None
    policy_version: int | None = None
    reward: float | None = None


class AttemptedRollout(Rollout):
    """A rollout with its latest attempt."""

    attempt: Attempt

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.attempt.rollout_id != self.rollout_id:
            raise ValueError(f"attempt of rollout {self.attempt.rollout_id} does not belong to {self.rollout_id}")
        return self


# What a store answers with for a rollout: with its latest attempt, or a plain `Rollout`, without `.attempt`, if it was
# never attempted. A type checker is told what it nearly always is, with `Any` for the rest: `r.attempt.status` needs no
# `isinstance` first, and a misspelt `r.atempt` is still found.
if TYPE_CHECKING:
    AnyRollout = AttemptedRollout | Any
    FoundRollout = AttemptedRollout | Any
else:
    AnyRollout = AttemptedRollout | Rollout
    FoundRollout = AttemptedRollout | Rollout | None  # looked up by an id, which its caller knows to exist


class EnqueueRolloutRequest(Record, extra="forbid"):
    """The arguments of `enqueue_rollout`, for many at once; a field that does not exist is refused."""

    input: TaskInput
    mode: RolloutMode | None = None
    resources_id: str | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None
    # added
    rollout_id: str | None = None
    group_id: str | None = None
    queue: str = "default"
    priority: _Whole = 0
    tags: dict[str, _Tag] | None = None


class Worker(Delivered):
    """What is known of one runner."""

    worker_id: str
    status: WorkerStatus = "unknown"
    heartbeat_stats: dict[str, Any] | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None


# -- resources ---------------------------------------------------------------------------------------------------------


class Resource(Record):
    """Base of what a driver publishes for agents."""

    resource_type: Any


class LLM(Resource):
    """An OpenAI-compatible endpoint."""

    resource_type: Literal["llm"] = "llm"
    endpoint: str
    model: str
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = Field(default_factory=dict)

    def get_base_url(self, *args: Any, **kwargs: Any) -> str:
        """The URL to give a client."""
        return str(self.__dict__["endpoint"])


class ProxyLLM(LLM):
    """An endpoint behind a proxy that learns from the URL which rollout a request belongs to."""

    resource_type: Literal["proxy_llm"] = "proxy_llm"  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "endpoint":
            logger.warning("Read ProxyLLM.endpoint: requests to it belong to no rollout; use get_base_url()")
        return super().__getattribute__(name)

    def get_base_url(self, rollout_id: str | None = None, attempt_id: str | None = None) -> str:
        """The URL for one attempt; without ids the bare endpoint."""
        endpoint = str(self.__dict__["endpoint"])
        if rollout_id is None and attempt_id is None:
            return endpoint
        if rollout_id is None or attempt_id is None:
            raise ValueError(f"rollout_id={rollout_id!r}, attempt_id={attempt_id!r}: expected both or neither")
        base = endpoint.rstrip("/")
        suffix = "/v1" if base.endswith("/v1") else ""
        return f"{base.removesuffix('/v1')}/rollout/{rollout_id}/attempt/{attempt_id}{suffix}"

    def with_attempted_rollout(self, rollout: AttemptedRollout) -> LLM:
        """A plain `LLM` whose URL names the attempt."""
        values = self.__dict__
        return LLM(
            endpoint=self.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id),
            model=values["model"],
            api_key=values["api_key"],
            sampling_parameters=dict(values["sampling_parameters"]),
        )


class PromptTemplate(Resource):
    """A prompt with places to fill in."""

    resource_type: Literal["prompt_template"] = "prompt_template"
    template: str
    engine: Literal["jinja", "f-string", "poml"]

    def format(self, /, **values: Any) -> str:
        """The prompt with its places filled in; only the "f-string" engine is built in."""
        if self.engine != "f-string":
            raise NotImplementedError(
                f"Formatting engine {self.engine!r} is not built in; render self.template yourself"
            )
        return self.template.format(**values)


class ObjectResource(Resource, arbitrary_types_allowed=True):
    """Weights and other large objects.

    `value` is anything picklable or a `ray.ObjectRef`. On a Ray store, a value above 64 KiB goes to Ray's object
    store, owned by the process that published it, and `value` is then a reference; `get()` and `await aget()` give the
    object in any case. With a journal, one of at most `journal_object_bytes` is also a file there, and outlives the
    process that published it and the store. A newer version of the same resources id frees the older object once no
    attempt uses it.
    """

    resource_type: Literal["object"] = "object"
    value: Any
    _source: Source | None = PrivateAttr(default=None)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        if self.__pydantic_private__ is None:  # as it was pickled before there was a source
            object.__setattr__(self, "__pydantic_private__", {"_source": None})

    def get(self, timeout: float | None = 60.0) -> Any:
        """The object itself; blocks until it is here.

        Raises `PayloadLostError` when the process that owned it has died and no journal has it, and
        `ray.exceptions.GetTimeoutError`.
        """
        if not self.is_elsewhere:
            return self.value
        try:
            # Not `ray.get`, which warns in an async actor of blocking its loop, also on a thread of the agent's.
            return self._future().result(timeout)
        except Exception as error:
            return self._fallen_back(error, timeout)

    async def aget(self, timeout: float | None = 60.0) -> Any:
        """The object itself, waited for without holding up the event loop; raises what `get` raises."""
        if not self.is_elsewhere:
            return self.value
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(self._future())
        except Exception as error:
            return await asyncio.to_thread(self._fallen_back, error, timeout)

    @property
    def is_elsewhere(self) -> bool:
        """Whether `value` is not the object itself, but says where it is."""
        return isinstance(self.value, Kept) or type(self.value).__name__ == "ObjectRef"

    @property
    def source(self) -> Source | None:
        """Which object it is that the resource has, and where else it may be; for the store's clients."""
        return self._source

    @source.setter
    def source(self, source: Source) -> None:
        self._source = source

    def _future(self) -> Future[Any]:
        if isinstance(self.value, Kept):
            raise FileNotFoundError("the process that published it, or the store, has ended since")
        return self.value.future()  # type: ignore[no-any-return]

    def _fallen_back(self, error: Exception, timeout: float | None) -> Any:
        """The object from elsewhere, when the object store does not have it."""
        if isinstance(error, FileNotFoundError) and isinstance(self.value, Kept):
            why = str(error)
        else:
            import ray  # only a user of references needs it

            is_late = isinstance(error, TimeoutError)
            if not is_late and not isinstance(error, ray.exceptions.ObjectLostError):  # OwnerDiedError is one
                raise error
            why = (
                f"its owner {getattr(error, 'owner_address', None) or 'process'} died or freed it "
                f"({type(error).__name__}); "
                "publish from a process that lives as long as the run, e.g. the driver."
            )
            if is_late and (self._source is None or self._source.kept.address is None):
                raise ray.exceptions.GetTimeoutError(
                    f"object {self.value.hex()} was not there within {timeout} s"
                ) from None
        if self._source is None:
            what = f"object {self.value.hex()}" if not isinstance(self.value, Kept) else "an object reference"
            raise PayloadLostError(what, why) from None
        return self._source.read(why)


ResourceUnion = Annotated[LLM | ProxyLLM | PromptTemplate | ObjectResource, Field(discriminator="resource_type")]
NamedResources = dict[str, ResourceUnion]


class ResourcesUpdate(Delivered):
    """One immutable version of a set of named resources."""

    resources_id: str
    create_time: float
    update_time: float
    version: int
    resources: NamedResources
    # added
    policy_version: int | None = None


# -- containers --------------------------------------------------------------------------------------------------------


class PaginatedResult(Delivered, Sequence[T], Generic[T]):
    """One page of a query, which is also a sequence of its items and equals a list of the same items."""

    items: Sequence[T]
    limit: int
    offset: int
    total: int

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self.items[index]

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        return iter(self.items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (list, tuple)):
            return list(self.items) == list(other)
        return super().__eq__(other)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        first = repr(self.items[0]) if self.items else "empty"
        shown = f"[{first}, ...]" if len(self.items) > 1 else first
        end = "" if self.limit == -1 else self.offset + self.limit
        return f"<PaginatedResult ({self.offset}:{end} of {self.total}) {shown}>"


class Page(Delivered, Generic[T]):
    """Items that follow a cursor, and the cursor to go on from."""

    items: list[T]
    cursor: int | None


class Batch(Delivered):
    """Finished rollouts that a consumer holds, to train on them.

    Attributes:
        consumer: who holds it.
        number: of the batch, counted for each consumer from 1; 0 for an empty one.
        rollouts: in the order in which they finished, or came back; with their attempts.
    """

    consumer: str
    number: int
    rollouts: list[AnyRollout]


class LedgerEntry(BaseModel):
    """That a consumer took a rollout.

    Attributes:
        rollout_id: which.
        batch: in which batch, in the order in which they were taken.
        step: of the model, which consumed it; None while it is only held.
        is_durable: whether a checkpoint covers that step, so that it will not come again.
        note: what was said when it was acknowledged.
    """

    rollout_id: str
    batch: int
    step: int | None
    is_durable: bool
    note: str | None


class Change(BaseModel):
    """One thing the store did."""

    sequence: int
    time: float
    kind: str
    rollout_id: str | None = None
    attempt_id: str | None = None
    detail: dict[str, Any] | None = None


class LightningStoreCapabilities(TypedDict, total=False):
    """What a store allows its users."""

    thread_safe: bool
    async_safe: bool
    zero_copy: bool
    otlp_traces: bool


class LightningStoreStatistics(TypedDict, total=False):
    """Counts of a store; sizes in bytes, durations in seconds."""

    name: str
    total_rollouts: int
    total_attempts: int
    total_spans: int
    total_resources: int
    total_workers: int
    uptime: float
    total_span_bytes: int
    eviction_threshold_bytes: int
    safe_threshold_bytes: int
    memory_capacity_bytes: int
    payload_bytes: int
    accounted_bytes: int
    evicted_spans: int
    evicted_rollouts: int
    eviction_passes: int
    last_eviction_seconds: float
    cpu_seconds: float  # of the store's process
    rss_bytes: int | None  # the same
    deadline_fires: int
    waiters: int
    sessions: int
    queue_length: int
    queue_lengths: dict[str, int]
    unserved_queues: dict[str, float]  # in which rollouts wait, and for how long no process has asked for work of it
    held_back: int  # of those that wait: their resources cannot be had until they are published again
    held_back_by_resources: dict[str, int]
    rollouts_by_status: dict[str, int]
    suspects: int
    withdrawals: int
    changes: int
    change_feed_length: int
    memory_full: bool
    waits_for_consumer: str | None  # whose rollouts fill the memory, so that no work is handed out
    consumers: dict[str, dict[str, Any]]  # of each: filter, awaited, open batches and whose they are, checkpoint, ...
    actor_calls: int
    operations: int
    overloads: int  # what was refused since there was too much of something
    # Spans that were lost, and model calls that cannot be trained on, by reason (docs/spans.md has them): what runners
    # counted and told the store's process, with their heartbeats and when they end.
    spans_lost: dict[str, int]
    journal: dict[str, Any] | None  # its snapshots, what was written since, and why there are no more if so


class StoreInfo(BaseModel):
    """Who a store is."""

    store_id: str
    name: str | None
    namespace: str | None
    epoch: int
    protocol: int
    node: str | None
    limits: dict[str, int]
    capabilities: dict[str, bool]
    endpoints: dict[str, str]


def is_queuing(rollout: Rollout) -> bool:
    """Whether the rollout waits in a queue."""
    return rollout.status in ("queuing", "requeuing")


def is_running(rollout: Rollout) -> bool:
    """Whether somebody works on the rollout."""
    return rollout.status in ("preparing", "running")


def is_finished(rollout: Rollout) -> bool:
    """Whether the rollout has ended."""
    return rollout.status in ("failed", "succeeded", "cancelled")
