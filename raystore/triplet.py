"""From spans to what a trainer takes: prompt ids, response ids, log-probabilities, reward, policy version.

Not here: recording LLM calls (`Context.llm`), tokenising texts, advantages, which are an algorithm's business.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raystore import semconv
from raystore.packed import pack_floats, pack_integers
from raystore.spans import Span, find_final_reward


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
    reward of its own. Understands what `ctx.llm` records, and of agent-lightning's tracers the attributes
    `prompt_token_ids` and `response_token_ids`: not their log-probabilities, nor rewards in spans of other names.
    """
    attempts: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        attempts.setdefault((span.rollout_id, span.attempt_id), []).append(span)
    rewards = {key: find_final_reward(of_attempt) for key, of_attempt in attempts.items()}
    found = []
    for span in spans:
        prompt = _either(span, semconv.INPUT_TOKEN_IDS, semconv.LEGACY_INPUT_TOKEN_IDS)
        response = _either(span, semconv.OUTPUT_TOKEN_IDS, semconv.LEGACY_OUTPUT_TOKEN_IDS)
        if prompt is None or response is None:
            continue
        logprobs = span.attributes.get(semconv.OUTPUT_LOGPROBS)
        version = span.attributes.get(semconv.POLICY_VERSION)
        found.append(
            Triplet(
                prompt_ids=pack_integers(semconv.INPUT_TOKEN_IDS, prompt),
                response_ids=pack_integers(semconv.OUTPUT_TOKEN_IDS, response),
                logprobs=None if logprobs is None else pack_floats(semconv.OUTPUT_LOGPROBS, logprobs),  # type: ignore[arg-type]
                reward=rewards[span.rollout_id, span.attempt_id],
                policy_version=version if isinstance(version, int) else None,
                rollout_id=span.rollout_id,
                attempt_id=span.attempt_id,
                span_id=span.span_id,
            )
        )
    return found


def _either(span: Span, name: str, legacy: str) -> Any:
    value = span.attributes.get(name)
    return span.attributes.get(legacy) if value is None else value
