"""A trainer with a feed, as a program: `python -m tests.faults.feed_trainer DIRECTORY GROUPS [ADDRESS NAMESPACE]`.

With an address it uses the store of that cluster, and else one in memory. Its model is a file: the step, and what each
step was trained on. It goes on where its model is, and ends with its feed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray

import raystore as rs

BATCH, SIZE, EVERY = 8, 4, 3
STORE = "feed-run"


class Model:
    """Groups of each step, in the order of training; durable as far as it was saved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[list[Any]] = json.loads(path.read_text()) if path.exists() else []

    @property
    def step(self) -> int:
        return len(self.batches)

    def train(self, batch: rs.FeedBatch) -> None:
        self.batches.append([[group.group_id, group.input, group.rewards] for group in batch.groups])

    def save(self) -> int:
        new = self.path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(self.batches, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.path)
        return self.step


def agent_in(directory: Path) -> Any:
    """An agent that notes its process; what it does follows from its task alone."""

    async def agent(task: int, ctx: Any) -> float:
        (directory / f"runner-{os.getpid()}").touch()
        await asyncio.sleep(0.002 * (1 + task % 7))
        if task % 29 == 0:
            raise ValueError(f"no answer to {task}")
        return float(task % 5)

    return agent


def begin(directory: Path, address: str | None, namespace: str) -> Any:
    """The store: in memory, or that of the cluster, with a journal."""
    if address is None:
        return rs.InMemoryLightningStore()
    ray.init(address=address, log_to_driver=False)
    return rs.start(STORE, namespace=namespace, journal=directory / "journal", detached=True, exist="attach")


def weights(step: int) -> list[float]:
    """What is published of a step."""
    return [float(step)] * 1_000


#: Called with store, feed and step, after that step was published and acknowledged, and when a driver begins with it.
Beside = Callable[[Any, rs.Feed, int], Awaitable[None]]


async def nothing(store: Any, feed: rs.Feed, step: int) -> None:
    """Do nothing beside training."""


async def main(
    directory: Path, groups: int, address: str | None, namespace: str, beside: Beside = nothing, last: Beside = nothing
) -> None:
    """Train to the end of the dataset; `last` is called at the end."""
    model = Model(directory / "model.json")
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(begin(directory, address, namespace))
        await stack.enter_async_context(rs.RunnerPool(store, agent_in(directory), size=2, concurrency=8))
        feed = store.feed(
            "train", list(range(groups)), resources_id="policy", size=SIZE, batch=BATCH, max_lag=1, order="in_order",
            require=(), budget=None,
        )  # fmt: skip
        await feed.restore(model.step)
        await feed.publish(weights(model.step), version=model.step)
        await beside(store, feed, model.step)
        async for batch in feed.batches():
            model.train(batch)
            with (directory / "steps").open("a") as steps:  # whoever kills us goes by it
                steps.write(f"{model.step}\n")
            await feed.publish(weights(model.step), version=model.step)
            await beside(store, feed, model.step)
            await batch.ack(step=model.step)
            if model.step % EVERY == 0:
                await feed.checkpoint(model.save())
        await feed.checkpoint(model.save())
        await last(store, feed, model.step)
        (directory / "status.json").write_text((await feed.status()).model_dump_json())


if __name__ == "__main__":
    where, count, *cluster = sys.argv[1:]
    asyncio.run(main(Path(where), int(count), cluster[0] if cluster else None, cluster[1] if cluster else ""))
