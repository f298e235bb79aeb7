"""Rows 8 and 10 of the fault suite: a real store on Ray that is killed under load, over and over."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.journal.opening import read_run
from tests.conftest import MakeRayStore
from tests.faults.processes import describe, later
from tests.helpers import make_span, present, until

ENDS = {
    "SIGKILL": lambda pid: os.kill(pid, signal.SIGKILL),
    "SIGSEGV": lambda pid: os.kill(pid, signal.SIGSEGV),
    "SIGTERM": lambda pid: os.kill(pid, signal.SIGTERM),
}


class _Worker:
    """A process that works, and remembers what the store acknowledged."""

    def __init__(self, handle: Any, name: str) -> None:
        self.store, self.name = rs.RayLightningStore(handle), name
        self.enqueued: list[Any] = []
        self.finished: list[Any] = []
        self.spans: list[Any] = []
        self.withdrawn = self.unknown = 0
        self.is_over = False

    async def work(self, concurrency: int) -> Any:
        async def one(number: int) -> None:
            while not self.is_over:
                try:
                    await self.turn(number)
                except rs.ClaimLostError:  # a process that took its time to die heard of no acknowledgement
                    self.withdrawn += 1
                except rs.OutcomeUnknownError:  # no process of the store lived until it was asked, for a minute
                    self.unknown += 1

        await asyncio.gather(*(one(number) for number in range(concurrency)))
        return self.enqueued, self.finished, self.spans, self.withdrawn, self.unknown

    async def turn(self, number: int) -> None:
        asked = f"{self.name}/{number}/{len(self.enqueued)}/{time.monotonic_ns()}"
        rollout = await self.store.enqueue_rollout(asked)
        self.enqueued.append((rollout.rollout_id, asked))
        claimed = await self.store.dequeue_rollout(timeout=30)
        if claimed is None:
            return
        span = make_span(claimed)
        await self.store.add_span(span)
        self.spans.append((claimed.rollout_id, claimed.attempt.attempt_id, span.span_id))
        await self.store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
        self.finished.append(claimed.rollout_id)

    async def stop(self) -> None:
        self.is_over = True


Worker: Any = ray.remote(num_cpus=0)(_Worker)


@pytest.mark.timeout(2_400)
@pytest.mark.parametrize(
    ("row", "ends"),
    [pytest.param(8, ["SIGKILL"], marks=pytest.mark.long), (10, list(ENDS))],  # of which SIGKILL is one
    ids=["sigkill", "three-ways"],
)
async def test_a_store_that_is_killed_loses_nothing(
    make_ray_store: MakeRayStore,
    tmp_path: Path,
    report: Callable[..., None],
    amount: Callable[[int, int], int],
    row: int,
    ends: list[str],
) -> None:
    """What was acknowledged is there, once; what was not may be there or not, and at most once."""
    seed = 8_000 + row
    lots = random.Random(seed)
    durability = "power" if row == 8 else "process"
    store = make_ray_store(journal=tmp_path / "journal", duplicate_spans="keep", durability=durability)
    workers = [Worker.remote(store.actor, f"w{number}") for number in range(4)]
    working = [worker.work.remote(4) for worker in workers]
    kills, back = amount(3, 200 if row == 8 else 30), []
    stop = time.monotonic() + amount(60, 2_000)
    for number in range(kills):
        if time.monotonic() > stop:
            break
        known = await describe(store)
        await asyncio.sleep(lots.uniform(0.1, 1.2))
        ENDS[ends[number % len(ends)]](known["pid"])
        killed = time.monotonic()
        await until(functools.partial(later, store, known["epoch"]), within=60)
        back.append(time.monotonic() - killed)
    await asyncio.sleep(0.5)
    await asyncio.gather(*(worker.stop.remote() for worker in workers))
    done = [await told for told in working]
    rollouts = {rollout.rollout_id: rollout for rollout in await store.query_rollouts()}
    by_input = [rollout.input for rollout in rollouts.values()]
    spans = await store.query_many_spans(list(rollouts), attempt_id=None)
    lost = doubled = operations = 0
    for enqueued, finished, added, *_ in done:
        operations += 2 * len(enqueued) + len(finished) + len(added)
        lost += sum(rollout_id not in rollouts or rollouts[rollout_id].input != asked for rollout_id, asked in enqueued)
        lost += sum(rollouts[rollout_id].status != "succeeded" for rollout_id in finished)
        for rollout_id, attempt_id, span_id in added:
            there = [s for s in spans[rollout_id] if (s.attempt_id, s.span_id) == (attempt_id, span_id)]
            lost += not there
            doubled += len(there) > 1
    doubled += len(by_input) - len(set(by_input))
    await store.check()
    behind = present((await store.statistics())["journal"])["operations_since_snapshot"]
    assert read_run(tmp_path / "journal").state.entries.keys() == rollouts.keys()
    back.sort()
    figure = {
        "lost": lost, "doubled": doubled, "back after s, median": round(statistics.median(back), 2),
        "p99": round(back[int(0.99 * (len(back) - 1))], 2), "claims withdrawn": sum(told[3] for told in done),
        "outcomes unknown": sum(told[4] for told in done), "operations since the snapshot": behind,
    }  # fmt: skip
    did = f"{len(back)} kills of {kills} ({', '.join(ends)}), {operations} operations of 4 processes x 4 coroutines"
    what = f"store killed under load, durability={durability!r}"
    report(row, what, figure=figure, bar="lost 0, doubled 0", met=lost == doubled == 0,
           seed=seed, did=did)  # fmt: skip
    assert operations > 20 * len(back)
