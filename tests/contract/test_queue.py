"""Claims: order, queues, priorities, back-pressure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import raystore as rs
from raystore.types.contract import EnqueueRolloutRequest, RolloutConfig
from tests.helpers import AnyStore, claim, make_span, present, status_of


async def test_fifo(store: AnyStore) -> None:
    """First in, first out."""
    for i in range(5):
        await store.enqueue_rollout(i)
    assert [present(await store.dequeue_rollout()).input for _ in range(5)] == [0, 1, 2, 3, 4]
    assert await store.dequeue_rollout() is None


async def test_concurrent_claims_are_distinct(store: AnyStore) -> None:
    """30 concurrent claims of 20 rollouts: 20 distinct ones and 10 Nones."""
    for i in range(20):
        await store.enqueue_rollout(i)
    claimed = await asyncio.gather(*(store.dequeue_rollout() for _ in range(30)))
    got = [rollout.rollout_id for rollout in claimed if rollout is not None]
    assert len(got) == len(set(got)) == 20


async def test_a_claim_makes_an_attempt(store: AnyStore) -> None:
    """A claimed rollout is preparing with a preparing attempt; sequence ids count up."""
    rollout = await claim(store, worker_id="w", max_attempts=2, retry_condition=["failed"])
    assert (rollout.status, rollout.attempt.status, rollout.attempt.sequence_id) == ("preparing", "preparing", 1)
    assert rollout.attempt.worker_id == "w"
    await store.update_attempt(rollout.rollout_id, "latest", status="failed")
    again = present(await store.dequeue_rollout())
    assert (again.rollout_id, again.attempt.sequence_id) == (rollout.rollout_id, 2)
    assert again.attempt.attempt_id != rollout.attempt.attempt_id


async def test_dequeue_many(store: AnyStore) -> None:
    """Up to `limit`, in order, as a plain list; a limit of 0 gives none."""
    await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i) for i in range(3)])
    assert [r.input for r in await store.dequeue_many_rollouts(limit=2, worker_id="w")] == [0, 1]
    assert await store.dequeue_many_rollouts(limit=0) == []
    assert [r.input for r in await store.dequeue_many_rollouts(limit=9)] == [2]
    assert await store.dequeue_many_rollouts() == []


async def test_queues_are_tried_in_the_order_given(store: AnyStore) -> None:
    """A rollout waits in its own queue only."""
    await store.enqueue_rollout("d")
    await store.enqueue_rollout("s", queue="slow")
    assert present(await store.dequeue_rollout(queues=["slow", "default"])).input == "s"
    assert await store.dequeue_rollout(queues=["slow"]) is None
    assert present(await store.dequeue_rollout()).input == "d"


async def test_priority_comes_before_arrival(store: AnyStore) -> None:
    """A higher priority is claimed first; equal ones by arrival."""
    for name, priority in (("a", 0), ("b", 5), ("c", 5), ("d", -1)):
        await store.enqueue_rollout(name, priority=priority)
    assert [r.input for r in await store.dequeue_many_rollouts(limit=4)] == ["b", "c", "a", "d"]


async def test_retry_by_condition_goes_to_the_tail(store: AnyStore) -> None:
    """A failed attempt named by the retry condition queues its rollout behind the others."""
    config = RolloutConfig(max_attempts=2, retry_condition=["failed"])
    await store.enqueue_rollout("first", config=config)
    await store.enqueue_rollout("second")
    first = present(await store.dequeue_rollout())
    await store.update_attempt(first.rollout_id, "latest", status="failed")
    assert await status_of(store, first) == "requeuing"
    assert [r.input for r in await store.dequeue_many_rollouts(limit=2)] == ["second", "first"]


async def test_start_attempt_takes_the_rollout_out_of_line(store: AnyStore) -> None:
    """A rollout that somebody starts by hand is not handed out as well."""
    rollout = await store.enqueue_rollout("x")
    started = await store.start_attempt(rollout.rollout_id, worker_id="w")
    assert (started.status, started.attempt.sequence_id, started.attempt.worker_id) == ("preparing", 1, "w")
    assert await store.dequeue_rollout() is None
    await store.update_rollout(rollout.rollout_id, status="queuing")
    assert present(await store.dequeue_rollout()).attempt.sequence_id == 2
    assert await store.dequeue_rollout() is None


async def test_max_queued_refuses_as_a_whole(make_store: Callable[..., AnyStore]) -> None:
    """A full queue refuses with a time to try again, enqueues nothing, and never refuses a re-queue."""
    store = make_store(max_queued=3)
    first = await store.enqueue_rollout("x", config=RolloutConfig(max_attempts=2, retry_condition=["failed"]))
    await store.dequeue_rollout()
    await store.enqueue_group("y", 2)
    with pytest.raises(rs.OverloadedError, match="2 rollouts wait and max_queued is 3") as caught:
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i) for i in range(3)])
    await store.dequeue_many_rollouts(limit=2)
    assert caught.value.retry_after_seconds > 0
    with pytest.raises(rs.OverloadedError):  # more than one part, and none of them is taken
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i) for i in range(1500)])
    with pytest.raises(rs.OverloadedError, match="can never succeed"):
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i) for i in range(4)])
    assert (await store.statistics())["queue_length"] == 0
    await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=i) for i in range(3)])
    await store.update_attempt(first.rollout_id, "latest", status="failed")
    assert (await store.statistics())["queue_length"] == 4


async def test_long_poll_gets_work_when_it_comes(store: AnyStore) -> None:
    """A waiting claim is answered by the enqueue, longest waiting first; one that runs out of time gets None."""
    waiting = [asyncio.ensure_future(store.dequeue_rollout(f"w{i}", timeout=50)) for i in range(2)]
    await asyncio.sleep(0)
    for i in range(2):
        await store.enqueue_rollout(i)
    assert [present(await task).input for task in waiting] == [0, 1]
    late = asyncio.ensure_future(store.dequeue_rollout(timeout=5))
    await asyncio.sleep(0)
    await store.testing.tick(6)
    assert await late is None


async def test_long_poll_of_another_queue_is_not_answered(store: AnyStore) -> None:
    """A claim waits for its own queues only."""
    task = asyncio.ensure_future(store.dequeue_rollout(timeout=50, queues=["other"]))
    await asyncio.sleep(0)
    await store.enqueue_rollout("default")
    assert not task.done()
    await store.enqueue_rollout("wanted", queue="other")
    assert present(await task).input == "wanted"


@pytest.mark.parametrize("moment", ["while waiting", "in the instant of the answer"])
async def test_a_cancelled_claim_loses_nothing(store: AnyStore, moment: str) -> None:
    """A caller that stops waiting gives the rollout back at its old place, and its attempt was never there."""
    waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=50))
    await asyncio.sleep(0)
    if moment == "while waiting":
        waiting.cancel()
        await asyncio.sleep(0)
    first = asyncio.ensure_future(store.enqueue_rollout("first"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    rollout = await first
    await store.enqueue_rollout("second")
    got = await asyncio.gather(store.dequeue_rollout(timeout=20), store.dequeue_rollout(timeout=20))
    assert sorted(present(r).input for r in got) == ["first", "second"]
    assert [a.sequence_id for a in await store.query_attempts(rollout.rollout_id)] == [1]


async def test_rollout_requeued_by_hand_can_be_stopped_by_a_span(store: AnyStore) -> None:
    """A span of the running attempt of a rollout that was queued by hand takes it out of line."""
    rollout = await claim(store)
    await store.update_rollout(rollout.rollout_id, status="queuing")
    await store.add_span(make_span(rollout))
    assert await status_of(store, rollout) == "running"
    assert await store.dequeue_rollout() is None


@pytest.mark.parametrize("timeout", [-1, float("nan"), "soon"])
async def test_a_bad_timeout_is_refused(store: AnyStore, timeout: Any) -> None:
    """Claims cannot wait for a negative time, or NaN."""
    with pytest.raises(ValueError, match="timeout"):
        await store.dequeue_rollout(timeout=timeout)


async def test_priority_and_queue_are_kept_by_a_retry(store: AnyStore) -> None:
    """A retry waits in the queue and with the priority of its rollout."""
    config = RolloutConfig(max_attempts=2, retry_condition=["failed"])
    await store.enqueue_rollout("x", config=config, queue="q", priority=2)
    await store.enqueue_rollout("y", queue="q", priority=1)
    claimed = present(await store.dequeue_rollout(queues=["q"]))
    await store.update_attempt(claimed.rollout_id, "latest", status="failed")
    assert present(await store.dequeue_rollout(queues=["q"])).input == "x"
