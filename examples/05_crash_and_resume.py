"""GRPO through the death of everything: store, runners and trainer are SIGKILLed in turn; nothing is lost or doubled.

A supervisor owns the Ray cluster and the store, which keeps a journal. The trainer is a process of its own; it saves
its model every few steps, and says so to its feed (`checkpoint`). It is killed between the optimiser step and `ack`,
between `ack` and the saving of the model, and between that and `checkpoint`; store and runners are killed in mid-work.
Each time the trainer goes back to its saved model (`restore`), and what it had trained on since comes again. In the end
the store's ledger and the model's own agree: each task was trained exactly once into the final model.

    python examples/05_crash_and_resume.py --runners 2 --steps 24 --seed 0
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import numpy as np
import ray
from grpo import GROUPS, SIZE, agent, improve, new_policy, tasks

import raystore as rs

EVERY = 4  # steps from one checkpoint to the next
# A trainer that is killed takes its runners along, and nobody says so: their silence tells.
CONFIG = rs.RolloutConfig(unresponsive_seconds=3, max_attempts=10, retry_condition=["unresponsive"])


# -- the trainer, a process of its own ---------------------------------------------------------------------------------


def save(path: Path, logits: np.ndarray, step: int, consumed: list[str]) -> None:
    """Make the model durable: weights, step, and in which step which rollout of which group went into them."""
    with open(path.with_suffix(".new"), "wb") as file:
        np.savez(file, logits=logits, step=step, consumed=np.array(consumed, dtype=str))
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".new").rename(path)


def load(path: Path) -> tuple[np.ndarray, int, list[str]]:
    """The newest model that is durable."""
    if not path.exists():
        return new_policy(), 0, []
    saved = np.load(path)
    return saved["logits"], int(saved["step"]), saved["consumed"].tolist()


async def train(told: dict[str, Any]) -> None:
    """The algorithm, from its newest checkpoint on; ends at once at the point that the supervisor chose."""
    folder, seed, steps = Path(told["folder"]), told["seed"], told["steps"]
    say = harness.teller(told)

    def may_die(point: str) -> None:
        if told["die"] == [step, point]:
            os.kill(os.getpid(), signal.SIGKILL)

    logging.getLogger("raystore.runner").setLevel(logging.ERROR)  # no line for each runner that is killed on purpose
    ray.init(told["address"], logging_level="error", log_to_driver=False)
    logits, step, consumed = load(folder / "model.npz")
    store = rs.connect(told["name"])
    async with rs.RunnerPool(store, agent, size=told["runners"], concurrency=16):
        feed = store.feed(
            "codes", tasks(seed, steps), resources_id="policy", size=SIZE, batch=GROUPS, max_lag=0, config=CONFIG
        )
        say({"from": step, "again": await feed.restore(step)})
        await feed.checkpoint(step)  # it may have died before it could say so
        await feed.publish(logits, version=step)
        async for batch in feed.batches():
            logits = improve(logits, batch.groups, await batch.spans())
            step += 1
            consumed += [f"{step} {r.group_id} {r.rollout_id}" for r in batch.rollouts]
            say({"step": step, "reward": float(np.mean([group.rewards for group in batch.groups]))})
            may_die("optimiser step")
            await feed.publish(logits, version=step)
            await batch.ack(step=step)
            may_die("ack")
            if step % EVERY == 0 or step == steps:
                save(folder / "model.npz", logits, step, consumed)
                may_die("saved")
                await feed.checkpoint(step)
                may_die("checkpoint")
        await feed.close()


# -- the supervisor ----------------------------------------------------------------------------------------------------


def plan(steps: int) -> tuple[dict[int, str], list[list[Any]]]:
    """Which of the others is killed during which step, and where in which step the trainer is."""
    others = {step: ("store", "runner")[number % 2] for number, step in enumerate(range(2, steps, 3))}
    points = ["optimiser step", "ack", "saved", "checkpoint"]
    at = [EVERY * (number + 1) - (0 if point in ("saved", "checkpoint") else 1) for number, point in enumerate(points)]
    return others, [[step, point] for step, point in zip(at, points, strict=True) if step <= steps]


class Supervisor:
    """Owns the cluster and the store, starts the trainer again when it has died, and kills."""

    def __init__(self, run: harness.Run, store: rs.RayLightningStore, name: str, folder: Path) -> None:
        self.run, self.store, self.name, self.folder = run, store, name, folder
        self.killed: Counter[str] = Counter()
        self.curve: dict[int, float] = {}
        self.again = 0
        self.chance = random.Random(run.seed)

    async def supervise(self, *, kills: bool) -> None:
        others, deaths = plan(self.run.steps) if kills else ({}, [])
        while status := await self.trainer(others, deaths[0] if deaths else None):
            if not deaths or status != -signal.SIGKILL:
                raise SystemExit(f"the trainer ended with status {status}")
            self.killed["trainer"] += 1
            print(f"  the trainer was killed in step {deaths[0][0]}, after: {deaths[0][1]}")
            del deaths[0]

    async def trainer(self, others: dict[int, str], death: list[Any] | None) -> int:
        """One process of the trainer, to its end."""
        told = {
            "address": ray.get_runtime_context().gcs_address, "name": self.name, "folder": str(self.folder),
            "seed": self.run.seed, "steps": self.run.steps, "runners": self.run.runners, "die": death,
        }  # fmt: skip
        killing: asyncio.Task[None] | None = None
        async with harness.trainer(__file__, told) as (process, said):
            try:
                async for news in said:
                    self.again += news.get("again", 0)
                    if "reward" in news:
                        step = news["step"]
                        self.curve[step] = news["reward"]
                        if self.run.shows(step - 1):
                            print(f"step {step:3}  reward {news['reward']:.2f}  {'#' * round(30 * news['reward'])}")
                    following = 1 + (news["step"] if "step" in news else news["from"])
                    if (victim := others.pop(following, None)) is not None:
                        killing = asyncio.create_task(self.kill(victim))
                return await process.wait()
            finally:
                if killing is not None and not killing.cancel():
                    killing.result()  # what went wrong in it, if anything did

    async def kill(self, victim: str) -> None:
        """SIGKILL the store, or a runner that is in the middle of a rollout."""
        await asyncio.sleep(self.chance.uniform(0, 0.2))
        if victim == "store":
            pid = (await self.store.actor.describe.remote())["pid"]
        else:
            pids: list[int] = []
            while not pids:
                busy = await self.store.query_workers(status_in=["busy"])
                stats = [worker.heartbeat_stats or {} for worker in busy]
                pids = sorted(s["pid"] for s in stats if s.get("host") == socket.gethostname() and is_alive(s["pid"]))
                await asyncio.sleep(0.01)
            pid = self.chance.choice(pids)
        os.kill(pid, signal.SIGKILL)
        self.killed[victim] += 1
        print(f"  the {victim} was killed")


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def check(store: rs.RayLightningStore, folder: Path, run: harness.Run) -> Counter[str]:
    """What was asked for, what the store says was trained, and what the model says it was trained on."""
    ledger = {entry.rollout_id: entry.step for entry in await store.ledger("codes") if entry.is_durable}
    _, done, consumed = load(folder / "model.npz")
    lines = [line.split() for line in consumed]
    into = {rollout_id: int(step) for step, _, rollout_id in lines}
    sizes = Counter(group_id for _, group_id, _ in lines)
    asked = run.steps * GROUPS
    return Counter(
        asked=asked * SIZE,
        trained=len(into),
        lost=asked - sum(size == SIZE for size in sizes.values()),
        doubled=len(lines) - len(into),
        differing=len(into.items() ^ ledger.items()) + (len(sizes) != asked) + (done != run.steps),
    )


async def main(run: harness.Run) -> bool:
    curves: dict[str, list[float]] = {}
    correct = True
    for name, kills in (("undisturbed", False), ("with kills", True)):
        started = time.monotonic()
        folder = run.folder.absolute() / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        async with rs.start(f"crash-{name.replace(' ', '-')}", journal=folder / "journal") as store:
            supervisor = Supervisor(run, store, f"crash-{name.replace(' ', '-')}", folder)
            await supervisor.supervise(kills=kills)
            found = await check(store, folder, run)
        curves[name] = [supervisor.curve[step] for step in sorted(supervisor.curve)]
        for step, reward in enumerate(curves[name], 1):
            run.log(kills=kills, step=step, reward=reward)
        correct &= found["trained"] == found["asked"] and not (found["lost"] + found["doubled"] + found["differing"])
        correct &= not kills or all(supervisor.killed[victim] for victim in ("store", "runner", "trainer"))
        killed = ", ".join(f"{count} x {victim}" for victim, count in supervisor.killed.items()) or "nobody"
        took = time.monotonic() - started
        print(f"{name}: reward {harness.tail(curves[name]):.2f} after {took:.0f} s; killed: {killed}")
        counts = ", ".join(f"{what} {found[what]}" for what in ("asked", "trained", "lost", "doubled"))
        print(f"  {counts}; {supervisor.again} groups came again, since the model went back to a checkpoint")
    run.draw(curves)
    before, after = (harness.tail(curve) for curve in curves.values())
    learnt = before >= 0.9 and after >= before - 0.05
    print(f"{'it learnt' if learnt else 'it did NOT learn'}; both ledgers are {'correct' if correct else 'WRONG'}")
    return learnt and correct


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trainer"]:
        asyncio.run(train(json.loads(sys.argv[2])))
    else:
        harness.run("crash_and_resume", main, __doc__, runners=2, steps=24)
