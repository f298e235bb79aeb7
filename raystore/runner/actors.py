"""The runners of a pool as Ray actors, watched by one thread that sleeps until one of them ends.

A runner that dies (killed, crashed, out of memory, with its node) is reported to the store at once: what it held is
offered again, and a new runner takes its place under a new worker id.
Not here: runners in this process (`threads`).
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from typing import Any

from raystore import pickler
from raystore.calls import run_blocking
from raystore.client import StoreClient
from raystore.errors import OutcomeUnknownError, PoolStartError, StoreError
from raystore.runner.agents import Agents
from raystore.runner.inline import InlineAgents
from raystore.runner.told import last_line, portable, text_of
from raystore.runner.worker import STOP_SECONDS, Runner, RunnerOptions

logger = logging.getLogger("raystore.runner")

EXPLAIN_SECONDS = 10.0  #: after which a pool that does not start says what it waits for
RESTART_SECONDS = 0.2  #: before a runner that died before it had done anything is replaced; doubles each time ...
RESTART_MOST_SECONDS = 10.0  #: ... up to this


class RunnerActor:
    """One runner as a Ray actor."""

    def __init__(self, store: StoreClient, agent: bytes, worker_id: str, options: RunnerOptions) -> None:
        self._store = store
        self._agents: Agents
        if options.isolation == "process":
            from raystore.runner.forked import ForkedAgents

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


class _Member:
    """One runner actor, as the pool knows it."""

    def __init__(self, number: int, worker_id: str, actor: Any) -> None:
        self.number = number
        self.worker_id = worker_id
        self.actor = actor
        self.session_id: str | None = None
        self.is_ready = False
        self.ended = threading.Event()


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
    ) -> None:
        import ray

        from raystore.runner.forked import pickled

        self._store = store
        self._size = size
        self._options = options
        self._start_timeout = start_timeout
        self._agent = pickled(agent)
        if requirements["num_cpus"] is None:
            alone = sum(node["Alive"] for node in ray.nodes()) == 1
            requirements["num_cpus"] = 0 if alone else 1
        self._requirements = {name: value for name, value in requirements.items() if value is not None}
        self._class = ray.remote(RunnerActor)
        self._members: dict[int, _Member] = {}
        self._hired = [0] * size
        self._delays = [RESTART_SECONDS] * size
        self._events: queue.SimpleQueue[tuple[str, _Member | None, Any]] = queue.SimpleQueue()
        self._stopping = False
        self._lock = threading.Lock()
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
        with self._lock:
            if self._stopping:
                raise PoolStartError(self._asked(), _available(), "the pool was stopped")
            members = [self._hire(number) for number in range(self._size)]
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
                        self._end_all()
                        raise PoolStartError(self._asked(), _available(), _cause(error)) from error
                    if explained or time.monotonic() >= deadline:
                        self._end_all()
                        raise PoolStartError(self._asked(), _available()) from None
                    self._explain(f"{self._size} runners")
                    explained = True
                except Exception as error:  # the runner could not be made: an agent that fails in setup, say
                    self._end_all()
                    raise PoolStartError(self._asked(), _available(), _cause(error)) from error
                except BaseException:  # Ctrl+C
                    self._end_all()
                    raise
        self._watcher.start()

    def _hire(self, number: int) -> _Member:
        count = self._hired[number]
        self._hired[number] += 1
        worker_id = f"runner-{number}.{count}" if count else f"runner-{number}"
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

    def _explain(self, who: str) -> None:
        logger.warning(
            "Still waiting for %s to be scheduled and ready. Asked for: %s. The cluster has free: %s.",
            who, self._asked(), _available(),
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
        elif what == "explain":
            if not member.is_ready and not member.ended.is_set() and not self._stopping:
                self._explain(f"runner {member.worker_id}")
        else:
            member.is_ready = True
            member.ended.set()
            if not self._stopping:
                self._on_end(member, future.exception())

    def _on_end(self, member: _Member, error: BaseException | None) -> None:
        if error is None:
            logger.warning("Runner %s ended by itself: its store is gone", member.worker_id)
            self._members.pop(member.number, None)
            return
        try:
            known = self._store.sync.get_worker_by_id(member.worker_id)  # before the report, which moves it
            self._report(member)
        except OutcomeUnknownError as doubt:  # its silence will tell, if it was not told
            known = None
            logger.warning("Runner %s has ended, which the store may not know: %s", member.worker_id, doubt)
        except StoreError as refusal:
            logger.error("Runner %s has ended, and the store cannot be told: %s", member.worker_id, refusal)
            return
        number = member.number
        # One that finished something, or found nothing to do, was in order until somebody killed it.
        was_useful = known is not None and known.last_idle_time is not None
        delay = 0.0 if was_useful else self._delays[number]
        self._delays[number] = RESTART_SECONDS if was_useful else min(2 * delay, RESTART_MOST_SECONDS)
        logger.warning("Runner %s died and is replaced: %s", member.worker_id, _cause(error))
        self._later(delay, self._replace, number)

    def _report(self, member: _Member) -> None:
        """Tell the store that the process of a runner has ended, so that its work is offered again at once."""
        run_blocking(self._store.report_ended(member.session_id, worker_id=member.worker_id))

    def _replace(self, number: int) -> None:
        with self._lock:
            if self._stopping:
                return
            member = self._hire(number)
        member.actor.hello.remote().future().add_done_callback(
            lambda future: self._events.put(("hello", member, future))
        )
        self._later(EXPLAIN_SECONDS, self._events.put, ("explain", member, None))

    @staticmethod
    def _later(seconds: float, action: Any, argument: Any) -> None:
        timer = threading.Timer(seconds, action, [argument])
        timer.daemon = True
        timer.start()

    # -- stopping ----------------------------------------------------------------------------------------------------

    def stop(self, *, drain: bool) -> None:
        """Claim nothing more and end; with `drain`, let what runs finish within five seconds."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        members = list(self._members.values())
        for member in members:
            member.actor.stop.remote(drain)
        deadline = time.monotonic() + (STOP_SECONDS if drain else 1.0)
        for member in members:
            member.ended.wait(max(deadline - time.monotonic(), 0))
        self._end_all()
        for member in members:
            if not member.ended.is_set():  # ended in the middle of something
                try:
                    self._report(member)
                except StoreError as refusal:
                    logger.error("Runner %s was ended, and the store cannot be told: %s", member.worker_id, refusal)
        self._events.put(("stop", None, None))

    def _end_all(self) -> None:
        import ray

        self._stopping = True
        for member in list(self._members.values()):
            ray.kill(member.actor)


def _cause(error: BaseException) -> str:
    """The line of an error that says most: the last of its traceback, without Ray's list of what it might be."""
    return last_line(text_of(error)).partition(" Some common causes")[0] or type(error).__name__


def _available() -> str:
    import ray

    return ", ".join(
        f"{name} {value:g}" for name, value in sorted(ray.available_resources().items()) if ":" not in name
    )
