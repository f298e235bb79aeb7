"""What agents record: model calls with packed token ids, triplets for a trainer, spans that are flushed or late."""

from __future__ import annotations

import asyncio
import threading
from array import array
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import raystore as rs
from raystore.tracing import semconv
from tests.helpers import AnyStore, mostly_in_memory, present, until


async def test_model_calls_become_triplets(store: AnyStore) -> None:
    """Token ids and log-probabilities travel packed and come back without loss, under GenAI names."""
    llm = rs.LLM(endpoint="http://localhost:8000/v1", model="tiny")
    await store.update_resources("policy", {"llm": llm}, policy_version=4)
    logprobs = np.log(np.random.default_rng(0).uniform(size=20_000)).astype(np.float32)

    def agent(task: Any, ctx: rs.Context) -> float:
        ctx.llm(prompt_ids=range(1000), response_ids=np.arange(20_000), logprobs=logprobs, finish_reason="stop")
        ctx.llm(prompt_ids=[2**40], response_ids=[7, 8], logprobs=[-0.1, -1 / 3], model="other", turn=2, prompt="hi")
        ctx.llm(prompt_ids=[1], response_ids=[])
        return 0.75

    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1):
        await store.wait_for_rollout(made.rollout_id, timeout=20)
    spans = await store.query_spans(made.rollout_id)
    first, second, third = rs.triplets(spans)
    assert (first.prompt_ids, first.response_ids) == (array("i", range(1000)), array("i", range(20_000)))
    assert first.logprobs is not None
    assert first.logprobs.typecode == "f" and np.array_equal(np.asarray(first.logprobs), logprobs)
    assert second.prompt_ids == array("q", [2**40]) and second.logprobs == array("d", [-0.1, -1 / 3])
    assert third.logprobs is None and len(third.response_ids) == 0
    assert [(t.reward, t.policy_version, t.span_id) for t in (first, second, third)] == [
        (0.75, 4, span.span_id) for span in spans[:3]
    ]
    assert [span.name for span in spans[:2]] == ["chat tiny", "chat other"]
    known = dict(spans[0].attributes)
    assert known[semconv.REQUEST_MODEL] == "tiny" and known[semconv.FINISH_REASONS] == ["stop"]
    assert (known[semconv.INPUT_TOKENS], known[semconv.OUTPUT_TOKENS]) == (1000, 20_000)
    assert spans[1].attributes["turn"] == 2 and spans[1].attributes[semconv.INPUT_MESSAGES] == "hi"
    assert '"gen_ai.output.token_ids":[7,8]' in spans[1].model_dump_json()
    assert rs.Span.model_validate(spans[0].model_dump()) == spans[0]
    # Packed: 4 bytes a number; not 9 (msgpack's), nor 32 (Python's).
    assert (await store.statistics())["total_span_bytes"] < 4 * 41_000 + 10_000


@mostly_in_memory
async def test_recorded_turns_become_trajectories(store: AnyStore) -> None:
    """Read back from the store, with the policy version of the claim on each generated token."""
    await store.update_resources("policy", {"p": rs.PromptTemplate(template="x", engine="f-string")}, policy_version=3)

    def agent(task: Any, ctx: rs.Context) -> float:
        ctx.llm(prompt_ids=[1, 2], response_ids=[3], logprobs=[-0.5])
        ctx.llm(prompt_ids=[1, 2, 3, 4], response_ids=[5, 6], logprobs=[-0.25, -1.0])
        return float(task)

    made = await store.enqueue_group(1, 2)
    async with rs.RunnerPool(store, agent, size=1):
        await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=20)
    found = await store.query_many_spans([r.rollout_id for r in made])
    both = rs.trajectories([each for spans in found.values() for each in spans])
    assert [t.rollout_id for t in both] == [r.rollout_id for r in made]
    for one in both:
        assert list(one.policy_versions) == [-1, -1, 3, -1, 3, 3] and one.reward == 1.0
        assert list(present(one.logprobs)) == [0, 0, -0.5, 0, -0.25, -1.0]


def test_triplets_keep_attempts_apart_and_read_other_tracers() -> None:
    """Each attempt has its own reward; agent-lightning's names are understood."""

    def span(
        attempt_id: str,
        attributes: dict[str, list[int]] | dict[str, int] | dict[str, float],
        name: str = "openai.chat.completion",
    ) -> rs.Span:
        return rs.Span.from_attributes(attributes=attributes, rollout_id="ro", attempt_id=attempt_id, name=name)

    ids = {"prompt_token_ids": [1, 2], "response_token_ids": [3]}
    reward = {"agentlightning.reward.0.value": 1.0}
    spans = [span("a", ids), span("a", {"other": 1}), span("b", ids), span("b", reward, "agentlightning.annotation")]
    first, second = rs.triplets(spans)
    assert (first.attempt_id, first.reward, second.attempt_id, second.reward) == ("a", None, "b", 1.0)
    assert first.prompt_ids == array("i", [1, 2]) and first.logprobs is None and first.policy_version is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_ids": "text"},
        {"response_ids": [1.5]},
        {"response_ids": 7},
        {"logprobs": [0.1]},
        {"logprobs": ["a", "b"]},
        {"logprobs": [float("nan"), 0.0]},
    ],
    ids=str,
)
def test_wrong_model_calls_are_refused(
    wrong: dict[str, str] | dict[str, list[float]] | dict[str, int] | dict[str, list[str]],
) -> None:
    """The error names the value and what was expected."""

    def agent(task: Any, ctx: rs.Context) -> None:
        ctx.llm(**{"prompt_ids": [1], "response_ids": [1, 2]} | wrong)

    with pytest.raises(rs.InvalidValueError, match=next(iter(wrong))):
        rs.run_one(agent, "x")


def test_run_one_runs_an_agent_without_a_store() -> None:
    """Functions, coroutine functions and classes; spans and reward come back, errors come out as they were raised."""

    def agent(task: Any, ctx: rs.Context) -> float:
        with ctx.span("think", question=task):
            assert rs.current() is ctx
            ctx.llm(prompt_ids=[1], response_ids=[2])
        return len(ctx.resources["prompt"].template) / 10

    async def async_agent(task: Any, ctx: rs.Context) -> float:
        await asyncio.sleep(0)
        return agent(task, ctx)

    class Agent:
        def setup(self) -> None:
            self.is_ready = True

        def __call__(self, task: Any, ctx: rs.Context) -> float:
            assert self.is_ready
            return agent(task, ctx)

    resources = {"prompt": rs.PromptTemplate(template="12345", engine="f-string")}
    for kind in (agent, async_agent, Agent):
        run = rs.run_one(kind, "why?", resources, policy_version=2)
        assert run.reward == 0.5 and [s.name for s in run.spans] == ["chat", "think", "agentlightning.annotation"]
        assert run.spans[0].parent_id == run.spans[1].span_id and [s.sequence_id for s in run.spans] == [1, 2, 3]
        assert rs.triplets(run.spans)[0].policy_version == 2
        assert run.rollout.input == "why?" and run.rollout.attempt.policy_version == 2
    with pytest.raises(KeyError, match="prompt") as raised:
        rs.run_one(agent, "why?")
    assert raised.value.__notes__ == ["raystore: spans recorded before: chat, think"]
    assert raised.value.__context__ is None
    assert repr(run) == "<Run: reward 0.5, 3 spans: chat, think, agentlightning.annotation>"
    with pytest.raises(ValueError, match="prompt"):  # what no store takes
        rs.run_one(agent, "why?", {"prompt": "a text"})
    with pytest.raises(rs.Abort):
        rs.run_one(lambda task, ctx: (_ for _ in ()).throw(rs.Abort("down")), "x")
    with pytest.raises(rs.InvalidValueError, match="agent="):
        rs.run_one("agent", "x")  # type: ignore[arg-type]  # wrong on purpose


async def test_run_one_in_a_running_event_loop() -> None:
    """As in a notebook."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        await asyncio.sleep(0)
        return 1.0

    assert rs.run_one(agent, "x").reward == 1.0


@mostly_in_memory
async def test_spans_are_flushed_by_bytes(store: AnyStore, tmp_path: Path) -> None:
    """64 KiB of spans do not wait for the next flush by time."""

    def agent(task: Any, ctx: rs.Context) -> float:
        with ctx.span("small"):
            pass
        for _ in range(3):
            with ctx.span("large", text="x" * 30_000):
                pass
        while not (tmp_path / "seen").exists():
            threading.Event().wait(0.01)
        return 1.0

    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, flush_seconds=1000):

        async def flushed() -> bool:
            return len(await store.query_spans(made.rollout_id)) == 4

        await until(flushed)
        assert (await store.get_rollout_by_id(made.rollout_id)).status == "running"
        (tmp_path / "seen").touch()
        await store.wait_for_rollout(made.rollout_id, timeout=20)
    assert len(await store.query_spans(made.rollout_id)) == 5


@mostly_in_memory
@pytest.mark.parametrize("isolation", ["actor", "process"])
async def test_spans_that_end_after_their_rollout_are_kept(
    store: AnyStore, isolation: Literal["actor", "process"]
) -> None:
    """A thread that the agent left behind ends its span late: it is stored all the same."""

    def agent(task: Any, ctx: rs.Context) -> float:
        go_on = threading.Event()

        def background() -> None:
            with ctx.span("late"):
                go_on.wait()
                threading.Event().wait(0.3)

        threading.Thread(target=background).start()
        go_on.set()
        return 1.0

    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, isolation=isolation):
        await store.wait_for_rollout(made.rollout_id, timeout=20)

        async def kept() -> bool:
            return [s.name for s in await store.query_spans(made.rollout_id)] == ["agentlightning.annotation", "late"]

        await until(kept)
    assert (await store.get_rollout_by_id(made.rollout_id)).status == "succeeded"


def test_attributes_take_numpy_values() -> None:
    """Scalars, arrays and tensors become what OpenTelemetry takes."""

    def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("x", scalar=np.float32(0.5), vector=np.arange(3), flag=np.bool_(True), packed=array("f", [1.0])):
            pass

    (span,) = rs.run_one(agent, "x").spans
    assert span.attributes == {"scalar": 0.5, "vector": [0, 1, 2], "flag": True, "packed": array("f", [1.0])}
