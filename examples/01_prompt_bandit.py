"""Learn which prompt template works best: a training loop in its smallest form, on a local Ray cluster.

A driver publishes three templates as versioned resources and enqueues tasks; runners claim them, fill in a template,
ask an "LLM" (a rule-based, noisy grader that is content more often the better it is asked) and report a reward. The
driver reads the rewards, updates its preferences, and publishes the next version: a gradient bandit.

    python examples/01_prompt_bandit.py --runners 4 --steps 20 --seed 0
"""

import argparse
import asyncio
import json
import random
import time
from math import exp
from pathlib import Path

import ray

import raystore as rs

TEMPLATES = [
    "{question}",
    "Answer with a number: {question}",
    "Think step by step, then answer with a number: {question}",
]
SKILL = [0.35, 0.55, 0.85]  # how often the grader is content with each; the driver does not know
BATCH = 32


def agent(task: dict, ctx: rs.Context) -> float:
    """Ask the "LLM" with the template that the driver chose for this task; the reward is 1 or 0."""
    template = ctx.resources[f"template_{task['arm']}"]
    with ctx.span("chat", template=template.template) as span:
        prompt = template.format(question=task["question"])
        # Keyed by what the task is, not by who runs it: the same seed gives the same run on any number of runners.
        noise = random.Random(f"{task['seed']}/{task['step']}/{task['index']}").random()
        reward = float(noise < SKILL[TEMPLATES.index(template.template)])
        span.update({"prompt": prompt, "correct": bool(reward)})
    return reward


def softmax(preferences: list[float]) -> list[float]:
    weights = [exp(p - max(preferences)) for p in preferences]
    return [w / sum(weights) for w in weights]


async def train(store: rs.RayLightningStore, steps: int, seed: int, log: Path) -> list[float]:
    """The algorithm: a plain async function over a store. Returns the mean reward of each step."""
    preferences = [0.0] * len(TEMPLATES)
    curve: list[float] = []
    for step in range(steps):
        await store.update_resources(
            "prompts",
            {f"template_{i}": rs.PromptTemplate(template=t, engine="f-string") for i, t in enumerate(TEMPLATES)},
            policy_version=step,
        )
        policy = softmax(preferences)
        arms = random.Random(f"{seed}/{step}").choices(range(len(TEMPLATES)), policy, k=BATCH)
        tasks = [
            {"question": f"{step} + {index} = ?", "arm": arm, "seed": seed, "step": step, "index": index}
            for index, arm in enumerate(arms)
        ]
        started = time.monotonic()
        rollouts = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=t, mode="train") for t in tasks])
        finished = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in rollouts])
        rewards = [r.reward or 0.0 for r in finished]  # in the order of the tasks, whoever was first
        mean = sum(rewards) / len(rewards)
        for task, reward in zip(tasks, rewards, strict=True):
            for arm in range(len(TEMPLATES)):
                preferences[arm] += 0.15 * (reward - mean) * ((arm == task["arm"]) - policy[arm])
        curve.append(mean)
        record = {"step": step, "reward": mean, "policy": policy, "seconds": time.monotonic() - started}
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if step % max(steps // 15, 1) == 0 or step == steps - 1:
            print(f"step {step:3}  reward {mean:.2f}  {'#' * round(30 * mean):30}  best template {max(policy):4.0%}")
    return curve


def draw(curve: list[float], path: Path) -> None:
    """Write the reward curve as SVG."""
    points = " ".join(f"{60 + 520 * i / max(len(curve) - 1, 1):.1f},{260 - 220 * r:.1f}" for i, r in enumerate(curve))
    grid = "".join(
        f'<line x1="60" x2="580" y1="{260 - 220 * v}" y2="{260 - 220 * v}" stroke="#ddd"/>'
        f'<text x="50" y="{264 - 220 * v}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.5, 1)
    )
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 300" font-family="sans-serif" font-size="12">'
        f'<rect width="620" height="300" fill="white"/>{grid}<text x="320" y="290" text-anchor="middle">step</text>'
        f'<text x="60" y="24">mean reward</text><polyline points="{points}" fill="none" stroke="#06c" '
        'stroke-width="2"/></svg>'
    )


async def main(runners: int, steps: int, seed: int, folder: Path) -> int:
    log = folder / "metrics.jsonl"
    ray.init(logging_level="error")  # quiet; Ray's own order of addresses: RAY_ADDRESS, a cluster that runs, a new one
    async with rs.start() as store, rs.RunnerPool(store, agent, size=runners):
        curve = await train(store, steps, seed, log)
    draw(curve, folder / "reward.svg")
    tail = curve[-max(len(curve) // 5, 1) :]
    chance, after = sum(SKILL) / len(SKILL), sum(tail) / len(tail)
    learnt = after >= chance + 0.15
    print(f"mean reward {after:.2f} ({chance:.2f} by chance): {'it learnt' if learnt else 'it did NOT learn'}")
    print(f"curve {folder}/reward.svg, metrics {log}")
    print(
        "next: make demo ARGS='--seed 1 --runners 8', then put an agent of your own into examples/01_prompt_bandit.py"
    )
    return 0 if learnt else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runners", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path("runs/prompt_bandit")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    print(f"learning a prompt with {arguments.runners} runners; Ray starts, which takes some seconds ...", flush=True)
    try:
        raise SystemExit(asyncio.run(main(arguments.runners, arguments.steps, arguments.seed, folder)))
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
