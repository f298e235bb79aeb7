"""Train an agent that knows nothing of raystore: it emits OpenTelemetry spans and calls a model with the OpenAI client.

The agent is `calculator.py`. What is trained are its instructions: a hill climb over sentences that help or harm, as a
stub of an OpenAI endpoint on this machine sees it. The two lines that connect the agent are marked; its spans arrive as
they are, nested as they were.

    python examples/03_otel_agent.py --runners 4 --steps 12 --seed 0
"""

import json
import random
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import calculator
import harness

import raystore as rs

SENTENCES = {  # and what each does to the probability of a right answer
    "Be brief.": 0.0,
    "Work it out step by step.": 0.25,
    "Answer like a pirate.": -0.3,
    "Check the result by working backwards.": 0.2,
    "Write the number in words.": -0.5,
    "Answer with the number alone.": 0.15,
}
BASE, QUESTIONS = 0.35, 32


class Stub(BaseHTTPRequestHandler):
    """An endpoint that speaks OpenAI's chat protocol and adds numbers, better or worse as it is told."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for each answer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        instructions, question = (message["content"] for message in request["messages"])
        skill = BASE + sum(effect for sentence, effect in SENTENCES.items() if sentence in instructions)
        a, b = (int(word) for word in question.split()[0].split("+"))
        lucky = random.Random(question).random()  # the same question is as hard under any instructions
        in_words = "in words" in instructions and "Only" not in question
        answer = "some number" if in_words else str(a + b if lucky < skill else a + b + 1)
        usage = {"prompt_tokens": len(instructions.split()) + 2, "completion_tokens": 1, "total_tokens": 3}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        reply = {"id": "stub", "object": "chat.completion", "created": 0, "model": request["model"], "usage": usage}
        body = json.dumps(reply | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def agent(task: dict[str, Any], ctx: rs.Context) -> float:
    llm, prompt = ctx.resources["llm"], ctx.resources["instructions"]
    rs.otel.instrument()  # 1: what it emits goes to the rollout that it runs for
    answer = calculator.solve(  # 2: it is called with what the driver has published
        task["question"], instructions=prompt.template, base_url=llm.endpoint, model=llm.model
    )
    return float(answer == str(task["answer"]))


def tasks(seed: int, step: int) -> list[dict[str, Any]]:
    draw = random.Random(f"{seed}/{step}")
    pairs = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(QUESTIONS)]
    return [{"question": f"{a}+{b} = ?", "answer": a + b} for a, b in pairs]


def describe(spans: Sequence[rs.Span]) -> list[str]:
    """Spans as an indented tree, in the order in which they began."""
    depth: dict[str | None, int] = {None: -1}
    lines = []
    for span in sorted(spans, key=lambda span: span.start_time or 0.0):
        depth[span.span_id] = depth[span.parent_id] + 1
        text: Any = span.attributes.get("answer", span.attributes.get("gen_ai.usage.input_tokens", ""))
        lines.append(f"    {'  ' * depth[span.span_id]}{span.name}  {text}")
    return lines


async def train(store: rs.RayLightningStore, run: harness.Run, endpoint: str) -> tuple[list[float], bool]:
    """Hill climb: change one sentence, keep the change if the same questions are answered no worse."""
    order = random.Random(run.seed).sample(sorted(SENTENCES), len(SENTENCES))
    chosen: frozenset[str] = frozenset({"Be brief.", "Answer like a pirate."})
    curve: list[float] = []
    complete = True

    async def reward(sentences: frozenset[str], step: int) -> float:
        nonlocal complete
        prompt = rs.PromptTemplate(template=" ".join(sorted(sentences)), engine="f-string")
        llm = rs.LLM(endpoint=endpoint, model="stub")
        await store.update_resources("agent", {"instructions": prompt, "llm": llm})
        requests = [rs.EnqueueRolloutRequest(input=task) for task in tasks(run.seed, step)]
        asked = [r.rollout_id for r in await store.enqueue_many_rollouts(requests)]
        total = 0.0
        async for rollout in store.as_completed(asked):
            *calls, solve, _ = spans = await store.query_spans(rollout.rollout_id)
            complete &= solve.name == "solve" and bool(calls) and all(c.parent_id == solve.span_id for c in calls)
            final = rs.find_final_reward(spans)
            assert final is not None
            total += final
        return total / len(asked)

    for step in range(run.steps):
        started = time.monotonic()
        proposal = chosen ^ {order[step % len(order)]}
        before, after = await reward(chosen, step), await reward(proposal, step)
        chosen = proposal if after >= before else chosen
        curve.append(max(before, after))
        run.log(step=step, reward=curve[-1], instructions=sorted(chosen), seconds=time.monotonic() - started)
        if run.shows(step):
            print(f"step {step:3}  reward {curve[-1]:.2f}  {'#' * round(30 * curve[-1]):30}  sentences {len(chosen)}")
    print("instructions:", " ".join(sorted(chosen)))
    last = (await store.query_rollouts(sort_by="start_time", sort_order="desc", limit=1))[0]
    print("\n".join([f"the trace of {last.rollout_id}:", *describe(await store.query_spans(last.rollout_id))]))
    return curve, complete


async def main(run: harness.Run) -> bool:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}/v1"
    async with rs.start() as store, rs.RunnerPool(store, agent, size=run.runners):
        curve, complete = await train(store, run, endpoint)
    server.shutdown()
    run.draw({"hill climb": curve})
    learnt = harness.tail(curve) >= curve[0] + 0.2
    print(f"mean reward {curve[0]:.2f} -> {harness.tail(curve):.2f}: {'it learnt' if learnt else 'it did NOT learn'}; "
          f"{'every span is there' if complete else 'spans are MISSING'}")  # fmt: skip
    return learnt and complete


if __name__ == "__main__":
    harness.run("otel_agent", main, __doc__, steps=12)
