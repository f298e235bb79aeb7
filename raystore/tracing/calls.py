"""The calls of language models that spans trace: one record for each call, however many spans trace it.

`model_calls` reads the spans of whole rollouts; `CallCounter` counts, as spans end, the calls that lack what training
needs, and `Losses` counts those and the spans that are lost, by reason; the first of each is logged with its remedy.
A span that cannot be read is named in the log and left out: it never fails the others.
Not here: reading one span (`dialects`), sequences to train on (`trajectories`).
"""

from __future__ import annotations

import logging
import threading
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raystore.core.schema import LossReason
from raystore.errors import InvalidValueError, PayloadNotReadableError
from raystore.reports.log import a_minute, logger_of, once
from raystore.tracing import semconv
from raystore.tracing.dialects import CallFacts, is_model_call, tool_call
from raystore.types.spans import Span

logger: logging.Logger = logger_of("raystore.tracing")

MOST_TOKENS: int = 2**40  #: of one call; a larger number is an error of its tracer
REASON_LENGTH: int = 40  #: characters of a finish reason that are counted by
SHOWN: int = 3  #: spans that one line of the log names


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call of a language model within an attempt, from all the spans that trace it.

    Attributes:
        spans: those spans; the first has the token ids, if any has.
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
    _facts: tuple[CallFacts, ...]  # of each span

    @property
    def rollout_id(self) -> str:
        """Id of the rollout that it belongs to."""
        return self.spans[0].rollout_id

    @property
    def attempt_id(self) -> str:
        """Id of the attempt that it belongs to."""
        return self.spans[0].attempt_id

    @property
    def span_id(self) -> str:
        """The id of the first of its spans."""
        return self.spans[0].span_id

    @property
    def model(self) -> str | None:
        """Name of the model that answered, else of the one that was asked for; None if not known."""
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
        calls = [call for facts in self._facts for call in facts.tool_calls]
        if calls and not any("tool_calls" in message for message in found):
            found = found or [{"role": "assistant", "content": None}]
            found[0] = found[0] | {"tool_calls": calls}
        return found

    def _text(self, fact: str) -> str | None:
        return next((text for facts in self._facts if (text := facts.text(fact)) is not None), None)

    def _messages(self, fact: str) -> list[dict[str, Any]]:
        return next((found for facts in self._facts if (found := facts.messages(fact))), [])

    def __repr__(self) -> str:
        counts = [None if ids is None else len(ids) for ids in (self.prompt_ids, self.response_ids)]
        return f"<ModelCall {self.span_id} of {self.rollout_id}: {counts[0]} + {counts[1]} tokens, role {self.role}>"


def model_calls(spans: Iterable[Span]) -> list[ModelCall]:
    """The calls of language models that these spans trace, in the order of the first span of each.

    Takes the spans of one rollout or of several. Spans of one attempt are one call if they have the same response id,
    or if one encloses the other and they do not both have response ids; unless both have token ids that differ. Which
    attributes are read, `docs/spans.md` lists. Logs which spans cannot be read. Raises `InvalidValueError` for what is
    no span.
    """
    given = checked_spans(spans)
    places = {id(span): place for place, span in enumerate(given)}
    unreadable: list[tuple[Span, Exception]] = []
    found = [call for attempt in by_attempt(given).values() for call in _calls_of(attempt, unreadable)]
    if unreadable:
        shown = "; ".join(f"{_place(span)}: {error}" for span, error in unreadable[:SHOWN])
        more = f"; and {len(unreadable) - SHOWN} more" if len(unreadable) > SHOWN else ""
        logger.warning("Passed over while model calls were read: %s%s", shown, more, extra=a_minute("passed over"))
    return sorted(found, key=lambda call: min(places[id(span)] for span in call.spans))


def checked_spans(spans: Any) -> list[Span]:
    """These spans as a list; their class may be agent-lightning's. Raises `InvalidValueError` for what is no span."""
    if isinstance(spans, Mapping):
        flat = "[span for spans in found.values() for span in spans]"
        raise InvalidValueError("spans", spans, f"spans; of what query_many_spans found: {flat}")
    if isinstance(spans, (str, bytes)) or not isinstance(spans, Iterable) or hasattr(spans, "span_id"):
        raise InvalidValueError("spans", spans, "a list of spans, as query_spans gives them")
    found: list[Span] = list(spans)
    for number, span in enumerate(found):
        if not hasattr(span, "span_id"):
            raise InvalidValueError(f"spans[{number}]", span, "a Span, as query_spans gives them")
    return found


def by_attempt(spans: Iterable[Span]) -> dict[tuple[str, str], list[Span]]:
    """Spans by rollout id and attempt id, in their order."""
    attempts: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        attempts.setdefault((span.rollout_id, span.attempt_id), []).append(span)
    return attempts


# -- which spans are one call ------------------------------------------------------------------------------------------


class _Joined:
    """What spans that are one call say of it together."""

    def __init__(self, facts: CallFacts) -> None:
        self.facts = [facts]
        self.response_id = facts.response_id
        self.ids = [facts.prompt_ids, facts.response_ids]

    def agrees_with(self, other: _Joined) -> bool:
        """Whether the two are equal in every fact that both have."""
        pairs = zip((self.response_id, *self.ids), (other.response_id, *other.ids), strict=True)
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)

    def join(self, other: _Joined) -> None:
        self.facts += other.facts
        self.response_id = self.response_id or other.response_id
        self.ids = [theirs if mine is None else mine for mine, theirs in zip(self.ids, other.ids, strict=True)]


def _calls_of(spans: Sequence[Span], unreadable: list[tuple[Span, Exception]]) -> Iterator[ModelCall]:
    """The model calls of one attempt; spans that cannot be read are added to `unreadable`."""
    by_id = {span.span_id: span for span in spans}
    readable: dict[str, Mapping[str, Any]] = {}
    found: dict[str, CallFacts] = {}
    for span in spans:
        try:
            attributes: Mapping[str, Any] = span.attributes
            readable[span.span_id] = attributes
            if is_model_call(span.name, attributes):
                facts = found[span.span_id] = CallFacts(span, attributes)
                if facts.bad_logprobs is not None:
                    unreadable.append((span, facts.bad_logprobs))
        except (InvalidValueError, PayloadNotReadableError) as error:
            unreadable.append((span, error))
    for span_id, attributes in readable.items():
        parent = found.get(by_id[span_id].parent_id or "")
        if parent is not None and "tool.call.id" in attributes:
            call = {"id": attributes["tool.call.id"], "name": attributes.get("tool.name")}
            parent.tool_calls.append(tool_call(call | {"arguments": attributes.get("tool.parameters")}))
    for joined in _join(list(found.values()), by_id):
        joined.facts.sort(key=lambda facts: not facts.has_token_ids)
        roles = (_role(facts.span, by_id, readable) for facts in joined.facts)
        versions = (facts.attributes.get(semconv.POLICY_VERSION) for facts in joined.facts)
        yield ModelCall(
            spans=tuple(facts.span for facts in joined.facts),
            prompt_ids=joined.ids[0],
            response_ids=joined.ids[1],
            logprobs=next((facts.logprobs for facts in joined.facts if facts.logprobs is not None), None),
            response_id=joined.response_id,
            role=next((role for role in roles if role is not None), None),
            policy_version=next((version for version in versions if isinstance(version, int)), None),
            _facts=tuple(joined.facts),
        )


def _join(found: Sequence[CallFacts], by_id: Mapping[str, Span]) -> list[_Joined]:
    """One for each call, in the order of their first spans."""
    joined: dict[str, _Joined] = {}  # by span id; the spans of one call have the same
    by_response: dict[str, list[_Joined]] = {}
    for facts in found:
        one = _Joined(facts)
        if facts.response_id is not None:
            known = by_response.setdefault(facts.response_id, [])
            same = next((other for other in known if other.agrees_with(one)), None)
            if same is None:
                known.append(one)
            else:
                same.join(one)
                one = same
        joined[facts.span.span_id] = one
    for facts in found:
        outer = next((joined[above.span_id] for above in _above(facts.span, by_id) if above.span_id in joined), None)
        inner = joined[facts.span.span_id]
        if outer is None or outer is inner or not outer.agrees_with(inner):
            continue
        if outer.response_id is not None and inner.response_id is not None:  # equal, and yet not joined above
            continue
        kept, given = sorted((outer, inner), key=lambda one: found.index(one.facts[0]))
        kept.join(given)
        for moved in given.facts:
            joined[moved.span.span_id] = kept
    return list(dict.fromkeys(joined.values()))


def _above(span: Span, by_id: Mapping[str, Span]) -> Iterator[Span]:
    """The spans that enclose one, the nearest first; each once, should they enclose each other."""
    seen = {span.span_id}
    while span.parent_id is not None and span.parent_id not in seen and span.parent_id in by_id:
        seen.add(span.parent_id)
        span = by_id[span.parent_id]
        yield span


def _role(span: Span, by_id: Mapping[str, Span], readable: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The name of the agent in the nearest span that has one, beginning with the span itself."""
    for enclosing in (span, *_above(span, by_id)):
        attributes = readable.get(enclosing.span_id, {})
        for condition, name in semconv.AGENTS:
            if condition is not None and attributes.get(condition[0]) != condition[1]:
                continue
            found = enclosing.name if name is None else attributes.get(name)
            if isinstance(found, str) and found:
                return found
    return None


# -- calls that lack what training needs -------------------------------------------------------------------------------

_REMEDY = (
    "Ask the server for them (vLLM: `return_token_ids=True` in the request's extra body, and `logprobs=True`) through "
    "a tracer that keeps them (agent-lightning's; OpenInference's for OpenAI), or record the call with "
    "ctx.llm(prompt_ids=, response_ids=, logprobs=), or set the attributes "
    f"{semconv.INPUT_TOKEN_IDS}, {semconv.OUTPUT_TOKEN_IDS} and {semconv.OUTPUT_LOGPROBS} on its span. "
    "(Told once.)"
)
_THEREFORE = {
    "token ids": "they are not trained on",
    "log-probabilities": "no importance ratio can be computed for them",
}


def with_token_ids(calls: Sequence[ModelCall]) -> list[tuple[ModelCall, array[int], array[int]]]:
    """The calls that can be trained on, with the ids of prompt and response; warns once what the others lack."""
    complete, lacking = [], []
    for call in calls:
        if call.prompt_ids is not None and call.response_ids is not None:
            complete.append((call, call.prompt_ids, call.response_ids))
        elif call.spans[0].status.status_code != "ERROR":  # a call that failed has no answer
            lacking.append(call.spans[0])
    _warn_once("token ids", lacking, len(calls))
    unknown = [call.spans[0] for call, _, response in complete if call.logprobs is None and response]
    _warn_once("log-probabilities", unknown, len(calls))
    return complete


def _warn_once(what: str, lacking: Sequence[Span | _EndedCall], among: int) -> None:
    """Warn, once in this process, that these of so many calls lack something."""
    if lacking:
        logger.warning(
            "%d of %d model calls have no %s, so that %s; the first is %s. %s",
            len(lacking), among, what, _THEREFORE[what], _place(lacking[0]), _REMEDY, extra=once("lack", what),
        )  # fmt: skip


def _place(span: Span | _EndedCall) -> str:
    return f"span {span.name!r} ({span.span_id}) of rollout {span.rollout_id}"


class _EndedCall:
    """A model call of which at least one span has ended."""

    __slots__ = (
        "has_logprobs", "has_token_ids", "name", "prompt_tokens", "reason", "response_id", "response_tokens",
        "rollout_id", "span_id",
    )  # fmt: skip

    def __init__(
        self, span: Span, response_id: Any, has_token_ids: bool, has_logprobs: bool, reason: Any = None
    ) -> None:
        self.name, self.span_id, self.rollout_id = span.name, span.span_id, span.rollout_id
        self.response_id: str | None = response_id if isinstance(response_id, str) and response_id else None
        self.has_token_ids = has_token_ids
        self.has_logprobs = has_logprobs
        self.prompt_tokens = _size(span.attributes, semconv.PROMPT_SIZES, semconv.INPUT_TOKEN_IDS)
        self.response_tokens = _size(span.attributes, semconv.RESPONSE_SIZES, semconv.OUTPUT_TOKEN_IDS)
        is_text = isinstance(reason, str) and reason != ""
        self.reason = reason[:REASON_LENGTH].encode(errors="replace").decode() if is_text else None

    def join(self, other: _EndedCall) -> None:
        self.response_id = self.response_id or other.response_id
        self.has_token_ids |= other.has_token_ids
        self.has_logprobs |= other.has_logprobs
        self.prompt_tokens = max(self.prompt_tokens, other.prompt_tokens)
        self.response_tokens = max(self.response_tokens, other.response_tokens)
        self.reason = self.reason or other.reason


def _size(attributes: Mapping[str, Any], places: Sequence[str], ids: str) -> int:
    """How many tokens a prompt or a response has, as its tracer says, or by their ids; 0 if not known."""
    for place in places:
        if type(size := attributes.get(place)) is int and 0 <= size < MOST_TOKENS:
            return size
    found = attributes.get(ids)
    return len(found) if isinstance(found, (array, list, tuple)) else 0


class CallCounter:
    """Counts the model calls of one attempt, and those that lack something, as its spans end; keeps no span.

    Spans are one call by the rules of `model_calls`, except that token ids are not compared: two spans that both have
    them and no response id are two calls, neither of which lacks anything.
    """

    def __init__(self) -> None:
        self._calls: dict[_EndedCall, None] = {}
        self._by_response: dict[str, _EndedCall] = {}
        self._inner: dict[str, list[_EndedCall]] = {}  # by the id of the enclosing span, which has not ended

    def add(self, span: Span) -> None:
        """Take a span that has ended, after those that it encloses; one that cannot be read counts as no call."""
        try:
            self._add(span)
        except Exception:
            logger.debug("Cannot say whether a span is a model call", exc_info=True)

    def _add(self, span: Span) -> None:
        inner = self._inner.pop(span.span_id, [])
        call = _ended_call(span)
        if call is not None:
            inner = [self._joined(call, inner)]
        if inner and span.parent_id is not None:
            self._inner.setdefault(span.parent_id, []).extend(inner)

    def _joined(self, call: _EndedCall, inner: Sequence[_EndedCall]) -> _EndedCall:
        """The call of a span, joined with the calls that are the same: by response id, or among those it encloses."""
        known = self._by_response.get(call.response_id or "")
        if known is not None:
            known.join(call)
            call = known
        self._calls[call] = None
        for one in inner:
            are_two = (one.response_id and call.response_id) or (one.has_token_ids and call.has_token_ids)
            if one is not call and one in self._calls and not are_two:
                call.join(one)
                del self._calls[one]
        if call.response_id is not None:
            self._by_response[call.response_id] = call
        return call

    def total(self) -> dict[str, Any] | None:
        """How many calls there are, their tokens and why they ended, as `finish_attempt` takes it; None without any."""
        if not self._calls:
            return None
        return {
            "turns": len(self._calls),
            "prompt_tokens": sum(call.prompt_tokens for call in self._calls),
            "response_tokens": sum(call.response_tokens for call in self._calls),
            "finish_reasons": dict(Counter(call.reason for call in self._calls if call.reason is not None)),
        }

    def report(self, losses: Losses) -> None:
        """Count the calls that lack something, once all spans have ended, and warn once what to do about it."""
        without_ids = [call for call in self._calls if not call.has_token_ids]
        without_logprobs = [call for call in self._calls if call.has_token_ids and not call.has_logprobs]
        if without_ids:
            losses.count("without_token_ids", len(without_ids))
        if without_logprobs:
            losses.count("without_logprobs", len(without_logprobs))
        _warn_once("token ids", without_ids, len(self._calls))
        _warn_once("log-probabilities", without_logprobs, len(self._calls))


def _ended_call(span: Span) -> _EndedCall | None:
    """The model call that a span traces; None if it traces none, or one that failed and has no answer."""
    attributes = span.attributes
    if not is_model_call(span.name, attributes) or span.status.status_code == "ERROR":
        return None
    if semconv.INPUT_TOKEN_IDS in attributes and semconv.OUTPUT_TOKEN_IDS in attributes:  # as nearly always
        has_logprobs = semconv.OUTPUT_LOGPROBS in attributes or not attributes[semconv.OUTPUT_TOKEN_IDS]
        reasons = attributes.get(semconv.FINISH_REASONS)
        reason = reasons[0] if isinstance(reasons, (list, tuple)) and reasons else reasons
        return _EndedCall(span, attributes.get(semconv.RESPONSE_ID), True, has_logprobs, reason)
    try:
        facts = CallFacts(span, attributes)
    except InvalidValueError:
        return _EndedCall(span, None, False, False)
    has_logprobs = facts.has_token_ids and (facts.logprobs is not None or not facts.response_ids)
    reason = facts.text("finish_reason")
    return _EndedCall(span, facts.response_id, facts.has_token_ids, has_logprobs, reason)


# -- spans that are lost -----------------------------------------------------------------------------------------------

_REMEDIES: dict[LossReason, str] = {
    "sampled_out": (
        "Unset OTEL_TRACES_SAMPLER, or give the TracerProvider sampler=ALWAYS_ON; one that is based on the parent also "
        "drops what has a parent that was not sampled, here or in the process that sent a request."
    ),
    "sdk_disabled": "Unset OTEL_SDK_DISABLED, and set no NoOpTracerProvider, where the agent runs.",
    "no_context": (
        "A thread does not know for which rollout it works: start it with "
        "Thread(target=contextvars.copy_context().run, args=[function]), give its work to a "
        "concurrent.futures.ThreadPoolExecutor, or give the span a parent that has not ended."
    ),
    "too_late": "Let the agent wait for what it has started.",
    "too_many_open": "Let the agent end its spans.",
}
_OF_ONE_SPAN: tuple[LossReason, ...] = ("not_convertible", "refused")  #: other spans of the agent are kept


def _place_of(name: str) -> int:
    """A small number for a name: of names that have an id in them there is no end."""
    return zlib.crc32(name.encode("utf-8", "replace")) % 100


class Losses:
    """The counts of one runner; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection may end a span while it is held
        self._counts: Counter[LossReason] = Counter()

    def count(self, reason: LossReason, number: int = 1) -> None:
        """Count losses without a log line."""
        with self._lock:
            self._counts[reason] += number

    def add(self, reason: LossReason, name: str, story: str) -> None:
        """Count the loss of a span, and log it: once for each reason, or each minute by name if it is at fault."""
        self.count(reason)
        kind = a_minute("lost", reason, _place_of(name)) if reason in _OF_ONE_SPAN else once("lost", reason)
        # A runner reports no more when such a span comes.
        counted = "" if reason == "too_late" else " They are counted."
        remedy = _REMEDIES.get(reason, "The others are kept.")
        logger.warning("%s. %s%s", story.rstrip("."), remedy, counted, extra=kind)

    def take(self) -> dict[LossReason, int]:
        """The counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def give_back(self, counts: Mapping[LossReason, int]) -> None:
        """Add counts that were taken and could not be reported."""
        with self._lock:
            self._counts.update(counts)
