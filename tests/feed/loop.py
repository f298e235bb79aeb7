"""The loop of a trainer with a stub model and agent, as README has it; run as a program, it goes on where it was.

    python -m tests.feed.loop DIRECTORY KIND STEPS [PAUSE]

KIND is "memory" or "ray"; after each step it sleeps for PAUSE seconds. Writes what each step trained on.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import raystore as rs

MATH, CODE = list(range(20)), list(range(100, 112))


class Model:
    """Weights that are a number, and a file of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0

    @property
    def weights(self) -> list[float]:
        return [float(self.step)]

    def load(self) -> int | None:
        if not self.path.exists():
            return None
        self.step = int(self.path.read_text())
        return self.step

    def train(self, batch: rs.FeedBatch) -> dict[str, float]:
        self.step += 1
        rewards = [one for group in batch.groups for one in group.rewards if one is not None]
        return {"reward": sum(rewards) / len(rewards)}

    def save(self) -> int:
        new = self.path.with_suffix(".new")
        new.write_text(str(self.step))
        new.rename(self.path)
        return self.step


def agent(task: int, ctx: Any) -> float:
    """Right, but for every fifth task."""
    (weight,) = ctx.resources["weights"].get()
    ctx.llm(prompt_ids=[task, 2, 3], response_ids=[4, 5 + int(weight)], logprobs=[-0.1, -0.2])
    correct = float(task % 5 > 0)
    ctx.reward(correct, correct=correct)
    return correct


async def main(directory: Path, kind: str, steps: int, pause: float) -> None:
    """Train for so many steps, or to the end of the datasets."""
    journal = directory / "journal"
    model = Model(directory / "model")
    made = rs.start("train", journal=journal) if kind == "ray" else rs.InMemoryLightningStore(journal=journal)
    async with made as store, rs.RunnerPool(store, agent, size=2, concurrency=4):
        feed = store.feed(
            "train", {"math": MATH, "code": CODE}, resources_id="policy", size=4, batch=4, max_lag=1,
            on_failure=rs.reward(0), order="in_order",
        )  # fmt: skip
        await feed.restore(step=model.load())
        await feed.publish(model.weights, version=model.step)
        async for batch in feed.batches(keep=rs.keep(successes=(1, 4), of="correct")):
            stats = model.train(batch)
            await feed.publish(model.weights, version=model.step)
            await batch.ack(step=model.step, metrics=stats)
            with (directory / "steps.jsonl").open("a") as file:
                file.write(json.dumps({"step": model.step, "groups": [g.group_id for g in batch.groups]}) + "\n")
            if model.step % 2 == 0:
                await feed.checkpoint(model.save())
            if model.step == steps:
                return
            time.sleep(pause)  # noqa: ASYNC251 - as a training step does
        await feed.checkpoint(model.save())
        status = await feed.status()
        rollouts = await store.query_rollouts(rollout_id_in=[one.rollout_id for one in await store.ledger("train")])
        ledger = sorted(rollout.input for rollout in rollouts)
        print(json.dumps({"over": status.over, "endings": status.streams[""].endings, "ledger": ledger}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) if sys.argv[4:] else 0.0))
