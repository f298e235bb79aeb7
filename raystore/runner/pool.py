"""A pool of runners: started together, replaced when one dies, stopped quietly.

On a Ray store each runner is an actor, so a process of its own (`actors`); on an in-memory store the runners are tasks
on one event loop in a thread of this process (`threads`), so that a debugger works.
Not here: what a runner does (`worker`), where its agents run (`inline`, `forked`).
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Sequence
from typing import Any, Literal

from raystore.client import StoreClient
from raystore.client.local import InMemoryLightningStore
from raystore.errors import InvalidValueError, NotAStoreError
from raystore.errors.calls import explained
from raystore.runner import agents
from raystore.runner.actors import RunnerActors
from raystore.runner.local_runners import RunnerThreads
from raystore.runner.worker import STOP_SECONDS, RunnerOptions
from raystore.wire import convert


class RunnerPool:
    """Runs an agent on the rollouts of a store; use it with `with` or `async with`.

    Args:
        store: the store to work for.
        agent: a function or coroutine function `agent(task, ctx) -> float | None | list[Span]`, or a class with
            `setup()`, `__call__(task, ctx)` and `close()`, of which each runner makes one instance (use
            `functools.partial(Class, ...)` for arguments). A number is the reward; what is awaitable is awaited. An
            exception fails the attempt; `raystore.Abort` has it delivered again, `raystore.Drop` drops it, also within
            an exception group.
        size: number of runners.
        concurrency: rollouts that one runner works on at a time. With 1, `__init__`, `setup`, the calls and `close` of
            an agent run in one thread, and all that they await in one task, wherever they run. Above that, `setup` and
            `close` share a thread and a task, and the calls run beside: async ones as tasks of the same event loop,
            any other in threads.
        num_cpus: that Ray reserves for a runner; None means 0 on a single node, else 1.
        num_gpus, resources, runtime_env, scheduling_strategy: of a runner, as Ray takes them.
        queues: tried in the order given.
        heartbeat_seconds: at most between two signs of life.
        cancel_grace_seconds: that an agent has to stop, once it was told that its work is of no use (cancelled, timed
            out, superseded). Then its process is killed, with `isolation="process"`; a warning is logged otherwise.
        max_agent_seconds: that one call of the agent may take; then its attempt ends with status "timeout".
        flush_seconds: after which spans are sent while the agent goes on; 64 KiB of them do not wait so long.
        start_timeout: seconds for the first start of all runners; then `PoolStartError`.
        isolation: "actor": agents run in their runner's process. "process": each of the runner's `concurrency` places
            has a process of its own, which can be killed, and which may crash without harm to its neighbours. Agents
            see the same `ctx`, but are not connected to Ray there; an agent class has one instance in each.

    Attributes:
        pool_id: part of the worker ids of its runners, so that those of two pools are never taken for each other.

    Raises `AgentNotPicklableError` before any runner is started.
    """

    @explained
    def __init__(
        self,
        store: StoreClient,
        agent: Any,
        size: int = 4,
        *,
        concurrency: int = 1,
        num_cpus: float | None = None,
        num_gpus: float = 0,
        resources: dict[str, float] | None = None,
        runtime_env: dict[str, Any] | None = None,
        scheduling_strategy: Any = "SPREAD",
        queues: Sequence[str] = ("default",),
        heartbeat_seconds: float = 10.0,
        cancel_grace_seconds: float = 5.0,
        max_agent_seconds: float | None = None,
        flush_seconds: float = 1.0,
        start_timeout: float = 120.0,
        isolation: Literal["actor", "process"] = "actor",
    ) -> None:
        size = convert.whole("size", size, at_least=1)
        concurrency = convert.whole("concurrency", concurrency, at_least=1)
        durations = {"heartbeat_seconds": heartbeat_seconds, "flush_seconds": flush_seconds}
        if max_agent_seconds is not None:
            durations["max_agent_seconds"] = max_agent_seconds
        for name, seconds in durations.items():
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
                raise InvalidValueError(name, seconds, "a number of seconds, more than 0")
        convert.duration("cancel_grace_seconds", cancel_grace_seconds)
        start_timeout = _patience("start_timeout", start_timeout)
        if isolation not in ("actor", "process"):
            raise InvalidValueError("isolation", isolation, "'actor' or 'process'")
        if not isinstance(store, StoreClient):
            raise NotAStoreError(f"{store!r} (a {type(store).__name__})")
        if (expected := agents.check(agent)) is not None:
            raise InvalidValueError("agent", agent, expected)
        options = RunnerOptions(
            concurrency=concurrency,
            queues=tuple(convert.queue_names(queues)),
            heartbeat_seconds=heartbeat_seconds,
            flush_seconds=flush_seconds,
            cancel_grace_seconds=cancel_grace_seconds,
            max_agent_seconds=max_agent_seconds,
            isolation=isolation,
        )
        self.pool_id: str = secrets.token_hex(4)
        self._home: RunnerThreads | RunnerActors
        if isinstance(store, InMemoryLightningStore):
            self._home = RunnerThreads(store, agent, size, options, start_timeout, self.pool_id)
        else:
            requirements = {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "resources": resources,
                "runtime_env": runtime_env,
                "scheduling_strategy": scheduling_strategy,
            }
            self._home = RunnerActors(store, agent, size, options, requirements, start_timeout, self.pool_id)

    @property
    def worker_ids(self) -> list[str]:
        """The runners that work now."""
        return self._home.worker_ids()

    @property
    def actors(self) -> list[Any]:
        """The actor handles of the runners; empty for a pool in this process."""
        return self._home.actors()

    def start(self) -> None:
        """Start the runners; `with` does it."""
        self._home.start()

    def resize(self, size: int, *, drain_seconds: float = STOP_SECONDS) -> None:
        """Start runners until there are `size`, or end those beyond, as `stop` does; returns once that is done.

        Blocks: within a coroutine use `await asyncio.to_thread(pool.resize, size)`.

        Raises:
            InvalidValueError: `size` is not 1 or more, or `drain_seconds` not 0 or more.
            PoolStartError: the new runners do not come up within `start_timeout` (the others go on), or the pool does
                not run.
        """
        self._home.resize(
            convert.whole("size", size, at_least=1), drain_seconds=_patience("drain_seconds", drain_seconds)
        )

    def stop(self, *, drain_seconds: float = STOP_SECONDS, drain: bool = True) -> None:
        """Claim nothing more and end the runners, once what they run has finished, or after `drain_seconds`.

        What has not finished by then is told to stop (`ctx.cancelled`) and given back: the store offers it again at its
        old place, and nothing is charged, since stopping is no failure. `drain=False` is `drain_seconds=0`. Blocks as
        `resize` does; a second call does nothing.

        Raises InvalidValueError if `drain_seconds` is not 0 or more.
        """
        seconds = _patience("drain_seconds", drain_seconds)
        self._home.stop(drain_seconds=seconds if drain else 0.0)

    def __enter__(self) -> RunnerPool:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop(drain=kind is None)

    async def __aenter__(self) -> RunnerPool:
        try:
            await asyncio.to_thread(self.start)
        except asyncio.CancelledError:  # the thread goes on, and must not leave runners that nobody stops
            await asyncio.shield(asyncio.to_thread(self.stop, drain=False))
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        await asyncio.shield(asyncio.to_thread(self.stop, drain=kind is None))


def _patience(name: str, seconds: float) -> float:
    """A duration that threads can wait for; they cannot wait for ever."""
    return min(convert.duration(name, seconds), threading.TIMEOUT_MAX)
