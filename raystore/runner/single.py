"""One call of an agent, without Ray and without a store: to debug it, or to try it in a notebook.

Not here: many of them (`pool`), with the same agent.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, TypeVar

from raystore.convert import validated
from raystore.errors import InvalidValueError
from raystore.runner import agents
from raystore.runner.context import Context
from raystore.spans import Span, find_final_reward
from raystore.types import Attempt, AttemptedRollout, NamedResources, RolloutConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of an agent left.

    Attributes:
        rollout: the made-up rollout that it ran for.
        spans: those that it emitted, numbered in the order in which they ended.
        reward: its final reward, None if it gave none.
    """

    rollout: AttemptedRollout
    spans: list[Span]
    reward: float | None

    def __repr__(self) -> str:
        names = ", ".join(span.name for span in self.spans)
        return f"<Run: reward {self.reward}, {len(self.spans)} spans: {names}>"


def run_one(
    agent: Any,
    task: Any,
    resources: Mapping[str, Any] | None = None,
    *,
    policy_version: int | None = None,
) -> Run:
    """Run an agent on one task in this thread, as a runner would, and return its spans and reward.

    Args:
        agent: what `RunnerPool` takes: a function, a coroutine function, or a class with `__call__`.
        task: the rollout's input.
        resources: by name, for `ctx.resources`: what `update_resources` takes.
        policy_version: for `ctx.policy_version`.

    Whatever the agent raises comes out as it was raised, with a note of the spans before it. Inside a running event
    loop (a notebook) the agent runs in another thread.
    """
    if (expected := agents.check(agent)) is not None:
        raise InvalidValueError("agent", agent, expected)
    now = time.time()
    rollout_id, attempt_id = f"ro-{token_hex(6)}", f"at-{token_hex(4)}"
    attempt = Attempt(
        rollout_id=rollout_id, attempt_id=attempt_id, sequence_id=1, start_time=now, policy_version=policy_version
    )
    rollout = AttemptedRollout(
        rollout_id=rollout_id, input=task, start_time=now, config=RolloutConfig(), status="preparing", attempt=attempt
    )
    spans: list[Span] = []
    context = Context(rollout, validated(NamedResources, dict(resources or {})), "run_one", spans.append)
    try:
        _drive(_call(agent, context))
    except Exception as error:
        error.add_note(f"raystore: spans recorded before: {', '.join(span.name for span in spans) or 'none'}")
        raise
    for number, span in enumerate(spans, 1):
        span.sequence_id = number
    return Run(rollout, spans, find_final_reward(spans))


async def _call(agent: Any, context: Context) -> None:
    loaded = await agents.load(agent)
    try:
        with context.active():
            result = loaded.call(context.rollout.input, context)
            agents.take_result(context, await result if loaded.is_async else result)
    finally:
        await loaded.close()


def _drive(coroutine: Any) -> None:
    """Run to the end here; in another thread if this one has a running event loop."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is None:  # outside of the handler, whose exception would be shown with the agent's
        asyncio.run(coroutine)
        return
    done: Future[None] = Future()

    def drive() -> None:
        try:
            done.set_result(asyncio.run(coroutine))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=[drive], name="raystore-run-one").start()
    done.result()
