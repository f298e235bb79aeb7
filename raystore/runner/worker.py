"""What one runner does: claim by long poll, run the agent, send its spans, report, claim the next.

The last spans, the final status and the next claim leave together. Heartbeats come from a thread that an agent cannot
block. An exception of the agent fails its attempt and nothing else.
Not here: keeping runners alive (`pool`), where an agent runs (`inline`, `forked`), what it sees (`context`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from raystore.client import StoreClient
from raystore.client.pending import run_blocking
from raystore.errors import (
    InvalidValueError,
    OutcomeUnknownError,
    PayloadNotPicklableError,
    PayloadTooLargeError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)
from raystore.runner.agents import Agents, Ending, lost_resources
from raystore.runner.cache import ResourceCache
from raystore.runner.context import STOPPED, Context, apart
from raystore.runner.outbox import Outbox
from raystore.runner.told import last_line, summary
from raystore.spans import Span, is_traced
from raystore.tracing.losses import Losses
from raystore.types import AttemptedRollout

logger: logging.Logger = logging.getLogger("raystore.runner")

EXPLAIN_SECONDS = 10.0  #: after which a pool that does not start says what it waits for
STOP_SECONDS = 5.0  #: that rollouts which run are given to finish when their pool closes
WITHDRAW_SECONDS = 1.0  #: then, to give back what has not finished, before the processes end
CLAIM_SECONDS = 30.0  #: one long poll; only bounds how long a forgotten runner asks
CLAIM_PAUSE_SECONDS = 0.2  #: before claiming again after a claim that failed
UNREAD_PAUSE_MOST_SECONDS = 5.0  #: before claiming again where resources cannot be read
EARLY_KEPT = 1_000  #: notices that overtook their claim, or came after the end of their rollout
PLACES_WARNED = 20  #: where agents' errors come from, that a runner tells of in its log

Key = tuple[str, str]  # rollout id, attempt id


@dataclass(slots=True)
class RunnerOptions:
    """How a runner works; the same for all runners of a pool."""

    concurrency: int = 1
    queues: Sequence[str] = ("default",)
    heartbeat_seconds: float = 10.0
    flush_seconds: float = 1.0
    cancel_grace_seconds: float = 5.0
    max_agent_seconds: float | None = None
    isolation: str = "actor"


def runner_id(pool_id: str, number: int, count: int) -> str:
    """The worker id of the runner that takes a place of a pool, as so many did before; no other runner has it."""
    return f"runner-{pool_id}-{number}" + (f".{count}" if count else "")


@dataclass(slots=True, eq=False)
class _Work:
    """A rollout that runs."""

    context: Context
    outbox: Outbox
    full: asyncio.Event = field(default_factory=asyncio.Event)  # enough spans for not waiting any longer
    refusal: Exception | None = None  # of a span that the store does not take
    sending: asyncio.Task[None] | None = None  # of what was flushed last
    is_refused: bool = False  # something that was flushed, so that what went with it goes again, one by one


class Runner:
    """One runner, on the event loop that runs `run`."""

    def __init__(self, store: StoreClient, agents: Agents, worker_id: str, options: RunnerOptions) -> None:
        self.worker_id = worker_id
        self._store = store
        self._agents = agents
        self._options = options
        self._losses = Losses()
        self._running: dict[Key, _Work] = {}
        self._early: OrderedDict[Key, str] = OrderedDict()  # notices of claims that have not arrived here yet
        self._resources = ResourceCache(store)
        self._warned: set[str] = set()
        self._warned_of_no_reward = False
        self._unread_pause = 0.0  # after resources that could not be read here; grows until some could
        self._stopping = threading.Event()
        self._hurried = threading.Event()
        self._slots: list[asyncio.Task[None]] = []
        self._claiming: set[asyncio.Task[Any]] = set()
        self._aside: set[asyncio.Task[Any]] = set()  # reports that no slot waits for
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Work until `stop`, or until the store is gone."""
        self._loop = asyncio.get_running_loop()
        forget = self._store.listen_for_notices(self._notice)
        heart = threading.Thread(target=self._heartbeats, name=f"{self.worker_id}-heartbeat", daemon=True)
        heart.start()
        try:
            self._slots = [asyncio.create_task(self._slot()) for _ in range(self._options.concurrency)]
            with apart():
                await asyncio.gather(*self._slots)
        finally:
            self._stopping.set()
            self._hurried.set()
            forget()
            await self._agents.close()
            while self._aside:
                await asyncio.wait(self._aside)
            with contextlib.suppress(StoreError, TimeoutError):  # it has ended before, or is away
                async with asyncio.timeout(WITHDRAW_SECONDS):
                    await self._report_losses()

    def stop(self, *, drain: bool = True) -> None:
        """Claim nothing more; what runs is finished, or cancelled if not to drain. On the runner's loop."""
        self._stopping.set()
        for claiming in list(self._claiming):
            claiming.cancel()
        if not drain:
            for work in list(self._running.values()):
                if not work.context.cancelled:
                    work.context.cancel(STOPPED)
                    self._agents.cancel(work.context)
                self._agents.abandon(work.context)

    # -- one slot ----------------------------------------------------------------------------------------------------

    async def _slot(self) -> None:
        reports: list[Callable[[], Any]] = []  # of the rollout before; nothing of it is kept while it waits for more
        while True:
            try:
                claimed = await self._report_and_claim(reports)
            except (StoreUnavailableError, StoreClosedError) as error:
                if not isinstance(error, OutcomeUnknownError):
                    logger.error("Runner %s ends: %s", self.worker_id, error)
                    return
                logger.warning("Runner %s claims again: %s", self.worker_id, error)
                claimed = None
            except Exception as error:
                logger.error("Runner %s cannot take a rollout: %s", self.worker_id, error)
                await asyncio.sleep(CLAIM_PAUSE_SECONDS)
                claimed = None
            if claimed is not None:
                reports.append(await self._work(claimed))
            elif self._stopping.is_set():
                return

    async def _report_and_claim(self, reports: list[Callable[[], Any]]) -> AttemptedRollout | None:
        """Send the final report of one rollout, if there is one, together with the claim of the next."""
        reporting = asyncio.create_task(_reported(reports.pop())) if reports else None
        claimed: AttemptedRollout | None = None
        if not self._stopping.is_set():
            claiming = asyncio.create_task(
                self._store.dequeue_rollout(self.worker_id, timeout=CLAIM_SECONDS, queues=self._options.queues)
            )
            self._claiming.add(claiming)
            try:
                await asyncio.wait([claiming])
            finally:
                self._claiming.discard(claiming)
                if not claiming.done():
                    claiming.cancel()
            if not claiming.cancelled():
                claimed = claiming.result()
        if reporting is not None:
            await reporting
        return claimed

    async def _work(self, rollout: AttemptedRollout) -> Callable[[], Any]:
        """Run the agent on one rollout; how to report it."""
        finish = functools.partial(self._store.finish_attempt, rollout.rollout_id, rollout.attempt.attempt_id)
        try:
            rollout.input  # noqa: B018 - raises if the task cannot be decoded here; what nobody can decode fails in the end
            resources = await self._resources.take(rollout)
        except Exception as error:  # gone, or of a class that cannot be imported here
            logger.error("Runner %s cannot run rollout %s: %s", self.worker_id, rollout.rollout_id, error)
            await asyncio.sleep(CLAIM_PAUSE_SECONDS)  # somebody else may be able to, and comes first
            return functools.partial(finish, [], "failed", outcome="infra", error=summary(error))
        try:
            return await self._run(rollout, resources, finish)
        finally:
            self._resources.give_back(rollout)

    async def _run(
        self, rollout: AttemptedRollout, resources: dict[str, Any], finish: Callable[..., Any]
    ) -> Callable[[], Any]:
        """The same, with its resources."""
        assert self._loop is not None
        outbox = Outbox(lambda: self._wake(work))
        work = _Work(Context(rollout, resources, self.worker_id, outbox.add, self._losses.add), outbox)
        key = (rollout.rollout_id, rollout.attempt.attempt_id)
        if (kind := self._early.pop(key, None)) is not None:
            work.context.cancel(kind)
            return functools.partial(self._finish, finish, work, Ending(None))
        self._running[key] = work
        if rollout.config.unresponsive_seconds is not None:
            self._hurried.set()
        flushing = asyncio.create_task(self._flush(work))
        patience = self._options.max_agent_seconds
        overdue = None if patience is None else self._loop.call_later(patience, self._overdue, key, work)
        try:
            ending = await self._agents.run(work.context)
        except Exception as error:  # the agent was not even called: no process for it, say
            lost = lost_resources(error, work.context)
            unread = None if lost is None else lost.resources
            ending = Ending("failed", "infra", summary(error), unread=unread)
        finally:
            work.context.leave()
            del self._running[key]
            flushing.cancel()
            if overdue is not None:
                overdue.cancel()
        if ending.unread is not None and not work.context.cancelled:
            await _reported(functools.partial(self._give_back_unread, work, *ending.unread, ending.error))
            ending = Ending(None)
        elif ending.status == "succeeded":
            self._unread_pause = 0.0
        if ending.place is not None:
            self._warn(rollout, ending.place, ending.error)
        return functools.partial(self._finish, finish, work, ending)

    def _warn(self, rollout: AttemptedRollout, place: str, error: str | None) -> None:
        """Tell people of an agent's error, once for each place: a run in which all fail should not be silent."""
        if place not in self._warned and len(self._warned) < PLACES_WARNED:
            self._warned.add(place)
            logger.warning(
                "The agent failed on rollout %s: %s (%s; told once, the rest is in attempt.error)",
                rollout.rollout_id, last_line(error or "")[:400], place,
            )  # fmt: skip

    def _warn_of_no_reward(self, rollout_id: str) -> None:
        """Tell people once of an agent that gives no reward: they may believe that it does."""
        if not self._warned_of_no_reward:
            self._warned_of_no_reward = True
            logger.warning(
                "Rollout %s succeeded without a reward, so its reward is None. Let the agent return a number, or call "
                "ctx.reward(x); nothing is to be done if somebody else sends it, or none is meant. A rollout that is "
                "not to be trained on should raise rs.Drop(why). (told once)",
                rollout_id,
            )  # fmt: skip

    async def _finish(self, finish: Callable[..., Any], work: _Work, ending: Ending) -> None:
        context = work.context
        late = functools.partial(_late, weakref.ref(self), self._losses)
        spans = work.outbox.close(late)  # a span that somebody keeps holds nothing of the context, or of this runner
        work.outbox.tell(self._losses)
        if work.is_refused and work.sending is not None:  # else it is ahead of what follows, and not waited for
            await asyncio.wait([work.sending])
        if context.cancelled and ending.status != "succeeded":
            ending = Ending(None)  # however it took being stopped
        elif work.refusal is not None and ending.status == "succeeded":
            ending = _refused(work.refusal)
        if ending.status is not None:
            try:
                told = await finish(spans, ending.status, outcome=ending.outcome, error=ending.error, died=ending.died)
            except Exception as refusal:
                self._look_at(refusal, spans)
                own = await self._send(context.rollout.rollout_id, spans)
                if own is not None and ending.status == "succeeded":
                    ending = _refused(own)
                await finish([], ending.status, outcome=ending.outcome, error=ending.error, died=ending.died)
            else:
                if ending.status == "succeeded" and told.reward is None:
                    self._warn_of_no_reward(context.rollout.rollout_id)
        else:
            # The store knows what became of the attempt, or is told now:
            await self._send(context.rollout.rollout_id, spans)
            if context.stopped:  # in the middle of it: it waits at its old place, and nothing is charged
                await finish([], "unresponsive", outcome="withdrawn")

    async def _give_back_unread(self, work: _Work, resources_id: str, version: int, error: str | None) -> None:
        """Resources could not be read: the store offers the rollout again, or holds it back if nobody can read them.

        If they are only unreadable here, others are given time to take it.
        """
        context = work.context
        await self._send(context.rollout.rollout_id, work.outbox.take())
        key = (context.rollout.rollout_id, context.attempt.attempt_id)
        await self._store.report_unread(*key, resources_id, version, error=error or "")
        self._unread_pause = min(max(2 * self._unread_pause, CLAIM_PAUSE_SECONDS), UNREAD_PAUSE_MOST_SECONDS)
        pause = asyncio.create_task(asyncio.sleep(self._unread_pause))
        self._claiming.add(pause)  # which is cancelled when the runner stops
        await asyncio.wait([pause])
        self._claiming.discard(pause)

    # -- spans ---------------------------------------------------------------------------------------------------------

    def _wake(self, work: _Work) -> None:
        """Enough spans have gathered; on any thread."""
        self._soon(work.context.rollout.rollout_id, work.full.set)

    def _soon(self, rollout_id: str, action: Callable[..., Any], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(action, *arguments)
        except RuntimeError:
            _too_late(self._losses, rollout_id)

    def send_late(self, span: Span) -> None:
        """A span came after the end of its rollout; on any thread."""
        self._soon(span.rollout_id, self._do_aside, functools.partial(self._send, span.rollout_id, [span]))

    def _do_aside(self, report: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        task = asyncio.create_task(_reported(report))
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    async def _flush(self, work: _Work) -> None:
        """Send spans while the agent works, so that they can be seen and are not lost with the process.

        Where there is none yet, a heartbeat says that the agent is at work: its first span may end much later.
        """
        rollout = work.context.rollout
        is_known = False  # that it is at work
        while True:
            try:
                async with asyncio.timeout(self._options.flush_seconds):
                    await work.full.wait()
            except TimeoutError:
                pass
            work.full.clear()
            if spans := work.outbox.take():
                try:
                    work.sending = asyncio.create_task(self._send_of(work, spans))
                    await asyncio.shield(work.sending)
                except StoreError as error:
                    logger.warning("Spans of rollout %s are lost: %s", rollout.rollout_id, error)
            elif not is_known:
                with contextlib.suppress(StoreError):  # the next of the runner's own will say so, or why it cannot
                    await self._store.heartbeat([(rollout.rollout_id, rollout.attempt.attempt_id)])
            is_known = True

    async def _send_of(self, work: _Work, spans: list[Span]) -> None:
        refusal = await self._send(work.context.rollout.rollout_id, spans, work)
        work.refusal = work.refusal or refusal

    async def _send(self, rollout_id: str, spans: list[Span], work: _Work | None = None) -> Exception | None:
        """Send spans; those that are refused do not keep the others from being stored.

        The first refusal of a span that the agent gave by its own hand; one that a tracer made is only counted.
        """
        if not spans:
            return None
        try:
            await self._store.add_unnumbered_spans(spans)
            return None
        except Exception as refusal:
            self._look_at(refusal, spans)
            if len(spans) == 1:
                name = spans[0].name
                self._losses.add("refused", name, f"Span {name!r} of rollout {rollout_id} is refused: {refusal}")
                return None if is_traced(spans[0]) else refusal
            if work is not None:
                work.is_refused = True
        refusals = await asyncio.gather(*(self._send(rollout_id, [span]) for span in spans))
        return next((refusal for refusal in refusals if refusal is not None), None)

    def _look_at(self, error: Exception, spans: list[Span]) -> None:
        """Go on if an error is a refusal of spans, else raise it: then all of them are lost, if they were wanted."""
        if not _is_refusal(error):
            if not isinstance(error, ValueError):  # which says that rollout or attempt are there no more
                self._losses.count("not_sent", len(spans))
            raise error

    # -- what comes from outside -------------------------------------------------------------------------------------

    def _notice(self, kind: str, rollout_id: str, attempt_id: str) -> None:
        """The store says what became of an attempt; on any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, kind, (rollout_id, attempt_id))

    def _cancel(self, kind: str, key: Key) -> None:
        if kind == "unresponsive":
            return  # it lives, and its next span says so
        work = self._running.get(key)
        if work is None:
            self._early[key] = kind
            if len(self._early) > EARLY_KEPT:
                self._early.popitem(last=False)
            return
        if work.context.cancelled:
            return
        assert self._loop is not None
        work.context.cancel(kind)
        self._agents.cancel(work.context)
        self._loop.call_later(self._options.cancel_grace_seconds, self._agents.kill, work.context)

    def _overdue(self, key: Key, work: _Work) -> None:
        """The agent took longer than it may: its attempt times out now, and its work is of no use any more."""
        if work.context.cancelled:
            return
        seconds = self._options.max_agent_seconds
        error = f"the agent ran for more than max_agent_seconds={seconds:g}"
        self._warn(work.context.rollout, "max_agent_seconds", error)
        self._do_aside(functools.partial(self._time_out, key, work, error))
        self._cancel("timeout", key)

    async def _time_out(self, key: Key, work: _Work, error: str) -> None:
        await self._send(key[0], work.outbox.take())
        await self._store.finish_attempt(*key, [], "timeout", outcome="timeout", error=error)

    def _heartbeats(self) -> None:
        with apart():
            self._beat()

    def _beat(self) -> None:
        process = psutil.Process()
        beaten = float("-inf")  # the first one at once: it says which process this is
        while not self._stopping.is_set():
            self._hurried.clear()
            left = beaten + self._heartbeat_interval() - time.monotonic()
            if left > 0 and self._hurried.wait(left):
                continue  # something started that may be more impatient, or the runner stops
            beaten = time.monotonic()
            try:
                running = list(self._running)
                if running:
                    for key in run_blocking(self._store.heartbeat(running)):
                        self._notice("superseded", *key)  # the notice itself was lost with an earlier session
                stats = {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "running": len(running),
                    "rss_bytes": process.memory_info().rss,
                }
                self._store.sync.update_worker(self.worker_id, stats)
                run_blocking(self._report_losses())
            except StoreError as error:
                logger.warning("Runner %s could not send a heartbeat: %s", self.worker_id, error)
            except Exception:  # without heartbeats all that runs here would be taken for dead
                logger.exception("Runner %s could not send a heartbeat", self.worker_id)

    async def _report_losses(self) -> None:
        """Tell the store what was counted here since the last time."""
        if counts := self._losses.take():
            try:
                await self._store.report_spans_lost(counts)
            except StoreError:
                self._losses.give_back(counts)
                raise

    def _heartbeat_interval(self) -> float:
        """Often enough for the most impatient rollout that runs."""
        patience = [
            seconds
            for work in list(self._running.values())
            if (seconds := work.context.rollout.config.unresponsive_seconds) is not None
        ]
        return max(min([self._options.heartbeat_seconds, *(seconds / 3 for seconds in patience)]), 0.05)


def _late(runner: weakref.ref[Runner], losses: Losses, span: Span) -> None:
    if (alive := runner()) is not None:
        alive.send_late(span)
    else:
        _too_late(losses, span.rollout_id)


def _too_late(losses: Losses, rollout_id: str) -> None:
    losses.add("too_late", "", f"A span of rollout {rollout_id} ended after its runner, and is lost")


def _is_refusal(error: Exception) -> bool:
    """Whether an error is about what was to be sent, and not about the store: too large, wrong, not to be encoded."""
    wrong = (PayloadTooLargeError, PayloadNotPicklableError, InvalidValueError)
    return isinstance(error, wrong) or not isinstance(error, StoreError)


def _refused(refusal: Exception) -> Ending:
    """A refused span of the agent's own must not hide behind a success."""
    return Ending("failed", "agent_error", f"a span of the agent was refused: {type(refusal).__name__}: {refusal}")


async def _reported(report: Callable[[], Any]) -> None:
    """Report a rollout; that its claim is lost, or that it is deleted, is no reason to stop."""
    try:
        await report()
    except ValueError as error:
        logger.warning("A report came too late and was refused: %s", error)
    except Exception:  # whatever it is, the next rollout is not to suffer from it
        logger.exception("A rollout could not be reported")
