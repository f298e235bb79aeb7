"""OpenTelemetry in process: spans that an agent makes with the OpenTelemetry SDK go to the rollout that it runs for.

An agent that is instrumented already needs no change: `rs.otel.instrument()` adds a span processor that finds the
rollout by context variable, so that concurrent rollouts of one process do not mix, and hands a span to the runner when
it ends, before the final status. Other processors and exporters of the agent go on as before. Spans that are lost are
counted, and logged once (`tracing.calls`).
Not here: receiving spans of other processes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

try:
    from opentelemetry import context as tracing
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, Tracer, TracerProvider
except ModuleNotFoundError as _why:
    raise ModuleNotFoundError(f"{_why}. raystore.otel needs the OpenTelemetry SDK: install raystore[otel]") from _why

from raystore.core.schema import LossReason
from raystore.errors import InvalidValueError
from raystore.errors.text import summary
from raystore.runner.context import Position, any_running, current, is_outside_rollouts
from raystore.tracing import semconv
from raystore.tracing.dialects import is_model_call
from raystore.types.spans import Span

OPEN_SPANS: int = 100_000  #: that a process follows; an agent that never ends its spans must not fill the memory

_lock = threading.RLock()  # a garbage collection may start a span while it is held
_instrumented: weakref.WeakSet[Any] = weakref.WeakSet()  # providers, and the processors of their tracers
_everything = False  # whether every provider of this process is instrumented
_wrapped: set[tuple[type, str]] = set()


def instrument(provider: TracerProvider | None = None) -> TracerProvider:
    """Send the spans of this process, or of one tracer provider, to the rollouts in which they start.

    Call it in the process that runs the agent: in the agent itself, in `setup`, or in the module of the agent. Calling
    it again changes nothing. Spans that start outside of a rollout are left alone. From then on a
    `concurrent.futures.ThreadPoolExecutor` (and so `loop.run_in_executor`) passes the rollout, the enclosing span and
    OpenTelemetry's context on to functions that are submitted within a rollout. In another thread, without the agent's
    context, a span belongs to the rollout of its parent, if it has one that has not ended; else it is lost. Lost spans
    are counted (`statistics()["spans_lost"]`) and logged once, also those that a sampler drops or a disabled SDK does
    not make.

    Args:
        provider: only this one. None means all of this process, also those that are made later: the global one, and
            those of libraries. If no global one was set, an SDK provider is made and set; the agent may still set
            another one later.

    Returns the provider, the global one for None. Raises `InvalidValueError` for a provider that takes no span
    processors.
    """
    global _everything
    with _lock:
        chosen: Any = trace.get_tracer_provider() if provider is None else provider
        if provider is None and isinstance(chosen, trace.ProxyTracerProvider):  # the API's placeholder
            chosen = _set_global(TracerProvider())
        is_off = provider is None and isinstance(chosen, trace.NoOpTracerProvider)
        if not is_off:
            _add_processor(chosen)
        _wrap(Tracer, "start_span", _watched)
        _wrap(trace.NoOpTracer, "start_span", _not_made)
        if "start_span" not in inspect.unwrap(trace.NoOpTracer.start_as_current_span).__code__.co_names:  # older ones
            _wrap(trace.NoOpTracer, "start_as_current_span", _not_made)
        _wrap(concurrent.futures.ThreadPoolExecutor, "submit", _handing_on)
        _everything = _everything or provider is None
        return chosen  # type: ignore[no-any-return]


def _set_global(made: TracerProvider) -> Any:
    """Make it the global provider by OpenTelemetry's variable: its function works once, and the agent may need it."""
    if hasattr(trace, "_TRACER_PROVIDER"):
        trace._TRACER_PROVIDER = made
    else:
        trace.set_tracer_provider(made)
    return trace.get_tracer_provider()


def _add_processor(provider: Any) -> None:
    if provider in _instrumented:
        return
    if not hasattr(provider, "add_span_processor"):
        raise InvalidValueError("provider", provider, "a TracerProvider of the OpenTelemetry SDK")
    provider.add_span_processor(_processor)
    _instrumented.add(provider)
    pipeline = getattr(provider.get_tracer(__name__), "span_processor", None)
    if pipeline is not None:  # the SDK is not disabled
        _instrumented.add(pipeline)


# -- what is wrapped, once in a process --------------------------------------------------------------------------------


def _wrap(cls: type, name: str, wrapper: Callable[[Any], Any]) -> None:
    if (cls, name) not in _wrapped:
        _wrapped.add((cls, name))
        setattr(cls, name, wrapper(getattr(cls, name)))


def _watched(start_span: Any) -> Any:
    """Wrap `Tracer.start_span` of the SDK: instrument its provider in time, and count spans that are not recorded."""

    @functools.wraps(start_span)
    def watched(self: Any, name: str, context: Any = None, *args: Any, **kwargs: Any) -> Any:
        rollout = current()
        is_seen = (rollout is not None or any_running() is not None) and _is_instrumented(self)
        span = start_span(self, name, context, *args, **kwargs)
        if is_seen and rollout is not None and not span.is_recording():
            identity = span.get_span_context()
            if identity != trace.get_current_span(context).get_span_context():  # else this tracer is switched off
                who = f"the sampler {type(self.sampler).__name__}"
                _lose(
                    rollout.lose, "sampled_out", name, f"of rollout {rollout.rollout.rollout_id} was dropped by {who}"
                )
        return span

    return watched


def _is_instrumented(tracer: Any) -> bool:
    """Whether the spans of a tracer come here; instruments it if every provider is to be instrumented."""
    pipeline: Any = getattr(tracer, "span_processor", None)
    if pipeline in _instrumented:
        return True
    if not _everything or not hasattr(pipeline, "add_span_processor"):
        return False
    with _lock:
        if pipeline not in _instrumented:
            pipeline.add_span_processor(_processor)
            _instrumented.add(pipeline)
    return True


def _not_made(start_span: Any) -> Any:
    """Wrap a method of `NoOpTracer`; a span is lost only if tracing as a whole is off, since libraries use it too."""

    @functools.wraps(start_span)
    def not_made(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if (rollout := current()) is not None and _is_switched_off():
            story = f"of rollout {rollout.rollout.rollout_id} is not made: OpenTelemetry is switched off"
            _lose(rollout.lose, "sdk_disabled", name, story)
        return start_span(self, name, *args, **kwargs)

    return not_made


def _is_switched_off() -> bool:
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return is_disabled or isinstance(trace.get_tracer_provider(), trace.NoOpTracerProvider)


def _handing_on(submit: Any) -> Any:
    """Wrap `ThreadPoolExecutor.submit`, so that a function that is submitted within a rollout also runs within it."""
    no_threads = getattr(concurrent.futures, "InterpreterPoolExecutor", ())  # a subclass

    @functools.wraps(submit)
    def handing_on(self: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if current() is not None and not isinstance(self, no_threads):
            function = functools.partial(_go_on, Position(), tracing.get_current(), function)
        return submit(self, function, *args, **kwargs)

    return handing_on


def _go_on(position: Position, traced: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    token = tracing.attach(traced)
    try:
        return position.run(function, *args, **kwargs)
    finally:
        tracing.detach(token)


def _lose(lose: Callable[[LossReason, str, str], None], reason: LossReason, name: str, story: str) -> None:
    lose(reason, name, f"Span {name!r} {story}")


# -- spans as they start and end ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Open:
    """A span that has not ended, and what it needs when it ends; not the rollout's context, which may end before."""

    span: weakref.ref[Any]  # a span that is collected without an end is forgotten
    rollout_id: str
    attempt_id: str
    policy_version: int | None
    sink: Callable[[Span], None]
    lose: Callable[[LossReason, str, str], None]


class RolloutSpanProcessor(SpanProcessor):
    """Hands each span that ends to the rollout in which it started; a span that never ends keeps no rollout alive.

    One processor serves all providers of a process: the parent of a span may be of another provider, and a span that
    two providers hand over is taken once.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], _Open] = {}
        self._outside: dict[tuple[int, int], weakref.ref[Any]] = {}  # open spans that started in no rollout

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        key = _key(span.context)
        given_up = weakref.ref(span, functools.partial(_forget, self._open, key))
        if (context := current()) is not None:
            ids = (context.rollout.rollout_id, context.attempt.attempt_id)
            self._open[key] = _Open(given_up, *ids, context.policy_version, context.sink, context.lose)
        elif span.parent is not None and (parent := self._open.get(_key(span.parent))) is not None:
            self._open[key] = dataclasses.replace(parent, span=given_up)
        elif (somebody := any_running()) is None or self._is_outside(span):
            self._outside[key] = weakref.ref(span, functools.partial(_forget, self._outside, key))
        else:  # an agent may have started it
            where = f"in thread {threading.current_thread().name!r}, which knows no rollout"
            _lose(somebody.lose, "no_context", span.name, f"is lost: it started {where}, while agents ran")
        if len(self._open) > OPEN_SPANS:
            self._drop_oldest()

    def _is_outside(self, span: Any) -> bool:
        """Whether a span is of no agent though one runs: its thread runs none, or its parent is outside of rollouts."""
        return is_outside_rollouts() or (span.parent is not None and _key(span.parent) in self._outside)

    def _drop_oldest(self) -> None:
        place = self._open.pop(next(iter(self._open), None), None)  # type: ignore[arg-type]
        span = None if place is None else place.span()
        if place is not None and span is not None:
            story = f"of rollout {place.rollout_id} is lost: {OPEN_SPANS} spans that have not ended are newer"
            _lose(place.lose, "too_many_open", span.name, story)

    def on_end(self, span: ReadableSpan) -> None:
        key = _key(span.context)
        place = self._open.pop(key, None)
        if place is None:
            self._outside.pop(key, None)
            return
        try:
            made = Span.from_opentelemetry(span, place.rollout_id, place.attempt_id, 0)
            if place.policy_version is not None and is_model_call(made.name, made.attributes):
                made.attributes[semconv.POLICY_VERSION] = place.policy_version  # for `triplets`
            place.sink(made)
        except Exception as error:  # the agent has done nothing wrong, and must not fail for its trace
            story = f"of rollout {place.rollout_id} cannot be recorded: {summary(error)}"
            _lose(place.lose, "not_convertible", span.name, story)

    def shutdown(self) -> None:
        """Do nothing: other providers go on, and open spans of this one may still end."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True  # nothing waits here


_processor = RolloutSpanProcessor()


def _key(identity: Any) -> tuple[int, int]:
    return identity.trace_id, identity.span_id


def _forget(opened: dict[tuple[int, int], Any], key: tuple[int, int], span: object) -> None:
    """Forget a span that was collected without an end."""
    opened.pop(key, None)
