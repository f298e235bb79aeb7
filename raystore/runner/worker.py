"""What one runner does: claim by long poll, run the agent, send its spans, report, claim the next.

The last spans, the final status and the next claim leave together. Heartbeats come from a thread that an agent cannot
block. An exception of the agent fails its attempt and nothing else.
Not here: keeping runners alive (`pool`), what an agent sees (`context`).
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import os
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil

from raystore.calls import run_blocking
from raystore.client import StoreClient
from raystore.errors import (
    Abort,
    Drop,
    OutcomeUnknownError,
    PayloadTooLargeError,
    ResourcesNotFoundError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
)
from raystore.runner.context import STOPPED, Context
from raystore.spans import Span
from raystore.types import AttemptedRollout

logger = logging.getLogger("raystore.runner")

CLAIM_SECONDS = 30.0  #: one long poll; only bounds how long a forgotten runner asks
CLAIM_PAUSE_SECONDS = 0.2  #: before claiming again after a claim that failed
RESOURCES_CACHED = 8
KINDS_WARNED = 20  #: kinds of agent errors that a runner tells of in its log
ERROR_CHARACTERS = 16_000  #: of an agent's traceback that are kept


@dataclass(slots=True)
class RunnerOptions:
    """How a runner works; the same for all runners of a pool."""

    concurrency: int = 1
    queues: Sequence[str] = ("default",)
    heartbeat_seconds: float = 10.0
    flush_seconds: float = 1.0


def make_agent(agent: Any) -> Any:
    """What is called for each rollout: a function as it is, a class as one instance that was set up."""
    inner = agent.func if isinstance(agent, functools.partial) else agent
    if not inspect.isclass(inner):
        return agent
    instance = agent()
    if hasattr(instance, "setup"):
        instance.setup()
    return instance


def _is_async(agent: Any) -> bool:
    inner = agent.func if isinstance(agent, functools.partial) else agent
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


class Runner:
    """One runner, on the event loop that runs `run`."""

    def __init__(self, store: StoreClient, agent: Any, worker_id: str, options: RunnerOptions) -> None:
        self.worker_id = worker_id
        self._store = store
        self._agent = agent
        self._is_async = _is_async(agent)
        self._options = options
        self._running: dict[tuple[str, str], tuple[Context, asyncio.Task[Any]]] = {}
        self._cached: OrderedDict[tuple[str, int | None], dict[str, Any]] = OrderedDict()
        self._threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix=f"{worker_id}-agent")
        self._warned: set[str] = set()
        self._stopping = threading.Event()
        self._hurried = threading.Event()
        self._slots: list[asyncio.Task[None]] = []
        self._claiming: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Work until `stop`, or until the store is gone."""
        self._loop = asyncio.get_running_loop()
        forget = self._store.listen_for_notices(self._notice)
        heart = threading.Thread(target=self._heartbeats, name=f"{self.worker_id}-heartbeat", daemon=True)
        heart.start()
        try:
            self._slots = [asyncio.create_task(self._slot()) for _ in range(self._options.concurrency)]
            await asyncio.gather(*self._slots)
        finally:
            self._stopping.set()
            self._hurried.set()
            forget()
            self._threads.shutdown(wait=False, cancel_futures=True)
            if hasattr(self._agent, "close"):
                self._agent.close()

    def stop(self, *, drain: bool = True) -> None:
        """Claim nothing more; what runs is finished, or cancelled if not to drain. On the runner's loop."""
        self._stopping.set()
        for claiming in list(self._claiming):
            claiming.cancel()
        if not drain:
            for context, task in list(self._running.values()):
                context.cancel(STOPPED)
                task.cancel()

    # -- one slot ----------------------------------------------------------------------------------------------------

    async def _slot(self) -> None:
        report: Callable[[], Any] | None = None
        while True:
            try:
                claimed = await self._report_and_claim(report)
            except (StoreUnavailableError, StoreClosedError) as error:
                if not isinstance(error, OutcomeUnknownError):
                    logger.error("Runner %s ends: %s", self.worker_id, error)
                    return
                logger.warning("Runner %s claims again: %s", self.worker_id, error)
                claimed = None
            except Exception as error:  # a task that cannot be decoded here, for one: it was given back with the reason
                logger.error("Runner %s cannot take a rollout: %s", self.worker_id, error)
                await asyncio.sleep(CLAIM_PAUSE_SECONDS)
                claimed = None
            report = None
            if claimed is not None:
                report = await self._work(claimed)
            elif self._stopping.is_set():
                return

    async def _report_and_claim(self, report: Callable[[], Any] | None) -> AttemptedRollout | None:
        """Send the final report of one rollout together with the claim of the next."""
        reporting = asyncio.create_task(_reported(report)) if report is not None else None
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
            resources = await self._resources_of(rollout)
        except Exception as error:  # gone, or of a class that cannot be imported here
            return functools.partial(finish, [], "failed", outcome="infra", error=f"{type(error).__name__}: {error}")
        context = Context(rollout, resources, self.worker_id)
        task = asyncio.create_task(self._call(context))
        key = (rollout.rollout_id, rollout.attempt.attempt_id)
        self._running[key] = (context, task)
        self._hurried.set()
        flushing = asyncio.create_task(self._flush(context, task))
        status, outcome, error_text = "succeeded", "ok", None
        try:
            result = await task
            self._take_result(context, result)
        except asyncio.CancelledError as error:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            if context.stopped:  # in the middle of it, and nobody's fault
                return functools.partial(finish, context.take_spans(), "unresponsive", outcome="runner_lost")
            if context.cancelled:
                # The store knows already what became of the attempt; only its spans are still to be kept.
                return functools.partial(self._keep_spans, context)
            status, outcome, error_text = "failed", "agent_error", f"the agent cancelled itself: {error!r}"
        except Abort as error:
            status, outcome, error_text = "failed", "infra", str(error)
        except Drop as error:
            status, outcome, error_text = "failed", "dropped", str(error)
        except Exception as error:  # whatever the agent raises is its outcome
            text = "".join(traceback.format_exception(error))
            status, outcome, error_text = "failed", "agent_error", text[-ERROR_CHARACTERS:]
            self._warn(rollout, error)
        finally:
            del self._running[key]
            flushing.cancel()
        return functools.partial(self._finish, finish, context, status, outcome, error_text)

    def _warn(self, rollout: AttemptedRollout, error: Exception) -> None:
        """Tell people of an agent's error, once for each kind: a run in which all fail should not be silent."""
        kind = f"{type(error).__name__}: {error}"[:200]
        if kind not in self._warned and len(self._warned) < KINDS_WARNED:
            self._warned.add(kind)
            logger.warning(
                "The agent failed on rollout %s: %s (told once for each kind; the traceback is in attempt.error)",
                rollout.rollout_id, kind,
            )  # fmt: skip

    async def _call(self, context: Context) -> Any:
        with context.active():
            if self._is_async:
                try:
                    return await self._agent(context.rollout.input, context)
                except (SystemExit, KeyboardInterrupt) as error:
                    raise _AgentExit(repr(error)) from error
            call = functools.partial(contextvars.copy_context().run, _run, self._agent, context.rollout.input, context)
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    @staticmethod
    def _take_result(context: Context, result: Any) -> None:
        """What an agent returned: a reward, spans, or nothing."""
        if result is None:
            return
        if hasattr(result, "__float__"):  # a number, also of numpy or torch; True and False are 1 and 0
            context.reward(result)
        elif isinstance(result, (list, tuple)) and all(isinstance(item, Span) for item in result):
            for span in result:
                context.add(span)
        else:
            raise TypeError(f"the agent returned {result!r}: expected a number (the reward), a list of Span, or None")

    async def _finish(
        self, finish: Callable[..., Any], context: Context, status: str, outcome: str, error: str | None
    ) -> None:
        try:
            await finish(context.take_spans(), status, outcome=outcome, error=error)
        except PayloadTooLargeError as refusal:  # a refused span must not hide behind a success
            await finish([], "failed", outcome="agent_error", error=str(refusal))

    async def _keep_spans(self, context: Context) -> None:
        if spans := context.take_spans():
            await self._store.add_unnumbered_spans(spans)

    async def _flush(self, context: Context, task: asyncio.Task[Any]) -> None:
        """Send spans while the agent works, so that they can be seen and are not lost with the process."""
        while not task.done():
            await asyncio.sleep(self._options.flush_seconds)
            spans = context.take_spans()
            if spans:
                try:
                    await asyncio.shield(self._store.add_unnumbered_spans(spans))
                except StoreError as error:
                    logger.warning("Spans of rollout %s were refused: %s", context.rollout.rollout_id, error)

    async def _resources_of(self, rollout: AttemptedRollout) -> dict[str, Any]:
        """The named resources of the version that was newest at the claim."""
        resources_id, version = rollout.resources_id, rollout.attempt.resources_version
        if resources_id is None:
            return {}
        if version is None:
            raise ResourcesNotFoundError(resources_id)
        key = (resources_id, version)
        if key not in self._cached:
            update = await self._store.get_resources_by_id(resources_id, version)
            self._cached[key] = dict(update.resources) if update is not None else {}
            if len(self._cached) > RESOURCES_CACHED:
                self._cached.popitem(last=False)
        self._cached.move_to_end(key)
        return self._cached[key]

    # -- what comes from outside -------------------------------------------------------------------------------------

    def _notice(self, kind: str, rollout_id: str, attempt_id: str) -> None:
        """The store says what became of an attempt; on any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, kind, (rollout_id, attempt_id))

    def _cancel(self, kind: str, key: tuple[str, str]) -> None:
        context, task = self._running.get(key, (None, None))
        if context is None or task is None or kind == "unresponsive":
            return  # unresponsive: it lives, and its next span says so
        context.cancel(kind)
        if self._is_async:
            task.cancel()

    def _heartbeats(self) -> None:
        process = psutil.Process()
        while not self._stopping.is_set():
            self._hurried.clear()
            if self._hurried.wait(self._heartbeat_interval()):
                continue  # something started that may be more impatient, or the runner stops
            try:
                running = list(self._running)
                if running:
                    run_blocking(self._store.heartbeat(running))
                stats = {"pid": os.getpid(), "running": len(running), "rss_bytes": process.memory_info().rss}
                self._store.sync.update_worker(self.worker_id, stats)
            except StoreError as error:
                logger.warning("Runner %s could not send a heartbeat: %s", self.worker_id, error)

    def _heartbeat_interval(self) -> float:
        """Often enough for the most impatient rollout that runs."""
        patience = [
            context.rollout.config.unresponsive_seconds
            for context, _ in list(self._running.values())
            if context.rollout.config.unresponsive_seconds is not None
        ]
        return max(min([self._options.heartbeat_seconds, *(seconds / 3 for seconds in patience)]), 0.05)


class _AgentExit(Exception):
    """The agent wanted to end the process (`sys.exit`, argparse); that is its own error, not the runner's end."""


def _run(agent: Any, task: Any, context: Context) -> Any:
    """Call an agent that is not async, in its thread."""
    try:
        return agent(task, context)
    except (SystemExit, KeyboardInterrupt) as error:  # would end the event loop, and every rollout on it
        raise _AgentExit(repr(error)) from error


async def _reported(report: Callable[[], Any]) -> None:
    """Report a rollout; that its claim is lost, or that it is deleted, is no reason to stop."""
    try:
        await report()
    except ValueError as error:
        logger.warning("A report came too late and was refused: %s", error)
    except (
        Exception
    ):  # an estimator of spans that raises, an outcome that is unknown: the next rollout is not to suffer
        logger.exception("A rollout could not be reported")
