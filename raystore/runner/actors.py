"""The runners of a pool as Ray actors, watched by one thread that sleeps until one of them ends.

If a runner dies (killed, crashed, out of memory, with its node), the pool reports its session to the store at once: the
store offers its rollouts again, and a new runner replaces it under a new worker id. If a runner is stopped, what it has
not finished is withdrawn without a charge, by the runner itself or by the pool.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from raystore.client.client import StoreClient
from raystore.client.transport import run_blocking
from raystore.errors import OutcomeUnknownError, PoolStartError, StoreError
from raystore.errors.text import last_line, portable, text_of
from raystore.reports.log import a_minute, logger_of
from raystore.reports.progress import Progress
from raystore.runner.agents import retry_delays
from raystore.runner.worker import EXPLAIN_SECONDS, WITHDRAW_SECONDS, Runner, RunnerOptions, WorkerIds, stop_all

logger: logging.Logger = logger_of("raystore.runner")

NAMESPACE = "raystore-runners"  #: Ray's namespace in which the runners' worker ids are the names of their actors
SHOWN_SECONDS = 0.5  #: after which progress of a start is counted again
REPLACE_SECONDS = 1.0  #: after a death the runner is replaced, even if the store did not answer whether it was useful
FAILURES_REPORTED = 3  #: after so many runners in a row that died before they were ready, the pool reports a failure


class RunnerActor:
    """One runner as a Ray actor."""

    def __init__(self, store: StoreClient, agent: bytes, worker_id: str, options: RunnerOptions) -> None:
        self._store = store
        self._runner = Runner(store, agent, worker_id, options)

    async def ping(self) -> None:
        """Answer as soon as this process runs."""

    async def ready(self) -> str:
        """Set the agents up; returns the session id of this process."""
        try:
            await self._runner.open()
        except Exception as error:
            raise portable(error) from None
        return str(self._store.session_id)

    async def run(self) -> None:
        """Work until stopped, once `ready` was answered: a task that kills this process is no failure to start it."""
        await self._runner.run()
        self._store.close()

    async def stop(self, drain: bool) -> None:
        """Claim nothing more."""
        self._runner.stop(drain=drain)

    def __repr__(self) -> str:
        """The name in Ray's logs, in its dashboard and in `ray list actors`."""
        return f"Runner({self._runner.worker_id})"


class _Member:
    """One runner actor as its pool knows it."""

    def __init__(self, number: int, worker_id: str, actor: Any, is_awaited: bool) -> None:
        self.number = number
        self.worker_id = worker_id
        self.actor = actor
        self.is_awaited = is_awaited  # by whoever starts it, and tells of its failure to start
        self.is_stopped = False  # by the pool; then its end is no death
        self.is_replaced = False
        self.ended = threading.Event()
        self._ping: Future[None] = actor.ping.remote().future()
        self.ready: Future[str] = actor.ready.remote().future()

    @property
    def session_id(self) -> str | None:
        """Of its process, once it is ready."""
        return self.ready.result() if self.ready.done() and self.ready.exception() is None else None

    @property
    def is_setting_up(self) -> bool:
        """Whether its process runs while its agent is not ready yet."""
        return not self.ready.done() and self._ping.done() and self._ping.exception() is None

    def stop(self, *, drain: bool) -> None:
        self.actor.stop.remote(drain)


_PoolEvent = tuple[Callable[[_Member, Any], None], _Member, Future[Any] | None]  #: a handler, and its arguments


class RunnerActors:
    """The runners of a pool as Ray actors, each replaced when it dies."""

    def __init__(
        self,
        store: StoreClient,
        agent: bytes,
        size: int,
        options: RunnerOptions,
        requirements: dict[str, Any],
        start_timeout: float,
        pool_id: str,
    ) -> None:
        import ray

        self._store = store
        self._size = size
        self._options = options
        self._start_timeout = start_timeout
        self._pool_id = pool_id
        self._agent = agent
        if requirements["num_cpus"] is None:
            is_single_node = sum(node["Alive"] for node in ray.nodes()) == 1
            requirements["num_cpus"] = 0 if is_single_node else 1
        self._requirements = {name: value for name, value in requirements.items() if value is not None}
        self._class = ray.remote(RunnerActor)
        self._ids = WorkerIds(pool_id)
        self._members: dict[int, _Member] = {}
        self._delays: dict[int, Iterator[float]] = {}  # until the next replacements of each number
        self._events: queue.SimpleQueue[_PoolEvent | None] = queue.SimpleQueue()  # for the watcher; None ends it
        self._failures = 0  # runners in a row that died before they were ready
        self._stopping = False
        self._lock = threading.Lock()
        self._resizing = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="raystore-pool", daemon=True)

    def members(self) -> list[_Member]:
        """The runners that work now."""
        return list(self._members.values())

    # -- starting ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all runners, and wait until they are ready; if one fails, kill them all."""
        self._watcher.start()
        try:
            self._start_members(range(self._size))
        except BaseException:  # Ctrl+C, too
            with self._lock:
                self._stopping = True
                self._kill(self.members())
            self._events.put(None)
            raise

    def _start_members(self, numbers: Iterable[int]) -> None:
        """Start runners with these numbers and wait until all are ready."""
        with self._lock:
            if self._stopping:
                raise self._error("the pool was stopped")
            members = [self._start_member(number, is_awaited=True) for number in numbers]
        deadline = time.monotonic() + self._start_timeout
        explain_at = time.monotonic() + min(EXPLAIN_SECONDS, self._start_timeout)
        has_explained = False
        with Progress("starting runners", len(members)) as shown:
            for member in members:
                while member.session_id is None:
                    shown.update(sum(one.ready.done() for one in members))
                    try:
                        left = (deadline if has_explained else explain_at) - time.monotonic()
                        left = min(left, SHOWN_SECONDS) if shown.can_draw else left
                        member.ready.result(timeout=max(left, 0))
                    except TimeoutError as error:
                        if member.ready.done():  # the agent itself raised it
                            raise self._error(_cause(error)) from error
                        if time.monotonic() >= deadline:
                            raise self._error(setting_up=sum(member.is_setting_up for member in members)) from None
                        if not has_explained and time.monotonic() >= explain_at:
                            self._log_waiting([member for member in members if not member.ready.done()])
                            has_explained = True
                    except Exception as error:  # the runner has died, or its agent cannot be set up
                        raise self._error(_cause(error)) from error

    def _start_member(self, number: int, *, is_awaited: bool) -> _Member:
        worker_id = self._ids.next(number)
        options: dict[str, Any] = {"max_concurrency": 100, "max_restarts": 0, "max_task_retries": 0}
        options |= {"name": worker_id, "namespace": NAMESPACE, "enable_task_events": False, **self._requirements}
        actor = self._class.options(**options).remote(self._store, self._agent, worker_id, self._options)
        member = self._members[number] = _Member(number, worker_id, actor, is_awaited)
        member.ready.add_done_callback(lambda future: self._events.put((self._on_ready, member, future)))
        return member

    def _error(self, cause: str | None = None, *, setting_up: int = 0) -> PoolStartError:
        return PoolStartError(self._asked(), _available(), cause, setting_up)

    def _asked(self) -> str:
        needs = {name: value for name, value in self._requirements.items() if name != "runtime_env"}
        return f"{self._size} runners, each {needs}"

    def _log_waiting(self, members: list[_Member]) -> None:
        """Log what these runners wait for: their agents, or resources of the cluster."""
        setting_up = [member.worker_id for member in members if member.is_setting_up]
        others = [member.worker_id for member in members if not member.is_setting_up]
        if setting_up:
            logger.warning(
                "Still waiting for __init__ or setup() of the agent in %d runners, whose processes run: %s.",
                len(setting_up), ", ".join(setting_up[:3]),
            )  # fmt: skip
        if others:
            logger.warning(
                "Still waiting for %d runners to be scheduled and started: %s. Asked for: %s. The cluster has: %s.",
                len(others), ", ".join(others[:3]), self._asked(), _available(),
            )  # fmt: skip

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while (event := self._events.get()) is not None:
            handle, member, future = event
            try:
                handle(member, future)
            except Exception:  # the other runners must still be watched
                logger.exception(
                    "An event of runner %s could not be handled", member.worker_id, extra=a_minute("event")
                )

    def _on_slow(self, member: _Member, future: None) -> None:
        if not member.ready.done() and not self._stopping:
            self._log_waiting([member])

    def _on_end(self, member: _Member, future: Future[Any]) -> None:
        member.ended.set()
        if member.is_stopped or (member.is_awaited and member.session_id is None):
            return
        error = future.exception()
        if error is None:
            logger.warning("Runner %s has ended because its store is gone", member.worker_id)
            with self._lock:
                self._remove(member)
            return
        if member.session_id is None:
            self._failures = failures = self._failures + 1
            if failures >= FAILURES_REPORTED and not self._stopping:
                cause = _cause(error)
                logger.error(
                    "Pool %s has failed %d times to start a runner: %s", self._pool_id, failures, cause,
                    extra=a_minute("failures", self._pool_id),
                )  # fmt: skip
                self._later(0, lambda: self._report_pool(failures, cause))
        self._later(0, lambda: self._on_death(member, error))

    def _on_ready(self, member: _Member, future: Future[str]) -> None:
        """Let a runner work, and report that the pool works again if its failures were reported to the store."""
        if future.exception():
            self._on_end(member, future)
            return
        run = member.actor.run.remote().future()
        run.add_done_callback(lambda future: self._events.put((self._on_end, member, future)))
        failures, self._failures = self._failures, 0
        if failures >= FAILURES_REPORTED:
            self._later(0, lambda: self._report_pool(0, None))

    def _report_pool(self, failures: int, cause: str | None) -> None:
        """Report that the pool fails, and calls that wait for its rollouts raise; or that it works again."""
        report = self._store.report_pool(self._pool_id, self._options.queues, failures=failures, error=cause)
        try:
            run_blocking(report)
        except StoreError as refusal:
            logger.warning("The failures of pool %s cannot be reported to the store: %s", self._pool_id, refusal)

    def _on_death(self, member: _Member, error: BaseException) -> None:
        """Replace a runner that died and report its end to the store; a store that is slow delays only the report."""
        soon = self._later(REPLACE_SECONDS, lambda: self._replace(member, False, error))
        try:
            known = self._store.sync.get_worker_by_id(member.worker_id)  # before the report, which changes it
        except OutcomeUnknownError:
            known = None
        except StoreError as refusal:
            soon.cancel()
            logger.error("The end of runner %s cannot be reported to the store: %s", member.worker_id, refusal)
            return
        soon.cancel()
        # A runner that has finished a rollout, saved a state or waited, was healthy and was killed from outside.
        stats = None if known is None else known.heartbeat_stats
        has_saved = isinstance(stats, dict) and stats.get("has_saved") is True
        self._replace(member, has_saved or (known is not None and known.last_idle_time is not None), error)
        self._report_end(member, stopped=False)

    def _replace(self, member: _Member, was_useful: bool, error: BaseException) -> None:
        """Start one runner in place of a dead one: at once if that was useful, else after a growing delay."""
        with self._lock:
            if member.is_replaced:
                return
            member.is_replaced = True
        if was_useful:
            self._delays.pop(member.number, None)
        delay = 0.0 if was_useful else next(self._delays.setdefault(member.number, retry_delays()))
        logger.warning(
            "Runner %s died and is replaced: %s", member.worker_id, _cause(error), extra=a_minute("died", self._pool_id)
        )
        self._later(delay, lambda: self._start_replacement(member))

    def _start_replacement(self, dead: _Member) -> None:
        with self._lock:
            if self._stopping or self._members.get(dead.number) is not dead or dead.number >= self._size:
                return
            member = self._start_member(dead.number, is_awaited=False)
        self._later(EXPLAIN_SECONDS, lambda: self._events.put((self._on_slow, member, None)))

    def _report_end(self, member: _Member, *, stopped: bool) -> None:
        """Report that the process of a runner has ended, so that the store offers its rollouts again at once."""
        worker_id = member.worker_id if member.session_id is None else None
        while True:
            try:
                run_blocking(self._store.report_ended(member.session_id, worker_id=worker_id, stopped=stopped))
                return
            except OutcomeUnknownError as doubt:  # a second report does no harm
                logger.warning(
                    "Runner %s has ended, which the store may not know yet: %s", member.worker_id, doubt,
                    extra=a_minute("doubt", self._pool_id),
                )  # fmt: skip
                if self._stopping:  # the store will notice that its session is silent
                    return
            except StoreError as refusal:
                logger.error("The end of runner %s cannot be reported to the store: %s", member.worker_id, refusal)
                return

    @staticmethod
    def _later(seconds: float, action: Callable[[], object]) -> threading.Timer:
        """Call something in a thread of its own, which may wait for a store that cannot be reached."""
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        return timer

    # -- resizing and stopping ---------------------------------------------------------------------------------------

    def resize(self, size: int, *, drain_seconds: float) -> None:
        """Start runners until there are `size`, or stop those beyond."""
        with self._resizing:
            before = self._size
            with self._lock:
                if self._stopping or not self._watcher.is_alive():
                    raise self._error("the pool does not run")
                self._size = size
                beyond = [member for number, member in self._members.items() if number >= size]
            if size < before:
                self._stop_members(beyond, drain_seconds)
                return
            try:
                self._start_members(range(before, size))
            except BaseException:
                with self._lock:
                    self._size = before
                    self._kill([member for number, member in self._members.items() if number >= before])
                raise

    def stop(self, *, drain_seconds: float) -> None:
        """Claim nothing more and end; let rollouts finish within so many seconds."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            members = self.members()
        self._stop_members(members, drain_seconds)
        self._events.put(None)

    def _stop_members(self, members: list[_Member], drain_seconds: float) -> None:
        for member in members:
            member.is_stopped = True
        stop_all(members, drain_seconds=drain_seconds, withdraw_seconds=WITHDRAW_SECONDS)
        with self._lock:
            self._kill(members)
        for member in members:
            if not member.ended.is_set():  # it was killed before it had given back all
                self._report_end(member, stopped=True)

    def _kill(self, members: list[_Member]) -> None:
        import ray

        for member in members:
            member.is_stopped = True
            self._remove(member)
            ray.kill(member.actor)

    def _remove(self, member: _Member) -> None:
        if self._members.get(member.number) is member:
            del self._members[member.number]


def _cause(error: BaseException) -> str:
    """The last line of an error's traceback, without Ray's list of common causes."""
    return last_line(text_of(error)).partition(" Some common causes")[0] or type(error).__name__


def _available() -> str:
    import ray

    return ", ".join(
        f"{name} {value:g}" for name, value in sorted(ray.available_resources().items()) if ":" not in name
    )
