"""What agents save, on either store and in either isolation: `ctx.save`, `ctx.saved`, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import raystore as rs
from tests.helpers import AnyStore, mostly_in_memory, present, until

Isolation = Literal["actor", "process"]
TURNS = 4
both = pytest.mark.parametrize("isolation", ["actor", "process"])


def begin(ctx: rs.Context, path: str) -> list[int]:
    """The turns so far, noted in a file of the test."""
    turns: list[int] = ctx.saved or []
    with open(path, "a") as file:
        file.write(f"{turns}\n")
    return turns


async def playing(task: dict[str, Any], ctx: rs.Context) -> float:
    """Plays turns, saves after each, and dies or fails at some of them."""
    turns = begin(ctx, task["path"])
    for turn in range(len(turns), TURNS):
        with ctx.span(f"turn {turn}"):
            await asyncio.sleep(0)
        turns.append(turn)
        await ctx.save(turns)
        with ctx.span(f"behind {turn}"):
            pass
        if len(turns) == task["fails_after"] and ctx.attempt.sequence_id == 1:
            fail(task["how"])
    return float(len(turns))


def playing_in_thread(task: dict[str, Any], ctx: rs.Context) -> float:
    """The same for an agent that is not async."""
    turns = begin(ctx, task["path"])
    for turn in range(len(turns), TURNS):
        with ctx.span(f"turn {turn}"):
            pass
        turns.append(turn)
        ctx.sync.save(turns)
        if len(turns) == task["fails_after"] and ctx.attempt.sequence_id == 1:
            fail(task["how"])
    return float(len(turns))


def fail(how: str) -> None:
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    raise rs.Abort("no more")


async def played(store: AnyStore, agent: Callable[..., Any], isolation: Isolation, **task: Any) -> rs.Rollout:
    async with rs.RunnerPool(store, agent, size=1, isolation=isolation):
        made = await store.enqueue_rollout(task)
        done: rs.Rollout = present(await store.wait_for_rollout(made.rollout_id, timeout=30))
        return done


@mostly_in_memory
@both
@pytest.mark.parametrize("agent", [playing, playing_in_thread])
@pytest.mark.parametrize("how", ["aborts", "dies"])
async def test_the_next_attempt_goes_on(
    store: AnyStore, tmp_path: Path, agent: Callable[..., Any], isolation: Isolation, how: str
) -> None:
    """After an abort, and after the death of the agent's process: no turn is played twice, and the spans say so."""
    if how == "dies" and isolation == "actor" and isinstance(store, rs.InMemoryLightningStore):
        pytest.skip("it would be the process of the tests")
    path = tmp_path / "turns"
    done = await played(store, agent, isolation, path=str(path), fails_after=2, how=how)
    assert (done.status, done.reward) == ("succeeded", TURNS)
    assert path.read_text().splitlines() == ["[]", "[0, 1]"]
    first, last = await store.query_attempts(done.rollout_id)
    assert last.resumed_from == first.attempt_id
    spans = await store.query_spans(done.rollout_id, "latest")
    assert [span.name for span in spans if span.name.startswith("turn")] == [f"turn {n}" for n in range(TURNS)]
    assert not any(span.name == "behind 1" for span in spans)


class NotPicklable:
    """A state with a thread in it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


async def saving_badly(task: str, ctx: rs.Context) -> float:
    """Saves what cannot be kept, and goes on."""
    await ctx.save("kept")
    try:
        await ctx.save(NotPicklable() if task == "lock" else "x" * 5_000)
    except (rs.PayloadNotPicklableError, rs.PayloadTooLargeError) as error:
        with ctx.span("refused", why=f"{type(error).__name__}: {error}"):
            pass
    return 1.0


@both
@pytest.mark.parametrize(
    ("task", "error"),
    [("lock", "PayloadNotPicklableError: "), ("large", "PayloadTooLargeError: state is 5")],
)
async def test_a_state_that_cannot_be_kept_is_an_error_of_the_call(
    make_memory_store: Callable[..., Any], isolation: Isolation, task: str, error: str
) -> None:
    """The agent may catch it, and the spans that waited are not lost with it."""
    store = make_memory_store(limits={"state_bytes": 1_000})
    async with rs.RunnerPool(store, saving_badly, size=1, isolation=isolation):
        made = await store.enqueue_rollout(task)
        assert present(await store.wait_for_rollout(made.rollout_id, timeout=30)).status == "succeeded"
    (span, _) = await store.query_spans(made.rollout_id)
    assert span.attributes["why"].startswith(error)


class OnlyThere:
    """A value that can be read in one process only."""

    def __reduce__(self) -> Any:
        return _read_in, (os.getpid(),)


def _read_in(pid: int) -> str:
    if os.getpid() != pid:
        raise ModuleNotFoundError("no module named 'only_there'", name="only_there")
    return "read"


async def saving_for_itself(task: Any, ctx: rs.Context) -> float:
    if ctx.attempt.sequence_id == 1:
        await ctx.save(OnlyThere())
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


async def test_a_state_that_cannot_be_read_ends_the_attempt_as_a_task_does(
    make_memory_store: Callable[..., Any],
) -> None:
    """With outcome "infra", so that another runner may read it; the error names what is missing."""
    store = make_memory_store(max_deliveries=2)
    async with rs.RunnerPool(store, saving_for_itself, size=1, isolation="process"):
        made = await store.enqueue_rollout("x")
        done = present(await store.wait_for_rollout(made.rollout_id, timeout=30))
    attempts = await store.query_attempts(made.rollout_id)
    assert [attempt.outcome for attempt in attempts] == ["runner_lost", "infra"]
    assert done.status == "failed"
    assert "saved state" in str(attempts[1].error) and "only_there" in str(attempts[1].error)


async def cancelled_in_save(task: Any, ctx: rs.Context) -> None:
    """Saves over and over, until that raises."""
    try:
        while True:
            with ctx.span("turn"):
                await asyncio.sleep(0.01)
            await ctx.save("state")
    finally:
        with ctx.span("ended", why=ctx.why):
            pass


@both
@pytest.mark.parametrize("by", ["cancel", "timeout", "superseded"])
async def test_who_is_of_no_use_any_more_saves_nothing(store: AnyStore, isolation: Isolation, by: str) -> None:
    """The agent is cancelled in `save`, as in `check`, also if its notice comes later than the refusal."""
    config = rs.RolloutConfig(timeout_seconds=0.5) if by == "timeout" else None
    async with rs.RunnerPool(store, cancelled_in_save, size=1, isolation=isolation):
        made = await store.enqueue_rollout("x", config=config)

        async def has_saved() -> bool:
            return len(await store.query_spans(made.rollout_id)) > 2

        await until(has_saved)
        if by == "cancel":
            await store.cancel_rollouts([made.rollout_id])
        elif by == "superseded":
            await store.start_attempt(made.rollout_id)

        async def has_ended() -> Any:
            return await store.query_spans(made.rollout_id, name="ended")

        (span, *_) = await until(has_ended)
    assert span.attributes["why"] == {"cancel": "cancelled"}.get(by, by)
    first = (await store.query_attempts(made.rollout_id))[0]
    assert first.outcome == {"cancel": "cancelled"}.get(by, by)


async def saving_at_the_end(task: Any, ctx: rs.Context) -> float:
    """Saves only when it is interrupted."""
    if ctx.saved is not None:
        return 2.0
    try:
        with ctx.span("begun"):
            pass
        await asyncio.sleep(1_000)
    finally:
        assert ctx.stopped
        await ctx.save({"at": "the end"})
    return 0.0


def saving_when_told(task: Any, ctx: rs.Context) -> float:
    """An agent that is not async learns of the stop by its next save, which counts, and may save once more."""
    if ctx.saved is not None:
        return 2.0
    with ctx.span("begun"):
        pass
    try:
        while True:
            ctx.sync.save("on the way")
    except asyncio.CancelledError:
        ctx.sync.save("at the end")
        raise


@both
@pytest.mark.parametrize("agent", [saving_at_the_end, saving_when_told])
async def test_whose_runner_stops_can_still_save(
    store: AnyStore, isolation: Isolation, agent: Callable[..., Any]
) -> None:
    """In `finally` or `except`: what it saves there is what the next attempt goes on from."""
    made = await store.enqueue_rollout("x")
    async with rs.RunnerPool(store, agent, size=1, isolation=isolation, flush_seconds=0.05) as pool:

        async def has_begun() -> Any:
            return await store.query_spans(made.rollout_id)

        await until(has_begun)
        await asyncio.to_thread(pool.stop, drain=False)
    (first,) = await store.query_attempts(made.rollout_id)
    assert (first.status, first.outcome) == ("unresponsive", "withdrawn")
    async with rs.RunnerPool(store, agent, size=1, isolation=isolation):
        done = present(await store.wait_for_rollout(made.rollout_id, timeout=30))
    assert (done.status, done.reward, done.attempt.resumed_from) == ("succeeded", 2.0, first.attempt_id)


async def leaving_a_save(task: Any, ctx: rs.Context) -> float:
    """Does not wait for what it saves, and tries again when it is over."""
    ctx_kept.append(ctx)
    saves.append(asyncio.ensure_future(ctx.save("not awaited")))
    await asyncio.sleep(0)
    raise rs.Abort("at once")


ctx_kept: list[rs.Context] = []
saves: list[asyncio.Future[None]] = []


async def test_a_save_that_nobody_awaits(make_memory_store: Callable[..., Any]) -> None:
    """Takes effect before the attempt ends; once the agent has returned, its context saves nothing."""
    store = make_memory_store(max_deliveries=1)
    ctx_kept.clear()
    async with rs.RunnerPool(store, leaving_a_save, size=1):
        made = await store.enqueue_rollout("x")
        assert present(await store.wait_for_rollout(made.rollout_id, timeout=30)).status == "failed"
        with pytest.raises(rs.AttemptOverError, match="its agent has returned"):
            await ctx_kept[0].save("late")
        with pytest.raises(rs.AttemptOverError):
            ctx_kept[0].sync.save("late")
    await store.requeue([made.rollout_id])
    again = present(await store.dequeue_rollout())
    assert await store.get_saved_state(again.rollout_id, again.attempt.attempt_id) == "not awaited"


async def test_run_one_gives_and_takes_states() -> None:
    """As a store would: what was saved last comes back as another attempt would have it."""
    task = {"path": os.devnull, "fails_after": 0, "how": ""}
    run = rs.run_one(playing, task)
    assert run.saved == list(range(TURNS)) and run.reward == TURNS
    again = rs.run_one(playing_in_thread, task, saved=[0, 1])
    assert [span.name for span in again.spans if span.name.startswith("turn")] == ["turn 2", "turn 3"]
    with pytest.raises(rs.PayloadNotPicklableError):
        rs.run_one(lambda task, ctx: ctx.sync.save(NotPicklable()), "x")
    assert rs.run_one(lambda task, ctx: ctx.sync.save(None), "x").saved is None
