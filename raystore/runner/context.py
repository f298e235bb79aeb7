"""The agent's view of its rollout (`Context`), and the spans that it records until they are sent (`Outbox`).

Spans nest by context variable, so concurrent rollouts of one process do not mix. A span that has ended goes to the
`sink` of the context, a span that is lost is reported to its `lose`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from secrets import token_hex
from typing import Any, NamedTuple, NoReturn

from raystore.client import transport
from raystore.core.schema import LossReason
from raystore.errors import AttemptOverError, InvalidValueError, NoSuchResourceError
from raystore.errors.text import meant, report, summary, text_of
from raystore.reports.log import logger_of, once
from raystore.tracing import semconv
from raystore.tracing.calls import CallCounter, Losses
from raystore.types.contract import LLM, Attempt, AttemptedRollout
from raystore.types.spans import AttributeValue, Event, Span, TraceStatus, attributes_of
from raystore.values import plain
from raystore.values.plain import pack_floats, pack_integers
from raystore.wire.codec import STATE, Encoded, encode

logger: logging.Logger = logger_of("raystore.runner")

STOPPED = "the runner stops"  #: reason of a cancellation after which the work is given back
ALONE = "run_one"  #: worker id of a call without a store
FLUSH_BYTES = 64 * 1024  #: of spans are sent at once, without a wait for more
_SPAN_BYTES = 300  # of a span without attributes, about
_NUMBER_BYTES = 9

_current: ContextVar[Context | None] = ContextVar("raystore_context", default=None)
_innermost: ContextVar[_Block | None] = ContextVar("raystore_span", default=None)  # block that was entered last
_running: dict[Context, None] = {}  # contexts whose agents run in this process
_outside: list[int] = []  # ids of threads in which no agent runs

# -- the current rollout -----------------------------------------------------------------------------------------------


def current() -> Context | None:
    """The context of the rollout that the calling code runs for, at any depth of calls; None outside of an agent."""
    return _current.get()


def any_running() -> Context | None:
    """The context of some rollout whose agent runs in this process; None if no agent runs."""
    while _running:
        try:
            return next(iter(_running), None)
        except RuntimeError:  # another thread has just changed the dict
            continue
    return None


@contextmanager
def outside_rollouts(thread: threading.Thread | None = None) -> Iterator[None]:
    """Declare that a thread (None: this one) runs no agent: a span that starts there for no rollout is not lost."""
    ident = threading.get_ident() if thread is None else thread.ident or 0
    _outside.append(ident)
    try:
        yield
    finally:
        _outside.remove(ident)


def is_outside_rollouts() -> bool:
    """Whether this thread was declared to run no agent."""
    return threading.get_ident() in _outside


class Position:
    """The current rollout and span, taken along to another thread."""

    def __init__(self) -> None:
        self._context, self._block = _current.get(), _innermost.get()

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function within that rollout and span."""
        context, block = _current.set(self._context), _innermost.set(self._block)
        try:
            return function(*args, **kwargs)
        finally:
            _innermost.reset(block)
            _current.reset(context)


# -- the rollout of an agent -------------------------------------------------------------------------------------------


class _Resources(dict[str, Any]):
    """Resources by name; the error for a missing name lists the others."""

    def __init__(self, resources: Mapping[str, Any], source: str) -> None:
        super().__init__(resources)
        self._source = source

    def replace(self, resources: Mapping[str, Any], source: str) -> None:
        """Hold others."""
        self._source = source
        for name in self.keys() - resources.keys():
            del self[name]
        self.update(resources)

    def __missing__(self, name: object) -> NoReturn:
        names = sorted(self)
        likely = meant(name, names).removeprefix("; ")
        raise NoSuchResourceError(name, names, f"{self._source}{likely and f' ({likely})'}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _Resources, (dict(self), self._source)


def _source_of(rollout: AttemptedRollout, worker_id: str) -> str:
    """Where a rollout's resources come from, and how to publish others."""
    if worker_id == ALONE:
        return "what was passed to rs.run_one; pass resources={name: resource, ...}"
    if (resources_id := rollout.resources_id) is None:
        return (
            "nothing had been published when the rollout was enqueued; publish first, with "
            "store.update_resources('main', {name: resource, ...})"
        )
    return (
        f"version {rollout.attempt.resources_version} of {resources_id!r}; to publish another, "
        f"store.update_resources({resources_id!r}, {{name: resource, ...}})"
    )


class OpenSpan:
    """A span while it is open."""

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        self.name = name
        self.span_id: str = token_hex(8)
        self.attributes: dict[str, AttributeValue] = attributes_of(attributes)
        self.events: list[Event] = []
        self.status: TraceStatus = TraceStatus(status_code="OK")

    def set(self, key: str, value: Any) -> None:
        """Set one attribute."""
        self.update({key: value})

    def update(self, attributes: dict[str, Any]) -> None:
        """Set several attributes."""
        self.attributes.update(attributes_of(attributes))

    def record_exception(self, error: BaseException) -> None:
        """Add an exception as an event with OpenTelemetry's names, and mark the span as failed."""
        details = {
            "exception.type": type(error).__name__,
            "exception.message": text_of(error),
            "exception.stacktrace": report(error),
        }
        self.events.append(Event(name="exception", attributes=details, timestamp=time.time()))
        self.status = TraceStatus(status_code="ERROR", description=summary(error))


class _Block:
    """A block that is recorded as a span; a class, since a generator would change the traceback of exceptions."""

    def __init__(self, context: Context, span: OpenSpan) -> None:
        self._context = context
        self._span = span
        self._started = 0.0
        self.span_id: str = span.span_id
        self.outer: _Block | None = None
        self.is_abandoned = False  # left by the end of a generator, and perhaps still the innermost of some contexts

    def __enter__(self) -> OpenSpan:
        self.outer = _enclosing()
        _innermost.set(self)
        self._started = time.time()
        self._context.open[self.span_id] = (self._span.name, self._started)
        return self._span

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GeneratorExit):
            # A garbage collection may have ended the generator, in any context and while a `ContextVar.set` is under
            # way, which another one would crash. So the block is passed over from now on instead.
            self.is_abandoned = True
        else:
            if error is not None:
                self._span.record_exception(error)
            if _enclosing() is self:  # else another context is being left
                _innermost.set(self.outer)
        parent_id = None if self.outer is None else self.outer.span_id
        self._context.open.pop(self.span_id, None)
        self._context._record(self._span, parent_id, self._started, time.time())


def _enclosing() -> _Block | None:
    """The block that the code is in; None if it is in none."""
    block = _innermost.get()
    while block is not None and block.is_abandoned:
        block = block.outer
    return block


def _parent_id() -> str | None:
    block = _enclosing()
    return block.span_id if block is not None else None


#: Asks the runner for something, on any thread. `SAVE`, with an encoded state or None, is answered with why the work is
#: no longer needed now, None if it is; `REFRESH`, with None, with the newer `Version`, None if there is none.
Ask = Callable[[str, Any], "Future[Any]"]
SAVE, REFRESH = "save", "refresh"


class Version(NamedTuple):
    """A version of the resources of a rollout."""

    version: int | None
    policy_version: int | None
    resources: Mapping[str, Any]


def new_question() -> Future[Any]:
    """A future for an answer, which whoever waits for it cannot cancel: what was asked goes on."""
    asked: Future[Any] = Future()
    asked.set_running_or_notify_cancel()
    return asked


def _asks_nobody(what: str, given: Any) -> Future[Any]:
    asked = new_question()
    asked.set_exception(EndedError("no runner listens to this agent any more"))
    return asked


class SyncContext:
    """What a `Context` has as coroutines, as blocking calls: for agents that are not async."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def save(self, state: Any) -> None:
        """Keep a state with the attempt, as `Context.save` does; returns when it is durable."""
        context = self._context
        context._take_answer(_result_of(context._ask_to_save(state)))
        if context.stopped and not context.is_told:  # nothing else has interrupted this agent
            context.check()

    def refresh(self) -> bool:
        """Switch to the newest version of the resources, as `Context.refresh` does; returns whether it is another."""
        context = self._context
        return context._take_version(_result_of(context._ask_to_refresh()))


class Context:
    """The rollout that an agent runs for.

    Attributes:
        rollout: the rollout, with its attempt; `rollout.input` is the task.
        saved: the state that an earlier attempt saved last (`save`), from which this one is to go on; None if there is
            none. It stays what it was at the start.
        resources: by name, of the version that was newest at the claim, or at the last `refresh`; a missing name raises
            `NoSuchResourceError`, a KeyError.
        worker_id: the runner that runs it.
    """

    def __init__(
        self,
        rollout: AttemptedRollout,
        resources: Mapping[str, Any],
        worker_id: str,
        sink: Callable[[Span], None],
        lose: Callable[[LossReason, str, str], None],
        *,
        saved: Any = None,
        ask: Ask = _asks_nobody,
    ) -> None:
        self.rollout = rollout
        self.saved = saved
        self.ask: Ask = ask  #: asks the runner; for the runner
        self.resources: _Resources = _Resources(resources, _source_of(rollout, worker_id))
        self.worker_id = worker_id
        self._versions = rollout.attempt.resources_version, rollout.attempt.policy_version
        self._trace_id = token_hex(16)
        self._cancelled: str | None = None
        self.is_told: bool = False  #: that its runner stops: by an exception; for the runner
        self._is_over = False
        self.open: dict[str, tuple[str, float]] = {}  #: blocks that have begun, by span id: name, and since when
        self.sink = sink  #: takes the spans that have ended; for the runner
        self.lose = lose  #: takes reason, name and description of a lost span (`Losses.add`); for the runner

    @property
    def attempt(self) -> Attempt:
        """The attempt of the rollout that the agent runs."""
        return self.rollout.attempt

    @property
    def policy_version(self) -> int | None:
        """Version of the weights behind the resources, as the driver published it."""
        return self._versions[1]

    @property
    def resources_version(self) -> int | None:
        """Version of the resources: that of the claim, or of the last `refresh`; None if there are none."""
        return self._versions[0]

    # -- spans and rewards -------------------------------------------------------------------------------------------

    def span(self, name: str, /, **attributes: Any) -> AbstractContextManager[OpenSpan]:
        """Record a block as a span; an exception is recorded on it and raised again.

        Attributes may have any names, also `name`. A block that ends because its generator is closed has not failed. A
        block that never ends gives no span.
        """
        return _Block(self, OpenSpan(name, attributes))

    def llm(
        self,
        /,
        *,
        prompt_ids: Iterable[int],
        response_ids: Iterable[int],
        logprobs: Iterable[float] | None = None,
        model: str | None = None,
        prompt: Any = None,
        response: Any = None,
        finish_reason: str | None = None,
        operation: str = "chat",
        start_time: float | None = None,
        **attributes: Any,
    ) -> None:
        """Record one call of a model, from which `raystore.triplets` makes training data.

        Args:
            prompt_ids: token ids of the prompt: a list, numpy array or tensor of one dimension; stored as an array.
            response_ids: token ids that the model generated.
            logprobs: log-probability (natural logarithm) of each response token under the policy that generated it.
            model: name of the model; None takes that of the rollout's `LLM` resource, if it has exactly one.
            prompt, response: the texts or messages, for people to read.
            finish_reason: why the model stopped ("stop", "length", ...).
            operation: "chat" or "text_completion".
            start_time: start of the call in seconds since the epoch; None means now.
            attributes: any further attributes of the span.

        Attributes have the names of OpenTelemetry's GenAI conventions (`raystore.semconv`).

        Raises:
            InvalidValueError: ids or log-probabilities are no sequence of numbers or contain NaN, or log-probabilities
                and response tokens differ in number.
        """
        ids, generated = pack_integers("prompt_ids", prompt_ids), pack_integers("response_ids", response_ids)
        known: dict[str, Any] = {
            semconv.OPERATION: operation,
            semconv.INPUT_TOKENS: len(ids),
            semconv.OUTPUT_TOKENS: len(generated),
            semconv.INPUT_TOKEN_IDS: ids,
            semconv.OUTPUT_TOKEN_IDS: generated,
        }
        if logprobs is not None:
            packed = pack_floats("logprobs", logprobs)
            if len(packed) != len(generated):
                raise InvalidValueError("logprobs", f"[{len(packed)} numbers]", f"one for each of {len(generated)} ids")
            known[semconv.OUTPUT_LOGPROBS] = packed
        if model is None:
            models = {resource.model for resource in self.resources.values() if isinstance(resource, LLM)}
            model = models.pop() if len(models) == 1 else None
        optional = {
            semconv.REQUEST_MODEL: model,
            semconv.INPUT_MESSAGES: prompt,
            semconv.OUTPUT_MESSAGES: response,
            semconv.FINISH_REASONS: None if finish_reason is None else [finish_reason],
            semconv.POLICY_VERSION: self.policy_version,
        }
        known |= {name: value for name, value in optional.items() if value is not None}
        now = time.time()
        span = OpenSpan(f"{operation} {model}" if model else operation, known | attributes)
        self._record(span, _parent_id(), now if start_time is None else start_time, now)

    def reward(self, value: float, /, **dimensions: float) -> None:
        """Emit the reward of the rollout; `dimensions` are further values with names of your choice."""
        attributes: dict[str, Any] = {}
        for index, (name, number) in enumerate([("reward", value), *dimensions.items()]):
            attributes[f"{semconv.REWARD_PREFIX}{index}.name"] = name
            attributes[f"{semconv.REWARD_PREFIX}{index}.value"] = plain.reward(name, number)
        now = time.time()
        self._record(OpenSpan(semconv.REWARD_SPAN, attributes), _parent_id(), now, now)

    def add(self, span: Span) -> None:
        """Record a span that was made elsewhere, as a copy with the ids of this attempt."""
        ids = {"rollout_id": self.rollout.rollout_id, "attempt_id": self.attempt.attempt_id}
        self.sink(span.model_copy(update=ids))

    def _record(self, span: OpenSpan, parent_id: str | None, started: float, ended: float) -> None:
        made = Span.from_attributes(
            attributes=span.attributes,
            rollout_id=self.rollout.rollout_id,
            attempt_id=self.attempt.attempt_id,
            name=span.name,
            trace_id=self._trace_id,
            span_id=span.span_id,
            parent_id=parent_id,
            start_time=started,
            end_time=ended,
            status=span.status,
        )
        made.events = span.events
        self.sink(made)

    # -- states that later attempts go on from -----------------------------------------------------------------------

    @property
    def sync(self) -> SyncContext:
        """`save` and `refresh` as blocking calls, for agents that are not async."""
        return SyncContext(self)

    async def save(self, state: Any) -> None:
        """Keep a state with the attempt, in place of the one before; it is durable when this returns.

        If this attempt does not come to its end (its runner or node dies or stops, it times out, or it fails and the
        rollout is tried again), the next one has the state as `ctx.saved`, and begins with the spans that have ended
        by now. Whatever it needs to go on is to be in it: turns, the environment or how to find it again. Spans that
        are open are not kept with it. None says that the next attempt is to begin anew.

        Agents that are not async call `ctx.sync.save(state)`.

        Raises:
            PayloadNotPicklableError: the state cannot be pickled; the one before stays.
            PayloadTooLargeError: it is larger than the store takes (`limits={"state_bytes": ...}`); the one before
                stays.
            asyncio.CancelledError: the work is no longer needed, as in `check`. Whoever is cancelled because the runner
                stops (`stopped`) can still save in its `except` or `finally`, for half a second; if the node goes away
                (`RunnerPool(preempt=)`), for `cancel_grace_seconds`.
        """
        self._take_answer(await _answer_to(self._ask_to_save(state)))

    def _ask_to_save(self, state: Any) -> Future[Any]:
        """Encode a state here, where its classes are, and ask the runner to keep it."""
        if not self.stopped:
            self.check()
        if self._is_over:
            raise AttemptOverError(self.rollout.rollout_id, self.attempt.attempt_id, "its agent has returned")
        return self.ask(SAVE, None if state is None else Encoded(encode(state, STATE, sys.maxsize)))

    def _take_answer(self, why: str | None) -> None:
        if why is not None:
            self._cancelled = self._cancelled or why
            self.check()

    # -- newer weights -----------------------------------------------------------------------------------------------

    async def refresh(self) -> bool:
        """Switch to the newest version of the rollout's resources; returns whether it is another than before.

        `resources` and `policy_version` change in place; what was taken out of `resources` before stays as it was.
        Calls of models that are recorded from now on have the new version (`Trajectory.policy_versions` has one for
        each token). The attempt's own versions stay those of its claim, from which staleness counts. False also if the
        rollout is to stay with its version, and without a store.

        Agents that are not async call `ctx.sync.refresh()`. Raises `asyncio.CancelledError` as `check` does; what
        `get_resources_by_id` raises; and with `isolation="process"` PayloadNotReadableError or PayloadNotPicklableError
        for resources that this process cannot be given. Then the version before stays.
        """
        return self._take_version(await _answer_to(self._ask_to_refresh()))

    def _ask_to_refresh(self) -> Future[Any]:
        self.check()
        if self._is_over:
            raise AttemptOverError(self.rollout.rollout_id, self.attempt.attempt_id, "its agent has returned")
        return self.ask(REFRESH, None)

    def _take_version(self, version: Version | str | None) -> bool:
        if isinstance(version, str):
            self._take_answer(version)
        if not isinstance(version, Version):
            return False
        self.switch(version)
        return True

    def switch(self, version: Version) -> None:
        """Have another version of the resources from now on; for the runner."""
        attempt = self.attempt.model_copy(update={"resources_version": version.version})
        source = _source_of(self.rollout.model_copy(update={"attempt": attempt}), self.worker_id)
        self._versions = version.version, version.policy_version
        self.resources.replace(version.resources, source)

    # -- cancellation ------------------------------------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether the work is no longer needed: cancelled, timed out, or superseded."""
        return self._cancelled is not None

    @property
    def why(self) -> str | None:
        """Why the work is no longer needed: "cancelled", "timeout" or "superseded"; None while it is."""
        return self._cancelled

    @property
    def stopped(self) -> bool:
        """Whether the runner stops and gives the work back."""
        return self._cancelled == STOPPED

    def check(self) -> None:
        """Raise `asyncio.CancelledError` if the work is no longer needed; for agents that are not async."""
        if self._cancelled is not None:
            self.is_told = True
            raise asyncio.CancelledError(self._cancelled)

    def cancel(self, why: str) -> None:
        """Mark the work as no longer needed; for the runner."""
        self._cancelled = why

    def enter(self) -> None:
        """Make this the `current` context, in the calling code's context variables; for the runner."""
        _current.set(self)
        _innermost.set(None)
        _running[self] = None
        if self._is_over:  # another thread has called `leave` meanwhile
            _running.pop(self, None)

    def leave(self) -> None:
        """Note that the agent's call has ended, or was abandoned; for the runner."""
        self._is_over = True
        self.ask = _asks_nobody
        _running.pop(self, None)


class EndedError(Exception):
    """The runner, or the store that it works for, has ended before it could answer an agent."""


async def _answer_to(asked: Future[Any]) -> Any:
    """The answer of the runner. What was asked goes on if its caller is cancelled."""
    try:
        return await asyncio.shield(asyncio.wrap_future(asked))
    except EndedError as error:
        raise asyncio.CancelledError(str(error)) from None


def _result_of(asked: Future[Any]) -> Any:
    """The answer of the runner, for which this thread waits."""
    try:
        return asked.result()
    except (EndedError, concurrent.futures.CancelledError) as error:
        raise asyncio.CancelledError(str(error)) from None


# -- the spans of a rollout --------------------------------------------------------------------------------------------


class Outbox:
    """Spans of one rollout that have ended and are not sent yet; spans are added from any thread.

    `on_full` is called on the adding thread when enough spans wait. When the rollout ends, model calls without token
    ids or log-probabilities are added to `losses`.
    A garbage collection may end a span anywhere, also in the middle of `add`. So the lock is reentrant, and no method
    allocates between two changes that belong together.
    """

    def __init__(self, losses: Losses, on_full: Callable[[], None] = lambda: None) -> None:
        self._losses = losses
        self._on_full = on_full
        self._pid = transport.pid
        self._lock = threading.RLock()
        self._spans: list[Span] = []
        self._bytes = 0
        self._on_late: Callable[[Span], None] | None = None  # takes the spans that end after the rollout
        self._calls = CallCounter()
        self.calls: dict[str, Any] | None = None  #: of models, once the rollout has ended

    def add(self, span: Span) -> None:
        if self._pid != transport.pid:  # in a forked child the lock may stay locked for ever
            self._warn_of_fork(span)
            return
        weight = _weight(span)
        with self._lock:
            if (on_late := self._on_late) is None:
                self._calls.add(span)
                self._spans.append(span)
                self._bytes += weight
            is_full = self._bytes >= FLUSH_BYTES
        if on_late is not None:
            on_late(span)
        elif is_full:
            self._on_full()

    def _warn_of_fork(self, span: Span) -> None:
        logger.warning(
            "Span %r of rollout %s is lost, as is everything that this process records: the agent forked it, and "
            "nothing recorded in a fork reaches the runner. Return it to the agent, and let the agent record it. "
            "(Told once.)",
            span.name, span.rollout_id, extra=once("fork"),
        )  # fmt: skip

    def take(self) -> list[Span]:
        """Remove and return the spans that wait."""
        with self._lock:
            spans, self._spans, self._bytes = self._spans, [], 0
            return spans

    def close(self, on_late: Callable[[Span], None]) -> list[Span]:
        """Take the last spans of a rollout that has ended; `on_late` is called with each span that is added later."""
        with self._lock:
            self._on_late, self._on_full = on_late, lambda: None  # a span that is kept must not keep the rollout alive
            calls, self._calls = self._calls, CallCounter()
        calls.report(self._losses)
        self.calls = calls.total()
        return self.take()


def _weight(span: Span) -> int:
    """Approximate bytes of a span; cheap, because it is computed for each span."""
    size = _SPAN_BYTES
    for value in span.attributes.values():
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, array):
            size += len(value) * value.itemsize
        elif isinstance(value, (list, tuple)):
            size += sum(len(item) if isinstance(item, str) else _NUMBER_BYTES for item in value)
    return size
