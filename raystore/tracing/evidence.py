"""Whether the model calls of a rollout have what training on it needs, and its rewards by name.

Asked of each candidate for a batch, before it is trained on. A model call that failed has no answer, and lacks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from raystore.errors import PayloadNotReadableError
from raystore.tracing import semconv
from raystore.tracing.calls import ModelCall
from raystore.types.spans import Span
from raystore.values.plain import scalar

Evidence = Literal["token_ids", "logprobs", "sampling"]  #: what a model call may have to have
EVIDENCE: tuple[str, ...] = get_args(Evidence)


def lacking(calls: Sequence[ModelCall], require: Sequence[str]) -> str | None:
    """What one of these calls lacks of what is required, for people to read; None if none lacks anything."""
    for call in calls:
        if call.spans[0].status.status_code == "ERROR" and call.response_ids is None:
            continue
        for what in require:
            if not _HAS[what](call):
                return f"no {_WORDS[what]} on span {call.spans[0].name!r} ({call.span_id})"
    return None


def _has_sampling(call: ModelCall) -> bool:
    return any(name.startswith(semconv.SAMPLING) for span in call.spans for name in span.attributes)


_HAS = {
    "token_ids": lambda call: call.prompt_ids is not None and call.response_ids is not None,
    "logprobs": lambda call: call.logprobs is not None or (call.response_ids is not None and not call.response_ids),
    "sampling": _has_sampling,
}
_WORDS = {
    "token_ids": "token ids of prompt and response",
    "logprobs": "log-probabilities of the response",
    "sampling": "sampling parameters (such as gen_ai.request.temperature)",
}


def rewards_by_name(spans: Sequence[Span]) -> dict[str, float]:
    """The newest reward of each name that these spans carry; those without a name are "reward"."""
    found: dict[str, float] = {}
    for span in spans:
        try:
            attributes = span.attributes
        except PayloadNotReadableError:  # whoever reads the rewards of its rollout is told
            continue
        number = 0
        while (value := scalar(attributes.get(f"{semconv.REWARD_PREFIX}{number}.value"))) is not None:
            name = attributes.get(f"{semconv.REWARD_PREFIX}{number}.name")
            if isinstance(value, (int, float)) and value == value:
                found[name if isinstance(name, str) else "reward" if not number else str(number)] = float(value)
            number += 1
    return found
