"""How true the accounted bytes are: fills a core with spans as they come from the wire, and compares with the RSS.

Run `python -m benchmarks.accounting`; each case runs in a process of its own. The overheads in `raystore/core/spans.py`
and `rollouts.py` were set by this, and row 12 is its mixed case.
"""

import gc
import json
import os
import random
import subprocess
import sys
from typing import Any

import psutil

from raystore.core import verbs
from raystore.core.state import Session, Settings, State, Step
from raystore.wire import frames

CASES = {  # sizes of span bodies, rollouts, spans of each
    "small spans": ([200], 10_000, 10),
    "1.6 KB spans": ([1600], 10_000, 10),
    "mixed, 200 B to 64 KB": ([200, 1000, 4000, 16_000, 64_000], 5000, 20),
    "one span each": ([200], 50_000, 1),
    "no spans": ([200], 50_000, 0),
}


def from_wire(verb: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """An operation as the actor gets it."""
    operation: tuple[str, dict[str, Any]] = frames.unpack(frames.pack_operation(verb, arguments)[0], [])
    return operation


def fill(sizes: list[int], rollouts: int, spans: int) -> tuple[int, int]:
    """Accounted bytes, and growth of the process."""
    state = State(Settings(10**12, 10**11))
    session = state.sessions["s"] = Session("s", 0.0)
    rng = random.Random(0)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for number in range(rollouts):
        request = {"input": b"\x01" + b"x" * 200, "metadata": b"\x01\x80"}
        operation = from_wire("start_rollout", {"request": request, "worker_id": None})
        rollout, attempt = verbs.run(state, Step(1.0, 1.0, seed=2 * number, session=session), *operation)
        if not spans:
            continue
        rows = [
            [
                index, os.urandom(8).hex(), os.urandom(16).hex(),
                os.urandom(8).hex(), "openai.chat.completion", 1.5, 2.5, None, b"\x01" * rng.choice(sizes), -1,
            ]
            for index in range(spans)
        ]  # fmt: skip
        names = {"rollout_id": rollout.rollout_id, "attempt_id": attempt.attempt_id}
        operation = from_wire("add_spans", {**names, "spans": rows})
        verbs.run(state, Step(2.0, 2.0, seed=2 * number + 1, session=session), *operation)
    gc.collect()
    return state.total_bytes, psutil.Process().memory_info().rss - before


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(fill(*CASES[sys.argv[1]])))
    else:
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.accounting", case]
            accounted, grown = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"{case:24} accounted {accounted / 1e6:7.1f} MB  RSS {grown / 1e6:7.1f} MB  {accounted / grown:.2f}")
