"""Rows 21 to 24: what a journal costs, how soon a store is back, and what a snapshot does to those who wait."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import raystore as rs
from benchmarks.journals import write_snapshot
from benchmarks.lifecycles import LIFECYCLE, lifecycle_rate
from benchmarks.scope import Scope
from benchmarks.table import Line, alternate, at_least, at_most, bound, compare
from raystore.types.options import Durability
from tests.support import shapes

LEVELS: tuple[Durability, ...] = ("power", "process", "none")


@contextmanager
def _folder() -> Iterator[Path]:
    """A directory on a disk, not in memory."""
    path = Path(tempfile.mkdtemp(prefix="journal-", dir=Path.cwd()))
    try:
        yield path
    finally:
        shutil.rmtree(path)


async def throughput(scope: Scope) -> list[Line]:
    """Row 21."""
    with ExitStack() as stack:
        folder = stack.enter_context(_folder())
        stores: dict[str, rs.RayLightningStore] = {
            level: stack.enter_context(rs.start(journal=folder / level, durability=level)) for level in LEVELS
        }
        stores["no journal"] = stack.enter_context(rs.start())
        workers = shapes.desks(rs.Span, "lifecycle", 64)
        many = scope.amount(4096)
        samples = await alternate(
            scope.rounds, {level: lifecycle_rate(store, workers, many) for level, store in stores.items()}
        )
    did = f"{LIFECYCLE}; 64 coroutines; {many} rollouts a round"
    return [
        compare(21, f"lifecycle, journal {level!r}", samples, "no journal", at_least(0.7), unit="rollouts/s",
                did=did, ours=level)
        for level in LEVELS
    ]  # fmt: skip


def _syncs(path: Path, count: int) -> list[float]:
    """Seconds of an append with fdatasync, each."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(fd, 0, 1 << 20)
    took = []
    for number in range(count):
        started = time.perf_counter()
        os.pwrite(fd, bytes(200), number * 200)
        os.fdatasync(fd)
        took.append(time.perf_counter() - started)
    os.close(fd)
    return took


async def single(scope: Scope) -> list[Line]:
    """Row 22."""
    count = scope.amount(1000)
    extra = []
    with _folder() as folder, rs.start(journal=folder / "j") as durable, rs.start() as plain:

        async def one(store: rs.RayLightningStore) -> float:
            took = []
            for _ in range(count):
                started = time.perf_counter()
                await store.enqueue_rollout("x")
                took.append(time.perf_counter() - started)
            return statistics.median(took) * 1000

        for _ in range(scope.rounds):
            sync = statistics.median(_syncs(folder / "plain", count)) * 1000
            extra.append(await one(durable) - await one(plain) - sync)
    did = f"{count} enqueues a round, one at a time; medians; beyond one write and fdatasync of the same disk"
    return [bound(22, "single call, journal 'power'", extra, at_most(0.5, "ms"), did=did)]


_OPEN = """
import gc, sys, time
gc.disable()
from raystore.types.options import StoreConfig, resolve
from raystore.journal.opening import open_journal
config = StoreConfig(journal=sys.argv[1])
started = time.perf_counter()
opened = open_journal(config, resolve(config, 2**34), name=None, resume="must", now=time.time())
print(time.perf_counter() - started, len(opened.state.entries), opened.state.spans.count, flush=True)
"""


def _open(path: Path) -> list[str]:
    """Open a journal in a new process: seconds, rollouts, spans."""
    command = [sys.executable, "-c", _OPEN, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


async def recovery(scope: Scope) -> list[Line]:
    """Row 23."""
    lines = []
    for rollouts, seconds in ((100_000, 1.5), (1_000_000, 6.0)):
        count = scope.amount(rollouts) if rollouts == 100_000 else rollouts
        did = f"{count:,} rollouts with 8 spans each, a tenth of them unfinished: snapshot to a state, in a new process"
        goal = at_most(seconds, "s")
        if rollouts > 100_000 and not scope.long:
            lines.append(Line(23, "recovery", "-", "bound", None, None, str(goal), None, did + " (--long)"))
            continue
        with _folder() as folder:
            write_snapshot(folder / "j", count)
            took = []
            for _ in range(scope.rounds):
                shutil.copytree(folder / "j", folder / "copy")
                found = await asyncio.to_thread(_open, folder / "copy")
                assert found[1:] == [str(count), str(8 * count)], found
                took.append(float(found[0]))
                shutil.rmtree(folder / "copy")
        lines.append(bound(23, "recovery", took, goal, did=did))
    return lines


async def pauses(scope: Scope) -> list[Line]:
    """Row 24."""
    rounds, many = scope.rounds, scope.amount(8192)
    longest = []
    with _folder() as folder, rs.start(journal=folder / "j") as store:
        workers = shapes.desks(rs.Span, "lifecycle", 64)
        made = 0
        for _ in range(rounds):
            await lifecycle_rate(store, workers, many)()
            known = (await store.statistics())["journal"]
            assert known is not None
            made = known["snapshots"]
            longest.append(known["longest_pause_seconds"] * 1000)
    did = f"{LIFECYCLE}; 64 coroutines; {rounds} x {many} rollouts, {made} snapshots; the longest step for them"
    return [bound(24, "pause for a snapshot", longest, at_most(20, "ms"), did=did)]


ROWS = {21: throughput, 22: single, 23: recovery, 24: pauses}
