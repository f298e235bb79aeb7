"""One call of an agent, without Ray and without a store: to debug it, or to try it in a notebook."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from raystore.client.client import TO_PUBLISH
from raystore.errors import InvalidValueError
from raystore.errors.text import add_note, explained
from raystore.runner import agents
from raystore.runner.agents import Agent
from raystore.runner.context import ALONE, Context, Outbox
from raystore.runner.life import Life
from raystore.spans import Span, find_final_reward
from raystore.tracing.losses import Losses, Reason
from raystore.types import Attempt, AttemptedRollout, NamedResources, RolloutConfig
from raystore.wire.checks import validated


@dataclass(frozen=True, slots=True)
class Run:
    """The record of one call of an agent.

    Attributes:
        rollout: the rollout that was made up for the call.
        spans: those that the agent recorded, numbered in the order in which they ended.
        reward: the final reward, or None.
        spans_lost: how many spans were lost, and model calls cannot be trained on, by reason, as in `statistics()`.
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
    agent: Agent, task: Any, resources: Mapping[str, Any] | None = None, *, policy_version: int | None = None
) -> Run:
    """Run an agent on one task in this thread, as a runner would, and return its spans and reward.

    Args:
        agent: as for `RunnerPool`: a function, a coroutine function, or a class with `__call__`.
        task: the rollout's input.
        resources: by name, for `ctx.resources`, as for `update_resources`.
        policy_version: for `ctx.policy_version`.

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
    context = Context(rollout, given, ALONE, outbox.add, losses.add)
    too_late = f"A span of rollout {rollout_id} ended after run_one, and is lost"
    try:
        if asyncio._get_running_loop() is None:
            _run(agent, context)
        else:
            thread = ThreadPoolExecutor(1, "raystore-run-one")  # `with` would wait for the agent after a Ctrl+C
            thread.submit(contextvars.copy_context().run, _run, agent, context).result()
    except Exception as error:
        add_note(error, f"spans recorded before: {', '.join(span.name for span in outbox.take()) or 'none'}")
        raise
    finally:
        context.leave()
    spans = outbox.close(lambda span: losses.add("too_late", "", too_late))
    for number, span in enumerate(spans, 1):
        span.sequence_id = number
    return Run(rollout, spans, find_final_reward(spans), losses.take())


def _run(agent: Agent, context: Context) -> None:
    """Make an agent, call it once and close it; raises the agent's own errors."""
    with Life(agent) as life:
        result, error = life.run(context)
        if error is None:
            agents.take_result(context, result)
    if error is not None:
        try:
            raise error
        finally:
            del error  # no cycle with its traceback
