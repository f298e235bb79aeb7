"""What a verb's arguments must be, said once: by the annotations of its function.

The requests, changes, filters and rows of spans that come in with operations are such annotations too.
A schema is made of annotations and compiled to one function, which looks at types first and costs a fraction of a
microsecond; only when that says no are the arguments walked through again, to name the one that is wrong. Understood
are classes (of exactly that class: a bool is no int), unions, literals, lists, tuples, dicts, typed dicts, `Any`, and
`Annotated` with a `Rule` (beyond its type), a `Row` (a list with a type for each place) or `As` (another annotation).
Numbers are within 64 bits, and never NaN.
Not here: what the arguments mean (the verbs).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, Required, TypedDict

from raystore.core.lifecycle import AttemptStatus, Outcome, RetryOutcome, RolloutStatus
from raystore.core.payload import Payload
from raystore.errors import InvalidValueError
from raystore.errors.text import shown

ID_LENGTH = 512
MAX_TAGS = 16
MAX_PRIORITY = 2**53
MAX_SPAN_NUMBER = 2**62
MAX_RETRIES = 1_000  #: that a rule allows
MAX_BACKOFF_SECONDS = 1e6  #: eleven days; also where a rule names no longest delay
MAX_FACTOR = 1_000.0  #: by which a delay grows from one retry to the next


class Rule(NamedTuple):
    """What is asked of a value beyond its type."""

    test: str  #: an expression of `{v}`
    expected: str


class As(NamedTuple):
    """The type in which a value arrives, where the verb gets another type."""

    annotation: Any


class Row(NamedTuple):
    """A list of so many values: an annotation for each."""

    columns: tuple[tuple[str, Any], ...]


# -- words for annotations ---------------------------------------------------------------------------------------------

#: An id, wherever one comes in.
Id = Annotated[
    str,
    Rule(f"0 < len({{v}}) <= {ID_LENGTH} and {{v}}.isprintable()",
         f"text of 1 to {ID_LENGTH} characters without control characters"),
]  # fmt: skip
Text = Annotated[str, Rule("len({v}) <= 1048576", "text of at most 1,048,576 characters")]
Whole = Annotated[int, Rule("{v} >= 0", "a whole number, 0 or more")]
Positive = Annotated[int, Rule("{v} >= 1", "a whole number, 1 or more")]
Seconds = Annotated[float, Rule("{v} >= 0", "a number of seconds, 0 or more")]
Encoded = Annotated[bytes, Rule("{v}", "an encoded value")] | Payload  #: a user's value
Value = Encoded | None
TagValue = str | bool | int | float
Tags = Annotated[
    dict[Id, TagValue],
    Rule(f"len({{v}}) <= {MAX_TAGS}", f"a mapping of at most {MAX_TAGS} tags, each a str, int, float or bool"),
]
Logic = Literal["and", "or"]
SortOrder = Literal["asc", "desc"]
Part = tuple[int, bool]  #: of a bulk call: which call, and whether this is its last part
#: Why an agent's span is lost, or a model call cannot be trained on (`tracing.calls`).
LossReason = Literal[
    "sampled_out", "sdk_disabled", "no_context", "not_convertible", "refused", "not_sent", "too_late", "too_many_open",
    "without_token_ids", "without_logprobs",
]  # fmt: skip


# -- what comes in with operations ------------------------------------------------------------------------------------

Mode = Literal["train", "val", "test"]

_Backoff = Annotated[
    float, Rule(f"0 <= {{v}} <= {MAX_BACKOFF_SECONDS}", f"a number of seconds from 0 to {MAX_BACKOFF_SECONDS:,.0f}")
]

#: A rule in field order (`records.RetryRule`): outcome, retries, first delay, factor, longest delay, jitter.
RetryRuleRow = tuple[
    RetryOutcome,
    Annotated[int, Rule(f"0 <= {{v}} <= {MAX_RETRIES}", f"a whole number from 0 to {MAX_RETRIES:,}")],
    _Backoff,
    Annotated[float, Rule(f"1 <= {{v}} <= {MAX_FACTOR}", f"a number from 1 to {MAX_FACTOR:,.0f}")],
    _Backoff | None,
    Annotated[float, Rule("0 <= {v} <= 1", "a share, from 0 to 1")],
]
_RetryRules = Annotated[
    list[RetryRuleRow],
    Rule(
        "len({{r[0] for r in {v}}}) == len({v}) and all(r[4] is None or r[4] >= r[2] for r in {v})",
        "at most one rule for each outcome, none with a longest delay below the first one",
    ),
]

#: A configuration in field order: timeout, silence, number of attempts, what is tried again; and rules, if it has any.
ConfigRow = (
    tuple[Seconds | None, Seconds | None, Positive, list[AttemptStatus]]
    | tuple[Seconds | None, Seconds | None, Positive, list[AttemptStatus], _RetryRules]
)
Priority = Annotated[int, Rule(f"{-MAX_PRIORITY} <= {{v}} <= {MAX_PRIORITY}", "a whole number of at most 53 bits")]
Time = Annotated[float, Rule("abs({v}) < 1e18", "a time in seconds")]


#: What stands for the content of a value (`payload.digest_of_bytes`, or the caller's own).
Digest = Annotated[bytes, Rule("len({v}) == 17 and {v}[0] in (3, 4)", "a digest of a value")]


class Request(TypedDict, total=False):
    """What makes a rollout."""

    input: Required[Value]
    mode: Mode | None
    resources_id: Id | None
    config: ConfigRow | None
    metadata: Value
    rollout_id: Id | None
    group_id: Id | None
    queue: Id
    priority: Priority
    tags: Tags | None
    digests: tuple[Digest, Digest]  # of input and metadata, where a rollout_id is given


class GroupRequest(TypedDict, total=False):
    """What makes a group: how many rollouts of what, and what is to become of those that fail or are late."""

    member: Required[Request]  # of each; its rollout_id and group_id do not count
    n: Required[Positive]
    group_id: Id | None
    min_size: Positive | None
    spare: Whole
    replace: Whole
    deadline_seconds: Seconds | None


class RolloutChanges(TypedDict, total=False):
    """What is set of a rollout."""

    input: Value
    mode: Mode | None
    resources_id: Id | None
    status: RolloutStatus
    config: ConfigRow
    metadata: Value


class AttemptChanges(TypedDict, total=False):
    """What is set of an attempt."""

    status: AttemptStatus
    worker_id: Id | None
    last_heartbeat_time: Time
    metadata: Value


class Calls(TypedDict):
    """The calls of models that an attempt has made."""

    turns: Whole
    prompt_tokens: Whole
    response_tokens: Whole
    finish_reasons: dict[Text, Positive]


class FinalChanges(AttemptChanges, total=False):
    """What is set of an attempt by the one who ran it, when it ends."""

    outcome: Outcome
    error: Text
    died: bool
    calls: Calls


class WorkerChanges(TypedDict, total=False):
    """What is set of a worker."""

    heartbeat_stats: Value


class Filters(TypedDict, total=False):
    """Selects rollouts; a filter that is None or absent selects all."""

    group_id: Id | None
    tags: Tags | None
    queue: Id | None
    mode: Mode | None


class Must(Filters, total=False):
    """Which rollouts of a query, whatever its other filters say."""

    worker_id: Id | None


class SpanTexts(TypedDict, total=False):
    """Texts of the index of a span, or parts of them."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str


_SPAN_NUMBER = Annotated[int, Rule(f"-1 <= {{v}} < {MAX_SPAN_NUMBER}", "a number from 0 to 2**62, or -1")]
_SPAN_ID = Annotated[str, Rule("{v}", "text of at least 1 character")]

#: A span without rollout and attempt, in the order of `records.Span`. Number -1: the next one; size -1: to be measured.
SpanRow = Annotated[
    list[Any],
    Row(
        (
            ("sequence_id", _SPAN_NUMBER),
            ("span_id", _SPAN_ID),
            ("trace_id", _SPAN_ID),
            ("parent_id", str | None),
            ("name", str),
            ("start_time", float | None),
            ("end_time", float | None),
            ("reward", float | None),
            ("body", bytes | Payload),
            ("size", Annotated[int, Rule(f"-1 <= {{v}} < {2**50}", "a size in bytes, or -1")]),
        )
    ),
]


# -- what annotations come to ------------------------------------------------------------------------------------------


class _Source:
    """Functions that are being written, and the values they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}

    def name(self, value: Any) -> str:
        made = f"_{len(self.names)}"
        self.names[made] = value
        return made

    def function(self, body: Sequence[str]) -> str:
        """A function of `v` with this body; its name."""
        made = self.name(None)
        self.lines += [f"def {made}(v):", *(f"    {line}" for line in body)]
        return made

    def made(self, name: str) -> Any:
        exec("\n".join(self.lines), self.names)
        return self.names[name]


Complaint = tuple[str, Any, str]  #: name, value, what was expected


class _Node:
    """One annotation: here of a value that may be anything."""

    expected = "another value"

    def test(self, source: _Source, v: str) -> str:
        """An expression that says whether the value named `v` is right."""
        return "True"

    def refuse(self, source: _Source, v: str) -> list[str]:
        """Lines of a function that ends with False if the value named `v` is wrong."""
        return [f"if not ({self.test(source, v)}): return False"]

    def inside(self, name: str, value: Any) -> Complaint | None:
        """What within a value is wrong, as far as there is something within."""
        return None

    @cached_property
    def fits(self) -> Callable[[Any], bool]:
        """Whether a value is right, as one function."""
        source = _Source()
        return source.made(source.function([f"return {self.test(source, 'v')}"]))  # type: ignore[no-any-return]

    def complaint(self, name: str, value: Any) -> Complaint | None:
        """What is wrong with a value."""
        return None if self.fits(value) else self.inside(name, value) or (name, value, self.expected)


_LIMITS = f"{-(2**63)} <= {{v}} < {2**63}"
_SAID = {
    str: "text", bytes: "bytes", int: "a whole number of at most 64 bits", float: "a number", bool: "True or False",
    type(None): "None",
}  # fmt: skip


class _Leaf(_Node):
    """A value of one class, and what is asked of it beyond that."""

    def __init__(self, cls: type, rule: Rule | None) -> None:
        self.cls = cls
        self.types: tuple[type, ...] = (float, int) if cls is float else (cls,)
        self.limits = _LIMITS if cls is int else ""
        self.rule = rule.test if rule is not None else ""
        self.expected = rule.expected if rule is not None else _SAID.get(cls, cls.__name__)

    def test(self, source: _Source, v: str) -> str:
        if self.cls is type(None):
            return f"{v} is None"
        if self.cls is float:
            test = f"(type({v}) is float and {v} == {v} or type({v}) is int and {_LIMITS.format(v=v)})"
        else:
            named = self.cls.__name__ if self.cls in _SAID else source.name(self.cls)
            test = f"type({v}) is {named}"
        return " and ".join([test, *(asked.format(v=v) for asked in (self.limits, self.rule) if asked)])


class _OneOf(_Node):
    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = frozenset(values)
        self.types = (str,)
        self.expected = "one of " + ", ".join(map(repr, values))

    def test(self, source: _Source, v: str) -> str:
        return f"type({v}) is str and {v} in {source.name(self.values)}"


class _Union(_Node):
    def __init__(self, members: list[_Node]) -> None:
        self.members = members
        self.expected = " or ".join(dict.fromkeys(member.expected for member in members))

    def test(self, source: _Source, v: str) -> str:
        return "(" + " or ".join(f"({member.test(source, v)})" for member in self.members) + ")"

    def inside(self, name: str, value: Any) -> Complaint | None:
        return next((found for member in self.members if (found := member.inside(name, value)) is not None), None)


class _Many(_Node):
    """A list (or tuple) of any length, and what is asked of it as a whole."""

    def __init__(self, item: _Node, rule: Rule | None = None) -> None:
        self.item = item
        self.rule = rule
        self.expected = rule.expected if rule is not None else f"a list, each {item.expected}"

    def test(self, source: _Source, v: str) -> str:
        body = ["for x in v:"] + [f"    {line}" for line in self.item.refuse(source, "x")]
        looked = source.function([*body, f"return {self.rule.test.format(v='v') if self.rule is not None else 'True'}"])
        return f"((type({v}) is list or type({v}) is tuple) and (not {v} or {looked}({v})))"  # many are empty

    def inside(self, name: str, value: Any) -> Complaint | None:
        if type(value) not in (list, tuple):
            return None
        found = (self.item.complaint(f"{name}[{index}]", item) for index, item in enumerate(value))
        return next((one for one in found if one is not None), None)


class _Fixed(_Node):
    """A list (or tuple) with a type for each place."""

    def __init__(self, columns: list[tuple[str, _Node]]) -> None:
        self.columns = columns
        self.expected = f"a list of {len(columns)}: " + ", ".join(f"{n} ({c.expected})" for n, c in columns)

    def test(self, source: _Source, v: str) -> str:
        body = ["if type(v) is not list and type(v) is not tuple: return False"]
        body += [f"if len(v) != {len(self.columns)}: return False"]
        names = ", ".join(f"x{index}" for index in range(len(self.columns)))
        tests = " and ".join(f"({c.test(source, f'x{index}')})" for index, (_, c) in enumerate(self.columns))
        return f"{source.function([*body, f'{names}, = v', f'return {tests}'])}({v})"

    def inside(self, name: str, value: Any) -> Complaint | None:
        if type(value) not in (list, tuple) or len(value) != len(self.columns):
            return None
        found = (c.complaint(f"{name}.{n}", item) for (n, c), item in zip(self.columns, value, strict=True))
        return next((one for one in found if one is not None), None)


class _Typed(_Fixed):
    """The same, where the types of all places are looked at together: for what comes in great numbers.

    A rule for a whole number says for itself how large it may be, and NaN passes.
    """

    def test(self, source: _Source, v: str) -> str:
        return f"{source.function([*self.refuse(source, 'v'), 'return True'])}({v})"

    def refuse(self, source: _Source, v: str) -> list[str]:
        columns = [typing.cast(list[_Leaf], c.members if isinstance(c, _Union) else [c]) for _, c in self.columns]
        known = frozenset(product(*([found for leaf in column for found in leaf.types] for column in columns)))
        lines = [f"if type({v}) is not list and type({v}) is not tuple: return False"]
        lines += [f"if tuple(map(type, {v})) not in {source.name(known)}: return False"]
        for index, column in enumerate(columns):
            if any(leaf.rule for leaf in column):
                asked = column[0].rule.format(v=f"{v}[{index}]")
                if len(column) > 1:
                    asked = " or ".join(f"({leaf.test(source, f'{v}[{index}]')})" for leaf in column)
                lines += [f"if not ({asked}): return False"]
        return lines


class _Mapping(_Node):
    def __init__(self, key: _Node, value: _Node, rule: Rule | None) -> None:
        self.key, self.value, self.rule = key, value, rule
        self.expected = rule.expected if rule is not None else f"a mapping of {key.expected} to {value.expected}"

    def test(self, source: _Source, v: str) -> str:
        tests = [test for test in (self.key.test(source, "k"), self.value.test(source, "x")) if test != "True"]
        if not tests and self.rule is None:
            return f"type({v}) is dict"
        body = ["if type(v) is not dict: return False"]
        if tests:
            body += ["for k, x in v.items():", *(f"    if not ({test}): return False" for test in tests)]
        body += [f"return {self.rule.test.format(v='v') if self.rule is not None else 'True'}"]
        return f"{source.function(body)}({v})"

    def inside(self, name: str, value: Any) -> Complaint | None:
        for key, item in value.items() if type(value) is dict else ():
            found = self.key.complaint(f"{name}[{shown(key)!r}]", key) or self.value.complaint(f"{name}[{key!r}]", item)
            if found is not None:
                return found
        return None


class _Fields(_Node):
    """A typed dict, or the arguments of a verb."""

    def __init__(self, fields: dict[str, _Node], required: frozenset[str]) -> None:
        self.fields, self.required = fields, required
        self.expected = f"a mapping with {', '.join(fields) or 'nothing'}"
        if required:
            self.expected += f", of which {', '.join(name for name in fields if name in required)} must be there"

    def test(self, source: _Source, v: str) -> str:
        return f"(type({v}) is dict and {self.function(source)}({v}))"

    def function(self, source: _Source) -> str:
        """The name of a function of a dict. Its checks are unrolled, since every operation runs them."""
        needed = [name for name in self.fields if name in self.required]
        body = ["try:"] + [f"    a{number} = v[{name!r}]" for number, name in enumerate(needed)] if needed else []
        body += ["except KeyError: return False"] if needed else []
        for number, name in enumerate(needed):
            if (test := self.fields[name].test(source, f"a{number}")) != "True":
                body += [f"if not ({test}): return False"]
        if len(needed) == len(self.fields):
            body += [f"return len(v) == {len(needed)}"]
        else:
            body += [f"if len(v) == {len(needed)}: return True", f"n = {len(needed)}"]
            for name in self.fields:
                if name not in self.required:
                    body += [f"if {name!r} in v:", "    n += 1", f"    x = v[{name!r}]"]
                    body += [f"    if not ({self.fields[name].test(source, 'x')}): return False"]
            body += ["return len(v) == n"]
        return source.function(body)

    def inside(self, name: str, value: Any) -> Complaint | None:
        if type(value) is not dict:
            return None
        prefix = f"{name}." if name else ""
        for key, item in value.items():
            node = self.fields.get(key)
            if node is None:
                return f"{prefix}{key}" if isinstance(key, str) else name or "argument", item, self.expected
            if (found := node.complaint(prefix + key, item)) is not None:
                return found
        missing = next((field for field in self.fields if field in self.required and field not in value), None)
        return None if missing is None else (f"{prefix}{missing}", None, "a value, which is missing")


def _node(annotation: Any) -> _Node:
    """What an annotation comes to."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return _Node()
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1])
    if origin in (typing.Union, types.UnionType):
        return _Union([_node(member) for member in arguments])
    if origin is Literal:
        return _OneOf(arguments)
    if origin is list:
        return _Many(_node(arguments[0]))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return _Many(_node(arguments[0]))
        return _Fixed([(str(number), _node(member)) for number, member in enumerate(arguments)])
    if origin is dict:
        return _Mapping(_node(arguments[0]), _node(arguments[1]), None)
    if typing.is_typeddict(annotation):
        return _typed_dict(annotation)
    if annotation is None:
        return _Leaf(type(None), None)
    if isinstance(annotation, type):
        return _Leaf(annotation, None)
    raise TypeError(f"no schema for {annotation!r}")


def _annotated(base: Any, said: Any) -> _Node:
    if isinstance(said, As):
        return _node(said.annotation)
    if isinstance(said, Row):
        return _Typed([(name, _node(column)) for name, column in said.columns])
    if typing.get_origin(base) is dict:
        key, value = typing.get_args(base)
        return _Mapping(_node(key), _node(value), said)
    if typing.get_origin(base) is list:
        return _Many(_node(typing.get_args(base)[0]), said)
    return _Leaf(base, said)


def _typed_dict(annotation: Any) -> _Node:
    hints = typing.get_type_hints(annotation, include_extras=True)
    fields, required = {}, set()
    for name, hint in hints.items():
        said = typing.get_origin(hint)
        if said in (typing.Required, typing.NotRequired):
            hint = typing.get_args(hint)[0]
        if said is typing.Required or (annotation.__total__ and said is not typing.NotRequired):
            required.add(name)
        fields[name] = _node(hint)
    return _Fields(fields, frozenset(required))


def checker(annotation: Any) -> Callable[[Any], bool]:
    """Whether a value is what an annotation says, as a function."""
    return _node(annotation).fits


# -- the arguments of a function ---------------------------------------------------------------------------------------


class Schema:
    """What the keyword-only arguments of a function must be."""

    names: frozenset[str]
    required: frozenset[str]

    def __init__(self, function: Callable[..., Any]) -> None:
        code = function.__code__
        names = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        asked = types.SimpleNamespace(__annotations__={name: function.__annotations__.get(name, Any) for name in names})
        hints = typing.get_type_hints(asked, globalns=function.__globals__, include_extras=True)
        required = frozenset(names) - frozenset(function.__kwdefaults__ or ())
        self.names, self.required = frozenset(names), required
        self._node = _Fields({name: _node(hints[name]) for name in names}, required)
        source = _Source()
        self.fits: Callable[[Any], bool] = source.made(self._node.function(source))

    def refusal(self, verb: str, arguments: Any) -> InvalidValueError:
        """What is wrong with arguments that do not fit."""
        found = self._node.complaint("", arguments) if type(arguments) is dict else None
        name, value, expected = found or ("", arguments, self._node.expected)
        return InvalidValueError(name or f"arguments of {verb}", value, expected)
