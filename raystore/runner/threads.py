"""The runners of a pool in this process: tasks on one event loop, in a thread of its own.

Not here: runners that are Ray actors (`actors`).
"""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any

from raystore.client import StoreClient
from raystore.errors import PoolStartError
from raystore.runner.agents import Agents
from raystore.runner.inline import InlineAgents
from raystore.runner.told import last_line, report
from raystore.runner.worker import STOP_SECONDS, Runner, RunnerOptions


class RunnerThreads:
    """A number of runners, started and stopped together."""

    def __init__(self, store: StoreClient, agent: Any, size: int, options: RunnerOptions) -> None:
        self._agents = [_agents(agent, f"runner-{n}", options) for n in range(size)]
        self._runners = [Runner(store, home, f"runner-{n}", options) for n, home in enumerate(self._agents)]
        self._thread = threading.Thread(target=self._run, name="raystore-runners", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None

    def worker_ids(self) -> list[str]:
        """The runners that work now."""
        return [runner.worker_id for runner in self._runners] if self._thread.is_alive() else []

    def actors(self) -> list[Any]:
        """None of them is an actor."""
        return []

    def start(self) -> None:
        """Make the agents ready, and work."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            cause = last_line(report(self._failure))
            raise PoolStartError(f"{len(self._runners)} runners in this process", "this process", cause) from (
                self._failure
            )

    def _run(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        opened = await asyncio.gather(*(home.open() for home in self._agents), return_exceptions=True)
        self._failure = next((result for result in opened if result is not None), None)
        if self._failure is not None:
            made = [home for home, result in zip(self._agents, opened, strict=True) if result is None]
            await asyncio.gather(*(home.close() for home in made))
        self._started.set()
        if self._failure is None:
            await asyncio.gather(*(runner.run() for runner in self._runners))

    def stop(self, *, drain: bool) -> None:
        """Claim nothing more and end; with `drain`, let what runs finish within five seconds."""
        if self._thread.ident is None:  # never started
            return
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


def _agents(agent: Any, worker_id: str, options: RunnerOptions) -> Agents:
    if options.isolation == "actor":
        return InlineAgents(agent, options.concurrency)
    from raystore.runner.forked import ForkedAgents, pickled

    return ForkedAgents(pickled(agent), options.concurrency, worker_id)
