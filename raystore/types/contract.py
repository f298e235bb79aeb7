"""The public records: what users construct and what the store answers with.

Field names and defaults are those of agent-lightning 0.3.0's LightningStore; fields that raystore adds stand under
"added" in each class. Times are seconds since the epoch. Answers are snapshots: changing one never changes the store.
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

from pydantic import BaseModel, BeforeValidator, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from raystore.core.lifecycle import (
    ACTIVE,
    FINISHED,
    QUEUED,
    AttemptStatus,
    GroupStatus,
    Outcome,
    RetryOutcome,
    RolloutStatus,
    WorkerStatus,
)
from raystore.core.schema import MAX_BACKOFF_SECONDS, MAX_FACTOR, MAX_RETRIES
from raystore.errors import PayloadLostError
from raystore.reports.log import a_minute, logger_of
from raystore.types.spans import AttributeValue as AttributeValue
from raystore.types.spans import Event as Event
from raystore.types.spans import Link as Link
from raystore.types.spans import OtelResource as OtelResource
from raystore.types.spans import Span as Span
from raystore.types.spans import SpanContext as SpanContext
from raystore.types.spans import SpanCoreFields as SpanCoreFields
from raystore.types.spans import StatusCode as StatusCode
from raystore.types.spans import TraceStatus as TraceStatus
from raystore.values.models import Model, StoredModel
from raystore.values.objects import Kept, Source
from raystore.values.plain import scalar

__all__ = [
    "LLM", "UNSET", "Attempt", "AttemptStatus", "AttemptedRollout", "Batch", "Change", "Distribution",
    "EnqueueGroupRequest", "EnqueueRolloutRequest", "Finding", "Group", "GroupBatch", "GroupStatus", "LedgerEntry",
    "LightningStoreCapabilities", "LightningStoreStatistics", "MetricsBucket", "MetricsTotal", "NamedResources",
    "ObjectResource", "Outcome", "Page", "PaginatedResult", "PromptTemplate", "ProxyLLM", "QueueLimit",
    "QueuePause", "Resource", "ResourceUnion", "ResourcesUpdate", "RetryOutcome", "RetryRule", "RewardSummary",
    "Rollout", "RolloutConfig", "RolloutMode", "RolloutStatus", "StoreInfo", "StoreMetrics", "TagValue",
    "TakenGroup", "TaskInput", "Unset", "VersionRewards", "Worker", "WorkerStatus", "is_finished", "is_queuing",
    "is_running",
]  # fmt: skip

logger: logging.Logger = logger_of("raystore.types.contract")

RolloutMode = Literal["train", "val", "test"]
TaskInput = Any  #: a rollout's input: anything that can be pickled
TagValue = str | bool | int | float


def _tag(value: Any) -> Any:
    """A number of numpy or torch as a plain one; pydantic would make a float of a Decimal, and 1 of numpy's True."""
    found = scalar(value)
    if type(found) not in (str, bool, int, float):
        raise ValueError("expected a str, int, float or bool")
    return found


_Tag = Annotated[TagValue, BeforeValidator(_tag)]
_Seconds = Annotated[float, Field(ge=0), BeforeValidator(scalar)]  # which NaN is not
_Backoff = Annotated[float, Field(ge=0, le=MAX_BACKOFF_SECONDS), BeforeValidator(scalar)]
_Retries = Annotated[int, Field(ge=0, le=MAX_RETRIES), BeforeValidator(scalar)]
_Factor = Annotated[float, Field(ge=1, le=MAX_FACTOR), BeforeValidator(scalar)]
_Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(scalar)]
_Whole = Annotated[int, BeforeValidator(scalar)]
_Positive = Annotated[int, Field(ge=1), BeforeValidator(scalar)]
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


UNSET: _UnsetType = _UnsetType()  #: an argument that leaves a field as it is, where None would clear it
Unset = _UnsetType


def _get_unset() -> _UnsetType:
    return UNSET


# -- rollouts ----------------------------------------------------------------------------------------------------------


class RetryRule(Model, extra="forbid"):
    """How often a rollout is tried again after attempts with one outcome, and after which delays.

    During a delay the rollout is "requeuing", keeps its place in the queue, and is not handed out. The delay before the
    first retry is `backoff_seconds`, and each further one is `factor` times longer, up to `max_backoff_seconds`. Raises
    pydantic's `ValidationError`, also for an unknown field.

    Attributes:
        max_retries: attempts after those with this outcome, at most 1,000; 0: the rollout fails at the first.
        backoff_seconds: delay before the first retry, at most 1,000,000; 0: all retries are at once.
        factor: by which the delay grows from one retry to the next, from 1 to 1,000.
        max_backoff_seconds: the longest delay; None: 1,000,000.
        jitter: share of the delay, 0 to 1, that chance may take off, so that what failed together is not tried again
            together.
    """

    max_retries: _Retries
    backoff_seconds: _Backoff = 1.0
    factor: _Factor = 2.0
    max_backoff_seconds: _Backoff | None = None
    jitter: _Share = 0.1

    @model_validator(mode="after")
    def _grows(self) -> Self:
        longest = self.max_backoff_seconds
        if longest is not None and longest < self.backoff_seconds:
            first = self.backoff_seconds
            raise ValueError(
                f"max_backoff_seconds={longest} is below backoff_seconds={first}, which is the first delay"
            )
        return self


class RolloutConfig(Model, extra="forbid"):
    """When an attempt of a rollout is given up, and what is tried again.

    A rollout is tried again only if the status of its attempt is in `retry_condition` *and* `max_attempts` allows
    another attempt. Each of the two alone does nothing, and warns unless the other is given too (`retry_condition=[]`).
    An outcome with a rule in `retry_rules` has an allowance of its own instead: of it only the rule decides, and its
    attempts count neither for `max_attempts` nor for the store's `max_deliveries`.
    Raises pydantic's `ValidationError`, also for an unknown field: `RolloutConfig(timeout=60)` would otherwise mean "no
    timeout".

    Attributes:
        timeout_seconds: seconds from the start of an attempt until it has timed out; None: never.
        unresponsive_seconds: seconds without a span or heartbeat until an attempt is unresponsive; None: never.
        max_attempts: attempts in all, 1 or more; those lost with their process, or aborted, do not count.
        retry_condition: attempt statuses ("failed", "timeout", "unresponsive") after which it is tried again.
        retry_rules: rules by outcome ("agent_error", "timeout", "unresponsive", "infra", "runner_lost"), with delays:
            `{"timeout": rs.RetryRule(max_retries=2, backoff_seconds=30)}`. Of losses with its process those count for
            which the rollout is to blame.
    """

    timeout_seconds: _Seconds | None = None
    unresponsive_seconds: _Seconds | None = None
    max_attempts: _Whole = Field(default=1, ge=1)
    retry_condition: list[AttemptStatus] = Field(default_factory=list)
    # added
    retry_rules: dict[RetryOutcome, RetryRule] = Field(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _has_both_or_neither(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Warn of one that does nothing without the other; not again where a config is passed on.

        The values of the new config decide, not the arguments: a subclass may have other defaults or arguments.
        """
        made = handler(given)
        if type(given) is not dict:
            return made
        said, more = made.model_fields_set, " beyond its retry_rules" if made.retry_rules else ""
        if made.max_attempts > 1 and not made.retry_condition and "retry_condition" not in said:
            warn_caller(
                f"RolloutConfig(max_attempts={made.max_attempts}) tries nothing again{more}, since no retry_condition "
                "names the statuses that are: add retry_condition=['failed', 'timeout', 'unresponsive'], or those of "
                "them that you mean; retry_condition=[] if none"
            )
        elif made.retry_condition and made.max_attempts == 1 and "max_attempts" not in said:
            warn_caller(
                f"RolloutConfig(retry_condition={made.retry_condition}) tries nothing again{more}, since max_attempts "
                "is 1 unless given: add max_attempts=3, or as many as you mean in all; max_attempts=1 if it is one"
            )
        return made


def warn_caller(text: str) -> None:
    """Warn the nearest caller that is neither raystore nor pydantic."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("raystore.", "pydantic.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


class Rollout(StoredModel):
    """One task for an agent, and its status.

    Attributes:
        rollout_id: unique in a store.
        input: the task as it was enqueued. Raises `PayloadNotReadableError` when read, like `metadata`, if its class
            cannot be imported here.
        start_time: when it was enqueued.
        end_time: when it ended; None before.
        mode: "train", "val" or "test"; None if the driver does not say.
        resources_id: the resources for its attempts; None: the latest.
        status: follows the status of its latest attempt.
        config: timeouts and retries.
        metadata: any values of the driver.
        group_id: of rollouts that belong together, such as samples of one prompt.
        queue: name of the queue from which it is claimed.
        priority: of two rollouts in a queue, that with the larger number is claimed first.
        tags: up to 16 values that queries can filter by.
        reward: the last primary reward that its attempts reported; None if there is none.
        requeued_from: the rollout in whose place it was made (`requeue`); None for all others.
    """

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
    requeued_from: str | None = None


class Attempt(StoredModel):
    """One execution of a rollout.

    Attributes:
        rollout_id: the rollout.
        attempt_id: unique in a store.
        sequence_id: number of the attempt among those of its rollout, from 1.
        start_time: when the rollout was claimed.
        end_time: when the attempt ended; None before.
        status: "preparing" until the first sign of life, then "running", then how it ended.
        worker_id: name of the runner that claimed it.
        last_heartbeat_time: time of the last sign of life, spans included.
        metadata: any values of the runner or the driver.
        outcome: why it ended; None before. "agent_error": the agent raised; "infra": it raised `rs.Abort`, or it or its
            resources could not be loaded; "runner_lost": the process that ran it died; "withdrawn": it was given back
            unfinished, as by a runner that is stopped; "superseded": another attempt was started by hand; "dropped":
            the agent raised `rs.Drop`; and "ok", "cancelled", "timeout", "unresponsive".
        error: what went wrong, as text; None if nothing did.
        resources_version: version of the resources when it was claimed.
        policy_version: version of the policy when it was claimed.
        reward: the last primary reward that it reported, or took over with a saved state; None if there is none.
        resumed_from: the attempt whose saved state it goes on from (`ctx.save`), and whose spans until then count as
            its own; None if it began anew.
    """

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
    resumed_from: str | None = None


class AttemptedRollout(Rollout):
    """A rollout with its latest attempt, in the field `attempt`."""

    attempt: Attempt

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.attempt.rollout_id != self.rollout_id:
            raise ValueError(f"attempt of rollout {self.attempt.rollout_id} does not belong to {self.rollout_id}")
        return self


# The answer of a store for a rollout: an `AttemptedRollout`, or a plain `Rollout` if it was never attempted. A type
# checker is told of the former, with `Any` for the rest: `r.attempt.status` needs no `isinstance`, and a misspelt
# `r.atempt` is still found.
if TYPE_CHECKING:
    AnyRollout = AttemptedRollout | Any
    FoundRollout = AttemptedRollout | Any
else:
    AnyRollout = AttemptedRollout | Rollout
    FoundRollout = AttemptedRollout | Rollout | None  # None for an id that does not exist


class EnqueueRolloutRequest(Model, extra="forbid"):
    """The arguments of `enqueue_rollout` for one of many rollouts; the fields mean what they mean in `Rollout`.

    Raises pydantic's `ValidationError`, also for an unknown field. With a `rollout_id` of your own the request can be
    repeated: it makes one rollout.
    """

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


class EnqueueGroupRequest(Model, extra="forbid"):
    """The arguments of `enqueue_group` for one of many groups.

    Raises pydantic's `ValidationError`, also for an unknown field. With a `group_id` of your own the request can be
    repeated: it makes one group.
    """

    input: TaskInput
    n: _Positive
    group_id: str | None = None
    mode: RolloutMode | None = None
    resources_id: str | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None
    queue: str = "default"
    priority: _Whole = 0
    tags: dict[str, _Tag] | None = None
    deadline_seconds: _Seconds | None = None
    min_size: _Whole | None = Field(default=None, ge=2)
    spare: _Whole = Field(default=0, ge=0)
    replace: _Whole = Field(default=0, ge=0)


class Group(StoredModel):
    """Rollouts of one input that are trained on together, and where they stand.

    Attributes:
        group_id: unique in a store; the `group_id` of its rollouts.
        input: the task of its rollouts.
        n: how many of them are to succeed.
        min_size: with so many successes it is complete when more cannot be had; None: only with all `n`.
        spare: how many more were enqueued with them, to stand in for members that fail.
        replace: how many members may be replaced that fail by what their agents do.
        start_time: when it was enqueued.
        end_time: when it became complete, or failed, or was cancelled; None before.
        deadline_time: when it ends with what it has by then; None: never. Moves while a member is held back.
        status: "open" until it ends; "complete" with what it needs, "trained" once a step has consumed it; "failed"
            with too little; "cancelled".
        why: why it ended, if not with all of its `n`.
        mode: of its rollouts, like `queue`, `priority` and `tags`.
        queue: name of their queue.
        priority: of them in their queue.
        tags: of each of them.
        members: ids of its rollouts, replaced and spare ones included, in the order in which they came.
    """

    group_id: str
    input: TaskInput
    n: int
    min_size: int | None = None
    spare: int = 0
    replace: int = 0
    start_time: float
    end_time: float | None = None
    deadline_time: float | None = None
    status: GroupStatus = "open"
    why: str | None = None
    mode: RolloutMode | None = None
    queue: str = "default"
    priority: int = 0
    tags: dict[str, TagValue] = Field(default_factory=dict)
    members: list[str] = Field(default_factory=list)


class TakenGroup(Group):
    """A group in a batch, with the rollouts to train on.

    Attributes:
        rollouts: its members that have succeeded, in the order of their places, with their attempts; `n` of them, or
            fewer but not fewer than `min_size`.
        rewards: the reward of each of them; None for one without.
    """

    rollouts: list[AnyRollout]

    @property
    def rewards(self) -> list[float | None]:
        """The reward of each rollout; None for one without."""
        return [rollout.reward for rollout in self.rollouts]


class Worker(StoredModel):
    """The store's record of one runner.

    Attributes:
        worker_id: name of the runner.
        status: "busy" while it has an attempt, "idle" after a claim or an orderly end, else "unknown".
        heartbeat_stats: what it reported last with `update_worker`.
        last_heartbeat_time: time of that report.
        last_dequeue_time: when it last asked for work.
        last_busy_time: when it last began to work.
        last_idle_time: when it last had nothing to do.
        current_rollout_id: the rollout that it works on; None if it is not busy.
        current_attempt_id: the attempt that it works on; None if it is not busy.
    """

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


class Resource(Model):
    """Base class of what a driver publishes for agents; `resource_type` tells the classes apart."""

    resource_type: Any


class LLM(Resource):
    """An OpenAI-compatible endpoint.

    Attributes:
        endpoint: its base URL.
        model: name of the model.
        api_key: None if the endpoint needs none.
        sampling_parameters: such as temperature; for the agent to pass on.
    """

    resource_type: Literal["llm"] = "llm"
    endpoint: str
    model: str
    api_key: str | None = None
    sampling_parameters: dict[str, Any] = Field(default_factory=dict)

    def get_base_url(self, *args: Any, **kwargs: Any) -> str:
        """The base URL for a client; arguments are ignored."""
        return str(self.__dict__["endpoint"])


class ProxyLLM(LLM):
    """An endpoint behind a proxy that reads from the URL to which rollout a request belongs.

    Reading `endpoint` logs a warning, as in agent-lightning.
    """

    resource_type: Literal["proxy_llm"] = "proxy_llm"  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "endpoint":
            logger.warning(
                "Read ProxyLLM.endpoint: requests to it belong to no rollout; use get_base_url()",
                extra=a_minute("endpoint"),
            )
        return super().__getattribute__(name)

    def get_base_url(self, rollout_id: str | None = None, attempt_id: str | None = None) -> str:
        """The URL for one attempt; the bare endpoint without ids. Raises `ValueError` if only one id is given."""
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
    """A prompt with placeholders.

    Attributes:
        template: the text.
        engine: the syntax of its placeholders.
    """

    resource_type: Literal["prompt_template"] = "prompt_template"
    template: str
    engine: Literal["jinja", "f-string", "poml"]

    def format(self, /, **values: Any) -> str:
        """The prompt with these values. Raises `NotImplementedError` for an engine other than "f-string"."""
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
        """The object itself; blocks until it is here, at most `timeout` seconds (None: for ever).

        Raises `PayloadLostError` if the process that owned it has died and no journal has it, and
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
        """The object itself, as `get` gives it, without blocking the event loop."""
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
        """Which object the resource has, and where else it may be; for the store's clients."""
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
NamedResources = dict[str, ResourceUnion]  #: resources by the names under which agents find them


class ResourcesUpdate(StoredModel):
    """One immutable version of a set of named resources.

    Attributes:
        resources_id: the set.
        create_time: when its first version was published.
        update_time: when this version was published.
        version: number of this version, from 1.
        resources: by name.
        policy_version: of the weights that these resources serve; None if the driver does not say.
    """

    resources_id: str
    create_time: float
    update_time: float
    version: int
    resources: NamedResources
    # added
    policy_version: int | None = None


# -- containers --------------------------------------------------------------------------------------------------------


class PaginatedResult(StoredModel, Sequence[T], Generic[T]):
    """One page of a query: a sequence of its items, equal to a list of the same items.

    Attributes:
        items: of this page.
        limit: how many were asked for; -1: all.
        offset: how many before them were left out.
        total: how many the query finds in all.
    """

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


class Page(StoredModel, Generic[T]):
    """Items that follow a cursor, and the cursor from which to go on (None: the beginning)."""

    items: list[T]
    cursor: int | None


class Batch(StoredModel):
    """Finished rollouts that a consumer holds, to train on them.

    Attributes:
        consumer: name of the consumer that holds it.
        number: of the batch, counted for each consumer from 1; 0 for an empty batch.
        rollouts: in the order in which they finished, or were given back; with their attempts.
    """

    consumer: str
    number: int
    rollouts: list[AnyRollout]


class GroupBatch(Batch):
    """Whole groups that a consumer holds, to train on them.

    Attributes:
        groups: in the order in which they became complete, or were given back.
        rollouts: those of all groups, group by group.
    """

    groups: list[TakenGroup]


class LedgerEntry(BaseModel):
    """A record that a consumer took a rollout.

    Attributes:
        rollout_id: the rollout.
        batch: number of the batch in which it was taken.
        step: the training step that consumed it; None while it is only held.
        is_durable: whether a checkpoint covers that step, so that the rollout will not be given again.
        note: the note with which the batch was acknowledged.
    """

    rollout_id: str
    batch: int
    step: int | None
    is_durable: bool
    note: str | None


class QueuePause(BaseModel):
    """That a queue hands out no work.

    Attributes:
        queue: its name; None: all queues, also those that come later.
        session_id: of the process that paused it.
        since: when.
        keep: whether the pause lasts until somebody resumes the queue, and not only as long as that process.
    """

    queue: str | None
    session_id: str
    since: float
    keep: bool


class QueueLimit(BaseModel):
    """How much of a queue may run at once, and start in a minute.

    Attributes:
        queue: its name.
        max_running: rollouts of it that run at once; None: any number.
        per_minute: claims of it in any 60 seconds; None: any number.
        running: how many rollouts of it are preparing or running now.
        reached: the limit because of which it hands out nothing now, if it does not.
    """

    queue: str
    max_running: int | None
    per_minute: int | None
    running: int
    reached: Literal["max_running", "per_minute"] | None


class Finding(BaseModel):
    """One thing that keeps work from going on, or may soon; or that is wrong with a run.

    Attributes:
        kind: a short code, the same in all versions: "no_tasks", "unserved_queue", ... (docs/why.md has them all).
        text: what is the case, in words, with numbers and ids. Control characters of a user's texts are spelt out.
        remedy: the next thing to do.
        evidence: what the text says, as plain values: ids, counts, seconds.
    """

    kind: str
    text: str
    remedy: str
    evidence: dict[str, Any]


class Change(BaseModel):
    """One thing that the store did.

    Attributes:
        sequence: its number in the order of changes; the cursor from which `changes` goes on.
        time: when.
        kind: what: "enqueued", the status that a rollout came to, "taken", "evicted", "checkpoint", ...
        rollout_id: the rollout that changed, if one did.
        attempt_id: the attempt that changed, if one did.
        detail: more, by kind.
    """

    sequence: int
    time: float
    kind: str
    rollout_id: str | None = None
    attempt_id: str | None = None
    detail: dict[str, Any] | None = None


class LightningStoreCapabilities(TypedDict, total=False):
    """What a store can do, as in agent-lightning: from several threads, from a loop, without copies, receive OTLP."""

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
    backing_off: int  # of those that wait: an attempt ended badly, and the delay of a `RetryRule` is not over
    backing_off_by_queue: dict[str, int]
    paused: list[dict[str, Any]]  # of each pause, the oldest first, what `QueuePause` says
    queue_limits: dict[str, dict[str, Any]]  # of each queue with limits the rest of its `QueueLimit`
    rollouts_by_status: dict[str, int]
    groups_by_status: dict[str, int]
    suspects: int
    withdrawals: int
    changes: int
    change_feed_length: int
    memory_full: bool
    waits_for_consumer: str | None  # whose rollouts fill the memory, so that no work is handed out
    consumers: dict[
        str, dict[str, Any]
    ]  # of each: filter, what it takes, how many it awaits, open batches and whose they are, checkpoint, ...
    actor_calls: int
    operations: int
    overloads: int  # what was refused since there was too much of something
    # Spans that were lost, and model calls that cannot be trained on, by reason (docs/spans.md has them): what runners
    # counted and told the store's process, with their heartbeats and when they end.
    spans_lost: dict[str, int]
    journal: dict[str, Any] | None  # its snapshots, what was written since, and why there are no more if so


class Distribution(TypedDict):
    """How durations are distributed; quantiles are within 5 %, and None if there is no duration."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


class RewardSummary(TypedDict):
    """Rewards of finished rollouts, before any filter; without a rollout all but `count` are None."""

    count: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None


class VersionRewards(RewardSummary):
    """Rewards of the rollouts that ran with one version of their resources."""

    resources_id: str  # empty: none
    version: int | None  # of the policy, else of the resources
    mode: str  # "train", "val", "test", or empty


class MetricsTotal(TypedDict):
    """What happened in a span of time."""

    enqueued: int
    started: int  # attempts
    finished: dict[str, int]  # rollouts by outcome of their last attempt ("ok", ...), or "cancelled"
    retried: dict[str, int]  # attempts by outcome, after which their rollout waits again
    spans: int
    span_bytes: int
    turns: int  # calls of models, as runners count them
    prompt_tokens: int
    response_tokens: int
    finish_reasons: dict[str, int]  # of these calls
    durations: Distribution  # of the last attempts of finished rollouts, in seconds
    waits: Distribution  # between the enqueueing of a rollout and its first attempt, in seconds


class MetricsBucket(MetricsTotal):
    """What happened in ten seconds."""

    time: float  # at which they begin
    rewards: dict[str, RewardSummary]  # by mode


class StoreMetrics(TypedDict):
    """Rates, distributions and rewards of the last time, and what held the run back; sizes in bytes."""

    time: float  # of the store's clock
    seconds: float  # that were asked for
    bucket_seconds: float
    total: MetricsTotal
    buckets: list[MetricsBucket]  # the oldest first; those in which nothing happened are left out
    rewards: list[VersionRewards]  # the newest version last
    sampled_seconds: float  # in which somebody waited or something ran, so that the store looked once a second
    # Of these seconds, the share in which each cause held the run back (docs/metrics.md says which there are); several
    # may do so at once.
    shares: dict[str, float]
    waited_seconds: dict[str, float]  # of each consumer, for a batch
    loop_lag_seconds: float  # by which the store's loop was late, at most
    memory: dict[str, int]  # spans, values, resources, groups, total; eviction_threshold, safe_threshold, capacity
    journal_lag_seconds: float | None  # for which the oldest change waits for the disk; None without a journal
    operations: int  # since the store's process began
    actor_calls: int  # that carried them


class StoreInfo(BaseModel):
    """The identity of a store.

    Attributes:
        store_id: of its state; the same after a restart from its journal.
        name: of its actor; None in process.
        namespace: Ray's, in which the name is.
        epoch: number of its process, larger after each restart.
        protocol: version of the protocol that it speaks.
        node: Ray's id of the node on which it runs.
        limits: largest sizes in bytes ("value_bytes", "span_bytes", "call_bytes", "state_bytes").
        capabilities: as in `LightningStoreCapabilities`.
        endpoints: names of the actors that take spans and rollouts.
    """

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
    return rollout.status in QUEUED


def is_running(rollout: Rollout) -> bool:
    """Whether somebody works on the rollout."""
    return rollout.status in ACTIVE


def is_finished(rollout: Rollout) -> bool:
    """Whether the rollout has ended."""
    return rollout.status in FINISHED
