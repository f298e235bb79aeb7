"""Rows 11, 12 and 13: what a stored span takes, whether the store knows it, and whether eviction keeps its word.

`python -m benchmarks.memory ROLLOUTS SPANS` prints the bytes of a stored span in a process of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from contextlib import ExitStack, closing
from typing import Any

import psutil
import ray

import raystore as rs
from benchmarks.parties import Program, has_peers, in_own_process
from benchmarks.scope import Scope
from benchmarks.table import Line, at_most, bound, compare, figure
from tests.support import shapes
from tests.support.measure import forget_peak, longest_pause, peak_bytes, watch_loop

ROLLOUTS, SPANS = 800, 10


async def grow(rollouts: int, spans: int) -> float:
    """Bytes of this process for each span that the store keeps in it."""
    store = rs.InMemoryLightningStore()
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input={"task": n}) for n in range(rollouts)])
    gc.collect()
    before = psutil.Process().memory_info().rss
    await shapes.fill(store, rs.Span, rollouts, spans)
    gc.collect()
    return (psutil.Process().memory_info().rss - before) / (rollouts * spans)


async def per_span(scope: Scope) -> list[Line]:
    """Row 11."""
    samples: dict[str, list[float]] = {"ours": [], "agl-memory": []}
    for _ in range(scope.rounds):
        samples["ours"].append(await in_own_process("memory", ROLLOUTS, SPANS))
        if has_peers():
            with closing(Program("work")) as agl:
                samples["agl-memory"].append(await agl.ask("grow", rollouts=ROLLOUTS, spans=SPANS))
    did = f"growth of RSS over {ROLLOUTS * SPANS:,} spans of 1.6 KB, in process, a new process each round"
    return [compare(11, "memory of a span", samples, "agl-memory", at_most(0.35), unit="bytes", did=did)]


async def accounted(scope: Scope) -> list[Line]:
    """Row 12."""
    off = []
    sizes = ""
    for _ in range(1 if scope.quick else 3):
        counted, grown = await in_own_process("accounting", "mixed, 200 B to 64 KB")
        off.append(abs(counted / grown - 1) * 100)
        sizes = f"accounted {figure(counted / 1e6, 'MB')}, grown {figure(grown / 1e6, 'MB')}"
    did = f"100,000 spans of 200 B to 64 KB in 5,000 rollouts; {sizes}"
    return [bound(12, "accounted bytes against RSS", off, at_most(10, "%"), did=did, against="growth of RSS")]


async def evicting(scope: Scope) -> list[Line]:
    """Row 13."""
    threshold = scope.amount(512) * 2**20
    fed = 0
    peaks, pauses = [], []
    with ExitStack() as stack:
        store: Any = stack.enter_context(rs.start(eviction_memory_threshold=threshold))
        pid = ray.get(store.actor.describe.remote())["pid"]
        idle = psutil.Process(pid).memory_info().rss
        forget_peak(pid)
        await store.actor.__ray_call__.remote(watch_loop)
        (desk,) = shapes.desks(rs.Span, "lifecycle", 1)

        async def feed() -> int:
            rollout = await store.start_rollout("bulk")
            ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
            spans = [shapes.renamed(desk.spans[n % 8], f"{n:016x}", **ids) for n in range(64)]
            await store.add_many_spans(spans)
            await store.update_attempt(*ids.values(), status="succeeded")
            return 64 * 1800

        while fed < 4 * threshold:
            fed += sum(await asyncio.gather(*(feed() for _ in range(32))))
        known = await store.statistics()
        peaks.append((peak_bytes(pid) - idle) / threshold)
        pauses.append(await store.actor.__ray_call__.remote(longest_pause) * 1000)
    did = (
        f"{fed / 2**20:,.0f} MiB of spans of 1.6 KB against a threshold of {threshold / 2**20:,.0f} MiB; "
        f"{known['eviction_passes']} passes evicted {known['evicted_spans']:,} spans"
    )
    return [
        bound(
            13, "peak RSS over the idle actor", peaks, at_most(1.1, "of the threshold"), did=did, against="threshold"
        ),
        bound(13, "longest pause of the loop", pauses, at_most(20, "ms"), did=did),
    ]


ROWS = {11: per_span, 12: accounted, 13: evicting}

if __name__ == "__main__":
    print(json.dumps(asyncio.run(grow(int(sys.argv[1]), int(sys.argv[2])))))
