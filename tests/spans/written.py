"""One turn of a conversation as each tracer writes it: attributes as the libraries were seen to write them.

`tests/tracers` makes the same with the libraries themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import raystore as rs

TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "call_1"},
]


@dataclass
class Turn:
    """What happened."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float] | None = None
    response_id: str = "chatcmpl-1"
    finish_reason: str = "stop"
    messages: list[dict[str, Any]] = field(default_factory=lambda: MESSAGES)
    answer: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": "it's 4"})

    @property
    def body(self) -> dict[str, Any]:
        """The answer of vLLM's endpoint, asked for `return_token_ids`."""
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self.finish_reason,
            "message": self.answer,
            "token_ids": self.response_ids,
        }
        if self.logprobs is not None:
            items = [{"token": "a", "bytes": [97], "logprob": value, "top_logprobs": []} for value in self.logprobs]
            choice["logprobs"] = {"content": items, "refusal": None}
        return {
            "id": self.response_id,
            "object": "chat.completion",
            "model": "m",
            "prompt_token_ids": self.prompt_ids,
            "choices": [choice],
            "usage": {"prompt_tokens": len(self.prompt_ids)},
        }


def span(
    name: str, attributes: dict[str, Any], *, rollout_id: str = "ro", attempt_id: str = "at", **more: Any
) -> rs.Span:
    """A span of an attempt."""
    return rs.Span.from_attributes(
        name=name, attributes=attributes, rollout_id=rollout_id, attempt_id=attempt_id, **more
    )


def flattened(value: Any, name: str) -> dict[str, Any]:
    """As agent-lightning flattens: lists of one kind of plain values stay."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and not (value and all(type(item) in (int, str, float) for item in value)):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {name: "null" if value is None else value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flattened(item, f"{name}.{key}")
    return found


def numbered(
    prefix: str, messages: list[dict[str, Any]], *, message: str = "", call: str = "", function: str = ""
) -> dict[str, Any]:
    """Messages as flat attributes, `<prefix>.0.<message>role`; `call` and `function` stand before fields of these."""
    found: dict[str, Any] = {}
    for number, said in enumerate(messages):
        place = f"{prefix}.{number}.{message}"
        found |= {f"{place}{name}": value for name, value in said.items() if name != "tool_calls" and value is not None}
        for index, made in enumerate(said.get("tool_calls", [])):
            inner = f"{place}tool_calls.{index}.{call}"
            found |= {f"{inner}{function}{name}": value for name, value in made["function"].items()}
            found[f"{inner}id"] = made["id"]
    return found


def indexed(turn: Turn) -> dict[str, Any]:
    """OpenTelemetry's first form: `gen_ai.prompt.0.role`."""
    return {
        **numbered("gen_ai.prompt", turn.messages),
        **numbered("gen_ai.completion", [turn.answer]),
        "gen_ai.completion.0.finish_reason": turn.finish_reason,
    }


def parts(messages: list[dict[str, Any]], finish_reason: str | None = None) -> list[dict[str, Any]]:
    """OpenTelemetry's present form."""
    found = []
    for message in messages:
        inner: list[dict[str, Any]] = []
        if message["role"] == "tool":
            inner = [{"type": "tool_call_response", "id": message["tool_call_id"], "response": message["content"]}]
        elif message["content"] is not None:
            inner = [{"type": "text", "content": message["content"]}]
        for call in message.get("tool_calls", []):
            function = call["function"]
            arguments = json.loads(function["arguments"])
            inner.append({"type": "tool_call", "id": call["id"], "name": function["name"], "arguments": arguments})
        made = {"role": message["role"], "parts": inner}
        found.append(made if finish_reason is None else made | {"finish_reason": finish_reason})
    return found


def llm(turn: Turn, **ids: Any) -> list[rs.Span]:
    """`ctx.llm`."""

    response_id: dict[str, Any] = {"gen_ai.response.id": turn.response_id}

    def agent(task: Any, ctx: rs.Context) -> None:
        ctx.llm(
            prompt_ids=turn.prompt_ids,
            response_ids=turn.response_ids,
            logprobs=turn.logprobs,
            model="m",
            prompt=turn.messages,
            response=turn.answer,
            finish_reason=turn.finish_reason,
            **response_id,
        )

    (made,) = rs.run_one(agent, "x").spans
    return [made.model_copy(update={"rollout_id": "ro", "attempt_id": "at"} | ids)]


def agentops(turn: Turn, **ids: Any) -> list[rs.Span]:
    """agent-lightning 0.3's AgentOps tracer: tool calls of the answer are child spans."""
    attributes = {
        "gen_ai.request.type": "chat",
        "gen_ai.system": "OpenAI",
        "gen_ai.request.model": "m",
        "gen_ai.response.id": turn.response_id,
        "gen_ai.response.model": "m",
        "prompt_token_ids": tuple(turn.prompt_ids),
        "response_token_ids": tuple(turn.response_ids),
    } | {name: value for name, value in indexed(turn).items() if "completion.0.tool_calls" not in name}
    if turn.logprobs is not None:
        attributes["logprobs.content"] = json.dumps(turn.body["choices"][0]["logprobs"]["content"])
    made = span("openai.chat.completion", attributes, **ids)
    calls = [
        span(
            "tool_call.add",
            {
                "agentops.span.kind": "AgentOpsSpanKindValues.TOOL",
                "tool.name": call["function"]["name"],
                "tool.parameters": call["function"]["arguments"],
                "tool.call.id": call["id"],
                "tool.call.type": "function",
            },
            parent_id=made.span_id,
            **ids,
        )
        for call in turn.answer.get("tool_calls", [])
    ]
    return [*calls, made]


def weave(turn: Turn, **ids: Any) -> list[rs.Span]:
    """agent-lightning 0.3's Weave tracer: request and answer of the endpoint, flattened."""
    request = flattened({"messages": turn.messages, "model": "m"}, "agentlightning.operation.input")
    answer = flattened(turn.body, "agentlightning.operation.output")
    more = {
        "agentlightning.operation.name": "weave:///agl/weave-9de06f9ec27e/op/openai.chat.completions.create:01a2293e",
        "agentlightning.operation.output.request_id": "null",
        "usage.m.requests": 1,
    }
    return [span("openai.chat.completions.create", more | request | answer, **ids)]


def litellm(turn: Turn, **ids: Any) -> list[rs.Span]:
    """agent-lightning's LLM proxy, which is LiteLLM: two spans, the inner one with the ids, as Python prints them."""
    outer = span(
        "litellm_request",
        {
            "gen_ai.operation.name": "chat",
            "llm.request.type": "completion",
            "gen_ai.system": "hosted_vllm",
            "llm.is_streaming": "False",
            "gen_ai.request.model": "m",
            "gen_ai.response.id": turn.response_id,
            "gen_ai.response.finish_reasons": json.dumps([turn.finish_reason]),
        },
        **ids,
    )
    request = {"llm.hosted_vllm.model": "m", "llm.hosted_vllm.messages": str(turn.messages)}
    answer = {f"llm.hosted_vllm.{name}": str(value) for name, value in turn.body.items()}
    return [span("raw_gen_ai_request", request | answer, parent_id=outer.span_id, **ids), outer]


def openinference(turn: Turn, **ids: Any) -> list[rs.Span]:
    """OpenInference's instrumentation of OpenAI's client: the whole answer as JSON, messages indexed."""
    attributes: dict[str, Any] = {
        "openinference.span.kind": "LLM",
        "llm.system": "openai",
        "llm.model_name": "m",
        "llm.invocation_parameters": '{"model": "m", "logprobs": true}',
        "llm.token_count.total": 5,
        "llm.finish_reason": turn.finish_reason,
        "input.value": json.dumps({"model": "m", "messages": turn.messages}),
        "input.mime_type": "application/json",
        "output.value": json.dumps(turn.body),
        "output.mime_type": "application/json",
    }
    for prefix, messages in (("llm.input_messages", turn.messages), ("llm.output_messages", [turn.answer])):
        attributes |= numbered(prefix, messages, message="message.", call="tool_call.", function="function.")
    return [span("ChatCompletion", attributes, **ids)]


def genai(turn: Turn, **ids: Any) -> list[rs.Span]:
    """OpenTelemetry's present conventions, with raystore's names for what they have none for."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.response.id": turn.response_id,
        "gen_ai.response.finish_reasons": (turn.finish_reason,),
        "gen_ai.input.messages": json.dumps(parts(turn.messages)),
        "gen_ai.output.messages": json.dumps(parts([turn.answer], turn.finish_reason)),
        "gen_ai.input.token_ids": turn.prompt_ids,
        "gen_ai.output.token_ids": turn.response_ids,
    }
    if turn.logprobs is not None:
        attributes["gen_ai.output.logprobs"] = turn.logprobs
    return [span("chat m", attributes, **ids)]


def openllmetry(turn: Turn, **ids: Any) -> list[rs.Span]:
    """Traceloop's OpenLLMetry in its older form around agent-lightning's proxy: the ids are the proxy's."""
    attributes: dict[str, Any] = {
        "llm.request.type": "chat",
        "gen_ai.system": "openai",
        "gen_ai.request.model": "m",
        "llm.headers": "None",
        "llm.is_streaming": False,
        "gen_ai.response.model": "m",
        "gen_ai.response.id": turn.response_id,
        "llm.usage.total_tokens": 5,
    }
    return [*litellm(turn, **ids), span("openai.chat", attributes | indexed(turn), **ids)]


#: By name; each gives the spans of one turn in the order in which they end.
DIALECTS: dict[str, Callable[..., list[rs.Span]]] = {
    made.__name__: made for made in (llm, agentops, weave, litellm, openinference, genai, openllmetry)
}
