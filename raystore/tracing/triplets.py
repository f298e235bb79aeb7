"""From spans to what a trainer takes: prompt ids, response ids, log-probabilities, reward, policy version.

Not here: reading the spans (`raystore.tracing`), turns that belong together (`trajectories`), tokenising texts,
advantages, which are an algorithm's business.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from raystore.spans import Span
from raystore.tracing.dialects import final_rewards, model_calls, with_token_ids


@dataclass(frozen=True, slots=True)
class Triplet:
    """One call of a model within an attempt, ready to train on.

    Attributes:
        prompt_ids: token ids of the prompt, packed; `numpy.asarray` and `torch.frombuffer` read them in place.
        response_ids: token ids that the model generated.
        logprobs: of the response's tokens under the policy that generated them, natural logarithm; None if not known.
        reward: the final reward of the attempt, the same for all its calls; None if it has none.
        policy_version: of the weights that the attempt was claimed with; None if the driver gave none.
        rollout_id, attempt_id, span_id: where it comes from.
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

    Logged, never raised: a span that cannot be read is named and passed over; once in a process, calls that carry no
    token ids, and calls that carry no log-probabilities, with what to do about it. Raises `InvalidValueError` for what
    is no span.
    """
    rewards = final_rewards(spans)
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
