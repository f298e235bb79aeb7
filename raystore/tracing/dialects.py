"""Calls of language models as tracers write them, brought to one form, whatever the dialect.

`model_calls` reads the places that `semconv` lists; what several spans say of one call becomes one record. A
span that cannot be read is named in the log and passed over: it never fails the others.
Not here: rewards (`raystore.spans`), which ids to train on (`triplets`, `trajectories`).
"""

from __future__ import annotations

import ast
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raystore.errors import InvalidValueError, PayloadNotReadableError
from raystore.spans import Event, Span, find_final_reward
from raystore.tracing import semconv
from raystore.tracing.losses import Losses
from raystore.values.arrays import pack_floats, pack_integers

logger: logging.Logger = logging.getLogger("raystore.tracing")

SHOWN = 3  #: spans that one line of the log names

_TOLD: set[str] = set()  # what this process has been told once


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call of a language model within an attempt, as all spans together tell of it.

    Attributes:
        spans: those spans; the first is the one with the token ids, if there is one.
        prompt_ids: token ids of the prompt, packed; None if no span has them.
        response_ids: token ids that the model generated (of its first choice); None if no span has them.
        logprobs: of the response's tokens under the policy that generated them, natural logarithm; None if not known,
            or not one for each token.
        response_id: the server's id of its answer; None if not known.
        role: name of the agent whose span encloses the call, from the nearest one; None if there is none.
        policy_version: of the weights that the attempt was claimed with; None if not known.
    """

    spans: tuple[Span, ...]
    prompt_ids: array[int] | None
    response_ids: array[int] | None
    logprobs: array[float] | None
    response_id: str | None
    role: str | None
    policy_version: int | None
    _told_by: tuple[_Told, ...]

    @property
    def rollout_id(self) -> str:
        """The rollout that it belongs to."""
        return self.spans[0].rollout_id

    @property
    def attempt_id(self) -> str:
        """The attempt that it belongs to."""
        return self.spans[0].attempt_id

    @property
    def span_id(self) -> str:
        """The first of its spans."""
        return self.spans[0].span_id

    @property
    def model(self) -> str | None:
        """Name of the model, the one that answered before the one that was asked for; None if not known."""
        return self._text("model")

    @property
    def finish_reason(self) -> str | None:
        """Why the model stopped, in its tracer's words ("stop", "length", "tool_calls", ...); None if not known."""
        return self._text("finish_reason")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the model was given, in the form of OpenAI's chat API, which chat templates take; empty if not known.

        Each has `role` and `content` (text, a list of parts, or None), and where there are any `tool_calls` (each with
        `id`, `type`, and `function` with `name` and `arguments`, which is JSON text), `tool_call_id`, `name`,
        `reasoning_content`.
        """
        return self._messages("messages")

    @property
    def answer(self) -> list[dict[str, Any]]:
        """What the model answered, one message for each choice, in the form of `messages`; empty if not known."""
        found = self._messages("answer")
        calls = [call for told in self._told_by for call in told.tool_calls]
        if calls and not any("tool_calls" in message for message in found):
            found = found or [{"role": "assistant", "content": None}]
            found[0] = found[0] | {"tool_calls": calls}
        return found

    def _text(self, fact: str) -> str | None:
        for told in self._told_by:
            for _, value in told.nested(fact):
                if isinstance(value, str) and value:
                    return value
        return None

    def _messages(self, fact: str) -> list[dict[str, Any]]:
        for told in self._told_by:
            if found := told.messages(fact):
                return found
        return []

    def __repr__(self) -> str:
        counts = [None if ids is None else len(ids) for ids in (self.prompt_ids, self.response_ids)]
        return f"<ModelCall {self.span_id} of {self.rollout_id}: {counts[0]} + {counts[1]} tokens, role {self.role}>"


def is_model_call(name: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a span with this name and these attributes is the call of a language model (not an embedding, a tool)."""
    if semconv.OUTPUT_TOKEN_IDS in attributes or "response_token_ids" in attributes:
        return True
    for kind, values in semconv.MODEL_CALLS.items():
        value = attributes.get(kind)
        if type(value) is str and value in values:
            return True
    # An embedding's raw request has no choices.
    return name == semconv.RAW_REQUEST and any(
        key.startswith("llm.") and key.endswith(".choices") for key in attributes
    )


def model_calls(spans: Iterable[Span]) -> list[ModelCall]:
    """The calls of language models that these spans tell of, in the order in which they are first told of.

    Takes the spans of one rollout or of several. Spans with the same response id, in one attempt, are one call; so are
    two of which one encloses the other and that do not both have response ids; unless both have token ids that differ.
    Which attributes are read, `docs/spans.md` lists. Raises `InvalidValueError` for what is no span.
    """
    given = list(_checked(spans))
    places = {id(span): place for place, span in enumerate(given)}
    odd: list[tuple[Span, Exception]] = []
    found = [call for of_attempt in by_attempt(given).values() for call in _calls_of(of_attempt, odd)]
    _name(odd)
    return sorted(found, key=lambda call: min(places[id(span)] for span in call.spans))


def by_attempt(spans: Iterable[Span]) -> dict[tuple[str, str], list[Span]]:
    """Spans by rollout and attempt, in their order."""
    attempts: dict[tuple[str, str], list[Span]] = {}
    for span in _checked(spans):
        attempts.setdefault((span.rollout_id, span.attempt_id), []).append(span)
    return attempts


def _checked(spans: Iterable[Span]) -> Iterator[Span]:
    """The same, if it is spans; their class may be agent-lightning's."""
    if isinstance(spans, Mapping):
        flat = "[span for spans in found.values() for span in spans]"
        raise InvalidValueError("spans", spans, f"spans; of what query_many_spans found: {flat}")
    for number, span in enumerate(spans):
        if not hasattr(span, "span_id"):
            raise InvalidValueError(f"spans[{number}]", span, "a Span, as query_spans gives them")
        yield span


def final_rewards(spans: Iterable[Span]) -> dict[tuple[str, str], float | None]:
    """The final reward of each attempt, by rollout and attempt; None too if its reward span cannot be decoded here."""
    rewards: dict[tuple[str, str], float | None] = {}
    for key, of_attempt in by_attempt(spans).items():
        try:
            rewards[key] = find_final_reward(of_attempt)
        except PayloadNotReadableError as error:
            logger.warning("The reward of attempt %s of rollout %s is not known: %s", key[1], key[0], error)
            rewards[key] = None
    return rewards


def with_token_ids(calls: Sequence[ModelCall]) -> list[tuple[ModelCall, array[int], array[int]]]:
    """Those that can be trained on, with ids of prompt and response. Says once in a process what the others lack."""
    complete, lacking = [], []
    for call in calls:
        if call.prompt_ids is not None and call.response_ids is not None:
            complete.append((call, call.prompt_ids, call.response_ids))
        elif call.spans[0].status.status_code != "ERROR":  # which has no answer
            lacking.append(call)
    if lacking:
        _tell_once("token ids", lacking[0].spans[0], len(lacking), len(calls))
    if unknown := [call for call, _, response in complete if call.logprobs is None and response]:
        _tell_once("log-probabilities", unknown[0].spans[0], len(unknown), len(calls))
    return complete


_REMEDY = (
    "Ask the server for them (vLLM: `return_token_ids=True` in the request's extra body, and `logprobs=True`) through "
    "a tracer that keeps them (agent-lightning's; OpenInference's for OpenAI), or record the call with "
    "ctx.llm(prompt_ids=, response_ids=, logprobs=), or set the attributes "
    f"{semconv.INPUT_TOKEN_IDS}, {semconv.OUTPUT_TOKEN_IDS} and {semconv.OUTPUT_LOGPROBS} on its span. "
    "Said once in this process."
)


_THEREFORE = {
    "token ids": "they are not trained on",
    "log-probabilities": "no importance ratio can be computed for them",
}


def _tell_once(what: str, first: Span | _Seen, lacking: int, among: int) -> None:
    if what in _TOLD:
        return
    _TOLD.add(what)
    counts = f"{lacking} of {among} model calls have no {what}, so that {_THEREFORE[what]}"
    logger.warning("%s; the first is %s. %s", counts, _shown(first), _REMEDY)


def _shown(span: Span | _Seen) -> str:
    return f"span {span.name!r} ({span.span_id}) of rollout {span.rollout_id}"


def _name(odd: Sequence[tuple[Span, Exception]]) -> None:
    """Say which spans were not, or not wholly, read."""
    if odd:
        shown = "; ".join(f"{_shown(span)}: {error}" for span, error in odd[:SHOWN])
        more = f"; and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        logger.warning("Passed over while model calls were read: %s%s", shown, more)


# -- as spans end ------------------------------------------------------------------------------------------------------


class _Seen:
    """A model call of which at least one span has ended."""

    __slots__ = ("has_logprobs", "has_token_ids", "name", "response_id", "rollout_id", "span_id")

    def __init__(self, span: Span, response_id: Any, has_token_ids: bool, has_logprobs: bool) -> None:
        self.name, self.span_id, self.rollout_id = span.name, span.span_id, span.rollout_id
        self.response_id: str | None = response_id if isinstance(response_id, str) and response_id else None
        self.has_token_ids = has_token_ids
        self.has_logprobs = has_logprobs

    def take(self, other: _Seen) -> None:
        self.response_id = self.response_id or other.response_id
        self.has_token_ids |= other.has_token_ids
        self.has_logprobs |= other.has_logprobs


class CallsSeen:
    """What the model calls of one attempt lack, of its spans as they end; keeps none of them.

    Spans are one call by the rules of `model_calls`, except that token ids are not compared: two that both have them
    and no response id are two calls, of which none lacks anything.
    """

    def __init__(self) -> None:
        self._calls: dict[_Seen, None] = {}
        self._by_response: dict[str, _Seen] = {}
        self._inner: dict[str, list[_Seen]] = {}  # by the id of the span that encloses them, which has not ended

    def add(self, span: Span) -> None:
        """A span has ended, and those that it encloses before it; one that cannot be read is no call."""
        try:
            self._add(span)
        except Exception:
            logger.debug("Cannot say whether a span is a model call", exc_info=True)

    def _add(self, span: Span) -> None:
        inner = self._inner.pop(span.span_id, [])
        call = _seen(span)
        if call is not None:
            inner = [self._joined(call, inner)]
        if inner and span.parent_id is not None:
            self._inner.setdefault(span.parent_id, []).extend(inner)

    def _joined(self, call: _Seen, inner: Sequence[_Seen]) -> _Seen:
        """The call itself, or the one that it is told of before; what it encloses may be the same."""
        known = self._by_response.get(call.response_id or "")
        if known is not None:
            known.take(call)
            call = known
        self._calls[call] = None
        for one in inner:
            are_two = (one.response_id and call.response_id) or (one.has_token_ids and call.has_token_ids)
            if one is not call and one in self._calls and not are_two:
                call.take(one)
                del self._calls[one]
        if call.response_id is not None:
            self._by_response[call.response_id] = call
        return call

    def tell(self, losses: Losses) -> None:
        """Count the calls that cannot be trained on, once all spans have ended; and say once what to do about it."""
        without_ids = [call for call in self._calls if not call.has_token_ids]
        without_logprobs = [call for call in self._calls if call.has_token_ids and not call.has_logprobs]
        if without_ids:
            losses.count("without_token_ids", len(without_ids))
            _tell_once("token ids", without_ids[0], len(without_ids), len(self._calls))
        if without_logprobs:
            losses.count("without_logprobs", len(without_logprobs))
            _tell_once("log-probabilities", without_logprobs[0], len(without_logprobs), len(self._calls))


def _seen(span: Span) -> _Seen | None:
    """What one span tells of a model call, None if it is none, or one that failed and has no answer."""
    attributes = span.attributes
    if not is_model_call(span.name, attributes) or span.status.status_code == "ERROR":
        return None
    if semconv.INPUT_TOKEN_IDS in attributes and semconv.OUTPUT_TOKEN_IDS in attributes:  # as nearly always
        has_logprobs = semconv.OUTPUT_LOGPROBS in attributes or not attributes[semconv.OUTPUT_TOKEN_IDS]
        return _Seen(span, attributes.get(semconv.RESPONSE_ID), True, has_logprobs)
    try:
        told = _Told(span, attributes, [])
    except InvalidValueError:
        return _Seen(span, None, False, False)
    has_token_ids = told.prompt_ids is not None and told.response_ids is not None
    has_logprobs = has_token_ids and (told.logprobs is not None or not told.response_ids)
    return _Seen(span, told.response_id, has_token_ids, has_logprobs)


# -- one span ----------------------------------------------------------------------------------------------------------


class _Told:
    """What one span tells of a model call."""

    __slots__ = ("_tree", "attributes", "logprobs", "prompt_ids", "response_id", "response_ids", "span", "tool_calls")

    def __init__(self, span: Span, attributes: Mapping[str, Any], odd: list[tuple[Span, Exception]]) -> None:
        self.span = span
        self.attributes = attributes
        self._tree: dict[str, Any] | None = None
        self.tool_calls: list[dict[str, Any]] = []  #: in spans of their own
        self.prompt_ids = self._ids("prompt_ids")
        self.response_ids = self._ids("response_ids")
        response_id = self.first("response_id")[1]
        self.response_id: str | None = response_id if isinstance(response_id, str) and response_id else None
        self.logprobs: array[float] | None = None
        try:
            self.logprobs = self._logprobs()
        except InvalidValueError as error:  # the tokens are good
            odd.append((span, error))

    def first(self, fact: str) -> tuple[str, Any]:
        """The best place of a fact that has a value, and the value; two times nothing if none has."""
        for place in semconv.PLACES[fact]:
            if (value := self.attributes.get(place)) is not None:
                return place, value
        if not any(name.startswith(semconv.ANSWERS) for name in self.attributes):
            return "", None
        return next(self.nested(fact), ("", None))

    def nested(self, fact: str) -> Iterator[tuple[str, Any]]:
        """All places of a fact that have a value, by their paths."""
        if self._tree is None:
            self._tree = _grown(self.attributes)
        for place in semconv.PLACES[fact]:
            if (value := _walk(self._tree, place.split("."))) is not None:
                yield place, value

    def _ids(self, fact: str) -> array[int] | None:
        place, value = self.first(fact)
        if value is None:
            return None
        items = _opened(value)
        if isinstance(items, (list, tuple)) and items and isinstance(items[0], (list, tuple)):
            items = items[0]  # of the first choice
        return pack_integers(place, items)

    def _logprobs(self) -> array[float] | None:
        if self.response_ids is None:
            return None
        place, value = self.first("logprobs")
        if value is None:
            return None
        items = _opened(value)
        if isinstance(items, (list, tuple)):
            items = [item.get("logprob") if isinstance(item, Mapping) else item for item in items]
        packed = pack_floats(place, items)
        if len(packed) != len(self.response_ids):
            raise InvalidValueError(
                place, f"[{len(packed)} numbers]", f"one for each of {len(self.response_ids)} tokens"
            )
        return packed

    def messages(self, fact: str) -> list[dict[str, Any]]:
        """Messages in the form of OpenAI's chat API, from the first place that says anything."""
        for _, value in self.nested(fact):
            if found := list(_normal(_opened(value), "assistant" if fact == "answer" else "user")):
                if any(message["content"] or "tool_calls" in message for message in found):
                    return self._instructed(found) if fact == "messages" else found
        return self._from_events(fact)

    def _instructed(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Behind the system's instructions, where the convention keeps them apart."""
        parts = _opened(self.attributes.get(semconv.SYSTEM_INSTRUCTIONS))
        if not parts:
            return found
        return [
            *_normal([parts] if isinstance(parts, Mapping) else [{"role": "system", "parts": parts}], "system"),
            *found,
        ]

    def _from_events(self, fact: str) -> list[dict[str, Any]]:
        """Messages that are events of the span."""
        found: list[dict[str, Any]] = []
        for event in self.span.events:
            if event.name in semconv.DETAIL_EVENTS:
                inner = _grown(event.attributes)
                for place in semconv.PLACES[fact]:
                    if (value := _walk(inner, place.split("."))) is not None:
                        found += _normal(_opened(value), "assistant" if fact == "answer" else "user")
                        break
            elif fact == "messages" and event.name in semconv.MESSAGE_EVENTS:
                found += _of_event(event, semconv.MESSAGE_EVENTS[event.name])
            elif fact == "answer" and event.name == semconv.CHOICE_EVENT:
                found += _of_event(event, "assistant")
        return found


def _of_event(event: Event, role: str) -> Iterator[dict[str, Any]]:
    body = {
        name: _opened(value) if name in ("message", "tool_calls", "body") else value
        for name, value in _plain(_grown(event.attributes)).items()
    }
    yield from _normal([body], role)


# -- attributes as a tree ----------------------------------------------------------------------------------------------

_OWN = ""  # in a tree: the value of a name that is also the beginning of others


def _grown(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Flattened attributes as a tree of dicts, one level for each part of a name."""
    tree: dict[str, Any] = {}
    for name, value in attributes.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            inner = node.get(part)
            if type(inner) is not _Node:
                inner = node[part] = _Node() if inner is None else _Node({_OWN: inner})
            node = inner
        if type(node.get(last)) is _Node:
            node[last][_OWN] = value
        else:
            node[last] = value
    return tree


class _Node(dict[str, Any]):
    """An inner node of the tree, told from a value that is a dict."""


def _walk(node: Any, path: Sequence[str]) -> Any:
    """What stands at the end of a path, plain; None if nothing does."""
    if not path:
        return _plain(node)
    head, rest = path[0], path[1:]
    if type(node) is _Node and head not in node and head != "*" and _OWN in node:
        node = node[_OWN]
    node = _opened(node)
    if isinstance(node, Mapping):
        for name in list(node) if head == "*" else [head]:
            if name not in node:
                return None
            inner = node[name]
            if rest and isinstance(inner, str) and type(node) is _Node:
                inner = node[name] = _opened(inner)  # once
            if (found := _walk(inner, rest)) is not None:
                return found
    elif isinstance(node, (list, tuple)) and head.isdecimal() and int(head) < len(node):
        return _walk(node[int(head)], rest)
    return None


def _plain(node: Any) -> Any:
    """A part of the tree as dicts, and as lists where all names are numbers."""
    if not isinstance(node, dict) or (
        type(node) is not _Node and not any(type(item) is _Node for item in node.values())
    ):
        return node
    inner = {name: _plain(item) for name, item in node.items()}
    if not inner.keys() - {_OWN}:
        return inner.get(_OWN)
    items = {int(name): item for name, item in inner.items() if name.isdecimal()}
    if items:  # names beside them are about the whole
        return [items[number] for number in sorted(items)]
    inner.pop(_OWN, None)
    return inner


def _opened(value: Any) -> Any:
    """A list or mapping that was written as JSON, or as Python prints it; anything else as it is."""
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # a text that begins with a bracket
        return value


# -- messages ----------------------------------------------------------------------------------------------------------


def _normal(value: Any, role: str) -> Iterator[dict[str, Any]]:
    """Messages of any dialect in the form of OpenAI's chat API; `role` is for those that name none."""
    if isinstance(value, str):
        value = [{"content": value}]
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return
    for item in value:
        if isinstance(item, str):
            item = {"content": item}
        if isinstance(item, Mapping):
            inner = _opened(item.get("message", item))  # of a choice, or of OpenInference
            if isinstance(inner, Mapping):
                yield from _message(inner, role)
            elif isinstance(inner, str):
                yield {"role": role, "content": inner}


def _message(item: Mapping[str, Any], role: str) -> Iterator[dict[str, Any]]:
    role = str(item.get("role") or role)
    calls = [_tool_call(call) for call in _sequence(item.get("tool_calls"))]
    if isinstance(legacy := item.get("function_call"), Mapping):
        calls.append(_tool_call(legacy))
    content = _opened(item["contents"]) if "contents" in item else item.get("content", item.get("text"))
    parts = item.get("parts")
    if parts is None:
        parts = _parts_in(content)
    texts: list[Any] = []
    thoughts = item.get("reasoning_content")
    is_answer_of_tools = False
    for part in _sequence(parts):
        if isinstance(part, Mapping):
            part = part.get("message_content", part)  # OpenInference
        if not isinstance(part, Mapping):
            texts.append(part)
            continue
        kind = part.get("type")
        if kind == "tool_call":
            calls.append(_tool_call(part))
        elif kind == "tool_call_response":
            is_answer_of_tools = True
            said = part.get("response", part.get("result"))
            yield {"role": "tool", "content": _text(said), "tool_call_id": part.get("id")}
        elif kind in ("reasoning", "thinking"):
            thoughts = part.get("content", part.get("text"))
        elif kind in ("text", "input_text", "output_text", None) and isinstance(
            said := part.get("text", part.get("content")), str
        ):
            texts.append(said)
        else:
            texts.append(dict(part))
    if is_answer_of_tools and not texts and not calls:
        return
    if parts is not None:
        if all(isinstance(text, str) for text in texts):
            content = "".join(texts) if texts else None
        else:
            content = [{"type": "text", "text": text} if isinstance(text, str) else text for text in texts]
    if calls and content == "null":  # agent-lightning's Weave tracer writes None as JSON
        content = None
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    further = {
        "tool_call_id": item.get("tool_call_id", item.get("id") if role == "tool" else None),
        "name": item.get("name"),
        "reasoning_content": thoughts,
    }
    message |= {name: said for name, said in further.items() if said}
    yield message


def _parts_in(content: Any) -> Sequence[Any] | None:
    """The parts that a content consists of, also where a tracer wrote them as JSON; None if it is a text."""
    parts = _opened(content)
    if not isinstance(parts, (list, tuple)):
        return None
    if isinstance(content, str) and not all(isinstance(part, Mapping) and "type" in part for part in parts):
        return None  # a text that happens to be JSON
    return parts


def _tool_call(item: Any) -> dict[str, Any]:
    """A call of a tool in OpenAI's form."""
    if isinstance(item, Mapping):
        item = item.get("tool_call", item)  # OpenInference
    if not isinstance(item, Mapping):
        item = {"name": str(item)}
    function = item.get("function")
    function = function if isinstance(function, Mapping) else item
    called = {"name": function.get("name"), "arguments": _text(function.get("arguments"))}
    return {"id": item.get("id"), "type": "function", "function": called}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _sequence(value: Any) -> Sequence[Any]:
    value = _opened(value)
    return value if isinstance(value, (list, tuple)) else []


# -- one attempt -------------------------------------------------------------------------------------------------------


class _Group:
    """Spans that tell of one call."""

    def __init__(self, told: _Told) -> None:
        self.told = [told]
        self.response_id = told.response_id
        self.prompt_ids, self.response_ids = told.prompt_ids, told.response_ids

    def is_one_with(self, other: _Group) -> bool:
        """Whether nothing that both know differs."""
        return all(
            one is None or another is None or one == another
            for one, another in (
                (self.response_id, other.response_id),
                (self.prompt_ids, other.prompt_ids),
                (self.response_ids, other.response_ids),
            )
        )

    def take(self, other: _Group) -> None:
        self.told += other.told
        self.response_id = other.response_id if self.response_id is None else self.response_id
        self.prompt_ids = other.prompt_ids if self.prompt_ids is None else self.prompt_ids
        self.response_ids = other.response_ids if self.response_ids is None else self.response_ids


def _calls_of(spans: Sequence[Span], odd: list[tuple[Span, Exception]]) -> Iterator[ModelCall]:
    """The model calls of one attempt."""
    by_id = {span.span_id: span for span in spans}
    readable: dict[str, Mapping[str, Any]] = {}
    told: dict[str, _Told] = {}
    for span in spans:
        try:
            attributes: Mapping[str, Any] = span.attributes
            readable[span.span_id] = attributes
            if is_model_call(span.name, attributes):
                told[span.span_id] = _Told(span, attributes, odd)
        except (InvalidValueError, PayloadNotReadableError) as error:
            odd.append((span, error))
    for span_id, attributes in readable.items():
        parent = told.get(by_id[span_id].parent_id or "")
        if parent is not None and "tool.call.id" in attributes:
            call = {"id": attributes["tool.call.id"], "name": attributes.get("tool.name")}
            parent.tool_calls.append(_tool_call(call | {"arguments": attributes.get("tool.parameters")}))
    for group in _grouped(list(told.values()), by_id):
        group.told.sort(key=lambda one: one.prompt_ids is None or one.response_ids is None)
        yield ModelCall(
            spans=tuple(one.span for one in group.told),
            prompt_ids=group.prompt_ids,
            response_ids=group.response_ids,
            logprobs=next((one.logprobs for one in group.told if one.logprobs is not None), None),
            response_id=group.response_id,
            role=next((role for one in group.told if (role := _role(one.span, by_id, readable)) is not None), None),
            policy_version=next((version for one in group.told if (version := _version(one)) is not None), None),
            _told_by=tuple(group.told),
        )


def _version(told: _Told) -> int | None:
    version = told.attributes.get(semconv.POLICY_VERSION)
    return version if isinstance(version, int) else None


def _grouped(told: Sequence[_Told], by_id: Mapping[str, Span]) -> list[_Group]:
    """One group for each call, in the order in which it is first told of."""
    groups: dict[str, _Group] = {}  # by span id; several ids have the same group
    by_response: dict[str, list[_Group]] = {}
    for one in told:
        group = _Group(one)
        if one.response_id is not None:
            known = by_response.setdefault(one.response_id, [])
            same = next((other for other in known if other.is_one_with(group)), None)
            if same is None:
                known.append(group)
            else:
                same.take(group)
                group = same
        groups[one.span.span_id] = group
    for one in told:
        outer = next((groups[above.span_id] for above in _above(one.span, by_id) if above.span_id in groups), None)
        inner = groups[one.span.span_id]
        if outer is None or outer is inner or not outer.is_one_with(inner):
            continue
        if outer.response_id is not None and inner.response_id is not None:  # equal, and yet apart
            continue
        kept, given = sorted((outer, inner), key=lambda group: told.index(group.told[0]))
        kept.take(given)
        for moved in given.told:
            groups[moved.span.span_id] = kept
    return list(dict.fromkeys(groups.values()))


def _above(span: Span, by_id: Mapping[str, Span]) -> Iterator[Span]:
    """The spans that enclose one, from the inside; each once, should they enclose each other."""
    seen = {span.span_id}
    while span.parent_id is not None and span.parent_id not in seen and span.parent_id in by_id:
        seen.add(span.parent_id)
        span = by_id[span.parent_id]
        yield span


def _role(span: Span, by_id: Mapping[str, Span], readable: Mapping[str, Mapping[str, Any]]) -> str | None:
    for enclosing in (span, *_above(span, by_id)):
        attributes = readable.get(enclosing.span_id, {})
        for condition, name in semconv.AGENTS:
            if condition is not None and attributes.get(condition[0]) != condition[1]:
                continue
            found = enclosing.name if name is None else attributes.get(name)
            if isinstance(found, str) and found:
                return found
    return None
