"""An agent as people have them: it emits OpenTelemetry spans and knows nothing of raystore."""

from __future__ import annotations

import asyncio
import time

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
tracer = trace.get_tracer("an-agent")


def solve(task: int) -> float:
    """Three nested spans."""
    with (
        tracer.start_as_current_span(f"solve {task}", attributes={"task": task}),
        tracer.start_as_current_span(f"think {task}", attributes={"task": task}),
    ):
        time.sleep(0.002)
        with tracer.start_as_current_span(f"tool {task}", attributes={"task": task}):
            time.sleep(0.002)
    return 1.0


async def solve_async(task: int) -> float:
    """The same, and others in between."""
    with tracer.start_as_current_span(f"solve {task}", attributes={"task": task}):
        await asyncio.sleep(0.001 * (task % 7))
        with tracer.start_as_current_span(f"think {task}", attributes={"task": task}):
            await asyncio.sleep(0.001 * (task % 5))
            with tracer.start_as_current_span(f"tool {task}", attributes={"task": task}):
                await asyncio.sleep(0.001 * (task % 3))
    return 1.0
