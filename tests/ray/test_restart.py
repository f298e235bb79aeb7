"""A store with a journal whose process is killed: it comes back as it was, and its clients ride through."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.service.service import PROTOCOL
from raystore.wire import frames
from tests.conftest import MakeRayStore
from tests.helpers import make_span, until


async def process_of(store: Any) -> Any:
    """The process that the store's actor is now."""
    return (await store.actor.describe.remote())["pid"]


async def kill(store: Any) -> None:
    """End the store's process as the kernel would when memory runs out."""
    os.kill(await process_of(store), signal.SIGKILL)


@pytest.fixture
def make_durable(make_ray_store: MakeRayStore, tmp_path: Path) -> Callable[..., Any]:
    """Makes stores with a journal."""
    return lambda **options: make_ray_store(**{"journal": tmp_path / "journal", **options})


async def test_clients_ride_through_the_death_of_the_store(make_durable: Callable[..., Any]) -> None:
    """Calls, parked claims and waits of before, and claims that were acknowledged: nothing is lost, nobody is told."""
    store = make_durable()
    first = await store.enqueue_rollout("first")
    running = await store.dequeue_rollout("w")
    await store.add_span(make_span(running))
    finished = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[first.rollout_id], timeout=60))
    parked = asyncio.ensure_future(store.dequeue_rollout(queues=("other",), timeout=60))
    await until(lambda: _waiters(store, 2))
    before = store.info.epoch
    await kill(store)
    second = await store.enqueue_rollout("second", queue="other")
    assert (await parked).rollout_id == second.rollout_id
    await store.update_attempt(first.rollout_id, running.attempt.attempt_id, status="succeeded")
    (done,) = await finished
    assert done.status == "succeeded"
    assert len(await store.query_spans(first.rollout_id)) == 1
    assert (await store.actor.describe.remote())["epoch"] == before + 1
    assert (await store.statistics())["total_attempts"] == 2


async def test_a_trainer_rides_through_the_death_of_the_store(make_durable: Callable[..., Any]) -> None:
    """A take that waits, and a batch that is held; a long one comes in parts, whichever process sends them."""
    store = make_durable()
    held = [await store.start_rollout("x" * 60_000) for _ in range(40)]
    for rollout in held:
        await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    batch = await store.take(100, consumer="t")
    assert [r.rollout_id for r in batch.rollouts] == [r.rollout_id for r in held]
    later = await store.start_rollout("later")
    waiting = asyncio.ensure_future(store.take(2, consumer="t", timeout=60, max_open=2))
    await until(lambda: _waiters(store, 1))
    await kill(store)
    await store.update_attempt(later.rollout_id, "latest", status="succeeded")
    second = await waiting
    assert [r.rollout_id for r in second.rollouts] == [later.rollout_id]
    with pytest.raises(rs.BatchHeldError, match="this process"):
        await store.take(1, consumer="t", max_open=2)
    await store.ack(batch, step=1)
    await store.nack(second)
    assert [r.rollout_id for r in (await store.take(1, consumer="t")).rollouts] == [later.rollout_id]


async def test_what_was_saved_is_there_after_the_death_of_the_store(make_durable: Callable[..., Any]) -> None:
    """The store is killed as soon as `save_state` has returned, over and over; the newest state and its spans stay."""
    store = make_durable()
    await store.enqueue_rollout("long")
    running = await store.dequeue_rollout("w")
    ids = running.rollout_id, running.attempt.attempt_id
    for turn in range(4):
        size = 10 if turn % 2 else 300_000
        await store.save_state(*ids, [turn, "x" * size], [make_span(running, 0, name=f"turn {turn}")])
        await kill(store)
    await store.finish_attempt(*ids, [], "unresponsive", outcome="withdrawn")
    following = await store.dequeue_rollout("w")
    assert following.attempt.resumed_from == running.attempt.attempt_id
    state = await store.get_saved_state(running.rollout_id, following.attempt.attempt_id)
    assert state == [3, "x" * 10]
    spans = await store.query_spans(running.rollout_id, "latest")
    assert [span.name for span in spans] == [f"turn {turn}" for turn in range(4)]


async def _waiters(store: Any, count: int) -> Any:
    return (await store.statistics())["waiters"] == count


async def test_a_batch_that_comes_again_after_a_restart_has_not_run_twice(make_durable: Callable[..., Any]) -> None:
    """The answer is the one it had: ids, claims and refusals; reads run again; what had not run runs now."""
    store = make_durable()
    handle = store.actor
    request = {"input": b"\x01\xa1x", "metadata": None}
    operations: list[tuple[str, dict[str, Any]]] = [
        ("enqueue", {"requests": [request, request]}),
        ("dequeue", {"queues": ["default"], "limit": 1, "worker_id": "w", "timeout": 0.0}),
        ("update_rollout", {"rollout_id": "ro-unknown", "changes": {}}),
        ("statistics", {}),
    ]
    packed = [frames.pack_operation(*operation) for operation in operations]

    async def send() -> Any:
        epoch = (await handle.describe.remote())["epoch"]
        parts = frames.join([PROTOCOL, "test", "session", 1, 0, [], 1, [], []], packed)
        answered, outcome, replies, *_ = frames.unpack_answer(await handle.exchange.remote(*parts))
        assert (answered, outcome) == (epoch, frames.DONE)
        return replies

    enqueued, claimed, refused, counted = await send()
    await kill(store)
    await until(lambda: _answers(handle))
    again = await send()
    assert again[:3] == [enqueued, claimed, refused]
    assert refused[0] == frames.ERROR
    assert again[3][1]["total_rollouts"] == counted[1]["total_rollouts"] == 2
    assert (await store.statistics())["total_attempts"] == 1
    # Nobody acknowledges the claim, so that it is withdrawn.
    await until(lambda: _queued(store, 2), within=15)


async def _answers(handle: Any) -> Any:
    try:
        return await handle.describe.remote()
    except ray.exceptions.ActorUnavailableError:
        return False


async def _queued(store: Any, count: int) -> Any:
    return (await store.statistics())["queue_length"] == count


async def test_a_store_whose_journal_is_gone_does_not_come_back_empty(
    make_durable: Callable[..., Any], tmp_path: Path
) -> None:
    """Its clients get an error that says so."""
    store = make_durable()
    await store.enqueue_rollout("x")
    shutil.move(tmp_path / "journal", tmp_path / "elsewhere")
    await kill(store)
    with pytest.raises(rs.JournalMissingError, match="restarted"):
        await store.enqueue_rollout("y")
    store.close()


async def test_a_second_store_takes_over_only_when_told_to(make_durable: Callable[..., Any], tmp_path: Path) -> None:
    """Two processes that write one journal: the newer one has all that the older one acknowledged, which then ends."""
    store = make_durable(name="first")
    await store.enqueue_rollout("x")
    with pytest.raises(rs.JournalInUseError, match="running store"):
        make_durable(name="first-again")
    pid = await process_of(store)
    taken = make_durable(name="second", resume="must")
    assert (await taken.statistics())["total_rollouts"] == 1
    started = time.monotonic()
    await until(lambda: _has_ended(pid), within=4)
    assert time.monotonic() - started < 4
    with pytest.raises(
        rs.FencedError, match="newer writer"
    ):  # Ray starts the older one again, which must not come back
        await store.enqueue_rollout("z")
    assert (await taken.enqueue_rollout("y")).status == "queuing"
    assert (await taken.statistics())["total_rollouts"] == 2
    store.close()


async def _has_ended(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
