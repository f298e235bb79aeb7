"""raystore: the LightningStore contract on Ray, the control plane for agent RL.

`start` a store, pass it (or `store.actor`) to runners, drive it with plain async functions. See the README.
Names are imported on first use, so that `import raystore` is quick and loads neither Ray nor pydantic; only the errors,
which need nothing, are there from the start.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raystore.errors import *  # noqa: F403
from raystore.errors import __all__ as _ERRORS

__version__ = "0.1.0"

# isort: off
# fmt: off
if TYPE_CHECKING:  # the names of `_NAMES`, for type checkers
    from raystore.api import LightningStore as LightningStore
    from raystore.client.local import InMemoryLightningStore as InMemoryLightningStore
    from raystore.client.local import RecoveredRun as RecoveredRun
    from raystore.client.local import recover as recover
    from raystore.client.evaluation import BlockingEvaluation as BlockingEvaluation, Evaluation as Evaluation
    from raystore.client.feed import BatchShard as BatchShard, Feed as Feed, FeedBatch as FeedBatch
    from raystore.errors import *  # noqa: F403
    from raystore.types.evaluations import *  # noqa: F403
    from raystore.types.feeds import *  # noqa: F403
    from raystore.reports.log import setup_logging as setup_logging
    from raystore.types.options import StoreOptions as StoreOptions
    from raystore.remote.store import start as start, connect as connect, list_stores as list_stores, stop as stop
    from raystore.remote.store import RayLightningStore as RayLightningStore
    from raystore.reports.selection import *  # noqa: F403
    from raystore.runner import otel as otel
    from raystore.runner import RunnerPool as RunnerPool, Context as Context, current as current, run_one as run_one
    from raystore.types.spans import (
        Span as Span, SpanContext as SpanContext, SpanCoreFields as SpanCoreFields, TraceStatus as TraceStatus,
        StatusCode as StatusCode, Event as Event, Link as Link, OtelResource as OtelResource,
        AttributeValue as AttributeValue, find_final_reward as find_final_reward,
        estimate_model_size as estimate_model_size,
    )
    from raystore.tracing import semconv as semconv
    from raystore.tracing.calls import ModelCall as ModelCall
    from raystore.tracing.calls import model_calls as model_calls
    from raystore.tracing.trajectories import Split as Split
    from raystore.tracing.trajectories import Trajectory as Trajectory
    from raystore.tracing.trajectories import Triplet as Triplet
    from raystore.tracing.trajectories import collate as collate
    from raystore.tracing.trajectories import trajectories as trajectories
    from raystore.tracing.trajectories import triplets as triplets
    from raystore.types.contract import *  # noqa: F403

#: The module of each name that is imported on first use.
_NAMES = {
    "raystore.api": "LightningStore",
    "raystore.client.local": "InMemoryLightningStore RecoveredRun recover",
    "raystore.client.evaluation": "BlockingEvaluation Evaluation",
    "raystore.client.feed": "Feed FeedBatch BatchShard",
    "raystore.types.evaluations": "EvaluationResult EvaluationScore",
    "raystore.types.feeds": """
        BatchManifest FailureBudget FailureReward FeedGroup FeedStatus GroupManifest Keep Lag Sampler StreamStatus keep
        reward
    """,
    "raystore.reports.log": "setup_logging",
    "raystore.types.options": "StoreOptions",
    "raystore.remote.store": "RayLightningStore start connect list_stores stop",
    "raystore.reports.selection": "SelectionReport EndingReport ValueReport Comparison NumberSummary",
    "raystore.runner": "RunnerPool Context current run_one",
    "raystore.tracing.calls": "ModelCall model_calls",
    "raystore.tracing.trajectories": "Triplet triplets Trajectory Split trajectories collate",
    "raystore.types.contract": """
        Rollout Attempt AttemptedRollout RolloutConfig EnqueueRolloutRequest Worker Page Change StoreInfo
        RetryRule RetryOutcome
        Batch LedgerEntry EnqueueGroupRequest Group TakenGroup GroupBatch GroupStatus QueuePause QueueLimit Finding
        ResourcesUpdate PromptTemplate LLM ProxyLLM ObjectResource Resource ResourceUnion NamedResources
        PaginatedResult
        UNSET Unset is_queuing is_running is_finished LightningStoreCapabilities LightningStoreStatistics
        StoreMetrics MetricsTotal MetricsBucket Distribution RewardSummary VersionRewards
        RolloutStatus AttemptStatus RolloutMode WorkerStatus Outcome TaskInput TagValue
    """,
    "raystore.types.spans": """
        Span SpanContext SpanCoreFields TraceStatus StatusCode Event Link OtelResource AttributeValue
        find_final_reward estimate_model_size
    """,
}
_MODULES = {"otel": "raystore.runner.otel", "semconv": "raystore.tracing.semconv"}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_ERRORS, *_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


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
