"""A conversation of two turns with an endpoint on this machine, traced by one or more libraries; prints its spans.

`python -m tests.tracers.talk LIBRARY...`; a process of its own, since instrumentation is of the whole process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "call_1"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
#: Prompt ids, response ids, log-probabilities, answer and reason of each turn.
TURNS = [
    ([1, 2, 3], [4, 5], [-0.5, -0.25], MESSAGES[2], "tool_calls"),
    ([1, 2, 3, 4, 5, 6], [7], [-1.0], {"role": "assistant", "content": "it's 2"}, "stop"),
]


class Endpoint(BaseHTTPRequestHandler):
    """Answers as vLLM does when it is asked for token ids."""

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:  # noqa: N802
        """The turn that follows what the request holds."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number = len(asked["messages"]) // 2 - 1
        prompt, response, logprobs, answer, reason = TURNS[number]
        items = [{"token": "a", "bytes": [97], "logprob": value, "top_logprobs": []} for value in logprobs]
        choice = {"index": 0, "finish_reason": reason, "message": answer, "token_ids": response}
        body = json.dumps(
            {
                "id": f"chatcmpl-{number}", "object": "chat.completion", "created": 1, "model": "m",
                "prompt_token_ids": prompt,
                "choices": [choice | {"logprobs": {"content": items, "refusal": None}}],
                "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(response), "total_tokens": 9},
            }
        ).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def converse(base_url: str) -> None:
    """Both turns, with OpenAI's client."""
    import openai

    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    for count in (2, 4):
        client.chat.completions.create(
            model="m",
            messages=MESSAGES[:count],  # type: ignore[arg-type]
            tools=[TOOL],  # type: ignore[list-item]
            logprobs=True,
            extra_body={"return_token_ids": True},
        )


def openllmetry(provider: Any) -> None:
    """Traceloop's."""
    from opentelemetry.instrumentation.openai import OpenAIInstrumentor

    OpenAIInstrumentor().instrument(tracer_provider=provider)


def opentelemetry(provider: Any) -> None:
    """OpenTelemetry's own, with messages in its spans."""
    from opentelemetry.instrumentation.openai_v2 import OpenAIInstrumentor

    OpenAIInstrumentor().instrument(tracer_provider=provider)


def openinference(provider: Any) -> None:
    """Phoenix's."""
    from openinference.instrumentation.openai import OpenAIInstrumentor

    OpenAIInstrumentor().instrument(tracer_provider=provider)


def agentops(provider: Any) -> None:
    """AgentOps, as agent-lightning extends it."""
    from agentlightning.instrumentation.agentops import instrument_agentops
    from agentops.instrumentation.providers.openai.instrumentor import OpenaiInstrumentor

    instrument_agentops()
    OpenaiInstrumentor().instrument(tracer_provider=provider)


def through_sdk(libraries: list[str], base_url: str) -> list[Any]:
    """What reaches a rollout whose agent is instrumented so."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    import raystore as rs

    provider = TracerProvider()
    trace.set_tracer_provider(provider)
    rs.otel.instrument(provider)
    for library in libraries:
        globals()[library](provider)
    return rs.run_one(lambda task, ctx: converse(base_url), "x").spans


def litellm(base_url: str) -> list[Any]:
    """What LiteLLM's logger for OpenTelemetry, of agent-lightning's proxy, makes of the endpoint's answers."""
    import urllib.request

    from litellm.integrations.opentelemetry import OpenTelemetry, OpenTelemetryConfig
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    import raystore as rs

    provider = TracerProvider()
    rs.otel.instrument(provider)
    tracer = provider.get_tracer("litellm")
    logger = OpenTelemetry(config=OpenTelemetryConfig(exporter=InMemorySpanExporter()))

    def agent(task: Any, ctx: Any) -> None:
        for count in (2, 4):
            asked = {"model": "m", "messages": MESSAGES[:count]}
            request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(asked).encode())
            with urllib.request.urlopen(request) as answer:
                told = {
                    "litellm_params": {"custom_llm_provider": "hosted_vllm"},
                    "additional_args": {"complete_input_dict": asked},
                    "original_response": answer.read().decode(),
                }
            with tracer.start_as_current_span("raw_gen_ai_request") as span:
                logger.set_raw_request_attributes(span, told, None)

    return rs.run_one(agent, "x").spans


def weave(base_url: str) -> list[Any]:
    """What agent-lightning's tracer for Weave makes of it, in spans of agent-lightning's."""
    from agentlightning.tracer.weave import WeaveTracer

    async def trace() -> list[Any]:
        tracer = WeaveTracer()
        tracer.init()
        tracer.init_worker(0)
        async with tracer.trace_context("x", rollout_id="ro", attempt_id="at", store=None):
            converse(base_url)
        return list(tracer.get_last_trace())

    return asyncio.run(trace())


def main(libraries: list[str]) -> None:
    """One line of JSON, after whatever the libraries print."""
    os.environ["OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"] = "SPAN_ONLY"
    os.environ["OTEL_SEMCONV_STABILITY_OPT_IN"] = "gen_ai_latest_experimental"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base_url = f"http://127.0.0.1:{server.server_port}/v1"
    alone: dict[str, Callable[[str], list[Any]]] = {"litellm": litellm, "weave": weave}
    spans = alone[libraries[0]](base_url) if libraries[0] in alone else through_sdk(libraries, base_url)
    print("\n" + json.dumps([span.model_dump(mode="json") for span in spans]))
    sys.stdout.flush()
    os._exit(0)  # some libraries leave threads that wait for a network


if __name__ == "__main__":
    main(sys.argv[1:])
