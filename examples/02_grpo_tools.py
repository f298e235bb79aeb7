"""GRPO in numpy on a multi-turn tool task, twice: undisturbed, and with a runner killed at each step.

Task and policy are in `grpo`. A feed makes a group of each task, keeps two batches of groups under way, and gives them
whole; the policy is published at each step, so rollouts are at most one version old, and are weighted by importance
ratios. In the second run a runner process is SIGKILLed at each step, in the middle of its rollouts. Both runs learn,
and the ledger shows that no rollout was lost or trained on twice.

    python examples/02_grpo_tools.py --runners 4 --steps 60 --seed 0
"""

import asyncio
import logging
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import harness
import numpy as np
from grpo import GROUPS, SIZE, agent, improve, new_policy, softmax, tasks

import raystore as rs


def check_versions(history: Sequence[np.ndarray], spans: Mapping[str, Sequence[rs.Span]]) -> None:
    """Each turn was taken by the version of the policy that its attempt names."""
    for turn in (turn for of_rollout in spans.values() for turn in rs.triplets(of_rollout)):
        assert turn.policy_version is not None and turn.logprobs is not None
        behaviour = history[turn.policy_version][turn.prompt_ids[0], turn.response_ids[0]]
        assert abs(np.log(behaviour) - turn.logprobs[0]) < 1e-6


async def kill_a_runner(store: rs.RayLightningStore, killed: set[int]) -> None:
    """SIGKILL the process of a runner that is in the middle of a rollout."""
    pids: set[int] = set()
    while not pids:
        await asyncio.sleep(0.01)
        busy = await store.query_workers(status_in=["busy"])
        stats = [worker.heartbeat_stats or {} for worker in busy]
        pids = {s["pid"] for s in stats if s.get("host") == socket.gethostname()} - killed
    pid = random.choice(sorted(pids))
    os.kill(pid, signal.SIGKILL)
    killed.add(pid)


async def train(store: rs.RayLightningStore, run: harness.Run, *, kills: bool) -> tuple[list[float], Counter[str]]:
    """The algorithm. Returns the mean reward of each step, and a ledger of rollouts."""
    logits, history, curve = new_policy(), [softmax(new_policy())], []
    trained: Counter[str] = Counter()
    killed: set[int] = set()
    data = tasks(run.seed, run.steps)
    feed = store.feed("codes", data, resources_id="policy", size=SIZE, batch=GROUPS, max_lag=1)
    await feed.publish(logits, version=0)
    for _ in range(2 * kills):  # two batches of groups are under way; from then on another one with each step
        await kill_a_runner(store, killed)
    started = time.monotonic()
    async for batch in feed.batches():
        step, spans = len(history), await batch.spans()
        check_versions(history, spans)
        logits = improve(logits, batch.groups, spans)
        history.append(softmax(logits))
        await feed.publish(logits, version=step)
        await batch.ack(step=step)
        if kills and step <= run.steps - 2:
            await kill_a_runner(store, killed)
        trained.update(spans.keys())
        curve.append(float(np.mean([group.rewards for group in batch.groups])))
        lag = max(group.lag.total for group in batch.groups)
        run.log(kills=kills, step=step, reward=curve[-1], lag=lag, seconds=time.monotonic() - started)
        started = time.monotonic()
        if run.shows(step - 1):
            print(f"step {step:3}  reward {curve[-1]:.2f}  {'#' * round(30 * curve[-1])}")
    await feed.close()
    statistics = await store.statistics()
    enqueued = statistics["total_rollouts"]
    return curve, Counter(
        enqueued=enqueued,
        trained=len(trained),
        dropped=enqueued - statistics["rollouts_by_status"]["succeeded"],
        doubled=sum(trained.values()) - len(trained),
        killed=len(killed),
        again=statistics["total_attempts"] + statistics["withdrawals"] - enqueued,
    )


async def main(run: harness.Run) -> bool:
    curves, correct = {}, True
    logging.getLogger("raystore.runner").setLevel(logging.ERROR)  # no line for each runner that is killed on purpose
    for name, kills in (("undisturbed", False), ("with kills", True)):
        started = time.monotonic()
        async with rs.start() as store, rs.RunnerPool(store, agent, size=run.runners, concurrency=16):
            curve, ledger = await train(store, run, kills=kills)
        curves[name] = curve
        correct &= ledger["enqueued"] == ledger["trained"] + ledger["dropped"] and ledger["doubled"] == 0
        print(
            f"{name}: reward {harness.tail(curve):.2f} after {time.monotonic() - started:.0f} s; enqueued "
            f"{ledger['enqueued']} = trained {ledger['trained']} + dropped {ledger['dropped']}, doubled "
            f"{ledger['doubled']}; {ledger['killed']} runners killed, {ledger['again']} rollouts handed out again"
        )
    run.draw(curves)
    learnt = all(harness.tail(curve) >= 0.9 for curve in curves.values())
    print(f"{'it learnt' if learnt else 'it did NOT learn'}; the ledger is {'correct' if correct else 'WRONG'}")
    return learnt and correct


if __name__ == "__main__":
    harness.run("grpo_tools", main, __doc__, steps=60)
