"""One runner: it claims rollouts by long poll, runs the agent on them, sends the spans and reports the endings.

The last spans, the final status and the next claim leave together. Heartbeats come from a thread that an agent cannot
block. An exception of the agent fails its attempt and nothing else. A runner that is stopped without draining cancels
its agents, and gives their rollouts back: `_finish` reports the outcome "withdrawn".
Not here: runners that are killed before they gave everything back (`actors`), what the store does (`core.claims`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import socket
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import psutil

from raystore.client.client import StoreClient
from raystore.client.transport import run_blocking
from raystore.errors import (
    AttemptNotFoundError,
    AttemptOverError,
    ClaimLostError,
    InvalidValueError,
    OutcomeUnknownError,
    PayloadNotPicklableError,
    PayloadTooLargeError,
    ResourcesNotFoundError,
    RolloutNotFoundError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)
from raystore.errors.text import last_line, summary
from raystore.reports.log import a_minute, logger_of, once
from raystore.runner.agents import Agent, Ending, lost_resources, pickled
from raystore.runner.context import (
    SAVE,
    STOPPED,
    Context,
    EndedError,
    Outbox,
    Version,
    new_question,
    outside_rollouts,
)
from raystore.runner.inline_agents import InlineAgents
from raystore.runner.process_agents import ProcessAgents
from raystore.tracing.calls import Losses
from raystore.types.contract import Attempt, AttemptedRollout
from raystore.types.spans import Span, is_traced
from raystore.values import pickler
from raystore.wire.codec import Encoded

logger: logging.Logger = logger_of("raystore.runner")

EXPLAIN_SECONDS = 10.0  #: after which a pool that has not started logs what it waits for
STOP_SECONDS = 5.0  #: that rollouts have to finish when their pool closes
WITHDRAW_SECONDS = 1.0  #: that runners then have to give back unfinished rollouts, before they are killed
PREEMPT_SECONDS = 1.0  #: between two questions whether the node goes away
SAVE_SECONDS = 0.5  #: of these, that agents have to end, perhaps after they have saved once more
CLAIM_SECONDS = 30.0  #: of one long poll, so that a runner whose pool is gone does not wait for ever
CLAIM_PAUSE_SECONDS = 0.2  #: after a claim that failed
MAX_UNREAD_PAUSE_SECONDS = 5.0  #: before the next claim where resources cannot be read
EARLY_NOTICES_KEPT = 1_000  #: that arrived before their claim, or after the end of their rollout
NAME_LENGTH = 200  #: characters of a span's name in a heartbeat
RESOURCES_IDLE_SECONDS = 1.0  #: that a version of resources stays cached after its last user

T = TypeVar("T")
Key = tuple[str, str]  # rollout id, attempt id
VersionKey = tuple[str, int]  # resources id, version
Report = Callable[[], Awaitable[object]]


@dataclass(slots=True)
class RunnerOptions:
    """Arguments of a `RunnerPool` that its runners need."""

    concurrency: int
    queues: Sequence[str]
    heartbeat_seconds: float
    flush_seconds: float
    cancel_grace_seconds: float
    max_agent_seconds: float | None
    isolation: Literal["actor", "process"]
    preempt: Callable[[], object] | bytes | None = None  # pickled, if it has travelled


# -- for pools of runners ----------------------------------------------------------------------------------------------


class WorkerIds:
    """Makes the worker ids of a pool's runners; no two runners have the same."""

    def __init__(self, pool_id: str) -> None:
        self._pool_id = pool_id
        self._counts: Counter[int] = Counter()

    def next(self, number: int) -> str:
        """An id for the next runner with this number."""
        count = self._counts[number]
        self._counts[number] += 1
        return f"runner-{self._pool_id}-{number}" + (f".{count}" if count else "")


class Member(Protocol):
    """A runner as its pool sees it."""

    ended: threading.Event

    def stop(self, *, drain: bool) -> None:
        """Ask it to stop."""


def stop_all(members: Sequence[Member], *, drain_seconds: float, withdraw_seconds: float) -> None:
    """Stop runners: they may finish their rollouts for `drain_seconds`, then give them back for `withdraw_seconds`."""
    for drain, seconds in ((True, drain_seconds), (False, withdraw_seconds)):
        if drain and seconds <= 0:
            continue
        left = [member for member in members if not member.ended.is_set()]
        for member in left:
            member.stop(drain=drain)
        deadline = time.monotonic() + seconds
        for member in left:
            member.ended.wait(max(deadline - time.monotonic(), 0))


# -- one runner --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Work:
    """A rollout that runs."""

    context: Context
    outbox: Outbox
    flush_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)  # one state after the other
    sending: asyncio.Task[None] | None = None  # the last flush
    has_refused_batch: bool = False  # of spans, which are then sent again one by one
    refusal: Exception | None = None  # of a span that the agent made itself
    unread: tuple[str, int, int | None] | None = None  # what `refresh_attempt` said, until its resources are here

    @property
    def rollout(self) -> AttemptedRollout:
        return self.context.rollout

    @property
    def key(self) -> Key:
        return self.rollout.rollout_id, self.rollout.attempt.attempt_id


class Runner:
    """One runner, on the event loop that runs `run`."""

    def __init__(self, store: StoreClient, agent: Agent | bytes, worker_id: str, options: RunnerOptions) -> None:
        """`agent` may be pickled."""
        self.worker_id = worker_id
        self._store = store
        self._options = options
        self._agents: InlineAgents | ProcessAgents
        if options.isolation == "process":
            data = agent if isinstance(agent, bytes) else pickled(agent)
            self._agents = ProcessAgents(data, options.concurrency, worker_id)
        else:
            loaded = pickler.loads_agent(agent) if isinstance(agent, bytes) else agent
            self._agents = InlineAgents(loaded, options.concurrency)
        self._losses = Losses()
        self._running: dict[Key, _Work] = {}
        self._early_notices: OrderedDict[Key, str] = OrderedDict()
        self._resources = ResourceCache(store)
        self._unread_pause = 0.0  # grows while resources cannot be read here
        self._node = NodeWatch(options.preempt, worker_id) if options.preempt is not None else None
        self._is_resting = False  # because its node goes away
        self._stays = asyncio.Event()  # set while it does not rest
        self._interrupt: asyncio.TimerHandle | None = None  # of the agents that run then
        self._has_saved = False  # a state of an agent
        self._beat_at_once = False  # a heartbeat has something to tell
        self._stopping = threading.Event()
        self._heartbeat_wanted = threading.Event()
        self._claiming: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[None]] = set()  # reports that no slot waits for
        self._loop: asyncio.AbstractEventLoop  # that runs `run`

    async def open(self) -> None:
        """Make the agents; raises the error of an agent's `__init__` or `setup`."""
        await self._agents.open()

    async def close(self) -> None:
        """End the agents of a runner that was opened and does not run."""
        await self._agents.close()

    async def run(self) -> None:
        """Work until `stop`, or until the store is gone; then end the agents."""
        self._loop = asyncio.get_running_loop()
        stop_listening = self._store.listen_for_notices(self._on_notice)
        threading.Thread(target=self._send_heartbeats, name=f"{self.worker_id}-heartbeat", daemon=True).start()
        self._stays.set()
        if self._node is not None:
            threading.Thread(target=self._watch_node, name=f"{self.worker_id}-preempt", daemon=True).start()
        try:
            with outside_rollouts():
                await asyncio.gather(*(self._slot() for _ in range(self._options.concurrency)))
        finally:
            self._stopping.set()
            self._heartbeat_wanted.set()
            stop_listening()
            await self._agents.close()
            while self._background:
                await asyncio.wait(self._background)
            with contextlib.suppress(StoreError, TimeoutError):  # the store is closed or cannot be reached
                async with asyncio.timeout(WITHDRAW_SECONDS):
                    await self._report_losses()

    def stop(self, *, drain: bool = True) -> None:
        """Claim nothing more; `drain` finishes the rollouts that run, else they are cancelled. On the runner's loop."""
        self._stopping.set()
        for claiming in list(self._claiming):
            claiming.cancel()
        if not drain:
            grace = min(self._options.cancel_grace_seconds, SAVE_SECONDS)
            for work in list(self._running.values()):
                if not work.context.cancelled:
                    work.context.cancel(STOPPED)
                    self._agents.cancel(work.context)
                self._loop.call_later(grace, self._agents.abandon, work.context)

    # -- one slot ----------------------------------------------------------------------------------------------------

    async def _slot(self) -> None:
        reports: list[Report] = []  # of the previous rollout; a list, so that nothing keeps it while a claim waits
        while True:
            claimed = None
            try:
                claimed = await self._report_and_claim(reports)
            except (StoreUnavailableError, StoreClosedError) as error:
                if not isinstance(error, OutcomeUnknownError):
                    logger.error("Runner %s ends: %s", self.worker_id, error)
                    return
                logger.warning("Runner %s claims again: %s", self.worker_id, error, extra=a_minute("claim"))
            except Exception as error:
                logger.error("Runner %s cannot claim a rollout: %s", self.worker_id, error, extra=a_minute("no claim"))
                await asyncio.sleep(CLAIM_PAUSE_SECONDS)
            if claimed is not None:
                reports.append(await self._run(claimed))
            elif self._stopping.is_set():
                return

    async def _report_and_claim(self, reports: list[Report]) -> AttemptedRollout | None:
        """Claim the next rollout, and send the report of the previous one with it."""
        reporting = asyncio.create_task(_logging_errors(reports.pop())) if reports else None
        claimed: AttemptedRollout | None = None
        if not self._stopping.is_set() and not self._is_resting:
            claiming = await self._until_stopped(
                self._store.dequeue_rollout(self.worker_id, timeout=CLAIM_SECONDS, queues=self._options.queues)
            )
            claimed = None if claiming.cancelled() else claiming.result()
        if reporting is not None:
            await reporting
        if claimed is None and self._is_resting and not self._stopping.is_set():
            await self._until_stopped(self._stays.wait())
        return claimed

    async def _until_stopped(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Await a coroutine as a task, which `stop` cancels; returns the task."""
        task = asyncio.create_task(coroutine)
        self._claiming.add(task)
        try:
            await asyncio.wait([task])
        finally:
            self._claiming.discard(task)
            task.cancel()  # unless it is done
        return task

    async def _run(self, rollout: AttemptedRollout) -> Report:
        """Run the agent on one rollout; returns the report of its end."""
        try:
            rollout.input  # noqa: B018 - raises if the task cannot be decoded here
            saved = await self._saved_of(rollout)
            resources = await self._resources.acquire(rollout.resources_id, rollout.attempt.resources_version)
        except Exception as error:  # deleted resources, or a class that cannot be imported here
            logger.error(
                "Runner %s cannot run rollout %s: %s", self.worker_id, rollout.rollout_id, error,
                extra=a_minute("not run", type(error).__name__),
            )  # fmt: skip
            await asyncio.sleep(CLAIM_PAUSE_SECONDS)  # another runner, which may be able to run it, claims it first
            key = (rollout.rollout_id, rollout.attempt.attempt_id)
            return functools.partial(self._finish_attempt, key, [], Ending("failed", "infra", summary(error)))
        work = self._work_for(rollout, resources, saved)
        del saved  # the agent may let go of it
        try:
            return await self._run_work(work)
        finally:
            self._resources.release(rollout.resources_id, work.context.resources_version)

    async def _saved_of(self, rollout: AttemptedRollout) -> Any:
        """The state that a rollout goes on from, if it does; encoded if only the agent's process needs to read it."""
        if rollout.attempt.resumed_from is None:
            return None
        return await self._store.get_saved_state(
            rollout.rollout_id, rollout.attempt.attempt_id, encoded=self._options.isolation == "process"
        )

    def _work_for(self, rollout: AttemptedRollout, resources: dict[str, Any], saved: Any) -> _Work:
        outbox = Outbox(self._losses, on_full=lambda: self._call_soon(rollout.rollout_id, work.flush_wanted.set))
        context = Context(
            rollout, resources, self.worker_id, outbox.add, self._losses.add,
            saved=saved, ask=lambda what, given: self._ask(work, what, given),
        )  # fmt: skip
        work = _Work(context, outbox)
        return work

    async def _run_work(self, work: _Work) -> Report:
        rollout = work.rollout
        if self._is_resting:  # it was claimed at the last moment
            work.context.cancel(STOPPED)
            return functools.partial(self._finish, work, Ending(None))
        if (kind := self._early_notices.pop(work.key, None)) is not None:
            work.context.cancel(kind)
            return functools.partial(self._finish, work, Ending(None))
        self._running[work.key] = work
        if rollout.config.unresponsive_seconds is not None:
            self._heartbeat_wanted.set()
        flushing = asyncio.create_task(self._flush(work))
        seconds = self._options.max_agent_seconds
        time_limit = None if seconds is None else self._loop.call_later(seconds, self._on_overdue, work)
        try:
            ending = await self._agents.run(work.context)
        except Exception as error:  # before the agent was called: its process could not be given the resources
            lost = lost_resources(error, work.context)
            ending = Ending("failed", "infra", summary(error), unread=None if lost is None else lost.resources)
        finally:
            work.context.leave()
            del self._running[work.key]
            flushing.cancel()
            if time_limit is not None:
                time_limit.cancel()
        if ending.unread is not None and not work.context.cancelled:
            await _logging_errors(functools.partial(self._give_back_unread, work, *ending.unread, ending.error or ""))
            ending = Ending(None)
        elif ending.status == "succeeded":
            self._unread_pause = 0.0
        if ending.place is not None:
            self._warn_of_error(rollout, ending.place, ending.error)
        return functools.partial(self._finish, work, ending)

    def _warn_of_error(self, rollout: AttemptedRollout, place: str, error: str | None) -> None:
        """Log an agent's error, by its place: a run in which all agents fail should not be silent."""
        logger.warning(
            "The agent failed on rollout %s: %s (%s; attempt.error has the traceback)",
            rollout.rollout_id, last_line(error or "")[:400], place, extra=a_minute("agent failed", place),
        )  # fmt: skip

    def _warn_of_no_reward(self, rollout_id: str) -> None:
        """Log once that an agent gives no reward: its author may believe that it does."""
        logger.warning(
            "Rollout %s succeeded without a reward, so its reward is None. Let the agent return a number, or call "
            "ctx.reward(x); ignore this if the reward comes from elsewhere, or if there is none. To keep a rollout "
            "from training, raise rs.Drop(why). (Told once.)",
            rollout_id, extra=once("no reward"),
        )  # fmt: skip

    async def _finish(self, work: _Work, ending: Ending) -> None:
        """Send the last spans of a rollout, and report how it ended."""
        context = work.context
        async with work.saving:  # what the agent asked for last, and did not wait for
            pass
        # A span that the agent keeps refers to the outbox, which must not keep the context or this runner alive.
        spans = work.outbox.close(functools.partial(_on_late_span, weakref.ref(self), self._losses))
        if work.has_refused_batch and work.sending is not None:  # else the flush arrives first without being awaited
            await asyncio.wait([work.sending])
        if context.cancelled and ending.status != "succeeded":
            ending = Ending(None)  # however the agent reacted to being cancelled
        elif work.refusal is not None and ending.status == "succeeded":
            ending = _ending_of_refusal(work.refusal)
        if ending.status is None:  # the store knows it, except for work that is given back
            await self._send(work.rollout.rollout_id, spans)
            if context.stopped:  # the rollout keeps its place in the queue, and the attempt is not charged
                await self._finish_attempt(work.key, [], Ending("unresponsive", "withdrawn"))
            return
        try:
            attempt = await self._finish_attempt(work.key, spans, ending, work.outbox.calls)
        except Exception as error:
            self._raise_unless_refusal(error, spans)
            refusal = await self._send(work.rollout.rollout_id, spans)
            if refusal is not None and ending.status == "succeeded":
                ending = _ending_of_refusal(refusal)
            await self._finish_attempt(work.key, [], ending)  # without figures, which may be what was refused
        else:
            if ending.status == "succeeded" and attempt.reward is None:
                self._warn_of_no_reward(work.rollout.rollout_id)

    async def _finish_attempt(
        self, key: Key, spans: list[Span], ending: Ending, calls: Mapping[str, Any] | None = None
    ) -> Attempt:
        assert ending.status is not None
        return await self._store.finish_attempt(
            *key, spans, ending.status, outcome=ending.outcome, error=ending.error, died=ending.died, calls=calls
        )

    async def _give_back_unread(self, work: _Work, resources_id: str, version: int, error: str) -> None:
        """Report resources that cannot be read, then pause before the next claim.

        The store offers the rollout again, or holds it back if no runner can read them. The pause lets others claim it,
        in case they are unreadable only here.
        """
        await self._send(work.rollout.rollout_id, work.outbox.take())
        await self._store.report_unread(*work.key, resources_id, version, error=error)
        self._unread_pause = min(max(2 * self._unread_pause, CLAIM_PAUSE_SECONDS), MAX_UNREAD_PAUSE_SECONDS)
        await self._until_stopped(asyncio.sleep(self._unread_pause))

    # -- what an agent asks for ----------------------------------------------------------------------------------------

    def _ask(self, work: _Work, what: str, given: Any) -> Future[Any]:
        """Do what an agent asks for, on this runner's loop; called on any thread."""
        asked = new_question()
        answer: Callable[[_Work, Any], Awaitable[Any]] = self._save if what == SAVE else self._refresh
        try:
            self._loop.call_soon_threadsafe(
                self._start_in_background, functools.partial(_answer, asked, answer, work, given)
            )
        except RuntimeError:  # the loop is closed
            asked.set_exception(EndedError("the runner has ended"))
        return asked

    async def _save(self, work: _Work, state: Encoded | None) -> str | None:
        """Keep a state of an agent, with the spans that ended before; returns why its work is no longer needed."""
        async with work.saving:
            if work.sending is not None and not work.sending.done():  # a span of that may be refused, and sent again
                await asyncio.wait([work.sending])
            spans = work.outbox.take()
            try:
                try:
                    await self._store.save_state(*work.key, state, spans)
                except Exception as error:
                    self._raise_unless_refusal(error, spans)
                    await self._send_of(work, spans)
                    await self._store.save_state(*work.key, state)  # raises again if it is the state that was refused
            except _OVER as error:
                return _cancelled_by(work.context, error)
        if not self._has_saved:
            self._has_saved = True  # a runner that is killed from now on was of use
            self._beat_soon()
        if self._is_resting and not work.context.cancelled:  # the state is where the next attempt goes on from
            work.context.cancel(STOPPED)
            self._loop.call_later(self._options.cancel_grace_seconds, self._agents.abandon, work.context)
            return STOPPED
        return None if work.context.stopped else work.context.why

    async def _refresh(self, work: _Work, nothing: None) -> Version | str | None:
        """Switch an agent to the newest resources; returns these, or why its work is no longer needed."""
        context = work.context
        try:
            newer = await self._store.refresh_attempt(*work.key) or work.unread
        except _OVER as error:
            return _cancelled_by(context, error)
        if newer is None:
            return None
        resources_id, number, policy_version = work.unread = newer
        resources = await self._resources.acquire(resources_id, number)
        work.unread = None
        if self._running.get(work.key) is not work:  # the agent has ended meanwhile
            self._resources.release(resources_id, number)
            return None
        before = context.resources_version
        version = Version(number, policy_version, resources)
        context.switch(version)
        self._resources.release(resources_id, before)
        return version

    # -- a node that goes away -----------------------------------------------------------------------------------------

    def _watch_node(self) -> None:
        """Ask once a second whether the node goes away; on a thread of its own, since that may take its time."""
        assert self._node is not None
        with outside_rollouts():
            while not self._stopping.is_set():
                left = self._node.seconds_left()
                try:
                    self._loop.call_soon_threadsafe(self._rest, left)
                except RuntimeError:  # the loop is closed
                    return
                self._stopping.wait(PREEMPT_SECONDS)

    def _rest(self, left: float | None) -> None:
        """Rest while the node goes away, after so many seconds (infinity: it is not known when); None: it stays.

        A runner that rests claims nothing. Its agents are interrupted in their next `save`, or when half of the time
        is over, and their rollouts are given back.
        """
        if left is None:
            if self._is_resting:
                self._is_resting = False
                self._stays.set()
                self._beat_soon()
                logger.info("Runner %s claims again: its node stays", self.worker_id)
            if self._interrupt is not None:
                self._interrupt.cancel()
                self._interrupt = None
            return
        if self._stopping.is_set():
            return
        logger.warning(
            "Runner %s rests, as preempt= says that its node goes away%s: it claims nothing, and gives %d rollouts "
            "back once they have saved. It goes on if preempt= says no.",
            self.worker_id, "" if left == math.inf else f" in {left:.0f} s", len(self._running),
            extra=a_minute("rests", self.worker_id),
        )  # fmt: skip
        at = self._loop.time() + (STOP_SECONDS if left == math.inf else left / 2)
        if not self._is_resting:
            self._is_resting = True
            self._stays.clear()
            self._beat_soon()
            for claiming in list(self._claiming):
                claiming.cancel()
            self._interrupt = self._loop.call_at(at, self._interrupt_all)
        elif self._interrupt is not None and at < self._interrupt.when():
            self._interrupt.cancel()
            self._interrupt = self._loop.call_at(at, self._interrupt_all)

    def _interrupt_all(self) -> None:
        """Cancel the agents that have not saved meanwhile; they may do so once more."""
        for work in list(self._running.values()):
            if not work.context.cancelled:
                work.context.cancel(STOPPED)
                self._agents.cancel(work.context)
                self._loop.call_later(self._options.cancel_grace_seconds, self._agents.abandon, work.context)

    # -- spans ---------------------------------------------------------------------------------------------------------

    def _call_soon(self, rollout_id: str, action: Callable[[], object]) -> None:
        """Call something on the runner's loop for a span of a rollout; on any thread."""
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed
            _lose_late_span(self._losses, rollout_id)

    def send_late(self, span: Span) -> None:
        """Send a span that ended after its rollout; on any thread."""
        send = functools.partial(self._send, span.rollout_id, [span])
        self._call_soon(span.rollout_id, functools.partial(self._start_in_background, send))

    def _start_in_background(self, report: Report) -> None:
        task = asyncio.create_task(_logging_errors(report))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _flush(self, work: _Work) -> None:
        """Send spans while the agent works, so that they can be seen, and are not lost with the process.

        If no span has ended after the first interval, a heartbeat tells the store that the agent runs.
        """
        is_known = False  # to the store: that the agent runs
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.flush_seconds):
                    await work.flush_wanted.wait()
            work.flush_wanted.clear()
            if spans := work.outbox.take():
                try:
                    work.sending = asyncio.create_task(self._send_of(work, spans))
                    await asyncio.shield(work.sending)
                except StoreError as error:
                    logger.warning(
                        "Spans of rollout %s are lost: %s", work.rollout.rollout_id, error, extra=a_minute("spans lost")
                    )
            elif not is_known:
                with contextlib.suppress(StoreError):  # the runner's regular heartbeat will log it
                    await self._store.heartbeat([work.key])
            is_known = True

    async def _send_of(self, work: _Work, spans: list[Span]) -> None:
        refusal = await self._send(work.rollout.rollout_id, spans, work)
        work.refusal = work.refusal or refusal

    async def _send(self, rollout_id: str, spans: list[Span], work: _Work | None = None) -> Exception | None:
        """Send spans; if the store refuses some, the others are stored.

        Returns the first refusal of a span that the agent made itself. A refused span of a tracer is only counted.
        """
        if not spans:
            return None
        try:
            await self._store.add_unnumbered_spans(spans)
            return None
        except Exception as refusal:
            self._raise_unless_refusal(refusal, spans)
            if len(spans) == 1:
                name = spans[0].name
                self._losses.add("refused", name, f"Span {name!r} of rollout {rollout_id} is refused: {refusal}")
                return None if is_traced(spans[0]) else refusal
            if work is not None:
                work.has_refused_batch = True
        refusals = await asyncio.gather(*(self._send(rollout_id, [span]) for span in spans))
        return next((refusal for refusal in refusals if refusal is not None), None)

    def _raise_unless_refusal(self, error: Exception, spans: list[Span]) -> None:
        """Raise an error unless it refuses spans (too large, invalid, not picklable); then all of these are lost."""
        refusals = (PayloadTooLargeError, PayloadNotPicklableError, InvalidValueError)
        if isinstance(error, StoreError) and not isinstance(error, refusals):
            if not isinstance(error, ValueError):  # a ValueError says that the attempt has ended
                self._losses.count("not_sent", len(spans))
            raise error

    # -- notices, time limits, heartbeats ----------------------------------------------------------------------------

    def _on_notice(self, kind: str, rollout_id: str, attempt_id: str) -> None:
        """The store has changed an attempt; called on any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, kind, (rollout_id, attempt_id))

    def _cancel(self, kind: str, key: Key) -> None:
        if kind == "unresponsive":
            return  # the agent is alive, as its next span will show
        work = self._running.get(key)
        if work is None:
            self._early_notices[key] = kind
            if len(self._early_notices) > EARLY_NOTICES_KEPT:
                self._early_notices.popitem(last=False)
            return
        if work.context.cancelled:
            return
        work.context.cancel(kind)
        self._agents.cancel(work.context)
        self._loop.call_later(self._options.cancel_grace_seconds, self._agents.kill, work.context)

    def _on_overdue(self, work: _Work) -> None:
        """Time an attempt out whose agent has run for longer than `max_agent_seconds`, and cancel the agent."""
        if work.context.cancelled:
            return
        error = f"the agent ran for more than max_agent_seconds={self._options.max_agent_seconds:g}"
        self._warn_of_error(work.rollout, "max_agent_seconds", error)
        self._start_in_background(functools.partial(self._time_out, work, error))
        self._cancel("timeout", work.key)

    async def _time_out(self, work: _Work, error: str) -> None:
        await self._send(work.rollout.rollout_id, work.outbox.take())
        await self._finish_attempt(work.key, [], Ending("timeout", "timeout", error))

    def _beat_soon(self) -> None:
        """Send a heartbeat at once."""
        self._beat_at_once = True
        self._heartbeat_wanted.set()

    def _send_heartbeats(self) -> None:
        process = psutil.Process()
        last = float("-inf")  # the first heartbeat at once: it carries the pid of this process
        with outside_rollouts():
            while not self._stopping.is_set():
                self._heartbeat_wanted.clear()
                left = last + self._heartbeat_interval() - time.monotonic()
                if self._beat_at_once:
                    self._beat_at_once, left = False, 0.0
                if left > 0 and self._heartbeat_wanted.wait(left):
                    continue  # the runner stops, or a rollout has started that may need a shorter interval
                last = time.monotonic()
                try:
                    self._send_heartbeat(process)
                except StoreError as error:
                    logger.warning(
                        "Runner %s could not send a heartbeat: %s", self.worker_id, error, extra=a_minute("heartbeat")
                    )
                except Exception:  # if this thread ended, all rollouts of this runner would become unresponsive
                    logger.exception(
                        "Runner %s could not send a heartbeat", self.worker_id, extra=a_minute("heartbeat failed")
                    )

    def _send_heartbeat(self, process: psutil.Process) -> None:
        running = list(self._running)
        if running:
            for key in run_blocking(self._store.heartbeat(running)):
                self._on_notice("superseded", *key)  # the notice was lost with an earlier session
        stats = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "running": len(running),
            "places": [_place_of(work) for work in list(self._running.values())],
            "rss_bytes": process.memory_info().rss,
            "resting": self._is_resting,
            "has_saved": self._has_saved,
        }
        self._store.sync.update_worker(self.worker_id, stats)
        run_blocking(self._report_losses())

    async def _report_losses(self) -> None:
        """Send the losses that were counted since the last report."""
        if counts := self._losses.take():
            try:
                await self._store.report_spans_lost(counts)
            except StoreError:
                self._losses.give_back(counts)
                raise

    def _heartbeat_interval(self) -> float:
        """Short enough for the smallest `unresponsive_seconds` of the rollouts that run."""
        limits = [
            seconds
            for work in list(self._running.values())
            if (seconds := work.rollout.config.unresponsive_seconds) is not None
        ]
        return max(min([self._options.heartbeat_seconds, *(seconds / 3 for seconds in limits)]), 0.05)


def _place_of(work: _Work) -> dict[str, Any]:
    """What a place of a runner does, since when, and the newest of its open spans."""
    name, since = next(iter(reversed(list(work.context.open.values()))), (None, None))
    return {
        "rollout_id": work.rollout.rollout_id,
        "since": work.rollout.attempt.start_time,
        "span": None if name is None else str(name)[:NAME_LENGTH],
        "span_since": since,
    }


def _on_late_span(runner: weakref.ref[Runner], losses: Losses, span: Span) -> None:
    if (alive := runner()) is not None:
        alive.send_late(span)
    else:
        _lose_late_span(losses, span.rollout_id)


def _lose_late_span(losses: Losses, rollout_id: str) -> None:
    losses.add("too_late", "", f"A span of rollout {rollout_id} ended after its runner, and is lost")


def _ending_of_refusal(refusal: Exception) -> Ending:
    """The ending of an agent that returned, and whose span the store refused."""
    return Ending("failed", "agent_error", f"a span of the agent was refused: {type(refusal).__name__}: {refusal}")


#: What the store says of an attempt that nobody needs any more.
_OVER = (AttemptOverError, AttemptNotFoundError, RolloutNotFoundError, ClaimLostError)


def _cancelled_by(context: Context, error: Exception) -> str | None:
    """Why the work of an attempt is no longer needed, of which the store has said that it is over."""
    if not context.cancelled:  # its notice is still on the way
        outcome = error.outcome if isinstance(error, AttemptOverError) else ""
        context.cancel(outcome if outcome in ("cancelled", "timeout") else "superseded")
    return context.why


async def _answer(asked: Future[Any], answer: Callable[[_Work, Any], Awaitable[Any]], work: _Work, given: Any) -> None:
    """Answer what an agent asked for; an error is the agent's."""
    try:
        asked.set_result(await answer(work, given))
    except Exception as error:
        asked.set_exception(error)
    except BaseException:  # the runner's loop ends
        asked.set_exception(EndedError("the runner has ended"))
        raise


async def _logging_errors(report: Report) -> None:
    """Send a report and log its error, which must not stop the next rollout."""
    try:
        await report()
    except ValueError as error:  # the claim is lost, or the rollout deleted
        logger.warning("A report came too late and was refused: %s", error, extra=a_minute("report too late"))
    except Exception:
        logger.exception("A rollout could not be reported", extra=a_minute("not reported"))


# -- its node ----------------------------------------------------------------------------------------------------------


class NodeWatch:
    """Asks a function of the user's whether this node goes away."""

    def __init__(self, preempt: Callable[[], object] | bytes, worker_id: str) -> None:
        self._preempt: Callable[[], object] = pickler.loads_agent(preempt) if isinstance(preempt, bytes) else preempt
        self._worker_id = worker_id

    def seconds_left(self) -> float | None:
        """For how long the node is there, infinity if that is not known; None if it stays, or nobody can say."""
        try:
            said: Any = self._preempt()
            if said is None or said is False:
                return None
            if said is True:
                return math.inf
            if isinstance(said, str) or math.isnan(seconds := float(said)):
                raise TypeError(f"it returned {said!r}")
            return max(seconds, 0.0)
        except Exception as error:
            logger.error(
                "preempt= of runner %s cannot be asked whether the node goes away, which counts as no: %s. It is to "
                "return None or False, True, or the seconds that are left.",
                self._worker_id, summary(error), extra=a_minute("preempt", self._worker_id),
            )  # fmt: skip
            return None


# -- its resources -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _CachedVersion:
    """The resources of one version by name."""

    resources: dict[str, Any]
    users: int = 0  # now
    uses: int = 0  # ever


class ResourceCache:
    """The resources that a runner's agents use; agents that use a version at about the same time share one fetch.

    A version stays for `RESOURCES_IDLE_SECONDS` after its last use; then it is dropped, so that unused weights can
    leave the object store. A version that is no longer the newest is dropped with its last use.
    """

    def __init__(self, store: StoreClient) -> None:
        self._store = store
        self._cached: dict[VersionKey, _CachedVersion] = {}

    def __len__(self) -> int:
        return len(self._cached)

    async def acquire(self, resources_id: str | None, version: int | None) -> dict[str, Any]:
        """The resources by name of a version, until they are released."""
        if resources_id is None:
            return {}
        if version is None:
            raise ResourcesNotFoundError(resources_id)
        key = (resources_id, version)
        if key not in self._cached:
            update = await self._store.get_resources_by_id(resources_id, version)
            if update is None:
                raise ResourcesNotFoundError(resources_id)
            self._cached.setdefault(key, _CachedVersion(dict(update.resources)))
        cached = self._cached[key]
        cached.users += 1
        cached.uses += 1
        for other, unused in list(self._cached.items()):
            if other[0] == resources_id and other[1] < version and not unused.users:
                del self._cached[other]
        return cached.resources

    def release(self, resources_id: str | None, version: int | None) -> None:
        """Note that an agent no longer uses a version."""
        if resources_id is None or version is None:
            return
        key = (resources_id, version)
        cached = self._cached[key]
        cached.users -= 1
        if cached.users:
            return
        if any(other[0] == resources_id and other[1] > version for other in self._cached):
            del self._cached[key]
        else:
            asyncio.get_running_loop().call_later(RESOURCES_IDLE_SECONDS, self._drop_idle, key, cached.uses)

    def _drop_idle(self, key: VersionKey, uses: int) -> None:
        cached = self._cached.get(key)
        if cached is not None and not cached.users and cached.uses == uses:  # not used since
            del self._cached[key]
