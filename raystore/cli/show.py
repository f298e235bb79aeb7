"""`raystore show`: all that is known of one rollout, in the order in which one asks.

Where it stands, its attempts, what it did as a tree of spans over time, what was said to models and what they answered,
what went wrong, and its story. A rollout that is deleted is told by its story, if the change feed still has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from raystore.cli.drawing import Column, Screen, bar
from raystore.cli.endings import WrongUse
from raystore.cli.groups import members_of
from raystore.cli.plainly import as_json, plain
from raystore.cli.reading import View, attempt_of, environment_of, reading, took
from raystore.cli.rollouts import COLUMNS, row
from raystore.cli.text import clean, clean_lines, counted, duration, figure, place_of
from raystore.core.lifecycle import FINISHED
from raystore.errors import InvalidValueError
from raystore.errors.text import meant
from raystore.tracing import semconv
from raystore.tracing.calls import ModelCall, model_calls
from raystore.values.closed import Closed

MOST_SPANS = 200  #: that the tree shows unless all are asked for
MOST_TEXT = 1200  #: characters of a message, likewise
_DELETED = "now: rollout"  #: how the last line of the story of a deleted rollout begins


# -- the tree of spans -------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A span among those that it encloses."""

    span: Any
    inner: list[Node] = field(default_factory=list)

    @property
    def start(self) -> float | None:
        """When it began, as its process said."""
        return self.span.start_time  # type: ignore[no-any-return]

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        start, end = self.span.start_time, self.span.end_time
        is_known = start is not None and end is not None and math.isfinite(start) and math.isfinite(end)
        return max(end - start, 0.0) if is_known else None

    def own_seconds(self) -> float:
        """How long it took without the spans in it, however these overlap."""
        start, end = self.span.start_time, self.span.end_time
        if start is None or end is None:
            return 0.0
        covered, at = 0.0, start
        for low, high in sorted(
            (max(one.span.start_time, start), min(one.span.end_time, end))
            for one in self.inner
            if one.span.start_time is not None and one.span.end_time is not None
        ):
            covered += max(high - max(low, at), 0.0)
            at = max(at, high)
        return float(max(end - start - covered, 0.0))


def tree(spans: Sequence[Any]) -> list[Node]:
    """The spans of an attempt as a forest, by the order of their beginnings; what encloses itself is a root."""
    nodes = {span.span_id: Node(span) for span in spans}
    roots: list[Node] = []
    for span in spans:
        above, seen = span.parent_id, {span.span_id}
        while above in nodes and above not in seen:  # a circle ends here
            seen.add(above)
            above = nodes[above].span.parent_id
        is_inner = span.parent_id in nodes and above not in seen
        (nodes[span.parent_id].inner if is_inner else roots).append(nodes[span.span_id])
    for held in [roots, *(node.inner for node in nodes.values())]:
        held.sort(key=lambda node: (node.start is None, node.start or 0.0, node.span.sequence_id))
    return roots


def walk(nodes: Sequence[Node], depth: int = 0) -> Iterator[tuple[Node, int]]:
    """Each node with its depth, a node before those in it."""
    pending = [(node, depth) for node in reversed(nodes)]
    while pending:
        node, depth = pending.pop()
        yield node, depth
        pending += [(one, depth + 1) for one in reversed(node.inner)]


def draw_tree(screen: Screen, spans: Sequence[Any], most: int = MOST_SPANS) -> None:
    """The spans as an indented list with a bar for when each was, as far as the screen has room for it."""
    timed = [(span.start_time, span.end_time) for span in spans if span.start_time is not None]
    first = min((start for start, _ in timed), default=0.0)
    last = max((end if end is not None else start for start, end in timed), default=first)
    whole = max(last - first, 1e-9)
    width = screen.width
    for_time = 9
    for_name = max(min(max((cell_len(span.name) for span in spans), default=8) + 8, width * 45 // 100), 12)
    for_bar = width - for_name - for_time - 2
    for number, (node, depth) in enumerate(walk(tree(spans))):
        if number == most:
            screen.print(f"… and {counted(len(spans) - most, 'span')} more; --all shows them")
            return
        span = node.span
        is_error = span.status.status_code == "ERROR"
        name = "  " * min(depth, for_name // 4) + ("✗ " if is_error else "") + clean(span.name, 200)
        start, end = span.start_time, span.end_time
        line = Text(set_cell_size(name, for_name), style="red" if is_error else "")
        if start is not None and for_bar >= 8:
            drawn = bar((start - first) / whole, ((end if end is not None else start) - first) / whole, for_bar)
            line.append(set_cell_size(drawn, for_bar + 1), style="red" if is_error else "cyan")
        line.append(duration(node.seconds).rjust(for_time), style="dim")
        screen.print(line)


# -- conversations -----------------------------------------------------------------------------------------------------


def said(message: dict[str, Any]) -> str:
    """The text of a message; parts that are no text are named."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(map(_part, content))
    return "" if content is None else str(content)


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        return str(part)
    return str(part["text"]) if "text" in part else f"[{part.get('type', 'part')}]"


def tools_called(message: dict[str, Any]) -> list[str]:
    """The tool calls of a message, each as `name(arguments)`."""
    found = []
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            found.append(f"{function.get('name')}({function.get('arguments') or ''})")
    return found


def draw_calls(screen: Screen, calls: Sequence[ModelCall], most: int = MOST_TEXT) -> None:
    """The model calls as a conversation: of each, what was new to the model since the call before, and its answer."""
    shown: list[dict[str, Any]] = []
    for number, call in enumerate(calls, 1):
        given_tokens, made_tokens = tokens_in(call)
        facts = [
            call.model, f"role {call.role}" if call.role else None,
            None if made_tokens is None else f"{'?' if given_tokens is None else given_tokens} + {made_tokens} tokens",
            "no token ids" if made_tokens and call.response_ids is None else None,
            "no log-probabilities" if call.response_ids and call.logprobs is None else None,
            f"ended by {call.finish_reason}" if call.finish_reason else None,
        ]  # fmt: skip
        screen.print(Text.assemble((f"call {number}", "bold"), (f"  {clean(', '.join(filter(None, facts)))}", "dim")))
        given = call.messages
        common = 0
        while common < min(len(shown), len(given)) and shown[common] == given[common]:
            common += 1
        if common:
            screen.print(Text(f"  … {counted(common, 'message')} as before", style="dim"))
        for message in given[common:]:
            _draw_message(screen, message, most)
        for message in call.answer:
            _draw_message(screen, message, most)
        if not given and not call.answer:
            screen.print(Text("  the tracer kept no messages", style="dim"))
        shown = [*given, *call.answer[:1]]


_ROLE_STYLES = {"assistant": "green", "user": "cyan", "system": "magenta", "tool": "yellow"}


def _draw_message(screen: Screen, message: dict[str, Any], most: int) -> None:
    role = str(message.get("role", "?"))
    lines = clean_lines(said(message), most)
    if reasoning := message.get("reasoning_content"):
        lines = [f"(thought) {line}" for line in clean_lines(reasoning, most)] + (lines if lines != [""] else [])
    lines = lines if lines != [""] else []
    lines += [f"→ {clean(call, most)}" for call in tools_called(message)]
    head = Text(f"  {clean(role, 40)}: ", style=_ROLE_STYLES.get(role, "bold"))
    screen.print(head.append(lines[0] if lines else "(nothing)", style="not bold"))
    screen.print(*(Text(f"    {line}") for line in lines[1:]))


def tokens_in(call: ModelCall) -> tuple[int | None, int | None]:
    """How many tokens a model was given, and how many it generated: of their ids, else as its tracer counted them."""
    found: list[int | None] = []
    for ids, name in ((call.prompt_ids, semconv.INPUT_TOKENS), (call.response_ids, semconv.OUTPUT_TOKENS)):
        counts = [count for span in call.spans if isinstance(count := span.attributes.get(name), int)]
        found.append(len(ids) if ids is not None else next(iter(counts), None))
    return found[0], found[1]


def tokens_of(calls: Sequence[ModelCall]) -> int:
    """The tokens that a model generated in these calls, as far as they are known."""
    return sum(tokens_in(call)[1] or 0 for call in calls)


def calls_of(spans: Sequence[Any]) -> list[ModelCall]:
    """The model calls of spans; none if they cannot be read."""
    try:
        return model_calls(spans)
    except InvalidValueError:
        return []


# -- the command -------------------------------------------------------------------------------------------------------

_ATTEMPTS = [
    Column("attempt"), Column("status"), Column("outcome", 1), Column("reward", 2, True), Column("took", 3, True),
    Column("runner", 5), Column("policy", 6, True), Column("resources", 7, True), Column("id", 4),
]  # fmt: skip


@reading("raystore show ro-5d41402abc4b")
@click.argument("rollout_id", metavar="ROLLOUT")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="Spans and calls of this attempt, not the latest.")
@click.option("--all", "everything", is_flag=True, help="All spans, and all of each message.")
async def show(view: View, *, rollout_id: str, attempt: int | None, everything: bool) -> None:
    """All of one rollout: attempts, spans over time, conversation with models, errors, reward, tokens, story."""
    await show_rollout(view, rollout_id, attempt, everything=everything)


async def show_rollout(view: View, rollout_id: str, attempt: int | None = None, *, everything: bool = False) -> None:
    """What `raystore show` shows."""
    rollout = await view.store.get_rollout_by_id(rollout_id)
    story = await view.store.story(rollout_id)
    if rollout is None:
        group = await view.store.get_group(rollout_id)
        await (_show_deleted(view, rollout_id, story) if group is None else _show_group(view, group, story))
        return
    attempts = list(await view.store.query_attempts(rollout_id))
    spans = list(await view.store.query_spans(rollout_id, allow_partial=True))
    wanted = attempts[-1:] if attempt is None else [one for one in attempts if one.sequence_id == attempt]
    if attempt is not None and not wanted:
        raise WrongUse(f"rollout {rollout_id} has no attempt {attempt}; it has {len(attempts)}")
    shown = [span for span in spans if wanted and span.attempt_id == wanted[0].attempt_id]
    if wanted and wanted[0].resumed_from is not None:  # the spans that it has taken over count as its own
        shown = list(await view.store.query_spans(rollout_id, wanted[0].attempt_id, allow_partial=True))
    calls = calls_of(shown)
    if view.wants_json:
        document = {"rollout": rollout, "attempts": attempts, "spans": spans, "story": story}
        view.give(document | {"model_calls": [_as_plain(call) for call in calls]})
        return
    screen = view.screen
    screen.heading(f"rollout {rollout_id}", _stand(rollout, view))
    screen.facts(_facts(rollout, view, calls))
    if attempts:
        screen.heading(counted(len(attempts), "attempt"))
        screen.table(_ATTEMPTS, [_attempt_row(one, view) for one in attempts])
    if shown:
        named = f" of attempt {wanted[0].sequence_id}" if len(attempts) > 1 else ""
        gone = ", others were evicted" if any("spans evicted" in line for line in story) else ""
        screen.heading(f"{counted(len(shown), 'span')}{named}", _whole_time(shown) + gone)
        draw_tree(screen, shown, len(shown) if everything else MOST_SPANS)
    if calls:
        screen.heading(counted(len(calls), "model call"))
        draw_calls(screen, calls, 10**9 if everything else MOST_TEXT)
    _draw_errors(screen, attempts, shown, everything)
    screen.heading("story")
    screen.print(*told(story))


async def _show_group(view: View, group: Any, story: list[str]) -> None:
    """A group, by the same command: its members, and its story."""
    members = await members_of(view, [group])
    if view.wants_json:
        view.give({"group": group, "rollouts": list(members.values()), "story": story})
        return
    screen = view.screen
    screen.heading(f"group {group.group_id}", f"{group.status}{f' ({group.why})' if group.why else ''}")
    screen.facts([("input", _value(group.input)), ("size", group.n), ("spare", group.spare or None)])
    screen.heading("members")
    screen.table(COLUMNS, [row(members[one], view) for one in group.members if one in members])
    screen.heading("story")
    screen.print(*told(story))


async def _show_deleted(view: View, rollout_id: str, story: list[str]) -> None:
    """What is left of a rollout that does not exist. Raises `WrongUse` if nothing is."""
    known = [line for line in story if not line.startswith(_DELETED)]
    if not known:
        begins = rollout_id[: max(len(rollout_id) // 2, 3)]
        near = await view.store.query_rollouts(rollout_id_contains=begins, limit=100)
        hint = meant(rollout_id, [one.rollout_id for one in near])
        raise WrongUse(f"no rollout {rollout_id!r}, and the last changes name none{hint}")
    if view.wants_json:
        view.give({"rollout": None, "story": story})
        return
    view.screen.print(f"rollout {rollout_id} was deleted; its story is left:", *told(known))


_CHANGE = re.compile(r"^#\d+ (\d+\.\d+) (.*)$", re.DOTALL)


def told(story: Sequence[str]) -> list[str]:
    """The lines of a story, of which those that have a time begin with how long it was after the first."""
    lines: list[str] = []
    first: float | None = None
    for line in story:
        if (found := _CHANGE.match(line)) is None:
            lines.append(line)
            continue
        time = float(found[1])
        first = time if first is None else first
        lines.append(f"{'+' + duration(time - first):>12}  {found[2]}")
    return lines


def _stand(rollout: Any, view: View) -> str:
    parts = [rollout.status]
    if (seconds := took(rollout, view.now)) is not None:
        parts.append(("after " if rollout.status in FINISHED else "for ") + duration(seconds))
    if rollout.reward is not None:
        parts.append(f"reward {figure(rollout.reward)}")
    return ", ".join(parts)


def _facts(rollout: Any, view: View, calls: Sequence[ModelCall]) -> list[tuple[str, Any]]:
    attempt = attempt_of(rollout)
    tags = ", ".join(f"{name}={value}" for name, value in rollout.tags.items())
    return [
        ("input", _value(rollout.input)),
        ("metadata", _value(rollout.metadata) if rollout.metadata else None),
        ("environment", environment_of(rollout)),
        ("mode", rollout.mode),
        ("group", rollout.group_id),
        ("tags", tags),
        ("queue", f"{rollout.queue}, priority {rollout.priority}" if rollout.priority else rollout.queue),
        ("enqueued", f"{duration(view.age(rollout.start_time))} ago"),
        ("waited", duration(attempt.start_time - rollout.start_time) if attempt and attempt.sequence_id == 1 else None),
        ("resources", _resources(rollout, attempt)),
        ("policy version", attempt.policy_version if attempt else None),
        ("reward", figure(rollout.reward)),
        ("tokens", f"{tokens_of(calls):,} generated" if tokens_of(calls) else None),
        ("requeued from", rollout.requeued_from),
    ]


def _resources(rollout: Any, attempt: Any) -> str | None:
    if rollout.resources_id is None and (attempt is None or attempt.resources_version is None):
        return None
    version = f", version {attempt.resources_version}" if attempt and attempt.resources_version is not None else ""
    return f"{rollout.resources_id or 'the latest'}{version}"


def _value(value: Any) -> str:
    if isinstance(value, Closed):
        return repr(value)
    return value if isinstance(value, str) else as_json(value)


def _attempt_row(attempt: Any, view: View) -> list[Any]:
    seconds = (attempt.end_time or view.now) - attempt.start_time
    return [
        attempt.sequence_id, attempt.status, attempt.outcome, figure(attempt.reward), duration(max(seconds, 0.0)),
        attempt.worker_id, attempt.policy_version, attempt.resources_version, attempt.attempt_id,
    ]  # fmt: skip


def _whole_time(spans: Sequence[Any]) -> str:
    starts = [span.start_time for span in spans if span.start_time is not None]
    ends = [span.end_time for span in spans if span.end_time is not None]
    return f"over {duration(max(max(ends) - min(starts), 0.0))}" if starts and ends else ""


def _draw_errors(screen: Screen, attempts: Sequence[Any], spans: Sequence[Any], everything: bool) -> None:
    failed = [one for one in attempts if one.error]
    broken = [span for span in spans if span.status.status_code == "ERROR"]
    if failed or broken:
        screen.heading("errors")
    for attempt in failed:
        place = place_of(attempt.error)
        where = f"attempt {attempt.sequence_id} ({attempt.outcome})" + (f", raised at {place}" if place else "")
        screen.print(Text(clean(where), style="red"))
        lines = clean_lines(attempt.error.rstrip(), 10**9 if everything else 4 * MOST_TEXT)
        screen.print(*(Text(f"  {line}") for line in (lines if everything else lines[-20:])))
    for span in broken:
        why = span.status.description or _exception(span) or "no description"
        screen.print(Text(f"span {clean(span.name, 80)}: {clean(why, 600)}", style="red"))


def _exception(span: Any) -> str:
    """What an event of a span says of an exception, by OpenTelemetry's names."""
    for event in span.events:
        if "exception.message" in event.attributes:
            kind = event.attributes.get("exception.type", "exception")
            return f"{kind}: {event.attributes['exception.message']}"
    return ""


def _as_plain(call: ModelCall) -> dict[str, Any]:
    """A model call as plain data."""
    return {
        "span_ids": [span.span_id for span in call.spans], "model": call.model, "role": call.role,
        "finish_reason": call.finish_reason, "messages": plain(call.messages), "answer": plain(call.answer),
        "prompt_tokens": tokens_in(call)[0], "response_tokens": tokens_in(call)[1],
        "has_token_ids": call.response_ids is not None,
        "has_logprobs": call.logprobs is not None, "policy_version": call.policy_version,
    }  # fmt: skip
