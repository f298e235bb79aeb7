"""OpenTelemetry in process: each rollout has exactly its own spans, whatever runs beside it."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import raystore as rs
from tests.helpers import AnyStore, mostly_in_memory, until

provider = TracerProvider()
tracer = provider.get_tracer("an-agent")


async def run(
    store: AnyStore | rs.InMemoryLightningStore,
    agent: Callable[..., Coroutine[Any, Any, float]] | Callable[..., float] | Callable[..., Any],
    tasks: range | list[str],
    **options: Any,
) -> Any:
    """Enqueue tasks, run them with a pool, and return them finished with their spans."""
    made = [await store.enqueue_rollout(task) for task in tasks]
    ids = [r.rollout_id for r in made]
    async with rs.RunnerPool(store, agent, size=options.pop("size", 1), **options):
        finished = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
        assert len(finished) == len(ids)
    spans = await store.query_many_spans(ids)
    return finished, [spans[rollout_id] for rollout_id in ids]


def check_tree(spans: Any, task: int) -> None:
    """Three spans of this task in the order in which they ended, with their parents; then the reward."""
    tool, think, solve, reward = spans
    assert [s.name for s in spans] == [f"tool {task}", f"think {task}", f"solve {task}", "agentlightning.annotation"]
    assert (tool.parent_id, think.parent_id, solve.parent_id) == (think.span_id, solve.span_id, None)
    assert len({s.trace_id for s in (tool, think, solve)}) == 1 and reward.trace_id != solve.trace_id
    assert {s.attributes["task"] for s in (tool, think, solve)} == {task}
    assert [s.sequence_id for s in spans] == [1, 2, 3, 4]
    assert tool.start_time >= think.start_time >= solve.start_time and tool.end_time <= think.end_time


async def test_a_hundred_concurrent_rollouts_do_not_mix(store: AnyStore) -> None:
    """In one process, on one event loop: each has its own spans, in order, with their parents."""

    async def agent(task: Any, ctx: rs.Context) -> float:
        from tests.runners import otel_agent  # sets the global provider of its process

        rs.otel.instrument()
        return await otel_agent.solve_async(task)

    finished, spans = await run(store, agent, range(100), concurrency=100)
    assert {r.status for r in finished} == {"succeeded"}
    for task in range(100):
        check_tree(spans[task], task)


@mostly_in_memory
@pytest.mark.parametrize("isolation", ["actor", "process"])
async def test_agents_in_threads_and_processes(store: AnyStore, isolation: str) -> None:
    """The same for agents that are not async, which run in threads or in processes of their own."""

    def agent(task: Any, ctx: rs.Context) -> float:
        from tests.runners import otel_agent

        rs.otel.instrument()
        return otel_agent.solve(task)

    _, spans = await run(store, agent, range(20), concurrency=5, isolation=isolation)
    for task in range(20):
        check_tree(spans[task], task)


async def test_an_agent_that_raises_leaves_its_spans() -> None:
    """With the exception on them, all before the final status."""

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument(provider)
        with tracer.start_as_current_span("outer"), tracer.start_as_current_span("inner"):
            raise ValueError("bad")

    with rs.InMemoryLightningStore() as store:
        (finished,), (spans,) = await run(store, agent, ["x"])
        assert finished.status == "failed"
        assert [s.name for s in spans] == ["inner", "outer"]
        assert spans[0].status.status_code == "ERROR" and spans[0].events[0].name == "exception"


async def test_spans_of_threads_and_late_spans() -> None:
    """Routed by the context that a thread was given, or by their parent; one that ends late is still kept."""
    late = threading.Event()

    def agent(task: Any, ctx: rs.Context) -> float:
        rs.otel.instrument(provider)
        with tracer.start_as_current_span("outer") as outer:
            copied = contextvars.copy_context()
            parent = trace.set_span_in_context(outer)

            def with_context() -> None:
                copied.run(lambda: tracer.start_span("with context").end())

            def with_parent() -> None:  # knows the parent span, not the rollout
                tracer.start_span("with parent", context=parent).end()

            for target in (with_context, with_parent):
                thread = threading.Thread(target=target)
                thread.start()
                thread.join()
        open_span = tracer.start_span("late")
        threading.Thread(target=lambda: (late.wait(), open_span.end())).start()
        tracer.start_span("never ends")
        return 1.0

    with rs.InMemoryLightningStore() as store:
        made = await store.enqueue_rollout("x")
        async with rs.RunnerPool(store, agent, size=1):
            await store.wait_for_rollout(made.rollout_id, timeout=20)
            before = [s.name for s in await store.query_spans(made.rollout_id)]
            assert before == ["with context", "with parent", "outer", "agentlightning.annotation"]
            late.set()

            async def kept() -> bool:
                return [s.name for s in await store.query_spans(made.rollout_id)][4:] == ["late"]

            await until(kept)


def test_instrumenting_again_changes_nothing_and_other_exporters_go_on() -> None:
    """A span is recorded once, and reaches the agent's own exporter as well; outside of a rollout it is left alone."""
    own, exporter = TracerProvider(), InMemorySpanExporter()
    own.add_span_processor(SimpleSpanProcessor(exporter))
    for _ in range(3):
        assert rs.otel.instrument(own) is own

    def agent(task: Any, ctx: rs.Context) -> None:
        with own.get_tracer("t").start_as_current_span("once"):
            pass

    run = rs.run_one(agent, "x")
    with own.get_tracer("t").start_as_current_span("outside"):
        pass
    assert [s.name for s in run.spans] == ["once"]
    assert [s.name for s in exporter.get_finished_spans()] == ["once", "outside"]


def test_the_global_provider_is_made_if_there_is_none() -> None:
    """What an agent gets from the API is then recorded; in a process of its own, since there is one in each."""
    code = """
import raystore as rs
from opentelemetry import trace
made = rs.otel.instrument()
assert made is trace.get_tracer_provider() and rs.otel.instrument() is made
def agent(task, ctx):
    with trace.get_tracer("t").start_as_current_span("global"):
        pass
assert [s.name for s in rs.run_one(agent, "x").spans] == ["global"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(rs.InvalidValueError, match="provider="):
        rs.otel.instrument("nonsense")  # type: ignore[arg-type]  # wrong on purpose


def test_model_calls_of_other_tracers_carry_the_policy_version() -> None:
    """So that triplets know it; spans without token ids stay exactly as they were."""

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument(provider)
        ids = {"prompt_token_ids": [1, 2], "response_token_ids": [3, 4]}
        with tracer.start_as_current_span("chat", attributes=ids):
            pass
        with tracer.start_as_current_span("tool"):
            pass

    run = rs.run_one(agent, "x", policy_version=9)
    (triplet,) = rs.triplets(run.spans)
    assert (triplet.policy_version, list(triplet.response_ids)) == (9, [3, 4])
    assert dict(run.spans[1].attributes) == {}


def test_a_real_span_is_taken_over_exactly() -> None:
    """Hexadecimal ids, seconds, parent, events, links and resource; what the model has no field for as text."""

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument(provider)
        with tracer.start_as_current_span("outer") as outer:
            other = trace.Link(outer.get_span_context(), {"why": "related"})
            with tracer.start_as_current_span("inner", links=[other], kind=trace.SpanKind.CLIENT) as inner:
                inner.add_event("said", {"words": ("a", "b")}, timestamp=1_700_000_000_500_000_000)
                inner.set_status(trace.StatusCode.ERROR, "bad")

    inner: Any
    outer: Any
    inner, outer = rs.run_one(agent, "x").spans
    assert len(inner.trace_id) == 32 and len(inner.span_id) == 16 and int(inner.trace_id, 16)
    assert (inner.parent_id, inner.trace_id, outer.parent) == (outer.span_id, outer.trace_id, None)
    assert (inner.parent.span_id, inner.context.span_id) == (outer.span_id, inner.span_id)
    assert abs(inner.start_time - time.time()) < 60 and inner.start_time <= inner.end_time
    assert (inner.status.status_code, inner.status.description) == ("ERROR", "bad")
    (event,) = inner.events
    assert (event.name, event.attributes, event.timestamp) == ("said", {"words": ("a", "b")}, 1_700_000_000.5)
    assert (inner.links[0].context.span_id, inner.links[0].attributes) == (outer.span_id, {"why": "related"})
    assert inner.resource.attributes["telemetry.sdk.language"] == "python"
    assert (inner.kind, outer.kind) == ("SpanKind.CLIENT", "SpanKind.INTERNAL")
    assert not [name for name in inner.model_extra if name.startswith("_")]
    assert outer.status.status_code == "UNSET"


def test_a_span_that_has_not_ended_is_taken_over_too() -> None:
    """Its tracer's own things (locks, processors, limits) are no part of a trace."""
    span = tracer.start_span("open", kind=trace.SpanKind.SERVER)
    taken: Any = rs.Span.from_opentelemetry(span, "r", "a", 1)
    assert taken.kind == "SpanKind.SERVER" and taken.end_time is None
    assert taken.model_extra.keys() <= {"kind", "instrumentation_info", "instrumentation_scope"}
    span.end()
