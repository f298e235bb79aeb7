"""Model calls and rewards in every dialect: one form, one record for each call, and what cannot be read is said."""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raystore as rs
from raystore.tracing import calls, semconv
from tests.spans.written import DIALECTS, MESSAGES, TOOL_CALL, Turn, indexed, parts, span

TURN = Turn([1, 2, 3], [4, 5], [-0.5, -0.25])
CALL = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
CALLING = Turn([1, 2], [9], [-1.0], "chatcmpl-0", "tool_calls", MESSAGES[:2], CALL)


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """What the process is told."""
    caplog.set_level(logging.INFO, "raystore")
    return caplog


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("turn", [TURN, CALLING], ids=["text", "tool call"])
def test_every_dialect_tells_the_same(dialect: str, turn: Turn, told: Any) -> None:
    """Token ids, log-probabilities, messages and tool calls come out in one form, from one record."""
    (call,) = rs.model_calls(DIALECTS[dialect](turn))
    assert (call.prompt_ids, call.response_ids) == (array("i", turn.prompt_ids), array("i", turn.response_ids))
    assert turn.logprobs is not None and call.logprobs == array("f", turn.logprobs)
    assert (call.response_id, call.model, call.finish_reason) == (turn.response_id, "m", turn.finish_reason)
    assert call.messages == turn.messages
    assert call.answer == [turn.answer]
    assert (call.rollout_id, call.attempt_id, call.role) == ("ro", "at", None)
    assert "ModelCall" in repr(call) and told.records == []


@pytest.mark.parametrize(
    ("outer", "inner"), [*combinations(DIALECTS, 2), *combinations(reversed(DIALECTS), 2)], ids=str
)
def test_a_call_under_two_instrumentations_is_one(outer: Any, inner: Any) -> None:
    """Beside each other or within each other, also where only one of them knows the response id."""
    for is_nested in (False, True):
        first, second = DIALECTS[outer](TURN), DIALECTS[inner](TURN)
        if is_nested:
            second[-1].parent_id = first[-1].span_id
        (call,) = rs.model_calls([*second, *first])
        assert len(rs.triplets([*first, *second])) == 1 and len(call.spans) >= 2
        assert call.messages == MESSAGES and call.logprobs == array("f", [-0.5, -0.25])


def test_two_calls_stay_two() -> None:
    """Whatever else is the same: the tokens, the id of a server that gives all answers one, the span around them."""
    other = Turn([1, 2, 3], [4, 6], [-0.5, -0.25])  # sampled again, by a server whose ids do not tell
    for one in DIALECTS.values():
        assert len(rs.triplets([*one(TURN), *one(other)])) == 2
        again = Turn([1, 2, 3], [4, 5], [-0.5, -0.25], "chatcmpl-2")
        assert len(rs.triplets([*one(TURN), *one(again)])) == 2
        assert len(rs.triplets([*one(TURN), *one(TURN, attempt_id="at-2")])) == 2
        around = span("chat", {"gen_ai.operation.name": "chat"})  # which says nothing itself
        within = [*one(TURN), *one(again)]
        for each in within:
            each.parent_id = each.parent_id or around.span_id
        assert len(rs.model_calls([*within, around])) == 2


def test_calls_come_in_the_order_given() -> None:
    """Attempts may be mixed, and one of several spans counts by its first."""
    turns = [Turn([n], [n], response_id=f"r{n}") for n in range(4)]
    outer, inner = DIALECTS["litellm"](turns[0])
    spans = [outer]
    spans += DIALECTS["agentops"](turns[1], rollout_id="other") + DIALECTS["genai"](turns[2]) + [inner]
    spans += DIALECTS["weave"](turns[3], rollout_id="other")
    assert [list(t.prompt_ids) for t in rs.triplets(spans)] == [[0], [1], [2], [3]]
    assert rs.triplets([]) == [] and rs.model_calls(iter(spans))[0].response_id == "r0"


def test_messages_as_events() -> None:
    """OpenTelemetry's forms before messages were attributes: an event each, or one with all of them."""
    events = [
        rs.Event(name="gen_ai.system.message", attributes={"content": "be good"}),
        rs.Event(name="gen_ai.user.message", attributes={"content": "1+1?", "role": "user"}),
        rs.Event(name="gen_ai.assistant.message", attributes={"tool_calls": json.dumps([TOOL_CALL])}),
        rs.Event(name="gen_ai.tool.message", attributes={"content": "2", "id": "call_1"}),
        rs.Event(name="gen_ai.choice", attributes={"index": 0, "message": json.dumps(TURN.answer)}),
    ]
    made = span("chat m", {"gen_ai.operation.name": "chat"})
    (call,) = rs.model_calls([made.model_copy(update={"events": events})])
    assert (call.messages, call.answer) == (MESSAGES, [TURN.answer])
    body = {
        "gen_ai.input.messages": json.dumps(parts(MESSAGES)),
        "gen_ai.output.messages": json.dumps(parts([TURN.answer])),
    }
    odd = rs.Event(name="gen_ai.user.message", attributes={"0.x": 1, "1": 2})
    (call,) = rs.model_calls([made.model_copy(update={"events": [odd, *events]})])
    assert call.messages[-4:] == MESSAGES and call.answer == [TURN.answer]
    details = rs.Event(name="gen_ai.client.inference.operation.details", attributes=body)
    (call,) = rs.model_calls([made.model_copy(update={"events": [details]})])
    assert (call.messages, call.answer) == (MESSAGES, [TURN.answer])


def test_messages_in_their_other_forms() -> None:
    """Instructions apart, thoughts, pictures, several choices, texts that look like JSON, and none at all."""

    def read(**attributes: Any) -> rs.ModelCall:
        return rs.model_calls([span("chat", {"gen_ai.operation.name": "chat"} | attributes)])[0]

    told = {"gen_ai.system_instructions": '[{"type": "text", "content": "be good"}]', "gen_ai.input.messages": "1+1?"}
    assert read(**told).messages == MESSAGES[:2]
    thinking = [
        {"role": "assistant", "parts": [{"type": "reasoning", "content": "hm"}, {"type": "text", "content": "4"}]}
    ]
    assert read(**{"gen_ai.output.messages": thinking}).answer == [
        {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    ]
    picture = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    for content in (picture, json.dumps(picture)):
        call = read(**{"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": content})
        assert call.messages == [{"role": "user", "content": picture}]
    for text in ('["a"]', '{"a": 1}', "[not JSON"):
        assert read(**{"gen_ai.prompt.0.content": text}).messages == [{"role": "user", "content": text}]
    many = read(**{f"gen_ai.completion.{n}.content": str(n) for n in (10, 9, 2)})
    assert [message["content"] for message in many.answer] == ["2", "9", "10"]
    call = read(**{"llm.input_messages.0.message.contents.0.message_content.type": "text",
                   "llm.input_messages.0.message.contents.0.message_content.text": "hi"})  # fmt: skip
    assert call.messages == [{"role": "user", "content": "hi"}]
    call = read(**{"gen_ai.output.messages": '[{"role": "assistant", "parts": []}]',
                   "gen_ai.completion.0.function_call.name": "add",
                   "gen_ai.completion.0.function_call.arguments": '{"a": 1}'})  # fmt: skip
    assert call.answer[0]["tool_calls"] == [TOOL_CALL | {"id": None}]
    nothing = read()
    assert (nothing.messages, nothing.answer, nothing.model, nothing.finish_reason) == ([], [], None, None)


def test_reading_changes_no_span() -> None:
    """What is opened on the way stays out of the span, also where an attribute is a mapping."""
    body = {"choices": "[{'token_ids': [4]}]", "prompt_token_ids": [1]}
    made = span("x", {"openinference.span.kind": "LLM", "output.value": body})
    before = made.model_dump_json()
    assert [list(t.response_ids) for t in rs.triplets([made])] == [[4]]
    assert made.model_dump_json() == before


def test_roles_are_the_names_of_the_agents_around() -> None:
    """The nearest agent span says the role, in every dialect of agents; other spans in between do not."""
    named = [
        ({"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "critic"}, "agent"),
        ({"agent.name": "critic"}, "agent"),
        ({"agentops.span.kind": "agent", "operation.name": "critic"}, "agent"),
        ({"traceloop.span.kind": "agent", "traceloop.entity.name": "critic"}, "agent"),
        ({"recipient_agent_type": "critic"}, "agent"),
        ({"langchain.chain.type": "critic"}, "agent"),
        ({"executor.id": "critic"}, "agent"),
        ({"type": "agent", "agentlightning.operation.input.name": "critic"}, "agent"),
        ({"openinference.span.kind": "AGENT"}, "critic"),
    ]
    for attributes, name in named:
        outer = span("planner", {"gen_ai.agent.name": "planner"})
        agent = span(name, attributes, parent_id=outer.span_id)
        between = span("step", {"agentops.span.kind": "task", "operation.name": "step"}, parent_id=agent.span_id)
        (call,) = DIALECTS["genai"](TURN)
        call.parent_id = between.span_id
        (direct,) = DIALECTS["genai"](Turn([7], [8], response_id="r"))
        direct.parent_id = outer.span_id
        assert [c.role for c in rs.model_calls([call, between, agent, direct, outer])] == ["critic", "planner"], (
            attributes
        )
    loop = [span("a", {}, span_id="a", parent_id="b"), span("b", {}, span_id="b", parent_id="a")]
    (call,) = DIALECTS["genai"](TURN)
    call.parent_id = "a"
    assert rs.model_calls([call, *loop])[0].role is None


def test_what_is_no_model_call() -> None:
    """Embeddings, tools, agents and functions of one's own, whatever their attributes hold."""
    for name, attributes in (
        ("embed", {"gen_ai.operation.name": "embeddings"}),
        ("tool", {"gen_ai.operation.name": "execute_tool", "output.value": json.dumps(TURN.body)}),
        ("agent", {"gen_ai.operation.name": "invoke_agent", "gen_ai.input.messages": "[]"}),
        ("mine", {"agentlightning.operation.output.id": "x", "prompt_token_ids": [1]}),
        ("raw_gen_ai_request", {"llm.openai.data": "[...]"}),
        ("odd", {"gen_ai.operation.name": ["chat"]}),
    ):
        assert rs.model_calls([span(name, attributes)]) == [], name


# -- rewards -----------------------------------------------------------------------------------------------------------

PRIMARY = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 0.5}
AS_JSON = '{"type": "reward", "value": 0.5}'
REWARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "agent-lightning 0.3": ("agentlightning.annotation", PRIMARY),
    "on another span": ("mine", PRIMARY),
    "agent-lightning 0.2": ("agentlightning.reward", {"reward": 0.5}),
    "between the two": ("agentlightning.annotation", {"reward": 0.5}),
    "AgentOps": ("agentops_reward_operation.task", {"agentops.task.output": AS_JSON}),
    "older AgentOps": ("agentops_reward_operation.task", {"agentops.entity.output": AS_JSON}),
    "AgentOps, as a mapping": ("op", {"agentops.task.output": json.loads(AS_JSON)}),
}

NO_REWARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a function that gave nothing": ("op", {"agentops.task.output": '{"type": "reward", "value": null}'}),
    "another output": ("op", {"agentops.task.output": '{"type": "score", "value": 0.5}'}),
    "a text": ("op", {"agentops.task.output": 'the "reward" is 0.5'}),
    "a list": ("op", {"agentops.task.output": '["reward", 0.5]'}),
    "an attribute of one's own": ("mine", {"reward": 0.5}),
    "no number": ("agentlightning.annotation", {"agentlightning.reward.0.value": "0.5"}),
    "nan": ("agentlightning.reward", {"reward": float("nan")}),
}


@pytest.mark.parametrize("form", REWARDS)
async def test_rewards_of_every_dialect(form: str) -> None:
    """They are found, and lifted to the rollout, by the same rule."""
    name, attributes = REWARDS[form]
    assert rs.find_final_reward([span(name, attributes), span("later", {})]) == 0.5
    assert rs.triplets([*DIALECTS["weave"](TURN), span(name, attributes)])[0].reward == 0.5
    with rs.InMemoryLightningStore() as store:
        rollout = await store.start_rollout("x")
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        await store.add_span(span(name, attributes, sequence_id=1, **ids))
        assert (await store.get_rollout_by_id(rollout.rollout_id)).reward == 0.5


@pytest.mark.parametrize("form", NO_REWARDS)
def test_what_is_no_reward(form: str) -> None:
    """An earlier reward stands."""
    name, attributes = NO_REWARDS[form]
    assert rs.find_final_reward([span(name, attributes)]) is None
    earlier = span("agentlightning.reward", {"reward": 1})
    assert rs.find_final_reward([earlier, span(name, attributes)]) == 1.0


# -- what cannot be read, and what is missing --------------------------------------------------------------------------

ODD: dict[str, dict[str, Any]] = {
    "text for ids": {"gen_ai.input.token_ids": "abc"},
    "one number": {"gen_ai.output.token_ids": 7},
    "parts of tokens": {"gen_ai.output.token_ids": [1.5]},
    "an id beyond 64 bits": {"gen_ai.output.token_ids": [2**70]},
    "a text that was cut": {"gen_ai.input.token_ids": "[1, 2"},
    "none within": {"gen_ai.input.token_ids": [1, None]},
    "lists of texts": {"gen_ai.output.token_ids": [["a"]]},
}


@pytest.mark.parametrize("form", ODD)
def test_an_odd_span_is_named_and_passed_over(form: str, told: Any) -> None:
    """The others of the batch are there."""
    good = DIALECTS["genai"](TURN)
    (odd,) = DIALECTS["genai"](Turn([7], [8], [-1.0], "odd"), rollout_id="ro-odd")
    odd.attributes.update(ODD[form])
    found = rs.triplets([odd, *good])
    assert [t.rollout_id for t in found] == ["ro"]
    (record,) = told.records
    assert record.levelname == "WARNING"
    for word in ("chat m", odd.span_id, "ro-odd", next(iter(ODD[form]))):
        assert word in record.message


@pytest.mark.parametrize("odd", [[-0.5], [-0.5, float("nan")], [-0.5, None], "nonsense", "[{]", [{}, {}]], ids=str)
def test_odd_log_probabilities_are_named_and_left_out(
    odd: list[float] | list[float | None] | str | list[dict[Any, Any]], told: Any
) -> None:
    """The tokens are good, and are not lost."""
    (made,) = DIALECTS["genai"](TURN)
    made.attributes["gen_ai.output.logprobs"] = odd
    (found,) = rs.triplets([made])
    assert found.logprobs is None and list(found.response_ids) == [4, 5]
    assert made.span_id in told.records[0].message and "gen_ai.output.logprobs" in told.records[0].message


def test_many_odd_spans_are_one_line(told: Any) -> None:
    """Which names the first three, and counts the rest."""
    odd = [span("chat", {"response_token_ids": "abc"}) for _ in range(10)]
    assert rs.triplets(odd) == []
    (record,) = told.records
    assert odd[2].span_id in record.message and odd[3].span_id not in record.message and "7 more" in record.message


def test_texts_that_only_seem_to_be_lists(told: Any) -> None:
    """Deep, broken and hostile texts are read as texts."""
    for text in ("[" * 100_000, "{" * 1000, "[" + "1" * 10_000 + "]", "{'a': __import__('os')}", "[1, 2", "{}", "[]"):
        made = span("x", {"openinference.span.kind": "LLM", "output.value": text, "input.value": text})
        (call,) = rs.model_calls([made])
        assert call.prompt_ids is None and call.messages == [] and call.answer == []


PLACES = [
    *sorted({place.replace("*", "x") for places in semconv.PLACES.values() for place in places}),
    *("gen_ai.prompt.0.role", "gen_ai.prompt.0.content", "gen_ai.completion.0.tool_calls.0.function", "output.value"),
    *("llm.input_messages.0.message.contents.0", "llm.x.choices.0", "llm..", "..", "", "tool.call.id"),
    semconv.SYSTEM_INSTRUCTIONS,
]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=2)
KEYS = st.sampled_from(
    [
        "role",
        "content",
        "parts",
        "contents",
        "message",
        "message_content",
        "tool_calls",
        "tool_call",
        "function",
        "type",
    ]
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
ANYTHING = st.dictionaries(st.sampled_from(PLACES), VALUES | VALUES.map(str) | VALUES.map(repr), max_size=6)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(ANYTHING, ANYTHING, st.sampled_from(["chat", "raw_gen_ai_request"]))
def test_whatever_stands_there_the_rest_is_read(attributes: Any, said: Any, name: Any) -> None:
    """Any value at any place, and in any event."""
    odd = span(name, {"gen_ai.operation.name": "chat"} | attributes, attempt_id="odd")
    for event in (*semconv.MESSAGE_EVENTS, *semconv.DETAIL_EVENTS, semconv.CHOICE_EVENT):
        short = {place.rpartition(".")[2]: value for place, value in said.items()}
        odd.events += [rs.Event(name=event, attributes=said), rs.Event(name=event, attributes=short)]
    spans = [odd, *DIALECTS["genai"](TURN)]
    for call in rs.model_calls(spans):
        assert all(type(message) is dict and "role" in message for message in call.messages + call.answer)
        assert call.model is None or type(call.model) is str
    assert list(rs.trajectories(spans)[-1].token_ids) == [1, 2, 3, 4, 5] and rs.triplets(spans)


@pytest.mark.parametrize("reading", [rs.triplets, rs.trajectories])
def test_calls_without_token_ids_are_told_once_with_the_remedy(
    reading: Callable[..., list[rs.Triplet]] | Callable[..., list[rs.Trajectory]], told: Any
) -> None:
    """And those without log-probabilities, apart; a call that failed has nothing to train on."""
    bare = span("chat m", {"gen_ai.operation.name": "chat", "gen_ai.usage.output_tokens": 5})
    failed = bare.model_copy(update={"status": rs.TraceStatus(status_code="ERROR"), "span_id": "f"})
    assert reading([failed]) == [] and told.records == []
    for _ in range(3):
        assert len(reading([bare, *DIALECTS["genai"](TURN)])) == 1
    (record,) = told.records
    assert record.levelname == "WARNING" and "1 of 2 model calls have no token ids" in record.message
    for word in (
        bare.span_id,
        "return_token_ids",
        "ctx.llm(",
        *(semconv.PLACES[fact][0] for fact in ("prompt_ids", "response_ids", "logprobs")),
    ):
        assert word in record.message
    for dialect in DIALECTS.values():
        assert len(reading(dialect(Turn([1], [2])))) == 1
    assert [r.message.split(",")[0] for r in told.records[1:]] == ["1 of 1 model calls have no log-probabilities"]


@pytest.mark.parametrize("outer", DIALECTS)
@pytest.mark.parametrize("inner", DIALECTS)
def test_calls_that_lack_something_are_known_as_their_spans_end(inner: str, outer: str) -> None:
    """As many as are found when all is read, also where several spans tell of one call, with another in between."""
    bare = Turn([1], [2], None, "chatcmpl-2")

    def within(spans: list[rs.Span], above: rs.Span) -> list[Any]:
        return [one.model_copy(update={"parent_id": above.span_id}) if one.parent_id is None else one for one in spans]

    between = span("http", {})
    for first, second in ((TURN, TURN), (bare, bare), (TURN, bare), (bare, TURN)):
        around = DIALECTS[outer](second)
        top = next(one for one in around if one.parent_id is None)
        (middle,) = within([between], top)
        spans = [*within(DIALECTS[inner](first), middle), middle, *around]
        found = [*rs.model_calls(spans), *rs.model_calls([lone := span("chat", {"gen_ai.operation.name": "chat"})])]
        counter, counts = calls.CallCounter(), calls.Losses()
        depths = {one.span_id: one for one in spans}
        for one in sorted([*spans, lone], key=lambda one: -_depth(one, depths)):
            counter.add(one)
        counter.report(counts)
        expected = Counter("without_token_ids" for call in found if call.prompt_ids is None)
        expected += Counter("without_logprobs" for call in found if call.prompt_ids is not None and not call.logprobs)
        assert counts.take() == expected


def _depth(one: Any, by_id: Any) -> Any:
    return 0 if one.parent_id not in by_id else 1 + _depth(by_id[one.parent_id], by_id)


@pytest.mark.parametrize("reading", [rs.triplets, rs.trajectories, rs.model_calls])
def test_what_is_no_span_is_refused(
    reading: Callable[..., list[rs.Triplet]] | Callable[..., list[rs.Trajectory]] | Callable[..., list[rs.ModelCall]],
) -> None:
    """With what to do about the answer of `query_many_spans`, which is likely."""
    with pytest.raises(rs.InvalidValueError, match=r"spans=.*found.values\(\)"):
        reading({"ro": DIALECTS["genai"](TURN)})
    for wrong in (5, None, "text", *DIALECTS["genai"](TURN)):
        with pytest.raises(rs.InvalidValueError, match="spans=.*list of spans"):
            reading(wrong)
    with pytest.raises(rs.InvalidValueError, match=r"spans\[1\]="):
        reading([*DIALECTS["genai"](TURN), "text"])


def test_asking_for_messages_alone_tells_nothing(told: Any) -> None:
    """Whoever reads what was said needs no token ids."""
    (call,) = rs.model_calls([span("chat", {"llm.request.type": "chat"} | indexed(TURN))])
    assert call.messages == MESSAGES and call.prompt_ids is None and told.records == []


async def test_a_span_that_cannot_be_decoded_fails_nothing(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class is missing here: it is named, and the rest of the batch is read."""
    (tmp_path / "gone_for_good.py").write_text("class Value(str):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import sys

    import gone_for_good

    with rs.InMemoryLightningStore() as store:
        rollout = await store.start_rollout("x")
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        (odd,) = DIALECTS["genai"](TURN, sequence_id=1, **ids)
        odd.events = [rs.Event(name="x", attributes={"value": gone_for_good.Value})]
        await store.add_many_spans([odd, *DIALECTS["genai"](Turn([7], [8], [-1.0], "r2"), sequence_id=2, **ids)])
        (tmp_path / "gone_for_good.py").unlink()
        sys.modules.pop("gone_for_good")
        monkeypatch.undo()
        spans = await store.query_spans(rollout.rollout_id)
        assert [list(t.prompt_ids) for t in rs.triplets(spans)] == [[7]]
    assert odd.span_id in told.text


def test_the_docs_name_every_place() -> None:
    """`docs/spans.md` is the table for people."""
    docs = (Path(__file__).parents[2] / "docs" / "spans.md").read_text()
    places = {place for fact in ("prompt_ids", "response_ids", "logprobs") for place in semconv.PLACES[fact]}
    places |= {semconv.PRIMARY_REWARD, semconv.LEGACY_REWARD, *semconv.REWARD_OUTPUTS, *semconv.MODEL_CALLS}
    places |= {name for _, name in semconv.AGENTS if name is not None}
    assert [place for place in places if f"`{place}`" not in docs] == []
