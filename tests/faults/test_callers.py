"""Rows 61 to 65 of the fault suite: callers, drivers and stores that are killed, and who notices when.

Each row has a mutation that it catches, at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from tests.conftest import MakeRayStore
from tests.faults.processes import ROOT, broken, describe, later
from tests.helpers import present, until


@contextlib.asynccontextmanager
async def caller(kind: str, store_name: str | None, *more: Any, address: str | None = None) -> AsyncIterator[Process]:
    """A process that does something with a store, killed at the end; and what it says, line by line."""
    address = address or ray.get_runtime_context().gcs_address
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.callers", kind, address, present(store_name), *map(str, more),
        stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def said(process: Process) -> Any:
    """The next line of a caller."""
    async with asyncio.timeout(90):
        line = await present(process.stdout).readline()
    assert line, "the caller ended"
    return json.loads(line)


# -- raw callers -------------------------------------------------------------------------------------------------------


async def kill_raw_callers(store: rs.RayLightningStore, times: int) -> Any:
    """How long each rollout took to be in other hands than those of a dead caller; None if it never was."""
    busy, delays = rs.RayLightningStore(store.actor), []
    await busy.start_rollout("unfinished")
    for number in range(times):
        async with caller("park", store.info.name) as process:
            (pid,) = await said(process)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            made = await store.enqueue_rollout(number)
            claimed = await busy.dequeue_rollout(timeout=30)
            if claimed is None:
                return None
            delays.append(time.monotonic() - killed)
            assert (claimed.rollout_id, claimed.attempt.sequence_id) == (made.rollout_id, 1)
            if number % 2:  # and is not finished, some of them
                await busy.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
    busy.close()
    return max(delays)


@pytest.mark.timeout(900)
async def test_a_raw_caller_is_killed_beside_a_busy_one(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Its dequeue waits; a rollout comes; another process, which has unfinished work, gets it soon."""
    times = amount(1, 10)
    slowest = await kill_raw_callers(make_ray_store(), times)
    report(61, "raw caller killed beside a busy one", figure={"in other hands after s, at most": round(slowest, 1)},
           bar="≤ 8 s", met=slowest <= 8, did=f"{times} times")  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_61_finds_a_rollout_that_waits_for_an_idle_process(
    make_ray_store: MakeRayStore, tmp_path: Path
) -> None:
    """A claim that was withdrawn once makes it a suspect, and it waits for ever."""
    code = "from raystore.core import claims; claims.SUSPICIOUS_WITHDRAWALS = 1"
    store = make_ray_store(suspect_patience_seconds=3600, **broken(tmp_path, code))
    assert await kill_raw_callers(store, 1) is None


async def kill_holders(store: rs.RayLightningStore, times: int, kind: str = "hold") -> Any:
    """How long what a dead process held took to be offered again, None: too long; and whether a frozen one kept it."""
    delays, is_kept = [], True
    async with caller(kind, store.info.name) as frozen:
        pid, kept = await said(frozen)
        os.kill(pid, signal.SIGSTOP)
        for number in range(times):
            async with caller(kind, store.info.name) as process:
                pid, held = await said(process)
                os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
                while (await store.get_rollout_by_id(held)).status != "requeuing":
                    if time.monotonic() > killed + 15:
                        return None, True
                    await asyncio.sleep(0.02)
                delays.append(time.monotonic() - killed)
                assert present(await store.get_latest_attempt(held)).outcome == "runner_lost"
            if number == min(times - 1, 1):  # in a minute its silence would tell
                await asyncio.sleep(5)
                is_kept = (await store.get_rollout_by_id(kept)).status == "preparing"
        return max(delays), is_kept


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["hold", "hold_elsewhere"])
async def test_a_process_that_is_gone_is_noticed(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int], kind: str
) -> None:
    """What a killed process held is offered again within seconds; one that is frozen as long keeps it."""
    times = amount(1, 10)
    slowest, is_kept = await kill_holders(make_ray_store(), times, kind)
    figure = {"noticed after s, at most": round(slowest, 1), "taken from a frozen one": int(not is_kept)}
    what = "process gone" if kind == "hold" else "process gone, by Ray's word only"
    report(62, what, figure=figure, bar="≤ 3 s; 0", met=slowest <= 3 and is_kept, did=f"{times} times")


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_62_finds_a_store_that_does_not_look(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """Then only the silence of a minute tells."""
    code = "from raystore.remote import lifelines; lifelines.is_gone = lambda process: False"
    assert await kill_holders(make_ray_store(**broken(tmp_path, code)), 1) == (None, True)


# -- drivers -----------------------------------------------------------------------------------------------------------


async def kill_drivers(store: rs.RayLightningStore, times: int) -> Any:
    """How long it took until what the runners of a dead driver held was offered again, and how much was charged."""
    delays, wrong = [], 0
    for _ in range(times):
        async with caller("drive", store.info.name) as process:
            pid, *ids = await said(process)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()

            async def offered(rollout_ids: tuple[Any, ...] = tuple(ids)) -> bool:
                found = await store.query_rollouts(rollout_ids=list(rollout_ids))
                return all(rollout.status == "requeuing" for rollout in found)

            await until(offered, within=90)
            delays.append(time.monotonic() - killed)
        for rollout_id in ids:
            outcomes = [attempt.outcome for attempt in await store.query_attempts(rollout_id)]
            wrong += outcomes != ["withdrawn"]
        wrong += (await store.statistics())["suspects"]
        await store.cancel_rollouts(ids)
    return max(delays), wrong


@pytest.mark.timeout(300)
async def test_a_driver_is_killed_beside_its_store(
    make_ray_store: MakeRayStore, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """What its runners held is withdrawn at once: queued again at its old place, uncharged and unsuspected."""
    times = amount(1, 5)
    slowest, wrong = await kill_drivers(make_ray_store(), times)
    figure = {"offered again after s, at most": round(slowest, 1), "charged or suspected": wrong}
    report(63, "driver killed, its store goes on", figure=figure, bar="≤ 5 s; 0", met=slowest <= 5 and not wrong,
           did=f"{times} times, 2 runners with 2 rollouts each")  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_63_finds_a_store_that_does_not_ask_for_the_job(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """Then the end of a driver looks like that of each of its runners."""
    code = "from raystore.remote import lifelines; lifelines._has_job_ended = lambda process, cluster: False"
    _, wrong = await kill_drivers(make_ray_store(**broken(tmp_path, code)), 1)
    assert wrong


async def kill_drivers_with_stores(path: Path, times: int, *, patience: int = 60) -> Any:
    """How long after its start a store offered again what runners had held in the one before, None: too long."""
    delays, wrong = [], 0
    for number in range(times):
        journal = path / f"journal-{number}"
        async with caller("drive", "driven", journal, address="local") as process:
            pid, *ids = await said(process)
            os.kill(pid, signal.SIGKILL)
            async with caller("resume", "driven", journal, len(ids), patience, address="local") as successor:
                offered, attempts = await said(successor)
        if len(offered) < len(ids):
            return None, wrong
        delays.append(max(offered.values()))
        wrong += sum(outcomes != ["withdrawn", None] for outcomes in attempts.values())
    return max(delays), wrong


@pytest.mark.timeout(600)
async def test_a_driver_is_killed_with_its_store_and_resumed(
    tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """Driver, runners and store end together; another driver goes on with the journal, and is offered all of it."""
    times = amount(1, 5)
    slowest, wrong = await kill_drivers_with_stores(tmp_path, times)
    figure = {"offered again after s, at most": round(slowest, 1), "charged": wrong}
    report(64, "driver killed and resumed", figure=figure, bar="≤ 5 s; 0", met=slowest <= 5 and not wrong,
           did=f"{times} times, 2 runners with 2 rollouts each")  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_64_finds_a_store_that_does_not_know_who_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what was held stays with the dead for the grace of a restart."""
    code = "from raystore.remote import server_session; server_session.process_of = lambda told: None"
    monkeypatch.setenv("PYTHONPATH", broken(tmp_path, code)["actor_options"]["runtime_env"]["env_vars"]["PYTHONPATH"])
    assert await kill_drivers_with_stores(tmp_path, 1, patience=10) == (None, 0)


# -- stores ------------------------------------------------------------------------------------------------------------


class _Busy:
    """A process that keeps a store busy, and counts what was acknowledged."""

    def __init__(self, handle: Any) -> None:
        self.store, self.is_over = rs.RayLightningStore(handle), False
        self.made: list[str] = []

    async def work(self) -> list[Any]:
        async def one(number: int) -> None:
            while not self.is_over:
                with contextlib.suppress(rs.OutcomeUnknownError):  # of a store that took longer than a minute
                    made = await self.store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input="x" * 100)] * 20)
                    self.made += [rollout.rollout_id for rollout in made]

        await asyncio.gather(*(one(number) for number in range(16)))
        return self.made

    async def stop(self) -> None:
        self.is_over = True


Busy: Any = ray.remote(num_cpus=0)(_Busy)


async def tell_to_end(store: rs.RayLightningStore, times: int) -> Any:
    """How long the process of a busy store took to end, and how much was acknowledged and is lost."""
    delays = []
    workers = [Busy.remote(store.actor) for _ in range(2)]
    working = [worker.work.remote() for worker in workers]
    never = await store.start_rollout("never")
    waiting = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[never.rollout_id], timeout=600))
    for _ in range(times):
        await asyncio.sleep(1)
        known = await describe(store)
        os.kill(known["pid"], signal.SIGTERM)
        told = time.monotonic()

        async def ended(pid: Any = known["pid"]) -> bool:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            return False

        await until(ended, within=100)
        delays.append(time.monotonic() - told)
        await until(functools.partial(later, store, known["epoch"]), within=60)
    waiting.cancel()
    await asyncio.gather(*(worker.stop.remote() for worker in workers))
    made = [rollout_id for told in [await work for work in working] for rollout_id in told]
    there = {rollout.rollout_id for rollout in await store.query_rollouts(limit=-1)}
    return max(delays), len(set(made) - there), len(made)


@pytest.mark.timeout(300)
async def test_a_store_is_told_to_end_under_load(
    make_ray_store: MakeRayStore, tmp_path: Path, report: Callable[..., None], amount: Callable[[int, int], int]
) -> None:
    """SIGTERM: its process is gone soon, whatever it has to do, and what it had acknowledged is there afterwards."""
    times = amount(1, 10)
    slowest, lost, made = await tell_to_end(make_ray_store(journal=tmp_path / "j"), times)
    figure = {"gone after s, at most": round(slowest, 2), "lost": lost}
    report(65, "store told to end under load", figure=figure, bar="≤ 5 s; 0", met=slowest <= 5 and not lost,
           did=f"{times} SIGTERMs, {made} rollouts acknowledged")  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_row_65_finds_a_store_that_leaves_it_to_ray(make_ray_store: MakeRayStore, tmp_path: Path) -> None:
    """It ends when its main thread comes by and the calls that wait have come back."""
    code = "from raystore.remote import actor; actor._end_when_told = lambda: None"
    store = make_ray_store(journal=tmp_path / "j", **broken(tmp_path, code))
    slowest, lost, _ = await tell_to_end(store, 2)
    assert slowest > 5 and not lost
