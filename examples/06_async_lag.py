"""What it gives, and costs, to run ahead of the trainer, with agents of which the slow ones do better.

An agent thinks for a time that it draws from its policy, a lognormal distribution; the longer it has thought, the
better its answer. The policy is one number, the mean of the logarithm, and learns to think longer. The same tasks are
trained seven times: in step with the trainer (`max_lag=0`), and up to 2 or 8 batches ahead of it, where a batch waits
for groups that would be too late ("wait"), trains on them nevertheless ("train"), or drops them ("drop"). The SVG shows
side by side the wall time, the rewards, how late groups were trained, and how long those agents thought that were
started and those that were trained on: to drop what is late is to drop what thought long.

    python examples/06_async_lag.py --runners 2 --steps 20 --seed 0
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import harness
import numpy as np

import raystore as rs

BATCH, SIZE = 8, 4
RUNS = [(0, "wait"), *((max_lag, late) for max_lag in (2, 8) for late in ("wait", "train", "drop"))]
SECONDS = 0.008  # that an agent takes for each unit of length
TRAIN_SECONDS = 0.05  # that a step of the trainer takes
START, SPREAD, RATE = log(3.0), 1.2, 0.1  # of the policy
LONGEST = 5.5  # logarithm of the largest length


def length_of(rollout_id: str, mean: float) -> float:
    """How long the agent of a rollout thinks under a policy: the same whoever asks."""
    return exp(min(mean + SPREAD * random.Random(rollout_id).gauss(), LONGEST))


async def agent(task: dict[str, Any], ctx: rs.Context) -> float:
    """Think; the longer, the better the answer."""
    length = length_of(ctx.rollout.rollout_id, ctx.resources["weights"].get())
    await asyncio.sleep(SECONDS * length)
    hardness: float = task["hardness"]
    return length / (length + hardness)


def improve(mean: float, groups: Sequence[rs.FeedGroup]) -> float:
    """One step of GRPO for the only parameter: towards the lengths that were better than others of their group."""
    steps = []
    for group in groups:
        noise = np.array([random.Random(rollout.rollout_id).gauss() for rollout in group.train])
        rewards = np.array(group.rewards)
        steps.append(np.mean((rewards - rewards.mean()) / (rewards.std() + 1e-6) * noise))
    return mean + RATE * SPREAD * float(np.mean(steps))


@dataclass
class Result:
    """What came of one way to run."""

    max_lag: int
    late: str
    seconds: float = 0.0
    rewards: list[float] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)  # lengths
    started: list[float] = field(default_factory=list)
    learnt: float = 0.0  # the median length under the policy in the end
    report: rs.SelectionReport | None = None  # what the store says of what was trained on

    @property
    def name(self) -> str:
        return f"max_lag={self.max_lag}, late={self.late}"


async def train(store: rs.RayLightningStore, run: harness.Run, max_lag: int, late: Any) -> Result:
    """The algorithm, over all tasks."""
    result = Result(max_lag, late)
    hardness = np.random.default_rng(run.seed).lognormal(log(6.0), 0.5, run.steps * BATCH)
    data = [{"hardness": float(number)} for number in hardness]
    policy, begun = [START], time.monotonic()
    name = f"{late}-{max_lag}"
    async with store.feed(
        name, data, resources_id=name, size=SIZE, batch=BATCH, max_lag=max_lag, late=late, require=()
    ) as feed:
        await feed.publish(START, version=0)
        async for batch in feed.batches():
            await asyncio.sleep(TRAIN_SECONDS)
            step = len(policy)
            policy.append(improve(policy[-1], batch.groups))
            await feed.publish(policy[-1], version=step)
            await batch.ack(step=step)
            result.rewards.append(float(np.mean([group.rewards for group in batch.groups])))
            result.lags += [group.lag.total for group in batch.groups]
            for group in batch.groups:
                for rollout, (_, version) in zip(group.train, group.versions, strict=True):
                    result.trained.append(length_of(rollout.rollout_id, policy[version or 0]))
            run.log(max_lag=max_lag, late=late, step=step, reward=result.rewards[-1], policy=policy[-1])
    result.seconds, result.learnt = time.monotonic() - begun, exp(policy[-1])
    result.report = await store.selection_report(name)
    everything = await store.query_rollouts(tags={"env": name})
    result.started = [
        length_of(r.rollout_id, policy[r.attempt.policy_version or 0])
        for r in everything
        if isinstance(r, rs.AttemptedRollout)
    ]
    return result


def faults(results: Iterable[Result]) -> list[str]:
    """What did not turn out as this example says."""
    found = []
    by_name = {result.name: result for result in results}
    for name, result in by_name.items():
        if result.late != "train" and max(result.lags) > result.max_lag:
            found.append(f"{name}: a group was trained with lag {max(result.lags)}")
        if result.late != "drop" and sorted(result.trained) != sorted(result.started):
            found.append(f"{name}: what was trained on is not what was started")
        if result.late != "drop" and (result.report is None or result.report.is_biased):
            found.append(f"{name}: the store finds a bias where nothing was dropped")
    dropped = by_name["max_lag=2, late=drop"]
    if not np.mean(dropped.trained) < np.mean(dropped.started):
        found.append("dropping what is late did not drop what is long")
    if max(by_name["max_lag=2, late=train"].lags) <= 2:
        found.append("nothing was late")
    if not by_name["max_lag=8, late=train"].seconds < 0.8 * by_name["max_lag=0, late=wait"].seconds:
        found.append("running ahead did not save time")
    return found


# -- the picture -------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, PITCH = 190, 70, 120  # of one chart, and from one row to the next
COLUMNS = ("wall time", "mean reward of each batch", "lag when trained", "length: started (grey) and trained")


def bars(x: float, y: float, counts: Sequence[float], most: float, colour: str) -> str:
    """A histogram with its foot at y."""
    width = WIDTH / len(counts)
    return "".join(
        f'<rect x="{x + number * width:.1f}" y="{y - HEIGHT * count / most:.1f}" width="{width - 1:.1f}" '
        f'height="{HEIGHT * count / most:.1f}" fill="{colour}"/>'
        for number, count in enumerate(counts)
    )


def picture(results: Sequence[Result]) -> str:
    """One row for each result, and a chart of it in each column."""
    longest = max(result.seconds for result in results)
    lags = max(max(result.lags) for result in results) + 1
    edges = np.linspace(0, LONGEST, 23)
    said = [
        f'<text x="{20 + number * (WIDTH + 30)}" y="24" font-weight="bold">{title}</text>'
        for number, title in enumerate(COLUMNS)
    ]
    for row, result in enumerate(results):
        xs = [20 + column * (WIDTH + 30) for column in range(len(COLUMNS))]
        foot = 130 + row * PITCH
        said.append(f'<text x="{xs[0]}" y="{foot - HEIGHT - 12}">{result.name}</text>')
        width = WIDTH * result.seconds / longest
        said.append(
            f'<rect x="{xs[0]}" y="{foot - 40}" width="{width:.1f}" height="20" fill="#06c"/>'
            f'<text x="{xs[0]}" y="{foot}">{result.seconds:.1f} s, {len(result.rewards)} batches</text>'
        )
        points = " ".join(
            f"{xs[1] + WIDTH * i / max(len(result.rewards) - 1, 1):.1f},{foot - HEIGHT * max(reward, 0):.1f}"
            for i, reward in enumerate(result.rewards)
        )
        said.append(f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>')
        at = Counter(result.lags)
        said.append(bars(xs[2], foot, [at[lag] for lag in range(lags)], len(result.lags), "#06c"))
        said.append(f'<text x="{xs[2]}" y="{foot + 14}">0 ... {lags - 1}; the latest {max(result.lags)}</text>')
        started, trained = (np.histogram(np.log(lengths), edges)[0] for lengths in (result.started, result.trained))
        most = float(max(started.max(), trained.max()))
        said.append(bars(xs[3], foot, list(started), most, "#bbb") + bars(xs[3], foot, list(trained), most, "#06c"))
        means = f"mean {np.mean(result.started):.1f}, {np.mean(result.trained):.1f}"
        said.append(f'<text x="{xs[3]}" y="{foot + 14}">1 ... {exp(LONGEST):.0f} (logarithmic), {means}</text>')
        said += [f'<line x1="{x}" x2="{x + WIDTH}" y1="{foot}" y2="{foot}" stroke="#888"/>' for x in xs[1:]]
    width, height = len(COLUMNS) * (WIDTH + 30) + 60, 160 + (len(results) - 1) * PITCH
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>{"".join(said)}</svg>'
    )


async def main(run: harness.Run) -> bool:
    results = []
    concurrency = 9 * BATCH * SIZE // run.runners  # whatever is under way runs at once
    async with rs.start() as store, rs.RunnerPool(store, agent, size=run.runners, concurrency=concurrency):
        for max_lag, late in RUNS:
            results.append(result := await train(store, run, max_lag, late))
            print(
                f"{result.name:21} {result.seconds:5.1f} s  lag {np.mean(result.lags):3.1f}, at most "
                f"{max(result.lags):2}  length {np.mean(result.trained):4.1f} trained, {np.mean(result.started):4.1f} "
                f"started, {len(result.started) - len(result.trained):3} dropped  reward "
                f"{harness.tail(result.rewards):.2f}, policy {exp(START):.0f} -> {result.learnt:.1f}"
            )
    for sentence in next(one.report.sentences for one in results if one.name == "max_lag=2, late=drop" and one.report):
        print(f"- {sentence}")
    run.curve = run.folder / "lag.svg"
    run.curve.write_text(picture(results))
    found = faults(results)
    for fault in found:
        print(f"WRONG: {fault}")
    learnt = all(harness.tail(result.rewards) > result.rewards[0] for result in results)
    print(f"{'it learnt' if learnt else 'it did NOT learn'}; {'each did what it says' if not found else 'see above'}")
    return learnt and not found


if __name__ == "__main__":
    harness.run("async_lag", main, __doc__, runners=2, steps=20)
