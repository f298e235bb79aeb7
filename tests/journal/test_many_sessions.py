"""Processes come and go by the hundred thousand: what a store keeps of them stays as small as it was."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from raystore.core import claims, state, workers
from raystore.journal.opening import read_run
from raystore.remote.server_session import Endpoint
from raystore.service.clock import NoAlarm
from raystore.service.service import Service
from raystore.types.options import StoreConfig
from raystore.wire import frames
from tests.journal.peers import Peer, Store, enqueue
from tests.support.ids import mint_short_ids


async def live_and_die(store: Store, number: int) -> None:
    """A short session: a process with a worker of its own that does a rollout, or asks for one in vain, and ends."""
    peer = Peer(f"p-{number}")
    worker = f"worker-{number}"
    ask = ["dequeue", {"queues": ["default"], "limit": 1, "worker_id": worker, "timeout": 0.0}]
    if number % 5:
        await peer.send(store, peer.batch(["update_worker", {"worker_id": worker, "changes": {}}], ask))
    else:
        _, reply = await peer.send(store, peer.batch(enqueue(number), ask))
        ((rollout, attempt, *_),) = reply[1]
        names = {"rollout_id": rollout[0], "attempt_id": attempt[1]}
        await peer.call(store, "acknowledge", keys=[[rollout[0], attempt[1]]])
        await peer.call(store, "update_attempt", **names, changes={"status": "succeeded"})
        await peer.call(store, "delete_rollouts", rollout_ids=[rollout[0]])
    sequence = peer.batch(["close_session", {}])
    await store.endpoint.exchange(peer.parts(sequence), None)


def sizes(store: Store) -> dict[str, int]:
    """How many of each thing there are that come with a session."""
    state = store.state
    return {
        "sessions": len(state.sessions),
        "inboxes": len(store.endpoint._sessions),
        "workers": len(state.workers),
        "session deadlines": len(state.session_deadlines),
        "their heap": len(state.session_deadlines._heap) // 4,
        "waiting sessions": len(store.service.parking._by_session),
    }


async def test_short_sessions_leave_nothing_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the newest records; with a journal, whose replay lets go of the same, and for the process that goes on."""
    monkeypatch.setattr(claims, "ENDED_SESSIONS", 100)
    for module in (state, workers):
        monkeypatch.setattr(module, "IDLE_WORKERS", 80)
    for module in (state, claims):
        monkeypatch.setattr(module, "SURPLUS", 10)
    store = Store(tmp_path / "j")
    living = Peer("living")
    await living.send(store, living.batch(enqueue("stays", queue="other")))
    for round_ in range(3):
        for number in range(round_ * 500, (round_ + 1) * 500):
            await live_and_die(store, number)
        found = sizes(store)
        assert max(found.values()) < 2 * 111 + 101, found
        assert len(store.state.sessions) <= 111 and len(store.state.workers) <= 90
        assert "living" in store.state.sessions and f"p-{number}" in store.state.sessions
        assert store.difference() == []
        store = store.follow()
    assert await living.call(store, "get_rollout", rollout_id="none") == [frames.VALUE, None]
    await living.call(store, "check")
    store.service.close()


@pytest.mark.long
async def test_three_hundred_thousand_short_sessions_are_flat() -> None:
    """In memory and in time, with the bounds as they are."""
    service = Service(StoreConfig(), capacity_bytes=2**33, alarm=NoAlarm)
    store: Any = SimpleNamespace(service=service, endpoint=Endpoint(service), state=service.state)
    seconds, rss = [], []
    for part in range(30):
        started = time.process_time()
        for number in range(part * 10_000, (part + 1) * 10_000):
            await live_and_die(store, number)
        seconds.append(time.process_time() - started)
        gc.collect()
        rss.append(psutil.Process().memory_info().rss)
    print(f"seconds {seconds[3]:.1f} -> {seconds[-1]:.1f}, MB {[value >> 20 for value in rss[3::4]]}, {sizes(store)}")
    assert rss[-1] - rss[5] < 20 * 2**20
    assert seconds[-1] < 1.5 * seconds[3]


@pytest.mark.parametrize("digits", [1, 2])
async def test_ids_that_were_taken_are_others_in_a_replay_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: int
) -> None:
    """A journal holds no ids, only what they are made of."""
    mint_short_ids(monkeypatch, digits)
    store, peer = Store(tmp_path / "j"), Peer("p")
    for number in range(12):
        await peer.send(store, peer.batch(enqueue(number), enqueue(number)))
        ask = {"queues": ["default"], "limit": 1, "worker_id": None, "timeout": 0.0}
        ((_, attempt, *_),) = (await peer.call(store, "dequeue", **ask))[1]
        await peer.call(
            store, "update_attempt", rollout_id=attempt[0], attempt_id="latest", changes={"status": "failed"}
        )
    assert len(store.state.entries) == 24
    assert store.difference() == []
    assert read_run(tmp_path / "j").state.entries.keys() == store.state.entries.keys()
