"""Agents in the process of their runner: coroutines on its event loop, other functions in threads.

An agent that is not async cannot be stopped from outside: it sees `ctx.cancelled`, and `ctx.check()` raises.
Not here: agents in processes of their own (`forked`).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raystore.runner import agents
from raystore.runner.agents import Ending
from raystore.runner.context import Context

logger = logging.getLogger("raystore.runner")


class InlineAgents:
    """Runs an agent up to `concurrency` times at once in this process."""

    def __init__(self, agent: Any, concurrency: int) -> None:
        self._agent = agent
        self._is_async = agents.is_async(agent)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="raystore-agent")
        self._calls: dict[Context, asyncio.Future[Ending]] = {}
        self._warned = False

    async def open(self) -> None:
        self._agent = await agents.load(self._agent)

    async def run(self, context: Context) -> Ending:
        call: asyncio.Future[Ending]
        if self._is_async:
            call = asyncio.create_task(agents.run_async(self._agent, context))
        else:
            run = contextvars.copy_context().run
            loop = asyncio.get_running_loop()
            call = loop.run_in_executor(self._threads, run, agents.run_sync, self._agent, context)
        self._calls[context] = call
        try:
            await asyncio.wait([call])
        finally:
            del self._calls[context]
            call.cancel()
        return Ending(None) if call.cancelled() else call.result()

    def cancel(self, context: Context) -> None:
        if self._is_async and context in self._calls:
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
        self._threads.shutdown(wait=False, cancel_futures=True)
        await agents.unload(self._agent)
