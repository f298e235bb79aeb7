"""What counts as an agent, and the `Ending` of a call.

An agent is a function or coroutine function `agent(task, ctx)`, or a class with `__call__`, of which each process makes
one instance (`setup` and `close` may be coroutine functions, too). Its result or exception becomes an `Ending`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raystore.errors import Abort, AgentNotPicklableError, Drop, PayloadLostError
from raystore.errors.text import leaves, report, summary, text_of, with_causes
from raystore.runner.context import Context
from raystore.types.contract import AttemptStatus, Outcome
from raystore.types.spans import Span
from raystore.values import pickler

RETRY_SECONDS = 0.2  #: between two tries to make an agent or runner again; doubles each time ...
MAX_RETRY_SECONDS = 10.0  #: ... up to this
ERROR_CHARACTERS = 16_000  #: of an agent's traceback that are kept
_PACKAGE = str(Path(__file__).parents[1]) + os.sep

Agent = Callable[..., Any]  #: a function, a class, or a `functools.partial` of one


@dataclass(slots=True)
class Ending:
    """How a call of an agent ended.

    Attributes:
        status: of the attempt; None if the call was stopped from outside: then the store knows the status already, or
            the runner gives the work back.
        outcome, error: of the attempt.
        place: where the agent's exception was raised, for one warning per place.
        died: whether the process of this call ended, and nothing else with it.
        unread: id and version of the rollout's resources, if they could not be read.
    """

    status: AttemptStatus | None
    outcome: Outcome | None = None
    error: str | None = None
    place: str | None = None
    died: bool = False
    unread: tuple[str, int] | None = None


def check(agent: object) -> str | None:
    """None if an object is an agent; else the description of a valid one, for an error."""
    if not callable(agent):
        return "a function agent(task, ctx), or a class with __call__"
    inner = _unwrapped(agent)
    called: Any = inner
    if is_class := inspect.isclass(inner):
        called = next((vars(cls)["__call__"] for cls in inner.__mro__ if "__call__" in vars(cls)), None)
    if called is None:
        return "a class with __call__(task, ctx)"
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        return "a function that returns, not a generator"
    try:
        signature = inspect.signature(called if is_class else agent)
    except ValueError:  # a function in C may have no signature
        return None
    try:
        signature.bind(*(["self"] if is_class else []), "task", "ctx")
    except TypeError:
        return f"to be called with (task, ctx), but it takes {signature}; write it as agent(task, ctx)"
    return None


def is_class(agent: Agent) -> bool:
    """Whether an agent is a class, to be instantiated."""
    return inspect.isclass(_unwrapped(agent))


def is_async(agent: Agent) -> bool:
    """Whether an agent is called as a coroutine function. A plain function that returns an awaitable is not."""
    inner = _unwrapped(agent)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def _unwrapped(agent: Agent) -> Agent:
    while isinstance(agent, functools.partial):
        agent = agent.func
    return agent


def pickled(agent: Agent) -> bytes:
    """An agent as it is sent to another process; raises `AgentNotPicklableError`."""
    try:
        return pickler.dumps(agent)
    except Exception as error:
        raise AgentNotPicklableError(getattr(agent, "__name__", repr(agent)), str(error)) from error


def retry_delays() -> Iterator[float]:
    """Seconds to wait after each failure to make an agent or runner, without end."""
    delay = RETRY_SECONDS
    while True:
        yield delay
        delay = min(2 * delay, MAX_RETRY_SECONDS)


def ending_of(context: Context, result: Any, error: BaseException | None) -> Ending:
    """How a call ended that raised `error`, or returned `result` if that is None; runs in the agent's thread."""
    if error is None:
        try:
            take_result(context, result)
            return Ending("succeeded", "ok")
        except Exception as refusal:
            error = refusal
    wishes: tuple[tuple[type[Exception], Outcome], ...] = ((Abort, "infra"), (Drop, "dropped"))
    for kind, outcome in wishes:  # Abort first: after a failure of the infrastructure the task may be fine
        for one in leaves(error):
            if isinstance(one, kind):
                return Ending("failed", outcome, text_of(one))
    if isinstance(error, asyncio.CancelledError):
        if context.cancelled:
            return Ending(None)
        return Ending("failed", "agent_error", f"the agent cancelled itself: {summary(error)}", "cancelled itself")
    if (lost := lost_resources(error, context)) is not None:
        return Ending("failed", "infra", str(lost), unread=lost.resources)
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)] or frames  # the user's own code
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    return Ending("failed", "agent_error", report(error)[-ERROR_CHARACTERS:], f"{type(error).__name__} at {where}")


def lost_resources(error: BaseException | None, context: Context) -> PayloadLostError | None:
    """The error among these causes that says that the rollout's own resources are lost."""
    wanted = (context.rollout.resources_id, context.resources_version)
    lost = (one for one in with_causes(error) if isinstance(one, PayloadLostError) and one.resources == wanted)
    return next(lost, None)


def take_result(context: Context, result: Any) -> None:
    """Record what an agent returned: a reward, spans or None; raises TypeError for anything else."""
    if result is None:
        return
    if hasattr(result, "__float__") or hasattr(result, "item"):  # a number, also of numpy or torch
        context.reward(result)
    elif isinstance(result, (list, tuple)) and all(isinstance(item, Span) for item in result):
        for span in result:
            context.add(span)
    else:
        raise TypeError(f"the agent returned {result!r}: expected a number (the reward), a list of Span, or None")
