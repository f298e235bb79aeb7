"""agentlightning's side of the comparison, as a program in an environment of its own.

`python -m benchmarks.peer serve PORT` is its store behind HTTP; `python -m benchmarks.peer work` has its store in
process, until it is told to `connect` to a server. Commands and answers are lines of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
from typing import Any

from agentlightning import EnqueueRolloutRequest, InMemoryLightningStore, LightningStoreClient, LightningStoreServer
from agentlightning.types import Span

from tests.support import shapes


async def serve(port: int) -> None:
    """Serve until the parent closes our standard input."""
    server = LightningStoreServer(InMemoryLightningStore(thread_safe=True), "127.0.0.1", port, launch_mode="thread")
    await server.start()
    print(json.dumps({"url": server.endpoint}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Worker:
    """Does what the benchmark asks, with one store."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.desks: dict[tuple[str, int], list[shapes.Desk]] = {}

    async def connect(self, url: str) -> str:
        """Be a client of this server from now on."""
        if isinstance(self.store, LightningStoreClient):
            await self.store.close()
        self.store = LightningStoreClient(url)
        return url

    async def enqueue(self, rollouts: int) -> list[str]:
        requests = [EnqueueRolloutRequest(input={"task": number}) for number in range(rollouts)]
        return [rollout.rollout_id for rollout in await self.store.enqueue_many_rollouts(requests)]

    async def work(self, shape: str, concurrency: int, rollouts: int) -> float:
        key = (shape, concurrency)
        if key not in self.desks:
            self.desks[key] = shapes.desks(Span, shape, concurrency)
        return await shapes.work(self.store, shape, self.desks[key], rollouts)

    async def collect(self, rollout_ids: list[str]) -> int:
        """Wait for rollouts and read their spans, as a driver does."""
        finished: set[str] = set()
        while len(finished) < len(rollout_ids):
            done = await self.store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=0.05)
            finished = {rollout.rollout_id for rollout in done}
        count = 0
        for rollout_id in rollout_ids:
            count += len(await self.store.query_spans(rollout_id))
        return count

    async def lifecycle_in_process(self, rollouts: int, concurrency: int) -> float:
        """Seconds of lifecycles on a store of this process."""
        await self.enqueue(rollouts)
        return await shapes.work_in_process(self.store, shapes.desks(Span, "lifecycle", concurrency), rollouts)

    async def grow(self, rollouts: int, spans: int) -> float:
        """Bytes of memory for each stored span."""
        await self.enqueue(rollouts)
        gc.collect()
        before = resident_bytes()
        await shapes.fill(self.store, Span, rollouts, spans)
        gc.collect()
        return (resident_bytes() - before) / (rollouts * spans)


async def main() -> None:
    worker = Worker(InMemoryLightningStore(thread_safe=True))
    print(json.dumps("ready"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, arguments = json.loads(line)
        print(json.dumps(await getattr(worker, command)(**arguments)), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[2])) if sys.argv[1] == "serve" else main())
