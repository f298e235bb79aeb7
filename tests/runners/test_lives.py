"""The life of an agent, wherever it runs: one thread, one task, and endings that are its own."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import gc
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider

import raystore as rs
from raystore.runner.context import Context
from raystore.runner.life import Life
from tests.conftest import MakeMemoryStore
from tests.helpers import present, until

variable = contextvars.ContextVar("variable", default=0)


@dataclass
class Seen:
    """What became of one task."""

    outcome: str
    reward: float | None
    error: str
    spans: list[Any]

    def said(self, name: str) -> Any:
        """The attributes of the span of this name."""
        return next(span.attributes for span in self.spans if span.name == name)


class Place:
    """Somewhere an agent can run."""

    def __init__(self, name: Any, store: Any) -> None:
        self.name = name
        self.store = store
        self.isolation: Literal["actor", "process"] = "process" if name == "process" else "actor"

    def pool(self, agent: Any, **options: Any) -> rs.RunnerPool:
        """A pool there."""
        return rs.RunnerPool(self.store, agent, size=1, isolation=self.isolation, **options)

    async def run(self, agent: Any, tasks: Iterable[Any], **options: Any) -> list[Seen]:
        """Run an agent on tasks; where there is no pool, each has a life of its own, outside of any event loop."""
        if self.name == "run_one":
            return [await asyncio.to_thread(seen_alone, agent, task) for task in tasks]
        async with self.pool(agent, **options):
            made = [await self.store.enqueue_rollout(task) for task in tasks]
            await self.store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=60)
        seen = []
        for rollout in made:
            finished = await self.store.get_rollout_by_id(rollout.rollout_id)
            attempt = await self.store.get_latest_attempt(rollout.rollout_id)
            spans = await self.store.query_spans(rollout.rollout_id)
            seen.append(Seen(attempt.outcome, finished.reward, attempt.error or "", spans))
        return seen


def seen_alone(agent: Any, task: Any) -> Seen:
    """The same by `run_one`."""
    try:
        run = rs.run_one(agent, task)
    except BaseException as error:
        return Seen(type(error).__name__, None, "", [])
    return Seen("ok", run.reward, "", run.spans)


@pytest.fixture(params=["run_one", "memory", "actor", "process"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each place in which an agent can run; agents' processes are those of a pool in memory."""
    if request.param == "run_one":
        return Place("run_one", None)
    store = request.getfixturevalue("make_ray_store" if request.param == "actor" else "make_memory_store")()
    return Place(request.param, store)


# -- one thread and one task -------------------------------------------------------------------------------------------


class Plain:
    """Keeps what only one thread may use, and runs event loops."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.threads = [threading.get_ident()]
        self.first = sqlite3.connect(":memory:")

    def setup(self) -> None:
        self.threads.append(threading.get_ident())
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("create table calls (task text)")
        self.loop = asyncio.get_event_loop()
        self.group = self.loop.run_until_complete(asyncio.sleep(0, "made"))
        variable.set(7)

    def __call__(self, task: Any, ctx: rs.Context) -> float:
        self.threads.append(threading.get_ident())
        assert asyncio.run(asyncio.sleep(0, task)) == task
        assert variable.get() == 7
        variable.set(8)
        assert rs.current() is ctx
        self.first.execute("select 1")
        self.connection.execute("insert into calls values (?)", [task])
        (calls,) = self.connection.execute("select count(*) from calls").fetchone()
        with ctx.span(
            "seen", threads=len(set(self.threads)), main=threading.current_thread() is threading.main_thread()
        ):
            pass
        return float(calls)

    def close(self) -> None:
        self.threads.append(threading.get_ident())
        assert asyncio.run(asyncio.sleep(0, 1)) == 1
        self.connection.close()
        self.first.close()
        self.path.write_text(f"{len(set(self.threads))} threads, {rs.current()}")


async def test_everything_of_a_plain_agent_is_in_one_thread(place: Place, tmp_path: Path) -> None:
    """SQLite of `__init__` and `setup`, loops of its own, context variables of `setup` that no call leaves changed."""
    seen = await place.run(functools.partial(Plain, tmp_path / "closed"), ["a", "b", "c"])
    alone = place.name == "run_one"
    assert [(s.outcome, s.reward) for s in seen] == [("ok", 1.0 if alone else n) for n in (1.0, 2.0, 3.0)], seen
    assert all(s.said("seen")["threads"] == 1 for s in seen)
    assert (tmp_path / "closed").read_text() == "1 threads, None"
    if place.name == "process":
        assert all(s.said("seen")["main"] for s in seen)


class Async:
    """Enters in `setup` what only its own task may leave, and has something in the background."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.tasks: set[tuple[int, asyncio.Task[Any] | None]] = set()
        self.beats = 0
        self.beaten = asyncio.Event()
        self.note()

    def note(self) -> None:
        """Remember in which task this is."""
        self.tasks.add((threading.get_ident(), asyncio.current_task()))

    async def setup(self) -> None:
        self.note()
        self.group = anyio.create_task_group()
        await self.group.__aenter__()
        self.group.start_soon(self.beat)
        variable.set(7)

    async def beat(self) -> None:
        """Goes on also between calls."""
        while True:
            self.beats += 1
            self.beaten.set()
            await asyncio.sleep(0.005)

    async def __call__(self, task: Any, ctx: rs.Context) -> float:
        self.note()
        async with asyncio.timeout(60):
            for _ in range(3):  # what `setup` started goes on during a call
                self.beaten.clear()
                await self.beaten.wait()
        assert rs.current() is ctx and variable.get() == 7
        variable.set(8)
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            child = group.create_task(asyncio.sleep(0, 1))
        assert child.result() == 1
        with ctx.span("seen", tasks=len(self.tasks)):
            pass
        return 1.0

    async def close(self) -> None:
        self.note()
        self.group.cancel_scope.cancel()
        await self.group.__aexit__(None, None, None)
        self.path.write_text(f"{len(self.tasks)} tasks")


def decorated(function: Callable[..., Coroutine[Any, Any, float]]) -> Any:
    """What hides that a function is async."""

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Coroutine[Any, Any, float]:
        return function(*arguments)

    return wrapper


class Decorated(Async):
    """The same, without looking async when it is called; `__init__` is in the thread then."""

    def note(self) -> None:
        if self.__dict__.get("beats") or hasattr(self, "group") or self.tasks:
            super().note()

    async def setup(self) -> None:
        self.tasks.add((threading.get_ident(), asyncio.current_task()))
        await super().setup()

    __call__ = decorated(Async.__call__)


@pytest.mark.parametrize("kind", [Async, Decorated])
async def test_everything_of_an_async_agent_is_in_one_task(
    place: Place, kind: Callable[..., Any], tmp_path: Path
) -> None:
    """Task groups and cancel scopes of `setup` are left in `close`, and what they started goes on meanwhile."""
    if kind is Decorated and place.name == "actor":
        kind = functools.partial(kind)  # the same agent, given otherwise
    seen = await place.run(functools.partial(kind, tmp_path / "closed"), ["a", "b", "c"])
    assert [(s.outcome, s.reward) for s in seen] == [("ok", 1.0)] * 3, seen
    assert all(s.said("seen")["tasks"] == 1 for s in seen)
    assert (tmp_path / "closed").read_text() == "1 tasks"


@pytest.mark.parametrize("kind", ["plain", "async", "decorated"])
async def test_above_concurrency_1_calls_run_beside(make_memory_store: MakeMemoryStore, kind: str) -> None:
    """One instance; `setup` and `close` share a thread and a task, and as many calls as that are under way at once."""
    lives: list[list[Any]] = []
    met = threading.Barrier(4, timeout=20)

    class Agent:
        def __init__(self) -> None:
            lives.append([])

        async def setup(self) -> None:
            self.place = (threading.get_ident(), asyncio.current_task())
            self.loop = asyncio.get_running_loop()
            self.inside = 0
            self.all = asyncio.Event()
            lives[-1].append(self.place)

        async def solve(self, task: Any, ctx: rs.Context) -> float:
            assert asyncio.get_running_loop() is self.loop
            self.inside += 1
            if self.inside == 4:
                self.all.set()
            await self.all.wait()
            assert rs.current() is ctx and variable.get() == 0
            variable.set(1)
            return 1.0

        async def close(self) -> None:
            lives[-1].append((threading.get_ident(), asyncio.current_task()))

    def plain(self: Any, task: Any, ctx: rs.Context) -> float:
        met.wait()
        assert asyncio.run(asyncio.sleep(0, 1)) == asyncio.get_event_loop_policy().get_event_loop().time() * 0 + 1
        return float(threading.get_ident() != self.place[0])

    agent: Any = Agent
    agent.__call__ = {"plain": plain, "async": Agent.solve, "decorated": decorated(Agent.solve)}[kind]
    if kind == "plain":  # get_event_loop first: asyncio.run takes the loop of its thread away, as anywhere

        def plain(self: Any, task: Any, ctx: rs.Context) -> float:
            met.wait()
            assert asyncio.get_event_loop().run_until_complete(asyncio.sleep(0, 1)) == 1
            assert asyncio.run(asyncio.sleep(0, 1)) == 1
            return float(threading.get_ident() != self.place[0])

        agent.__call__ = plain
    seen = await Place("memory", make_memory_store()).run(Agent, range(8 if kind == "plain" else 4), concurrency=4)
    assert {(s.outcome, s.reward) for s in seen} == {("ok", 1.0)}, seen
    ((first, last),) = lives
    assert first == last


# -- how calls end -----------------------------------------------------------------------------------------------------


class Mute(Exception):
    """Says nothing of itself."""

    def __str__(self) -> str:
        raise AttributeError("no message")

    __repr__ = __str__


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """Refuses notes, and whatever else somebody wants to set."""

    code: int


class Stuck(Exception):
    """Cannot be pickled."""

    def __init__(self, what: str, *, needed: int) -> None:
        super().__init__(threading.Lock())


def raising(error: Any, *, inside: bool = False) -> Callable[..., Coroutine[Any, Any, None]]:
    """What raises an error, in a span or in a task group."""

    def act(ctx: rs.Context) -> Coroutine[Any, Any, None]:
        if not inside:
            with ctx.span("failing"):
                raise error
        return in_group(error)

    return act


async def in_group(error: Any) -> None:
    """Raise an error in a task of a group of a group."""

    async def fail() -> None:
        async with asyncio.TaskGroup() as inner:
            inner.create_task(throw(error))

    async with asyncio.TaskGroup() as outer:
        outer.create_task(fail())


async def throw(error: Any, *, after: float = 0) -> None:
    """Raise it."""
    if after:
        await asyncio.sleep(after)
    raise error


async def cancel_itself() -> None:
    """Cancel the task of the agent, for which nobody has asked."""
    present(asyncio.current_task()).cancel()
    await asyncio.sleep(1)


async def give(value: float | Waits) -> float | Waits:
    """What is awaited in the end."""
    await asyncio.sleep(0)
    return value


class Waits:
    """Something that can be awaited, and is no coroutine."""

    def __await__(self) -> Iterator[Any]:
        return give(0.5).__await__()

    def method(self) -> Coroutine[Any, Any, Any]:
        """One that a method gives."""
        return give(0.5)


def both() -> ExceptionGroup[ValueError | rs.Drop | rs.Abort]:
    """A group made by hand."""
    return ExceptionGroup("several", [ValueError("x"), rs.Drop("too long"), rs.Abort("sandbox down")])


# By name: what the agent does, the outcome in a pool, what its error says, and what `run_one` raises.
ENDINGS: dict[str, tuple[Callable[[rs.Context], Any], str, str, str | None]] = {
    "a coroutine": (lambda ctx: give(0.5), "ok", "", None),
    "of a method": (lambda ctx: Waits().method(), "ok", "", None),
    "an awaitable": (lambda ctx: Waits(), "ok", "", None),
    "one in another": (lambda ctx: give(Waits()), "ok", "", None),
    "Drop": (raising(rs.Drop("too long"), inside=True), "dropped", "too long", "ExceptionGroup"),
    "Abort": (raising(rs.Abort("sandbox down"), inside=True), "infra", "sandbox down", "ExceptionGroup"),
    "Abort and Drop": (raising(both()), "infra", "sandbox down", "ExceptionGroup"),
    "a group": (raising(ValueError("bad"), inside=True), "agent_error", "ValueError: bad", "ExceptionGroup"),
    "GeneratorExit": (raising(GeneratorExit("mine")), "agent_error", "GeneratorExit: mine", "GeneratorExit"),
    "GeneratorExit, later": (lambda ctx: throw(GeneratorExit()), "agent_error", "GeneratorExit", "GeneratorExit"),
    "StopIteration": (raising(StopIteration(3)), "agent_error", "StopIteration: 3", None),
    "SystemExit": (raising(SystemExit(3)), "agent_error", "SystemExit: 3", "SystemExit"),
    "without text": (raising(Mute()), "agent_error", "Mute", "Mute"),
    "without text, later": (lambda ctx: throw(Mute()), "agent_error", "Mute", "Mute"),
    "frozen": (raising(Frozen(7)), "agent_error", "Frozen", "Frozen"),
    "not to be pickled": (raising(Stuck("x", needed=1)), "agent_error", "Stuck", "Stuck"),
    "Drop without text": (raising(type("Quiet", (rs.Drop, Mute), {})()), "dropped", "cannot be had", "Quiet"),
    "CancelledError": (raising(asyncio.CancelledError()), "agent_error", "cancelled itself", "CancelledError"),
    "cancelled itself": (lambda ctx: cancel_itself(), "agent_error", "cancelled itself", "CancelledError"),
    "a list": (lambda ctx: ["x"], "agent_error", "expected a number", "TypeError"),
    "in order after all": (lambda ctx: 0.5, "ok", "", None),
}  # fmt: skip


def plain_agent(task: Any, ctx: rs.Context) -> Any:
    """Ends as the task says; what is to be awaited it hands back."""
    return ENDINGS[task][0](ctx)


async def async_agent(task: Any, ctx: rs.Context) -> Any:
    """The same from a coroutine function."""
    result = ENDINGS[task][0](ctx)
    return await result if hasattr(result, "__await__") else result


@pytest.mark.parametrize("agent", [plain_agent, async_agent])
async def test_how_calls_end(place: Place, agent: Callable[..., Any] | Callable[..., Coroutine[Any, Any, Any]]) -> None:
    """Whatever is raised, and wherever: it is the agent's own error that is kept, and the next rollout is in order."""
    from tests.runners import test_lives  # by name, in whatever process

    seen = await place.run(getattr(test_lives, agent.__name__), list(ENDINGS))
    for (name, (_, outcome, error, raised)), one in zip(ENDINGS.items(), seen, strict=True):
        if place.name == "run_one":
            if name == "StopIteration":  # which Python itself does not let out of a coroutine
                raised = "StopIteration" if agent is plain_agent else "RuntimeError"
            assert one.outcome == (raised or "ok"), name
        else:
            assert (one.outcome, error in one.error) == (outcome, True), (name, one)
            if outcome == "agent_error" and one.spans and "GeneratorExit" not in name:  # which is no failure of a block
                (event,) = one.spans[0].events
                assert event.attributes["exception.type"] in one.error, name
        if outcome == "ok":
            assert one.reward == 0.5, name


@pytest.mark.parametrize("place", ["memory", "actor", "process"], indirect=True)
async def test_errors_of_setup_are_told_as_they_are(place: Place) -> None:
    """By their class, whether or not they have a text or can be pickled; and the remedy, where a thread is to blame."""
    from tests.runners import test_lives

    for kind, text in (("NoText", "Mute"), ("NotPicklable", "Stuck"), ("Alarm", "isolation='process'")):
        if kind == "Alarm" and place.name == "process":
            async with place.pool(test_lives.Alarm):
                continue
        with pytest.raises(rs.PoolStartError, match=text):
            async with place.pool(getattr(test_lives, kind)):
                pass


class NoText:
    """Fails in `setup`."""

    def setup(self) -> None:
        raise Mute

    def __call__(self, task: Any, ctx: rs.Context) -> float:
        return 1.0


class NotPicklable(NoText):
    """Fails with an error that cannot travel."""

    def setup(self) -> None:
        raise Stuck("x", needed=1)


class Alarm(NoText):
    """Wants a signal."""

    def setup(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


async def test_what_needs_a_main_thread_says_where_there_is_one(place: Place) -> None:
    """An alarm works in a process, and in `run_one` of a main thread; elsewhere the error says what to do."""

    def agent(task: Any, ctx: rs.Context) -> float:
        if task == "loop":
            asyncio.run(on_loop())
        else:
            Alarm().setup()
        return 1.0

    async def on_loop() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)

    if place.name == "run_one":  # beside the loop of this test
        with pytest.raises(ValueError, match="isolation='process'"):
            rs.run_one(agent, "alarm")
        return
    for one in await place.run(agent, ["alarm", "loop"]):
        if place.name == "process":
            assert one.outcome == "ok", one
        else:
            assert "isolation='process'" in one.error.splitlines()[-1] and "main thread" in one.error


def test_run_one_runs_in_the_main_thread() -> None:
    """Where it is called there, and no event loop runs."""

    def agent(task: Any, ctx: rs.Context) -> float:
        before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, before)
        return 1.0

    assert rs.run_one(agent, "x").reward == 1.0


# -- ends before the end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "process"], indirect=True)
async def test_a_life_that_is_over_is_followed_by_another(place: Place, tmp_path: Path) -> None:
    """A task group of `setup` fails, the loop is closed, or a task in the background exits: a new instance works on."""

    class Agent:
        def setup(self) -> None:
            (tmp_path / f"made-{time.monotonic()}").touch()

        async def __call__(self, task: Any, ctx: rs.Context) -> float:
            if task == "group":
                self.group = anyio.create_task_group()
                await self.group.__aenter__()
                self.group.start_soon(throw, ValueError("a child has failed"))
            if task == "exit":
                self.task = asyncio.create_task(throw(SystemExit(3), after=0.05))
            return 1.0

        async def close(self) -> None:
            (tmp_path / f"closed-{time.monotonic()}").touch()
            if hasattr(self, "group"):
                await self.group.__aexit__(None, None, None)

    async with place.pool(Agent):
        for task in ("first", "group", "second", "exit", "third"):
            made = await place.store.enqueue_rollout(task)
            done = await place.store.wait_for_rollout(made.rollout_id, timeout=30)
            assert (done.status, done.reward) == ("succeeded", 1.0)

            async def is_over(lives: int = {"first": 0, "group": 1, "second": 1, "exit": 2, "third": 2}[task]) -> bool:
                return len(list(tmp_path.glob("closed-*"))) == lives

            await until(is_over)
    assert len(list(tmp_path.glob("made-*"))) == len(list(tmp_path.glob("closed-*"))) == 3


async def test_a_plain_agent_may_close_its_loop(make_memory_store: MakeMemoryStore) -> None:
    """The idiom of old: it costs a new instance, and no rollout."""

    def agent(task: Any, ctx: rs.Context) -> float | Waits:
        loop = asyncio.get_event_loop()
        try:
            return loop.run_until_complete(give(0.5))
        finally:
            loop.close()

    seen = await Place("memory", make_memory_store()).run(agent, range(3))
    assert [(s.outcome, s.reward) for s in seen] == [("ok", 0.5)] * 3


@pytest.mark.parametrize("place", ["memory", "process"], indirect=True)
async def test_an_awaitable_that_an_agent_gave_is_cancelled(place: Place) -> None:
    """As an async agent is; and the life goes on, with the same instance."""

    class Agent:
        def setup(self) -> None:
            self.calls = 0

        def __call__(self, task: Any, ctx: rs.Context) -> Coroutine[Any, Any, float]:
            self.calls += 1
            return self.wait(task, ctx)

        async def wait(self, task: Any, ctx: rs.Context) -> float:
            with ctx.span("begun"):
                pass
            try:
                await asyncio.sleep(1000 if task == "long" else 0)
            finally:
                with ctx.span("cleaned up", why=ctx.why or "nothing"):
                    await asyncio.sleep(0.01)
            return float(self.calls)

    made = await place.store.enqueue_rollout("long")
    async with place.pool(Agent, flush_seconds=0.05):

        async def begun() -> Any:
            return await place.store.query_spans(made.rollout_id)

        await until(begun)
        await place.store.cancel_rollouts([made.rollout_id])
        quick = await place.store.enqueue_rollout("quick")
        assert (await place.store.wait_for_rollout(quick.rollout_id, timeout=20)).reward == 2.0
        _, cleaned = await place.store.query_spans(made.rollout_id)
        assert cleaned.attributes["why"] == "cancelled"


def test_ctrl_c_reaches_an_agent_that_is_tried_alone() -> None:
    """It is cancelled where it waits, closed, and the interrupt comes out."""
    code = """
import asyncio, os, signal, threading, raystore as rs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Agent:
    async def __call__(self, task, ctx):
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        try:
            await asyncio.sleep(1000)
        finally:
            print("cleaned up")
    def close(self):
        print("closed")
try:
    rs.run_one(Agent, "x")
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split("\n") == ["cleaned up", "closed", "interrupted", ""], ran.stderr


# -- what is left of a rollout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_nothing_of_a_finished_rollout_is_kept(make_memory_store: MakeMemoryStore, kind: str) -> None:
    """Its context, and with it task and resources, goes, also if it left spans and streams open."""
    store, provider = make_memory_store(), TracerProvider()
    alive: weakref.WeakSet[rs.Context] = weakref.WeakSet()
    left: list[Any] = []

    def leave_open(ctx: rs.Context) -> None:
        rs.otel.instrument(provider)
        alive.add(ctx)
        provider.get_tracer("t").start_span("a stream that is given up")
        left.append(provider.get_tracer("t").start_span("one that somebody keeps"))
        ctx.span("never entered")
        stuck = ctx.span("never left")
        stuck.__enter__()
        left.append(stuck.__exit__)

    def plain(task: Any, ctx: rs.Context) -> None:
        leave_open(ctx)

    async def chunks() -> AsyncIterator[int]:
        yield 1
        yield 2

    async def coroutine(task: Any, ctx: rs.Context) -> None:
        leave_open(ctx)
        async for _ in chunks():
            break

    made = [await store.enqueue_rollout("x") for _ in range(4)]
    async with rs.RunnerPool(store, plain if kind == "plain" else coroutine, size=1):
        await store.wait_for_rollouts(rollout_ids=[r.rollout_id for r in made], timeout=20)
        del left[1::2]  # what was entered and is not left holds its own context

        async def gone() -> bool:
            gc.collect()
            return not alive

        await until(gone)


def test_a_block_that_a_generator_leaves() -> None:
    """Closed elsewhere than it was entered: a span like others, in order, and no failure."""

    def stream(ctx: rs.Context) -> Generator[int]:
        with ctx.span("stream"):
            yield 1

    def agent(task: Any, ctx: rs.Context) -> None:
        given_up = stream(ctx)
        contextvars.copy_context().run(next, given_up)
        with ctx.span("outer"):
            given_up.close()
            with ctx.span("inner"):
                pass

    with_stream, inner, outer = rs.run_one(agent, "x").spans
    assert (with_stream.name, with_stream.status.status_code, with_stream.events) == ("stream", "OK", [])
    assert (inner.name, inner.parent_id, outer.parent_id) == ("inner", outer.span_id, None)


def test_attributes_may_have_any_names() -> None:
    """Also those of our own parameters."""

    def agent(task: Any, ctx: rs.Context) -> None:
        with ctx.span("tool call", name="search", self="me", context=1, attributes=2):
            pass
        ctx.llm(prompt_ids=[1], response_ids=[2], name="n", self="me", span=3)
        ctx.reward(1.0, value=0.5, self=0.25, name=0.125, reward=2.0)

    run = rs.run_one(agent, "x", {"p": rs.PromptTemplate(template="{self} {values}", engine="f-string")})
    tool, llm, reward = run.spans
    assert tool.attributes == {"name": "search", "self": "me", "context": 1, "attributes": 2}
    assert {"name": "n", "self": "me", "span": 3}.items() <= llm.attributes.items()
    values = {reward.attributes[f"agentlightning.reward.{n}.name"]: n for n in range(1, 5)}
    assert set(values) == {"value", "self", "name", "reward"} and run.reward == 1.0
    assert rs.PromptTemplate(template="{self} {values}", engine="f-string").format(self=1, values=2) == "1 2"


def test_a_call_that_is_cancelled_before_its_first_step_ends() -> None:
    """Calls that overlap have tasks, and a task that is cancelled before its first step does nothing at all."""

    async def agent(task: Any, ctx: rs.Context) -> None:
        await asyncio.sleep(100)

    ended = threading.Event()
    attempt = rs.Attempt(rollout_id="r", attempt_id="a", sequence_id=1, start_time=0.0)
    rollout = rs.AttemptedRollout(rollout_id="r", input="x", start_time=0.0, status="preparing", attempt=attempt)
    context = Context(rollout, {}, "worker", lambda span: None, lambda *loss: None)

    def serve() -> None:
        with Life(agent, concurrency=2) as life:
            lives.append(life)
            made.set()
            life.serve()

    lives: list[Life] = []
    made = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    made.wait(10)
    (life,) = lives
    life.begin(context, lambda ending: ended.set(), on_begin=lambda: life.cancel(context))
    is_ended = ended.wait(10)
    life.end()
    thread.join()
    context.leave()
    assert is_ended
