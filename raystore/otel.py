"""OpenTelemetry in process: spans that an agent emits with the OpenTelemetry SDK go to the rollout that it runs for.

An agent that is instrumented already needs no change: `raystore.otel.instrument()` adds a span processor that finds the
rollout by context variable, so concurrent rollouts of one process do not mix, and hands a span to the runner when it
ends, so the final status never overtakes it. Other processors and exporters of the agent go on as before.
Not here: converting a span (`Span.from_opentelemetry`), receiving spans of other processes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}. raystore.otel needs the OpenTelemetry SDK: install raystore[otel]") from error

from raystore import semconv
from raystore.dialects import is_model_call
from raystore.errors import InvalidValueError
from raystore.runner.context import current
from raystore.spans import Span

logger = logging.getLogger("raystore.otel")

OPEN_SPANS = 100_000  #: of a process that are followed; an agent that never ends its spans must not fill the memory

_lock = threading.Lock()
_instrumented: weakref.WeakSet[Any] = weakref.WeakSet()


def instrument(provider: TracerProvider | None = None) -> TracerProvider:
    """Send the spans of a tracer provider to the rollouts in which they start; returns the provider.

    Call it in the process that runs the agent: in the agent itself, in `setup`, or in the module of the agent. Calling
    it again changes nothing. Spans that start outside of a rollout are left alone. A span that starts in a thread that
    was not given the agent's context is found by its parent, if it has one.

    Args:
        provider: None means the global one; if none was set, an SDK provider is made and set. An agent that sets its
            own global provider must do so before.

    Raises `InvalidValueError` for a provider to which no span processor can be added.
    """
    with _lock:
        chosen: Any = trace.get_tracer_provider() if provider is None else provider
        if provider is None and not hasattr(chosen, "add_span_processor"):  # the API's placeholder
            chosen = TracerProvider()
            trace.set_tracer_provider(chosen)
        if not hasattr(chosen, "add_span_processor"):
            raise InvalidValueError("provider", provider, "a TracerProvider of the OpenTelemetry SDK")
        if chosen not in _instrumented:
            chosen.add_span_processor(RolloutSpanProcessor())
            _instrumented.add(chosen)
        return chosen  # type: ignore[no-any-return]


@dataclass(slots=True)
class _Open:
    """A span that has not ended, and where it goes when it does: not the rollout itself, which may end before it."""

    span: weakref.ref[Any]  # with the span that is given up, this goes
    rollout_id: str
    attempt_id: str
    policy_version: int | None
    sink: Callable[[Span], None]


class RolloutSpanProcessor(SpanProcessor):
    """Hands each span that ends to the rollout in which it started; one that never ends keeps nothing of it."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], _Open] = {}

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        key = (span.context.trace_id, span.context.span_id)
        given_up = weakref.ref(span, functools.partial(_forget, self._open, key))
        if (context := current()) is not None:
            ids = (context.rollout.rollout_id, context.attempt.attempt_id)
            self._open[key] = _Open(given_up, *ids, context.policy_version, context.sink)
        elif span.parent is not None:
            parent = self._open.get((span.parent.trace_id, span.parent.span_id))
            if parent is None:
                return
            self._open[key] = dataclasses.replace(parent, span=given_up)
        if len(self._open) > OPEN_SPANS:
            self._open.pop(next(iter(self._open), None), None)  # type: ignore[arg-type]

    def on_end(self, span: ReadableSpan) -> None:
        identity = span.context
        place = self._open.pop((identity.trace_id, identity.span_id), None)
        if place is None:
            return
        try:
            made = Span.from_opentelemetry(span, place.rollout_id, place.attempt_id, 0)
        except Exception:  # the agent has done nothing wrong, and must not fail for its trace
            logger.exception("Span %r of rollout %s cannot be recorded", span.name, place.rollout_id)
            return
        if place.policy_version is not None and is_model_call(made.name, made.attributes):
            made.attributes[semconv.POLICY_VERSION] = place.policy_version  # for `triplets`
        place.sink(made)

    def shutdown(self) -> None:
        self._open.clear()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True  # nothing waits here


def _forget(opened: dict[tuple[int, int], _Open], key: tuple[int, int], span: object) -> None:
    """A span was given up without an end."""
    opened.pop(key, None)
