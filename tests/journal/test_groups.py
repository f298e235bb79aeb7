"""Groups over restarts and kills of their store: places, deadlines, batches, and what a trainer has consumed."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.core.check import check
from raystore.journal.compaction import compact
from raystore.journal.files import Directory
from tests.helpers import present
from tests.journal.peers import Peer, Store, request
from tests.journal.test_resume import assert_same


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal"


def open_store(path: Any, **options: Any) -> rs.InMemoryLightningStore:
    return rs.InMemoryLightningStore(journal=path, clock="manual", **options)


def finish(store: rs.InMemoryLightningStore, group_id: str, count: int, status: rs.RolloutStatus = "succeeded") -> None:
    """End the first members of a group that have not ended."""
    left = [r for r in store.sync.query_rollouts(group_id=group_id) if r.status == "queuing"]
    for rollout in left[:count]:
        store.sync.update_rollout(rollout.rollout_id, status=status)


async def tick(store: rs.InMemoryLightningStore, seconds: float) -> None:
    await store.testing.tick(seconds)


def ids(batch: rs.GroupBatch) -> list[str]:
    return [group.group_id for group in batch.groups]


@pytest.mark.parametrize("with_snapshot", [False, True], ids=["records", "snapshot"])
def test_groups_go_on_after_a_restart(path: Path, with_snapshot: bool) -> None:
    """Open ones with places, allowances and deadlines; complete ones for whoever awaits them; batches as they were."""
    with open_store(path) as store:
        for number in range(4):
            store.sync.enqueue_group(
                number, 3, group_id=f"g{number}", replace=1, min_size=2, deadline_seconds=50, spare=1
            )
            finish(store, f"g{number}", 1, "failed")  # the spare takes over
            finish(store, f"g{number}", 1 if number == 3 else 3)
        store.sync.ack(store.sync.take_groups(1, consumer="t"), step=1)
        store.sync.checkpoint("t", 1)
        store.sync.ack(store.sync.take_groups(1, consumer="t"), step=2)
        held = store.sync.take_groups(1, consumer="t")
        assert ids(held) == ["g2"]
        state = store._service.state
        check(state)
    assert_same(state, path)
    if with_snapshot:
        directory = Directory(path)
        epoch, number, _ = directory.segments()[-1]
        assert "differs" not in compact(directory, epoch, number)
        assert_same(state, path)
    with open_store(path) as store:
        check(store._service.state)
        again = store.sync.take_groups(1, consumer="t")
        assert (ids(again), again.number) == (["g2"], held.number)
        assert [r.rollout_id for r in again.rollouts] == [r.rollout_id for r in held.rollouts]
        statuses = [group.status for group in store.sync.query_groups()]
        assert statuses == ["trained", "trained", "complete", "open"]
        assert store.sync.rewind("t", 1) == 6
        assert ids(store.sync.take_groups(9, consumer="t")) == ["g1", "g2"]
        with pytest.raises(rs.ConsumerUnitError):
            store.sync.take(1, consumer="t")
        finish(store, "g3", 1)
        asyncio.run(tick(store, 60))
        last = present(store.sync.get_group("g3"))
        assert (last.status, last.why) == ("complete", "2 of 3 succeeded: the deadline has passed")
        same = store.sync.enqueue_group(3, 3, group_id="g3", replace=1, min_size=2, deadline_seconds=50, spare=1)
        assert [r.rollout_id for r in same] == last.members
        check(store._service.state)
        state = store._service.state
    assert_same(state, path)


async def test_a_batch_that_comes_twice_makes_its_groups_once(path: Path) -> None:
    """Also if its store was killed in between; and so does a take."""
    store, peer = Store(path), Peer("p")
    groups = [{"member": request(n), "n": 2, "min_size": 2, "replace": 1} for n in range(2)]
    made = peer.batch(["enqueue_groups", {"groups": groups, "gives": "groups"}])
    (first,) = await peer.send(store, made)
    store = store.follow()
    assert (await peer.send(store, made))[0] == first
    rollout_ids = [rollout_id for row in first[1] for rollout_id in row[-1]]
    for rollout_id in rollout_ids:
        await peer.call(store, "update_rollout", rollout_id=rollout_id, changes={"status": "succeeded"})
    taken = peer.batch(["take_groups", {"consumer": "t", "count": 1}])
    (answer,) = await peer.send(store, taken)
    store = store.follow()
    assert (await peer.send(store, taken))[0] == answer
    assert len(store.state.groups) == 2 and len(store.state.entries) == 4
    check(store.state)
    assert store.difference() == []
    store.writer.close()


def _train(path: str, kill_after: int) -> None:
    """One process of a run: enqueue, run, train; killed somewhere."""
    store = rs.InMemoryLightningStore(journal=path, durability="process")
    seen = [0]

    def one_more() -> None:
        seen[0] += 1
        if seen[0] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    durable = Path(path).with_name("model")
    step = int(durable.read_text()) if durable.exists() else 0
    store.sync.rewind("t", step)
    requests = [rs.EnqueueGroupRequest(input=n, n=2, group_id=f"item-{n}", replace=2, min_size=2) for n in range(20)]
    store.sync.enqueue_many_groups(requests)
    while True:
        one_more()
        for rollout in store.sync.dequeue_many_rollouts(limit=7):
            one_more()
            fails = rollout.rollout_id.endswith(("0", "1"))
            status: rs.AttemptStatus = "failed" if fails else "succeeded"
            store.sync.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status=status)
        batch = store.sync.take_groups(3, consumer="t")
        if not batch.groups and not store.sync.query_groups(status_in=["open"]).total:
            break
        if batch.groups:
            one_more()
            step += 1
            store.sync.ack(batch, step=step)
            if step % 2 == 0:
                durable.write_text(str(step))
                one_more()
                store.sync.checkpoint("t", step)
    store.sync.checkpoint("t", step)
    durable.write_text(str(step))
    store.sync.check()
    store.close()


@pytest.mark.timeout(300)
def test_a_trainer_and_its_store_are_killed_again_and_again(path: Path) -> None:
    """Each item ends once: trained in one step of the final model and whole, or failed; none is skipped."""
    context, ends = multiprocessing.get_context("spawn"), []
    for kill_after in (3, 14, 31, 22, 0):
        process = context.Process(target=_train, args=(str(path), kill_after))
        process.start()
        process.join(60)
        ends.append(process.exitcode)
    assert set(ends) == {0, -signal.SIGKILL} and ends[-1] == 0, ends
    with open_store(path) as store:
        check(store._service.state)
        groups = {group.group_id: group for group in store.sync.query_groups()}
        assert sorted(groups) == sorted(f"item-{n}" for n in range(20))
        assert {group.status for group in groups.values()} <= {"trained", "failed"}
        entries = store.sync.ledger("t")
        assert all(entry.is_durable for entry in entries)
        taken = [entry.rollout_id for entry in entries]
        assert len(taken) == len(set(taken))
        batch_of = {entry.rollout_id: entry.batch for entry in entries}
        for group in groups.values():
            batches = [batch_of[i] for i in group.members if i in batch_of]
            assert len(batches) == (2 if group.status == "trained" else 0) and len(set(batches)) <= 1
        state = store._service.state
    assert_same(state, path)
