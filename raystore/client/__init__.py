"""The LightningStore API over a transport: validate, encode, call, decode.

One implementation for every home of a store, one file for each noun. A method does its checks and encoding and issues
its operation before it first suspends. What each method means is said once, in `raystore.api`.
Not here: making stores (`memory`, `ray_store`), the way to a store (`transport`, `session`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Self

from raystore._sync import SyncStore
from raystore.api import METHODS, LightningStore
from raystore.client.attempts import AttemptMethods
from raystore.client.notices import Handler
from raystore.client.resources import ResourceMethods
from raystore.client.rollouts import RolloutMethods
from raystore.client.spans import SpanMethods
from raystore.client.training import TrainingMethods
from raystore.client.waiting import WaitingMethods
from raystore.client.workers import WorkerMethods
from raystore.errors.calls import explain_methods
from raystore.tracing.losses import Reason
from raystore.types import LightningStoreCapabilities, LightningStoreStatistics
from raystore.wire import checks


class StoreClient(
    RolloutMethods,
    WaitingMethods,
    AttemptMethods,
    SpanMethods,
    TrainingMethods,
    ResourceMethods,
    WorkerMethods,
    LightningStore,
):
    """The methods that every store has."""

    sync: SyncStore

    def close(self) -> None:
        """Stop using the store; calls that wait are answered with what there is, later ones are told."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def listen_for_notices(self, handler: Handler) -> Callable[[], None]:
        """Call `handler` (kind, rollout id, attempt id) for what becomes of attempts this process holds.

        Kinds are "cancelled", "superseded", "timeout" and "unresponsive". The handler runs on any thread and must be
        quick; it may use the store. Returns a function that stops it.
        """
        return self._transport.listen_for_notices(handler)

    @property
    def session_id(self) -> str:
        """The session that the operations of this process belong to."""
        return self._transport.session_id

    async def report_ended(
        self, session_id: str | None, *, worker_id: str | None = None, stopped: bool = False
    ) -> bool:
        """Say that a process has ended, by its session: what it held is offered again at once.

        `worker_id` tells which one where the session is not known. One that was `stopped` has lost nothing: what it
        held is withdrawn, without a charge. Answers whether there was a live session of it.
        """
        arguments: dict[str, Any] = {
            "session_id": checks.optional_identifier("session_id", session_id),
            "worker_id": checks.optional_identifier("worker_id", worker_id),
        }
        if checks.flag("stopped", stopped):
            arguments["stopped"] = True
        return bool(await self._transport.call("report_session", arguments))

    async def report_pool(self, pool_id: str, queues: Sequence[str], *, failures: int, error: str | None) -> None:
        """Say that the runners of a pool fail before they are ready, or (without an error) that one is ready.

        For pools. Who waits for nothing but what this pool would do hears of it, by `PoolFailedError`.
        """
        arguments = {
            "pool_id": checks.identifier("pool_id", pool_id),
            "queues": checks.queue_names(queues),
            "failures": checks.whole("failures", failures, at_least=0),
            "error": checks.optional_text("error", error),
        }
        await self._transport.call("report_pool", arguments)

    async def report_spans_lost(self, counts: Mapping[Reason, int]) -> None:
        """Add to `statistics()["spans_lost"]` what was lost since the last report, by reason. For runners."""
        lost = {reason: checks.whole(f"counts[{reason!r}]", number, at_least=1) for reason, number in counts.items()}
        await self._transport.call("report_spans_lost", {"counts": lost})

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        # zero_copy would allow forked children to use this object as it is, which no store here can promise.
        return {"thread_safe": True, "async_safe": True, "zero_copy": False, "otlp_traces": False}

    def otlp_traces_endpoint(self) -> str:
        raise NotImplementedError("This store has no OTLP endpoint; capabilities['otlp_traces'] says so")

    async def statistics(self) -> LightningStoreStatistics:
        answer = await self._transport.call("statistics", {})
        return {"name": type(self).__name__, **answer}  # type: ignore[typeddict-item]

    async def story(self, rollout_id: str) -> list[str]:
        return list(await self._transport.call("story", {"rollout_id": checks.identifier("rollout_id", rollout_id)}))

    async def check(self) -> None:
        await self._transport.call("check", {})


def _document() -> None:
    """Let `help` say of each method what the contract says."""
    for name, said in vars(LightningStore).items():
        method = getattr(StoreClient, name, None)
        if isinstance(said, FunctionType) and isinstance(method, FunctionType) and method.__doc__ is None:
            method.__doc__ = said.__doc__


_document()
explain_methods(StoreClient, METHODS)
