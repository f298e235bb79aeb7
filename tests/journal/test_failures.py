"""When something goes wrong: nobody waits for ever, no claim stays with nobody, and a broken core says so."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core.verbs import STEPS
from tests.helpers import present, until
from tests.journal.peers import Peer, Store, enqueue


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every commit takes a moment."""
    before = os.fdatasync

    def slowly(fd: Any) -> None:
        time.sleep(0.2)
        before(fd)

    monkeypatch.setattr(os, "fdatasync", slowly)


@pytest.mark.parametrize("timeout", [0.0, 30.0])
async def test_a_dequeue_that_is_cancelled_while_it_waits_for_the_disk_gives_its_claim_back(
    path: Path, slow_disk: None, timeout: float
) -> None:
    """Its caller never had it."""
    with rs.InMemoryLightningStore(journal=path) as store:
        made = await store.enqueue_rollout("x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.dequeue_rollout("w", timeout=timeout), 0.05)
        claimed = present(await store.dequeue_rollout("w", timeout=5))
        assert claimed.rollout_id == made.rollout_id
        assert claimed.attempt.sequence_id == 1
        await store.check()


async def test_a_parked_dequeue_that_is_cancelled_while_it_waits_for_the_disk_gives_its_claim_back(
    path: Path, slow_disk: None
) -> None:
    """The same for one that was handed its work while it waited."""
    with rs.InMemoryLightningStore(journal=path) as store:
        waiting = asyncio.ensure_future(store.dequeue_rollout("w", timeout=30))
        await asyncio.sleep(0.01)
        enqueuing = asyncio.ensure_future(store.enqueue_rollout("x"))
        await asyncio.sleep(0.05)  # handed over, and not on disk yet
        waiting.cancel()
        made = await enqueuing
        assert present(await store.dequeue_rollout("w", timeout=5)).rollout_id == made.rollout_id
        await store.check()


async def test_calls_after_the_end_are_told_so(path: Path) -> None:
    """Also when time has brought something since."""
    store = rs.InMemoryLightningStore(journal=path)
    rollout = await store.start_rollout("x", config=rs.RolloutConfig(timeout_seconds=0.1))
    store.close()
    await asyncio.sleep(1.3)
    for call in (store.statistics(), store.enqueue_rollout("y"), store.update_attempt(rollout.rollout_id, "latest")):
        with pytest.raises(rs.StoreClosedError):
            await asyncio.wait_for(call, 5)


async def test_those_who_wait_are_told_when_the_disk_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that cannot be made durable is never acknowledged, and nothing is after it."""
    store = rs.InMemoryLightningStore(journal=path)
    rollout = await store.enqueue_rollout("x")
    waiting = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60))
    await asyncio.sleep(0.01)

    def fail(fd: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(rs.JournalFailedError, match="the disk is gone"):
        await asyncio.wait_for(store.enqueue_rollout("y"), 5)
    with pytest.raises(rs.JournalFailedError):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(rs.JournalFailedError):
        await asyncio.wait_for(store.enqueue_rollout("z"), 5)
    monkeypatch.undo()
    store.close()
    assert rs.recover(path).sync.get_rollout_by_id(rollout.rollout_id).input == "x"


async def test_a_writer_that_failed_before_its_store_was_used_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one has begun meanwhile: the first call is told."""
    store = rs.InMemoryLightningStore(journal=path)
    writer = present(store._service._recorder).writer
    newer = rs.InMemoryLightningStore(journal=path, resume="must")

    async def has_failed() -> rs.StoreError | None:
        return writer.failure

    await until(has_failed)
    told: list[rs.StoreError] = []
    writer.when_failed(told.append)
    assert isinstance(told[0], rs.FencedError)
    with pytest.raises(rs.FencedError):
        await asyncio.wait_for(store.enqueue_rollout("x"), 5)
    newer.close()
    store.close()


@pytest.mark.parametrize("durability", ["power", "none"])
async def test_a_step_that_fails_ends_the_process(path: Path, monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    """What has half happened has no record: nobody goes on from it, whoever asked for the step, a read included."""
    ended: list[rs.StoreError] = []
    store, peer = Store(path, durability=durability), Peer("p")
    store.service.on_failure = ended.append
    await peer.send(store, peer.batch(enqueue("x", config=[1.0, None, 1, []])))
    await peer.call(store, "dequeue", queues=["default"], limit=1, worker_id=None, timeout=0.0)
    store.tick(5)

    def fail(state: Any, step: Any, *due: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(STEPS, "advance", fail)
    reply = await peer.call(store, "get_latest_resources")
    assert reply[1] == "StoreCorruptError"

    async def has_ended() -> list[Any]:
        return ended

    await until(has_ended)
    assert isinstance(ended[0], rs.StoreCorruptError)


async def test_a_recovered_run_does_not_wait(path: Path) -> None:
    """Nothing will ever change in it."""
    with rs.InMemoryLightningStore(journal=path) as store:
        rollout = await store.enqueue_rollout("x")
    with rs.recover(path) as run:
        assert await asyncio.wait_for(run.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60), 5) == []
        assert (await asyncio.wait_for(run.completed(timeout=60), 5)).items == []


async def test_retention_lets_a_released_rollout_be_that_a_consumer_holds(path: Path) -> None:
    """Released before it was taken, or after: it goes once the model is durable."""
    for first in ("release", "take"):
        with rs.InMemoryLightningStore(journal=path / first, clock="manual", retention=10) as store:
            rollout = await store.start_rollout("x")
            await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
            if first == "release":
                await store.release([rollout.rollout_id])
            batch = await store.take(1, consumer="c")
            await store.release([rollout.rollout_id])
            await store.testing.tick(20)
            assert await store.get_rollout_by_id(rollout.rollout_id) is not None
            await store.ack(batch, step=1)
            await store.checkpoint("c", 1)
            await store.testing.tick(1)
            assert await store.get_rollout_by_id(rollout.rollout_id) is None
