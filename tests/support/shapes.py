"""The work that is measured, written once for every party: a shape takes any object with the LightningStore's methods.

Spans are made before the clock runs; a shape only writes the ids of its attempt into them.
Needs nothing but the standard library, since it also runs where raystore is not installed.
"""

from __future__ import annotations

import asyncio
import gc
import random
import string
import time
from collections.abc import Awaitable, Callable
from typing import Any

SPANS = 8  #: of a lifecycle


def words(rng: random.Random, characters: int) -> str:
    """Text that looks like text."""
    made: list[str] = []
    size = 0
    while size < characters:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
        made.append(word)
        size += len(word) + 1
    return " ".join(made)[:characters]


def llm_attributes(seed: int, text: int = 1000) -> dict[str, Any]:
    """Attributes of one call of a model, about 1.6 KB encoded with the default length of its texts."""
    rng = random.Random(seed)
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "Qwen/Qwen3-8B",
        "gen_ai.response.model": "Qwen/Qwen3-8B",
        "gen_ai.response.id": f"chatcmpl-{rng.randbytes(12).hex()}",
        "gen_ai.request.temperature": 0.7,
        "gen_ai.request.max_tokens": 1024,
        "gen_ai.usage.input_tokens": rng.randint(50, 900),
        "gen_ai.usage.output_tokens": rng.randint(50, 900),
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.input.messages": words(rng, text * 6 // 10),
        "gen_ai.output.messages": words(rng, text * 4 // 10),
        "agent.step": seed % 8,
        "agent.is_final": False,
    }


def wide_attributes(seed: int) -> dict[str, Any]:
    """32 attributes of 5 to 300 characters, as agentlightning's own benchmark has them."""
    rng = random.Random(seed)
    return {f"attribute.{number}": words(rng, rng.randint(5, 300)) for number in range(32)}


class Desk:
    """What one sequential worker needs: its name, its spans, its place in a chain of work."""

    def __init__(self, span_class: Any, number: int, attributes: Callable[[int], dict[str, Any]], spans: int) -> None:
        self.worker_id = f"worker-{number}"
        self.spans = [
            span_class.from_attributes(
                attributes=attributes(number * 100 + index),
                rollout_id="-",
                attempt_id="-",
                sequence_id=index + 1,
                name="openai.chat.completion",
                start_time=1.0,
                end_time=2.0,
            )
            for index in range(spans)
        ]

    def address(self, claimed: Any) -> list[Any]:
        """The spans, with the ids of this attempt."""
        for span in self.spans:
            span.rollout_id = claimed.rollout_id
            span.attempt_id = claimed.attempt.attempt_id
        return self.spans


def renamed(span: Any, span_id: str, **changes: Any) -> Any:
    """A copy of a span under another id, which its own context names as well, as in every span of a tracer."""
    context = span.context and span.context.model_copy(update={"span_id": span_id})
    return span.model_copy(update={**changes, "span_id": span_id, "context": context})


Shape = Callable[[Any, Desk], Awaitable[None]]


async def lifecycle(store: Any, desk: Desk) -> None:
    """Claim, 8 spans, succeed; each awaited."""
    claimed = await store.dequeue_rollout(worker_id=desk.worker_id)
    for span in desk.address(claimed):
        await store.add_span(span)
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")


async def gathered(store: Any, desk: Desk) -> None:
    """Claim; then 8 spans and the status together."""
    claimed = await store.dequeue_rollout(worker_id=desk.worker_id)
    spans = desk.address(claimed)
    done = store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
    await asyncio.gather(*(store.add_span(span) for span in spans), done)


async def started(store: Any, desk: Desk) -> None:
    """agentlightning's `rollout`: start, 4 spans of one attribute, succeed."""
    claimed = await store.start_rollout(input={"task": desk.worker_id})
    for span in desk.address(claimed):
        await store.add_span(span)
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")


async def numbered(store: Any, desk: Desk) -> None:
    """agentlightning's `dequeue-update-attempt`: claim, 4 numbers, 4 spans at once, succeed."""
    claimed = await store.dequeue_rollout(worker_id=desk.worker_id)
    spans = desk.address(claimed)
    key = (claimed.rollout_id, claimed.attempt.attempt_id)
    numbers = await store.get_many_span_sequence_ids([key] * len(spans))
    for span, number in zip(spans, numbers, strict=True):
        span.sequence_id = number
    stored = await store.add_many_spans(spans)
    if len(stored) != len(spans):
        raise RuntimeError(f"{len(stored)} of {len(spans)} spans were stored")
    await store.update_attempt(*key, status="succeeded")


#: name -> (shape, attributes of its spans, how many spans, whether its rollouts are enqueued beforehand)
SHAPES: dict[str, tuple[Shape, Callable[[int], dict[str, Any]], int, bool]] = {
    "lifecycle": (lifecycle, llm_attributes, SPANS, True),
    "gathered": (gathered, llm_attributes, SPANS, True),
    "step": (lifecycle, llm_attributes, 10, True),
    "rollout": (started, lambda seed: {"attribute": words(random.Random(seed), 20)}, 4, False),
    "dequeue-update-attempt": (numbered, wide_attributes, 4, True),
}


def desks(span_class: Any, shape: str, count: int) -> list[Desk]:
    """Workers for a shape."""
    _, attributes, spans, _ = SHAPES[shape]
    return [Desk(span_class, number, attributes, spans) for number in range(count)]


async def work(store: Any, shape: str, workers: list[Desk], rollouts: int) -> float:
    """Let the workers do so many rollouts between them, which are there already; seconds."""
    run = SHAPES[shape][0]
    left = iter(range(rollouts))

    async def one(desk: Desk) -> None:
        for _ in left:
            await run(store, desk)

    started_at = time.perf_counter()
    await asyncio.gather(*(one(desk) for desk in workers))
    return time.perf_counter() - started_at


async def work_in_process(store: Any, workers: list[Desk], rollouts: int) -> float:
    """Lifecycles of rollouts that are there already; seconds.

    In process a store may keep the objects it is given, so every span is one of its own, made beforehand.
    """
    made = [[span.model_copy() for span in workers[n % len(workers)].spans] for n in range(rollouts)]
    gc.collect()
    started_at = time.perf_counter()

    async def one(desk: Desk) -> None:
        while made:
            desk.spans = made.pop()
            await lifecycle(store, desk)

    await asyncio.gather(*(one(desk) for desk in workers))
    return time.perf_counter() - started_at


async def fill(store: Any, span_class: Any, rollouts: int, spans: int) -> None:
    """Give so many spans, all different objects, to each of so many rollouts that are there already."""
    for _ in range(rollouts):
        claimed = await store.dequeue_rollout(worker_id="w")
        for index in range(spans):
            await store.add_span(
                span_class.from_attributes(
                    attributes=llm_attributes(index),
                    rollout_id=claimed.rollout_id,
                    attempt_id=claimed.attempt.attempt_id,
                    sequence_id=index + 1,
                    name="openai.chat.completion",
                )
            )
