"""Time: attempts that time out or fall silent, also when nobody calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from raystore.types.contract import RolloutConfig
from tests.helpers import AnyStore, claim, make_span, present, status_of

RETRY: dict[str, Any] = {"max_attempts": 2, "retry_condition": ["timeout", "unresponsive"]}


async def latest(store: AnyStore, rollout: rs.AttemptedRollout) -> rs.Attempt:
    return present(await store.get_latest_attempt(rollout.rollout_id))


async def test_timeout_counts_from_the_start_of_the_attempt(store: AnyStore) -> None:
    """Strictly more than timeout_seconds after its start an attempt has timed out, heartbeats or not."""
    rollout = await claim(store, worker_id="w", timeout_seconds=10)
    store.testing.tick(6)
    await store.add_span(make_span(rollout))
    store.testing.tick(4)
    assert (await latest(store, rollout)).status == "running"
    store.testing.tick(0.5)
    attempt = await latest(store, rollout)
    assert (attempt.status, attempt.outcome, attempt.end_time) == ("timeout", "timeout", None)
    assert await status_of(store, rollout) == "failed"
    assert present(await store.get_worker_by_id("w")).status == "unknown"


async def test_silence_counts_from_the_last_heartbeat(store: AnyStore) -> None:
    """A span or an explicit heartbeat moves the deadline; without any it counts from the start."""
    rollout = await claim(store, unresponsive_seconds=5)
    store.testing.tick(4)
    await store.add_span(make_span(rollout))
    store.testing.tick(4)
    now = rollout.attempt.start_time + 8
    await store.update_attempt(rollout.rollout_id, "latest", last_heartbeat_time=now)
    store.testing.tick(5)
    assert (await latest(store, rollout)).status == "running"
    store.testing.tick(0.5)
    assert (await latest(store, rollout)).status == "unresponsive"
    silent = await claim(store, unresponsive_seconds=5)
    store.testing.tick(5.5)
    assert (await latest(store, silent)).status == "unresponsive"


async def test_a_runners_heartbeat_says_that_its_agent_is_at_work(store: AnyStore) -> None:
    """A claimed rollout is running from then on, with its attempt; nothing that ended or waits comes back by it."""
    rollout = await claim(store, unresponsive_seconds=5, **RETRY)
    key = (rollout.rollout_id, rollout.attempt.attempt_id)
    store.testing.tick(4)
    assert await store.heartbeat([key]) == []
    attempt = await latest(store, rollout)
    assert (attempt.status, attempt.last_heartbeat_time) == ("running", rollout.attempt.start_time + 4)
    assert await status_of(store, rollout) == "running"
    store.testing.tick(5.5)
    assert await store.heartbeat([key]) == []
    assert ((await latest(store, rollout)).status, await status_of(store, rollout)) == ("unresponsive", "requeuing")
    again = present(await store.dequeue_rollout())
    assert await store.heartbeat([key]) == [key]
    assert await status_of(store, again) == "preparing"
    await store.update_rollout(again.rollout_id, status="succeeded")
    assert await store.heartbeat([(again.rollout_id, again.attempt.attempt_id)]) != []
    assert await status_of(store, again) == "succeeded"


async def test_retries_after_timeouts(store: AnyStore) -> None:
    """A timed-out attempt is retried if the condition says so, and its clock starts anew."""
    rollout = await claim(store, timeout_seconds=5, **RETRY)
    store.testing.tick(6)
    assert await status_of(store, rollout) == "requeuing"
    again = present(await store.dequeue_rollout())
    store.testing.tick(4)
    assert again.attempt.sequence_id == 2 and await status_of(store, rollout) == "preparing"
    store.testing.tick(2)
    assert await status_of(store, rollout) == "failed"


async def test_time_passes_before_a_claim(store: AnyStore) -> None:
    """A dequeue sees what has become due before it."""
    rollout = await claim(store, timeout_seconds=5, **RETRY)
    store.testing.tick(6)
    assert present(await store.dequeue_rollout()).rollout_id == rollout.rollout_id


async def test_a_queued_rollout_never_times_out(store: AnyStore) -> None:
    """Only attempts have clocks."""
    rollout = await store.enqueue_rollout("x", config=RolloutConfig(timeout_seconds=1, unresponsive_seconds=1))
    store.testing.tick(100)
    assert await status_of(store, rollout) == "queuing"


async def test_old_attempts_are_not_watched(store: AnyStore) -> None:
    """Only the latest attempt of a rollout can time out."""
    rollout = await claim(store, timeout_seconds=5)
    store.testing.tick(3)
    await store.start_attempt(rollout.rollout_id)
    store.testing.tick(3)
    old, new = await store.query_attempts(rollout.rollout_id)
    assert (old.status, new.status) == ("preparing", "preparing")
    assert await status_of(store, rollout) == "preparing"


async def test_changed_config_moves_the_deadline(store: AnyStore) -> None:
    """A shorter timeout counts at once."""
    rollout = await claim(store, timeout_seconds=100)
    store.testing.tick(10)
    await store.update_rollout(rollout.rollout_id, config=RolloutConfig(timeout_seconds=5))
    assert await status_of(store, rollout) == "failed"


async def test_older_heartbeat_moves_the_deadline_earlier(store: AnyStore) -> None:
    """A heartbeat time is stored as given; an older one may be past the limit at once, a future one counts as now."""
    rollout = await claim(store, unresponsive_seconds=5)
    start = rollout.attempt.start_time
    store.testing.tick(3)
    future = await store.update_attempt(rollout.rollout_id, "latest", last_heartbeat_time=start + 1000)
    assert future.last_heartbeat_time == start + 1000
    store.testing.tick(6)
    assert (await latest(store, rollout)).status == "unresponsive"
    other = await claim(store, unresponsive_seconds=5)
    await store.update_attempt(other.rollout_id, "latest", last_heartbeat_time=other.attempt.start_time - 60)
    assert (await latest(store, other)).status == "unresponsive"


async def test_waiters_wake_when_time_is_up_for_an_attempt(store: AnyStore) -> None:
    """A wait ends with the timeout of the attempt it waits for, although nobody else calls."""
    rollout = await claim(store, timeout_seconds=5)
    import asyncio

    task = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
    await asyncio.sleep(0)
    await store.testing.tick(6)
    assert [r.status for r in await task] == ["failed"]


async def test_many_due_at_once(store: AnyStore) -> None:
    """More deadlines than one slice: a verb settles the rollouts it names, and all are settled soon."""
    config = RolloutConfig(timeout_seconds=5)
    made = [r for _ in range(3) for r in await store.enqueue_group("x", 500, config=config)]
    await store.dequeue_many_rollouts(limit=1500)
    store.testing.tick(6)
    assert await status_of(store, made[-1]) == "failed"
    for _ in range(3):
        counts = (await store.statistics())["rollouts_by_status"]
    assert counts == {"failed": 1500}


async def test_the_system_clock_cannot_be_moved(make_store: Callable[..., AnyStore]) -> None:
    """Only a manual clock ticks."""
    store = make_store(clock="system")
    with pytest.raises(ValueError, match="clock='manual'"):
        await store.testing.tick(1)
