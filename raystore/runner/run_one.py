"""One call of an agent, without Ray and without a store: to debug it, or to try it in a notebook.

Not here: many of them (`pool`), with the same agent.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, TypeVar

from raystore.client.client import TO_PUBLISH
from raystore.errors import InvalidValueError
from raystore.errors.calls import explained
from raystore.runner import agents
from raystore.runner.context import ALONE, Context
from raystore.runner.life import Life
from raystore.runner.outbox import Outbox
from raystore.runner.told import add_note
from raystore.spans import Span, find_final_reward
from raystore.tracing.losses import Losses, Reason
from raystore.types import Attempt, AttemptedRollout, NamedResources, RolloutConfig
from raystore.wire.checks import validated

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of an agent left.

    Attributes:
        rollout: the made-up rollout that it ran for.
        spans: those that it emitted, numbered in the order in which they ended.
        reward: its final reward, None if it gave none.
        spans_lost: spans that were lost, and model calls that cannot be trained on, by reason, as in `statistics()`.
    """

    rollout: AttemptedRollout
    spans: list[Span]
    reward: float | None
    spans_lost: dict[Reason, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        names = ", ".join(span.name for span in self.spans)
        return f"<Run: reward {self.reward}, {len(self.spans)} spans: {names}>"


@explained
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

    Whatever the agent raises comes out as it was raised, with a note of the spans before it. All of the agent's life,
    from `__init__` to `close`, is in the calling thread; inside a running event loop (a notebook) it is in another one.
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
    outbox, losses = Outbox(lambda: None), Losses()
    given = validated("resources", NamedResources, {} if resources is None else resources, TO_PUBLISH)
    context = Context(rollout, given, ALONE, outbox.add, losses.add)
    story = f"A span of rollout {rollout_id} ended after run_one, and is lost"
    try:
        _here_or_beside(functools.partial(_run, agent, context))
    except Exception as error:
        add_note(error, f"spans recorded before: {', '.join(span.name for span in outbox.take()) or 'none'}")
        raise
    finally:
        context.leave()
    spans = outbox.close(lambda span: losses.add("too_late", "", story))
    outbox.tell(losses)
    for number, span in enumerate(spans, 1):
        span.sequence_id = number
    return Run(rollout, spans, find_final_reward(spans), losses.take())


def _run(agent: Any, context: Context) -> None:
    """The life of an agent, with one call; raises what the agent raised."""
    with Life(agent) as life:
        result, error = life.run(context)
        if error is None:
            agents.take_result(context, result)
    if error is not None:
        try:
            raise error
        finally:
            del error  # no cycle with its traceback


def _here_or_beside(function: Callable[[], None]) -> None:
    """Run a function in this thread; in another one if this one has a running event loop."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is None:  # outside of the handler, whose exception would be shown with the agent's
        function()
        return
    done: Future[None] = Future()

    def settle() -> None:
        try:
            function()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=[settle], name="raystore-run-one").start()
    done.result()
