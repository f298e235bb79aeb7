"""The runners of a pool as Ray actors, watched by one thread that sleeps until one of them ends.

A runner that dies (killed, crashed, out of memory, with its node) is reported to the store at once, by its session:
what it held is offered again, and a new runner takes its place under a new worker id. One that is stopped is no death:
what it has not finished it gives back, or the pool does for it, without a charge.
Not here: runners in this process (`threads`).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from raystore.client import StoreClient
from raystore.client.pending import run_blocking
from raystore.errors import OutcomeUnknownError, PoolStartError, StoreError
from raystore.runner.agents import Agents
from raystore.runner.inline_agents import InlineAgents
from raystore.runner.told import last_line, portable, text_of
from raystore.runner.worker import EXPLAIN_SECONDS, WITHDRAW_SECONDS, Runner, RunnerOptions, runner_id
from raystore.values import pickler

logger: logging.Logger = logging.getLogger("raystore.runner")

NAMESPACE = "raystore-runners"  #: of Ray's, in which runners have their worker ids as names
REPLACE_SECONDS = 1.0  #: after which a runner that died is replaced, although the store has not said what it had done
RESTART_SECONDS = 0.2  #: before a runner that died before it had done anything is replaced; doubles each time ...
RESTART_MOST_SECONDS = 10.0  #: ... up to this
FAILURES_TOLD = 3  #: runners, one after the other, that failed before they were ready: then those who wait are told


class RunnerActor:
    """One runner as a Ray actor."""

    def __init__(self, store: StoreClient, agent: bytes, worker_id: str, options: RunnerOptions) -> None:
        self._store = store
        self._agents: Agents
        if options.isolation == "process":
            from raystore.runner.process_agents import ForkedAgents

            self._agents = ForkedAgents(agent, options.concurrency, worker_id)
        else:
            self._agents = InlineAgents(pickler.loads_agent(agent), options.concurrency)
        self._runner = Runner(store, self._agents, worker_id, options)
        self._opening: asyncio.Future[None] | None = None

    async def _open(self) -> None:
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._agents.open())
        try:
            await asyncio.shield(self._opening)
        except Exception as error:
            raise portable(error) from None

    async def arrive(self) -> None:
        """Answer as soon as this process is there, whether its agents are ready or not."""

    async def hello(self) -> str:
        """The session by which the store knows this process, once its agents are ready."""
        await self._open()
        return str(self._store.session_id)

    async def run(self) -> None:
        """Work until stopped."""
        await self._open()
        await self._runner.run()
        self._store.close()

    async def stop(self, drain: bool) -> None:
        """Claim nothing more."""
        self._runner.stop(drain=drain)

    def __repr__(self) -> str:
        """What Ray's own tools show: in its logs, dashboard and `ray list actors`."""
        return f"Runner({self._runner.worker_id})"


class _Member:
    """One runner actor, as the pool knows it."""

    def __init__(self, number: int, worker_id: str, actor: Any) -> None:
        self.number = number
        self.worker_id = worker_id
        self.actor = actor
        self.arrival = actor.arrive.remote().future()
        self.session_id: str | None = None
        self.is_ready = False
        self.is_dismissed = False
        self.ended = threading.Event()

    @property
    def is_setting_up(self) -> bool:
        """Whether its process is there, and its agent gets ready."""
        return not self.is_ready and self.arrival.done() and self.arrival.exception() is None


class RunnerActors:
    """A number of runner actors, started and stopped together, each replaced when it dies."""

    def __init__(
        self,
        store: StoreClient,
        agent: Any,
        size: int,
        options: RunnerOptions,
        requirements: dict[str, Any],
        start_timeout: float,
        pool_id: str,
    ) -> None:
        import ray

        from raystore.runner.process_agents import pickled

        self._store = store
        self._size = size
        self._options = options
        self._start_timeout = start_timeout
        self._pool_id = pool_id
        self._agent = pickled(agent)
        if requirements["num_cpus"] is None:
            alone = sum(node["Alive"] for node in ray.nodes()) == 1
            requirements["num_cpus"] = 0 if alone else 1
        self._requirements = {name: value for name, value in requirements.items() if value is not None}
        self._class = ray.remote(RunnerActor)
        self._members: dict[int, _Member] = {}
        self._hired: Counter[int] = Counter()  # how often each place was filled
        self._delays: dict[int, float] = {}  # before it is filled again
        self._events: queue.SimpleQueue[tuple[str, _Member | None, Any]] = queue.SimpleQueue()
        self._failures = 0  # of runners before they were ready, one after the other
        self._stopping = False
        self._lock = threading.Lock()
        self._resizing = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="raystore-pool", daemon=True)

    def worker_ids(self) -> list[str]:
        """The runners that work now."""
        return [member.worker_id for member in list(self._members.values())]

    def actors(self) -> list[Any]:
        """Their actor handles."""
        return [member.actor for member in list(self._members.values())]

    # -- starting ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all runners, and wait until they are ready."""
        try:
            self._hire_and_greet(range(self._size))
        except BaseException:  # Ctrl+C, too
            self._stopping = True
            raise
        self._watcher.start()

    def _hire_and_greet(self, numbers: Iterable[int]) -> None:
        """Fill these places, and wait until who takes them is ready; none of them stays if one does not come."""
        with self._lock:
            if self._stopping:
                raise PoolStartError(self._asked(), _available(), "the pool was stopped")
            members = [self._hire(number) for number in numbers]
        try:
            self._greet(members)
        except BaseException:
            with self._lock:
                self._kill(members)
            raise

    def _greet(self, members: list[_Member]) -> None:
        deadline = time.monotonic() + self._start_timeout
        explain_at = time.monotonic() + min(EXPLAIN_SECONDS, self._start_timeout)
        explained = False
        greetings = [(member, member.actor.hello.remote().future()) for member in members]
        for member, greeting in greetings:
            while not member.is_ready:
                try:
                    patience = (deadline if explained else explain_at) - time.monotonic()
                    member.session_id = greeting.result(timeout=max(patience, 0))
                    member.is_ready = True
                except TimeoutError as error:
                    if greeting.done():  # the agent's own
                        raise PoolStartError(self._asked(), _available(), _cause(error)) from error
                    if explained or time.monotonic() >= deadline:
                        slow = sum(member.is_setting_up for member in members)
                        raise PoolStartError(self._asked(), _available(), setting_up=slow) from None
                    self._explain([member for member in members if not member.is_ready])
                    explained = True
                except Exception as error:  # the runner could not be made: an agent that fails in setup, say
                    raise PoolStartError(self._asked(), _available(), _cause(error)) from error

    def _hire(self, number: int) -> _Member:
        worker_id = runner_id(self._pool_id, number, self._hired[number])
        self._hired[number] += 1
        options = {"max_concurrency": 100, "max_restarts": 0, "max_task_retries": 0, "enable_task_events": False}
        named = {"name": worker_id, "namespace": NAMESPACE}
        actor = self._class.options(**options, **named, **self._requirements).remote(
            self._store, self._agent, worker_id, self._options
        )
        member = _Member(number, worker_id, actor)
        self._members[number] = member
        actor.run.remote().future().add_done_callback(lambda future: self._events.put(("ended", member, future)))
        return member

    def _asked(self) -> str:
        needs = {name: value for name, value in self._requirements.items() if name != "runtime_env"}
        return f"{self._size} runners, each {needs}"

    def _explain(self, members: list[_Member]) -> None:
        """Say what these runners wait for: for a place in the cluster, or for their own agent."""
        slow = [member.worker_id for member in members if member.is_setting_up]
        others = [member.worker_id for member in members if not member.is_setting_up]
        if slow:
            logger.warning(
                "Still waiting for __init__ or setup() of the agent in %d runners, which are there: %s.",
                len(slow), ", ".join(slow[:3]),
            )  # fmt: skip
        if others:
            logger.warning(
                "Still waiting for %d runners to be scheduled and started: %s. Asked for: %s. The cluster has: %s.",
                len(others), ", ".join(others[:3]), self._asked(), _available(),
            )  # fmt: skip

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            what, member, future = self._events.get()
            if member is None:
                return
            try:
                self._on_event(what, member, future)
            except Exception:  # the others are still to be watched
                logger.exception("Runner %s could not be looked after", member.worker_id)

    def _on_event(self, what: str, member: _Member, future: Any) -> None:
        if what == "hello":
            member.session_id = None if future.exception() else future.result()
            member.is_ready = True
            if member.session_id is not None:
                self._has_come()
        elif what == "explain":
            if not member.is_ready and not member.ended.is_set() and not self._stopping:
                self._explain([member])
        else:
            member.is_ready = True
            member.ended.set()
            if not member.is_dismissed:
                self._on_end(member, future.exception())

    def _on_end(self, member: _Member, error: BaseException | None) -> None:
        if error is None:
            logger.warning("Runner %s ended by itself: its store is gone", member.worker_id)
            with self._lock:
                self._forget(member)
            return
        if member.session_id is None:
            self._failures += 1
            if self._failures >= FAILURES_TOLD and not self._stopping:
                cause = _cause(error)
                logger.error("Pool %s has failed %d times to make a runner: %s", self._pool_id, self._failures, cause)
                self._tell(self._failures, cause)
        # On a thread of its own: others may end meanwhile, and the store may be away.
        threading.Thread(target=self._see_off, args=(member, error), name="raystore-pool-end", daemon=True).start()

    def _has_come(self) -> None:
        """A runner is ready: if the store was told that none comes, it is told that."""
        failures, self._failures = self._failures, 0
        if failures >= FAILURES_TOLD:
            self._tell(0, None)

    def _tell(self, failures: int, cause: str | None) -> None:
        """Let the store tell those who wait for what this pool would do."""

        def tell() -> None:
            try:
                run_blocking(
                    self._store.report_pool(self._pool_id, self._options.queues, failures=failures, error=cause)
                )
            except StoreError as refusal:
                logger.warning("The store cannot be told of pool %s: %s", self._pool_id, refusal)

        threading.Thread(target=tell, name="raystore-pool-tell", daemon=True).start()

    def _see_off(self, member: _Member, error: BaseException) -> None:
        """A runner died: replace it, and tell the store, whichever is possible first."""
        replacing = _Once(lambda was_useful: self._replace_later(member, was_useful, error))
        soon = self._later(REPLACE_SECONDS, replacing, False)
        try:
            known = self._store.sync.get_worker_by_id(member.worker_id)  # before the report, which moves it
        except OutcomeUnknownError:
            known = None
        except StoreError as refusal:
            soon.cancel()
            logger.error("Runner %s has ended, and the store cannot be told: %s", member.worker_id, refusal)
            return
        soon.cancel()
        # One that finished something, or found nothing to do, was in order until somebody killed it.
        replacing(known is not None and known.last_idle_time is not None)
        self._report(member, stopped=False)

    def _replace_later(self, member: _Member, was_useful: bool, error: BaseException) -> None:
        number = member.number
        delay = 0.0 if was_useful else self._delays.get(number, RESTART_SECONDS)
        self._delays[number] = RESTART_SECONDS if was_useful else min(2 * delay, RESTART_MOST_SECONDS)
        logger.warning("Runner %s died and is replaced: %s", member.worker_id, _cause(error))
        self._later(delay, self._replace, member)

    def _report(self, member: _Member, *, stopped: bool) -> None:
        """Tell the store that the process of a runner has ended, so that its work is offered again at once."""
        worker_id = member.worker_id if member.session_id is None else None
        while True:
            try:
                run_blocking(self._store.report_ended(member.session_id, worker_id=worker_id, stopped=stopped))
                return
            except OutcomeUnknownError as doubt:  # it is away; to say it twice does no harm
                logger.warning("Runner %s has ended, which the store may not know yet: %s", member.worker_id, doubt)
                if self._stopping:  # its silence will tell
                    return
            except StoreError as refusal:
                logger.error("Runner %s has ended, and the store cannot be told: %s", member.worker_id, refusal)
                return

    def _replace(self, before: _Member) -> None:
        with self._lock:
            if self._stopping or self._members.get(before.number) is not before or before.number >= self._size:
                return
            member = self._hire(before.number)
        member.actor.hello.remote().future().add_done_callback(
            lambda future: self._events.put(("hello", member, future))
        )
        self._later(EXPLAIN_SECONDS, self._events.put, ("explain", member, None))

    @staticmethod
    def _later(seconds: float, action: Any, argument: Any) -> threading.Timer:
        timer = threading.Timer(seconds, action, [argument])
        timer.daemon = True
        timer.start()
        return timer

    # -- fewer, or more ----------------------------------------------------------------------------------------------

    def resize(self, size: int, *, drain_seconds: float) -> None:
        """Start runners until there are so many, or end those beyond."""
        with self._resizing:
            before = self._size
            with self._lock:
                if self._stopping or not self._watcher.is_alive():
                    raise PoolStartError(self._asked(), _available(), "the pool does not run")
                self._size = size
                beyond = [member for number, member in self._members.items() if number >= size]
            if size < before:
                self._dismiss(beyond, drain_seconds)
                return
            try:
                self._hire_and_greet(range(before, size))
            except BaseException:
                with self._lock:
                    self._size = before
                    self._kill([member for number, member in self._members.items() if number >= before])
                raise

    # -- stopping ----------------------------------------------------------------------------------------------------

    def stop(self, *, drain_seconds: float) -> None:
        """Claim nothing more and end; let what runs finish within so many seconds."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            members = list(self._members.values())
        self._dismiss(members, drain_seconds)
        self._events.put(("stop", None, None))

    def _dismiss(self, members: list[_Member], drain_seconds: float) -> None:
        """Let runners finish, or else give back, what they run; then end them. None of that is a death."""
        for member in members:
            member.is_dismissed = True
        if drain_seconds > 0:
            self._ask_to_stop(members, drain=True, seconds=drain_seconds)
        self._ask_to_stop(members, drain=False, seconds=WITHDRAW_SECONDS)
        with self._lock:
            self._kill(members)
        for member in members:
            if not member.ended.is_set():  # ended in the middle of something
                self._report(member, stopped=True)

    @staticmethod
    def _ask_to_stop(members: list[_Member], *, drain: bool, seconds: float) -> None:
        left = [member for member in members if not member.ended.is_set()]
        for member in left:
            member.actor.stop.remote(drain)
        deadline = time.monotonic() + seconds
        for member in left:
            member.ended.wait(max(deadline - time.monotonic(), 0))

    def _kill(self, members: list[_Member]) -> None:
        import ray

        for member in members:
            member.is_dismissed = True
            self._forget(member)
            ray.kill(member.actor)

    def _forget(self, member: _Member) -> None:
        if self._members.get(member.number) is member:
            del self._members[member.number]


class _Once:
    """Calls a function, the first time only; from any thread."""

    def __init__(self, function: Callable[[bool], None]) -> None:
        self._function = function
        self._first = threading.Lock()

    def __call__(self, argument: bool) -> None:
        if self._first.acquire(blocking=False):
            self._function(argument)


def _cause(error: BaseException) -> str:
    """The line of an error that says most: the last of its traceback, without Ray's list of what it might be."""
    return last_line(text_of(error)).partition(" Some common causes")[0] or type(error).__name__


def _available() -> str:
    import ray

    return ", ".join(
        f"{name} {value:g}" for name, value in sorted(ray.available_resources().items()) if ":" not in name
    )
