"""What a rollout's spans must have to be trained on, how many tokens they give, and rewards by name."""

from __future__ import annotations

from typing import Any

import pytest

import raystore as rs
from raystore import semconv
from raystore.tracing.calls import model_calls
from raystore.tracing.evidence import lacking, rewards_by_name
from raystore.tracing.trajectories import count_tokens
from tests.helpers import make_span


def call(number: int = 1, **more: Any) -> rs.Span:
    """The span of a model call with token ids and log-probabilities; None takes an attribute away."""
    attributes: dict[str, Any] = {
        semconv.OPERATION: "chat", semconv.INPUT_TOKEN_IDS: [1, 2], semconv.OUTPUT_TOKEN_IDS: [3, 4],
        semconv.OUTPUT_LOGPROBS: [-0.1, -0.2], **more,
    }  # fmt: skip
    kept = {name: value for name, value in attributes.items() if value is not None}
    return make_span("ro", number, attempt_id="at", name="chat", attributes=kept)


@pytest.mark.parametrize(
    ("more", "lacks"),
    [
        ({}, {"sampling"}), ({semconv.INPUT_TOKEN_IDS: None}, {"token_ids", "sampling"}),
        ({semconv.OUTPUT_TOKEN_IDS: None}, {"token_ids", "logprobs", "sampling"}),
        ({semconv.OUTPUT_LOGPROBS: None}, {"logprobs", "sampling"}), ({"gen_ai.request.top_p": 0.9}, set()),
        ({semconv.OUTPUT_TOKEN_IDS: [], semconv.OUTPUT_LOGPROBS: None, "temperature": 1.0}, set()),
        ({"llm.invocation_parameters": "{}"}, set()),
    ],
)  # fmt: skip
def test_what_a_call_lacks(more: dict[str, Any], lacks: set[str]) -> None:
    """Each requirement by itself, and the first that is not met."""
    calls = model_calls([call(**more)])
    assert {what for what in ("token_ids", "logprobs", "sampling") if lacking(calls, [what])} == lacks
    assert (lacking(calls, ["token_ids", "logprobs", "sampling"]) is None) == (not lacks)
    assert lacking(calls, []) is None and lacking([], ["token_ids"]) is None


def test_a_call_that_failed_lacks_nothing() -> None:
    """It has no answer."""
    nothing: dict[str, Any] = {semconv.OUTPUT_TOKEN_IDS: None, semconv.OUTPUT_LOGPROBS: None}
    failed = call(**nothing)
    failed.status = rs.TraceStatus(status_code="ERROR")
    assert lacking(model_calls([failed]), ["token_ids", "logprobs"]) is None


def test_tokens_are_those_of_the_sequences() -> None:
    """A second turn that continues the first counts what it adds."""
    turns = [call(1), call(2, **{semconv.INPUT_TOKEN_IDS: [1, 2, 3, 4, 5]})]
    assert count_tokens(model_calls(turns)) == 7 == sum(map(len, rs.trajectories(turns)))
    assert count_tokens([]) == 0


def test_rewards_by_name() -> None:
    """The newest of each name; one without a name is "reward"; what is no number is passed over."""
    first: dict[str, Any] = {
        f"{semconv.REWARD_PREFIX}0.value": 1.0, f"{semconv.REWARD_PREFIX}1.name": "correct",
        f"{semconv.REWARD_PREFIX}1.value": True, f"{semconv.REWARD_PREFIX}2.name": "odd",
        f"{semconv.REWARD_PREFIX}2.value": "x",
    }  # fmt: skip
    second = {f"{semconv.REWARD_PREFIX}0.name": "reward", f"{semconv.REWARD_PREFIX}0.value": 0.5}
    spans = [make_span("ro", n, attempt_id="at", attributes=one) for n, one in enumerate((first, second))]
    assert rewards_by_name(spans) == {"reward": 0.5, "correct": 1.0}
