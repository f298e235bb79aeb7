"""One round of `benchmarks.against`, in a process of its own: the package is the one that PYTHONPATH names.

Prints a line of JSON, for each shape the figures of one operation: CPU in microseconds of the client's process, of the
store's and of both; of the store beyond an empty actor that takes as many calls of as many bytes; and actor calls.
Uses the public API alone, since other commits have other insides.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ray

import raystore as rs

SPAN_BYTES = 1_640  #: on the wire, of an operation that adds a span
OPERATIONS = 10  #: of a lifecycle
TRIES = 3  #: in one process; the least counts, since noise only adds

Work = Callable[[], Awaitable[Any]]


def _from_here(module: str) -> ModuleType:
    """A module of this commit that needs nothing of the package, which the other commit may not have."""
    path = Path(__file__).parent.parent / f"{module}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


shapes = _from_here("tests/support/shapes")
ray_calls = _from_here("benchmarks/ray_calls")


async def _fill(store: Any, rollouts: int) -> None:
    await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input={"task": n}) for n in range(rollouts)])


async def _spans(store: Any, rollouts: int) -> tuple[Work, int]:
    """32 coroutines, each of which adds one span after the other: batches of 32 operations."""
    await _fill(store, 32)
    desks = shapes.desks(rs.Span, "lifecycle", 32)
    for desk in desks:
        desk.address(await store.dequeue_rollout(worker_id=desk.worker_id))
    turns = max(rollouts * OPERATIONS // 32, 1)

    async def one(desk: Any) -> None:
        for turn in range(turns):
            span = desk.spans[turn % len(desk.spans)]
            span.span_id = span.context.span_id = f"{turn:016x}"
            await store.add_span(span)

    async def work() -> None:
        await asyncio.gather(*map(one, desks))

    return work, turns * 32


async def _lifecycles(store: Any, rollouts: int, shape: str, concurrency: int) -> tuple[Work, int]:
    await _fill(store, rollouts)
    desks = shapes.desks(rs.Span, shape, concurrency)

    async def work() -> None:
        await shapes.work(store, shape, desks, rollouts)

    return work, rollouts * OPERATIONS


#: Of each shape: how its work is prepared, how many rollouts it has, and whether the store is in this process.
SHAPES: dict[str, tuple[Callable[[Any, int], Awaitable[tuple[Work, int]]], int, bool]] = {
    "spans": (_spans, 1_000, False),
    "lifecycle-64": (lambda store, n: _lifecycles(store, n, "lifecycle", 64), 1_500, False),
    "lifecycle-256": (lambda store, n: _lifecycles(store, n, "lifecycle", 256), 2_000, False),
    "gathered": (lambda store, n: _lifecycles(store, n, "gathered", 1), 300, False),
    "in-process": (lambda store, n: _lifecycles(store, n, "lifecycle", 16), 1_500, True),
}


async def _measure(shape: str, store: Any, scale: float, empty: Any) -> dict[str, float]:
    """The figures of one operation."""
    prepare, rollouts, is_near = SHAPES[shape]
    work, operations = await prepare(store, max(int(rollouts * scale), 1))
    before, mine = await store.statistics(), time.process_time()
    await work()
    mine, after = time.process_time() - mine, await store.statistics()
    client = mine / operations * 1e6
    if is_near:
        return {"client": client}
    served, calls = ((after[name] - before[name]) / operations for name in ("cpu_seconds", "actor_calls"))
    served *= 1e6
    size = int(SPAN_BYTES / calls)
    parts = [b"x" * min(size - first, ray_calls.PART) for first in range(0, size, ray_calls.PART)]
    _, _, of_empty = ray_calls.measure(empty, parts)
    return {
        "client": client,
        "store": served,
        "both": client + served,
        "store beyond empty": served - of_empty * calls,
        "calls": calls,
    }


async def main(scale: float, names: list[str]) -> None:
    """Measure these shapes."""
    found = {}
    empty = ray_calls.Empty.remote()
    for name in names:
        with rs.InMemoryLightningStore() if SHAPES[name][2] else rs.start() as store:
            await _measure(name, store, scale / 8, empty)  # warms up
            tries = [await _measure(name, store, scale, empty) for _ in range(TRIES)]
            found[name] = {figure: min(one[figure] for one in tries) for figure in tries[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    logging.getLogger("raystore").setLevel(logging.ERROR)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    asyncio.run(main(float(sys.argv[1]), sys.argv[2:]))
    ray.shutdown()
