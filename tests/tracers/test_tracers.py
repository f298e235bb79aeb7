"""Spans of people's tracers, made by the libraries themselves against an endpoint on this machine.

Each is skipped where its library is not installed; `make test-tracers` installs all but Weave, whose tracer wants
`weave==0.52.22` beside agentlightning. `tests/spans` has the same written by hand, and runs everywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from tests.tracers.talk import MESSAGES, TURNS

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
#: No network, and no wait for one.
ENVIRONMENT = os.environ | {"PYTHONPATH": PATH, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "WANDB_SILENT": "true"}

#: Module that must be there, and whether the spans have token ids.
LIBRARIES = {
    "agentops": ("agentops", True),
    "litellm": ("litellm", True),
    "weave": ("weave", True),
    "openinference": ("openinference.instrumentation.openai", True),
    "openllmetry": ("opentelemetry.instrumentation.openai", False),
    "opentelemetry": ("opentelemetry.instrumentation.openai_v2", False),
}


def run(directory: Path, *command: Any) -> list[list[rs.Span]]:
    """Lists in JSON that a new interpreter prints; AgentOps leaves a log where it runs."""
    done = subprocess.run(
        [sys.executable, *command], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]
    return [[rs.Span.model_validate(span) for span in spans] for spans in found]


def traced(directory: Path, *libraries: Any) -> list[rs.Span]:
    """The spans of one conversation."""
    for library in libraries:
        pytest.importorskip(LIBRARIES[library][0], exc_type=ImportError)
    (spans,) = run(directory, "-m", "tests.tracers.talk", *libraries)
    return spans


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_conversation_is_read_whole(library: str, tmp_path: Path) -> None:
    """Messages and tool calls of each turn; and the tokens as one sequence, where the tracer keeps them."""
    spans = traced(tmp_path, library)
    calls = rs.model_calls(spans)
    assert len(calls) == 2
    for number, call in enumerate(calls):
        assert call.messages == MESSAGES[: 2 + 2 * number]
        assert [dict(message) for message in call.answer] == [TURNS[number][3]]
        assert call.model == "m" and call.response_id in (f"chatcmpl-{number}", None)
    found = rs.trajectories(spans)
    if not LIBRARIES[library][1]:
        assert found == []
        return
    (one,) = found
    assert list(one.token_ids) == [1, 2, 3, 4, 5, 6, 7] and list(one.loss_mask) == [0, 0, 0, 1, 1, 0, 1]
    assert list(one.logprobs) == [0, 0, 0, -0.5, -0.25, 0, -1.0]


@pytest.mark.parametrize("libraries", [*combinations(("openllmetry", "openinference", "opentelemetry"), 2)], ids=str)
def test_two_libraries_at_once_trace_each_call_once(libraries: Any, tmp_path: Path) -> None:
    """The one span encloses the other."""
    spans = traced(tmp_path, *libraries)
    assert len(spans) == 4 and len(rs.model_calls(spans)) == 2
    assert len(rs.triplets(spans)) == (2 if "openinference" in libraries else 0)


def test_the_reward_of_the_decorator(tmp_path: Path) -> None:
    """As AgentOps keeps it, and of agent-lightning's emitter, through agent-lightning's tracer."""
    pytest.importorskip("agentlightning", exc_type=ImportError)
    code = """
import asyncio, json, os
import agentlightning as agl
from agentlightning.emitter.reward import reward
from agentlightning.tracer.agentops import AgentOpsTracer
async def main(emit):
    async with tracer.trace_context("x"):
        emit()
    print(json.dumps([span.model_dump(mode="json") for span in tracer.get_last_trace()]))
tracer = AgentOpsTracer()
tracer.init()
tracer.init_worker(0)
asyncio.run(main(reward(lambda: 0.5)))
asyncio.run(main(lambda: agl.emit_reward({"a": 1.0, "b": 2}, primary_key="b")))
import sys; sys.stdout.flush(); os._exit(0)
"""
    rewards = [rs.find_final_reward(spans) for spans in run(tmp_path, "-c", code)]
    assert rewards == [0.5, 2.0]
