"""What an agent sees of its rollout: the task's resources, spans, the reward, and whether it was cancelled.

Spans are kept here until the runner sends them; they nest by context variable, so that concurrent rollouts of one
process do not mix.
Not here: claiming, sending, reporting (`worker`).
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from secrets import token_hex
from typing import Any

from raystore.errors import InvalidValueError
from raystore.spans import REWARD_PREFIX, REWARD_SPAN, Event, Span, TraceStatus
from raystore.types import Attempt, AttemptedRollout

_current: ContextVar[Context | None] = ContextVar("raystore_context", default=None)
_parent: ContextVar[str | None] = ContextVar("raystore_span", default=None)

STOPPED = "the runner stops"

_SCALARS = (str, bool, int, float)


def current() -> Context | None:
    """The context of the rollout that the calling code runs for, however deep; None outside of an agent."""
    return _current.get()


def _attribute(value: Any) -> Any:
    """A value as OpenTelemetry takes it: a scalar or a list of one kind of scalar, anything else as JSON text."""
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], _SCALARS):
        if all(type(item) is type(value[0]) for item in value):
            return list(value)
    return json.dumps(value, default=repr)


class OpenSpan:
    """A span while it is open."""

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        self.name = name
        self.span_id = token_hex(8)
        self.attributes = {key: _attribute(value) for key, value in attributes.items()}
        self.events: list[Event] = []
        self.status = TraceStatus(status_code="OK")

    def set(self, key: str, value: Any) -> None:
        """Set one attribute."""
        self.attributes[key] = _attribute(value)

    def update(self, attributes: dict[str, Any]) -> None:
        """Set several attributes."""
        for key, value in attributes.items():
            self.set(key, value)

    def record_exception(self, error: BaseException) -> None:
        """Note an exception, under OpenTelemetry's names, and mark the span as failed."""
        details = {
            "exception.type": type(error).__name__,
            "exception.message": str(error),
            "exception.stacktrace": "".join(traceback.format_exception(error)),
        }
        self.events.append(Event(name="exception", attributes=details, timestamp=time.time()))
        self.status = TraceStatus(status_code="ERROR", description=f"{type(error).__name__}: {error}")


class Context:
    """The rollout that an agent runs for.

    Attributes:
        rollout: the rollout, with its attempt; `rollout.input` is the task.
        resources: the named resources of the version that was newest at the claim, by name.
        worker_id: the runner that runs it.
    """

    def __init__(self, rollout: AttemptedRollout, resources: dict[str, Any], worker_id: str) -> None:
        self.rollout = rollout
        self.resources = resources  #: by name, of the version that was newest at the claim
        self.worker_id = worker_id
        self._trace_id = token_hex(16)
        self._cancelled: str | None = None
        self._lock = threading.Lock()
        self._spans: list[Span] = []

    @property
    def attempt(self) -> Attempt:
        """The attempt that this is."""
        return self.rollout.attempt

    @property
    def policy_version(self) -> int | None:
        """Version of the weights that the resources stand for, as the driver published them."""
        return self.attempt.policy_version

    # -- spans and rewards -------------------------------------------------------------------------------------------

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[OpenSpan]:
        """Record what the block does as a span; an exception is noted on it and goes on."""
        span = OpenSpan(name, attributes)
        parent_id = _parent.get()
        token = _parent.set(span.span_id)
        started = time.time()
        try:
            yield span
        except BaseException as error:
            span.record_exception(error)
            raise
        finally:
            _parent.reset(token)
            self._add(span, parent_id, started, time.time())

    def reward(self, value: float, **dimensions: float) -> None:
        """Emit the reward of the rollout; `dimensions` are further values by name, beside the reward."""
        attributes: dict[str, Any] = {}
        for index, (name, number) in enumerate({"reward": value, **dimensions}.items()):
            if not hasattr(number, "__float__") or math.isnan(float(number)):
                raise InvalidValueError(name, number, "a number, not NaN")
            attributes[f"{REWARD_PREFIX}{index}.name"] = name
            attributes[f"{REWARD_PREFIX}{index}.value"] = float(number)
        now = time.time()
        self._add(OpenSpan(REWARD_SPAN, attributes), _parent.get(), now, now)

    def add(self, span: Span) -> None:
        """Take a span that the agent made itself; it is given to this attempt."""
        span = span.model_copy(update={"rollout_id": self.rollout.rollout_id, "attempt_id": self.attempt.attempt_id})
        with self._lock:
            self._spans.append(span)

    def _add(self, span: OpenSpan, parent_id: str | None, started: float, ended: float) -> None:
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
        with self._lock:
            self._spans.append(made)

    def take_spans(self) -> list[Span]:
        """The spans that have ended since the last call; for the runner."""
        with self._lock:
            spans, self._spans = self._spans, []
            return spans

    # -- cancellation ------------------------------------------------------------------------------------------------

    @property
    def cancelled(self) -> bool:
        """Whether the work is of no use any more: cancelled, timed out, or superseded."""
        return self._cancelled is not None

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

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the context that `current` finds."""
        token = _current.set(self)
        parent = _parent.set(None)
        try:
            yield
        finally:
            _parent.reset(parent)
            _current.reset(token)
