"""README's training loop, pasted as it stands: it runs, is killed, and runs again to the same ledger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_project import readme_examples

ROOT = Path(__file__).parent.parent.parent

BEGIN = """
import asyncio
import json
import sys
from pathlib import Path

import raystore as rs
from tests.feed.loop import Model as Base

directory = Path(sys.argv[1])
path = directory / "journal"
data = {"math": list(range(50)), "code": list(range(100, 130))}


class Model(Base):
    def train(self, batch):
        stats = super().train(batch)
        with (directory / "steps").open("a") as file:
            file.write(f"{self.step}\\n")
        return stats


def agent(task, ctx):
    (weight,) = ctx.resources["weights"].get()
    ctx.llm(prompt_ids=[task], response_ids=[int(weight)], logprobs=[-0.1])
    if task % 10 == 3:
        raise ValueError("wrong tool")
    correct = int(ctx.rollout.rollout_id[3:], 16) / 16**12
    ctx.reward(correct, correct=correct)


async def main():
    model = Model(directory / "model")
"""

END = """
await feed.checkpoint(model.save())
ids = [entry.rollout_id for entry in await store.ledger("train")]
rollouts = await store.query_rollouts(rollout_id_in=ids)
print(json.dumps([sorted(rollout.input for rollout in rollouts), (await feed.status()).over]))
"""


def program(directory: Path) -> Path:
    """README's loop between a stub model and agent and a last line, with batches that a test has time for."""
    loop = readme_examples()[1]
    assert len(loop.splitlines()) <= 10
    loop = loop.replace("batch=32", "batch=8").replace("% 20", "% 3")
    # The last lines stand within `async with`, behind the loop.
    code = BEGIN + textwrap.indent(loop, " " * 4) + textwrap.indent(END, " " * 8)
    made = directory / "program.py"
    made.write_text(code + "\n\n\nasyncio.run(main())\n")
    return made


def begin(path: Path, directory: Path) -> subprocess.Popen[str]:
    """Run it."""
    directory.mkdir(exist_ok=True)
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, path, directory], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> Any:
    """What it said at its end."""
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return json.loads(said.splitlines()[-1])


@pytest.mark.timeout(500)
def test_readme_loop_is_killed_and_runs_again_to_the_same_ledger(tmp_path: Path) -> None:
    """Of each item all rollouts are trained on once; those whose agent failed count with the reward for that."""
    made = program(tmp_path)
    whole = ended(begin(made, tmp_path / "whole"))
    items = [*range(50), *range(100, 130)]
    flat = [item for item in items if item % 10 == 3]  # all of their rollouts have the same reward
    assert whole == [sorted([item for item in items if item not in flat] * 8), True]
    directory = tmp_path / "killed"
    for more in (2, 3):
        process = begin(made, directory)
        steps = directory / "steps"
        before = len(steps.read_text().splitlines()) if steps.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if steps.exists() and len(steps.read_text().splitlines()) >= before + more:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert ended(begin(made, directory)) == whole
