"""A small transformer learns by GRPO to write numbers backwards, is evaluated beside it, and survives a `kill -9`.

The transformer (transformer.py: plain torch, on the CPU) begins with random weights; nobody shows it an answer. Runners
sample answers for the groups of a feed and record token ids and log-probabilities, of which the trainer makes steps of
GRPO. Every few steps the same runners also evaluate the model on numbers that it is never trained on, and the trainer
does not wait for that. All of it is done twice with the same seed: undisturbed, and with a driver that is killed once
in mid-run and started again. In the end both models know the task, and both ledgers are the same: which items were
trained on in which step, each once. (Rewards in between differ: what is sampled depends on when weights arrive.)

    pip install 'raystore[torch]'       # in a checkout: make example-transformer, which says first how large that is
    python examples/08_transformer_grpo.py --runners 2 --steps 84 --seed 0
    python examples/08_transformer_grpo.py --quick      # 24 steps, in which it only begins to learn
"""

import asyncio
import importlib.util
import json
import logging
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import digits
import harness
import ray

import raystore as rs
from raystore.reports import svg

GROUPS, SIZE = 16, 16
EVERY, EVALUATE = 5, 12  # steps from one checkpoint to the next, and from one evaluation to the next
HELD_OUT, SAMPLES = 32, 4  # numbers of each environment in an evaluation, and answers to each
# A trainer that is killed takes its runners along, and nobody says so: their silence tells.
CONFIG = rs.RolloutConfig(unresponsive_seconds=5, max_attempts=10, retry_condition=["unresponsive"])
LEARNT, BEGUN = 0.6, 0.1  # of the held-out answers, so many more are right in the end; with --quick so much more reward

Ledger = dict[int, list[str]]  #: the groups of each step, in their order


# -- the trainer, a process of its own ---------------------------------------------------------------------------------


async def train(told: Mapping[str, Any]) -> None:
    """The algorithm, from its newest checkpoint on: it does not know whether it was started before."""
    import transformer  # and with it torch, which the supervisor only needs for a look at the model

    logging.getLogger("raystore.runner").setLevel(logging.ERROR)  # no line for runners that died with their driver
    ray.init(told["address"], logging_level="error", log_to_driver=False)
    say, steps, path = harness.teller(told), told["steps"], Path(told["folder"]) / "model.pt"
    learner = transformer.Learner(told["seed"], steps)
    learner.load(path)
    data, held_out = items(told["seed"], steps)
    store = rs.connect(told["name"])
    pool = rs.RunnerPool(store, transformer.Solver, size=told["runners"], concurrency=64)
    feed = store.feed(
        "digits", data, resources_id="policy", size=SIZE, batch=GROUPS, max_lag=1, order="in_order",
        seed=told["seed"], config=CONFIG,
    )  # fmt: skip
    async with pool, feed:
        again = await feed.restore(learner.step)
        say({"from": learner.step, "again": again, "parameters": learner.parameters})
        await feed.checkpoint(learner.step)  # it may have died before it could say so
        await feed.publish(learner.arrays(), version=learner.step)
        evaluation = None
        if learner.step % EVALUATE == 0:  # at the start; after a crash, if it died before it could ask
            evaluation = await feed.evaluate(held_out, version=learner.step, samples=SAMPLES, threshold=0.99)
        async for batch in feed.batches():
            spans, begun = await batch.spans(), time.monotonic()
            stats = learner.train(batch.groups, spans)
            step = learner.step
            rewards = [reward or 0.0 for group in batch.groups for reward in group.rewards]
            say({"step": step, "reward": sum(rewards) / len(rewards), "seconds": time.monotonic() - begun, **stats})
            await feed.publish(learner.arrays(), version=step)
            if step % EVALUATE == 0 or step == steps:  # returns at once; the runners sample it between other work
                evaluation = await feed.evaluate(held_out, version=step, samples=SAMPLES, threshold=0.99)
            await batch.ack(step=step, metrics=stats)
            if step % EVERY == 0 or step == steps:
                await feed.checkpoint(learner.save(path))
        if evaluation is not None:
            await evaluation.result()  # of the last one; those before it have long ended


def items(seed: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers to train on, one group of each in the whole run, and those for evaluation."""
    return digits.numbers(seed, steps * GROUPS // len(digits.LENGTHS), HELD_OUT)


# -- the supervisor ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of one run."""

    name: str
    rewards: dict[int, float] = field(default_factory=dict)  # of what each step was trained on
    evaluations: dict[int, rs.EvaluationResult] = field(default_factory=dict)  # by version
    ledger: Ledger = field(default_factory=dict)
    killed_in: int | None = None
    again: int = 0  # groups that were trained on again, since the model went back to a checkpoint
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


async def supervise(run: harness.Run, name: str, kill_in: int | None) -> Outcome:
    """Own the store, start the driver, kill it once in a step, and start it again."""
    outcome, folder = Outcome(name), run.folder.absolute() / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    begun, store_name = time.monotonic(), f"transformer-{name.replace(' ', '-')}"
    async with rs.start(store_name, journal=folder / "journal") as store:
        told = {
            "address": ray.get_runtime_context().gcs_address, "name": store_name, "folder": str(folder),
            "seed": run.seed, "steps": run.steps, "runners": run.runners,
        }  # fmt: skip
        print(f"{name}:")
        while status := await drive(run, outcome, told, kill_in):
            if outcome.killed_in is None or status != -9:
                raise SystemExit(f"the driver ended with status {status}")
            kill_in = None
        outcome.seconds = time.monotonic() - begun
        everything = await store.evaluations()
        outcome.evaluations = {result.version or 0: result for result in everything if not result.undone}
        await check(outcome, store, folder / "model.pt", run)
    return outcome


async def drive(run: harness.Run, outcome: Outcome, told: Mapping[str, Any], kill_in: int | None) -> int:
    """One process of the driver, to its end or until it is killed; its status."""
    async with harness.trainer(__file__, told) as (process, said):
        async for news in said:
            if "from" in news:
                outcome.again += news["again"]
                print(f"  from step {news['from']}, {news['parameters']:,} parameters, {news['again']} groups again")
                continue
            step = news["step"]
            outcome.rewards[step] = news["reward"]
            run.log(run=outcome.name, **news)
            if run.shows(step - 1):
                print(f"  step {step:3}  reward {news['reward']:.2f}  {'#' * round(30 * news['reward'])}", flush=True)
            if step == kill_in and outcome.killed_in is None:
                await asyncio.sleep(random.Random(run.seed).uniform(0, 0.3))
                process.kill()
                outcome.killed_in = step
                print(f"  kill -9 of the driver, in or after step {step}")
        return await process.wait()


async def check(outcome: Outcome, store: rs.RayLightningStore, path: Path, run: harness.Run) -> None:
    """What the store says was trained, and evaluated, and what the model says; notes what is wrong in `outcome`."""
    import transformer

    learner = transformer.Learner(run.seed, run.steps)
    learner.load(path)
    told = {entry.rollout_id: entry.step for entry in await store.ledger("digits") if entry.is_durable}
    outcome.ledger = ledger_of(learner.consumed)
    outcome.faults += faults_of(outcome.ledger, learner.consumed, run.steps)
    if told != {rollout_id: step for step, _, rollout_id in learner.consumed}:
        outcome.faults.append("the store's ledger is not what the model says it was trained on")
    due = {*range(0, run.steps, EVALUATE), run.steps}
    if due != set(outcome.evaluations):
        outcome.faults.append(f"steps {sorted(outcome.evaluations)} were evaluated, not {sorted(due)}")
    for version, result in outcome.evaluations.items():
        had = (result.status, result.versions, result.overall.samples, result.overall.failed)
        if had != (wanted := ("finished", (version, version), HELD_OUT * SAMPLES * len(digits.LENGTHS), 0)):
            outcome.faults.append(f"the evaluation of step {version} is not whole: {had} instead of {wanted}")


def ledger_of(consumed: Sequence[tuple[int, str, str]]) -> Ledger:
    """The groups of each step, from what a model was trained on: step, group and rollout."""
    found: Ledger = {}
    for step, group_id, _ in consumed:
        groups = found.setdefault(step, [])
        if not groups or groups[-1] != group_id:
            groups.append(group_id)
    return found


def faults_of(ledger: Ledger, consumed: Sequence[tuple[int, str, str]], steps: int) -> list[str]:
    """Why it is not so that each item was trained on once, in so many full steps; nothing if it is."""
    found = []
    if sorted(ledger) != list(range(1, steps + 1)):
        found.append(f"the model has steps {sorted(ledger)}, not 1 to {steps}")
    times = Counter(group_id for groups in ledger.values() for group_id in groups)
    if twice := sorted(group_id for group_id, count in times.items() if count > 1):
        found.append(f"groups were trained on more than once: {', '.join(twice[:5])}")
    if len(times) != steps * GROUPS:
        found.append(f"{len(times)} groups were trained on, not {steps * GROUPS}")
    whole = Counter(group_id for _, group_id, _ in consumed)
    if short := sorted(group_id for group_id, count in whole.items() if count != SIZE):
        found.append(f"groups have not {SIZE} rollouts: {', '.join(short[:5])}")
    if len({rollout_id for *_, rollout_id in consumed}) != len(consumed):
        found.append("a rollout was trained on more than once")
    return found


def differing(one: Ledger, other: Ledger) -> list[int]:
    """The steps that were not trained on the same items in the same order."""
    return sorted(step for step in one.keys() | other.keys() if one.get(step) != other.get(step))


def table(outcomes: Sequence[Outcome]) -> str:
    """Training and evaluation side by side, for each step that was evaluated."""
    columns = f"{'training':>10}  {'held out [95 %]':19}  {'all right':9}"
    lines = ["      " + "".join(f"  {outcome.name:^{len(columns)}}" for outcome in outcomes)]
    lines.append("  step" + f"  {columns}" * len(outcomes))
    for version in sorted({version for outcome in outcomes for version in outcome.evaluations}):
        line = f"  {version:4}"
        for outcome in outcomes:
            near = [outcome.rewards[step] for step in range(version - 2, version + 1) if step in outcome.rewards]
            training = f"{sum(near) / len(near):.2f}" if near else ""
            line += f"  {training:>10}  {scores_of(outcome.evaluations.get(version)):30}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def scores_of(result: rs.EvaluationResult | None) -> str:
    """An evaluation in a few characters: mean reward with its interval, and the share of answers all right."""
    if result is None or result.overall.mean is None or result.overall.confidence is None:
        return ""
    low, high = result.overall.confidence
    return f"{result.overall.mean:.2f} [{low:.2f}, {high:.2f}]    {result.overall.pass_at[1]:.2f}"


def lesson_of(outcome: Outcome, run: harness.Run) -> tuple[bool, str]:
    """Whether the held-out numbers say that a run has learnt, and what they say."""
    first, last = (outcome.evaluations.get(version) for version in (0, run.steps))
    if first is None or last is None or first.overall.mean is None or last.overall.mean is None:
        return False, "there is no evaluation of the first model, or of the last"
    right, more = last.overall.pass_at[1] - first.overall.pass_at[1], last.overall.mean - first.overall.mean
    by_length = ", ".join(f"{name} {score.pass_at[1]:.0%}" for name, score in last.environments.items())
    said = (
        f"of the answers to held-out numbers {first.overall.pass_at[1]:.0%} were all right at first, "
        f"{last.overall.pass_at[1]:.0%} in the end ({by_length}); reward {first.overall.mean:.2f} and "
        f"{last.overall.mean:.2f}"
    )
    return (more >= BEGUN if run.is_quick else right >= LEARNT), said


async def main(run: harness.Run) -> bool:
    most = (10 ** min(digits.LENGTHS.values()) - HELD_OUT) * len(digits.LENGTHS) // GROUPS
    if not 2 * EVERY <= run.steps <= most:
        raise SystemExit(
            f"--steps {run.steps}: {2 * EVERY} to {most} are possible, so that there is a checkpoint to go back to "
            "and each group has a number of its own"
        )
    kill_in = run.steps // 2 // EVERY * EVERY + 3  # between two checkpoints
    calm = await supervise(run, "undisturbed", None)
    killed = await supervise(run, "killed once", kill_in)
    print(table([calm, killed]))
    curves: dict[str, list[tuple[float, float]]] = {}
    for outcome in (calm, killed):
        curves[f"{outcome.name}: training"] = sorted(outcome.rewards.items())
        curves[f"{outcome.name}: held out"] = sorted(
            (version, result.overall.mean or 0.0) for version, result in outcome.evaluations.items()
        )
    run.curve.write_text(svg.draw(curves, title="mean reward", below="step"))
    has_learnt = True
    for outcome in (calm, killed):
        learnt, said = lesson_of(outcome, run)
        has_learnt &= learnt
        print(f"{outcome.name}, {outcome.seconds:.0f} s: {said}")
        for fault in outcome.faults:
            print(f"  WRONG: {fault}")
    is_right = not calm.faults and not killed.faults
    if killed.killed_in is None or not killed.again:
        is_right = False
        print("WRONG: the driver was not killed in mid-run, or nothing came again")
    if steps := differing(calm.ledger, killed.ledger):
        is_right = False
        print(f"WRONG: steps {steps} were trained on other items than undisturbed")
    else:
        again = f"{killed.again} came again after the kill"
        print(f"the same ledger: {run.steps} steps of {GROUPS} items, each once; {again}")
    print(f"{'it learnt' if has_learnt else 'it did NOT learn'}; the ledgers are {'correct' if is_right else 'WRONG'}")
    return has_learnt and is_right


if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "This example trains with torch, which is not installed here. Say: pip install 'raystore[torch]'. Or, in a "
            "checkout: make example-transformer, which makes an environment for it, and says first how large that is."
        )
    if sys.argv[1:2] == ["--trainer"]:
        asyncio.run(train(json.loads(sys.argv[2])))
    else:
        harness.run("transformer_grpo", main, __doc__, runners=2, steps=84, quick=24)
