"""Backoffs and requeued rollouts of a store with a journal: the next process and a snapshot have them as they were."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import raystore as rs
from raystore.core.snapshot import digest
from raystore.journal import format
from raystore.journal.compaction import compact
from raystore.journal.files import Directory
from raystore.journal.opening import read_run
from raystore.journal.reader import JournalReader
from raystore.wire import frames
from tests.journal.peers import Peer, Store, enqueue

DEQUEUE: dict[str, Any] = {"queues": ["default"], "limit": 9, "worker_id": None, "timeout": 0.0}
RULES = [["timeout", 2, 10.0, 2.0, None, 0.5], ["agent_error", 1, 30.0, 2.0, None, 0.5]]
CONFIG = [5.0, None, 1, [], RULES]


async def hold(store: Store, peer: Peer, count: int) -> list[list[str]]:
    """Claims, acknowledged: rollout and attempt of each."""
    claimed = (await peer.call(store, "dequeue", **DEQUEUE))[1]
    keys = [[attempt[0], attempt[1]] for _, attempt, _ in claimed]
    await peer.call(store, "acknowledge", keys=keys)
    assert len(keys) == count
    return keys


def ends(store: Store) -> dict[str, float]:
    """Until when what backs off does."""
    queues = store.state.queues
    return {rollout_id: queues.backs_off_until(rollout_id) for rollout_id in queues.backing_off}


async def test_backoffs_go_on_after_a_sigkill(tmp_path: Path) -> None:
    """With the delays that chance gave them, and they are met; their ends are recorded like other deadlines."""
    store, peer = Store(tmp_path / "j"), Peer("p")
    await peer.send(store, peer.batch(*(enqueue(number, config=CONFIG) for number in range(3))))
    (first, _), *_ = await hold(store, peer, 3)
    await peer.call(store, "update_attempt", rollout_id=first, attempt_id="latest", changes={"status": "failed"})
    store.tick(5.5)
    await peer.call(store, "check")
    before = ends(store)
    assert len(set(before.values())) == 3
    assert store.difference() == []
    store = store.follow()
    assert ends(store) == before
    assert (await peer.call(store, "dequeue", **DEQUEUE))[1] == []
    store.tick(10.5)
    assert len((await peer.call(store, "dequeue", **DEQUEUE))[1]) == 2
    await peer.call(store, "check")
    store.tick(30)
    assert [rollout[0] for rollout, _, _ in (await peer.call(store, "dequeue", **DEQUEUE))[1]] == [first]
    assert store.difference() == []
    store.writer.close()
    advanced = [
        head.arguments[0]
        for _, record in JournalReader(Directory(tmp_path / "j"))
        if (head := format.unpack_record_head(record[0])).kind == "advance"
    ]
    assert set(itertools.chain.from_iterable(advanced)) >= before.keys()


async def test_requeued_rollouts_go_on_after_a_sigkill(tmp_path: Path) -> None:
    """In place and as new ones; a batch that comes again makes no second one."""
    store, peer = Store(tmp_path / "j"), Peer("p")
    await peer.send(store, peer.batch(enqueue("a"), enqueue("b")))
    (a, _), (b, _) = await hold(store, peer, 2)
    for rollout_id in (a, b):
        await peer.call(
            store, "update_attempt", rollout_id=rollout_id, attempt_id="latest", changes={"status": "failed"}
        )
    await peer.call(store, "take", consumer="c", count=1, timeout=0.0, status_in=["failed"])
    sequence = peer.batch(["requeue", {"rollout_ids": [a, b]}])
    ((kind, ((new, _), (same, _))),) = await peer.send(store, sequence)
    assert (kind, same[0], new[-1]) == (frames.VALUE, b, a)
    store = store.follow()
    ((_, ((again, _), _)),) = await peer.send(store, sequence)
    assert again == new
    assert len(store.state.entries) == 3 and store.state.entries[b].forgiven == 1
    assert (await peer.call(store, "requeue", rollout_ids=[a]))[1][0][0] == new
    await peer.call(store, "check")
    assert store.difference() == []
    store.writer.close()


async def test_a_snapshot_has_them(tmp_path: Path) -> None:
    """Rules, backoffs, allowances and successors, read again from one."""
    store, peer = Store(tmp_path / "j"), Peer("p")
    await peer.send(store, peer.batch(*(enqueue(number, config=CONFIG) for number in range(3)), enqueue("plain")))
    keys = await hold(store, peer, 4)
    for rollout_id, attempt_id in keys[::3]:
        await peer.call(
            store, "update_attempt", rollout_id=rollout_id, attempt_id=attempt_id, changes={"status": "failed"}
        )
    await peer.call(store, "take", consumer="c", count=1, timeout=0.0, status_in=["failed"])
    ((new, _),) = (await peer.call(store, "requeue", rollout_ids=[keys[3][0]]))[1]
    await peer.call(store, "cancel_rollouts", rollout_ids=[keys[1][0]], group_id=None, tags=None)
    await peer.call(store, "requeue", rollout_ids=[keys[1][0]])
    before, ended = digest(store.state), ends(store)
    store.writer.close()
    directory = Directory(tmp_path / "j")
    epoch, number, _ = directory.segments()[-1]
    assert "differs" not in compact(directory, epoch, number)
    found = read_run(tmp_path / "j")
    assert digest(found.state) == before
    store = Store(tmp_path / "j", resume="must")
    assert ends(store) == ended != {}
    assert store.state.entries[keys[0][0]].rollout.config.row()[4][0].outcome == "timeout"
    assert store.state.entries[keys[1][0]].forgiven == 1
    assert (await peer.call(store, "requeue", rollout_ids=[keys[3][0]]))[1][0][0] == new
    store.tick(60)
    await peer.call(store, "check")
    assert list(ends(store)) == [keys[2][0]]  # which timed out meanwhile
    store.writer.close()


async def test_the_settings_of_a_journal_may_have_rules(tmp_path: Path) -> None:
    """The next process replays by the rules of the one before, and goes on with its own."""
    rule = rs.RetryRule(max_retries=1, backoff_seconds=20, jitter=0)
    store = rs.InMemoryLightningStore(
        journal=tmp_path / "j", clock="manual", default_config=rs.RolloutConfig(retry_rules={"agent_error": rule})
    )
    made = store.sync.enqueue_rollout("x")
    store.sync.dequeue_rollout()
    store.sync.update_attempt(made.rollout_id, "latest", status="failed")
    store.close()
    assert digest(read_run(tmp_path / "j").state) == digest(store._service.state)
    store = rs.InMemoryLightningStore(journal=tmp_path / "j", clock="manual", resume="must")
    assert store.sync.statistics()["backing_off"] == 1
    await store.testing.tick(20.5)
    assert store.sync.dequeue_rollout() is not None
    assert store.sync.enqueue_rollout("y").config == rs.RolloutConfig()
    store.sync.check()
    store.close()
    assert read_run(tmp_path / "j").differences == []
