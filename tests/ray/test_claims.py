"""Claims are never lost: callers that are cancelled, time out, exit, are killed, or block their loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from asyncio import Task
from typing import Any

import pytest
import ray

import raystore as rs
from tests.conftest import MakeRayStore
from tests.helpers import present, until


class Claimer:
    """A process that claims; it is told what to do with itself."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.claimed: list[rs.AttemptedRollout | None] = []

    async def park(self, timeout: float = 60.0) -> str | None:
        """Wait for work; what came is remembered."""
        self.store = rs.RayLightningStore(self.handle)
        claimed = await self.store.dequeue_rollout(timeout=timeout)
        self.claimed.append(claimed)
        return claimed.rollout_id if claimed else None

    async def pid(self) -> int:
        return os.getpid()

    async def leave(self) -> None:
        ray.actor.exit_actor()


def freeze_and_kill(pid: Any) -> None:
    """SIGKILL: the process has no chance to say anything."""
    os.kill(pid, signal.SIGKILL)


async def parked(store: Any, count: Any) -> None:
    async def enough() -> Any:
        return (await store.statistics())["waiters"] >= count

    await until(enough)


async def test_a_loop_that_is_blocked_keeps_its_claim(make_ray_store: MakeRayStore) -> None:
    """An agent that blocks its loop for longer than a claim may wait for acknowledgement loses nothing."""
    store = make_ray_store()
    got: list[rs.AttemptedRollout] = []

    def run() -> None:
        async def claim_and_block() -> None:
            waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=30))
            await asyncio.sleep(0.2)
            time.sleep(7)  # noqa: ASYNC251 - the answer comes meanwhile
            got.append(present(await waiting))

        asyncio.run(claim_and_block())

    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.sleep(0.5)
    made = await store.enqueue_rollout("x")
    assert await store.dequeue_rollout(timeout=6) is None
    await asyncio.to_thread(thread.join)
    assert [r.rollout_id for r in got] == [made.rollout_id]
    await store.update_attempt(made.rollout_id, got[0].attempt.attempt_id, status="succeeded")


async def test_a_loop_that_has_ended_gives_its_claim_back(make_ray_store: MakeRayStore) -> None:
    """Work handed to a loop that ended meanwhile is offered again at once."""
    store = make_ray_store()

    def run() -> None:
        async def claim_and_end() -> Task[rs.AttemptedRollout | None]:
            task = asyncio.ensure_future(store.dequeue_rollout(timeout=30))
            await asyncio.sleep(0.1)
            return task

        asyncio.run(claim_and_end())

    await asyncio.to_thread(run)
    made = await store.enqueue_rollout("x")
    claimed = present(await store.dequeue_rollout(timeout=2))
    assert claimed.rollout_id == made.rollout_id


async def test_an_unacknowledged_claim_is_withdrawn(make_ray_store: MakeRayStore) -> None:
    """A process that is killed with claims in its hands leaves no trace on them; the story tells."""
    store = make_ray_store()
    made = await store.enqueue_rollout("x")
    claimer = ray.remote(num_cpus=0, max_concurrency=10)(Claimer).remote(store.actor)
    pid = await claimer.pid.remote()
    parked_ref = claimer.park.remote()
    await until(lambda: _claimed(store, made.rollout_id))
    freeze_and_kill(pid)
    claimed = present(await store.dequeue_rollout(timeout=70))
    assert (claimed.rollout_id, claimed.attempt.sequence_id) in {(made.rollout_id, 1), (made.rollout_id, 2)}
    assert any("withdrawn" in line or "lost" in line for line in await store.story(made.rollout_id))
    del parked_ref


async def _claimed(store: rs.RayLightningStore, rollout_id: str) -> Any:
    return (await store.get_rollout_by_id(rollout_id)).status == "preparing"


class SyncClaimer:
    """A runner that people wrote themselves, without async."""

    def __init__(self, handle: Any) -> None:
        self.store = rs.RayLightningStore(handle)

    def claim(self) -> str:
        rollout = present(self.store.sync.dequeue_rollout(timeout=10))
        time.sleep(1.0)  # acknowledged meanwhile by the session's own thread
        return rollout.rollout_id

    def leave(self) -> None:
        self.store.close()


async def test_a_process_that_closes_gives_back_what_it_runs(make_ray_store: MakeRayStore) -> None:
    """A runner with no timeout configured: `close` says goodbye, and its attempt is withdrawn and offered again."""
    store = make_ray_store()
    made = await store.enqueue_rollout("x")
    claimer = ray.remote(num_cpus=0)(SyncClaimer).remote(store.actor)
    assert await claimer.claim.remote() == made.rollout_id
    await claimer.leave.remote()
    again = present(await store.dequeue_rollout(timeout=5))
    assert (again.rollout_id, again.attempt.sequence_id) == (made.rollout_id, 2)
    first, _ = await store.query_attempts(made.rollout_id)
    assert (first.status, first.outcome) == ("unresponsive", "withdrawn")


@pytest.mark.long
async def test_a_killed_process_is_found_by_its_silence(make_ray_store: MakeRayStore) -> None:
    """With no timeout configured and nobody to report it, a SIGKILLed runner gives back its attempt after 60 s."""
    store = make_ray_store()
    made = await store.enqueue_rollout("x")
    claimer = ray.remote(num_cpus=0)(SyncClaimer).remote(store.actor)
    await claimer.claim.remote()
    ray.kill(claimer)
    again = present(await store.dequeue_rollout(timeout=100))
    assert (again.rollout_id, again.attempt.sequence_id) == (made.rollout_id, 2)
