"""Rows 72 to 74 of the fault suite: pools that are stopped, killed and cannot start, each beside another one.

Each row has a mutation that it catches, behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.runner import actors
from raystore.runner.actors import RunnerActors
from tests.conftest import MakeRayStore
from tests.faults.processes import broken
from tests.helpers import present, until

# -- stopping ----------------------------------------------------------------------------------------------------------


async def patient(task: Any, ctx: rs.Context) -> None:
    """Goes on for longer than anybody waits."""
    with ctx.span("begun"):
        pass
    await asyncio.sleep(1000)


async def brief(task: Any, ctx: rs.Context) -> float:
    """Takes a moment."""
    with ctx.span("turn"):
        await asyncio.sleep(0.3)
    return 1.0


async def stop_pools(store: rs.RayLightningStore, stops: int) -> Any:
    """Stop pools in the middle of their work, beside one that does not notice: what went wrong, what was withdrawn."""
    lots = random.Random(72)
    steady = await store.enqueue_rollout("steady", queue="b")
    other = rs.RunnerPool(store, patient, size=1, queues=["b"], flush_seconds=0.05)
    async with other:

        async def is_running() -> Any:
            return (await store.get_rollout_by_id(steady.rollout_id)).status == "running"

        await until(is_running)
        before = other.worker_ids
        made = [rollout.rollout_id for rollout in await store.enqueue_group("x", 8 * stops)]

        async def is_at_work() -> bool:
            return len(await store.query_rollouts(rollout_id_in=made, status_in=["running"])) > 0

        for _ in range(stops):
            async with rs.RunnerPool(store, brief, size=2, concurrency=4, flush_seconds=0.05) as pool:
                await until(is_at_work)  # on a busy machine runners may need a while for their first claim
                await asyncio.sleep(lots.uniform(0.0, 0.25))
                await asyncio.to_thread(pool.stop, drain_seconds=lots.choice([0.0, 0.1]))
        async with rs.RunnerPool(store, brief, size=2, concurrency=16):
            done = await store.wait_for_rollouts(rollout_ids=made, timeout=200)
        touched = (other.worker_ids != before) + (len(await store.query_attempts(steady.rollout_id)) != 1)
        await asyncio.to_thread(other.stop, drain_seconds=0)
    outcomes = [attempt.outcome for rollout_id in made for attempt in await store.query_attempts(rollout_id)]
    figure = {
        "not succeeded": len(made) - sum(rollout.status == "succeeded" for rollout in done),
        "lost or charged": sum(outcome not in ("ok", "withdrawn") for outcome in outcomes),
        "runners of the other pool touched": touched,
    }
    return figure, outcomes.count("withdrawn")


@pytest.mark.timeout(900)
async def test_pools_are_stopped_beside_another(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Over and over, in the middle of their work: nothing is lost or charged, and the other pool does not notice."""
    stops = amount(2, 50)
    figure, withdrawn = await stop_pools(make_ray_store(max_deliveries=1), stops)
    report(72, "pools stopped under load beside another", figure=figure, bar="0 of each", met=not any(figure.values()),
           seed=72, did=f"{stops} stops withdrew {withdrawn} attempts")  # fmt: skip
    assert withdrawn >= stops


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_72_finds_a_stop_that_counts_as_a_death(
    make_ray_store: MakeRayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runners are ended without being asked, and their end is reported as any other."""
    report = RunnerActors._report_end
    monkeypatch.setattr(actors, "stop_all", lambda members, **seconds: None)
    monkeypatch.setattr(RunnerActors, "_report_end", lambda pool, member, stopped: report(pool, member, stopped=False))
    figure, _ = await stop_pools(make_ray_store(max_deliveries=1), 2)
    assert figure["lost or charged"]


# -- killing -----------------------------------------------------------------------------------------------------------


async def telling(task: Any, ctx: rs.Context) -> float:
    """Its reward says what it was given."""
    with ctx.span("begun"):
        pass
    await asyncio.sleep(0.5)
    return float(task)


async def kill_runners(store: rs.RayLightningStore, kills: int) -> Any:
    """Kill runners of two pools, one after the other: what came of their work."""
    lots = random.Random(73)
    killed: set[str | None] = set()
    async with (
        rs.RunnerPool(store, telling, size=2, concurrency=2, queues=["a"], flush_seconds=0.05) as a,
        rs.RunnerPool(store, telling, size=2, concurrency=2, queues=["b"], flush_seconds=0.05) as b,
    ):
        made: list[str] = []
        for number in range(kills):
            pool = (a, b)[number % 2]
            inputs = range(len(made), len(made) + 32)  # two seconds of work
            requests = [rs.EnqueueRolloutRequest(input=task, queue="ab"[task % 2]) for task in inputs]
            made += [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests)]

            async def at_work(pool: rs.RunnerPool = pool) -> list[Any]:
                found = await store.query_rollouts(status_in=["running"])
                return sorted({r.attempt.worker_id for r in found} & {*pool.worker_ids} - killed)

            victim = present(await store.get_worker_by_id(lots.choice(await until(at_work, within=60))))
            os.kill(present(victim.heartbeat_stats)["pid"], signal.SIGKILL)
            killed.add(victim.worker_id)
            await asyncio.sleep(lots.uniform(0.2, 1.0))
        done = await store.wait_for_rollouts(rollout_ids=made, timeout=60 + 10 * kills)
        ids = {*a.worker_ids, *b.worker_ids}
    tried = [await store.query_attempts(rollout_id) for rollout_id in made]
    lost = [attempt for attempts in tried for attempt in attempts[:-1]]  # also one that finished in spite of it
    figure = {
        "not succeeded": len(made) - sum(rollout.status == "succeeded" for rollout in done),
        "wrong rewards": sum(rollout.reward != float(rollout.input) for rollout in done),
        "taken from the living": sum(attempt.worker_id not in killed for attempt in lost),
        "places not filled again": 4 - len(ids - killed),
    }
    return figure, len(lost)


@pytest.mark.timeout(900)
async def test_two_pools_are_killed(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Only what a dead runner held is tried again; each pool fills its own places, and all ends well."""
    kills = amount(3, 50)
    store = make_ray_store(max_deliveries=kills + 1)  # what is killed so often is not to be taken for poison
    figure, lost = await kill_runners(store, kills)
    report(73, "runners of two pools killed", figure=figure, bar="0 of each", met=not any(figure.values()),
           seed=73, did=f"{kills} kills lost {lost} attempts")  # fmt: skip
    assert lost


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_73_finds_an_end_that_is_reported_of_the_wrong_runner(
    make_ray_store: MakeRayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when runners of two pools had the same names: another one's work is given away."""
    report = RunnerActors._report_end
    everybody = []
    start = RunnerActors._start_member

    def started(pool: Any, number: Any, **options: Any) -> Any:
        everybody.append(start(pool, number, **options))
        return everybody[-1]

    def wrong(pool: Any, member: Any, *, stopped: Any) -> None:
        others = [other for other in everybody if other.session_id is not None and not other.ended.is_set()]
        for other in others:
            report(pool, other, stopped=stopped)

    monkeypatch.setattr(RunnerActors, "_start_member", started)
    monkeypatch.setattr(RunnerActors, "_report_end", wrong)
    figure, _ = await kill_runners(make_ray_store(), 2)
    assert figure["taken from the living"]


# -- a setup that fails ------------------------------------------------------------------------------------------------

PATTERN = "nnnyyy"  #: of one start after the other: half of them fail, three in a row, after which a pool tells of it


def make_shaky(folder: Path) -> type[Any]:
    """A class of agents whose setup fails half the time."""

    class Shaky:
        def setup(self) -> None:
            number = len(list(folder.iterdir()))
            (folder / f"{number}-{os.getpid()}").touch()
            if number >= 3 and PATTERN[(number - 3) % len(PATTERN)] == "n":  # the first three have to come up
                raise ConnectionError("no model server")

        async def __call__(self, task: Any, ctx: rs.Context) -> float:
            await asyncio.sleep(0.5)
            return 1.0

    return Shaky


async def kill_the_shaky(store: rs.RayLightningStore, folder: Path, kills: int) -> Any:
    """Kill runners whose successors come up half the time: what became of their work, and what the driver was told."""
    starts = folder / "starts"
    killed: set[str] = set()
    starts.mkdir()
    async with rs.RunnerPool(store, make_shaky(starts), size=3, concurrency=2) as pool:
        made = [rollout.rollout_id for rollout in await store.enqueue_group("x", 60 * kills)]
        last = asyncio.ensure_future(store.wait_for_rollout(made[-1], timeout=60 + 30 * kills))  # all the time

        async def two_live() -> list[Any] | None:
            ids = {*pool.worker_ids} - killed
            workers = await store.query_workers()
            found = [w for w in workers if w.worker_id in ids and "pid" in (w.heartbeat_stats or {})]
            return found if len(found) >= 2 else None

        for _ in range(kills):
            victim = (await until(two_live, within=90))[0]
            os.kill(victim.heartbeat_stats["pid"], signal.SIGKILL)
            killed.add(victim.worker_id)
        with contextlib.suppress(rs.PoolFailedError):
            await last
        try:
            done = await store.wait_for_rollouts(rollout_ids=made, timeout=120)
        except rs.PoolFailedError:
            done = []
    figure = {
        "not succeeded": len(made) - sum(rollout.status == "succeeded" for rollout in done),
        "told that nobody works, while somebody does": int(isinstance(last.exception(), rs.PoolFailedError)),
    }
    return figure, len(list(starts.iterdir()))


@pytest.mark.timeout(900)
async def test_a_setup_that_fails_half_the_time(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Those who come up do all of it; as long as one of them lives, nobody hears that there is none."""
    kills = amount(3, 30)
    figure, starts = await kill_the_shaky(make_ray_store(), tmp_path, kills)
    report(74, "setup fails half the time", figure=figure, bar="0; 0", met=not any(figure.values()),
           did=f"{kills} kills, {starts} starts of three runners")  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_74_finds_a_store_that_forgets_who_works(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """Then three failures in a row look like the end, whoever else asks for work."""
    code = "from raystore import pools; pools.Pools.asked = lambda self, session_id, queues: None"
    figure, _ = await kill_the_shaky(make_ray_store(**broken(tmp_path, code)), tmp_path, 3)
    assert figure["told that nobody works, while somebody does"]
