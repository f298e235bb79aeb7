"""Pauses and limits of a store with a journal: they go on where they were, in the next process and in a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import raystore as rs
from raystore.core.snapshot import digest, parts
from raystore.core.state import State
from raystore.journal import snapshot_file
from raystore.journal.format import FileHead
from raystore.journal.opening import read_run
from tests.journal.peers import Peer, Store, enqueue

DEQUEUE: dict[str, Any] = {"queues": ["default"], "limit": 9, "worker_id": None, "timeout": 0.0}


async def test_pauses_and_limits_go_on_after_a_sigkill(tmp_path: Path) -> None:
    """A session that goes on with the next process still pauses; rates know the claims of the process before."""
    store, pauses, works = Store(tmp_path / "j"), Peer("pauses"), Peer("works")
    await pauses.call(store, "pause_queues", queues=["paused"], keep=False)
    await pauses.call(store, "pause_queues", queues=["kept"], keep=True)
    await pauses.call(store, "limit_queue", queue="default", max_running=None, per_minute=2)
    await pauses.call(store, "limit_queue", queue="few", max_running=1, per_minute=None)
    await works.send(store, works.batch(*(enqueue(n) for n in range(3)), *(enqueue(n, queue="few") for n in range(2))))
    await works.send(store, works.batch(enqueue("p", queue="paused"), enqueue("k", queue="kept")))
    every = DEQUEUE | {"queues": ["paused", "kept", "few", "default"]}
    claimed = (await works.call(store, "dequeue", **every))[1]
    await works.call(store, "acknowledge", keys=[[attempt[0], attempt[1]] for _, attempt, _ in claimed])
    assert [rollout[10] for rollout, _, _ in claimed] == ["few", "default", "default"]
    assert store.difference() == []
    store = store.follow()
    assert (await works.call(store, "dequeue", **every))[1] == []
    await works.call(store, "check")
    left = (await pauses.call(store, "resume_queues", queues=["kept"], others=False))[1]
    assert [row[:2] for row in left] == [["paused", "pauses"]]
    assert len((await works.call(store, "dequeue", **every))[1]) == 1
    await works.call(store, "report_session", session_id="pauses")
    assert len((await works.call(store, "dequeue", **every))[1]) == 1
    store.tick(100)
    assert len((await works.call(store, "dequeue", **every))[1]) == 1
    few = next(rollout for rollout, _, _ in claimed if rollout[10] == "few")
    await works.call(store, "update_rollout", rollout_id=few[0], changes={"status": "succeeded"})
    assert len((await works.call(store, "dequeue", **every))[1]) == 1
    assert store.difference() == []
    store.writer.close()


def test_a_pause_of_the_process_that_runs_the_store_ends_with_it(tmp_path: Path) -> None:
    """The next one finds the kept pause, and none of the others."""
    store = rs.InMemoryLightningStore(journal=tmp_path / "j", clock="manual")
    store.sync.pause(["mine"])
    store.sync.pause(["kept"], keep=True)
    store.sync.enqueue_rollout("m", queue="mine")
    store.sync.enqueue_rollout("k", queue="kept")
    store.close()
    store = rs.InMemoryLightningStore(journal=tmp_path / "j", clock="manual", resume="must")
    assert [pause["queue"] for pause in store.sync.statistics()["paused"]] == ["kept"]
    (got,) = store.sync.dequeue_many_rollouts(limit=5, queues=["kept", "mine"])
    assert got.input == "m"
    assert store.sync.resume() == []
    store.sync.check()
    store.close()
    assert digest(read_run(tmp_path / "j").state) == digest(store._service.state)


async def test_a_snapshot_has_pauses_and_limits(tmp_path: Path) -> None:
    """What it restores is the same state, with the same deadlines; one without gates has no section for them."""
    store, peer = Store(tmp_path / "j"), Peer("p")
    await peer.send(store, peer.batch(enqueue(), enqueue()))
    before = restored(store.state, tmp_path / "before")
    assert not before.gates.are_used
    await peer.call(store, "pause_queues", queues=None, keep=True)
    await peer.call(store, "pause_queues", queues=["default"], keep=False)
    await peer.call(store, "limit_queue", queue="default", max_running=7, per_minute=1)
    await peer.call(store, "resume_queues", queues=None, others=False)
    await peer.call(store, "pause_queues", queues=["other"], keep=True)
    assert len((await peer.call(store, "dequeue", **DEQUEUE))[1]) == 1
    found = restored(store.state, tmp_path / "after")
    assert list(parts(found)) == list(parts(store.state))
    assert digest(before) != digest(found)
    found.guard_all()
    assert found.gates.deadlines.next() == store.state.gates.deadlines.next() is not None
    store.writer.close()


def restored(state: State, path: Path) -> State:
    """The state that a snapshot of a state makes."""
    snapshot_file.write(path, FileHead("s", 1, 1, 1, more={}), state, None, {})
    found = State(state.settings)
    snapshot_file.read(path, found)
    return found
