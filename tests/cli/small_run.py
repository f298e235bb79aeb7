"""A small run in which there is something of everything: what the command line shows in tests and in docs/cli.md.

Two environments and a validation set, three policy versions, groups that are trained on, a checkpoint, a conversation
with tool calls; an agent that raises, an abort and its retry, a rollout that still runs, and one that waits in a queue
that nobody serves. The clock is manual, and ids are given where commands name them.
"""

from __future__ import annotations

import json
from typing import Any

import raystore as rs
from raystore.tracing import semconv
from tests.helpers import present

PROMPT = "Answer with a number.\nThink step by step: {question}"
SHORT_PROMPT = "Answer with a number.\n{question}"
TRACEBACK = """Traceback (most recent call last):
  File "/srv/agents/solver.py", line 41, in solve
    answer = parse(text)
  File "/srv/agents/parsing.py", line 12, in parse
    return int(text)
ValueError: invalid literal for int() with base 10: 'four'
"""
HOSTILE = "\x1b[31mred\x1b[0m \x1b]0;title\x07 bell\x07 back\x08 \u202eturned\u202c nul\x00 \x9b2J"


class Unknown:
    """A class of which a pickle must not be opened."""

    def __reduce__(self) -> Any:
        return _opened, ()


def _opened() -> Any:
    raise AssertionError("a pickle was opened")


def span(
    rollout: Any, number: int, name: str, start: float, end: float, parent: int | None = None, **more: Any
) -> rs.Span:
    """The span of this number, so many seconds after the claim; `parent` is the number of another of the rollout."""
    place = sum(ord(letter) * (at + 1) for at, letter in enumerate(rollout.rollout_id))
    begin = rollout.attempt.start_time
    return rs.Span.from_attributes(
        name=name, rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, sequence_id=number,
        attributes=more.pop("attributes", {}), trace_id=f"{place:032x}", span_id=f"{place * 1000 + number:016x}",
        parent_id=None if parent is None else f"{place * 1000 + parent:016x}",
        start_time=begin + start, end_time=begin + end, **more,
    )  # fmt: skip


def reward(rollout: Any, value: float, number: int = 90) -> rs.Span:
    """A span with a reward."""
    attributes = {semconv.PRIMARY_REWARD: value}
    return span(rollout, number, semconv.REWARD_SPAN, 3.9, 3.9, attributes=attributes)


def chat(rollout: Any, number: int, start: float, end: float, given: list[Any], answer: Any, **more: Any) -> rs.Span:
    """A span of a model call by OpenTelemetry's GenAI conventions."""
    attributes = {
        semconv.OPERATION: "chat", semconv.REQUEST_MODEL: "qwen3-4b", semconv.FINISH_REASONS: ["stop"],
        semconv.INPUT_MESSAGES: given, semconv.OUTPUT_MESSAGES: [answer], **more,
    }  # fmt: skip
    return span(rollout, number, "chat qwen3-4b", start, end, 1, attributes=attributes)


def text(role: str, content: str) -> dict[str, Any]:
    """A message in the form of the conventions."""
    return {"role": role, "parts": [{"type": "text", "content": content}]}


async def conversation(store: Any, rollout: Any) -> None:
    """Spans of an agent that asks a model, calls a tool, and asks again."""
    asked = [text("system", "Answer with a number."), text("user", "What is 17 * 23?")]
    call = {"type": "tool_call", "id": "c1", "name": "calculator", "arguments": {"expression": "17 * 23"}}
    wants = {"role": "assistant", "parts": [call], "finish_reason": "tool_call"}
    result = {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "391"}]}
    final = text("assistant", "17 * 23 = 391")
    await store.add_many_spans(
        [
            span(rollout, 1, "solve", 0.0, 3.9),
            chat(rollout, 2, 0.1, 1.4, asked, wants, **{semconv.INPUT_TOKENS: 21, semconv.OUTPUT_TOKENS: 12}),
            span(rollout, 3, "tool.calculator", 1.5, 2.9, 1),
            chat(rollout, 4, 3.0, 3.8, [*asked, wants, result], final),
        ]
    )


async def fill(store: Any) -> None:
    """Put the run into a store, whose clock is manual."""
    for version, prompt in enumerate([SHORT_PROMPT, PROMPT, PROMPT]):
        llm = rs.LLM(endpoint=f"http://10.0.0.{version}/v1", model="qwen3-4b", api_key="sk-secret")
        await store.update_resources(
            "policy", {"prompt": rs.PromptTemplate(template=prompt, engine="f-string"), "model": llm},
            policy_version=version,
        )  # fmt: skip
        for environment, gain in (("math", 0.3), ("code", 0.1)):
            for index in range(2):
                name = f"{environment}-{version}-{index}"
                await _group(store, name, environment, version, min(gain * version + 0.2 * index, 1.0))
        batch = await store.take_groups(2, consumer="trainer", timeout=1.0)
        await store.ack(batch, step=version + 1, note=json.dumps({"loss": 1.5 - version / 2, "kl": 0.01}))
        await _finish(store, f"val-{version}", 0.25 * (version + 1), mode="val", tags={"env": "math"})
    await store.checkpoint("trainer", 1)
    await store.add_resources({"weights": rs.ObjectResource(value=Unknown())})
    await _failures(store)
    await store.enqueue_rollout(Unknown(), rollout_id="waiting", queue="gpu-only", resources_id="policy")
    await _claimed(store, "stuck", worker="runner-3")
    await store.testing.tick(92.0)
    await store.enqueue_rollout("more", rollout_id="last", queue="own")
    await store.update_worker("runner-1", {"host": "node-a", "pid": 4711, "running": 1, "rss_bytes": 310_000_000})
    await store.update_worker("runner-2", {"host": "node-b", "pid": 4712, "running": 0, "rss_bytes": 290_000_000})


async def _claimed(store: Any, rollout_id: str, *, worker: str = "runner-1", **more: Any) -> rs.AttemptedRollout:
    """A rollout with this id, claimed."""
    more = {"mode": "train", "resources_id": "policy", "queue": "own"} | more
    await store.enqueue_rollout({"question": rollout_id}, rollout_id=rollout_id, **more)
    claimed: rs.AttemptedRollout = present(await store.dequeue_rollout(worker, queues=["own"]))
    assert claimed.rollout_id == rollout_id
    await store.testing.tick(0.5)
    await store.add_span(span(claimed, 80, "prepare", 0.0, 0.2))
    return claimed


async def _finish(store: Any, rollout_id: str, value: float, **more: Any) -> None:
    """A rollout that has succeeded."""
    claimed = await _claimed(store, rollout_id, **more)
    await conversation(store, claimed)
    await store.testing.tick(3.5)
    await store.add_span(reward(claimed, value))
    await store.finish_attempt(claimed.rollout_id, claimed.attempt.attempt_id, [], "succeeded")


async def _group(store: Any, group_id: str, environment: str, version: int, value: float) -> None:
    """A group of two that is complete."""
    await store.enqueue_group(
        {"question": "17 * 23"}, 2, group_id=group_id, mode="train", queue="own", resources_id="policy",
        tags={"env": environment},
    )  # fmt: skip
    for number in range(2):
        claimed = present(await store.dequeue_rollout(f"runner-{number + 1}", queues=["own"]))
        await conversation(store, claimed)
        await store.testing.tick(4.0)
        await store.add_span(reward(claimed, min(value + 0.1 * number, 1.0)))
        await store.finish_attempt(claimed.rollout_id, claimed.attempt.attempt_id, [], "succeeded")


async def _failures(store: Any) -> None:
    """What fails, by whose doing it may be."""
    for number in range(3):
        claimed = await _claimed(store, f"raises-{number}", tags={"env": "code"})
        status = rs.TraceStatus(status_code="ERROR", description="ValueError: 'four'")
        await store.add_span(span(claimed, 1, "parse", 0.3, 0.4, status=status))
        await store.finish_attempt(
            claimed.rollout_id, claimed.attempt.attempt_id, [], "failed", outcome="agent_error", error=TRACEBACK
        )
    config = rs.RolloutConfig(max_attempts=2, retry_condition=["failed"])
    claimed = await _claimed(store, "retried", worker="runner-2", config=config, tags={"env": "math"})
    await store.finish_attempt(
        claimed.rollout_id, claimed.attempt.attempt_id, [], "failed", outcome="infra",
        error="Traceback (most recent call last):\nConnectionError: node-b: connection reset",
    )  # fmt: skip
    again = present(await store.dequeue_rollout("runner-1", queues=["own"]))
    await store.testing.tick(1.5)
    await store.add_span(reward(again, 0.5))
    await store.finish_attempt(again.rollout_id, again.attempt.attempt_id, [], "succeeded")
    claimed = await _claimed(store, "hostile", metadata={"note": HOSTILE})
    await store.add_span(span(claimed, 1, f"say {HOSTILE}", 0.3, 0.9, attributes={"text": HOSTILE * 3}))
    await store.add_span(chat(claimed, 2, 0.4, 0.8, [text("user", HOSTILE)], text("assistant", HOSTILE)))
    await store.finish_attempt(
        claimed.rollout_id, claimed.attempt.attempt_id, [], "failed", outcome="agent_error", error=f"Boom: {HOSTILE}"
    )
    gone = await _claimed(store, "deleted")
    await store.finish_attempt(gone.rollout_id, gone.attempt.attempt_id, [], "succeeded")
    await store.delete_rollouts(["deleted"])
