"""Agents in the process of their runner: `RunnerPool(isolation="actor")`.

The cancellation of a rollout cancels the await of its agent. An agent that does not await must look at `ctx.cancelled`
itself, or call `ctx.check()`, which raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raystore.errors.text import summary
from raystore.runner.agents import Agent, Ending, retry_delays
from raystore.runner.context import Context
from raystore.runner.life import Life

logger: logging.Logger = logging.getLogger("raystore.runner")

CLOSE_SECONDS = 1.0  #: that an agent may take to end after one of its calls was abandoned

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Pending:
    """A call of the agent that has not ended."""

    ending: asyncio.Future[Ending]
    begun: threading.Event = field(default_factory=threading.Event)


class InlineAgents:
    """Runs an agent up to `concurrency` times at once in this process. `ProcessAgents` has the same methods."""

    def __init__(self, agent: Agent, concurrency: int) -> None:
        self._agent = agent
        self._concurrency = concurrency
        self._thread: _AgentThread | None = None
        self._opening = asyncio.Lock()
        self._pending: dict[Context, _Pending] = {}
        self._has_warned = False
        self._has_abandoned = False

    async def open(self) -> None:
        """Make the agents; raises the error of an agent's `__init__` or `setup`."""
        self._thread = await self._start_thread()

    async def _start_thread(self) -> _AgentThread:
        """A thread whose agent is set up; raises the error of the agent's `__init__` or `setup`."""
        thread = _AgentThread(self._agent, self._concurrency)
        error = await thread.opened
        if error is None:
            return thread
        if isinstance(error, Exception):
            raise error
        raise RuntimeError(f"the agent could not be made: {error!r}") from error  # not SystemExit: the process goes on

    async def run(self, context: Context) -> Ending:
        """Run the agent on one rollout."""
        pending = self._pending[context] = _Pending(asyncio.get_running_loop().create_future())
        delays = retry_delays()
        try:
            while not pending.ending.done():
                try:
                    thread = await self._living_thread()
                except Exception as error:
                    delay = next(delays)
                    logger.error("The agent cannot be made again; trying again in %g s. %s", delay, summary(error))
                    await asyncio.wait([pending.ending], timeout=delay)
                    continue
                thread.begin(context, pending)
                either: list[asyncio.Future[Any]] = [pending.ending, thread.ended]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if pending.begun.is_set():
                    await asyncio.wait([pending.ending])
        finally:
            del self._pending[context]
        return Ending(None) if pending.ending.cancelled() else pending.ending.result()

    async def _living_thread(self) -> _AgentThread:
        """The thread of the agent; a new one if the life of the last one is over."""
        async with self._opening:
            if self._thread is None or not self._thread.is_usable:
                if self._thread is not None:
                    await self._thread.ended
                self._thread = await self._start_thread()
            return self._thread

    def cancel(self, context: Context) -> None:
        """Cancel the agent: its work is no longer needed; `context` says why."""
        if (pending := self._pending.get(context)) is None:
            return
        if pending.begun.is_set():
            assert self._thread is not None
            self._thread.life.cancel(context)
        else:
            pending.ending.cancel()  # if the call begins at this moment, it sees that it was cancelled

    def kill(self, context: Context) -> None:
        """Kill an agent that was cancelled when the grace period is over; here, only log that it goes on."""
        if context in self._pending and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The agent goes on with rollout %s although its work is no longer needed (%s), and occupies its slot "
                "until it returns. Call ctx.check() in the agent now and then, or use "
                "RunnerPool(isolation='process'). (Logged once.)",
                context.rollout.rollout_id, context.why,
            )  # fmt: skip

    def abandon(self, context: Context) -> None:
        """Let `run` return now, because the runner ends."""
        if (pending := self._pending.get(context)) is not None:
            self._has_abandoned = True
            pending.ending.cancel()  # a call that goes on ends with the process

    async def close(self) -> None:
        if self._thread is not None:
            self._thread.life.end()
            await asyncio.wait([self._thread.ended], timeout=CLOSE_SECONDS if self._has_abandoned else None)


class _AgentThread:
    """A daemon thread in which an agent lives."""

    def __init__(self, agent: Agent, concurrency: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.life = Life(agent, concurrency)
        self.opened: asyncio.Future[BaseException | None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._run, name="raystore-agent", daemon=True).start()

    @property
    def is_usable(self) -> bool:
        return not self.ended.done() and not self.life.is_over

    def _run(self) -> None:
        is_open = False
        try:
            with self.life:
                is_open = True
                self._resolve(self.opened, None)
                self.life.serve()
        except BaseException as error:  # SystemExit, too
            if is_open:
                logger.exception("An agent has ended; another one is made for the next rollout")
            else:
                self._resolve(self.opened, error)
        finally:
            self._resolve(self.ended, None)

    def begin(self, context: Context, pending: _Pending) -> None:
        """Ask for a call; it never begins if the life is over."""
        with contextlib.suppress(RuntimeError):  # the agent's loop is closed, and `ended` will be set
            self.life.begin(context, functools.partial(self._resolve, pending.ending), pending.begun.set)

    def _resolve(self, future: asyncio.Future[T], value: T) -> None:
        """Set the result of a future of the runner's loop; called on the agent's thread."""

        def set_result() -> None:
            if not future.done():
                future.set_result(value)

        with contextlib.suppress(RuntimeError):  # the runner's loop is closed: nobody waits
            self._loop.call_soon_threadsafe(set_result)
