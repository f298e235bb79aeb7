"""A small transformer in plain torch, for the CPU: its weights, sampling from it, and a step of GRPO.

Weights are a dict of tensors by name. They travel as numpy arrays, so that whoever has no torch can read them, too.
Not here: the task (digits.py), and the loop (08_transformer_grpo.py).
"""

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import ANSWER, END, PAD, PROMPT, TOKENS, prompt_of, reward_of
from torch.nn import functional

import raystore as rs

WIDTH, LAYERS, HEADS = 64, 2, 4
RATE, CLIP_LOW, CLIP_HIGH, ENTROPY, EPOCHS, PARTS = 2e-3, 0.2, 0.28, 0.01, 2, 2
LEAST = 0.1  # added to the deviation of a group, so that one that is nearly all right does not move the model much
GATHER_SECONDS = 0.003  # that a runner waits for others to sample with
KEPT = 4  # versions of the weights in a runner: the trainer's last ones, and that of an evaluation

Weights = dict[str, torch.Tensor]

torch.set_num_threads(1)  # runners and trainer share the cores


# -- the model ---------------------------------------------------------------------------------------------------------


def new_weights(seed: int) -> Weights:
    """Those of a model that knows nothing."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"token": (TOKENS, WIDTH), "place": (PROMPT + ANSWER, WIDTH), "out": (TOKENS, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"{layer}.attend": (3 * WIDTH, WIDTH), f"{layer}.join": (WIDTH, WIDTH),
            f"{layer}.up": (4 * WIDTH, WIDTH), f"{layer}.down": (WIDTH, 4 * WIDTH),
        }  # fmt: skip
    weights = {name: 0.02 * torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    for name in ["norm", *(f"{layer}.{norm}" for layer in range(LAYERS) for norm in ("norm1", "norm2"))]:
        weights[name] = torch.ones(WIDTH)
    return weights


def logits_of(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """For each place of each sequence, what comes next: (B, T) to (B, T, TOKENS)."""
    count, length = tokens.shape
    x = weights["token"][tokens] + weights["place"][:length]
    for layer in range(LAYERS):
        mine = {name: weights[f"{layer}.{name}"] for name in ("norm1", "attend", "join", "norm2", "up", "down")}
        attended = functional.linear(functional.rms_norm(x, (WIDTH,), mine["norm1"]), mine["attend"])
        heads = attended.view(count, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + functional.linear(seen.transpose(1, 2).reshape(count, length, WIDTH), mine["join"])
        inner = functional.gelu(functional.linear(functional.rms_norm(x, (WIDTH,), mine["norm2"]), mine["up"]))
        x = x + functional.linear(inner, mine["down"])
    return functional.linear(functional.rms_norm(x, (WIDTH,), weights["norm"]), weights["out"])


# -- sampling: the agent -----------------------------------------------------------------------------------------------


def noise_of(rollout_id: str) -> torch.Tensor:
    """The chance of a rollout, the same however often and with whom it is sampled: Gumbel noise for each token."""
    seed = int.from_bytes(hashlib.sha256(rollout_id.encode()).digest()[:7])
    uniform = torch.rand((ANSWER, TOKENS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -(-(uniform.clamp(1e-12, 1 - 1e-12).log())).log().float()


def sample(weights: Weights, prompts: torch.Tensor, noise: torch.Tensor) -> list[tuple[list[int], list[float]]]:
    """An answer to each prompt, at temperature 1: its tokens up to END, and their log-probabilities."""
    tokens, logprobs = prompts, []
    with torch.no_grad():
        for place in range(ANSWER):
            known = logits_of(weights, tokens)[:, -1].log_softmax(-1)
            drawn = (known + noise[:, place]).argmax(-1, keepdim=True)  # a draw from the softmax: the Gumbel-max trick
            tokens = torch.cat([tokens, drawn], 1)
            logprobs.append(known.gather(1, drawn))
    answers = []
    for answer, of_it in zip(tokens[:, PROMPT:].tolist(), torch.cat(logprobs, 1).tolist(), strict=True):
        length = answer.index(END) + 1 if END in answer else ANSWER
        answers.append((answer[:length], of_it[:length]))
    return answers


@dataclass
class Wish:
    """One rollout that waits for its answer."""

    weights: Weights
    prompt: list[int]
    noise: torch.Tensor
    answer: asyncio.Future[tuple[list[int], list[float]]]


class Solver:
    """The agent. Rollouts that a runner works on at once are sampled in one batch; each is a claim of its own."""

    def setup(self) -> None:
        self.models: dict[int, Weights] = {}
        self.waiting: list[Wish] = []

    async def __call__(self, digits: list[int], ctx: rs.Context) -> float:
        """Answer, record the tokens with their log-probabilities, and be judged."""
        wish = Wish(
            weights=await self.weights_for(ctx),
            prompt=prompt_of(digits),
            noise=noise_of(ctx.rollout.rollout_id),
            answer=asyncio.get_running_loop().create_future(),
        )
        if not self.waiting:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self.answer_all)
        self.waiting.append(wish)
        answer, logprobs = await wish.answer
        ctx.llm(prompt_ids=wish.prompt, response_ids=answer, logprobs=logprobs, model="transformer")
        return reward_of(digits, answer)

    async def weights_for(self, ctx: rs.Context) -> Weights:
        """Those of the version that the rollout was claimed with: for an evaluation, maybe an older one."""
        version = ctx.attempt.resources_version
        assert version is not None
        weights = self.models.pop(version, None)
        if weights is None:
            arrays = await ctx.resources["weights"].aget()
            loaded = {name: torch.tensor(values) for name, values in arrays.items()}
            weights = self.models.pop(version, loaded)  # unless another rollout was quicker
        self.models[version] = weights
        for unused in list(self.models)[:-KEPT]:
            del self.models[unused]
        return weights

    def answer_all(self) -> None:
        """Sample for all that wait, those of the same weights together."""
        waiting, self.waiting = self.waiting, []
        for weights in {id(wish.weights): wish.weights for wish in waiting}.values():
            wishes = [wish for wish in waiting if wish.weights is weights and not wish.answer.done()]  # or cancelled
            if not wishes:
                continue
            try:
                prompts = torch.tensor([wish.prompt for wish in wishes])
                answers = sample(weights, prompts, torch.stack([wish.noise for wish in wishes]))
            except Exception as error:
                for wish in wishes:
                    wish.answer.set_exception(error)
            else:
                for wish, answer in zip(wishes, answers, strict=True):
                    wish.answer.set_result(answer)


# -- training ----------------------------------------------------------------------------------------------------------


class Learner:
    """The model of the trainer: weights, optimiser, and in which step which rollout of which group went into them."""

    def __init__(self, seed: int, steps: int) -> None:
        self.step, self.steps = 0, steps
        self.consumed: list[tuple[int, str, str]] = []  #: step, group, rollout
        self.weights = {name: weight.requires_grad_() for name, weight in new_weights(seed).items()}
        self.optimiser = torch.optim.AdamW(self.weights.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.chance = torch.Generator().manual_seed(seed)

    @property
    def parameters(self) -> int:
        """How many numbers there are to learn."""
        return sum(weight.numel() for weight in self.weights.values())

    def arrays(self) -> dict[str, Any]:
        """The weights as numpy arrays, to be published."""
        return {name: weight.detach().numpy().copy() for name, weight in self.weights.items()}

    def train(self, groups: Sequence[rs.FeedGroup], spans: Mapping[str, Sequence[rs.Span]]) -> dict[str, float]:
        """One step of GRPO: advantages within each group, and PPO's clipped ratios to the policy that sampled."""
        sequences, advantages = [], []
        for group in groups:
            rewards = np.array(group.rewards)  # also of members that vote and are not trained on, behind the others
            better = (rewards - rewards.mean()) / (rewards.std() + LEAST)
            for rollout, advantage in zip(group.train, better, strict=False):
                (sequence,) = rs.trajectories(spans[rollout.rollout_id])
                sequences.append(sequence)
                advantages.append(advantage)
        batch = {name: torch.from_numpy(values) for name, values in rs.collate(sequences, pad_id=PAD).items()}
        batch["advantages"] = torch.tensor(advantages, dtype=torch.float32)
        told: dict[str, float] = {}
        for parameters in self.optimiser.param_groups:  # in the last third ever smaller, since such steps are noise
            parameters["lr"] = RATE * min(1.0, 0.05 + 3 * (1 - self.step / self.steps))
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(sequences), generator=self.chance).chunk(PARTS):
                loss, told = loss_of(self.weights, {name: values[rows] for name, values in batch.items()})
                self.optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
                self.optimiser.step()
        self.step += 1
        for group in groups:
            self.consumed += [(self.step, group.group_id, rollout.rollout_id) for rollout in group.train]
        return told

    def save(self, path: Path) -> int:
        """Make the model durable, all of it or none; its step."""
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        state = {
            "step": self.step, "consumed": self.consumed, "weights": weights,
            "optimiser": self.optimiser.state_dict(), "chance": self.chance.get_state(),
        }  # fmt: skip
        with open(path.with_suffix(".new"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".new").rename(path)
        return self.step

    def load(self, path: Path) -> int:
        """Go on with the newest model that is durable, if there is one; its step."""
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step, self.consumed = state["step"], state["consumed"]
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(state["weights"][name])
            self.optimiser.load_state_dict(state["optimiser"])
            self.chance.set_state(state["chance"])
        return self.step


def loss_of(weights: Weights, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss over generated tokens, and what is worth a look."""
    tokens, mask = batch["token_ids"], batch["loss_mask"][:, 1:].float()
    known = logits_of(weights, tokens)[:, :-1].log_softmax(-1)  # what stands at a place predicts the next
    new = known.gather(2, tokens[:, 1:, None]).squeeze(2)
    ratio = ((new - batch["logprobs"][:, 1:]) * mask).exp()
    advantage = batch["advantages"][:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    entropy = -(known.exp() * known).sum(-1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum() / mask.sum()

    is_clipped = (ratio < 1 - CLIP_LOW) | (ratio > 1 + CLIP_HIGH)
    told = {"entropy": mean(entropy).item(), "clipped": mean(is_clipped.float()).item()}
    return mean(-gain - ENTROPY * entropy), told
