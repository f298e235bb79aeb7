"""What needs no store: models, their constructors and the functions beside them, made by both and compared."""

from __future__ import annotations

from typing import Any

import agentlightning.store.base as reference_base
import agentlightning.types as theirs
import pytest
from agentlightning.emitter.reward import find_final_reward
from agentlightning.store.memory import estimate_model_size
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

import raystore as rs
from raystore.types import contract as ours
from tests.lockstep.operations import readable
from tests.lockstep.sides import plain


def shown(model: Any) -> dict[str, Any]:
    """All fields of a model, those it does not declare too."""
    return plain(model, {})  # type: ignore[no-any-return]


names = st.sampled_from([None, "n"])
times = st.sampled_from([None, 0.0, 1.5])
attributes = st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["x", 1, 1.5, True, [1, 2], ["x", "y"]]))
codes = st.sampled_from(["OK", "ERROR", "UNSET", "FINE", ""])


@given(attributes, names, names, names, names, st.sampled_from([None, 0, 3]), times, times, codes)
def test_spans_from_attributes(
    given: Any, name: Any, rollout: Any, attempt: Any, parent: Any, number: Any, start: Any, end: Any, code: Any
) -> None:
    """The same span, or the same refusal, for any of the arguments; ids that are made up have the same form."""
    made = []
    for module in (ours, theirs):
        try:
            made.append(
                module.Span.from_attributes(
                    attributes=given, name=name, rollout_id=rollout, attempt_id=attempt, parent_id=parent,
                    sequence_id=number, start_time=start, end_time=end, trace_id="t", span_id="s",
                    status=module.TraceStatus(status_code=code),
                )
            )  # fmt: skip
        except ValueError as error:
            made.append(type(error))
    assert made[0] is made[1] if isinstance(made[1], type) else shown(made[0]) == shown(made[1])
    one, other = (module.Span.from_attributes(attributes={}) for module in (ours, theirs))
    assert (len(one.trace_id), len(one.span_id)) == (len(other.trace_id), len(other.span_id))
    assert (one.name, one.status.status_code) == (other.name, other.status.status_code)


@given(attributes, times, times)
def test_spans_from_core_fields(given: Any, start: Any, end: Any) -> None:
    """A span that says no start started now."""
    made = []
    for module in (ours, theirs):
        status = module.TraceStatus(status_code="OK")
        core = module.SpanCoreFields(name="n", status=status, attributes=given, start_time=start, end_time=end)
        made.append(shown(module.Span.from_core_fields(core, rollout_id="r")))
    for span in made:
        for field in ("trace_id", "span_id", "context", *([] if start else ["start_time"])):
            assert span.pop(field)
    assert made[0] == made[1]


class Kept(SpanProcessor):
    """Keeps what ends."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def on_end(self, span: Any) -> None:
        self.spans.append(span)


def test_spans_of_the_opentelemetry_sdk() -> None:
    """Field by field the same, but for the kind, which we keep, and for what belongs to the tracer, which we do not."""
    provider, kept = TracerProvider(), Kept()
    provider.add_span_processor(kept)
    tracer = provider.get_tracer("t")
    start = tracer.start_as_current_span
    with start("outer", attributes={"a": 1}) as outer, start("inner") as inner:
        inner.add_event("e", {"k": "v"})
    beyond = {"kind", "instrumentation_info", "instrumentation_scope"}
    tracers = {"sampler", "trace_config", "record_exception", "set_status_on_exception", "limits", "lock"}
    for source in (*kept.spans, outer, inner, readable(3)):
        one, other = (shown(module.Span.from_opentelemetry(source, "r", "a", 1)) for module in (ours, theirs))
        assert one.keys() - other.keys() <= beyond and other.keys() - one.keys() <= {*tracers, "record_end_metrics"}
        both = one.keys() & other.keys()
        assert {name: one[name] for name in both} == {name: other[name] for name in both}


@given(st.lists(st.sampled_from("abc"), max_size=3), st.sampled_from([-1, 0, 2]), st.integers(0, 3))
def test_pages(items: Any, limit: Any, offset: Any) -> None:
    """They show themselves and are gone through alike; only ours equals a list."""
    one, other = (m.PaginatedResult(items=items, limit=limit, offset=offset, total=9) for m in (ours, theirs))
    assert repr(one) == repr(other) and list(one) == list(other) and len(one) == len(other) and one[:1] == other[:1]
    assert one == items and other != items


@pytest.mark.parametrize("status", ours.RolloutStatus.__args__)  # type: ignore[attr-defined]
def test_predicates(status: Any) -> None:
    """Which statuses wait, run and have ended."""
    one, other = (m.Rollout(rollout_id="r", input=1, start_time=0.0, status=status) for m in (ours, theirs))
    for name in ("is_queuing", "is_running", "is_finished"):
        assert getattr(rs, name)(one) is getattr(reference_base, name)(other)


@given(attributes)
def test_the_estimate_of_a_size(given: Any) -> None:
    """To the byte, for what is the same object."""
    assert rs.estimate_model_size(given) == estimate_model_size(given)


def test_the_final_reward() -> None:
    """The same in all forms that the reference knows, and its first span name besides."""
    primary = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 0.5}
    output = {"agentops.task.output": '{"type": "reward", "value": 0.5}'}
    entity = {"agentops.entity.output": '{"type": "reward", "value": 0.5}'}
    for name, attributes, theirs_too in (
        ("agentlightning.annotation", primary, True),
        ("agentlightning.annotation", {"reward": 0.5}, True),
        ("call", primary, True),
        ("call", output, True),
        ("call", entity, True),
        ("agentlightning.reward", {"reward": 0.5}, False),
        ("agentlightning.annotation", {"other": 1}, None),
        ("call", {"reward": 0.5}, None),
        ("call", {"agentops.task.output": '{"type": "score", "value": 0.5}'}, None),
    ):
        one, other = (m.Span.from_attributes(attributes=attributes, name=name) for m in (ours, theirs))
        found = (rs.find_final_reward([one]), find_final_reward([other]))
        assert found == {True: (0.5, 0.5), None: (None, None), False: (0.5, None)}[theirs_too]


def test_urls_of_a_proxy() -> None:
    """With and without `/v1`, and both ids or none."""
    for endpoint in ("http://h:1/v1", "http://h:1", "http://h:1/v1/"):
        one, other = (m.ProxyLLM(endpoint=endpoint, model="m") for m in (ours, theirs))
        assert one.get_base_url("r", "a") == other.get_base_url("r", "a")
        assert one.get_base_url(None, None) == other.get_base_url(None, None) == one.get_base_url()
        for llm in (one, other):
            with pytest.raises(ValueError):
                llm.get_base_url("r", None)
