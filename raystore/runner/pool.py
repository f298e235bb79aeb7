"""A pool of runners: started together, replaced when one dies, stopped quietly.

On a Ray store each runner is an actor, so a process of its own (`actors`). On an in-memory store the runners are tasks
on one event loop in a thread of this process (`LocalRunners`), so that a debugger works.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from raystore.client.client import StoreClient
from raystore.client.local import InMemoryLightningStore
from raystore.errors import InvalidValueError, NotAStoreError, PoolStartError
from raystore.errors.text import explained, last_line, report
from raystore.reports.log import logger_of
from raystore.reports.progress import Progress
from raystore.runner import agents
from raystore.runner.actors import SHOWN_SECONDS, RunnerActors
from raystore.runner.agents import Agent
from raystore.runner.context import outside_rollouts
from raystore.runner.worker import EXPLAIN_SECONDS, STOP_SECONDS, Runner, RunnerOptions, WorkerIds, stop_all
from raystore.wire import checks

logger: logging.Logger = logger_of("raystore.runner")


class RunnerPool:
    """Runs an agent on the rollouts of a store; use it with `with` or `async with`.

    Args:
        store: the store whose rollouts to run.
        agent: a function or coroutine function `agent(task, ctx) -> float | None | list[Span]`, or a class with
            `setup()`, `__call__(task, ctx)` and `close()`, of which each runner makes one instance (use
            `functools.partial(Class, ...)` for arguments). A number is the reward; an awaitable result is awaited. An
            exception fails the attempt; `raystore.Abort` has the rollout delivered again, `raystore.Drop` drops it,
            also within an exception group.
        size: number of runners.
        concurrency: rollouts that one runner works on at a time. With 1, all of an agent's `__init__`, `setup`, calls
            and `close` run in one thread, and all that they await in one task, with either isolation. Above that,
            `setup` and `close` share a thread and a task, and the calls overlap: async ones as tasks of the same event
            loop, others in threads of their own.
        num_cpus: that Ray reserves for a runner; None means 0 on a single node, else 1.
        num_gpus, resources, runtime_env, scheduling_strategy: of a runner, as Ray takes them.
        queues: tried in the order given.
        heartbeat_seconds: longest time between two heartbeats of a runner.
        cancel_grace_seconds: that an agent has to stop after its work is cancelled, times out or is superseded. Then
            its process is killed with `isolation="process"`; otherwise a warning is logged.
        max_agent_seconds: that one call of the agent may take; then its attempt ends with status "timeout".
        flush_seconds: after which spans are sent while the agent runs; 64 KiB of spans are sent at once.
        start_timeout: seconds for the first start of all runners; then `PoolStartError`.
        preempt: says whether the node of a runner goes away: a function without arguments, which each runner's process
            calls about once a second, on a thread of its own. It returns None or False; True; or the seconds that are
            left. While it says yes the runner claims nothing, and gives its rollouts back without a charge: each right
            after its next `ctx.save`, else when half of the time is over (`True`: 5 seconds), and then its agent has
            `cancel_grace_seconds` to save. If it says no again, the runner goes on. What it raises counts as no.
        isolation: "actor": agents run in their runner's process. "process": each of a runner's `concurrency` slots has
            a process of its own, which can be killed, and whose crash does not harm the others. Agents have the same
            `ctx` there, but are not connected to Ray; an agent class has one instance in each process.

    Attributes:
        pool_id: part of the worker ids of its runners, so that no two pools have the same worker ids.

    Raises:
        AgentNotPicklableError: the agent cannot be sent to another process; raised before any runner starts.
        InvalidValueError: an argument is not valid.
        NotAStoreError: `store` is no store.
    """

    @explained
    def __init__(
        self,
        store: StoreClient,
        agent: Agent,
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
        preempt: Callable[[], bool | float | None] | None = None,
    ) -> None:
        size = checks.whole("size", size, at_least=1)
        concurrency = checks.whole("concurrency", concurrency, at_least=1)
        durations = {"heartbeat_seconds": heartbeat_seconds, "flush_seconds": flush_seconds}
        if max_agent_seconds is not None:
            durations["max_agent_seconds"] = max_agent_seconds
        for name, seconds in durations.items():
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
                raise InvalidValueError(name, seconds, "a number of seconds, more than 0")
        checks.duration("cancel_grace_seconds", cancel_grace_seconds)
        start_timeout = _timeout("start_timeout", start_timeout)
        if isolation not in ("actor", "process"):
            raise InvalidValueError("isolation", isolation, "'actor' or 'process'")
        if not isinstance(store, StoreClient):
            raise NotAStoreError(f"{store!r} (a {type(store).__name__})")
        if (expected := agents.check(agent)) is not None:
            raise InvalidValueError("agent", agent, expected)
        if preempt is not None and not callable(preempt):
            raise InvalidValueError("preempt", preempt, "a function without arguments, or None")
        options = RunnerOptions(
            concurrency=concurrency,
            queues=tuple(checks.queue_names(queues)),
            heartbeat_seconds=heartbeat_seconds,
            flush_seconds=flush_seconds,
            cancel_grace_seconds=cancel_grace_seconds,
            max_agent_seconds=max_agent_seconds,
            isolation=isolation,
            preempt=preempt,
        )
        self.pool_id: str = secrets.token_hex(4)
        self._runners: LocalRunners | RunnerActors
        if isinstance(store, InMemoryLightningStore):
            sent = agents.pickled(agent) if isolation == "process" else agent
            self._runners = LocalRunners(store, sent, size, options, start_timeout, self.pool_id)
        else:
            sent = agents.pickled(agent)
            if preempt is not None:
                options.preempt = agents.pickled(preempt)
            requirements = {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "resources": resources,
                "runtime_env": runtime_env,
                "scheduling_strategy": scheduling_strategy,
            }
            self._runners = RunnerActors(store, sent, size, options, requirements, start_timeout, self.pool_id)

    @property
    def worker_ids(self) -> list[str]:
        """The ids of the runners that work now."""
        return [member.worker_id for member in self._runners.members()]

    @property
    def actors(self) -> list[Any]:
        """The actor handles of the runners; empty for a pool in this process."""
        return [member.actor for member in self._runners.members() if member.actor is not None]

    def start(self) -> None:
        """Start the runners; `with` does it."""
        self._runners.start()

    def resize(self, size: int, *, drain_seconds: float = STOP_SECONDS) -> None:
        """Start runners until there are `size`, or stop those beyond as `stop` does; returns when that is done.

        Blocks: within a coroutine use `await asyncio.to_thread(pool.resize, size)`.

        Raises:
            InvalidValueError: `size` is not 1 or more, or `drain_seconds` not 0 or more.
            PoolStartError: the new runners are not ready within `start_timeout` (the others go on), or the pool does
                not run.
        """
        self._runners.resize(
            checks.whole("size", size, at_least=1), drain_seconds=_timeout("drain_seconds", drain_seconds)
        )

    def stop(self, *, drain_seconds: float = STOP_SECONDS, drain: bool = True) -> None:
        """Claim nothing more, and end the runners when their rollouts have finished, or after `drain_seconds`.

        A rollout that has not finished by then is cancelled (`ctx.cancelled`) and given back: the store offers it again
        at its old place in the queue, and the attempt is not charged. `drain=False` means `drain_seconds=0`. Blocks
        like `resize`; a second call does nothing.

        Raises:
            InvalidValueError: `drain_seconds` is not 0 or more.
        """
        seconds = _timeout("drain_seconds", drain_seconds)
        self._runners.stop(drain_seconds=seconds if drain else 0.0)

    def __enter__(self) -> RunnerPool:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop(drain=kind is None)

    async def __aenter__(self) -> RunnerPool:
        try:
            await asyncio.to_thread(self.start)
        except asyncio.CancelledError:  # the thread goes on, and its runners must be stopped
            await asyncio.shield(asyncio.to_thread(self.stop, drain=False))
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        await asyncio.shield(asyncio.to_thread(self.stop, drain=kind is None))


def _timeout(name: str, seconds: float) -> float:
    """A duration, limited to what threads can wait for."""
    return min(checks.duration(name, seconds), threading.TIMEOUT_MAX)


# -- runners in this process -------------------------------------------------------------------------------------------


class _Member:
    """A runner that runs."""

    def __init__(self, runner: Runner) -> None:
        self.worker_id = runner.worker_id
        self.actor = None
        self.ended = threading.Event()
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self.task = self._loop.create_task(runner.run())
        self.task.add_done_callback(lambda task: self.ended.set())

    def stop(self, *, drain: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the runner has ended
            self._loop.call_soon_threadsafe(lambda: self._runner.stop(drain=drain))


class LocalRunners:
    """The runners of a pool in this process."""

    def __init__(
        self,
        store: StoreClient,
        agent: Agent | bytes,
        size: int,
        options: RunnerOptions,
        start_timeout: float,
        pool_id: str,
    ) -> None:
        self._store, self._agent, self._size, self._options = store, agent, size, options
        self._start_timeout = start_timeout
        self._ids = WorkerIds(pool_id)
        self._members: dict[int, _Member] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # of the members that have not ended
        self._thread = threading.Thread(target=self._run, name="raystore-runners", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._failure: Exception | None = None
        self._resizing = threading.Lock()
        self._stopping = False

    def members(self) -> list[_Member]:
        """The runners that work now."""
        return list(self._members.values()) if self._thread.is_alive() else []

    def start(self) -> None:
        """Make all agents, and start to work."""
        self._thread.start()
        with Progress("starting runners", self._size) as shown:
            if not self._wait_until_started(min(EXPLAIN_SECONDS, self._start_timeout), shown):
                logger.warning("Still waiting for __init__ or setup() of the agent.")
                if not self._wait_until_started(self._start_timeout - EXPLAIN_SECONDS, shown):
                    self._stopping = True  # agents that are set up after this are closed again
                    raise self._error(setting_up=self._size)
        if self._failure is not None:
            raise self._error(self._failure) from self._failure

    def _wait_until_started(self, seconds: float, shown: Progress) -> bool:
        """Whether all agents are made within so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            shown.update(0, note="__init__ or setup() of the agent")
            if self._started.wait(min(left, SHOWN_SECONDS) if shown.can_draw else left):
                return True
        return self._started.is_set()

    def _error(self, failure: Exception | None = None, *, setting_up: int = 0) -> PoolStartError:
        cause = None if failure is None else last_line(report(failure))
        return PoolStartError(f"{self._size} runners in this process", "this process", cause, setting_up)

    def _run(self) -> None:
        with outside_rollouts(threading.main_thread()):  # the driver's
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._start_members(range(self._size), threading.Event())
        except Exception as failure:
            self._failure = failure
        self._started.set()
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._tasks -= done
            for task in done:
                task.result()

    async def _start_members(self, numbers: Iterable[int], given_up: threading.Event) -> None:
        """Start runners with these numbers, or none if an agent fails or `given_up` is set meanwhile."""
        runners = {
            number: Runner(self._store, self._agent, self._ids.next(number), self._options) for number in numbers
        }
        opened = await asyncio.gather(*(runner.open() for runner in runners.values()), return_exceptions=True)
        failure = next((error for error in opened if error is not None), None)
        if failure is not None or self._stopping or given_up.is_set():
            made = [runner for runner, error in zip(runners.values(), opened, strict=True) if error is None]
            await asyncio.gather(*(runner.close() for runner in made))
            if failure is not None:
                raise failure
            return
        for number, runner in runners.items():
            member = self._members[number] = _Member(runner)
            self._tasks.add(member.task)

    def resize(self, size: int, *, drain_seconds: float) -> None:
        """Start runners until there are `size`, or stop those beyond."""
        with self._resizing:
            if self._loop is None or not self._tasks:
                raise PoolStartError(f"{size} runners in this process", "this process", "the pool does not run")
            before, self._size = self._size, size
            if size < before:
                beyond = [self._members.pop(number) for number in range(size, before)]
                stop_all(beyond, drain_seconds=drain_seconds, withdraw_seconds=STOP_SECONDS)
                return
            given_up = threading.Event()
            # `_serve` awaits the tasks that it has seen; it sees new ones when one of those ends.
            starting = asyncio.run_coroutine_threadsafe(self._start_members(range(before, size), given_up), self._loop)
            try:
                starting.result(self._start_timeout)
            except Exception as failure:
                is_slow = not starting.done()  # else the error is the agent's own, perhaps a TimeoutError
                given_up.set()
                error = self._error(setting_up=size - before) if is_slow else self._error(failure)
                self._size = before
                raise error from (None if is_slow else failure)

    def stop(self, *, drain_seconds: float) -> None:
        """Claim nothing more and end; let rollouts finish within so many seconds."""
        if self._thread.ident is None:  # never started
            return
        self._stopping = True
        self._started.wait(STOP_SECONDS)  # or runners could start after this
        stop_all(list(self._members.values()), drain_seconds=drain_seconds, withdraw_seconds=STOP_SECONDS)
        self._thread.join(STOP_SECONDS)
