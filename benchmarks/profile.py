"""Where the time of a row goes: py-spy samples its processes, and the samples are sorted by what they belong to.

Run `python -m benchmarks.profile [WORK]`; there are 64 and 256 (coroutines of row 1), sequential and pool (row 3),
spans (4), in-process (7), evicting (13), queue and queue-bulk (18), journal (21) and batches (25). Only threads that
hold the interpreter's lock are sampled; what Ray does in threads of its own shows in the CPU time of each thread: the
busiest one runs the event loop, and with it our code. Writes `runs/profile-WORK-PROCESS.txt` as collapsed stacks,
which any flame graph tool reads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import ray

import raystore as rs
from benchmarks.durability import _folder
from benchmarks.ingest import IN_FLIGHT, _addressed
from benchmarks.parties import enqueue
from tests.support import shapes

SECONDS, RATE = 8, 500

#: What a stack belongs to: the first of these that appears anywhere in it.
KINDS = {
    "encode, decode": ("raystore/wire/convert.py", "raystore/wire/codec.py"),
    "pack, unpack frames": ("raystore/wire/frames.py",),
    "journal": ("raystore/journal/",),
    "core": ("raystore/core/",),
    "service": ("raystore/service/",),
    "server session and actor": ("remote/server_session.py", "remote/actor.py"),
    "session": ("remote/", "raystore/client/transport.py", "raystore/client/local.py"),
    "methods and caller": ("raystore/client/", "raystore/runner/", "tests/support/shapes.py", "benchmarks/"),
    "Ray, Python": ("ray/",),
    "asyncio": ("asyncio/",),
}  # fmt: skip


@dataclass
class Work:
    """What is profiled, a round at a time: what is made ready for it, how many of something it does, and where."""

    store: Any
    prepare: Callable[[], Awaitable[Any]]
    round: Callable[[], Awaitable[int]]
    pids: dict[str, int]


async def _nothing() -> None:
    pass


def _pids(store: rs.RayLightningStore) -> dict[str, int]:
    return {"client": os.getpid(), "store": ray.get(store.actor.describe.remote())["pid"]}


async def lifecycles(stack: ExitStack, coroutines: int, shape: str = "lifecycle", *, journal: bool = False) -> Work:
    """Rows 1, 3 (a) and 21."""
    options: dict[str, Any] = {"journal": stack.enter_context(_folder()) / "j"} if journal else {}
    store = stack.enter_context(rs.start(**options))
    workers = shapes.desks(rs.Span, shape, coroutines)
    rollouts = 4000 if coroutines > 1 else 400

    async def round() -> int:
        await shapes.work(store, shape, workers, rollouts)
        return rollouts

    return Work(store, lambda: enqueue(store, rollouts), round, _pids(store))


async def pool(stack: ExitStack) -> Work:
    """Row 3 (b)."""
    store = stack.enter_context(rs.start())
    (desk,) = shapes.desks(rs.Span, "gathered", 1)
    spans = desk.spans

    async def agent(task: Any, ctx: Any) -> None:
        for span in spans:
            ctx.add(span)

    runners = stack.enter_context(rs.RunnerPool(store, agent, size=1, concurrency=1))

    async def round() -> int:
        await store.wait_for_rollouts(rollout_ids=await enqueue(store, 800))
        return 800

    await round()
    (pid,) = ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in runners.actors])
    return Work(store, _nothing, round, _pids(store) | {"client": pid})


async def spans(stack: ExitStack) -> Work:
    """Row 4."""
    store = stack.enter_context(rs.start())
    (desk,) = shapes.desks(rs.Span, "lifecycle", 1)
    lists: list[list[Any]] = []

    async def prepare() -> None:
        await store.delete_rollouts([rollout.rollout_id for rollout in await store.query_rollouts()])
        lists[:] = (await _addressed(store, desk.spans, 48, 512))[0]

    async def one() -> None:
        while lists:
            await store.add_many_spans(lists.pop())

    async def round() -> int:
        await asyncio.gather(*(one() for _ in range(IN_FLIGHT)))
        return 48 * 512

    return Work(store, prepare, round, _pids(store))


async def batches(stack: ExitStack) -> Work:
    """Row 25: spans of 32 coroutines."""
    store = stack.enter_context(rs.start())
    desks = shapes.desks(rs.Span, "lifecycle", 32)

    async def prepare() -> None:
        await store.delete_rollouts([rollout.rollout_id for rollout in await store.query_rollouts()])
        for desk in desks:
            desk.address(await store.start_rollout("batches"))

    async def one(desk: shapes.Desk) -> None:
        for turn in range(300):
            span = desk.spans[turn % shapes.SPANS]
            span.span_id = span.context.span_id = f"{turn:016x}"
            await store.add_span(span)

    async def round() -> int:
        await asyncio.gather(*map(one, desks))
        return 32 * 300

    return Work(store, prepare, round, _pids(store))


async def in_process(stack: ExitStack) -> Work:
    """Row 7; copying the spans counts, too."""
    store = stack.enter_context(rs.InMemoryLightningStore())
    workers = shapes.desks(rs.Span, "lifecycle", 16)

    async def prepare() -> None:
        await store.delete_rollouts([rollout.rollout_id for rollout in await store.query_rollouts()])
        await enqueue(store, 4000)

    async def round() -> int:
        await shapes.work_in_process(store, workers, 4000)
        return 4000

    return Work(store, prepare, round, {"client": os.getpid()})


async def evicting(stack: ExitStack) -> Work:
    """Row 13."""
    store = stack.enter_context(rs.start(eviction_memory_threshold=512 * 2**20))
    (desk,) = shapes.desks(rs.Span, "lifecycle", 1)

    async def feed() -> None:
        rollout = await store.start_rollout("bulk")
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        await store.add_many_spans([shapes.renamed(desk.spans[n % 8], f"{n:016x}", **ids) for n in range(64)])
        await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")

    async def round() -> int:
        for _ in range(20):
            await asyncio.gather(*(feed() for _ in range(32)))
        return 20 * 32 * 64

    return Work(store, _nothing, round, _pids(store))


async def queue(stack: ExitStack, *, in_bulk: bool) -> Work:
    """Row 18."""
    store = stack.enter_context(rs.start())
    task = shapes.words(random.Random(1), 1000)

    requests = [rs.EnqueueRolloutRequest(input=task) for _ in range(5000)]

    async def prepare() -> None:
        await store.delete_rollouts([rollout.rollout_id for rollout in await store.query_rollouts()])

    async def bulk() -> int:
        await store.enqueue_many_rollouts(requests)
        return len(await store.dequeue_many_rollouts(limit=len(requests)))

    async def caller() -> None:
        for _ in range(32):
            await store.enqueue_rollout(task)
            await store.dequeue_rollout(timeout=10)

    async def single() -> int:
        await asyncio.gather(*(caller() for _ in range(64)))
        return 64 * 32

    return Work(store, prepare, bulk if in_bulk else single, _pids(store))


WORKS: dict[str, Callable[[ExitStack], Awaitable[Work]]] = {
    "64": lambda stack: lifecycles(stack, 64),
    "256": lambda stack: lifecycles(stack, 256),
    "sequential": lambda stack: lifecycles(stack, 1, "gathered"),
    "pool": pool,
    "spans": spans,
    "in-process": in_process,
    "evicting": evicting,
    "queue": lambda stack: queue(stack, in_bulk=False),
    "queue-bulk": lambda stack: queue(stack, in_bulk=True),
    "journal": lambda stack: lifecycles(stack, 64, journal=True),
    "batches": batches,
}


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


async def measured(work: Work, seconds: float) -> str:
    """Rounds for so long: wall and CPU of each of what they do, of the three busiest threads and all others."""
    taken: dict[str, dict[str, float]] = {name: {} for name in work.pids}
    count, calls, wall, until = 0, 0, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        await work.prepare()
        calls -= (await work.store.statistics())["actor_calls"]
        before, started = {name: cpu_by_thread(pid) for name, pid in work.pids.items()}, time.perf_counter()
        count += await work.round()
        wall += time.perf_counter() - started
        for name, pid in work.pids.items():
            for task, cpu in cpu_by_thread(pid).items():
                taken[name][task] = taken[name].get(task, 0.0) + cpu - before[name].get(task, 0.0)
        calls += (await work.store.statistics())["actor_calls"] - 1
    said = []
    for name, threads in taken.items():
        most = sorted(threads.values(), reverse=True)
        figures = (f"{cpu / count * 1e6:,.1f}" for cpu in (*most[:3], sum(most[3:])))
        said.append(f"{name} {' + '.join(figures)}")
    return (
        f"{wall / count * 1e6:,.1f} us and {calls / count:.3g} actor calls each; us of CPU of the three busiest "
        f"threads + all others: {', '.join(said)}"
    )


async def main(name: str, runs: Path) -> None:
    """Profile the processes while they work."""
    with ExitStack() as stack:
        work = await WORKS[name](stack)
        await measured(work, 2)  # warms up
        print(f"{name}: {await measured(work, 4)}")
        spies = []
        for process, pid in work.pids.items():
            output = runs / f"profile-{name}-{process}.txt"
            command = ["record", "-d", SECONDS, "-r", RATE, "--gil", "-t", "-f", "raw", "-o", output, "-p", pid]
            spy = Path(sys.executable).parent / "py-spy"
            spies.append(await asyncio.create_subprocess_exec(spy, *map(str, command), stdout=PIPE, stderr=PIPE))
        await measured(work, SECONDS)
        for spying in spies:
            await spying.communicate()
    for process in work.pids:
        shares = sort(runs / f"profile-{name}-{process}.txt")
        print(f"{process}: " + ", ".join(f"{kind} {share:.0f} %" for kind, share in shares.items()))


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "64"
    if name not in WORKS:
        sys.exit(f"{name!r} is none of {', '.join(WORKS)}")
    logging.getLogger("raystore").setLevel(logging.WARNING)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    asyncio.run(main(name, folder))
    ray.shutdown()
