"""Where the time of a lifecycle goes: py-spy samples both processes, and the samples are sorted by what they belong to.

Run `python -m benchmarks.profile [COROUTINES]`. Only threads that hold the interpreter's lock are sampled; what Ray
does in threads of its own shows in the CPU time of each thread: the busiest one runs the event loop, and with it our
code. Writes `runs/profile-client.txt` and `runs/profile-store.txt` as collapsed stacks, which any flame graph tool
reads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import ray

import raystore as rs
from benchmarks.parties import enqueue
from tests.support import shapes

SECONDS, RATE = 4, 500
ROLLOUTS = 4000

#: What a stack belongs to: the first of these that appears anywhere in it.
KINDS = {
    "encode, decode": ("raystore/wire/convert.py", "raystore/wire/codec.py"),
    "pack, unpack frames": ("raystore/wire/frames.py",),
    "core": ("raystore/core/",),
    "service": ("raystore/service/",),
    "server session and actor": ("remote/server_session.py", "remote/actor.py"),
    "session": ("remote/", "raystore/client/transport.py"),
    "methods and caller": ("raystore/client/", "tests/support/shapes.py"),
    "Ray, Python": ("ray/",),
    "asyncio": ("asyncio/",),
}  # fmt: skip


def sort(path: Path) -> dict[str, float]:
    """Percent of the samples for each kind."""
    counts: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        kind = next((kind for kind, marks in KINDS.items() if any(mark in stack for mark in marks)), "Ray, native")
        counts[kind] += int(samples)
    total = sum(counts.values())
    return {kind: 100 * samples / total for kind, samples in counts.most_common()}


def cpu_by_thread(pid: int) -> dict[str, float]:
    """Seconds of CPU so far, by id of the thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def busiest(before: dict[str, float], after: dict[str, float]) -> str:
    """What the busiest threads took meanwhile, and all others, for each rollout."""
    taken = sorted((seconds - before.get(thread, 0.0) for thread, seconds in after.items()), reverse=True)
    figures = [*taken[:3], sum(taken[3:])]
    return " + ".join(f"{seconds / ROLLOUTS * 1e6:.0f}" for seconds in figures)


async def main(coroutines: int, runs: Path) -> None:
    """Profile both sides while lifecycles run."""
    with rs.start() as store:
        workers = shapes.desks(rs.Span, "lifecycle", coroutines)
        pids = {"client": os.getpid(), "store": ray.get(store.actor.describe.remote())["pid"]}

        async def measured() -> str:
            await enqueue(store, ROLLOUTS)
            before, threads = await store.statistics(), {name: cpu_by_thread(pid) for name, pid in pids.items()}
            wall = await shapes.work(store, "lifecycle", workers, ROLLOUTS) / ROLLOUTS * 1e6
            client, served = (busiest(threads[name], cpu_by_thread(pid)) for name, pid in pids.items())
            calls = ((await store.statistics())["actor_calls"] - before["actor_calls"]) / ROLLOUTS
            return (
                f"{coroutines} coroutines: {1e6 / wall:,.0f} rollouts/s; a rollout takes {wall:.0f} us and {calls:.2f} "
                f"actor calls; us of CPU of the three busiest threads + all others: client {client}, store {served}"
            )

        await measured()
        print(await measured())
        spies = []
        for name, pid in pids.items():
            output = runs / f"profile-{name}.txt"
            command = ["record", "-d", SECONDS, "-r", RATE, "--gil", "-t", "-f", "raw", "-o", output, "-p", pid]
            spy = Path(sys.executable).parent / "py-spy"
            spies.append(await asyncio.create_subprocess_exec(spy, *map(str, command), stdout=PIPE, stderr=PIPE))
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            await measured()
        for spying in spies:
            await spying.communicate()
    for name in pids:
        shares = sort(runs / f"profile-{name}.txt")
        print(f"{name}: " + ", ".join(f"{kind} {share:.0f} %" for kind, share in shares.items()))


if __name__ == "__main__":
    logging.getLogger("raystore").setLevel(logging.WARNING)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 64, folder))
    ray.shutdown()
