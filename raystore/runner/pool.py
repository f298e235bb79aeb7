"""A pool of runners: started together, replaced when one dies, stopped quietly.

On a Ray store each runner is an actor, so a process of its own (`actors`); on an in-memory store the runners are tasks
on one event loop in a thread of this process (`threads`), so that a debugger works.
Not here: what a runner does (`worker`), where its agents run (`inline`, `forked`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from raystore import convert
from raystore.client import StoreClient
from raystore.errors import InvalidValueError, NotAStoreError
from raystore.memory import InMemoryLightningStore
from raystore.runner import agents
from raystore.runner.actors import RunnerActors
from raystore.runner.threads import RunnerThreads
from raystore.runner.worker import RunnerOptions


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

    Raises `AgentNotPicklableError` before any runner is started.
    """

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
        start_timeout: float = 30.0,
        isolation: Literal["actor", "process"] = "actor",
    ) -> None:
        for name, value in (("size", size), ("concurrency", concurrency)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidValueError(name, value, "a whole number, 1 or more")
        durations = {"heartbeat_seconds": heartbeat_seconds, "flush_seconds": flush_seconds}
        if max_agent_seconds is not None:
            durations["max_agent_seconds"] = max_agent_seconds
        for name, seconds in durations.items():
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
                raise InvalidValueError(name, seconds, "a number of seconds, more than 0")
        convert.duration("cancel_grace_seconds", cancel_grace_seconds)
        convert.duration("start_timeout", start_timeout)
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
        self._home: RunnerThreads | RunnerActors
        if isinstance(store, InMemoryLightningStore):
            self._home = RunnerThreads(store, agent, size, options)
        else:
            requirements = {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "resources": resources,
                "runtime_env": runtime_env,
                "scheduling_strategy": scheduling_strategy,
            }
            self._home = RunnerActors(store, agent, size, options, requirements, start_timeout)

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

    def stop(self, *, drain: bool = True) -> None:
        """Claim nothing more and end the runners.

        With `drain` rollouts that run are given 5 seconds to finish; what has not finished then is offered again,
        which counts as a delivery (`max_deliveries`).
        """
        self._home.stop(drain=drain)

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
