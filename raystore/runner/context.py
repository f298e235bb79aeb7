"""What an agent sees of its rollout: the task's resources, spans, the reward, and whether it was cancelled.

Spans nest by context variable, so that concurrent rollouts of one process do not mix; one that has ended goes to the
`sink` of whoever runs the agent, and what is known of one that is lost to its `lose`.
Not here: claiming, sending, reporting (`worker`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from secrets import token_hex
from typing import Any

from raystore.errors import InvalidValueError, NoSuchResourceError
from raystore.errors.words import meant
from raystore.runner.told import report, summary, text_of
from raystore.spans import AttributeValue, Event, Span, TraceStatus, attributes_of
from raystore.tracing import semconv
from raystore.tracing.losses import Reason
from raystore.types import LLM, Attempt, AttemptedRollout
from raystore.values import plain
from raystore.values.arrays import pack_floats, pack_integers


class _Resources(dict[str, Any]):
    """Resources by name; who asks for one that is not there is told which are."""

    def __init__(self, resources: Mapping[str, Any], source: str) -> None:
        super().__init__(resources)
        self._source = source

    def __missing__(self, name: Any) -> Any:
        names = sorted(self)
        likely = meant(name, names).removeprefix("; ")
        raise NoSuchResourceError(name, names, f"{self._source}{likely and f' ({likely})'}")

    def __reduce__(self) -> Any:
        return _Resources, (dict(self), self._source)


def _source_of(rollout: AttemptedRollout, worker_id: str) -> str:
    """Where a rollout's resources are from, and how there would be others."""
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


_current: ContextVar[Context | None] = ContextVar("raystore_context", default=None)
_parent: ContextVar[str | None] = ContextVar("raystore_span", default=None)
_at_work: dict[Context, None] = {}  # those whose agents run in this process
_apart: list[int] = []  # threads of this process in which no agent runs

STOPPED = "the runner stops"
ALONE = "run_one"  #: id of the worker where there is no store


def current() -> Context | None:
    """The context of the rollout that the calling code runs for, however deep; None outside of an agent."""
    return _current.get()


def any_at_work() -> Context | None:
    """The context of some rollout whose agent runs in this process, None if there is none."""
    while _at_work:
        try:
            return next(iter(_at_work), None)
        except RuntimeError:  # another thread has changed it at this moment
            continue
    return None


@contextmanager
def apart(thread: threading.Thread | None = None) -> Iterator[None]:
    """Say that a thread (None: this one) works for no rollout: spans that start there without one are not lost."""
    ident = threading.get_ident() if thread is None else thread.ident or 0
    _apart.append(ident)
    try:
        yield
    finally:
        _apart.remove(ident)


def is_apart() -> bool:
    """Whether somebody has said that no agent runs in this thread."""
    return threading.get_ident() in _apart


class Position:
    """Where in a rollout, and in which span of it, the calling code is: to go on from there in another thread."""

    def __init__(self) -> None:
        self._context, self._parent = _current.get(), _parent.get()

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function there; what it returns or raises."""
        context, parent = _current.set(self._context), _parent.set(self._parent)
        try:
            return function(*args, **kwargs)
        finally:
            _parent.reset(parent)
            _current.reset(context)


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
        """Note an exception, under OpenTelemetry's names, and mark the span as failed."""
        details = {
            "exception.type": type(error).__name__,
            "exception.message": text_of(error),
            "exception.stacktrace": report(error),
        }
        self.events.append(Event(name="exception", attributes=details, timestamp=time.time()))
        self.status = TraceStatus(status_code="ERROR", description=summary(error))


class _Block:
    """A block of an agent that is recorded as a span. A class, since a generator would meddle with the exceptions."""

    def __init__(self, context: Context, span: OpenSpan) -> None:
        self._context = context
        self._span = span
        self._parent_id: str | None = None
        self._started = 0.0

    def __enter__(self) -> OpenSpan:
        self._parent_id = _parent.get()
        _parent.set(self._span.span_id)
        self._started = time.time()
        return self._span

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            self._span.record_exception(error)
        if _parent.get() == self._span.span_id:  # else it is left elsewhere than entered: a generator that was closed
            _parent.set(self._parent_id)
        self._context._end(self._span, self._parent_id, self._started, time.time())


class Context:
    """The rollout that an agent runs for.

    Attributes:
        rollout: the rollout, with its attempt; `rollout.input` is the task.
        resources: the named resources of the version that was newest at the claim, by name; a name that is not there
            raises `NoSuchResourceError`, a KeyError.
        worker_id: the runner that runs it.
    """

    def __init__(
        self,
        rollout: AttemptedRollout,
        resources: Mapping[str, Any],
        worker_id: str,
        sink: Callable[[Span], None],
        lose: Callable[[Reason, str, str], None],
    ) -> None:
        self.rollout = rollout
        self.resources: _Resources = _Resources(resources, _source_of(rollout, worker_id))
        self.worker_id = worker_id
        self._trace_id = token_hex(16)
        self._cancelled: str | None = None
        self._is_over = False
        self.sink = sink  #: takes the spans that have ended; for the runner
        self.lose = lose  #: takes the reason, name and story of what a trace lacks (`Losses.add`); for the runner

    @property
    def attempt(self) -> Attempt:
        """The attempt that this is."""
        return self.rollout.attempt

    @property
    def policy_version(self) -> int | None:
        """Version of the weights that the resources stand for, as the driver published them."""
        return self.attempt.policy_version

    # -- spans and rewards -------------------------------------------------------------------------------------------

    def span(self, name: str, /, **attributes: Any) -> AbstractContextManager[OpenSpan]:
        """Record what the block does as a span; an exception is noted on it and goes on.

        Attributes may have any names, also `name`. A block that is left since its generator was closed has not failed;
        one that is never left is no span.
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
        """Record one call of a model, for `raystore.triplets` to find.

        Args:
            prompt_ids: token ids of the prompt: a list, numpy array or tensor of one dimension. Kept packed.
            response_ids: token ids that the model generated.
            logprobs: of each token of the response under the policy that generated it, natural logarithm.
            model: its name; None takes that of the rollout's `LLM` resource, if it has just one.
            prompt, response: the texts or messages, for people to read.
            finish_reason: why the model stopped ("stop", "length", ...).
            operation: "chat" or "text_completion".
            start_time: when the call began, seconds since the epoch; None for "just now".
            attributes: whatever else is to be known.

        Names are those of OpenTelemetry's GenAI conventions (`raystore.semconv`). Raises `InvalidValueError` for what
        is no sequence of numbers, for NaN, and for log-probabilities that are not as many as the response's tokens.
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
        self._end(span, _parent.get(), now if start_time is None else start_time, now)

    def reward(self, value: float, /, **dimensions: float) -> None:
        """Emit the reward of the rollout; `dimensions` are further values, of any names, beside the reward."""
        attributes: dict[str, Any] = {}
        for index, (name, number) in enumerate([("reward", value), *dimensions.items()]):
            attributes[f"{semconv.REWARD_PREFIX}{index}.name"] = name
            attributes[f"{semconv.REWARD_PREFIX}{index}.value"] = plain.reward(name, number)
        now = time.time()
        self._end(OpenSpan(semconv.REWARD_SPAN, attributes), _parent.get(), now, now)

    def add(self, span: Span) -> None:
        """Take a span that was made elsewhere; it is given to this attempt."""
        ids = {"rollout_id": self.rollout.rollout_id, "attempt_id": self.attempt.attempt_id}
        self.sink(span.model_copy(update=ids))

    def _end(self, span: OpenSpan, parent_id: str | None, started: float, ended: float) -> None:
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

    # -- cancellation ------------------------------------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether the work is of no use any more: cancelled, timed out, or superseded."""
        return self._cancelled is not None

    @property
    def why(self) -> str | None:
        """Why the work is of no use any more: "cancelled", "timeout", "superseded"; None while it is of use."""
        return self._cancelled

    @property
    def stopped(self) -> bool:
        """Whether the runner stops, and gives the work back."""
        return self._cancelled == STOPPED

    def check(self) -> None:
        """Raise `asyncio.CancelledError` if the work is of no use any more; for agents that are not async."""
        if self._cancelled is not None:
            raise asyncio.CancelledError(self._cancelled)

    def cancel(self, why: str) -> None:
        """Mark the work as of no use; for the runner."""
        self._cancelled = why

    def enter(self) -> None:
        """Make this the context that `current` finds, in the calling code's context variables; for the runner."""
        _current.set(self)
        _parent.set(None)
        _at_work[self] = None
        if self._is_over:  # since then, on another thread
            _at_work.pop(self, None)

    def leave(self) -> None:
        """The agent's call has ended, or is not waited for any longer; for the runner."""
        self._is_over = True
        _at_work.pop(self, None)
