"""Batches that another process holds: one that lives, and one that was killed before the store can know of it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import ray

import raystore as rs
from tests.conftest import MakeRayStore


@ray.remote(num_cpus=0)
class Trainer:
    """A process that takes a batch and holds it."""

    async def take(self, handle: Any) -> int:
        """Take two rollouts; the id of the process."""
        self.store = rs.RayLightningStore(handle)
        self.batch = await self.store.take(2, consumer="t")
        assert len(self.batch.rollouts) == 2
        return os.getpid()


async def hold(store: rs.RayLightningStore) -> tuple[Any, int]:
    """A process that holds a batch of two rollouts, and its id."""
    for name in "ab":
        made = await store.start_rollout(name)
        await store.update_attempt(made.rollout_id, "latest", status="succeeded")
    trainer: Any = Trainer.remote()  # type: ignore[attr-defined]  # ray adds it
    return trainer, await trainer.take.remote(store.actor)


@pytest.mark.parametrize("timeout", [0.0, 300.0])
async def test_a_batch_of_a_process_that_lives_is_refused_soon(make_ray_store: MakeRayStore, timeout: float) -> None:
    """However long the take would wait: the holder gives a sign of life when the store asks for one."""
    store = make_ray_store()
    trainer, _ = await hold(store)
    started = time.monotonic()
    with pytest.raises(rs.BatchHeldError, match="taken by session") as caught:
        await store.take(2, consumer="t", timeout=timeout)
    assert time.monotonic() - started < 60
    assert caught.value.silent_seconds is not None
    ray.kill(trainer)


@pytest.mark.parametrize("blocking", [False, True])
async def test_a_batch_of_a_process_that_was_just_killed_comes_again(
    make_ray_store: MakeRayStore, blocking: bool
) -> None:
    """A trainer that is started again at once waits for what the dead one held, as for anything else."""
    store = make_ray_store()
    _, pid = await hold(store)
    os.kill(pid, signal.SIGKILL)
    if blocking:
        batch = store.sync.take(2, consumer="t", timeout=60)
    else:
        batch = await store.take(2, consumer="t", timeout=60)
    assert [rollout.input for rollout in batch.rollouts] == ["a", "b"]
