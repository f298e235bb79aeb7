"""What an agent is, how it is called, and how a call ends.

An agent is a function or coroutine function `agent(task, ctx)`, or a class with `__call__`, of which each process makes
one instance (`setup` and `close` may be coroutine functions, too). Whatever it returns or raises becomes an `Ending`;
no error that can be raised, however odd, is replaced by another one on that way.
Not here: its thread and task (`life`), its process (`inline`, `forked`), what is reported of it (`worker`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raystore.errors import Abort, Drop, PayloadLostError
from raystore.runner.context import Context
from raystore.runner.told import report, summary, text_of
from raystore.spans import Span

CAUSES_SEEN = 20  #: of an error
RETRY_SECONDS = 0.2  #: before an agent that could not be made again is tried again; doubles each time ...
RETRY_MOST_SECONDS = 10.0  #: ... up to this
_OURS = str(Path(__file__).parents[1]) + os.sep
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
        return f"to be called with (task, ctx), but it takes {signature}; write it as agent(task, ctx)"
    return None


def is_class(agent: Any) -> bool:
    """Whether it is a class, of which an instance is to be made."""
    return inspect.isclass(_inner(agent))


def is_async(agent: Any) -> bool:
    """Whether it, or an instance of it, is a coroutine function. What merely returns an awaitable is not known here."""
    inner = _inner(agent)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def _inner(agent: Any) -> Any:
    while isinstance(agent, functools.partial):
        agent = agent.func
    return agent


def ended(context: Context, result: Any, error: BaseException | None) -> Ending:
    """How a call has ended that returned this, or raised that if it is not None; in the agent's thread."""
    if error is None:
        try:
            take_result(context, result)
            return Ending("succeeded", "ok")
        except Exception as refusal:
            error = refusal
    for one in _leaves(error):
        if isinstance(one, Abort):  # before Drop: what failed with the infrastructure may have been in order
            return Ending("failed", "infra", text_of(one))
    for one in _leaves(error):
        if isinstance(one, Drop):
            return Ending("failed", "dropped", text_of(one))
    if isinstance(error, asyncio.CancelledError):
        if context.cancelled:
            return Ending(None)
        return Ending("failed", "agent_error", f"the agent cancelled itself: {summary(error)}", "cancelled itself")
    if (lost := lost_resources(error, context)) is not None:
        return Ending("failed", "infra", str(lost), unread=lost.resources)
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if not frame.filename.startswith(_OURS)] or frames  # where people can look
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    return Ending("failed", "agent_error", report(error)[-ERROR_CHARACTERS:], f"{type(error).__name__} at {where}")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """An error, or those that a group holds, also within groups."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def and_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, with what groups among them hold; the newest first, and not without end."""
    for _ in range(CAUSES_SEEN):
        if error is None:
            return
        yield error
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        error = error.__cause__ or error.__context__


def lost_resources(error: BaseException | None, context: Context) -> PayloadLostError | None:
    """The error, among those that led to this one, which says that the rollout's resources cannot be had."""
    wanted = (context.rollout.resources_id, context.attempt.resources_version)
    for one in and_causes(error):
        if isinstance(one, PayloadLostError) and one.resources == wanted:
            return one
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
        raise TypeError(f"the agent returned {result!r}: expected a number (the reward), a list of Span, or None")
