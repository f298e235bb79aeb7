"""What the examples share: their arguments, a folder for each run with metrics and a curve, and a quiet end.

Nothing of it is needed to use raystore.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

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


def run(name: str, main: Callable[[Run], Awaitable[bool]], doc: str, *, runners: int = 4, steps: int = 20) -> None:
    """Run an example; the exit status is 0 if `main` says that it did what it says."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--runners", type=int, default=runners)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

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
