"""What an agent is, how it is called, and how a call ends.

An agent is a function or coroutine function `agent(task, ctx)`, or a class with `__call__`, of which each process makes
one instance (`setup` and `close` may be coroutine functions, too). Whatever it returns or raises becomes an `Ending`.
Not here: in which thread or process it runs (`inline`, `forked`), what is reported of it (`worker`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import traceback
from dataclasses import dataclass
from typing import Any, Protocol

from raystore.errors import Abort, Drop, PayloadLostError
from raystore.runner.context import Context
from raystore.spans import Span

logger = logging.getLogger("raystore.runner")

CAUSES_SEEN = 20  #: of an error
ERROR_CHARACTERS = 16_000  #: of an agent's traceback that are kept


@dataclass(slots=True)
class Ending:
    """How a call of an agent ended: the status and outcome of its attempt.

    `status` is None if it was stopped from outside: the store then knows already what became of the attempt, or the
    runner gives the work back. `died` says that the process which ran it, and nothing else, has ended.
    """

    status: str | None
    outcome: str | None = None
    error: str | None = None
    place: str | None = None  # where an agent's exception came from, for people; told once
    died: bool = False
    unread: tuple[str, int] | None = None  # id and version of the rollout's resources, which could not be read


class Agents(Protocol):
    """Where agents run: threads and tasks of this process, or processes of their own."""

    async def open(self) -> None:
        """Make them ready; raises what making or setting up the agent raises."""

    async def run(self, context: Context) -> Ending:
        """Run the agent on one rollout."""

    def cancel(self, context: Context) -> None:
        """Tell the agent that its work is of no use any more (`context` says why)."""

    def kill(self, context: Context) -> None:
        """The agent was told, and had time enough."""

    def abandon(self, context: Context) -> None:
        """The runner ends and waits for the agent no longer: `run` returns now."""

    async def close(self) -> None:
        """End them."""


def check(agent: Any) -> str | None:
    """What is wrong with something that is passed as an agent, None if nothing is."""
    if not callable(agent):
        return "a function agent(task, ctx), or a class with __call__"
    inner = _inner(agent)
    is_class = inspect.isclass(inner)
    called = (
        next((vars(cls)["__call__"] for cls in inner.__mro__ if "__call__" in vars(cls)), None) if is_class else inner
    )
    if called is None:
        return "a class with __call__(task, ctx)"
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        return "a function that returns, not a generator"
    try:
        signature = inspect.signature(called if is_class else agent)
    except ValueError:  # of a function in C, which does not say
        return None
    try:
        signature.bind(*(["self"] if is_class else []), "task", "ctx")
    except TypeError:
        return f"to be called with (task, ctx), but it takes {signature}"
    return None


class LoadedAgent:
    """An agent that is ready in this process: a function as it is, a class as one instance that was set up."""

    def __init__(self, call: Any, *, is_ours: bool) -> None:
        self.call = call
        self.is_async = is_async(call)
        self._is_ours = is_ours

    async def close(self) -> None:
        """Let an instance that was made here let go of what it holds; an error there is told and changes nothing."""
        if self._is_ours:
            try:
                await _maybe_await(self.call, "close")
            except Exception:
                logger.exception("close() of the agent failed")


async def load(agent: Any) -> LoadedAgent:
    """Make an agent ready; raises what it raises."""
    is_class = inspect.isclass(_inner(agent))
    try:
        call = agent() if is_class else agent
        if is_class:
            await _maybe_await(call, "setup")
    except (SystemExit, KeyboardInterrupt) as error:  # would end the process
        raise RuntimeError(f"the agent could not be made: {error!r}") from error
    return LoadedAgent(call, is_ours=is_class)


async def _maybe_await(agent: Any, name: str) -> None:
    method = getattr(agent, name, None)
    if callable(method):
        result = method()
        if inspect.isawaitable(result):
            await result


def is_async(agent: Any) -> bool:
    """Whether calling it gives a coroutine."""
    inner = _inner(agent)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def _inner(agent: Any) -> Any:
    while isinstance(agent, functools.partial):
        agent = agent.func
    return agent


async def run_async(agent: Any, context: Context) -> Ending:
    """Run an agent that is a coroutine function, in a task of its own."""
    try:
        with context.active():
            take_result(context, await agent(context.rollout.input, context))
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling() and not context.cancelled:
            raise  # the loop ends
        return _ending(error, context)
    except GeneratorExit:
        raise
    except BaseException as error:
        return _ending(error, context)
    return Ending("succeeded", "ok")


def run_sync(agent: Any, context: Context) -> Ending:
    """Run any other agent, in the calling thread."""
    try:
        with context.active():
            take_result(context, agent(context.rollout.input, context))
    except BaseException as error:  # SystemExit, too, would end more than this rollout
        return _ending(error, context)
    return Ending("succeeded", "ok")


def _ending(error: BaseException, context: Context) -> Ending:
    """How an agent that raised has ended."""
    if isinstance(error, Abort):
        return Ending("failed", "infra", str(error))
    if isinstance(error, Drop):
        return Ending("failed", "dropped", str(error))
    if isinstance(error, asyncio.CancelledError):
        if context.cancelled:
            return Ending(None)
        return Ending("failed", "agent_error", f"the agent cancelled itself: {error!r}", "cancelled itself")
    if (lost := lost_resources(error, context)) is not None:
        return Ending("failed", "infra", str(lost), unread=lost.resources)
    text = "".join(traceback.format_exception(error))
    raised = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} at {raised.filename}:{raised.lineno}"
    return Ending("failed", "agent_error", text[-ERROR_CHARACTERS:], place)


def lost_resources(error: BaseException | None, context: Context) -> PayloadLostError | None:
    """The error, among those that led to this one, which says that the rollout's resources cannot be had."""
    wanted = (context.rollout.resources_id, context.attempt.resources_version)
    for _ in range(CAUSES_SEEN):
        if error is None:
            return None
        if isinstance(error, PayloadLostError) and error.resources == wanted:
            return error
        error = error.__cause__ or error.__context__
    return None


def take_result(context: Context, result: Any) -> None:
    """What an agent returned: a reward, spans, or nothing."""
    if result is None:
        return
    if hasattr(result, "__float__") or hasattr(result, "item"):  # a number, also of numpy or torch
        context.reward(result)
    elif isinstance(result, (list, tuple)) and all(isinstance(item, Span) for item in result):
        for span in result:
            context.add(span)
    else:
        hint = ""
        if inspect.iscoroutine(result):
            result.close()
            hint = ". Was an await forgotten? An agent that awaits is an `async def`"
        raise TypeError(f"the agent returned {result!r}: expected a number (the reward), a list of Span, or None{hint}")
