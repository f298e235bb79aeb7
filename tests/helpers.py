"""Words of the tests: make a span, claim and finish, wait for a condition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

import raystore as rs
from raystore.types.contract import AttemptedRollout, RolloutConfig, Span

#: For tests of what is the same code on both stores: on Ray, where a runner takes a second to start, in the long form.
mostly_in_memory = pytest.mark.parametrize(
    "store", ["memory", pytest.param("ray", marks=pytest.mark.long)], indirect=True
)

#: With its defaults Ray takes a node for dead after 15 s of silence.
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}  # fmt: skip


AnyStore = rs.InMemoryLightningStore | rs.RayLightningStore
Answer = TypeVar("Answer")


def present(answer: Answer | None) -> Answer:
    """An answer of the store that must not be None."""
    assert answer is not None
    return answer


def make_span(rollout: Any, sequence_id: int = 1, *, attempt_id: str | None = None, **more: Any) -> Span:
    """A span of a rollout's attempt; `rollout` is an AttemptedRollout, or a rollout id with `attempt_id`."""
    rollout_id = rollout if isinstance(rollout, str) else rollout.rollout_id
    if attempt_id is None:
        attempt_id = rollout.attempt.attempt_id
    return Span.from_attributes(
        attributes=more.pop("attributes", {"k": "v"}),
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=sequence_id,
        **more,
    )


async def claim(store: AnyStore, *, worker_id: str | None = None, **config: Any) -> AttemptedRollout:
    """A rollout that was enqueued and claimed; keywords make its configuration."""
    await store.enqueue_rollout("task", config=RolloutConfig(**config) if config else None)
    return present(await store.dequeue_rollout(worker_id))


async def status_of(store: AnyStore, rollout: Any) -> str:
    """The status of a rollout now."""
    found = await store.get_rollout_by_id(rollout if isinstance(rollout, str) else rollout.rollout_id)
    return str(found.status)


async def until(condition: Callable[[], Awaitable[Any]], *, within: float = 20.0) -> Any:
    """Wait until a condition holds, and return what it gave."""
    deadline = time.monotonic() + within
    while True:
        if value := await condition():
            return value
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)
