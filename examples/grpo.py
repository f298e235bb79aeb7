"""GRPO in numpy on a multi-turn tool task: what the examples 02 and 05 train.

The task: find out a hidden code by looking up its digits, one tool call each, then answer it. The policy is a table of
logits; what an agent does follows from the id of its rollout and the policy, however often it is run.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import raystore as rs

DIGITS, VALUES, TURNS = 3, 4, 6
ANSWER = 3  # tokens 0, 1, 2 look up a digit; in a state of answering a token is a digit
UNKNOWN = 2**DIGITS + VALUES  # states: what is known already (a bit for each digit), then answering with a known value
GROUPS, SIZE = 16, 8
RATE, CLIP = 8.0, 0.2


def new_policy() -> np.ndarray:
    """Logits of a policy that knows nothing."""
    return np.zeros((UNKNOWN + 1, VALUES))


def tasks(seed: int, steps: int) -> list[dict[str, list[int]]]:
    """The dataset: a hidden code for each group of so many steps."""
    drawn = np.random.default_rng(seed).integers(VALUES, size=(steps * GROUPS, DIGITS))
    return [{"code": code} for code in drawn.tolist()]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


async def agent(task: dict[str, Any], ctx: rs.Context) -> float:
    """Look up digits until the policy wants to answer; the reward is the part of the code that is right."""
    policy = softmax(ctx.resources["weights"].get())
    draw = np.random.default_rng(list(ctx.rollout.rollout_id.encode()))

    def act(state: int) -> int:
        token = int(draw.choice(VALUES, p=policy[state]))
        ctx.llm(prompt_ids=[state], response_ids=[token], logprobs=[np.log(policy[state][token])], model="table")
        return token

    known: dict[int, int] = {}
    for _ in range(TURNS):
        token = act(sum(1 << digit for digit in known))
        if token == ANSWER:
            answer = [act(2**DIGITS + known[digit] if digit in known else UNKNOWN) for digit in range(DIGITS)]
            return float(np.mean(np.equal(answer, task["code"])))
        with ctx.span("look_up", digit=token) as span:
            await asyncio.sleep(0.002)  # a tool takes its time
            known[token] = task["code"][token]
            span.set("value", known[token])
    return 0.0  # never answered


def improve(logits: np.ndarray, groups: Sequence[rs.FeedGroup], spans: Mapping[str, Sequence[rs.Span]]) -> np.ndarray:
    """One step of GRPO: advantages within each group, importance ratios to the policy that acted, clipped."""
    gradient = np.zeros_like(logits)
    policy = softmax(logits)
    for group in groups:
        rewards = np.array(group.rewards)  # also of members that vote and are not trained on, behind the others
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for rollout, advantage in zip(group.train, advantages, strict=False):
            for turn in rs.triplets(spans[rollout.rollout_id]):
                assert turn.logprobs is not None
                state, token = turn.prompt_ids[0], turn.response_ids[0]
                ratio = policy[state, token] / np.exp(turn.logprobs[0])
                if not (advantage > 0 and ratio > 1 + CLIP) and not (advantage < 0 and ratio < 1 - CLIP):
                    gradient[state] += ratio * advantage * ((np.arange(VALUES) == token) - policy[state])
    return logits + RATE * gradient / (GROUPS * SIZE)
