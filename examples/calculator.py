"""An agent as people have them: spans of the OpenTelemetry SDK, the OpenAI client, and not a word of raystore."""

from functools import lru_cache

from openai import OpenAI
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider(resource=Resource.create({"service.name": "calculator"})))
tracer = trace.get_tracer("calculator")


@lru_cache(maxsize=8)
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key="none needed")


def solve(question: str, *, instructions: str, base_url: str, model: str) -> str:
    """Ask the model, check the form of its answer, and ask once more if it is not a number."""
    with tracer.start_as_current_span("solve", attributes={"question": question}) as span:
        answer = ask(question, instructions, base_url, model)
        if not answer.lstrip("-").isdigit():
            span.add_event("asked again", {"answer": answer})
            answer = ask(question + " Only the number.", instructions, base_url, model)
        span.set_attribute("answer", answer)
        return answer


def ask(question: str, instructions: str, base_url: str, model: str) -> str:
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.request.model": model}
    with tracer.start_as_current_span(f"chat {model}", attributes=attributes) as span:
        reply = client(base_url).chat.completions.create(
            model=model,
            messages=[{"role": "system", "content": instructions}, {"role": "user", "content": question}],
        )
        if reply.usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", reply.usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", reply.usage.completion_tokens)
        return reply.choices[0].message.content or ""
