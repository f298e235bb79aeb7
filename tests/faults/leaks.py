"""Row 60, as a program of its own, so that any Python can run it: calls in number, and what memory grew by.

`python -m tests.faults.leaks CALLS` prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import platform
import sys
from typing import Any

import psutil
import ray

import raystore as rs
from tests.channel import take_stdout


async def call(store: Any, count: int) -> None:
    """So many calls of four kinds, none of which leaves anything in the store, from 64 coroutines."""

    async def one(number: int) -> None:
        rollout = await store.start_rollout("x", worker_id=f"w{number}")
        ids = rollout.rollout_id, rollout.attempt.attempt_id
        for _ in range(count // 64 // 4):
            await store.get_rollout_by_id(ids[0])
            await store.update_worker(f"w{number}", {"load": 0.5})
            await store.get_next_span_sequence_id(*ids)
            await store.wait_for_rollouts(rollout_ids=[ids[0]], timeout=0)
        await store.update_attempt(*ids, status="succeeded")
        await store.delete_rollouts([ids[0]])

    await asyncio.gather(*(one(number) for number in range(64)))


async def main(count: int) -> dict[str, Any]:
    with rs.start() as store:
        pid = (await store.actor.describe.remote())["pid"]

        def rss() -> list[int]:
            gc.collect()
            return [psutil.Process(of).memory_info().rss for of in (pid, psutil.Process().pid)]

        await call(store, max(count // 10, 2_000))  # what it takes to run at all
        before = rss()
        await call(store, count)
        grown = [(after - start) / 2**20 for after, start in zip(rss(), before, strict=True)]
    return {"python": platform.python_version(), "calls": count, "store_mib": grown[0], "client_mib": grown[1]}


if __name__ == "__main__":
    channel = take_stdout()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print(json.dumps(asyncio.run(main(int(sys.argv[1])))), file=channel)
    ray.shutdown()
