"""A process that works on a store with a journal and says what was acknowledged.

`python -m tests.faults.busy PATH SEED COUNT`; whoever started it may have chosen a failpoint at which it dies. One line
of JSON for each acknowledged call, so that it is known afterwards what must be there.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys

import raystore as rs
from raystore.journal import compaction, writer
from tests.channel import take_stdout
from tests.helpers import make_span

writer.SEGMENT_BYTES = int(os.environ.get("SEGMENT_BYTES", writer.SEGMENT_BYTES))
writer.SPACE_BYTES = int(os.environ.get("SPACE_BYTES", writer.SPACE_BYTES))
compaction.VERIFY_LAG = 10


def say(*what: object) -> None:
    """What was acknowledged, or happened."""
    channel.write(json.dumps(what) + "\n")


async def work(path: str, seed: int, count: int) -> None:
    """Calls of the usual kinds, one after the other and some at a time."""
    lots = random.Random(seed)
    store = rs.InMemoryLightningStore(journal=path, durability="power")
    say("open")
    for number in range(count):
        made = await asyncio.gather(*(store.enqueue_rollout(f"{seed}/{number}/{i}") for i in range(3)))
        for rollout in made:
            say("enqueued", rollout.rollout_id, rollout.input)
        claimed = await store.dequeue_rollout()
        if claimed is None:
            continue
        say("claimed", claimed.rollout_id, claimed.attempt.attempt_id)
        span = make_span(claimed, number + 1)
        await store.add_span(span)
        say("span", claimed.rollout_id, claimed.attempt.attempt_id, span.span_id)
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
        say("finished", claimed.rollout_id)
        if lots.random() < 0.1:
            batch = await store.take(1, consumer="t")
            await store.ack(batch, step=1_000 * seed + number)
            say("consumed", [r.rollout_id for r in batch.rollouts])
    store.close()
    say("closed")


if __name__ == "__main__":
    channel = take_stdout()
    asyncio.run(work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
