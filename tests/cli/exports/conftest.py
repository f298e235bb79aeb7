"""The command as click calls it, on a store that a test has; and rollouts with everything that may be in one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from click.testing import CliRunner, Result

import raystore as rs
from raystore import semconv
from raystore.cli.exports import command
from tests.cli.small_run import HOSTILE, Unknown

LARGE = 10_000_000  #: characters of an attribute


#: Runs `export` with these arguments; anything but exit code 0 is an error of the test unless `fails`.
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def call(store: Any, *arguments: object, fails: bool = False) -> Result:
        given = [str(argument) for argument in arguments]
        with ThreadPoolExecutor(1) as thread:  # it has an event loop of its own, as a test may have one
            meant = patch.object(command, "opened", lambda where: contextlib.nullcontext(store))
            with meant:
                found = thread.submit(CliRunner().invoke, command.export, given).result(100)
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        assert (found.exit_code != 0) is fails, found.output
        return found

    return call


def refused(found: Result) -> str:
    """The error of a command that failed: one line, without control characters."""
    assert found.exit_code == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("Error: ") and line.isprintable()
    return line.removeprefix("Error: ")


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def finish(store: Any, task: Any, *, spans: int = 2, reward: float | None = 1.0, **more: Any) -> str:
    """A rollout that has succeeded: a call of a model within an agent, a reward; its id."""
    rollout = await store.enqueue_rollout(task, **more)
    claimed = await store.dequeue_rollout("runner-1")
    assert claimed.rollout_id == rollout.rollout_id
    began = claimed.attempt.start_time
    ids: dict[str, Any] = {"rollout_id": claimed.rollout_id, "attempt_id": claimed.attempt.attempt_id}
    root = rs.Span.from_attributes(name="agent", attributes={}, start_time=began, end_time=began + 2.0, **ids)
    made = [root]
    for number in range(spans - 1):
        call: dict[str, Any] = {
            semconv.OPERATION: "chat", semconv.REQUEST_MODEL: "qwen3-4b", semconv.INPUT_TOKEN_IDS: [1, 2, 3],
            semconv.OUTPUT_TOKEN_IDS: [4, 5], semconv.OUTPUT_LOGPROBS: [-0.5, -0.25],
            semconv.INPUT_MESSAGES: [{"role": "user", "parts": [{"type": "text", "content": "17 * 23?"}]}],
            semconv.OUTPUT_MESSAGES: [{"role": "assistant", "parts": [{"type": "text", "content": "391"}]}],
            "gen_ai.request.temperature": 0.5,
        }  # fmt: skip
        made.append(
            rs.Span.from_attributes(
                name="chat qwen3-4b", attributes=call, trace_id=root.trace_id, parent_id=root.span_id,
                start_time=began + 0.1 + number, end_time=began + 0.9 + number, **ids,
            )
        )  # fmt: skip
    if reward is not None:
        at = began + 1.9
        attributes = {semconv.PRIMARY_REWARD: reward}
        made.append(
            rs.Span.from_attributes(name=semconv.REWARD_SPAN, attributes=attributes, start_time=at, end_time=at, **ids)
        )
    await store.finish_attempt(claimed.rollout_id, claimed.attempt.attempt_id, made, "succeeded")
    return str(claimed.rollout_id)


async def odd(store: Any) -> str:
    """A rollout with what files and terminals do not like; its id."""
    config = rs.RolloutConfig(max_attempts=2, retry_condition=["failed"])
    await store.enqueue_rollout(
        Unknown(), rollout_id="odd", metadata={"note": HOSTILE, "many": float("inf")}, config=config,
        tags={"env": HOSTILE[:20]},
    )  # fmt: skip
    first = await store.dequeue_rollout("runner-1")
    await store.finish_attempt("odd", first.attempt.attempt_id, [], "failed", error=f"Boom {HOSTILE}")
    again = await store.dequeue_rollout("runner-2")
    attributes: dict[str, Any] = {
        "large": "x" * LARGE, "hostile": HOSTILE, "nan": float("nan"), "bytes": b"\x00\xff", "nested": {"a": [1, "b"]},
    }  # fmt: skip
    ids: dict[str, Any] = {"rollout_id": "odd", "attempt_id": again.attempt.attempt_id}
    timeless = rs.Span.from_attributes(name=f"say {HOSTILE}", attributes=attributes, span_id="no-hex", **ids)
    timeless.start_time = timeless.end_time = None
    await store.finish_attempt("odd", again.attempt.attempt_id, [timeless], "succeeded")
    return "odd"
