"""A task that calls a store in this process over and over lets the other tasks of its event loop run."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.client import transport
from tests.conftest import MakeMemoryStore
from tests.helpers import make_span, present

Loop = Callable[[Any, rs.AttemptedRollout, int], Awaitable[Any]]

LOOPS: dict[str, Loop] = {
    "read": lambda store, mine, n: store.get_rollout_by_id(mine.rollout_id),
    "read of many": lambda store, mine, n: store.query_rollouts(),
    "write": lambda store, mine, n: store.enqueue_rollout(n),
    "span": lambda store, mine, n: store.add_span(make_span(mine, n)),
    "spans": lambda store, mine, n: store.add_many_spans([make_span(mine, 600 * n + i) for i in range(600)]),
    "bulk": lambda store, mine, n: store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=n)] * 600),
    "dequeue": lambda store, mine, n: store.dequeue_rollout(),
    "dequeue that might wait": lambda store, mine, n: store.dequeue_rollout(timeout=60, queues=["full"]),
    "wait": lambda store, mine, n: store.wait_for_rollouts(rollout_ids=[], timeout=60),
    "refused": lambda store, mine, n: refused(store.update_rollout("nobody")),
}


async def refused(call: Awaitable[Any]) -> None:
    """A call that the store refuses."""
    with pytest.raises(rs.RolloutNotFoundError):
        await call


@pytest.mark.parametrize(("name", "has_journal"), [*((name, False) for name in LOOPS), ("read", True)])
async def test_a_loop_of_calls_lets_other_tasks_run(
    make_memory_store: MakeMemoryStore, tmp_path: Path, name: str, has_journal: bool
) -> None:
    """They wait no longer than a turn, or a call that is longer."""
    store = make_memory_store(journal=str(tmp_path) if has_journal else None)
    mine = await store.start_rollout("mine")
    enough = 20_000 if name == "dequeue that might wait" else 1_000
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=1, queue="full")] * enough)
    turns = itertools.count()

    async def neighbour() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    beside = asyncio.create_task(neighbour())
    began, calls = time.thread_time(), 0  # of the processor: a busy machine gives a thread few long stretches of time
    while time.thread_time() - began < 20 * transport.TURN_SECONDS:
        await LOOPS[name](store, mine, calls)
        calls += 1
    beside.cancel()
    assert next(turns) >= min(calls, 5)


@pytest.mark.parametrize("name", ["read", "write", "span", "refused"])
async def test_other_tasks_run_after_each_call_that_is_longer_than_a_turn(
    make_memory_store: MakeMemoryStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They do not wait for the next long one as well."""
    store = make_memory_store()
    mine = await store.start_rollout("mine")
    call = store._service.call
    turns = itertools.count()

    def take_long(*arguments: Any) -> Any:
        time.sleep(2 * transport.TURN_SECONDS)
        return call(*arguments)

    async def neighbour() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    beside = asyncio.create_task(neighbour())
    with monkeypatch.context() as patch:
        patch.setattr(store._service, "call", take_long)
        for number in range(6):
            await LOOPS[name](store, mine, number)
    beside.cancel()
    assert next(turns) >= 6


@pytest.fixture
def gives_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call lets the other tasks run."""
    monkeypatch.setattr(transport, "TURN_SECONDS", -1.0)
    transport.this_thread.turn_ends = 0.0


async def test_claims_of_a_call_that_is_cancelled_in_between_go_back(
    make_memory_store: MakeMemoryStore, gives_way_at_once: None
) -> None:
    """To their old places, and nothing else is lost or done twice."""
    store = make_memory_store()
    made = [await store.enqueue_rollout(n) for n in range(5)]
    for _ in range(3):
        claiming = asyncio.create_task(store.dequeue_many_rollouts(limit=3))
        await asyncio.sleep(0)  # it has claimed, and lets us run before it has the answer
        assert len(store.sync.query_rollouts(status_in=["queuing", "requeuing"])) == 2
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
    claimed = await store.dequeue_many_rollouts(limit=9)
    assert [one.rollout_id for one in claimed] == [one.rollout_id for one in made]
    assert [one.attempt.sequence_id for one in claimed] == [1] * 5


async def test_a_batch_of_a_call_that_is_cancelled_in_between_goes_back(
    make_memory_store: MakeMemoryStore, gives_way_at_once: None
) -> None:
    """It comes to the next take."""
    store = make_memory_store()
    done = await store.start_rollout(1)
    await store.update_attempt(done.rollout_id, "latest", status="succeeded")
    taking = asyncio.create_task(store.take(1, consumer="trainer"))
    await asyncio.sleep(0)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    batch = await store.take(1, consumer="trainer")
    assert [one.rollout_id for one in batch.rollouts] == [done.rollout_id]


async def test_calls_take_effect_in_the_order_in_which_they_were_issued(
    make_memory_store: MakeMemoryStore, gives_way_at_once: None
) -> None:
    """Also when they are awaited together and let each other run."""
    store = make_memory_store()
    made = await asyncio.gather(*(store.enqueue_rollout(n) for n in range(9)))
    assert [one.rollout_id for one in await store.query_rollouts()] == [one.rollout_id for one in made]
    assert [one.input for one in made] == list(range(9))
    assert present(store.sync.dequeue_rollout()).input == 0  # what blocks does not give way
