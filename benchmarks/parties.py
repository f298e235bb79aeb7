"""Who is compared: our store, the same service one call at a time, an empty actor, and agentlightning.

All live on one isolated local Ray, apart from agentlightning, which has processes in an environment of its own.
Not here: the work they do (`tests.support.shapes`), what is measured.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

import raystore as rs
from tests.support import shapes

ROOT = Path(__file__).parent.parent
PEERS_PYTHON = ROOT / ".venv-agentlightning/bin/python"


# -- naive -------------------------------------------------------------------------------------------------------------


class _NaiveActor:
    """What most people would write: the store in an actor, its methods as they are, pydantic objects across."""

    def __init__(self) -> None:
        self.store = rs.InMemoryLightningStore()

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One method of the store."""
        return await getattr(self.store, method)(*args, **kwargs)


NaiveActor: Any = ray.remote(num_cpus=0, max_concurrency=1000)(_NaiveActor)


class Naive:
    """A store's methods, each a Ray call."""

    def __init__(self, actor: Any = None) -> None:
        self.actor = NaiveActor.remote() if actor is None else actor

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") or method == "actor":
            raise AttributeError(method)
        call = self.actor.call

        async def remote(*args: Any, **kwargs: Any) -> Any:
            return await call.remote(method, args, kwargs)

        return remote

    def close(self) -> None:
        """End its actor."""
        ray.kill(self.actor)


# -- runners -----------------------------------------------------------------------------------------------------------


class _Runner:
    """A process with sequential workers, on our store or a naive one."""

    def __init__(self, actor: Any, naive: bool) -> None:
        self.store: Any = Naive(actor) if naive else rs.RayLightningStore(actor)
        self.desks: dict[tuple[str, int], list[shapes.Desk]] = {}

    async def work(self, shape: str, concurrency: int, rollouts: int) -> float:
        """Do rollouts of a shape; seconds."""
        key = (shape, concurrency)
        if key not in self.desks:
            self.desks[key] = shapes.desks(rs.Span, shape, concurrency)
        return await shapes.work(self.store, shape, self.desks[key], rollouts)


Runner: Any = ray.remote(num_cpus=0)(_Runner)


class Runners:
    """Runner actors of one store."""

    def __init__(self, store: Any, count: int) -> None:
        naive = isinstance(store, Naive)
        self.actors = [Runner.remote(store.actor, naive) for _ in range(count)]

    async def work(self, shape: str, concurrency: int, rollouts: int) -> None:
        """Share out so many rollouts, and wait until all are done."""
        share = rollouts // len(self.actors)
        await asyncio.gather(*(actor.work.remote(shape, concurrency, share) for actor in self.actors))

    def close(self) -> None:
        """End them."""
        for actor in self.actors:
            ray.kill(actor)


# -- agentlightning ----------------------------------------------------------------------------------------------------


class Program:
    """A process of the peers' environment that takes commands."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [str(PEERS_PYTHON), "-m", "benchmarks.peer", *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._is_ready = False

    def wait_until_ready(self) -> None:
        """Wait for its first words: it imports for some seconds, so several are started before any is waited for."""
        if not self._is_ready:
            self._read()
            self._is_ready = True

    def _read(self) -> Any:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line[0] in '[{"-0123456789':  # it may log between its answers
                return json.loads(line)
        raise RuntimeError(f"agentlightning's process ended with code {self._process.wait()}")

    def _write(self, command: str, arguments: dict[str, Any]) -> None:
        self.wait_until_ready()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()

    def tell(self, command: str, **arguments: Any) -> Any:
        """One command and its answer, at once."""
        self._write(command, arguments)
        return self._read()

    async def ask(self, command: str, **arguments: Any) -> Any:
        """One command and its answer."""
        self._write(command, arguments)
        return await asyncio.to_thread(self._read)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Agl:
    """agentlightning's HTTP store and so many client processes."""

    def __init__(self, clients: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        self._server = Program("serve", str(port))
        programs = [_idle_clients.pop() if _idle_clients else Program("work") for _ in range(clients + 1)]
        self.driver, *self.clients = programs
        for program in (self._server, *programs):
            program.wait_until_ready()
        for program in programs:
            program.tell("connect", url=url)

    async def work(self, shape: str, concurrency: int, rollouts: int) -> None:
        """Share out so many rollouts over the clients."""
        share = rollouts // len(self.clients)
        asked = [c.ask("work", shape=shape, concurrency=concurrency, rollouts=share) for c in self.clients]
        await asyncio.gather(*asked)

    async def enqueue(self, rollouts: int) -> list[str]:
        """Ids of rollouts that wait from now on."""
        return list(await self.driver.ask("enqueue", rollouts=rollouts))

    def close(self) -> None:
        """End all its processes."""
        _idle_clients.extend([*self.clients, self.driver])
        self._server.close()


_idle_clients: list[Program] = []  # each imports for seconds; they go from one server to the next


def close_idle() -> None:
    """End the processes that would serve other rows."""
    while _idle_clients:
        _idle_clients.pop().close()


def has_peers() -> bool:
    """Whether `make bench-peers` has been run."""
    return PEERS_PYTHON.exists()


# -- all ---------------------------------------------------------------------------------------------------------------


async def enqueue(store: Any, rollouts: int, **more: Any) -> list[str]:
    """Ids of rollouts that wait from now on, on our store or a naive one."""
    requests = [rs.EnqueueRolloutRequest(input={"task": number}, **more) for number in range(rollouts)]
    return [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests)]


async def in_own_process(module: str, *arguments: Any) -> Any:
    """Run `python -m benchmarks.<module> ...` and return the JSON of its last line: for what depends on memory."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    return json.loads(output.decode().strip().splitlines()[-1])
