"""Types, records, the contract and its blocking twin agree with each other."""

from __future__ import annotations

import inspect
import pickle
import time
from array import array
from dataclasses import fields
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import ValidationError

import raystore as rs
from raystore import api
from raystore.client import sync
from raystore.client.client import StoreClient
from raystore.core import records
from raystore.core.payload import Payload
from raystore.types import contract as types
from raystore.wire import convert
from raystore.wire.codec import decode, encode, is_pickled
from tests.conftest import MakeMemoryStore
from tests.helpers import present


@pytest.mark.parametrize(
    ("record", "model"),
    [
        (records.Rollout, types.Rollout), (records.Attempt, types.Attempt), (records.Worker, types.Worker),
        (records.Config, types.RolloutConfig), (records.Change, types.Change), (records.Group, types.Group),
    ],
    ids=lambda c: c.__module__,
)  # fmt: skip
def test_records_and_models_have_the_same_fields(record: Any, model: Any) -> None:
    """In the same order, since a record travels as its row."""
    assert [field.name for field in fields(record)] == list(model.model_fields)


def test_span_record_carries_the_index_of_a_span() -> None:
    """What queries filter and sort by is beside the body."""
    names = {field.name for field in fields(records.Span)}
    assert names - {"body", "size", "reward"} <= set(types.Span.model_fields)


def test_each_method_that_is_awaited_has_a_blocking_twin() -> None:
    """With its name, signature and text; and nothing else has one."""
    awaited = {
        name
        for name, method in vars(api.LightningStore).items()
        if inspect.iscoroutinefunction(method) or "AsyncIterator" in str(getattr(method, "__annotations__", {}))
    }
    assert {name for name in vars(sync.SyncStore) if name[0] != "_"} == awaited
    for name in awaited:
        ours, theirs = getattr(sync.SyncStore, name), getattr(api.LightningStore, name)
        assert ours.__name__ == name and inspect.signature(ours) == inspect.signature(theirs) and ours.__doc__


def test_the_client_has_the_signatures_of_the_contract() -> None:
    """Every method, with the same parameters and defaults."""
    for name, method in {**vars(api.LightningStore), **vars(api.RunnerStore)}.items():
        if not name.startswith("_") and inspect.isfunction(method):
            ours = inspect.signature(getattr(StoreClient, name))
            assert str(ours) == str(inspect.signature(method)), name
            assert method.__doc__, name


def test_models_built_without_validation_equal_validated_ones(make_memory_store: MakeMemoryStore) -> None:
    """Answers are built by hand; validating their dump again gives equal objects."""
    store = make_memory_store()
    config = rs.RolloutConfig(timeout_seconds=9, max_attempts=2, retry_condition=["failed"])
    store.sync.enqueue_rollout({"q": [1]}, "train", None, config, {"m": 1}, group_id="g", tags={"t": 1}, priority=2)
    store.sync.update_resources("r", {"p": rs.PromptTemplate(template="x", engine="f-string")}, policy_version=1)
    claimed = present(store.sync.dequeue_rollout("w"))
    store.sync.update_worker("w", {"cpu": 1})
    answers: list[Any] = [
        claimed,
        store.sync.query_rollouts()[0],
        store.sync.get_latest_attempt(claimed.rollout_id),
        store.sync.get_worker_by_id("w"),
        store.sync.get_latest_resources(),
        store.sync.changes().items[0],
    ]
    for answer in answers:
        again = type(answer).model_validate(answer.model_dump())
        assert again == answer and answer.model_copy(deep=True) == answer
        assert pickle.loads(pickle.dumps(answer)) == answer
        assert repr(again) == repr(answer)


def test_attempted_rollout_belongs_together() -> None:
    """An attempt of another rollout is refused."""
    attempt = types.Attempt(rollout_id="a", attempt_id="x", sequence_id=1, start_time=0.0)
    with pytest.raises(ValidationError, match="does not belong"):
        types.AttemptedRollout(rollout_id="b", input=1, start_time=0.0, attempt=attempt)


def test_unset_is_one_object() -> None:
    """Also after pickling; a reader sees what it is."""
    assert pickle.loads(pickle.dumps(types.UNSET)) is types.UNSET
    assert repr(types.UNSET) == "UNSET" and isinstance(types.UNSET, types.Unset)


def test_paginated_result_is_a_sequence() -> None:
    """It has a length, items, slices, and equals a list of the same items."""
    page = types.PaginatedResult(items=["a", "b", "c", "d"], limit=4, offset=1, total=9)
    assert page == ["a", "b", "c", "d"] and page != ["a"] and page[1:3] == ["b", "c"] and list(page) == page.items
    assert page == types.PaginatedResult(items=["a", "b", "c", "d"], limit=4, offset=1, total=9)
    empty: types.PaginatedResult[str] = types.PaginatedResult(items=[], limit=-1, offset=0, total=0)
    assert empty == [] and not empty


def test_estimate_model_size_counts_as_the_reference() -> None:
    """Recursive getsizeof: values but not keys, extras not counted, shared objects each time."""
    import sys

    span = types.Span.from_attributes(attributes={"k": "value", "l": [1, 2]})
    expected = sys.getsizeof(span)
    for value in span.__dict__.values():
        expected += rs.estimate_model_size(value)
    assert rs.estimate_model_size(span) == expected
    assert rs.estimate_model_size({"k": "v"}) == sys.getsizeof({"k": "v"}) + sys.getsizeof("v")
    assert rs.estimate_model_size([5, (6,)]) == sys.getsizeof([5, (6,)]) + sys.getsizeof(5) + sys.getsizeof(
        (6,)
    ) + sys.getsizeof(6)


def test_span_from_a_mock_and_its_times() -> None:
    """Nanoseconds become seconds, 0 and None mean unknown; what else the source carries is kept as text."""
    context = Mock(trace_id=1, span_id=2, is_remote=False, trace_state={})
    source = Mock(
        attributes={"a": 1}, events=[], links=[], start_time=1_700_000_000_000_000_000, end_time=0,
    )  # fmt: skip
    source.name, source.parent = "n", None  # words that Mock takes for itself
    source.status.status_code.name = "OK"
    source.status.description = None
    source.get_span_context.return_value = context
    source.resource.attributes, source.resource.schema_url = {}, ""
    source.extra_thing = object
    span = types.Span.from_opentelemetry(source, "r", "a", 3)
    assert (span.trace_id, span.span_id) == ("0" * 31 + "1", "0" * 15 + "2")
    assert (span.start_time, span.end_time, span.sequence_id) == (1_700_000_000.0, None, 3)
    assert "extra_thing" in present(span.__pydantic_extra__)


def test_span_from_core_fields() -> None:
    """What an agent says of a span, and ids made up for the rest; one without a start started now."""
    status = types.TraceStatus(status_code="ERROR", description="d")
    core = types.SpanCoreFields(name="n", status=status, attributes={"a": 1}, start_time=1.0, end_time=None)
    span = types.Span.from_core_fields(core, rollout_id="r", attempt_id="a", sequence_id=4)
    assert (span.name, span.status, span.attributes, span.start_time, span.end_time) == (
        "n",
        status,
        {"a": 1},
        1.0,
        None,
    )
    assert (span.rollout_id, span.attempt_id, span.sequence_id) == ("r", "a", 4)
    assert len(span.trace_id) == 32 and len(span.span_id) == 16
    before = time.time()
    nameless = types.Span.from_core_fields(core.model_copy(update={"start_time": None}))
    assert before <= present(nameless.start_time) <= time.time()
    assert (nameless.rollout_id, nameless.attempt_id, nameless.sequence_id) == ("", "", 0)
    assert types.Span.from_attributes(attributes={}).name == "agentlightning.virtual"


@pytest.mark.parametrize("code", ["FINE", "ok", "", None, 1])
def test_a_status_is_one_of_opentelemetrys(code: Any) -> None:
    """UNSET, OK or ERROR, and no other text."""
    with pytest.raises(ValidationError, match="status_code"):
        types.TraceStatus(status_code=code)


def test_prompt_templates() -> None:
    """Only f-strings are built in."""
    assert rs.PromptTemplate(template="{a}", engine="f-string").format(a=1) == "1"
    with pytest.raises(NotImplementedError, match="jinja"):
        rs.PromptTemplate(template="x", engine="jinja").format()


def test_proxy_llm_urls(caplog: pytest.LogCaptureFixture) -> None:
    """The ids go before /v1; one of them alone is a mistake; reading the bare endpoint warns."""
    proxy = rs.ProxyLLM(endpoint="http://h:1/v1", model="m")
    assert proxy.get_base_url("r", "a") == "http://h:1/rollout/r/attempt/a/v1"
    assert proxy.get_base_url() == "http://h:1/v1"
    assert rs.ProxyLLM(endpoint="http://h:1", model="m").get_base_url("r", "a") == "http://h:1/rollout/r/attempt/a"
    with pytest.raises(ValueError, match="both or neither"):
        proxy.get_base_url("r")
    assert "ProxyLLM.endpoint" not in caplog.text
    assert proxy.endpoint and "ProxyLLM.endpoint" in caplog.text


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, True), (True, True), (2**63, True), (1.5, True), ("x", True), (b"x", True), ([1, [2]], True),
        ({"a": {1: 2}}, True), ((1, ("a", [2])), True), (array("f", [0.5]), True), (2**70, False), ((2**70,), False),
        ("\ud800", False), (bytearray(b"x"), False), (array("u", "x"), False), ({"a": bytearray(b"x")}, False),
        ({(1, 2): 3}, False), ({1, 2}, False), (memoryview, False), (-(2**63), True),
    ],
    ids=repr,
)  # fmt: skip
def test_payloads_round_trip_with_their_types(value: Any, plain: bool) -> None:
    """Plain data travels as msgpack, everything else pickled; both come back as they were."""
    payload = encode(value, "value", 10**6)
    assert is_pickled(payload) is not plain
    assert decode(payload) == value and type(decode(payload)) is type(value)


def test_deep_values_are_pickled() -> None:
    """A nesting that msgpack would refuse still works."""
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    assert decode(encode(deep, "value", 10**6)) == deep


def test_a_payload_of_another_version_says_so() -> None:
    """An unknown tag is an error, not a guess."""
    with pytest.raises(ValueError, match="another version"):
        decode(b"\x07x")
    assert is_pickled(Payload(b"\x02x", ()))


def test_rows_and_records_decode_alike() -> None:
    """A record, and its row from the wire, give the same public object."""
    record = records.Attempt("r", "a", 1, 0.0, None, "running", None, None, None, None, None, None, None, None)
    assert convert.to_attempt(record) == convert.to_attempt(list(record.row()))


def test_every_method_of_a_store_says_what_it_does() -> None:
    """`help` on a store's method gives the contract's words."""
    silent = [
        f"{cls.__name__}.{name}"
        for cls in (rs.InMemoryLightningStore, rs.RayLightningStore)
        for name, _ in inspect.getmembers(rs.LightningStore, inspect.isfunction)
        if not name.startswith("_") and not getattr(cls, name).__doc__
    ]
    assert silent == []
