"""Why nothing goes on, where that depends on processes: pools that fail or work, runners that die, a dead trainer."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import ray

import raystore as rs
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import present, until
from tests.support.actors import killing


async def first_is(store: Any, kind: str, **whose: Any) -> rs.Finding:
    """Wait until a finding of this kind is the first."""

    async def found() -> rs.Finding | None:
        (first, *_) = await store.why(**whose)
        return first if first.kind == kind else None

    return await until(found, within=40)  # type: ignore[no-any-return]


async def test_a_pool_that_cannot_start_a_runner_any_more(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """The runners' own error is told; once the cause is mended, the work is done."""
    store = make_ray_store()
    flag, died = tmp_path / "server", tmp_path / "died"
    flag.touch()

    class Agent:
        def setup(self) -> None:
            if not flag.exists():
                raise ConnectionError("no model \x1b[31mserver")

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            if not died.exists():
                died.touch()
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return 1.0

    async with rs.RunnerPool(store, Agent, size=1):
        made = await store.enqueue_rollout("x")
        found = await first_is(store, "pool_failed")
        assert "no model \\x1b[31mserver" in found.text and "queue 'default'" in found.text
        assert (await store.why(rollout_id=made.rollout_id))[0].kind in ("pool_failed", "suspect_waits")
        flag.touch()

        async def is_done() -> Any:
            return (await store.get_rollout_by_id(made.rollout_id)).status == "succeeded"

        await until(is_done, within=40)


async def test_all_places_of_a_pool_are_taken(make_ray_store: MakeRayStore) -> None:
    """The oldest rollout is named, with its worker and the last span that came of it."""
    store = make_ray_store()

    def agent(task: float, ctx: rs.Context) -> float:
        with ctx.span("tool.search"):
            pass
        time.sleep(task)
        return 1.0

    async with rs.RunnerPool(store, agent, size=1, flush_seconds=0.1) as pool:
        quick = [(await store.enqueue_rollout(0.05)).rollout_id for _ in range(3)]
        await store.wait_for_rollouts(rollout_ids=quick, timeout=60)
        slow, waits = [(await store.enqueue_rollout(seconds)).rollout_id for seconds in (3.0, 0.0)]
        await first_is(store, "runners_busy")
        await asyncio.sleep(1.5)
        found = await first_is(store, "runners_busy")
        assert "1 rollout waits in queue 'default'" in found.text and slow in found.text
        assert f"on worker {pool.worker_ids[0]}" in found.text and "times the median of" in found.text
        assert "the last span received of it is 'tool.search'" in found.text, found.text
        (own, *_) = await store.why(rollout_id=waits)
        assert own.kind == "runners_busy"
        assert len(await store.wait_for_rollouts(rollout_ids=[slow, waits], timeout=60)) == 2


class _Trainer:
    """A process that takes a batch, and does not acknowledge it."""

    def __init__(self, handle: Any) -> None:
        self.store = rs.RayLightningStore(handle)

    async def take(self) -> int:
        """The id of the process."""
        batch = await self.store.take(1, consumer="train")
        assert batch.rollouts
        return os.getpid()


Trainer: Any = ray.remote(num_cpus=0)(_Trainer)


async def test_a_trainer_that_holds_a_batch_and_dies(make_ray_store: MakeRayStore) -> None:
    """First that it holds it, and which process that is; then that its process has ended."""
    store = make_ray_store()
    made = await store.start_rollout("x")
    await store.update_attempt(made.rollout_id, made.attempt.attempt_id, status="succeeded")
    with killing(Trainer.remote(store.actor)) as trainer:
        pid = await trainer.take.remote()
        found = await first_is(store, "batch_held", consumer="train")
        assert f"(process {pid})" in found.text
        os.kill(pid, signal.SIGKILL)
        found = await first_is(store, "batch_left", consumer="train")
        assert "Batch 1 of 'train' was held by a process that has ended" in found.text


async def test_the_directory_of_a_crashed_run_says_what_was_binding(
    make_memory_store: MakeMemoryStore, tmp_path: Path
) -> None:
    """Without Ray and without its processes; time stands where it stood."""
    store = make_memory_store(journal=tmp_path / "j", clock="manual")
    await store.enqueue_rollout("x")
    claimed = present(await store.dequeue_rollout("worker-1"))
    await store.enqueue_rollout("y")
    await store.testing.tick(500)
    await store.update_worker("worker-1", {"beat": 1})
    (alive, *_) = await store.why()
    store.close()
    run = rs.recover(tmp_path / "j")
    try:
        told = await run.why()
        assert [one.kind for one in told] == ["runners_busy", "read_only"] and alive.kind == "runners_busy"
        assert claimed.rollout_id in told[0].text and "on worker worker-1" in told[0].text
        assert told[0].evidence["seconds"] == alive.evidence["seconds"]
        assert (await run.why(rollout_id=claimed.rollout_id))[0].kind == "rollout_runs"
        assert str(tmp_path / "j") in told[1].remedy
    finally:
        run.close()
