"""The runners of a pool in this process: tasks on one event loop, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterable
from typing import Any

from raystore.client.client import StoreClient
from raystore.errors import PoolStartError
from raystore.runner.agent_errors import last_line, report
from raystore.runner.agents import Agent
from raystore.runner.context import outside_rollouts
from raystore.runner.worker import EXPLAIN_SECONDS, STOP_SECONDS, Runner, RunnerOptions, WorkerIds, stop_all

logger: logging.Logger = logging.getLogger("raystore.runner")


class _Member:
    """A runner that runs."""

    def __init__(self, runner: Runner) -> None:
        self.worker_id = runner.worker_id
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

    def worker_ids(self) -> list[str]:
        """The ids of the runners that work now."""
        return [member.worker_id for member in list(self._members.values())] if self._thread.is_alive() else []

    def actors(self) -> list[Any]:
        """None of the runners is an actor."""
        return []

    def start(self) -> None:
        """Make all agents, and start to work."""
        self._thread.start()
        if not self._started.wait(min(EXPLAIN_SECONDS, self._start_timeout)):
            logger.warning("Still waiting for __init__ or setup() of the agent.")
            if not self._started.wait(max(self._start_timeout - EXPLAIN_SECONDS, 0)):
                self._stopping = True  # agents that are set up after this are closed again
                raise self._error(setting_up=self._size)
        if self._failure is not None:
            raise self._error(self._failure) from self._failure

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
                self._stop_members([self._members.pop(number) for number in range(size, before)], drain_seconds)
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
        self._stop_members(list(self._members.values()), drain_seconds)
        self._thread.join(STOP_SECONDS)

    def _stop_members(self, members: list[_Member], drain_seconds: float) -> None:
        stop_all(members, drain_seconds=drain_seconds, withdraw_seconds=STOP_SECONDS)
