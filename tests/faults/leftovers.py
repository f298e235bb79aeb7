"""Row 59, as a program with a Ray of its own: what is there before a store and a pool, and after they are closed.

`python -m tests.faults.leftovers DIRECTORY` prints one line of JSON: for each kind, what is there that was not.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from typing import Any

import psutil
import ray

import raystore as rs
from tests.channel import take_stdout

OURS = ("raystore", "StoreActor", "RunnerActor", "Runner.", "agent")


def processes() -> set[str]:
    """Processes of this program's family, Ray's own apart."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if child.status() != psutil.STATUS_ZOMBIE and any(word in title for word in OURS):
            found.add(f"{child.pid} {title[:80]}")
    return found


def there() -> dict[str, set[str]]:
    """What could be left over, by kind."""
    return {
        "processes": processes(),
        "names": {f"{actor['namespace']}/{actor['name']}" for actor in ray.util.list_named_actors(all_namespaces=True)},
        "threads": {thread.name for thread in threading.enumerate() if "raystore" in thread.name},
        "temporary files": {name for name in os.listdir(tempfile.gettempdir()) if "raystore" in name},
    }


async def agent(task: Any, ctx: Any) -> float:
    return 1.0


async def work(journal: str) -> set[str]:
    """Use all that may leave something behind, and close it."""
    seen = set()
    for number in range(2):
        store = rs.start(f"left-{number}", journal=f"{journal}/{number}", detached=number == 1)
        async with rs.RunnerPool(store, agent, size=2, isolation="process" if number else "actor"):
            made = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=n) for n in range(20)])
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in made], timeout=60)
            seen |= processes()
        if number:
            rs.stop(store)
        store.close()
    return seen


def main(journal: str) -> dict[str, Any]:
    shared = set(os.listdir("/dev/shm"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    before = there()
    seen = asyncio.run(work(journal))
    deadline = time.monotonic() + 15
    while (after := there()) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    left = {kind: sorted(after[kind] - before[kind]) for kind in before}
    ray.shutdown()
    while (more := set(os.listdir("/dev/shm")) - shared) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left | {"shared memory": sorted(more), "seen while it worked": len(seen)}


if __name__ == "__main__":
    channel = take_stdout()
    print(json.dumps(main(sys.argv[1])), file=channel)
