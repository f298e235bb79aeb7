"""Backoffs of a store that runs: whoever waits is answered when one is over."""

from __future__ import annotations

import asyncio
import time

import raystore as rs
from tests.conftest import MakeMemoryStore
from tests.helpers import claim, present


def ruled(seconds: float) -> rs.RolloutConfig:
    """Errors of the agent are tried again after a delay."""
    rule = rs.RetryRule(max_retries=3, backoff_seconds=seconds, jitter=0)
    return rs.RolloutConfig(retry_rules={"agent_error": rule})


async def test_the_alarm_rings_when_a_backoff_is_over(make_memory_store: MakeMemoryStore) -> None:
    """A dequeue that waits is answered although nobody calls, and not before."""
    store = make_memory_store()
    claimed = await claim(store, retry_rules=ruled(0.3).retry_rules)
    for seconds in (0.3, 0.6):
        waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=20))
        await asyncio.sleep(0.05)
        started = time.monotonic()
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="failed")
        again = present(await waiting)
        assert again.rollout_id == claimed.rollout_id
        assert seconds <= time.monotonic() - started < 10
        claimed = again


async def test_a_backoff_that_is_ended_by_hand_answers_who_waits(make_memory_store: MakeMemoryStore) -> None:
    """At once."""
    store = make_memory_store()
    claimed = await claim(store, retry_rules=ruled(600).retry_rules)
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="failed")
    waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=20))
    await asyncio.sleep(0.05)
    await store.update_rollout(claimed.rollout_id, status="queuing")
    assert present(await asyncio.wait_for(waiting, 5)).rollout_id == claimed.rollout_id
