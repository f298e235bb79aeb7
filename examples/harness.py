"""What the examples share: their arguments, a folder for each run with metrics and a curve, and a quiet end.

Nothing of it is needed to use raystore.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Ray prints a line for each worker that dies, which these examples make happen on purpose.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")

import ray

from raystore.reports import svg


class Run:
    """One run of an example: its arguments, and what it writes to `runs/<name>`."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.runners: int = arguments.runners
        self.steps: int = arguments.steps
        self.seed: int = arguments.seed
        self.is_quick: bool = arguments.quick
        self.folder = Path("runs") / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = self.folder / "metrics.jsonl"
        self.metrics.unlink(missing_ok=True)
        self.curve = self.folder / "reward.svg"

    def log(self, **record: object) -> None:
        """Append one line to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def shows(self, step: int) -> bool:
        """Whether this step is one of the fifteen or so that are printed."""
        return step % max(self.steps // 15, 1) == 0 or step == self.steps - 1

    def draw(self, curves: Mapping[str, Sequence[float]], *, label: str = "mean reward") -> None:
        """Write curves as SVG, one for each name."""
        self.curve.write_text(
            svg.draw({name: list(enumerate(values)) for name, values in curves.items()}, title=label, below="step")
        )


def tail(curve: Sequence[float]) -> float:
    """The mean of the last fifth of a curve."""
    last = curve[-max(len(curve) // 5, 1) :]
    return sum(last) / len(last)


@contextlib.asynccontextmanager
async def trainer(file: str, told: Mapping[str, Any]) -> AsyncIterator[tuple[Process, AsyncIterator[dict[str, Any]]]]:
    """Start a trainer that may be killed, `file --trainer TOLD`: its process, and what it says to `teller`.

    It hears no Ctrl+C of the terminal, and ends with the block.
    """
    ours, theirs = socket.socketpair()  # for what it says: to its stdout others print, too
    command = [sys.executable, file, "--trainer", json.dumps({**told, "channel": theirs.fileno()})]
    process = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    said, writer = await asyncio.open_connection(sock=ours)
    try:
        yield process, (json.loads(line) async for line in said)
    finally:
        writer.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


def teller(told: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """With what a trainer says something to whoever started it."""

    def say(what: Mapping[str, Any]) -> None:
        os.write(told["channel"], json.dumps(what).encode() + b"\n")

    return say


def run(
    name: str,
    main: Callable[[Run], Awaitable[bool]],
    doc: str,
    *,
    runners: int = 4,
    steps: int = 20,
    quick: int | None = None,
) -> None:
    """Run an example; the exit status is 0 if `main` says that it did what it says.

    With `quick` it has a short form of so many steps, `--quick`.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--runners", type=int, default=runners)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(quick=False)
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=f"a short form of {quick} steps")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = quick if arguments.quick else steps

    async def start() -> bool:
        print(f"{name}: {arguments.runners} runners; Ray starts, which takes some seconds ...", flush=True)
        # Quiet: no log lines of Ray's own, and no agent's output. Ray's own order of addresses: RAY_ADDRESS, a cluster
        # that runs on this machine, else a new one.
        ray.init(logging_level="error", log_to_driver=False)
        run = Run(name, arguments)
        succeeded = await main(run)
        print(f"curve {run.curve}, metrics {run.metrics}")
        return succeeded

    try:
        raise SystemExit(0 if asyncio.run(start()) else 1)
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
