"""Learn which prompt template works best: a training loop in its smallest form, on a local Ray cluster.

A driver publishes three templates as versioned resources and enqueues tasks; runners claim them, fill in a template,
ask an "LLM" (a rule-based, noisy grader that is content more often the better it is asked) and report a reward. The
driver reads the rewards, updates its preferences, and publishes the next version: a gradient bandit.

    python examples/01_prompt_bandit.py --runners 4 --steps 20 --seed 0
"""

import random
import time
from math import exp
from typing import Any

import harness

import raystore as rs

TEMPLATES = [
    "{question}",
    "Answer with a number: {question}",
    "Think step by step, then answer with a number: {question}",
]
SKILL = [0.35, 0.55, 0.85]  # how often the grader is content with each; the driver does not know
BATCH = 32


def agent(task: dict[str, Any], ctx: rs.Context) -> float:
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


async def train(store: rs.RayLightningStore, run: harness.Run) -> list[float]:
    """The algorithm: a plain async function over a store. Returns the mean reward of each step."""
    preferences = [0.0] * len(TEMPLATES)
    curve: list[float] = []
    for step in range(run.steps):
        await store.update_resources(
            "prompts",
            {f"template_{i}": rs.PromptTemplate(template=t, engine="f-string") for i, t in enumerate(TEMPLATES)},
            policy_version=step,
        )
        policy = softmax(preferences)
        arms = random.Random(f"{run.seed}/{step}").choices(range(len(TEMPLATES)), policy, k=BATCH)
        tasks = [
            {"question": f"{step} + {index} = ?", "arm": arm, "seed": run.seed, "step": step, "index": index}
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
        run.log(step=step, reward=mean, policy=policy, seconds=time.monotonic() - started)
        if run.shows(step):
            print(f"step {step:3}  reward {mean:.2f}  {'#' * round(30 * mean):30}  best template {max(policy):4.0%}")
    return curve


async def main(run: harness.Run) -> bool:
    async with rs.start() as store, rs.RunnerPool(store, agent, size=run.runners):
        curve = await train(store, run)
    run.draw({"gradient bandit": curve})
    chance, after = sum(SKILL) / len(SKILL), harness.tail(curve)
    learnt = after >= chance + 0.15
    print(f"mean reward {after:.2f} ({chance:.2f} by chance): {'it learnt' if learnt else 'it did NOT learn'}")
    print("next: make demo ARGS='--seed 1 --runners 8', then an agent of your own in examples/01_prompt_bandit.py")
    return learnt


if __name__ == "__main__":
    harness.run("prompt_bandit", main, __doc__)
