"""Groups as rows to train on: one for each group, with its rollouts, rewards, token ids and log-probabilities.

A row has the same fields with the same types whatever the tasks are made of, so that `datasets.load_dataset` reads
many of them: tags, and tasks that are no text, are JSON in a text, and what is not known is an empty text or list.
Not here: which groups (`source.groups`); what a sequence of an agent's turns is (`raystore.tracing.trajectories`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from raystore.cli.exports.records import field_of, plain, text, to_json
from raystore.cli.exports.source import Whole
from raystore.tracing.calls import model_calls
from raystore.tracing.trajectories import trajectories
from raystore.types.spans import Span


def row(group: Any, members: Sequence[Whole]) -> dict[str, Any]:
    """A group as a row."""
    rollouts = [_of_member(one) for one in members]
    return {
        "group_id": group.group_id,
        "status": group.status,
        "why": text(group.why or ""),
        "mode": group.mode or "",
        "queue": text(group.queue),
        "tags": to_json(plain(group.tags)),
        "input": _as_text(plain(field_of(group, "input"))),
        "size": group.n,
        "start_time": group.start_time,
        "end_time": group.end_time,
        "rewards": [one["reward"] for one in rollouts if one["status"] == "succeeded"],
        "rollouts": rollouts,
    }


def _of_member(one: Whole) -> dict[str, Any]:
    rollout, attempt = one.rollout, one.attempts[-1] if one.attempts else None
    spans = one.spans.get(attempt.attempt_id, []) if attempt is not None else []
    reward = rollout.reward
    return {
        "rollout_id": rollout.rollout_id,
        "attempt_id": attempt.attempt_id if attempt is not None else "",
        "status": rollout.status,
        "outcome": (attempt.outcome if attempt is not None else None) or "",
        "error": text((attempt.error if attempt is not None else None) or ""),
        "reward": reward if reward is not None and math.isfinite(reward) else None,
        "policy_version": attempt.policy_version if attempt is not None else None,
        "spans_evicted": one.is_partial,
        "sequences": _sequences(spans),
        "calls": _calls(spans),
    }


def _sequences(spans: list[Span]) -> list[dict[str, Any]]:
    """The sequences of tokens that an agent's calls make up, as `rs.trajectories` tells them."""
    return [
        {
            "role": text(found.role or ""),
            "token_ids": found.token_ids.tolist(),
            "loss_mask": found.loss_mask.tolist(),
            "logprobs": found.logprobs.tolist() if found.logprobs is not None else [],
            "policy_versions": found.policy_versions.tolist(),
        }
        for found in trajectories(spans)
    ]


def _calls(spans: list[Span]) -> list[dict[str, Any]]:
    """The calls of models, as `rs.model_calls` tells them: what was asked, and what was answered."""
    return [
        {
            "model": text(call.model or ""),
            "role": text(call.role or ""),
            "finish_reason": text(call.finish_reason or ""),
            "prompt": [_message(message) for message in call.messages],
            "completion": [_message(message) for message in call.answer],
            "prompt_ids": call.prompt_ids.tolist() if call.prompt_ids is not None else [],
            "response_ids": call.response_ids.tolist() if call.response_ids is not None else [],
            "logprobs": call.logprobs.tolist() if call.logprobs is not None else [],
        }
        for call in model_calls(spans)
    ]


def _message(message: dict[str, Any]) -> dict[str, str]:
    calls = message.get("tool_calls")
    return {
        "role": _as_text(plain(message.get("role"))),
        "content": _as_text(plain(message.get("content"))),
        "tool_calls": to_json(plain(calls)) if calls else "",
        "tool_call_id": _as_text(plain(message.get("tool_call_id"))),
        "name": _as_text(plain(message.get("name"))),
    }


def _as_text(value: Any) -> str:
    """A text as it is, nothing as an empty one, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
