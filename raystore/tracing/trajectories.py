"""From spans to what a trainer takes: triplets (each model call by itself), trajectories (turns joined), and batches.

A turn belongs to the sequence that its prompt continues, token for token, so that each generated token is in the loss
of one sequence only, as it was sampled. Nothing is tokenised here: what does not continue begins a sequence of its own,
and says why.
Not here: reading the spans (`calls`), advantages, which are an algorithm's business.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raystore.errors import InvalidValueError, PayloadNotReadableError
from raystore.reports.log import a_minute, logger_of
from raystore.tracing.calls import ModelCall, by_attempt, checked_spans, model_calls, with_token_ids
from raystore.types.spans import Span, find_final_reward
from raystore.values.plain import scalar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger: logging.Logger = logger_of("raystore.tracing")

UNKNOWN_VERSION: int = -1  #: in place of a policy version, where a token was not generated or its version is not known


def _final_rewards(spans: Iterable[Span]) -> dict[tuple[str, str], float | None]:
    """The final reward of each attempt, by rollout and attempt; None too if its reward span cannot be decoded here."""
    rewards: dict[tuple[str, str], float | None] = {}
    for key, attempt in by_attempt(spans).items():
        try:
            rewards[key] = find_final_reward(attempt)
        except PayloadNotReadableError as error:
            logger.warning(
                "The reward of attempt %s of rollout %s is not known: %s", key[1], key[0], error,
                extra=a_minute("no reward", error.module),
            )  # fmt: skip
            rewards[key] = None
    return rewards


# -- triplets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Triplet:
    """One call of a model within an attempt, ready to train on.

    Attributes:
        prompt_ids: token ids of the prompt; `numpy.asarray` and `torch.frombuffer` read them in place.
        response_ids: token ids that the model generated.
        logprobs: natural logarithm of the probability of each response token under the policy that generated it; None
            if not known.
        reward: the final reward of the attempt, the same for all its calls; None if it has none.
        policy_version: of the weights that the attempt was claimed with; None if the driver gave none.
        rollout_id: the rollout that it comes from.
        attempt_id: the attempt that it comes from.
        span_id: the span with the token ids.
    """

    prompt_ids: array[int]
    response_ids: array[int]
    logprobs: array[float] | None
    reward: float | None
    policy_version: int | None
    rollout_id: str
    attempt_id: str
    span_id: str


def triplets(spans: Sequence[Span]) -> list[Triplet]:
    """The model calls among these spans that carry token ids, in the order given.

    Takes the spans of one rollout or of several, as `query_spans` and `query_many_spans` give them; each attempt has a
    reward of its own (`find_final_reward`). Understands what `ctx.llm` records and the tracers of `docs/spans.md`; a
    call that several of them trace is one (`model_calls`).

    Logs the spans that cannot be read and are passed over, and, once in a process, calls without token ids and calls
    without log-probabilities, with what to do about it. Raises `InvalidValueError` for what is no span.
    """
    spans = checked_spans(spans)
    rewards = _final_rewards(spans)
    return [
        Triplet(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            logprobs=call.logprobs,
            reward=rewards[call.rollout_id, call.attempt_id],
            policy_version=call.policy_version,
            rollout_id=call.rollout_id,
            attempt_id=call.attempt_id,
            span_id=call.span_id,
        )
        for call, prompt_ids, response_ids in with_token_ids(model_calls(spans))
    ]


# -- trajectories ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Why a turn began a new sequence although its agent had one already; `str` says it in words.

    Attributes:
        reason: "drift": the prompt differs within an answer of the model, whose text was tokenised again or edited (a
            chat template drops thoughts). "branch": the prompt differs after an answer, or ends before it differs:
            sampled again, or another continuation. "other": it differs within the first prompt: a sub-agent, or a
            history that was cut.
        token: index of the first token of the prompt that differs; the prompt's length if it ends there.
        span_id: the last turn of the sequence with which the prompt agrees longest.
    """

    reason: Literal["drift", "branch", "other"]
    token: int
    span_id: str

    def __str__(self) -> str:
        why = {
            "drift": "the text that was generated there was tokenised again, or edited",
            "branch": "the conversation goes on differently from there",
            "other": "it is another prompt",
        }
        return f"token {self.token} is not that of the sequence that ends with span {self.span_id}: {why[self.reason]}"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sequence of tokens: turns of one agent in one attempt, each prompt a continuation of the turn before.

    Attributes:
        token_ids: prompt, response, tokens added by the next prompt, response, ... This array and the next three have
            one value for each token.
        loss_mask: 1 for a token that the model generated, else 0.
        logprobs: natural logarithm of the probability of a generated token, 0.0 for another; None unless they are known
            for all turns.
        policy_versions: version of the weights that generated a token; -1 for another token, and if it is not known.
        turns: index of the first token of each response, and the index behind its last.
        span_ids: the span of each turn.
        reward: the final reward of the attempt, the same for all its trajectories; None if it has none.
        role: name of the agent (`ModelCall.role`), to tell policies from each other; None if spans name none.
        split: why it does not continue an earlier sequence of its role; None for the first.
        rollout_id: the rollout that it comes from.
        attempt_id: the attempt that it comes from.
    """

    token_ids: array[int]
    loss_mask: array[int]
    logprobs: array[float] | None
    policy_versions: array[int]
    turns: tuple[tuple[int, int], ...]
    span_ids: tuple[str, ...]
    reward: float | None
    role: str | None
    split: Split | None
    rollout_id: str
    attempt_id: str

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        role = "" if self.role is None else f" of {self.role}"
        counts = f"{len(self.turns)} turns, {len(self)} tokens, {sum(self.loss_mask)} generated"
        return f"<Trajectory{role} in {self.rollout_id}: {counts}, reward {self.reward}>"


def trajectories(spans: Sequence[Span]) -> list[Trajectory]:
    """The model calls among these spans as sequences of tokens, in the order of their first turns.

    Takes the spans of one rollout or of several, as `query_spans` and `query_many_spans` give them. Within an attempt
    and a role, a call whose prompt begins with all tokens of a sequence (the longest, if there are several) is its next
    turn; any other begins a sequence, and `Trajectory.split` says why. So sub-agents, samples of the same prompt and
    drift after tokenising again are apart, and no generated token is trained on twice. Which spans count, what is
    logged, and which errors are raised, is as for `triplets`.
    """
    spans = checked_spans(spans)
    rewards = _final_rewards(spans)
    found = _sequences(model_calls(spans))
    return [one.made(rewards[one.first.rollout_id, one.first.attempt_id]) for one in found]


def count_tokens(calls: Sequence[ModelCall]) -> int:
    """How many tokens the sequences have that `trajectories` makes of these calls."""
    return sum(len(one.token_ids) for one in _sequences(calls))


def _sequences(calls: Sequence[ModelCall]) -> list[_Sequence]:
    """These calls as turns of sequences, in the order of their first turns."""
    found: list[_Sequence] = []
    by_agent: dict[tuple[str, str, str | None], list[_Sequence]] = {}
    for call, prompt, response in with_token_ids(calls):
        known = by_agent.setdefault((call.rollout_id, call.attempt_id, call.role), [])
        candidates = [one for one in known if one.is_continued_by(prompt)]
        continued = max(candidates, key=lambda one: len(one.token_ids), default=None)
        if continued is None:
            continued = _Sequence(call, _split(prompt, known))
            known.append(continued)
            found.append(continued)
        continued.add(call, prompt, response)
    return found


class _Sequence:
    """A trajectory under construction."""

    def __init__(self, first: ModelCall, split: Split | None) -> None:
        self.first = first
        self.split = split
        self.token_ids: array[int] = array("q")
        self.logprobs: array[float] | None = array("d")
        self.versions: array[int] = array("q")
        self.turns: list[tuple[int, int]] = []
        self.span_ids: list[str] = []

    def is_continued_by(self, prompt: array[int]) -> bool:
        """Whether a prompt begins with all tokens of this sequence."""
        return self.token_ids.tobytes() == _wide(prompt[: len(self.token_ids)]).tobytes()

    def add(self, call: ModelCall, prompt: array[int], response: array[int]) -> None:
        """Add a turn, whose prompt continues this sequence."""
        added = len(prompt) - len(self.token_ids)
        version = UNKNOWN_VERSION if call.policy_version is None else call.policy_version
        self.token_ids.extend(_wide(prompt[len(self.token_ids) :]))
        self.turns.append((len(self.token_ids), len(self.token_ids) + len(response)))
        self.token_ids.extend(_wide(response))
        self.versions.extend([UNKNOWN_VERSION] * added + [version] * len(response))
        self.span_ids.append(call.span_id)
        if response and call.logprobs is None:
            self.logprobs = None
        if self.logprobs is not None:
            self.logprobs.extend([0.0] * added)
            self.logprobs.extend(array("d", call.logprobs or ()))

    def made(self, reward: float | None) -> Trajectory:
        mask = array("b", bytes(len(self.token_ids)))
        for start, end in self.turns:
            mask[start:end] = array("b", b"\1" * (end - start))
        return Trajectory(
            token_ids=_narrow(self.token_ids),
            loss_mask=mask,
            logprobs=self.logprobs,
            policy_versions=self.versions,
            turns=tuple(self.turns),
            span_ids=tuple(self.span_ids),
            reward=reward,
            role=self.first.role,
            split=self.split,
            rollout_id=self.first.rollout_id,
            attempt_id=self.first.attempt_id,
        )


def _split(prompt: array[int], known: Sequence[_Sequence]) -> Split | None:
    """Why a prompt continues none of its role's sequences; None if there are none."""
    if not known:
        return None
    agreed, nearest = max(((_agreed(one.token_ids, prompt), one) for one in known), key=lambda found: found[0])
    reason: Literal["drift", "branch", "other"]
    if agreed < nearest.turns[0][0] and agreed < len(prompt):
        reason = "other"
    elif agreed < len(prompt) and any(start <= agreed < end for start, end in nearest.turns):
        reason = "drift"
    else:
        reason = "branch"
    return Split(reason, agreed, nearest.span_ids[-1])


def _agreed(one: array[int], other: array[int]) -> int:
    """How many tokens two sequences have in common at their beginning, by bisection."""
    other = _wide(other)
    low, high = 0, min(len(one), len(other))
    while low < high:  # all before `low` agree, and not all before `high + 1`
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _wide(ids: array[int]) -> array[int]:
    return ids if ids.typecode == "q" else array("q", ids)


def _narrow(ids: array[int]) -> array[int]:
    try:
        return array("i", ids)
    except OverflowError:
        return ids


def collate(trajectories: Iterable[Trajectory], *, pad_id: int) -> dict[str, NDArray[Any]]:
    """Trajectories as one batch of numpy arrays, padded at the right; row `i` is the trajectory given as number `i`.

    With B trajectories, of which the longest has T tokens:

    | key | shape, dtype | what |
    |---|---|---|
    | `token_ids` | (B, T) int64 | token ids, then `pad_id` |
    | `attention_mask` | (B, T) int64 | 1 for tokens, 0 for padding |
    | `loss_mask` | (B, T) int64 | 1 for tokens that the model generated |
    | `logprobs` | (B, T) float32 | of those; nan where not known; 0 elsewhere |
    | `policy_versions` | (B, T) int64 | of those; -1 where not known, and elsewhere |
    | `lengths` | (B,) int64 | tokens of each trajectory |
    | `rewards` | (B,) float32 | final reward; nan where the attempt has none |

    `{name: torch.from_numpy(values) for name, values in batch.items()}` makes tensors of it. Positions are those of the
    sequence: the logits at `t - 1` predict token `t`.

    Args:
        trajectories: what `trajectories` gives, of any rollouts.
        pad_id: the tokenizer's padding token; masked, so that any id will do.

    Raises `InvalidValueError` for anything else, and `ModuleNotFoundError` if numpy is not installed.
    """
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("rs.collate needs numpy: pip install numpy", name="numpy") from error
    if not isinstance(trajectories, Iterable):
        raise InvalidValueError("trajectories", trajectories, "a list of trajectories, as rs.trajectories gives them")
    rows = list(trajectories)
    for number, row in enumerate(rows):
        if not isinstance(row, Trajectory):
            raise InvalidValueError(f"trajectories[{number}]", row, "a Trajectory, as rs.trajectories gives them")
    padding = scalar(pad_id)
    if type(padding) is not int:
        raise InvalidValueError("pad_id", pad_id, "a whole number, such as tokenizer.pad_token_id")
    shape = (len(rows), max(map(len, rows), default=0))
    batch: dict[str, np.ndarray[Any, Any]] = {
        "token_ids": np.full(shape, padding, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "loss_mask": np.zeros(shape, np.int64),
        "logprobs": np.zeros(shape, np.float32),
        "policy_versions": np.full(shape, UNKNOWN_VERSION, np.int64),
        "lengths": np.array([len(row) for row in rows], np.int64),
        "rewards": np.array([math.nan if row.reward is None else row.reward for row in rows], np.float32),
    }
    for number, row in enumerate(rows):
        length = len(row)
        batch["token_ids"][number, :length] = row.token_ids
        batch["attention_mask"][number, :length] = 1
        batch["loss_mask"][number, :length] = row.loss_mask
        batch["policy_versions"][number, :length] = row.policy_versions
        if row.logprobs is None:
            batch["logprobs"][number, :length][np.asarray(row.loss_mask, bool)] = math.nan
        else:
            batch["logprobs"][number, :length] = row.logprobs
    return batch
