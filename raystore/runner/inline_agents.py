"""Agents in the process of their runner, each with its life in a thread of its own.

What an agent awaits is cancelled with its rollout. What does not await cannot be stopped from outside: it sees
`ctx.cancelled`, and `ctx.check()` raises.
Not here: what a life is (`life`), agents in processes of their own (`forked`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from dataclasses import dataclass
from typing import Any

from raystore.runner.agents import RETRY_MOST_SECONDS, RETRY_SECONDS, Ending
from raystore.runner.context import Context
from raystore.runner.life import Life
from raystore.runner.told import summary

logger: logging.Logger = logging.getLogger("raystore.runner")

CLOSE_SECONDS = 1.0  #: that the end of an agent may take whose call was abandoned


@dataclass(slots=True, eq=False)
class _Call:
    """A rollout that an agent of this process is to run."""

    ending: asyncio.Future[Ending]
    has_begun: bool = False

    def begin(self) -> None:
        """On the agent's thread."""
        self.has_begun = True


class InlineAgents:
    """Runs an agent up to `concurrency` times at once in this process."""

    def __init__(self, agent: Any, concurrency: int) -> None:
        self._agent = agent
        self._concurrency = concurrency
        self._thread: _Thread | None = None
        self._opening = asyncio.Lock()
        self._calls: dict[Context, _Call] = {}
        self._warned = False
        self._abandoned = False

    async def open(self) -> None:
        self._thread = await self._begin()

    async def _begin(self) -> _Thread:
        """A new life; raises what making or setting up the agent raises."""
        thread = _Thread(self._agent, self._concurrency)
        error = await thread.opened
        if error is None:
            return thread
        if isinstance(error, Exception):
            raise error
        raise RuntimeError(f"the agent could not be made: {error!r}") from error  # SystemExit would end the process

    async def run(self, context: Context) -> Ending:
        call = self._calls[context] = _Call(asyncio.get_running_loop().create_future())
        delay = RETRY_SECONDS
        try:
            while not call.ending.done():
                try:
                    thread = await self._living()
                except Exception as error:
                    logger.error("The agent cannot be made again; trying again in %g s. %s", delay, summary(error))
                    await asyncio.wait([call.ending], timeout=delay)
                    delay = min(2 * delay, RETRY_MOST_SECONDS)
                    continue
                thread.begin(context, call)
                either: list[asyncio.Future[Any]] = [call.ending, thread.ended]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if call.has_begun:
                    await asyncio.wait([call.ending])
        finally:
            del self._calls[context]
        return Ending(None) if call.ending.cancelled() else call.ending.result()

    async def _living(self) -> _Thread:
        """The thread of an agent whose life is not over; a new one if it was."""
        async with self._opening:
            if self._thread is None or not self._thread.is_usable:
                if self._thread is not None:
                    await self._thread.ended
                self._thread = await self._begin()
            return self._thread

    def cancel(self, context: Context) -> None:
        if (call := self._calls.get(context)) is None:
            return
        if call.has_begun:
            assert self._thread is not None
            self._thread.life.cancel(context)
        else:
            call.ending.cancel()  # and if it begins at this moment, it sees that it was cancelled

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
        if (call := self._calls.get(context)) is not None:
            self._abandoned = True
            call.ending.cancel()  # a thread that goes on ends with its process

    async def close(self) -> None:
        if self._thread is not None:
            self._thread.life.end()
            await asyncio.wait([self._thread.ended], timeout=CLOSE_SECONDS if self._abandoned else None)


class _Thread:
    """A thread that leads a life; the end of the interpreter does not wait for it."""

    def __init__(self, agent: Any, concurrency: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.life = Life(agent, concurrency)
        self.opened: asyncio.Future[BaseException | None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._lead, name="raystore-agent", daemon=True).start()

    @property
    def is_usable(self) -> bool:
        """Whether it takes calls."""
        return not self.ended.done() and not self.life.is_over

    def _lead(self) -> None:
        is_open = False
        try:
            with self.life:
                is_open = True
                self._tell(self.opened, None)
                self.life.serve()
        except BaseException as error:  # SystemExit, too
            if is_open:
                logger.exception("An agent has ended; another one is made for the next rollout")
            else:
                self._tell(self.opened, error)
        finally:
            self._tell(self.ended, None)

    def begin(self, context: Context, call: _Call) -> None:
        """Have a call made; it never begins if the life is over."""
        with contextlib.suppress(RuntimeError):  # its loop is closed, and `ended` says so at once
            self.life.begin(context, functools.partial(self._tell, call.ending), call.begin)

    def _tell(self, future: asyncio.Future[Any], value: Any) -> None:
        def settle() -> None:
            if not future.done():
                future.set_result(value)

        with contextlib.suppress(RuntimeError):  # the runner's loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(settle)
