"""Two thousand slow agents at once over a few runner processes: they wait, and the store has next to nothing to do.

Each agent waits for something slow (a model, a browser, a test run: here it sleeps); how long it should wait is what is
learnt, by the cross-entropy method. Printed at each step: what the store's process worked for it, actor calls per
rollout, and memory of the store and of the largest runner.

    python examples/04_many_agents.py --runners 4 --steps 6 --seed 0
"""

import asyncio
import math
import time
from typing import Any

import harness
import numpy as np

import raystore as rs

AGENTS, BEST_SECONDS = 2_000, 1.0


async def agent(task: dict[str, Any], ctx: rs.Context) -> float:
    """Wait; the nearer to the best time, the higher the reward."""
    with ctx.span("wait", seconds=task["seconds"]):
        await asyncio.sleep(task["seconds"])
    return math.exp(-2 * (task["seconds"] - BEST_SECONDS) ** 2)


async def train(store: rs.RayLightningStore, run: harness.Run) -> tuple[list[float], bool]:
    """Draw waiting times, keep the best fifth, and draw around those."""
    mean, spread = 2.0, 0.6
    curve: list[float] = []
    everything = True
    for step in range(run.steps):
        times = np.random.default_rng([run.seed, step]).normal(mean, spread, AGENTS).clip(0.1, 4.0)
        before, started = await store.statistics(), time.monotonic()
        requests = [rs.EnqueueRolloutRequest(input={"seconds": float(seconds)}) for seconds in times]
        asked = [r.rollout_id for r in await store.enqueue_many_rollouts(requests)]
        finished = await store.wait_for_rollouts(rollout_ids=asked)
        spans = await store.query_many_spans(asked)
        seconds, after = time.monotonic() - started, await store.statistics()
        everything &= len(finished) == AGENTS and all(
            r.status == "succeeded" and [s.name for s in spans[r.rollout_id]] == ["wait", "agentlightning.annotation"]
            for r in finished
        )
        await store.release(asked)
        rewards = np.array([r.reward for r in finished])
        best = np.array([r.input["seconds"] for r in finished])[np.argsort(rewards)[-AGENTS // 5 :]]
        mean, spread = float(best.mean()), float(best.std()) + 0.02
        curve.append(float(rewards.mean()))
        worked = after["cpu_seconds"] - before["cpu_seconds"]
        calls = (after["actor_calls"] - before["actor_calls"]) / AGENTS
        runners = [w.heartbeat_stats["rss_bytes"] for w in await store.query_workers() if w.heartbeat_stats]
        run.log(step=step, reward=curve[-1], seconds=seconds, store_seconds=worked, calls_per_rollout=calls)
        print(
            f"step {step:2}  reward {curve[-1]:.2f}  {seconds:4.1f} s, of which the longest wait {times.max():.1f} s; "
            f"store {worked:.2f} s, {calls:.3f} calls a rollout, {(after['rss_bytes'] or 0) / 2**20:.0f} MiB; "
            f"runner {max(runners) / 2**20:.0f} MiB"
        )
    return curve, everything


async def main(run: harness.Run) -> bool:
    concurrency = math.ceil(AGENTS / run.runners)  # all of them wait at the same time
    async with (
        rs.start() as store,
        rs.RunnerPool(store, agent, size=run.runners, concurrency=concurrency, heartbeat_seconds=2),
    ):
        curve, everything = await train(store, run)
    run.draw({"cross-entropy method": curve})
    learnt = curve[-1] >= 0.9
    print(f"mean reward {curve[0]:.2f} -> {curve[-1]:.2f}: {'it learnt' if learnt else 'it did NOT learn'}; "
          f"{'every rollout and span is there' if everything else 'something is MISSING'}")  # fmt: skip
    return learnt and everything


if __name__ == "__main__":
    harness.run("many_agents", main, __doc__, steps=6)
