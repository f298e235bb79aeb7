"""Queues that another process pauses: what its death ends, and what an operator may do about a living one."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import ray

import raystore as rs
from tests.conftest import MakeRayStore
from tests.helpers import present
from tests.support.actors import killing


class _Pauser:
    """A process that holds work back."""

    def __init__(self, handle: Any) -> None:
        self.store = rs.RayLightningStore(handle)

    async def pause(self, keep: bool) -> int:
        """Pause all queues; the id of the process."""
        await self.store.pause(keep=keep)
        return os.getpid()


Pauser: Any = ray.remote(num_cpus=0)(_Pauser)


@pytest.mark.parametrize("keep", [False, True], ids=["own", "kept"])
async def test_a_killed_process_ends_its_pause_and_not_a_kept_one(make_ray_store: MakeRayStore, keep: bool) -> None:
    """A dequeue that is parked meanwhile is answered at once, or by whoever resumes."""
    store = make_ray_store()
    with killing(Pauser.remote(store.actor)) as pauser:
        pid = await pauser.pause.remote(keep)
        await store.enqueue_rollout("x")
        waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=60))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        os.kill(pid, signal.SIGKILL)
        if keep:
            await asyncio.sleep(5)
            assert not waiting.done()
            assert [pause["keep"] for pause in (await store.statistics())["paused"]] == [True]
            assert await store.resume() == []
        assert present(await asyncio.wait_for(waiting, 20)).input == "x"
        assert (await store.statistics())["paused"] == []


async def test_an_operator_resumes_what_another_process_paused(make_ray_store: MakeRayStore) -> None:
    """By asking for it: a script that ends its own pause leaves those of others alone."""
    store = make_ray_store()
    with killing(Pauser.remote(store.actor)) as pauser:
        await pauser.pause.remote(False)
        made = await store.enqueue_rollout("x")
        assert len(await store.pause()) == 2
        (left,) = await store.resume()
        assert left.queue is None and left.session_id in "\n".join(await store.story(made.rollout_id))
        assert await store.dequeue_rollout() is None
        assert await store.resume(others=True) == []
        assert present(await store.dequeue_rollout()).input == "x"
