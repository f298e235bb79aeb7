"""What a call of Ray's costs by itself: an empty async actor, by the bytes of a call and how they are cut.

Run `python -m benchmarks.ray_calls`. The sizes of batches in `raystore/remote` were set by this.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import ray

PART = 96_000
CALLS, WINDOW = 300, 2


class _Empty:
    """An actor that does nothing."""

    async def take(self, *parts: bytes) -> bytes:
        """Take bytes."""
        return b""

    async def cpu_seconds(self) -> float:
        """Of its process so far."""
        return time.process_time()


Empty: Any = ray.remote(num_cpus=0, enable_task_events=False, max_concurrency=1000)(_Empty)


def measure(actor: Any, parts: list[bytes]) -> tuple[float, float, float]:
    """Microseconds of a call: wall, CPU of the caller, CPU of the actor; two calls are under way at once."""
    ray.get(actor.take.remote(*parts))
    theirs, mine, started = ray.get(actor.cpu_seconds.remote()), time.process_time(), time.perf_counter()
    pending: list[Any] = []
    for _ in range(CALLS):
        pending.append(actor.take.remote(*parts))
        if len(pending) == WINDOW:
            ray.get(pending.pop(0))
    ray.get(pending)
    wall, mine = time.perf_counter() - started, time.process_time() - mine
    theirs = ray.get(actor.cpu_seconds.remote()) - theirs
    return wall / CALLS * 1e6, mine / CALLS * 1e6, theirs / CALLS * 1e6


if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    empty = Empty.remote()
    measure(empty, [b""])  # warms up
    print("| KB | wall, one argument | wall, in parts | caller CPU, one | in parts | actor CPU, one | in parts |")
    print("|---|---|---|---|---|---|---|")
    for count in (0, 1, 2, 4, 8, 11, 16):
        data = b"x" * PART
        rounds = [(measure(empty, [data * count]), measure(empty, [data] * count)) for _ in range(3)]
        whole, cut = (tuple(map(median, zip(*side, strict=True))) for side in zip(*rounds, strict=True))
        pairs = " | ".join(f"{a:,.0f} | {b:,.0f}" for a, b in zip(whole, cut, strict=True))
        print(f"| {count * PART / 1000:,.0f} | {pairs} |")
    ray.shutdown()
