"""Spans that cannot be had are told of and counted, wherever an agent runs; the rest is there."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import queue
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased

import raystore as rs
from raystore.core.schema import LossReason
from tests.conftest import MakeMemoryStore, MakeRayStore
from tests.helpers import AnyStore, present, until

HAD = {"of a library", "outer", "in a thread of an executor", "within", "chat", "bare", "after what is odd"}
LOST = {
    "sampled_out": 2, "sdk_disabled": 2, "no_context": 1, "not_convertible": 1,
    "without_token_ids": 1, "without_logprobs": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """What the process is told."""
    caplog.set_level(logging.WARNING, "raystore")
    return caplog


def agent(task: Any, ctx: rs.Context) -> None:
    """Does what libraries and people do."""
    rs.otel.instrument()
    tracer = TracerProvider().get_tracer("of a library")  # later, and not the global one
    tracer.start_span("of a library").end()
    with ctx.span("outer"), ThreadPoolExecutor(1) as threads:

        def tool() -> None:
            with tracer.start_as_current_span("in a thread of an executor"), present(rs.current()).span("within"):
                pass

        threads.submit(tool).result()
    off = TracerProvider(sampler=ParentBased(ALWAYS_OFF)).get_tracer("t")
    with off.start_as_current_span("dropped"), off.start_as_current_span("dropped with its parent"):
        pass
    os.environ["OTEL_SDK_DISABLED"] = "true"
    try:
        with TracerProvider().get_tracer("t").start_as_current_span("not made"):
            TracerProvider().get_tracer("t").start_span("nor this").end()
    finally:
        del os.environ["OTEL_SDK_DISABLED"]
    thread = threading.Thread(target=lambda: tracer.start_span("in a thread of its own").end())
    thread.start()
    thread.join()
    odd: Any = tracer.start_span("odd")
    odd._status = None
    odd.end()
    tracer.start_span("after what is odd").end()
    if task != "run_one":  # where there is no limit
        tracer.start_span("too large", attributes={"text": "x" * 200_000}).end()
    with ctx.span("bare", **{"gen_ai.operation.name": "chat"}):
        pass
    for logprobs in (None, None, [-1.0]):
        ctx.llm(prompt_ids=[1], response_ids=[2], logprobs=logprobs)


def check_told(records: Any) -> list[Any]:
    """Each reason once, each naming a span and what to do."""
    said = [record.getMessage() for record in records if record.name == "raystore.tracing"]
    for words in (
        ("'dropped'", "sampler", "ALWAYS_ON", "OTEL_TRACES_SAMPLER"),
        ("'not made'", "OTEL_SDK_DISABLED"),
        ("'in a thread of its own'", "copy_context().run", "ThreadPoolExecutor"),
        ("'odd'", "cannot be recorded", "NoneType"),
        ("'bare'", "token ids", "return_token_ids"),
        ("'chat'", "log-probabilities", "logprobs=True"),
    ):
        (one,) = [line for line in said if words[0] in line]
        assert all(word in one for word in words), one
    return said


def test_without_a_store(told: Any) -> None:
    """What was lost is on the run."""
    for _ in range(3):
        run = rs.run_one(agent, "run_one")
        assert {span.name for span in run.spans} == HAD and run.spans_lost == LOST
    assert len(check_told(told.records)) == 6
    by_name = {span.name: span for span in run.spans}
    assert by_name["within"].parent_id == by_name["outer"].span_id


async def count(store: AnyStore, **options: Any) -> dict[str, Any]:
    """What one rollout of a pool of its own lost, which has all the rest."""
    before = (await store.statistics())["spans_lost"]
    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, **options):
        finished = present(await store.wait_for_rollout(made.rollout_id, timeout=60))
    assert finished.status == "succeeded", finished.attempt.error
    assert {span.name for span in await store.query_spans(made.rollout_id)} == HAD
    after = (await store.statistics())["spans_lost"]
    return {reason: number - before.get(reason, 0) for reason, number in after.items()}


async def test_in_this_process(make_memory_store: MakeMemoryStore, told: Any) -> None:
    """The runner tells the store, and people."""
    store = make_memory_store(limits={"span_bytes": 100_000})
    assert await count(store) == LOST | {"refused": 1}
    said = check_told(told.records)
    assert len(said) == 7 and any("'too large'" in line and "refused" in line for line in said)
    assert await count(store) == LOST | {"refused": 1}
    assert len(check_told(told.records)) == 7


def wordy(task: Any, ctx: rs.Context) -> float:
    """Says more than the store takes, and ends at once."""
    for name, length in (("first", 1), ("large", 200_000), ("last", 1)):
        with ctx.span(name, text="x" * length):
            pass
    return 1.0


async def test_in_actors_and_their_processes(make_ray_store: MakeRayStore) -> None:
    """The same on Ray, also where the agent has a process of its own; no success overtakes a refusal."""
    store = make_ray_store(limits={"span_bytes": 100_000})
    for isolation in ("actor", "process"):
        assert await count(store, isolation=isolation) == LOST | {"refused": 1}
    assert (await store.statistics())["spans_lost"] == {name: 2 * n for name, n in (LOST | {"refused": 1}).items()}
    ids = [(await store.enqueue_rollout("x")).rollout_id for _ in range(10)]
    async with rs.RunnerPool(store, wordy, size=1):
        finished = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
        found = await store.query_many_spans(ids)
    assert [rollout.status for rollout in finished] == ["failed"] * 10
    assert all("200" in present(rollout.attempt.error) for rollout in finished)
    for spans in found.values():
        assert {span.name for span in spans} == {"first", "last", "agentlightning.annotation"}
    assert (await store.statistics())["spans_lost"]["refused"] == 12


async def test_runners_tell_while_they_work(make_memory_store: MakeMemoryStore) -> None:
    """With their heartbeats."""
    store = make_memory_store()
    await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, heartbeat_seconds=0.05):

        async def told() -> bool:
            return (await store.statistics())["spans_lost"] == LOST

        await until(told)


async def test_only_known_reasons_are_counted(make_memory_store: MakeMemoryStore) -> None:
    """So that no runner makes the store's memory grow."""
    store = make_memory_store()
    wrongs: list[Any] = [{"nonsense": 1}, {"refused": 0}, {"refused": "many"}]
    for wrong in wrongs:
        with pytest.raises(rs.InvalidValueError):
            await store.report_spans_lost(wrong)
    assert (await store.statistics())["spans_lost"] == {}


def test_every_reason_is_documented() -> None:
    """With what to do."""
    text = (Path(__file__).parents[2] / "docs" / "spans.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text.partition("## Spans that are lost")[2], re.MULTILINE)
    assert listed == list(get_args(LossReason))


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["submit", "map", "run_in_executor"])
async def test_executors_pass_a_rollout_on_and_keep_nothing(make_memory_store: MakeMemoryStore, kind: str) -> None:
    """Each task has the rollout and the enclosing span in which it was submitted, if any; its thread stays free."""
    provider, store, threads = TracerProvider(), make_memory_store(), ThreadPoolExecutor(1)
    tracer = provider.get_tracer("t")
    seen = []

    def tool(number: Any) -> None:
        seen.append(rs.current())
        with tracer.start_as_current_span(f"tool {number}"):
            pass

    async def agent(task: Any, ctx: rs.Context) -> None:
        import asyncio

        rs.otel.instrument(provider)
        with tracer.start_as_current_span(f"agent {task}"):
            if kind == "submit":
                threads.submit(tool, task).result()
            elif kind == "map":
                list(threads.map(tool, [task]))
            else:
                await asyncio.get_running_loop().run_in_executor(threads, tool, task)

    made = [await store.enqueue_rollout(number) for number in range(4)]
    async with rs.RunnerPool(store, agent, size=1, concurrency=4):
        await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=20)
        for number, rollout in enumerate(made):
            inner, outer = await store.query_spans(rollout.rollout_id)
            assert (inner.name, outer.name) == (f"tool {number}", f"agent {number}")
            assert inner.parent_id == outer.span_id and inner.trace_id == outer.trace_id
    assert None not in seen
    threads.submit(tool, "outside").result()
    assert seen.pop() is None
    assert threads.submit(trace.get_current_span).result() is trace.INVALID_SPAN
    alive = weakref.WeakSet(seen)
    seen.clear()

    async def gone() -> bool:
        gc.collect()
        return not alive

    await until(gone)
    threads.shutdown()


async def test_a_task_that_begins_after_its_rollout(make_memory_store: MakeMemoryStore) -> None:
    """Its spans are late, and kept; also of two rollouts at a time."""
    provider, store = TracerProvider(), make_memory_store()
    threads, held = ThreadPoolExecutor(1), threading.Event()
    threads.submit(held.wait)

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument(provider)
        threads.submit(lambda: provider.get_tracer("t").start_span(f"late {task}").end())

    made = [await store.enqueue_rollout(number) for number in range(2)]
    ids = [r.rollout_id for r in made]
    async with rs.RunnerPool(store, agent, size=1):
        assert len(await store.wait_for_rollouts(rollout_ids=ids, timeout=20)) == 2
        held.set()

        async def kept() -> bool:
            found = await store.query_many_spans(ids)
            return [[span.name for span in found[each]] for each in ids] == [["late 0"], ["late 1"]]

        await until(kept)
    assert (await store.statistics())["spans_lost"] == {}
    threads.shutdown()


def test_a_thread_that_outlives_a_rollout_belongs_to_none() -> None:
    """Its spans go where it is told that they belong, and are counted where it is not; those of drivers are not."""
    provider = TracerProvider()
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    tracer = provider.get_tracer("t")

    def work() -> None:
        while (job := jobs.get()) is not None:
            done.put(job())

    worker = threading.Thread(target=work)

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument(provider)
        if not worker.is_alive():
            worker.start()
        jobs.put(lambda: tracer.start_span("lost").end())
        run = contextvars.copy_context().run
        jobs.put(lambda: run(lambda: tracer.start_span(f"kept {task}").end()))
        for _ in range(2):
            done.get()

    for task in range(3):
        run = rs.run_one(agent, task)
        assert [span.name for span in run.spans] == [f"kept {task}"] and run.spans_lost == {"no_context": 1}
    jobs.put(None)
    worker.join()


async def test_spans_of_the_driver_are_not_lost(make_memory_store: MakeMemoryStore) -> None:
    """A driver that is traced, too, has its spans for itself, and hears nothing of them."""
    provider, store, held = TracerProvider(), make_memory_store(), threading.Event()
    rs.otel.instrument(provider)
    rollout = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, lambda task, ctx: held.wait() and None, size=1):

        async def runs() -> Any:
            return (await store.get_rollout_by_id(rollout.rollout_id)).status == "running"

        await until(runs)
        provider.get_tracer("t").start_span("a step of training").end()
        held.set()
        await store.wait_for_rollout(rollout.rollout_id, timeout=20)
    assert (await store.statistics())["spans_lost"] == {}


async def test_what_a_driver_goes_on_with_while_agents_run_is_its_own(make_memory_store: MakeMemoryStore) -> None:
    """Also in a thread that is not the main one: its span began when no agent ran."""
    provider, store, held = TracerProvider(), make_memory_store(), threading.Event()
    rs.otel.instrument(provider)
    tracer, sync = provider.get_tracer("t"), store.sync

    def drive() -> None:
        with (
            tracer.start_as_current_span("a step of training"),
            rs.RunnerPool(store, lambda task, ctx: held.wait() and None, size=1, flush_seconds=0.05),
        ):
            rollout = sync.enqueue_rollout("x")
            while sync.get_rollout_by_id(rollout.rollout_id).status != "running":
                time.sleep(0.01)
            tracer.start_span("waiting").end()
            held.set()
            sync.wait_for_rollout(rollout.rollout_id, timeout=20)

    await asyncio.to_thread(drive)
    assert (await store.statistics())["spans_lost"] == {}


def test_a_garbage_collection_may_end_a_span_anywhere() -> None:
    """Of a generator in a cycle, say, while another span is taken; its own thread must not wait for itself."""

    class Stream:
        end: Any  # never reached

        def __init__(self, ctx: rs.Context) -> None:
            self.items = self.all_of_them(ctx)

        def all_of_them(self, ctx: rs.Context) -> Iterator[int]:
            with ctx.span("stream"):
                yield from range(10)
                self.end()

    def agent(task: Any, ctx: rs.Context) -> None:
        lots = random.Random(7)
        for _ in range(3_000):
            next(Stream(ctx).items)  # and no more
            padding: list[Any] = [[] for _ in range(lots.randrange(30))]  # so that a collection comes at any place
            ctx.llm(prompt_ids=[1, 2], response_ids=[3], logprobs=[-0.1], padding=len(padding))

    names = [span.name for span in rs.run_one(agent, "x").spans]
    assert names.count("chat") == 3_000 and names.count("stream") > 2_000


def test_a_generator_that_ends_early_leaves_its_span() -> None:
    """What comes after it is within the block around it, however many were begun and left before."""

    def some_of_them(ctx: rs.Context, name: str) -> Generator[int, None, None]:
        with ctx.span(name):
            yield from range(10)

    def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("around"):
            first, second = some_of_them(ctx, "first"), some_of_them(ctx, "second")
            next(first), next(second)
            ctx.llm(prompt_ids=[1], response_ids=[2], logprobs=[-0.1], at="within the second")
            first.close()
            second.close()
            ctx.llm(prompt_ids=[1], response_ids=[2], logprobs=[-0.1], at="after both")
        ctx.llm(prompt_ids=[1], response_ids=[2], logprobs=[-0.1], at="outside")

    spans = rs.run_one(agent, "x").spans
    ids: dict[Any, str | None] = {span.name: span.span_id for span in spans} | {None: None}
    parents = {span.attributes.get("at", span.name): span.parent_id for span in spans}
    wanted: dict[Any, str | None] = {
        "first": "around",
        "second": "first",
        "within the second": "second",
        "after both": "around",
    }
    wanted |= {"around": None, "outside": None}
    assert parents == {name: ids[parent] for name, parent in wanted.items()}


def test_spans_after_the_end_are_not_kept(told: Any) -> None:
    """They are told of, once, and go."""
    contexts = []
    run = rs.run_one(lambda task, ctx: contexts.append(ctx), "x")
    for _ in range(20):
        with contexts[0].span("late"):
            pass
    outbox = contexts[0].sink.__self__
    assert run.spans == [] and outbox.take() == []
    assert [record.getMessage() for record in told.records if "ended after run_one" in record.getMessage()] != []


# -- which providers ---------------------------------------------------------------------------------------------------

PROVIDERS = """
import raystore as rs
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

one, another, exporter = TracerProvider(), TracerProvider(), InMemorySpanExporter()
tracers = [one.get_tracer("t"), another.get_tracer("t"), trace.get_tracer("global")]
def agent(task, ctx):
    for number, tracer in enumerate(tracers):
        tracer.start_span(str(number)).end()
def names():
    return [span.name for span in rs.run_one(agent, "x").spans]

assert names() == []
rs.otel.instrument(one)
assert names() == ["0"]  # that one only
assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
made = rs.otel.instrument()
assert names() == ["0", "1", "2"]  # all of the process, also those that were there before
theirs = TracerProvider()
theirs.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(theirs)
assert trace.get_tracer_provider() is theirs is rs.otel.instrument() is not made
tracers.append(trace.get_tracer("later"))
assert names() == ["0", "1", "2", "3"]
assert [span.name for span in exporter.get_finished_spans()] == ["3"]
one.shutdown()
assert names() == ["0", "1", "2", "3"]
"""


def test_one_provider_or_all_of_the_process() -> None:
    """With None also those that exist and those that are made or set later; each span once."""
    subprocess.run([sys.executable, "-c", PROVIDERS], check=True, timeout=60)


def test_what_is_left_out_on_purpose_is_not_lost() -> None:
    """Tracers that make nothing while tracing is on, and spans outside of rollouts; a good sampler says nothing."""

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument()
        trace.NoOpTracer().start_span("a library that is not traced").end()
        with TracerProvider(sampler=ALWAYS_ON).get_tracer("t").start_as_current_span("kept"):
            pass

    run = rs.run_one(agent, "x")
    assert [span.name for span in run.spans] == ["kept"] and run.spans_lost == {}
    TracerProvider(sampler=ALWAYS_OFF).get_tracer("t").start_span("outside").end()


def test_a_parent_elsewhere_that_was_not_sampled(told: Any) -> None:
    """Takes the span with it, which is told with the remedy that fits."""
    elsewhere = trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(0))
    parent = trace.set_span_in_context(trace.NonRecordingSpan(elsewhere))

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument()
        TracerProvider().get_tracer("t").start_span("child", context=parent).end()
        TracerProvider(sampler=ALWAYS_ON).get_tracer("t").start_span("kept", context=parent).end()

    run = rs.run_one(agent, "x")
    assert [span.name for span in run.spans] == ["kept"] and run.spans_lost == {"sampled_out": 1}
    assert "parent that was not sampled" in told.text


FORKING = """
import os
import raystore as rs
from opentelemetry.sdk.trace import TracerProvider

def agent(task, ctx):
    rs.otel.instrument()
    tracer = TracerProvider().get_tracer("t")
    if (child := os.fork()) == 0:
        for number in range(3):
            tracer.start_span(f"in a child {number}").end()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    tracer.start_span("here").end()
assert [span.name for span in rs.run_one(agent, "x").spans] == ["here"]
"""


def test_a_process_that_an_agent_forks_says_that_it_is_not_heard() -> None:
    """Once, by the name of a span."""
    ran = subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=60, capture_output=True, text=True)
    assert ran.stderr.count("is lost") == 1 and "'in a child 0'" in ran.stderr and "forked" in ran.stderr


# -- odd spans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush_seconds", [0.01, 100])
async def test_odd_spans_of_tracers_fail_nothing(
    make_memory_store: MakeMemoryStore, told: Any, flush_seconds: float
) -> None:
    """Whatever is odd about them they are named, and all others are there; what the agent says itself is required."""
    store, provider = make_memory_store(limits={"span_bytes": 100_000}), TracerProvider()

    def spoil(span: Any, **wrong: Any) -> None:
        for name, value in wrong.items():
            setattr(span, f"_{name}", value)
        span.end()

    def agent(task: Any, ctx: rs.Context) -> list[rs.Span]:
        rs.otel.instrument(provider)
        tracer = provider.get_tracer("t")
        tracer.start_span("first").end()
        tracer.start_span("large", attributes={"text": "x" * 200_000}).end()
        spoil(tracer.start_span("no status"), status=None)
        spoil(tracer.start_span("odd parent"), parent="me")
        spoil(tracer.start_span("odd time"), start_time="noon")
        tracer.start_span("last").end()
        if task != "own":
            return []
        wrong = rs.Span.from_attributes(attributes={})
        wrong.trace_id = ""
        return [wrong]

    made = [await store.enqueue_rollout(task) for task in ("fine", "own")]
    async with rs.RunnerPool(store, agent, size=1, flush_seconds=flush_seconds):
        fine, own = await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=20)
    for rollout in made:
        assert [span.name for span in await store.query_spans(rollout.rollout_id)] == ["first", "last"]
    assert fine.status == "succeeded"
    assert own.status == "failed" and "trace_id" in present(own.attempt.error)
    assert (await store.statistics())["spans_lost"] == {"not_convertible": 6, "refused": 3}
    said = [record.getMessage() for record in told.records if record.name == "raystore.tracing"]
    for name in ("large", "no status", "odd parent", "odd time"):
        assert len([line for line in said if f"{name!r}" in line]) == 1


def test_spans_that_never_end_keep_nothing_of_their_rollout() -> None:
    """Neither its context nor what others recorded, though somebody keeps them."""
    provider, kept = TracerProvider(), []
    alive: weakref.WeakSet[rs.Context] = weakref.WeakSet()

    def agent(task: Any, ctx: rs.Context) -> None:
        rs.otel.instrument(provider)
        alive.add(ctx)
        kept.append(provider.get_tracer("t").start_span("kept open"))
        ctx.llm(prompt_ids=range(1000), response_ids=[1], logprobs=[0.0])

    recorded = [weakref.ref(span) for _ in range(5) for span in rs.run_one(agent, "x").spans]
    gc.collect()
    assert len(kept) == len(recorded) == 5 and not alive and not any(span() for span in recorded)
