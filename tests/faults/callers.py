"""Processes for the rows of dead callers: what they do with a store until somebody kills them.

`python -m tests.faults.callers KIND ADDRESS STORE [MORE]` joins a cluster and says a line once it has got so far.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import ray

import raystore as rs
from raystore.remote import lifelines
from tests.channel import take_stdout


def say(*what: Any) -> None:
    """That it is so far, and what for."""
    channel.write(json.dumps(what) + "\n")


async def park(store: Any) -> None:
    """Wait for work, and hold what comes."""
    waiting = asyncio.ensure_future(store.dequeue_rollout(timeout=600))
    await asyncio.sleep(0)
    while not (await store.statistics())["waiters"]:  # noqa: ASYNC110 - of another process
        await asyncio.sleep(0.01)
    say(os.getpid())
    claimed = await waiting
    say(claimed.rollout_id)
    await asyncio.sleep(600)


async def hold(store: Any) -> None:
    """Hold a rollout that is never finished."""
    started = await store.start_rollout("long")
    say(os.getpid(), started.rollout_id)
    await asyncio.sleep(600)


async def hold_elsewhere(store: Any) -> None:
    """The same as if it were another machine."""
    await hold(store)


async def drive(store: Any) -> None:
    """Run a pool whose agents have begun something."""

    async def agent(task: Any, ctx: Any) -> float:
        with ctx.span("begun"):
            pass
        await asyncio.sleep(600 if task == "long" else 0)
        return 1.0

    async with rs.RunnerPool(store, agent, size=2, concurrency=2, flush_seconds=0.01):
        made = await store.enqueue_group("long", 4)
        ids = [rollout.rollout_id for rollout in made]
        while any(r.status != "running" for r in await store.query_rollouts(rollout_ids=ids)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        say(os.getpid(), *ids)
        await asyncio.sleep(600)


async def main() -> None:
    """Do what the arguments say."""
    kind, address, name, *more = sys.argv[1:]
    if kind == "hold_elsewhere":
        lifelines.here = lambda: "elsewhere"
    if address == "local":
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        store = rs.start(name, journal=more[0])
    else:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        store = rs.connect(name)
    if kind == "resume":
        began = time.monotonic()
        offered: dict[str, Any] = {}
        while len(offered) < int(more[1]):
            claimed = await store.dequeue_rollout(timeout=float(more[2]))
            if claimed is None:
                break
            offered[claimed.rollout_id] = time.monotonic() - began
        attempts = {i: [a.outcome for a in await store.query_attempts(i)] for i in offered}
        say(offered, attempts)
        return
    await {"park": park, "hold": hold, "hold_elsewhere": hold_elsewhere, "drive": drive}[kind](store)


if __name__ == "__main__":
    channel = take_stdout()
    asyncio.run(main())
