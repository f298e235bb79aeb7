"""Agents that wait until they are stopped, if their task says "long"; what they record says how it went."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import raystore as rs


@contextmanager
def recorded(ctx: rs.Context) -> Iterator[None]:
    """A span "begun" that says in which process, and one "ended" that says why."""
    with ctx.span("begun", pid=os.getpid()):
        pass
    try:
        yield
    finally:
        with ctx.span("ended", why=str(ctx.why), cancelled=ctx.cancelled):
            pass


def patient(task: Any, ctx: rs.Context) -> float:
    """An agent that is not async, and looks now and then whether it should stop."""
    with recorded(ctx):
        while task == "long":
            ctx.check()
            time.sleep(0.005)
    return 1.0


async def sleeping(task: Any, ctx: rs.Context) -> float:
    """An agent that sleeps."""
    with recorded(ctx):
        await asyncio.sleep(1000 if task == "long" else 0)
    return 1.0
