"""The runners of a pool in this process: tasks on one event loop, in a thread of its own.

Not here: runners that are Ray actors (`actors`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from raystore.client import StoreClient
from raystore.errors import PoolStartError
from raystore.runner.agents import Agents
from raystore.runner.context import apart
from raystore.runner.inline_agents import InlineAgents
from raystore.runner.told import last_line, report
from raystore.runner.worker import EXPLAIN_SECONDS, STOP_SECONDS, Runner, RunnerOptions, runner_id

logger: logging.Logger = logging.getLogger("raystore.runner")


class RunnerThreads:
    """A number of runners, started and stopped together."""

    def __init__(
        self, store: StoreClient, agent: Any, size: int, options: RunnerOptions, start_timeout: float, pool_id: str
    ) -> None:
        self._store, self._agent, self._size, self._options, self._pool_id = store, agent, size, options, pool_id
        self._start_timeout = start_timeout
        self._runners: dict[int, Runner] = {}
        self._hired: Counter[int] = Counter()  # how often each place was filled
        self._working: dict[Runner, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._run, name="raystore-runners", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._resizing = threading.Lock()
        self._stopping = False

    def worker_ids(self) -> list[str]:
        """The runners that work now."""
        return [runner.worker_id for runner in list(self._runners.values())] if self._thread.is_alive() else []

    def actors(self) -> list[Any]:
        """None of them is an actor."""
        return []

    def start(self) -> None:
        """Make the agents ready, and work."""
        self._thread.start()
        if not self._started.wait(min(EXPLAIN_SECONDS, self._start_timeout)):
            logger.warning("Still waiting for __init__ or setup() of the agent.")
            if not self._started.wait(max(self._start_timeout - EXPLAIN_SECONDS, 0)):
                self._stopping = True  # what gets ready now is closed again
                raise self._too_slow(self._size)
        if self._failure is not None:
            raise self._cannot_start(self._failure) from self._failure

    def _cannot_start(self, failure: BaseException) -> PoolStartError:
        cause = last_line(report(failure))
        return PoolStartError(f"{self._size} runners in this process", "this process", cause)

    def _too_slow(self, count: int) -> PoolStartError:
        return PoolStartError(f"{self._size} runners in this process", "this process", setting_up=count)

    def _run(self) -> None:
        with apart(threading.main_thread()):  # which is the driver's
            asyncio.run(self._work())

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._hire(range(self._size), threading.Event())
        except Exception as failure:
            self._failure = failure
        self._started.set()
        while self._working:
            done, _ = await asyncio.wait(self._working.values(), return_when=asyncio.FIRST_COMPLETED)
            for runner in [runner for runner, task in self._working.items() if task in done]:
                self._working.pop(runner).result()

    async def _hire(self, numbers: Iterable[int], given_up: threading.Event) -> None:
        """Fill these places, all or none; what gets ready when that was given up is closed again."""
        ids = {number: runner_id(self._pool_id, number, self._hired[number]) for number in numbers}
        homes = {number: _agents(self._agent, worker_id, self._options) for number, worker_id in ids.items()}
        opened = await asyncio.gather(*(home.open() for home in homes.values()), return_exceptions=True)
        failure = next((result for result in opened if result is not None), None)
        if failure is not None:
            made = [home for home, result in zip(homes.values(), opened, strict=True) if result is None]
            await asyncio.gather(*(home.close() for home in made))
            raise failure
        if self._stopping or given_up.is_set():  # while they got ready
            await asyncio.gather(*(home.close() for home in homes.values()))
            return
        for number, worker_id in ids.items():
            self._hired[number] += 1
            runner = self._runners[number] = Runner(self._store, homes[number], worker_id, self._options)
            self._working[runner] = asyncio.create_task(runner.run())

    def resize(self, size: int, *, drain_seconds: float) -> None:
        """Start runners until there are so many, or end those beyond."""
        with self._resizing:
            if self._loop is None or not self._working:
                raise PoolStartError(f"{size} runners in this process", "this process", "the pool does not run")
            before, self._size = self._size, size
            if size < before:
                self._dismiss([self._runners.pop(number) for number in range(size, before)], drain_seconds)
                return
            given_up = threading.Event()
            # The loop waits for a runner to end: it is looked at again when one has.
            hiring = asyncio.run_coroutine_threadsafe(self._hire(range(before, size), given_up), self._loop)
            try:
                hiring.result(self._start_timeout)
            except Exception as failure:
                is_slow = not hiring.done()  # else it is an error of the agent's, TimeoutError for one
                given_up.set()
                error = self._too_slow(size - before) if is_slow else self._cannot_start(failure)
                self._size = before
                raise error from (None if is_slow else failure)

    def stop(self, *, drain_seconds: float) -> None:
        """Claim nothing more and end; let what runs finish within so many seconds."""
        if self._thread.ident is None:  # never started
            return
        self._stopping = True
        self._started.wait(STOP_SECONDS)  # or runners would start behind our back
        self._dismiss(list(self._runners.values()), drain_seconds)
        self._thread.join(STOP_SECONDS)

    def _dismiss(self, runners: list[Runner], drain_seconds: float) -> None:
        """Let runners finish, or else give back, what they run."""
        if drain_seconds > 0:
            self._ask_to_stop(runners, drain=True, seconds=drain_seconds)
        self._ask_to_stop(runners, drain=False, seconds=STOP_SECONDS)

    def _ask_to_stop(self, runners: list[Runner], *, drain: bool, seconds: float) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        ended = [self._ended(runner, drain=drain) for runner in runners]
        deadline = time.monotonic() + seconds
        for one in ended:
            one.wait(max(deadline - time.monotonic(), 0))

    def _ended(self, runner: Runner, *, drain: bool) -> threading.Event:
        """Ask a runner to stop; set once it has ended."""
        ended = threading.Event()

        def stop() -> None:
            task = self._working.get(runner)
            if task is None or task.done():
                ended.set()
                return
            task.add_done_callback(lambda task: ended.set())
            runner.stop(drain=drain)

        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(stop)
        except RuntimeError:  # all have ended, and the loop with them
            ended.set()
        return ended


def _agents(agent: Any, worker_id: str, options: RunnerOptions) -> Agents:
    if options.isolation == "actor":
        return InlineAgents(agent, options.concurrency)
    from raystore.runner.process_agents import ForkedAgents, pickled

    return ForkedAgents(pickled(agent), options.concurrency, worker_id)
