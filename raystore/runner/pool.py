"""A pool of runners: started together, replaced when one dies, stopped quietly.

On a Ray store each runner is an actor, so a process of its own; on an in-memory store the runners are tasks on one
event loop in a thread of this process, so that a debugger works. A runner that dies is reported to the store at once:
what it held is offered again, and a new runner takes its place under a new worker id.
Not here: what a runner does (`worker`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from raystore import convert
from raystore.calls import run_blocking
from raystore.client import StoreClient
from raystore.errors import AgentNotPicklableError, InvalidValueError, NotAStoreError, PoolStartError, StoreError
from raystore.memory import InMemoryLightningStore
from raystore.runner.worker import Runner, RunnerOptions, make_agent

logger = logging.getLogger("raystore.runner")

EXPLAIN_SECONDS = 10.0  #: after which a pool that does not start says what it waits for
RESTART_SECONDS = 0.2  #: between the death of a runner and its replacement; doubles while they die at once ...
RESTART_MOST_SECONDS = 10.0  #: ... up to this
STOP_SECONDS = 5.0  #: that rollouts which run are given to finish when the pool closes


class RunnerPool:
    """Runs an agent on the rollouts of a store; use it with `with` or `async with`.

    Args:
        store: the store to work for.
        agent: a function or coroutine function `agent(task, ctx) -> float | None | list[Span]`, or a class with
            `setup()`, `__call__(task, ctx)` and `close()`, of which each runner makes one instance. A number is the
            reward. An exception fails the attempt; `raystore.Abort` has it delivered again, `raystore.Drop` drops it.
        size: number of runners.
        concurrency: rollouts that one runner works on at a time.
        num_cpus: that Ray reserves for a runner; None means 0 on a single node, else 1.
        num_gpus, resources, runtime_env, scheduling_strategy: of a runner, as Ray takes them.
        queues: tried in the order given.
        heartbeat_seconds: at most between two signs of life.
        flush_seconds: after which spans are sent while the agent goes on.
        start_timeout: seconds for the first start of all runners; then `PoolStartError`.

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
        flush_seconds: float = 1.0,
        start_timeout: float = 30.0,
    ) -> None:
        for name, value in (("size", size), ("concurrency", concurrency)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidValueError(name, value, "a whole number, 1 or more")
        for name, seconds in (("heartbeat_seconds", heartbeat_seconds), ("flush_seconds", flush_seconds)):
            if convert.duration(name, seconds) == 0:
                raise InvalidValueError(name, seconds, "a number of seconds, more than 0")
        queues = convert.queue_names(queues)
        if not isinstance(store, StoreClient):
            raise NotAStoreError(f"{store!r} (a {type(store).__name__})")
        if not callable(agent):
            raise InvalidValueError("agent", agent, "a function agent(task, ctx), or a class with __call__")
        options = RunnerOptions(concurrency, tuple(queues), heartbeat_seconds, flush_seconds)
        self._home: _Threads | _Actors
        if isinstance(store, InMemoryLightningStore):
            self._home = _Threads(store, agent, size, options)
        else:
            requirements = {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "resources": resources,
                "runtime_env": runtime_env,
                "scheduling_strategy": scheduling_strategy,
            }
            self._home = _Actors(store, agent, size, options, requirements, start_timeout)

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

        With `drain` rollouts that run are given 5 seconds to finish; what has not finished then is offered again.
        """
        self._home.stop(drain=drain)

    def __enter__(self) -> RunnerPool:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.stop(drain=kind is None)

    async def __aenter__(self) -> RunnerPool:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        await asyncio.shield(asyncio.to_thread(self.stop, drain=kind is None))


class _Threads:
    """Runners in this process: tasks on one event loop in a thread of its own."""

    def __init__(self, store: StoreClient, agent: Any, size: int, options: RunnerOptions) -> None:
        self._runners = [Runner(store, make_agent(agent), f"runner-{n}", options) for n in range(size)]
        self._thread = threading.Thread(target=self._run, name="raystore-runners", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()

    def worker_ids(self) -> list[str]:
        return [runner.worker_id for runner in self._runners] if self._thread.is_alive() else []

    def actors(self) -> list[Any]:
        return []

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await asyncio.gather(*(runner.run() for runner in self._runners))

    def stop(self, *, drain: bool) -> None:
        self._ask_to_stop(drain)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            self._ask_to_stop(drain=False)
            self._thread.join(STOP_SECONDS)

    def _ask_to_stop(self, drain: bool) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        for runner in self._runners:
            self._loop.call_soon_threadsafe(functools.partial(runner.stop, drain=drain))


class _RunnerActor:
    """One runner as a Ray actor."""

    def __init__(self, store: StoreClient, agent: bytes, worker_id: str, options: RunnerOptions) -> None:
        from ray import cloudpickle

        self._store = store
        self._runner = Runner(store, make_agent(cloudpickle.loads(agent)), worker_id, options)

    async def hello(self) -> str:
        """The session by which the store knows this process."""
        return str(self._store.session_id)

    async def run(self) -> None:
        """Work until stopped."""
        await self._runner.run()
        self._store.close()  # type: ignore[attr-defined]

    async def stop(self, drain: bool) -> None:
        """Claim nothing more."""
        self._runner.stop(drain=drain)


class _Member:
    """One runner actor, as the pool knows it."""

    def __init__(self, number: int, worker_id: str, actor: Any) -> None:
        self.number = number
        self.worker_id = worker_id
        self.actor = actor
        self.session_id: str | None = None
        self.started = time.monotonic()


class _Actors:
    """Runners as Ray actors, watched by one thread that sleeps until one of them ends."""

    def __init__(
        self,
        store: StoreClient,
        agent: Any,
        size: int,
        options: RunnerOptions,
        requirements: dict[str, Any],
        start_timeout: float,
    ) -> None:
        import ray
        from ray import cloudpickle

        self._store = store
        self._size = size
        self._options = options
        self._start_timeout = start_timeout
        try:
            self._agent = cloudpickle.dumps(agent)
        except Exception as error:
            raise AgentNotPicklableError(getattr(agent, "__name__", repr(agent)), str(error)) from error
        if requirements["num_cpus"] is None:
            alone = sum(node["Alive"] for node in ray.nodes()) == 1
            requirements["num_cpus"] = 0 if alone else 1
        self._requirements = {name: value for name, value in requirements.items() if value is not None}
        self._class = ray.remote(_RunnerActor)
        self._members: dict[int, _Member] = {}
        self._replacements = [0] * size
        self._delays = [RESTART_SECONDS] * size
        self._events: queue.SimpleQueue[tuple[str, _Member, Any]] = queue.SimpleQueue()
        self._stopping = False
        self._ended: dict[int, _Member] = {}
        self._lock = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="raystore-pool", daemon=True)

    def worker_ids(self) -> list[str]:
        return [member.worker_id for member in list(self._members.values())]

    def actors(self) -> list[Any]:
        return [member.actor for member in list(self._members.values())]

    # -- starting ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        members = [self._hire(number) for number in range(self._size)]
        deadline = time.monotonic() + self._start_timeout
        explain_at = time.monotonic() + min(EXPLAIN_SECONDS, self._start_timeout)
        explained = False
        greetings = [(member, member.actor.hello.remote().future()) for member in members]
        for member, greeting in greetings:
            while True:
                try:
                    now = time.monotonic()
                    member.session_id = greeting.result(timeout=max((deadline if explained else explain_at) - now, 0))
                    break
                except TimeoutError:
                    asked, available = self._asked(), _available()
                    if explained or time.monotonic() >= deadline:
                        self._end_all()
                        raise PoolStartError(asked, available) from None
                    logger.warning(
                        "Runners wait to be scheduled. Asked for: %s. The cluster has: %s.", asked, available
                    )
                    explained = True
                except Exception as error:  # the runner could not be made: an agent that fails in setup, say
                    self._end_all()
                    raise PoolStartError(self._asked(), _available(), _cause(error)) from error
        self._watcher.start()

    def _hire(self, number: int) -> _Member:
        count = self._replacements[number]
        worker_id = f"runner-{number}" if not count else f"runner-{number}.{count}"
        options = {"max_concurrency": 100, "max_restarts": 0, "max_task_retries": 0, "enable_task_events": False}
        actor = self._class.options(**options, **self._requirements).remote(
            self._store, self._agent, worker_id, self._options
        )
        member = _Member(number, worker_id, actor)
        self._members[number] = member
        actor.run.remote().future().add_done_callback(lambda future: self._events.put(("ended", member, future)))
        return member

    def _asked(self) -> str:
        needs = {name: value for name, value in self._requirements.items() if name != "runtime_env"}
        return f"{self._size} runners, each {needs}"

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            what, member, future = self._events.get()
            if what == "stop":
                return
            if what == "hello":
                member.session_id = None if future.exception() else future.result()
            elif what == "ended":
                self._on_end(member, future.exception())

    def _on_end(self, member: _Member, error: BaseException | None) -> None:
        if self._stopping:
            with self._lock:
                self._ended[member.number] = member
            return
        if error is None:
            logger.warning("Runner %s ended by itself: its store is gone", member.worker_id)
            self._members.pop(member.number, None)
            return
        reason = _cause(error)
        logger.warning("Runner %s died and is replaced: %s", member.worker_id, reason)
        if not self._report(member):
            return
        number = member.number
        lived = time.monotonic() - member.started
        self._delays[number] = RESTART_SECONDS if lived > 5 else min(2 * self._delays[number], RESTART_MOST_SECONDS)
        timer = threading.Timer(self._delays[number], self._replace, [number])
        timer.daemon = True
        timer.start()

    def _report(self, member: _Member) -> bool:
        """Tell the store that the process of a runner has ended, so that its work is offered again at once."""
        try:
            run_blocking(self._store.report_ended(member.session_id, worker_id=member.worker_id))
        except StoreError as refusal:
            logger.error("Runner %s has ended, and the store cannot be told: %s", member.worker_id, refusal)
            return False
        return True

    def _replace(self, number: int) -> None:
        with self._lock:
            if self._stopping:
                return
            self._replacements[number] += 1
            member = self._hire(number)
        member.actor.hello.remote().future().add_done_callback(
            lambda future: self._events.put(("hello", member, future))
        )

    # -- stopping ----------------------------------------------------------------------------------------------------

    def stop(self, *, drain: bool) -> None:
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        members = list(self._members.values())
        for member in members:
            member.actor.stop.remote(drain)
        deadline = time.monotonic() + (STOP_SECONDS if drain else 1.0)
        while time.monotonic() < deadline and not all(member.number in self._ended for member in members):
            time.sleep(0.01)
        self._end_all()
        for member in members:
            if member.number not in self._ended:  # ended in the middle of something
                self._report(member)
        self._events.put(("stop", members[0], None) if members else ("stop", None, None))  # type: ignore[arg-type]

    def _end_all(self) -> None:
        import ray

        self._stopping = True
        for member in self._members.values():
            ray.kill(member.actor)


def _cause(error: BaseException) -> str:
    """The line of an error that says most: the last of its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _available() -> str:
    import ray

    return ", ".join(
        f"{name} {value:g}" for name, value in sorted(ray.available_resources().items()) if ":" not in name
    )
