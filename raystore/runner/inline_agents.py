"""Agents in the process of their runner (`RunnerPool(isolation="actor")`), or of a user who calls one (`run_one`).

The cancellation of a rollout cancels the await of its agent. An agent that does not await must look at `ctx.cancelled`
itself, or call `ctx.check()`, which raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, TypeVar

from raystore.client.client import TO_PUBLISH
from raystore.core.schema import LossReason
from raystore.errors import InvalidValueError
from raystore.errors.text import add_note, explained, summary
from raystore.reports.log import a_minute, logger_of
from raystore.runner import agents
from raystore.runner.agents import Agent, Ending, retry_delays
from raystore.runner.context import ALONE, SAVE, Context, Outbox, new_question
from raystore.runner.life import Life, returned
from raystore.tracing.calls import Losses
from raystore.types.contract import Attempt, AttemptedRollout, NamedResources, RolloutConfig
from raystore.types.spans import Span, find_final_reward
from raystore.wire.checks import validated
from raystore.wire.codec import Encoded
from raystore.wire.convert import to_state

logger: logging.Logger = logger_of("raystore.runner")

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
        self._has_abandoned = False

    async def open(self) -> None:
        """Make the agents; raises the error of an agent's `__init__` or `setup`."""
        await self._living_thread()

    async def run(self, context: Context) -> Ending:
        pending = self._pending[context] = _Pending(asyncio.get_running_loop().create_future())
        delays = retry_delays()
        try:
            while not pending.ending.done():
                try:
                    thread = await self._living_thread()
                except Exception as error:
                    delay = next(delays)
                    logger.error(
                        "The agent cannot be made again; trying again in %g s. %s", delay, summary(error),
                        extra=a_minute("agent not made"),
                    )  # fmt: skip
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
                thread = _AgentThread(self._agent, self._concurrency)
                if (error := await thread.opened) is not None:
                    if isinstance(error, Exception):
                        raise error
                    raise RuntimeError(f"the agent could not be made: {error!r}") from error  # the process goes on
                self._thread = thread
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
        if context in self._pending:
            logger.warning(
                "The agent goes on with rollout %s although its work is no longer needed (%s), and occupies its slot "
                "until it returns. Call ctx.check() in the agent now and then, or use "
                "RunnerPool(isolation='process').",
                context.rollout.rollout_id, context.why, extra=a_minute("agent goes on"),
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
                logger.exception(
                    "An agent has ended; another one is made for the next rollout", extra=a_minute("agent has ended")
                )
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


# -- one call, without Ray and without a store: to debug an agent, or to try it in a notebook --------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """The record of one call of an agent.

    Attributes:
        rollout: the rollout that was made up for the call.
        spans: those that the agent recorded, numbered in the order in which they ended.
        reward: the final reward, or None.
        spans_lost: how many spans were lost, and model calls cannot be trained on, by reason, as in `statistics()`.
        saved: the state that the agent saved last, as another attempt would have it in `ctx.saved`; None if it saved
            none.
    """

    rollout: AttemptedRollout
    spans: list[Span]
    reward: float | None
    spans_lost: dict[LossReason, int] = field(default_factory=dict)
    saved: Any = None

    def __repr__(self) -> str:
        names = ", ".join(span.name for span in self.spans)
        return f"<Run: reward {self.reward}, {len(self.spans)} spans: {names}>"


@explained
def run_one(
    agent: Agent,
    task: Any,
    resources: Mapping[str, Any] | None = None,
    *,
    policy_version: int | None = None,
    saved: Any = None,
) -> Run:
    """Run an agent on one task in this thread, as a runner would, and return its spans and reward.

    Args:
        agent: as for `RunnerPool`: a function, a coroutine function, or a class with `__call__`.
        task: the rollout's input.
        resources: by name, for `ctx.resources`, as for `update_resources`.
        policy_version: for `ctx.policy_version`.
        saved: for `ctx.saved`: a state that an earlier attempt has saved, or `Run.saved`.

    An error of the agent is raised unchanged, with a note of the spans recorded before. From `__init__` to `close` the
    agent lives in the calling thread, or in another one if this thread has a running event loop (a notebook).
    """
    if (expected := agents.check(agent)) is not None:
        raise InvalidValueError("agent", agent, expected)
    now = time.time()
    rollout_id, attempt_id = f"ro-{token_hex(6)}", f"at-{token_hex(4)}"
    attempt = Attempt(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=1,
        start_time=now,
        policy_version=validated("policy_version", int | None, policy_version),
    )
    rollout = AttemptedRollout(
        rollout_id=rollout_id, input=task, start_time=now, config=RolloutConfig(), status="preparing", attempt=attempt
    )
    losses = Losses()
    outbox = Outbox(losses)
    given = validated("resources", NamedResources, {} if resources is None else resources, TO_PUBLISH)
    kept = _Kept()
    context = Context(rollout, given, ALONE, outbox.add, losses.add, saved=saved, ask=kept.ask)
    too_late = f"A span of rollout {rollout_id} ended after run_one, and is lost"
    try:
        if asyncio._get_running_loop() is None:
            _run_once(agent, context)
        else:
            thread = ThreadPoolExecutor(1, "raystore-run-one")  # `with` would wait for the agent after a Ctrl+C
            thread.submit(contextvars.copy_context().run, _run_once, agent, context).result()
    except Exception as error:
        add_note(error, f"spans recorded before: {', '.join(span.name for span in outbox.take()) or 'none'}")
        raise
    finally:
        context.leave()
    spans = outbox.close(lambda span: losses.add("too_late", "", too_late))
    for number, span in enumerate(spans, 1):
        span.sequence_id = number
    state = None if kept.state is None else to_state(kept.state.payload, rollout_id)
    return Run(rollout, spans, find_final_reward(spans), losses.take(), state)


class _Kept:
    """What an agent has saved without a store."""

    def __init__(self) -> None:
        self.state: Encoded | None = None

    def ask(self, what: str, given: Any) -> Future[Any]:
        if what == SAVE:  # there is no newer version
            self.state = given
        asked = new_question()
        asked.set_result(None)
        return asked


def _run_once(agent: Agent, context: Context) -> None:
    """Make an agent, call it once and close it; raises the agent's own errors."""
    with Life(agent) as life:
        agents.take_result(context, returned(life.run(context)))
