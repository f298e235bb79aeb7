"""Agents in the process of their runner: coroutines on its event loop, other functions in threads.

An agent that is not async cannot be stopped from outside: it sees `ctx.cancelled`, and `ctx.check()` raises.
Not here: agents in processes of their own (`forked`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from raystore.runner import agents
from raystore.runner.agents import Ending, LoadedAgent
from raystore.runner.context import Context

logger = logging.getLogger("raystore.runner")


class InlineAgents:
    """Runs an agent up to `concurrency` times at once in this process."""

    def __init__(self, agent: Any, concurrency: int) -> None:
        self._source = agent
        self._agent: LoadedAgent | None = None
        self._threads = _Threads(concurrency)
        self._calls: dict[Context, asyncio.Future[Ending]] = {}
        self._warned = False

    async def open(self) -> None:
        self._agent = await agents.load(self._source)

    async def run(self, context: Context) -> Ending:
        assert self._agent is not None
        call: asyncio.Future[Ending]
        if self._agent.is_async:
            call = asyncio.create_task(agents.run_async(self._agent.call, context))
        else:
            call = self._threads.submit(functools.partial(agents.run_sync, self._agent.call, context))
        self._calls[context] = call
        try:
            await asyncio.wait([call])
        finally:
            del self._calls[context]
            call.cancel()
        return Ending(None) if call.cancelled() else call.result()

    def cancel(self, context: Context) -> None:
        if self._agent is not None and self._agent.is_async and context in self._calls:
            self._calls[context].cancel()

    def kill(self, context: Context) -> None:
        if context in self._calls and not self._warned:
            self._warned = True
            logger.warning(
                "The agent goes on with rollout %s although its work is of no use any more (%s), and keeps its place "
                "until it returns. Let it call ctx.check() now and then, or use RunnerPool(isolation='process'). "
                "(told once)",
                context.rollout.rollout_id, context.why,
            )  # fmt: skip

    def abandon(self, context: Context) -> None:
        if context in self._calls:
            self._calls[context].cancel()  # a thread that goes on ends with its process

    async def close(self) -> None:
        self._threads.close()
        if self._agent is not None:
            await self._agent.close()


class _Threads:
    """Threads that the end of the interpreter does not wait for, unlike those of `concurrent.futures`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._started = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, function: Callable[[], Ending]) -> asyncio.Future[Ending]:
        """Run a function in a thread, with a copy of the caller's context."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Ending] = loop.create_future()
        run = contextvars.copy_context().run

        def settle(ending: Ending) -> None:
            if not done.done():
                done.set_result(ending)

        def work() -> None:
            ending = run(function)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, ending)

        if self._started < self._most:
            self._started += 1
            name = f"raystore-agent-{self._started}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()
        self._work.put(work)
        return done

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # with all that it refers to, while nothing follows

    def close(self) -> None:
        for _ in range(self._started):
            self._work.put(None)
