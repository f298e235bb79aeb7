"""GRPO in numpy on a multi-turn tool task, twice: undisturbed, and with a runner killed at each step.

Task and policy are in `grpo`. The policy is published at each step as a versioned object; the driver keeps two batches
of groups in flight, so rollouts are up to two versions old and are weighted by importance ratios. In the second run a
runner process is SIGKILLed at each step, in the middle of its rollouts. Both runs learn, and the ledger shows that no
rollout was lost or trained on twice.

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

import harness
import numpy as np
from grpo import GROUPS, SIZE, agent, codes, improve, new_policy, softmax

import raystore as rs


def check_versions(history: dict[int, np.ndarray], groups: list[list[list[rs.Triplet]]]) -> None:
    """Each turn was taken by the version of the policy that its attempt names."""
    for turns in (turns for group in groups for turns in group):
        for turn in turns:
            assert turn.policy_version is not None and turn.logprobs is not None
            behaviour = history[turn.policy_version][turn.prompt_ids[0], turn.response_ids[0]]
            assert abs(np.log(behaviour) - turn.logprobs[0]) < 1e-6


async def kill_a_runner(store: rs.RayLightningStore, chance: random.Random, killed: set[int]) -> None:
    """SIGKILL the process of a runner that is in the middle of a rollout."""
    pids: set[int] = set()
    while not pids:
        await asyncio.sleep(0.01)
        busy = await store.query_workers(status_in=["busy"])
        here = [
            w.heartbeat_stats for w in busy if w.heartbeat_stats and w.heartbeat_stats["host"] == socket.gethostname()
        ]
        pids = {stats["pid"] for stats in here} - killed
    pid = chance.choice(sorted(pids))
    os.kill(pid, signal.SIGKILL)
    killed.add(pid)


async def train(store: rs.RayLightningStore, run: harness.Run, *, kills: bool) -> tuple[list[float], Counter[str]]:
    """The algorithm. Returns the mean reward of each step, and a ledger of rollouts."""
    logits = new_policy()
    history: dict[int, np.ndarray] = {}  # version -> policy
    curve: list[float] = []
    ledger: Counter[str] = Counter()
    trained: set[str] = set()
    killed: set[int] = set()
    asked_at: dict[str | None, int] = {}  # group -> step that it was enqueued for, until it is trained on
    chance = random.Random(run.seed)

    async def publish(version: int) -> None:
        history[version] = softmax(logits)
        await store.update_resources("policy", {"policy": rs.ObjectResource(value=logits)}, policy_version=version)

    async def ask(step: int) -> None:
        """Enqueue the groups of one step: they leave in one call."""
        groups = await asyncio.gather(*(store.enqueue_group({"code": code}, SIZE) for code in codes(run.seed, step)))
        asked_at.update((group[0].group_id, step) for group in groups)
        ledger["enqueued"] += sum(map(len, groups))
        if kills:
            await kill_a_runner(store, chance, killed)

    await publish(0)
    await ask(0)
    await ask(1)
    cursor: int | None = None
    finished: dict[str | None, list[rs.AttemptedRollout]] = {}  # group -> its rollouts so far
    for step in range(run.steps):
        started = time.monotonic()
        # The first groups that are complete, but none is put off by more than a step: that bounds how old a rollout is.
        while True:
            complete = [group for group, rollouts in finished.items() if len(rollouts) == SIZE]
            complete = sorted(complete, key=lambda group: asked_at[group] >= step)[:GROUPS]
            if len(complete) == GROUPS and all(asked_at[group] >= step for group in asked_at.keys() - complete):
                break
            page = await store.completed(cursor, limit=GROUPS * SIZE, timeout=60)
            cursor = page.cursor
            if not page.items:
                raise SystemExit("nothing finished for a minute: rollouts were lost")
            for rollout in page.items:
                finished.setdefault(rollout.group_id, []).append(rollout)
        ended = [finished.pop(group) for group in complete]
        for group in complete:
            del asked_at[group]
        rollouts = [[r for r in group if r.status == "succeeded"] for group in ended]
        ledger["dropped"] += sum(r.status != "succeeded" for group in ended for r in group)
        ids = [r.rollout_id for group in rollouts for r in group]
        spans = await store.query_many_spans(ids)
        turns = [[rs.triplets(spans[r.rollout_id]) for r in group] for group in rollouts]
        check_versions(history, turns)
        logits = improve(logits, turns)
        ledger["doubled"] += len(trained.intersection(ids))
        trained.update(ids)
        ledger["trained"] = len(trained)
        await store.release(ids)
        await publish(step + 1)
        if step + 2 < run.steps:
            await ask(step + 2)
        curve.append(float(np.mean([r.reward for group in rollouts for r in group])))
        age = step - min(r.attempt.policy_version or 0 for group in rollouts for r in group)
        run.log(kills=kills, step=step, reward=curve[-1], staleness=age, seconds=time.monotonic() - started)
        if run.shows(step):
            print(f"step {step:3}  reward {curve[-1]:.2f}  {'#' * round(30 * curve[-1])}")
    statistics = await store.statistics()
    ledger["killed"] = len(killed)
    ledger["again"] = statistics["total_attempts"] + statistics["withdrawals"] - ledger["enqueued"]
    return curve, ledger


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
