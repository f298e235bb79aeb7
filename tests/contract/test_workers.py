"""Workers: what each row of the contract's worker table does."""

from __future__ import annotations

import pytest

import raystore as rs
from tests.helpers import AnyStore, claim, make_span, present


async def worker(store: AnyStore, worker_id: str = "w") -> rs.Worker:
    return present(await store.get_worker_by_id(worker_id))


async def test_update_worker_is_an_upsert_and_never_changes_status(store: AnyStore) -> None:
    """A heartbeat stamps the time and replaces statistics if given."""
    first = await store.update_worker("w", {"cpu": 1})
    assert (first.status, first.heartbeat_stats, first.last_heartbeat_time is not None) == ("unknown", {"cpu": 1}, True)
    store.testing.tick(3)
    second = await store.update_worker("w")
    assert (second.heartbeat_stats, second.last_heartbeat_time) == ({"cpu": 1}, present(first.last_heartbeat_time) + 3)
    with pytest.raises(TypeError, match="heartbeat_stats"):
        await store.update_worker("w", None)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="worker_id"):
        await store.update_worker("")
    assert await store.get_worker_by_id("nope") is None


async def test_claim_makes_busy_and_report_makes_idle(store: AnyStore) -> None:
    """A worker is busy with what it claimed until it succeeds or fails; heartbeat data survives."""
    await store.update_worker("w", {"cpu": 1})
    rollout = await claim(store, worker_id="w")
    busy = await worker(store)
    assert (busy.status, busy.current_rollout_id, busy.current_attempt_id) == (
        "busy", rollout.rollout_id, rollout.attempt.attempt_id,
    )  # fmt: skip
    assert busy.last_dequeue_time == busy.last_busy_time is not None
    assert busy.heartbeat_stats == {"cpu": 1}
    await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    idle = await worker(store)
    assert (idle.status, idle.current_rollout_id, idle.current_attempt_id) == ("idle", None, None)
    assert idle.last_idle_time is not None


@pytest.mark.parametrize("status", ["timeout", "unresponsive"])
async def test_a_lost_attempt_makes_its_worker_unknown(store: AnyStore, status: rs.AttemptStatus) -> None:
    """Nobody knows what a worker does whose attempt timed out."""
    rollout = await claim(store, worker_id="w")
    await store.update_attempt(rollout.rollout_id, "latest", status=status)
    found = await worker(store)
    assert (found.status, found.current_attempt_id) == ("unknown", None)


async def test_empty_dequeue_makes_idle_and_clears(store: AnyStore) -> None:
    """A worker that comes away empty is idle, and busy with nothing; an idle one only stamps the time."""
    await store.dequeue_rollout("w")
    first = await worker(store)
    assert (first.status, first.last_idle_time) == ("idle", first.last_dequeue_time)
    store.testing.tick(2)
    await store.dequeue_rollout("w")
    second = await worker(store)
    assert (second.last_idle_time, second.last_dequeue_time) == (
        first.last_idle_time,
        present(first.last_dequeue_time) + 2,
    )
    await claim(store, worker_id="b")
    await store.dequeue_rollout("b")
    busy = await worker(store, "b")
    assert (busy.status, busy.current_rollout_id) == ("idle", None)
    await store.dequeue_many_rollouts(limit=0, worker_id="z")
    assert (await worker(store, "z")).status == "idle"
    await store.dequeue_rollout()
    assert (await store.query_workers()).total == 3


async def test_start_with_a_worker_makes_busy_without_a_dequeue_stamp(store: AnyStore) -> None:
    """start_rollout and start_attempt are no dequeues."""
    rollout = await store.start_rollout("x", worker_id="w")
    assert (await worker(store)).status == "busy" and (await worker(store)).last_dequeue_time is None
    await store.start_attempt(rollout.rollout_id, worker_id="v")
    assert (await worker(store, "v")).current_rollout_id == rollout.rollout_id


async def test_update_attempt_names_a_worker(store: AnyStore) -> None:
    """Naming a worker makes it busy; metadata and heartbeats alone do not touch it."""
    rollout = await claim(store)
    await store.update_attempt(rollout.rollout_id, "latest", metadata={"x": 1}, last_heartbeat_time=1.0)
    assert await store.get_worker_by_id("w") is None
    await store.update_attempt(rollout.rollout_id, "latest", worker_id="w")
    assert ((await worker(store)).status, (await worker(store)).current_rollout_id) == ("busy", rollout.rollout_id)
    await store.add_span(make_span(rollout))
    assert (await worker(store)).status == "busy"


async def test_late_report_of_an_old_attempt_leaves_a_worker_that_moved_on(store: AnyStore) -> None:
    """A worker that is busy with something else stays so."""
    old = await claim(store, worker_id="w")
    new = await claim(store, worker_id="w")
    await store.update_attempt(old.rollout_id, "latest", status="succeeded")
    assert ((await worker(store)).status, (await worker(store)).current_rollout_id) == ("busy", new.rollout_id)


async def test_dequeue_many_tracks_the_last(store: AnyStore) -> None:
    """All attempts carry the worker; its row names the last one."""
    for i in range(3):
        await store.enqueue_rollout(i)
    claimed = await store.dequeue_many_rollouts(limit=3, worker_id="w")
    assert {r.attempt.worker_id for r in claimed} == {"w"}
    assert (await worker(store)).current_rollout_id == claimed[-1].rollout_id


async def test_query_workers(store: AnyStore) -> None:
    """Filters, sorting, pages; insertion order by default."""
    for name in ("b1", "a1", "b2"):
        await store.update_worker(name)
        store.testing.tick(1)
    await claim(store, worker_id="a1")
    assert [w.worker_id for w in await store.query_workers()] == ["b1", "a1", "b2"]
    assert [w.worker_id for w in await store.query_workers(status_in=["busy"])] == ["a1"]
    assert [w.worker_id for w in await store.query_workers(worker_id_contains="b")] == ["b1", "b2"]
    either = await store.query_workers(status_in=["busy"], worker_id_contains="b2", filter_logic="or")
    assert [w.worker_id for w in either] == ["a1", "b2"]
    page = await store.query_workers(sort_by="last_heartbeat_time", sort_order="desc", limit=1)
    assert ([w.worker_id for w in page], page.total) == (["b2"], 3)
