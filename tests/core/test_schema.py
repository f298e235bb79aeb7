"""Schemas: what annotations let in, and that what is said of the rest names it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Required, TypedDict, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystore.core import schema
from raystore.core.payload import Payload
from raystore.core.records import Span
from raystore.core.schema import Id, Part, Row, Rule, Schema, Seconds, Tags, Value, Whole
from raystore.core.verbs import VERBS
from raystore.errors import InvalidValueError
from raystore.service.service import PROCESS_VERBS


class Changes(TypedDict, total=False):
    status: Required[Literal["running", "failed"]]
    worker_id: Id | None
    value: Value


Pair = Annotated[list[Any], Row((("number", Annotated[int, Rule("{v} < 9", "less than 9")]), ("name", str | None)))]


def everything(
    *,
    id: Id,
    wait: Seconds | None,
    changes: Changes,
    rows: list[Pair],
    tags: Tags,
    flag: bool = False,
    limit: Whole = 0,
    chain: Part | None = None,
) -> None:
    """A function with one of each."""


SCHEMA = Schema(everything)
GOOD = {"id": "a", "wait": 1.5, "changes": {"status": "failed"}, "rows": [[1, "x"], (2, None)], "tags": {"k": 1}}

scalars = st.sampled_from(
    [None, True, False, 0, 1, -1, 9, 2**63 - 1, 2**63, -(2**63) - 1, 0.0, 1.5, -0.5, math.nan, math.inf, "", "a",
     "failed", "running", "a\nb", "\ud800", "x" * 513, b"", b"\x01", Payload(b"\x01", ()), object()]
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["status", "worker_id", "value", "k", "", 1]), inner, max_size=3)
    ),
    max_leaves=6,
)
arguments = st.fixed_dictionaries(
    {}, optional={name: values | (st.just(GOOD[name]) if name in GOOD else st.nothing()) for name in SCHEMA.names}
) | values.flatmap(
    lambda value: st.sampled_from([*sorted(SCHEMA.names), "other"]).map(lambda name: GOOD | {name: value})
)


@settings(max_examples=60, deadline=None)
@given(arguments)
def test_what_does_not_fit_is_named(given: Any) -> None:
    """The quick look and the slow one agree, and neither fails, whatever comes in."""
    refusal = SCHEMA.refusal("verb", given)
    if SCHEMA.fits(given):
        assert refusal.args[2] == SCHEMA._node.expected  # nothing was found
        return
    name = refusal.args[0].split(".")[0].split("[")[0]  # of what stands highest
    assert name in given or name in SCHEMA.names
    assert len(str(refusal)) < 2_000


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"id": ""}, "id=''"),
        ({"id": ["a"]}, "id=<list ['a']> is not valid: expected text"),
        ({"wait": math.nan}, "wait=nan"),
        ({"changes": {}}, "changes.status=None is not valid: expected a value, which is missing"),
        ({"changes": {"status": "failed", "worker_id": ""}}, "changes.worker_id=''"),
        ({"changes": {"status": "failed", "more": 1}}, "changes.more=1"),
        ({"rows": [[1, "x"], [9, None]]}, "rows[1].number=9 is not valid: expected less than 9"),
        ({"rows": [[1]]}, "rows[0]=<list [1]>"),
        ({"tags": {"k": [1]}}, "tags['k']=<list [1]>"),
        ({"tags": {str(i): i for i in range(17)}}, "at most 16 tags"),
        ({"flag": 1}, "flag=1 is not valid: expected True or False"),
        ({"limit": True}, "limit=True"),
        ({"limit": 2**63}, "expected a whole number"),
        ({"chain": [1]}, "chain=<list [1]>"),
        ({"more": 1}, "more=1"),
    ],
    ids=str,
)
def test_what_is_said(wrong: Any, named: str) -> None:
    """Argument, value, and expectation."""
    assert not SCHEMA.fits(GOOD | wrong)
    with pytest.raises(InvalidValueError) as raised:
        raise SCHEMA.refusal("verb", GOOD | wrong)
    assert named in str(raised.value)


def test_a_value_is_shown_briefly_and_once() -> None:
    """An error that crosses to a client and back says the same, and carries no megabytes."""
    for value in ("x" * 10**6, ["x" * 10**6] * 8, {"a": {"b": ["c" * 10**5]}}, 2**70, b"x" * 10**6, object()):
        error = InvalidValueError("name", value, "another")
        assert len(str(error)) < 300
        assert InvalidValueError(*error.args).args == error.args


def test_a_row_of_a_span_is_its_record() -> None:
    """In the order of the record, behind rollout and attempt."""
    _, row = get_args(schema.SpanRow)
    assert [name for name, _ in row.columns] == [*Span.__dataclass_fields__][2:]


def test_a_verb_is_in_one_table() -> None:
    """Those of the process are none of the state."""
    assert not VERBS.keys() & PROCESS_VERBS.keys()


def test_every_argument_of_every_verb_says_what_it_must_be() -> None:
    """None is left open: what the annotation does not say nobody checks."""
    open_ones = [
        (verb, name)
        for verb, spec in (VERBS | PROCESS_VERBS).items()
        for name, annotation in spec.run.__annotations__.items()
        if name in spec.schema.names and annotation in ("Any", "dict[str, Any]", "list[Any]")
    ]
    assert open_ones == []
