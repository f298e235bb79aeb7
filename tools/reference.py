"""Writes docs/api.md, the reference of the public names, from their signatures and docstrings.

Run `python -m tools.reference` to write it; `tests/test_reference.py` fails when it is not up to date. `GROUPS` orders
the names by what people do with them. The text is the same on every machine and Python: signatures are shown as they
are written in the source, and values by `shown`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import raystore as rs
from raystore.api import METHODS, LightningStore
from raystore.client.client import Testing
from raystore.runner.context import OpenSpan
from raystore.runner.inline_agents import Run

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
WIDTH = 100  #: of a signature that stands on one line

HEADER = """# API

Written by `python -m tools.reference` (`make reference`) from the docstrings; do not edit.

`rs` is `import raystore as rs`. `store` is a store, from `rs.start`, `rs.connect`, `rs.RayLightningStore(handle)` or
`rs.InMemoryLightningStore()`; both kinds have the same methods. Each method is a coroutine function, but for `feed`.
`store.sync` has the others as blocking calls: `store.sync.enqueue_rollout("task")`.
"""

#: Title, what the group is for, and its names: methods of a store, public names, or members of `OTHERS`.
GROUPS = [
    (
        "Start and connect",
        "A store on Ray, or in this process.",
        """
        start connect RayLightningStore InMemoryLightningStore StoreOptions list_stores stop recover RecoveredRun
        StoreInfo Testing setup_logging
        """,
    ),
    (
        "Produce work",
        "What a driver asks to have run.",
        """
        enqueue_rollout enqueue_many_rollouts enqueue_group enqueue_many_groups EnqueueRolloutRequest
        EnqueueGroupRequest RolloutConfig RetryRule cancel_rollouts update_rollout requeue
        """,
    ),
    (
        "Run agents",
        "By a pool of runners, or by hand: claim a rollout, add spans, report.",
        """
        RunnerPool Context OpenSpan current run_one Run Abort Drop otel dequeue_rollout dequeue_many_rollouts
        start_rollout start_attempt update_attempt add_span add_many_spans add_otel_span
        get_next_span_sequence_id get_many_span_sequence_ids update_worker
        """,
    ),
    (
        "Wait",
        "For rollouts to finish. A process has one parked call, whatever the number of its waiting coroutines.",
        """
        wait_for_rollout wait_for_rollouts as_completed completed Page
        """,
    ),
    (
        "Read",
        "Rollouts, their attempts, and their spans.",
        """
        get_rollout_by_id query_rollouts get_group query_groups Group get_latest_attempt query_attempts
        query_spans query_many_spans PaginatedResult Rollout AttemptedRollout Attempt is_queuing is_running
        is_finished Span TraceStatus Event Link SpanContext OtelResource SpanCoreFields find_final_reward
        estimate_model_size
        """,
    ),
    (
        "Train",
        "On each rollout once, and on what its spans say.",
        """
        take take_groups ack nack checkpoint rewind forget_consumer ledger Batch GroupBatch TakenGroup
        LedgerEntry triplets Triplet trajectories Trajectory Split collate model_calls ModelCall semconv
        """,
    ),
    (
        "Train on a dataset",
        "A feed enqueues groups of a dataset's items, governs their lag, and gives whole batches.",
        """
        feed Feed FeedBatch BatchShard FeedGroup Lag BatchManifest GroupManifest FeedStatus StreamStatus keep Keep
        reward FailureReward FailureBudget Sampler
        """,
    ),
    (
        "Know what was trained on",
        "What became of everything that was started.",
        """
        selection_report SelectionReport EndingReport NumberSummary ValueReport Comparison
        """,
    ),
    (
        "Evaluate",
        "Items are sampled some times each beside the training, to measure a policy.",
        """
        evaluate evaluations drop_evaluation Evaluation BlockingEvaluation EvaluationResult EvaluationScore
        """,
    ),
    (
        "Publish resources",
        "Prompts, endpoints and weights, for agents to use.",
        """
        add_resources update_resources get_latest_resources get_resources_by_id query_resources delete_resources
        ResourcesUpdate Resource PromptTemplate LLM ProxyLLM ObjectResource
        """,
    ),
    (
        "Operate",
        "What a store is, holds and did; and what it may forget.",
        """
        LightningStore statistics LightningStoreStatistics metrics StoreMetrics MetricsTotal MetricsBucket Distribution
        RewardSummary VersionRewards why Finding story changes Change check release delete_rollouts
        pause resume limit_queue QueuePause QueueLimit query_workers get_worker_by_id Worker LightningStoreCapabilities
        otlp_traces_endpoint
        """,
    ),
]
ERRORS = ("Errors", "All are `StoreError`s, and have a builtin as second base.")
TYPES = ("Types", "Names that stand in the signatures above.")

#: Classes that are no public names: their objects are what public functions and attributes give.
OTHERS: dict[str, type] = {"OpenSpan": OpenSpan, "Run": Run, "Testing": Testing}

#: Names of types, and what each means. Those that are no public names stand in signatures only.
ALIASES = {
    "RolloutStatus": "where a rollout stands",
    "AttemptStatus": "where an attempt stands",
    "GroupStatus": "where a group stands",
    "Outcome": "why an attempt ended",
    "RetryOutcome": "outcomes for which a `RolloutConfig` may have a rule",
    "RolloutMode": "what a rollout is for",
    "WorkerStatus": "what a worker does",
    "TaskInput": "the task of an agent: anything that can be pickled",
    "TagValue": "the value of a tag",
    "DuplicateSpans": "what becomes of a span whose id its attempt has",
    "OnMemoryFull": "what happens at the memory threshold",
    "Clock": "the clock of a store",
    "Durability": "when an answer may leave",
    "Resume": "whether a store goes on with a run",
    "Agent": "a function, a class with `__call__`, or a `functools.partial` of one",
    "PendingCall": "an operation that is under way: await it, or block on its `result()`",
    "AnyRollout": "a rollout, with its latest attempt if it has one",
    "FoundRollout": "the same, or None for an unknown id",
    "FilterLogic": "whether all filters must match, or any",
    "SortOrder": "the direction of a sort",
    "StoreClient": "a `RayLightningStore` or an `InMemoryLightningStore`",
    "StatusCode": "how a spanned operation ended",
    "Attributes": "those of a span",
    "AttributeValue": "the value of a span's attribute",
    "PackedArray": "numbers in an `array.array`",
    "LossReason": "why a span was lost, or a model call cannot be trained on: docs/spans.md lists them",
    "Call": "an operation on its way, which may be awaited",
    "NamedResources": "resources by name",
    "Late": "what becomes of a group that would lag too much",
    "Order": "of the groups of batches",
    "Changed": "what becomes of a feed whose dataset has changed",
    "Overtaken": "what becomes of an evaluation when a later one of its name begins",
    "Evidence": "what a recorded model call may have to have",
    "Chooser": "a function that takes complete groups and gives those of the next batch, the best first",
    "Test": "a function that says of a group whether it is trained on",
    "Reader": "a store, as far as spans, groups and rollouts are read",
    "ResourceUnion": "any kind of resource; `resource_type` tells which",
    "UNSET": "leave this field as it is",
    "Unset": "the type of `UNSET`",
}

#: Classes that are made by raystore only.
GIVEN = {
    "Context", "OpenSpan", "Testing", "RecoveredRun", "Feed", "FeedBatch", "BatchShard", "Sampler", "Evaluation",
    "BlockingEvaluation",
}  # fmt: skip

#: What is shown of a class, where it is not all that it has of its own.
MEMBERS = {
    "LightningStore": "capabilities",
    "RayLightningStore": "info close",
    "InMemoryLightningStore": "info close",
    "RecoveredRun": "close",
    "Context": "attempt policy_version span llm reward add cancelled why check",
    "ObjectResource": "get aget is_elsewhere",
    "Feed": "restore publish batches checkpoint status resume close",
}


# -- names -------------------------------------------------------------------------------------------------------------


def errors() -> list[str]:
    """The public exceptions that stand in no other group."""
    grouped = {name for _, _, names in GROUPS for name in names.split()}
    public = [
        name for name in rs.__all__ if isinstance(found := getattr(rs, name), type) and issubclass(found, Exception)
    ]
    return ["StoreError", *(name for name in public if name not in grouped and name != "StoreError")]


def groups() -> list[tuple[str, str, list[str]]]:
    """All groups with their names, but for that of the types."""
    return [*((title, text, names.split()) for title, text, names in GROUPS), (*ERRORS, errors())]


def documented() -> list[str]:
    """Every name that has a place in the reference."""
    return [name for _, _, names in groups() for name in names] + list(ALIASES)


def title_of(name: str) -> str:
    """The heading of a name, as it is used."""
    return f"store.{name}" if name in METHODS else name if name in OTHERS else f"rs.{name}"


# -- signatures --------------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A default, as Python would be given it."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    return value.__name__ if isinstance(value, type) or inspect.isfunction(value) else repr(value)


def annotation(text: object, module: str) -> str:
    """An annotation as it is written, with private names of its module as what they stand for."""
    said = getattr(text, "__forward_arg__", text)
    assert isinstance(said, str), f"{module} has annotations that are no text: {said!r}"
    names = vars(sys.modules[module])

    def public(found: re.Match[str]) -> str:
        kind = getattr(names.get(found[0]), "__origin__", None)  # of Annotated
        return kind.__name__ if isinstance(kind, type) else str(kind or found[0].lstrip("_"))

    return re.sub(r"\b_[A-Z]\w*", public, said).replace("'", '"')


class Text(str):
    """What `inspect` shows as it is."""

    __repr__ = str.__str__


def signature(function: Callable[..., Any], name: str, *, of_method: bool = False, of_class: bool = False) -> str:
    """The form of a call: on one line if it is short, else with a line for each argument."""
    found = inspect.signature(function)
    parts: list[str] = []
    before = None
    for parameter in list(found.parameters.values())[of_method:]:
        kind, empty = parameter.kind, parameter.empty
        if before == parameter.POSITIONAL_ONLY != kind:
            parts.append("/")
        if kind == parameter.KEYWORD_ONLY and before not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            parts.append("*")
        before = kind
        if parameter.annotation is not empty:
            parameter = parameter.replace(annotation=Text(annotation(parameter.annotation, function.__module__)))
        if parameter.default is not empty:
            parameter = parameter.replace(default=Text(shown(parameter.default)))
        parts.append(str(parameter))
    end = ")" if of_class else f") -> {annotation(found.return_annotation, function.__module__)}"
    line = f"{name}({', '.join(parts)}{end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), end])


@cache
def parsed(module: str) -> tuple[list[str], ast.Module]:
    """The source of a module, by lines and as a tree."""
    text = inspect.getsource(sys.modules[module])
    return text.splitlines(), ast.parse(text)


def fields(cls: type) -> list[str]:
    """The fields of a record, as they are written, with those of its bases first; none if it is no record."""
    found: dict[str, str] = {}
    if not {"model_fields", "__dataclass_fields__", "__required_keys__"} & set(dir(cls)):
        return []
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("raystore."):
            continue
        lines, tree = parsed(base.__module__)
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        for node in body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id[0] == "_":
                continue
            line = f"{node.target.id}: {annotation(ast.unparse(node.annotation), base.__module__)}"
            if node.value is not None:
                line += f" = {default(node.value)}".replace("'", '"')
            if (comment := lines[node.lineno - 1][node.end_col_offset :].strip()).startswith("# type:"):
                comment = ""
            found[node.target.id] = f"{line}  {comment}".rstrip()
    return list(found.values())


def default(value: ast.expr) -> str:
    """The default of a field, also one that is given to pydantic's or dataclasses' `field`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).lower() == "field":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return ast.unparse(keyword.value)
            if keyword.arg == "default_factory":
                return {"list": "[]", "dict": "{}"}.get(made := ast.unparse(keyword.value), f"{made}()")
    return ast.unparse(value)


def definition(name: str) -> str:
    """What a name of a type stands for, as it is written; empty if that is for machines."""
    for module in (
        "raystore.types.contract", "raystore.types.spans", "raystore.types.options", "raystore.wire.feeds",
        "raystore.wire.evaluations", "raystore.tracing.evidence", "raystore.client.pump",
    ):  # fmt: skip
        for node in reversed(list(ast.walk(parsed(module)[1]))):  # the last: not that for type checkers only
            if not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) != name:
                continue
            value = node.value
            if isinstance(value, ast.Subscript) and ast.unparse(value.value) == "Annotated":
                assert isinstance(value.slice, ast.Tuple)
                value = value.slice.elts[0]
            said = ast.unparse(value).replace("'", '"').replace("|", "\\|")
            return "" if re.search(r"\b_[A-Za-z]", said) else f"`{said}`"
    return ""  # a class


# -- text --------------------------------------------------------------------------------------------------------------


def doc(found: object) -> str:
    """A docstring as markdown: its sections of arguments, attributes and errors become lists."""
    written = inspect.cleandoc(vars(found)["__doc__"] if isinstance(found, type) else found.__doc__ or "")
    written = re.sub(r"\nNot here: .*", "", written, flags=re.DOTALL)  # which is for readers of the source
    blocks = []
    for block in written.split("\n\n"):
        title, _, rest = block.partition("\n")
        if title in ("Args:", "Attributes:", "Raises:"):
            entries = re.split(r"\n(?=\S)", textwrap.dedent(rest))
            lines = [f"{title}", ""]
            for entry in entries:
                names, _, text = re.sub(r"\s+", " ", entry).partition(": ")
                lines.append(f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {text}")
            block = "\n".join(lines)
        blocks.append(block)
    return "\n\n".join(blocks)


def code(*lines: str) -> str:
    """Lines of Python, fenced."""
    return "\n".join(["```python", *lines, "```"])


def of_function(function: Callable[..., Any], name: str, *, of_method: bool = False) -> list[str]:
    """Signature and docstring of a function."""
    word = "async def" if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function) else "def"
    return [code(f"{word} {signature(function, name, of_method=of_method)}"), doc(function)]


def of_class(cls: type, name: str) -> list[str]:
    """A class: how one is made or what it consists of, its docstring, its members."""
    bases = [base.__name__ for base in cls.__bases__ if base.__name__ in rs.__all__ or issubclass(base, Exception)]
    init = inspect.getattr_static(cls, "__init__")
    is_made = inspect.isfunction(init) and name not in GIVEN
    listed = fields(cls)
    if listed:
        of = f"({', '.join(bases)})" if bases else ""
        parts = [code(f"class {name}{of}:", *(f"    {line}" for line in listed))]
    else:
        parts = [code(f"class {signature(init, name, of_method=True, of_class=True) if is_made else name}")]
    if issubclass(cls, Exception):
        parts.append(f"Bases: {', '.join(f'`{base}`' for base in bases)}.")
    parts.append(doc(cls))
    for member in members(cls, name):
        found = inspect.getattr_static(cls, member)
        parts.append(f"#### {name}.{member}")
        if isinstance(found, property):
            assert found.fget is not None
            answer = annotation(inspect.signature(found.fget).return_annotation, found.fget.__module__)
            parts += [code(f"{member}: {answer}"), doc(found.fget)]
        elif isinstance(found, classmethod):
            parts += of_function(found.__func__, f"{name}.{member}", of_method=True)
        else:
            parts += of_function(getattr(cls, member), member, of_method=True)
    return parts


def members(cls: type, name: str) -> list[str]:
    """The methods and properties of a class that are shown."""
    if name in MEMBERS:
        return MEMBERS[name].split()
    if issubclass(cls, Exception):
        return []
    shown_kinds = (classmethod, property)
    return [
        member
        for member, found in vars(cls).items()
        if member[0] != "_" and (inspect.isfunction(found) or isinstance(found, shown_kinds))
        if getattr(found, "__doc__", None)
    ]


def of_module(module: ModuleType, name: str) -> list[str]:
    """A module: its docstring, its constants that are text, its functions and classes."""
    parts = [doc(module)]
    lines, tree = parsed(module.__name__)
    rows = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name) and target.id[0].isupper():
            if isinstance(value := getattr(module, target.id), str):
                _, _, comment = lines[node.lineno - 1].partition("#: ")
                rows.append(f"| `{target.id}` | `{value}` | {comment} |")
    if rows:
        parts.append("\n".join(["| constant | attribute, or name | |", "|---|---|---|", *rows]))
    for member, found in vars(module).items():
        if member[0] == "_" or getattr(found, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(found):
            parts += [f"#### {name}.{member}", *of_function(found, member)]
        elif isinstance(found, type) and found.__doc__:
            parts += [f"#### {name}.{member}", code(f"class {member}"), doc(found)]
    return parts


def entry(name: str) -> list[str]:
    """What the reference says of a name."""
    if name in METHODS:
        return of_function(getattr(LightningStore, name), name, of_method=True)
    found = OTHERS.get(name) or getattr(rs, name)
    if inspect.ismodule(found):
        return of_module(found, name)
    return of_class(found, name) if isinstance(found, type) else of_function(found, name)


def link(title: str) -> str:
    """A link to a heading."""
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    return f"[{title.rpartition('.')[2]}](#{anchor})"


def page() -> str:
    """The text of docs/api.md."""
    index, parts = [], []
    for title, text, names in groups():
        index.append(f"| {link(title)} | {', '.join(link(title_of(name)) for name in names)} |")
        parts += [f"## {title}", text]
        for name in names:
            parts += [f"### {title_of(name)}", *entry(name)]
    index.append(f"| {link(TYPES[0])} | {', '.join(f'`{name}`' for name in ALIASES)} |")
    rows = [f"| `{name}` | {meaning} | {definition(name)} |" for name, meaning in ALIASES.items()]
    parts += [f"## {TYPES[0]}", TYPES[1], "\n".join(["| name | meaning | is |", "|---|---|---|", *rows])]
    return "\n\n".join([HEADER + "\n" + "\n".join(["| to | names |", "|---|---|", *index]), *parts]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
