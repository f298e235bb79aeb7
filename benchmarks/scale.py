"""Rows 9, 10 and 19: what a million rollouts cost, standing and passing through.

`python -m benchmarks.scale ROUNDS ROLLOUTS` measures rows 9 and 10 in a process of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import raystore as rs
from benchmarks.parties import in_own_process
from benchmarks.scope import Scope
from benchmarks.table import Line, at_most, bound, compare
from raystore.remote.actor import COLLECTOR_THRESHOLDS

LARGE, SMALL = 1_000_000, 1_000
MATCHES = 20  #: of every query, whatever the size
CONFIG = rs.RolloutConfig(timeout_seconds=86_400, unresponsive_seconds=86_400)


async def _filled(rollouts: int) -> rs.InMemoryLightningStore:
    """A store with so many rollouts, a tenth of them running, and `MATCHES` for each query."""
    store = rs.InMemoryLightningStore()
    marked: list[dict[str, Any]] = [{"group_id": "wanted"}, {"tags": {"kind": "wanted"}}, {"queue": "wanted"}]
    for more in marked:
        await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=0, **more) for _ in range(MATCHES)])
    claimed = list(await store.dequeue_many_rollouts(limit=MATCHES, worker_id="wanted", queues=("wanted",)))
    for rollout in claimed:
        await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    for first in range(0, rollouts, 10_000):
        numbers = range(first, min(first + 10_000, rollouts))
        requests = [
            rs.EnqueueRolloutRequest(
                input=number, config=CONFIG, group_id=f"g{number // 8}", tags={"kind": f"t{number % 5}"}
            )
            for number in numbers
        ]  # fmt: skip
        await store.enqueue_many_rollouts(requests)
        running = await store.dequeue_many_rollouts(limit=len(numbers) // 10, worker_id=f"w{first}")
        for rollout in running:
            await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="running")
    return store


async def _operations(store: rs.InMemoryLightningStore, rollouts: int) -> float:
    """Microseconds of an operation of a life: enqueue, claim, two spans, a look, success."""
    config = CONFIG
    ids = []
    started = time.perf_counter()
    for _ in range(rollouts):
        made = await store.enqueue_rollout("task", config=config, queue="measured")
        claimed = await store.dequeue_rollout("worker", queues=("measured",))
        assert claimed is not None
        for number in (1, 2):
            await store.add_span(
                rs.Span.from_attributes(
                    attributes={"k": number},
                    rollout_id=claimed.rollout_id,
                    attempt_id=claimed.attempt.attempt_id,
                    sequence_id=number,
                )
            )
        await store.get_rollout_by_id(made.rollout_id)
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
        ids.append(made.rollout_id)
    seconds = time.perf_counter() - started
    await store.delete_rollouts(ids)
    return seconds / (rollouts * 6) * 1e6


async def _queries(store: rs.InMemoryLightningStore) -> dict[str, Callable[[], Awaitable[Any]]]:
    """The queries that users make, each with `MATCHES` matches."""
    ids = [rollout.rollout_id for rollout in await store.query_rollouts(group_id="wanted")]
    finished = (await store.query_rollouts(status_in=["succeeded"]))[0].rollout_id
    return {
        "by id": lambda: store.query_rollouts(rollout_id_in=ids),
        "by status": lambda: store.query_rollouts(status_in=["succeeded"]),
        "by group": lambda: store.query_rollouts(group_id="wanted"),
        "by tag": lambda: store.query_rollouts(tags={"kind": "wanted"}),
        "by worker": lambda: store.query_rollouts(worker_id="wanted"),
        "latest attempt": lambda: store.get_latest_attempt(finished),
        "latest rollouts": lambda: store.query_rollouts(sort_by="start_time", sort_order="desc", limit=MATCHES),
    }


async def measure(rounds: int, rollouts: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds, by name and size of the store."""
    small, large = await _filled(SMALL), await _filled(rollouts)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    taken: dict[str, dict[str, list[float]]] = {"an operation": {"ours": [], "small": []}}
    for number in range(rounds + 1):
        for size, store in (("ours", large), ("small", small)):
            value = await _operations(store, 1000)
            if number:
                taken["an operation"][size].append(value)
    queries = {"ours": await _queries(large), "small": await _queries(small)}
    for name in queries["small"]:
        taken[name] = {"ours": [], "small": []}
        for number in range(rounds + 1):
            for size, by_name in queries.items():
                times = []
                for _ in range(20):
                    started = time.perf_counter()
                    await by_name[name]()
                    times.append((time.perf_counter() - started) * 1e6)
                if number:
                    taken[name][size].append(statistics.median(times))
    return taken


_measured: dict[str, dict[str, list[float]]] = {}  # filling a store with a million rollouts takes a minute


async def _measure_once(scope: Scope) -> dict[str, dict[str, list[float]]]:
    if not _measured:
        _measured.update(await in_own_process("scale", scope.rounds, scope.amount(LARGE)))
    return _measured


async def operations(scope: Scope) -> list[Line]:
    """Row 9."""
    taken = (await _measure_once(scope))["an operation"]
    large = scope.amount(LARGE)
    did = f"enqueue, claim, 2 spans, get, succeed; {large:,} rollouts and {large // 10:,} running against 1,000 and 100"
    return [compare(9, "an operation at scale", taken, "small", at_most(1.25), unit="µs", did=did)]


async def queries(scope: Scope) -> list[Line]:
    """Row 10."""
    taken = await _measure_once(scope)
    did = f"{MATCHES} matches among {scope.amount(LARGE):,} rollouts against as many among 1,000"
    return [
        compare(10, f"query {name}", samples, "small", at_most(2), unit="µs", did=did)
        for name, samples in taken.items()
        if name != "an operation"
    ]


async def flat(scope: Scope) -> list[Line]:
    """Row 19."""
    total = 1_000_000 if scope.long else scope.amount(300_000)
    per_turn, kept = 1000, 5_000
    resident: list[tuple[int, int]] = []
    started = time.perf_counter()
    with rs.start(retention={"max_rollouts": kept}) as store:
        template = rs.Span.from_attributes(attributes={"text": "x" * 100}, name="step")
        for turn in range(total // per_turn):
            await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=n) for n in range(per_turn)])
            claimed = await store.dequeue_many_rollouts(limit=per_turn)
            spans = [
                template.model_copy(update={"rollout_id": c.rollout_id, "attempt_id": c.attempt.attempt_id})
                for c in claimed
            ]
            await store.add_many_spans(spans)
            await asyncio.gather(
                *(store.update_attempt(c.rollout_id, c.attempt.attempt_id, status="succeeded") for c in claimed)
            )
            await store.release([c.rollout_id for c in claimed])
            if turn % 5 == 4:
                resident.append(((turn + 1) * per_turn, (await store.statistics())["rss_bytes"] or 0))
        rate = total / (time.perf_counter() - started)
    warm = [point for point in resident if point[0] > total / 3]
    slope = statistics.linear_regression(*zip(*warm, strict=True)).slope * 100_000 / 2**20
    did = (
        f"{total:,} rollouts with a span of 200 B each through a store that keeps {kept:,}, {rate:,.0f} rollouts/s; "
        f"RSS {resident[0][1] / 2**20:.0f} MiB at first, {resident[-1][1] / 2**20:.0f} MiB at last"
    )
    return [bound(19, "growth per 100,000 rollouts", [slope], at_most(1, "MiB"), did=did)]


ROWS = {9: operations, 10: queries, 19: flat}

if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int(sys.argv[1]), int(sys.argv[2])))))
