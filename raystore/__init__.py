"""raystore: the LightningStore contract on Ray, the control plane for agent RL.

`start` a store, pass it (or `store.actor`) to runners, drive it with plain async functions. See the README.
Names are imported on first use, so that `import raystore` is quick and loads neither Ray nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# isort: off
# fmt: off
if TYPE_CHECKING:  # the names of `_NAMES`, for type checkers
    from raystore.api import LightningStore as LightningStore
    from raystore.client.local import InMemoryLightningStore as InMemoryLightningStore
    from raystore.client.recovered import RecoveredRun as RecoveredRun, recover as recover
    from raystore.errors import (
        StoreError as StoreError, InvalidValueError as InvalidValueError,
        RolloutNotFoundError as RolloutNotFoundError, AttemptNotFoundError as AttemptNotFoundError,
        ResourcesNotFoundError as ResourcesNotFoundError, ClaimLostError as ClaimLostError,
        NoSuchResourceError as NoSuchResourceError, ConflictError as ConflictError,
        OverloadedError as OverloadedError, StoreOverloadedError as StoreOverloadedError,
        CursorTooOldError as CursorTooOldError, SpansEvictedError as SpansEvictedError,
        PayloadLostError as PayloadLostError, PayloadTooLargeError as PayloadTooLargeError,
        PayloadNotPicklableError as PayloadNotPicklableError, PayloadNotReadableError as PayloadNotReadableError,
        StoreUnavailableError as StoreUnavailableError, OutcomeUnknownError as OutcomeUnknownError,
        StoreClosedError as StoreClosedError, ForkedError as ForkedError, RayClientError as RayClientError,
        StoreCorruptError as StoreCorruptError, StoreNotFoundError as StoreNotFoundError,
        StoreExistsError as StoreExistsError, NotAStoreError as NotAStoreError,
        ProtocolMismatchError as ProtocolMismatchError, AgentNotPicklableError as AgentNotPicklableError,
        AgentProcessError as AgentProcessError, PoolFailedError as PoolFailedError, PoolStartError as PoolStartError,
        JournalError as JournalError, JournalDamagedError as JournalDamagedError,
        JournalFormatError as JournalFormatError, JournalMissingError as JournalMissingError,
        JournalInUseError as JournalInUseError, JournalFullError as JournalFullError,
        JournalFailedError as JournalFailedError, JournalHeldError as JournalHeldError, FencedError as FencedError,
        SealedError as SealedError, BatchConflictError as BatchConflictError, ReadOnlyError as ReadOnlyError,
        AnswerGoneError as AnswerGoneError, BatchHeldError as BatchHeldError,
        ConsumerFilterError as ConsumerFilterError, SessionEndedError as SessionEndedError, Abort as Abort,
        Drop as Drop,
    )
    from raystore.integrations import otel as otel
    from raystore.remote.cluster import start as start, connect as connect, list_stores as list_stores, stop as stop
    from raystore.remote.store import RayLightningStore as RayLightningStore
    from raystore.runner import RunnerPool as RunnerPool, Context as Context, current as current, run_one as run_one
    from raystore.spans import (
        Span as Span, SpanContext as SpanContext, SpanCoreFields as SpanCoreFields, TraceStatus as TraceStatus,
        StatusCode as StatusCode, Event as Event, Link as Link, OtelResource as OtelResource,
        AttributeValue as AttributeValue, find_final_reward as find_final_reward,
        estimate_model_size as estimate_model_size,
    )
    from raystore.tracing import semconv as semconv
    from raystore.tracing.dialects import ModelCall as ModelCall, model_calls as model_calls
    from raystore.tracing.trajectories import (
        Trajectory as Trajectory, Split as Split, trajectories as trajectories, collate as collate,
    )
    from raystore.tracing.triplets import Triplet as Triplet, triplets as triplets
    from raystore.types import (
        Rollout as Rollout, Attempt as Attempt, AttemptedRollout as AttemptedRollout, RolloutConfig as RolloutConfig,
        EnqueueRolloutRequest as EnqueueRolloutRequest, Worker as Worker, Page as Page, Change as Change,
        StoreInfo as StoreInfo, Batch as Batch, LedgerEntry as LedgerEntry, ResourcesUpdate as ResourcesUpdate,
        PromptTemplate as PromptTemplate, LLM as LLM, ProxyLLM as ProxyLLM, ObjectResource as ObjectResource,
        Resource as Resource, ResourceUnion as ResourceUnion, NamedResources as NamedResources,
        PaginatedResult as PaginatedResult, UNSET as UNSET, Unset as Unset, is_queuing as is_queuing,
        is_running as is_running, is_finished as is_finished,
        LightningStoreCapabilities as LightningStoreCapabilities,
        LightningStoreStatistics as LightningStoreStatistics, RolloutStatus as RolloutStatus,
        AttemptStatus as AttemptStatus, RolloutMode as RolloutMode, WorkerStatus as WorkerStatus, Outcome as Outcome,
        TaskInput as TaskInput, TagValue as TagValue,
    )
# fmt: on
# isort: on

#: Where each public name lives.
_NAMES = {
    "raystore.api": "LightningStore",
    "raystore.client.local": "InMemoryLightningStore",
    "raystore.client.recovered": "RecoveredRun recover",
    "raystore.remote.cluster": "start connect list_stores stop",
    "raystore.remote.store": "RayLightningStore",
    "raystore.runner": "RunnerPool Context current run_one",
    "raystore.tracing.dialects": "ModelCall model_calls",
    "raystore.tracing.trajectories": "Trajectory Split trajectories collate",
    "raystore.tracing.triplets": "Triplet triplets",
    "raystore.types": """
        Rollout Attempt AttemptedRollout RolloutConfig EnqueueRolloutRequest Worker Page Change StoreInfo
        Batch LedgerEntry
        ResourcesUpdate PromptTemplate LLM ProxyLLM ObjectResource Resource ResourceUnion NamedResources
        PaginatedResult
        UNSET Unset is_queuing is_running is_finished LightningStoreCapabilities LightningStoreStatistics
        RolloutStatus AttemptStatus RolloutMode WorkerStatus Outcome TaskInput TagValue
    """,
    "raystore.spans": """
        Span SpanContext SpanCoreFields TraceStatus StatusCode Event Link OtelResource AttributeValue
        find_final_reward estimate_model_size
    """,
    "raystore.errors": """
        StoreError InvalidValueError RolloutNotFoundError AttemptNotFoundError ResourcesNotFoundError ClaimLostError
        NoSuchResourceError
        ConflictError OverloadedError StoreOverloadedError CursorTooOldError SpansEvictedError PayloadLostError
        PayloadTooLargeError PayloadNotPicklableError PayloadNotReadableError
        StoreUnavailableError OutcomeUnknownError StoreClosedError ForkedError RayClientError
        StoreCorruptError StoreNotFoundError StoreExistsError NotAStoreError ProtocolMismatchError
        AgentNotPicklableError AgentProcessError PoolFailedError PoolStartError
        JournalError JournalDamagedError JournalFormatError JournalMissingError JournalInUseError JournalFullError
        JournalFailedError JournalHeldError FencedError SealedError BatchConflictError ReadOnlyError AnswerGoneError
        BatchHeldError ConsumerFilterError SessionEndedError
        Abort Drop
    """,
}
_MODULES = {"otel": "raystore.integrations.otel", "semconv": "raystore.tracing.semconv"}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(_MODULES[name])
        module = _HOME.get(name)
        if module is None:
            raise AttributeError(f"module 'raystore' has no attribute {name!r}")
        value = getattr(import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME, *_MODULES]
