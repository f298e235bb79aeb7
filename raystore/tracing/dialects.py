"""What one span says of the call of a language model, whatever dialect its tracer writes.

`semconv` has the table of places for each fact. A place is looked up in the attributes, in attributes that a tracer
flattened, and in texts that are JSON or that Python printed. Messages come out in the form of OpenAI's chat API.
"""

from __future__ import annotations

import ast
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raystore.errors import InvalidValueError
from raystore.tracing import semconv
from raystore.types.spans import Event, Span
from raystore.values.plain import pack_floats, pack_integers


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


class CallFacts:
    """What one span says of a model call. Raises `InvalidValueError` if its token ids cannot be read.

    If its log-probabilities cannot be read, they are None, and `bad_logprobs` is the error.
    """

    __slots__ = (
        "_tree", "attributes", "bad_logprobs", "logprobs", "prompt_ids", "response_id", "response_ids", "span",
        "tool_calls",
    )  # fmt: skip

    def __init__(self, span: Span, attributes: Mapping[str, Any]) -> None:
        self.span: Span = span
        self.attributes: Mapping[str, Any] = attributes
        self._tree: dict[str, Any] | None = None
        self.tool_calls: list[dict[str, Any]] = []  #: from spans of their own
        self.prompt_ids: array[int] | None = self._ids("prompt_ids")
        self.response_ids: array[int] | None = self._ids("response_ids")
        response_id = self._first("response_id")[1]
        self.response_id: str | None = response_id if isinstance(response_id, str) and response_id else None
        self.logprobs: array[float] | None = None
        self.bad_logprobs: InvalidValueError | None = None
        try:
            self.logprobs = self._logprobs()
        except InvalidValueError as error:  # the tokens are good
            self.bad_logprobs = error

    @property
    def has_token_ids(self) -> bool:
        """Whether the ids of prompt and response are known."""
        return self.prompt_ids is not None and self.response_ids is not None

    def _first(self, fact: str) -> tuple[str, Any]:
        """The first place of a fact that has a value, and the value; ("", None) if none has."""
        for place in semconv.PLACES[fact]:
            if (value := self.attributes.get(place)) is not None:
                return place, value
        if not any(name.startswith(semconv.ANSWERS) for name in self.attributes):
            return "", None
        return next(self._nested(fact), ("", None))

    def _nested(self, fact: str) -> Iterator[tuple[str, Any]]:
        """The places of a fact that have a value, and the values, if places are taken for paths."""
        if self._tree is None:
            self._tree = _tree_of(self.attributes)
        return _found(self._tree, fact)

    def text(self, fact: str) -> str | None:
        """The first value of a fact that is a text; None if none is."""
        return next((value for _, value in self._nested(fact) if isinstance(value, str) and value), None)

    def _ids(self, fact: str) -> array[int] | None:
        place, value = self._first(fact)
        if value is None:
            return None
        items = _parsed(value)
        if isinstance(items, (list, tuple)) and items and isinstance(items[0], (list, tuple)):
            items = items[0]  # of the first choice
        return pack_integers(place, items)

    def _logprobs(self) -> array[float] | None:
        if self.response_ids is None:
            return None
        place, value = self._first("logprobs")
        if value is None:
            return None
        items = _parsed(value)
        if isinstance(items, (list, tuple)):
            items = [item.get("logprob") if isinstance(item, Mapping) else item for item in items]
        packed = pack_floats(place, items)
        if len(packed) != len(self.response_ids):
            raise InvalidValueError(
                place, f"[{len(packed)} numbers]", f"one for each of {len(self.response_ids)} tokens"
            )
        return packed

    def messages(self, fact: str) -> list[dict[str, Any]]:
        """The "messages" or the "answer" in the form of OpenAI's chat API, from the first place that says anything."""
        role = "assistant" if fact == "answer" else "user"
        for _, value in self._nested(fact):
            found = list(_messages(_parsed(value), role))
            if any(message["content"] or "tool_calls" in message for message in found):
                return [*self._instructions(), *found] if fact == "messages" else found
        return self._from_events(fact, role)

    def _instructions(self) -> Iterator[dict[str, Any]]:
        """The system's instructions, which OpenTelemetry keeps apart from the messages."""
        if parts := _parsed(self.attributes.get(semconv.SYSTEM_INSTRUCTIONS)):
            yield from _messages(parts if isinstance(parts, Mapping) else {"parts": parts}, "system")

    def _from_events(self, fact: str, role: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for event in self.span.events:
            if event.name in semconv.DETAIL_EVENTS:
                _, value = next(_found(_tree_of(event.attributes), fact), ("", None))
                found += _messages(_parsed(value), role)
            elif fact == "messages" and event.name in semconv.MESSAGE_EVENTS:
                found += _of_event(event, semconv.MESSAGE_EVENTS[event.name])
            elif fact == "answer" and event.name == semconv.CHOICE_EVENT:
                found += _of_event(event, role)
        return found


def _found(tree: dict[str, Any], fact: str) -> Iterator[tuple[str, Any]]:
    for place in semconv.PLACES[fact]:
        if (value := _at(tree, place.split("."))) is not None:
            yield place, value


def _of_event(event: Event, role: str) -> Iterator[dict[str, Any]]:
    body = {
        name: _parsed(value) if name in ("message", "tool_calls", "body") else value
        for name, node in _tree_of(event.attributes).items()
        for value in [_without_tree(node)]
    }
    yield from _messages([body], role)


# -- attributes as a tree ----------------------------------------------------------------------------------------------

_OWN = ""  # key of the value of a name with which other names begin


def _tree_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Flattened attributes as a tree: a level for each part of a name between dots."""
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
    """An inner node of a tree; a plain dict is a value."""


def _at(node: Any, path: Sequence[str]) -> Any:
    """The value at the end of a path; None if there is none. Texts on the way are parsed."""
    if not path:
        return _without_tree(node)
    head, rest = path[0], path[1:]
    if type(node) is _Node and head not in node and head != "*" and _OWN in node:
        node = node[_OWN]
    node = _parsed(node)
    if isinstance(node, Mapping):
        for name in list(node) if head == "*" else [head]:
            if name not in node:
                return None
            inner = node[name]
            if rest and isinstance(inner, str) and type(node) is _Node:
                inner = node[name] = _parsed(inner)  # the next path finds it parsed
            if (found := _at(inner, rest)) is not None:
                return found
    elif isinstance(node, (list, tuple)) and head.isdecimal() and int(head) < len(node):
        return _at(node[int(head)], rest)
    return None


def _without_tree(node: Any) -> Any:
    """A part of a tree as a value: nodes become lists if names are numbers, else dicts."""
    if type(node) is not _Node:
        return node
    inner = {name: _without_tree(item) for name, item in node.items()}
    if not inner.keys() - {_OWN}:
        return inner.get(_OWN)
    items = {int(name): item for name, item in inner.items() if name.isdecimal()}
    if items:  # other names are about the list as a whole
        return [items[number] for number in sorted(items)]
    inner.pop(_OWN, None)
    return inner


def _parsed(value: Any) -> Any:
    """A list or mapping from its text, as JSON or as Python prints it; anything else as it is."""
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


def _messages(value: Any, role: str) -> Iterator[dict[str, Any]]:
    """Messages of any dialect in the form of OpenAI's chat API; `role` is that of messages that name none."""
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
            inner = _parsed(item.get("message", item))  # of a choice, or of OpenInference
            if isinstance(inner, Mapping):
                yield from _message(inner, role)
            elif isinstance(inner, str):
                yield {"role": role, "content": inner}


def _message(item: Mapping[str, Any], role: str) -> Iterator[dict[str, Any]]:
    role = str(item.get("role") or role)
    calls = [tool_call(call) for call in _sequence(item.get("tool_calls"))]
    if isinstance(legacy := item.get("function_call"), Mapping):
        calls.append(tool_call(legacy))
    content = _parsed(item["contents"]) if "contents" in item else item.get("content", item.get("text"))
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
            calls.append(tool_call(part))
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
    """The parts of a content, also of one that a tracer wrote as JSON; None if it is a text."""
    parts = _parsed(content)
    if not isinstance(parts, (list, tuple)):
        return None
    if isinstance(content, str) and not all(isinstance(part, Mapping) and "type" in part for part in parts):
        return None  # a text that happens to be JSON
    return parts


def tool_call(item: Any) -> dict[str, Any]:
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
    value = _parsed(value)
    return value if isinstance(value, (list, tuple)) else []
