"""What is measured: the memory of a process, how long its loop stood still, and percentiles.

Not here: what the store itself counts (`statistics`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any


def peak_bytes(pid: int) -> int:
    """The most that a process was resident since `forget_peak`."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def forget_peak(pid: int) -> None:
    """Begin anew with what `peak_bytes` says."""
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")


def watch_loop(actor: Any) -> None:
    """In the actor: start to note how late the loop comes back to a task that sleeps a millisecond at a time."""

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            actor.longest_pause = max(actor.longest_pause, time.perf_counter() - before - 0.001)

    actor.longest_pause = 0.0
    actor.watching = asyncio.run_coroutine_threadsafe(watch(), actor._service._alarm._loop)


def longest_pause(actor: Any) -> float:
    """In the actor: seconds since `watch_loop`, which ends."""
    actor.watching.cancel()
    return float(actor.longest_pause)


def percentile(values: list[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]
