"""Spans to a collector: a real HTTP receiver that parses the protobuf, and every way in which one refuses."""

from __future__ import annotations

import gzip
import http.server
import json
import math
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

import raystore as rs
from raystore.cli.exports import otlp, targets
from tests.cli.exports.conftest import LARGE, Run, finish, odd, refused
from tests.conftest import MakeMemoryStore

Answer = tuple[int, dict[str, str], bytes]


class Receiver:
    """A collector: what it got, and how it answers (`answer(number of the request)`)."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.sizes: list[int] = []
        self.answer: Callable[[int], Answer] = lambda number: (200, {}, b"")
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
                code, headers, answer = outer.answer(len(outer.paths))
                outer.paths.append(self.path)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                if code == 200:
                    outer.requests.append(ExportTraceServiceRequest.FromString(body))
                    outer.sizes.append(len(body))
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *given: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Receiver]:
    monkeypatch.chdir(tmp_path)  # where the cursor file is, unless it is said
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def attributes_of(message: Any) -> dict[str, Any]:
    """The attributes of an OTLP message as Python has them."""
    return {one.key: _value(one.value) for one in message.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(held) for held in value.array_value.values]
    if kind == "kvlist_value":
        return {one.key: _value(one.value) for one in value.kvlist_value.values}
    return getattr(value, kind)


async def test_a_collector_gets_the_spans(make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver) -> None:
    """With their ids, times, status and attributes, and with what they belong to."""
    store = make_memory_store()
    rollout_id = await finish(store, "task", mode="train", tags={"env": "math", "level": 3})
    found = await store.query_spans(rollout_id)
    told = run(store, "--to", receiver.url, "--header", "authorization=Bearer s3cret").output
    assert told == f"exported 1 rollout to {receiver.url} (3 spans)\n"
    assert receiver.paths == ["/v1/traces"] and receiver.headers[0]["authorization"] == "Bearer s3cret"
    assert receiver.headers[0]["content-type"] == "application/x-protobuf"
    assert receiver.headers[0]["content-encoding"] == "gzip"
    by_id = {span.span_id.hex(): span for span in receiver.spans}
    assert by_id.keys() == {span.span_id for span in found}
    for span in found:
        sent = by_id[span.span_id]
        assert sent.trace_id.hex() == span.trace_id and sent.parent_span_id.hex() == (span.parent_id or "")
        assert sent.name == span.name and sent.start_time_unix_nano == round((span.start_time or 0) * 1e9)
        assert sent.status.code == 1 and sent.kind == 1
        attributes = attributes_of(sent)
        assert attributes["raystore.rollout_id"] == rollout_id and attributes["raystore.mode"] == "train"
        assert attributes["raystore.tag.env"] == "math" and attributes["raystore.tag.level"] == 3
        for name, value in span.attributes.items():
            expected: Any = list(value) if isinstance(value, (list, tuple, array)) else value
            assert attributes[name] == expected, name
    (resource,) = receiver.requests[0].resource_spans
    assert attributes_of(resource.resource)["service.name"] == "raystore"


async def test_phoenix_sees_what_a_span_is(make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver) -> None:
    """By OpenInference's names, unless a tracer has set them."""
    store = make_memory_store()
    rollout_id = await finish(store, {"question": "17 * 23"}, group_id="group-1")
    ids: dict[str, Any] = {
        "rollout_id": rollout_id,
        "attempt_id": (await store.get_rollout_by_id(rollout_id)).attempt.attempt_id,
    }
    tool = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "calculator"}
    tool |= {"gen_ai.tool.call.arguments": '{"x": 1}', "gen_ai.tool.call.result": "391"}
    await store.add_unnumbered_spans(
        [
            rs.Span.from_attributes(name="execute_tool", attributes=tool, parent_id="1" * 16, **ids),
            rs.Span.from_attributes(name="own", attributes={"openinference.span.kind": "RERANKER"}, **ids),
        ]
    )
    run(store, "--to", f"{receiver.url}/v1/traces", "--openinference")
    sent = {span.name: attributes_of(span) for span in receiver.spans}
    call = sent["chat qwen3-4b"]
    assert call["openinference.span.kind"] == "LLM" and call["llm.model_name"] == "qwen3-4b"
    assert call["llm.input_messages.0.message.role"] == "user"
    assert call["llm.input_messages.0.message.content"] == "17 * 23?"
    assert call["llm.output_messages.0.message.content"] == call["output.value"] == "391"
    assert call["llm.token_count.prompt"] == 3 and call["llm.token_count.total"] == 5
    assert json.loads(call["llm.invocation_parameters"]) == {"temperature": 0.5}
    assert call["session.id"] == "group-1"
    assert sent["agent"]["openinference.span.kind"] == "CHAIN"
    assert json.loads(sent["agent"]["input.value"]) == {"question": "17 * 23"}
    assert sent["agentlightning.annotation"]["openinference.span.kind"] == "EVALUATOR"
    assert sent["agentlightning.annotation"]["output.value"] == "1"
    assert (
        sent["execute_tool"]["openinference.span.kind"] == "TOOL" and sent["execute_tool"]["tool.name"] == "calculator"
    )
    assert sent["execute_tool"]["input.value"] == '{"x": 1}' and sent["execute_tool"]["output.value"] == "391"
    assert sent["own"]["openinference.span.kind"] == "RERANKER"


async def test_odd_values_arrive(make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver) -> None:
    """10 MB attributes, NaN, bytes, an id that is not hexadecimal, a span without times."""
    store = make_memory_store()
    await odd(store)
    run(store, "--to", receiver.url, "--openinference")
    (span,) = receiver.spans
    attributes = attributes_of(span)
    assert len(attributes["large"]) == LARGE and attributes["bytes"] == b"\x00\xff"
    assert math.isnan(attributes["nan"])
    assert attributes["nested"] == {"a": [1, "b"]} and len(span.span_id) == 8 and len(span.trace_id) == 16
    assert span.start_time_unix_nano == span.end_time_unix_nano > 10**18
    assert "_opened" in attributes["input.value"]  # told by its type, and not opened


async def test_requests_are_bounded(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes and in spans, as collectors refuse large ones."""
    monkeypatch.setattr(otlp, "REQUEST_BYTES", 20_000)
    monkeypatch.setattr(otlp, "REQUEST_SPANS", 12)
    store = make_memory_store()
    for number in range(40):
        await finish(store, number, spans=5)
    run(store, "--to", receiver.url)
    assert len(receiver.spans) == 40 * 6 and max(receiver.sizes) < 22_000
    assert max(sum(len(s.spans) for r in one.resource_spans for s in r.scope_spans) for one in receiver.requests) <= 12


async def test_an_export_to_a_collector_goes_on(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver
) -> None:
    """Where it was when the collector refused; what it has taken page by page does not come again."""
    store = make_memory_store()
    for number in range(300):
        await finish(store, number, spans=1)
    receiver.answer = lambda number: (200, {}, b"") if number < 17 else (500, {}, b"out of memory")
    told = refused(run(store, "--to", receiver.url, fails=True))
    assert "HTTP 500" in told and "out of memory" in told
    receiver.answer = lambda number: (200, {}, b"")
    assert "256 were there before" in run(store, "--to", receiver.url).output
    ids = [span.span_id for span in receiver.spans]
    assert len({*ids}) == 600 and len(ids) - 600 <= 2 * 16  # of the page that was not complete
    assert "exported 0 rollouts" in run(store, "--to", receiver.url).output


async def test_a_busy_collector_is_asked_again(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After as long as it says; in the end it is told."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("raystore.cli.exports.targets.asyncio.sleep", sleep)
    store = make_memory_store()
    await finish(store, 1)
    receiver.answer = lambda number: (503, {"Retry-After": "7"}, b"") if number < 2 else (200, {}, b"")
    run(store, "--to", receiver.url)
    assert waited == [7.0, 7.0] and len(receiver.spans) == 3
    receiver.answer = lambda number: (429, {}, b"")
    assert "HTTP 429" in refused(run(store, "--to", receiver.url, "--anew", fails=True))
    assert len(waited) == 2 + targets.TRIES - 1


async def test_what_a_collector_rejects_is_told(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver
) -> None:
    """In its own words."""
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans, answer.partial_success.error_message = 2, "too old"
    receiver.answer = lambda number: (200, {}, answer.SerializeToString())
    store = make_memory_store()
    await finish(store, 1)
    assert "it refused 2 of them: too old" in run(store, "--to", receiver.url).output


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9", "no collector answers at http://127.0.0.1:9/v1/traces"),
        ("http://no.such.host.invalid:4318", "no collector answers"),
        ("http://", "is no address of a collector; write http://HOST:4318"),
        ("ftp://host/x", "is no address of a collector"),
        ("http://host:port", "is no address of a collector"),
    ],
)
async def test_a_broken_url_is_one_clear_error(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver, url: str, said: str
) -> None:
    """At once, and not after a minute of tries."""
    store = make_memory_store()
    await finish(store, 1)
    assert said in refused(run(store, "--to", url, fails=True))


@pytest.mark.parametrize(
    ("code", "said"),
    [(404, "OTLP over HTTP is at .../v1/traces"), (401, "--header authorization="), (400, "bad \\x1b")],
)
async def test_a_refusal_says_what_to_do(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver, code: int, said: str
) -> None:
    """And what the collector said, in `google.rpc.Status` or in JSON, without control characters."""
    from google.rpc import status_pb2

    body = status_pb2.Status(message="bad \x1b[31m span").SerializeToString()
    receiver.answer = lambda number: (code, {}, body)
    store = make_memory_store()
    await finish(store, 1)
    told = refused(run(store, "--to", receiver.url, fails=True))
    assert f"HTTP {code}" in told and said in told and "bad \\x1b[31m span" in told
    receiver.answer = lambda number: (code, {}, b'{"message": "in JSON"}')
    assert "in JSON" in refused(run(store, "--to", receiver.url, fails=True))


async def test_without_the_package_it_says_what_to_install(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray[default] has it."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.proto.collector.trace.v1", None)
    told = refused(run(make_memory_store(), "--to", receiver.url, fails=True))
    assert "pip install opentelemetry-proto" in told


async def test_where_it_is_noted_can_be_said(
    make_memory_store: MakeMemoryStore, run: Run, receiver: Receiver, tmp_path: Path
) -> None:
    """Otherwise in the directory of whoever exports, by the address."""
    store = make_memory_store()
    await finish(store, 1)
    run(store, "--to", receiver.url, "--cursor", tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    run(store, "--to", receiver.url)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("raystore-export-")]) == 1
    assert len(receiver.spans) == 6
