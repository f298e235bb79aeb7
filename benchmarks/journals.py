"""A journal of many rollouts, made without a store that lives through all of them.

Not here: what is measured with it (`durability`).
"""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path

from raystore.core import verbs
from raystore.core.claims import open_session
from raystore.core.state import Step
from raystore.journal import format
from raystore.journal.files import SNAPSHOT, Directory, JournalPosition
from raystore.journal.replay import Replay
from raystore.types.options import StoreConfig, resolve
from raystore.wire.codec import encode

CAPACITY = 2**34


def write_snapshot(path: Path, rollouts: int, *, spans: int = 8, unfinished: int = 10) -> None:
    """The snapshot of a store with so many rollouts, every tenth of them unfinished, by the verbs of the core."""
    gc.disable()
    directory = Directory(path)
    epoch = directory.begin_epoch()
    settings = resolve(StoreConfig(journal=str(path)), CAPACITY)
    follower = Replay()
    told = asdict(settings) | {"default_config": settings.default_config.row()}
    who = {"store_id": "bench", "name": "bench", "writer": None}
    start = format.pack_record_head(format.START, Step(1.0, 1.0), 0, None, [who, told, [0, 0, 0, 0], None])
    follower.apply(1, [memoryview(start)])
    state, step = follower.state, Step(2.0, 2.0, seed=5)
    step.session = open_session(state, step, "p1")
    state.spans.written = rollouts + 1
    for number in range(rollouts):
        step.record, step.now = number + 1, 2.0 + number * 1e-4
        asked = {"input": encode({"question": f"what is {number}?"}, "input", 1000), "metadata": None}
        verbs.run(state, step, "enqueue", {"requests": [asked]})
        wanted = {"queues": ["default"], "limit": 1, "worker_id": f"w{number % 64}"}
        ((rollout, attempt, _),) = verbs.run(state, step, "dequeue", wanted)
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": attempt.attempt_id}
        rows = [
            [i + 1, f"{number * spans + i:016x}", f"{number:032x}", None, "llm.call", 1.0, 2.0, None, b"body" * 25, -1]
            for i in range(spans)
        ]
        verbs.run(state, step, "add_spans", ids | {"spans": rows})
        if number % unfinished:
            verbs.run(state, step, "update_attempt", ids | {"changes": {"status": "succeeded"}})
        state.take_effects()
    state.touched.clear()
    follower.last = rollouts + 1
    follower.write_snapshot(directory.segment(epoch, 1, SNAPSHOT), JournalPosition(epoch, 1, 0, rollouts + 1))
    directory.sync()
    gc.enable()
