"""Answers ten questions of three in the morning from the command line alone, and writes docs/debugging.md of it.

A run on Ray goes wrong here in ways that are known: the code agent cannot parse some answers, a sandbox resets its
connections, groups without a spread are filtered, and one search hangs, for which the trainer waits. Then each
question is answered by commands of a process of its own, which knows nothing of the run.
Run `python docs/draw_debugging.py` to write the page; `--check` only says whether each answer says what it must. Ids
and times differ from run to run, so the page is not compared with itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402

import raystore as rs  # noqa: E402

PAGE = ROOT / "docs" / "debugging.md"
COLUMNS = 110
WIDEST = 160  # of a line of a table; a longer one is a sentence
STEPS, CHECKPOINT = 8, 4
HANGS = 17  # the task of which the search hangs
NAME = "night"


@dataclass(frozen=True)
class Question:
    """What an engineer asks, the commands that answer it, what the answer must say, and how to read it."""

    asked: str
    commands: tuple[str, ...]
    says: tuple[str, ...]
    read: str


QUESTIONS = (
    Question(
        "Is it learning?", ("raystore curve",), (r"train", r"val"),
        "Mean reward of *all* finished rollouts by policy version, before any filter, and of the validation set apart. "
        "Both rise: it learns, and not only on what it is trained on.",
    ),
    Question(
        "Who limited whom?", ("raystore limits",), (r"trainer_waited +\d+%", r"runners_idle +\d+%"),
        "The trainer waited, and runners had nothing to do at the same time: neither is too slow, something in between "
        "is held up. The next question says what.",
    ),
    Question(
        "Why is the trainer waiting now?", ("raystore why train",), (r"{hanging}", r"in span .tool\.search."),
        "One group is not complete, and the batch waits for it (`late=\"wait\"`): one of its rollouts runs for many "
        "times the median. A `deadline_seconds=` on the feed would have ended this wait.",
    ),
    Question(
        "Which runner is stuck in what?", ("raystore top --once",), (r"{hanging} +\S+( \S+)? +tool\.search",),
        "The longest running place first: which runner, which rollout, in which open span, and since when.",
    ),
    Question(
        "What did that rollout do?", ("raystore show {hanging}",), (r"rollout {hanging} +running", r"plan"),
        "Attempts, the spans that have ended, the conversation with the model, and the story. The span that hangs has "
        "not ended, so it is in `top` and not here yet.",
    ),
    Question(
        "Is it the policy or the infrastructure?", ("raystore errors",),
        (r"the policy's doing", r"ValueError", r"infrastructure", r"sandbox"),
        "What the policy did wrong and what was done to it are apart, by line of code and by runner, with one rollout "
        "id each to go on with.",
    ),
    Question(
        "What differs between two steps?", ("raystore diff 2 7",), (r"reward",),
        "The largest effect first, in standard deviations of step 2.",
    ),
    Question(
        "What was discarded, and why?", ("raystore groups --status filtered,failed,stale",),
        (r"filtered", r"std|standard deviation|spread|range"),
        "Groups whose rewards were all the same teach nothing; `keep` names the reason of each.",
    ),
    Question(
        "What eats the memory?", ("raystore status",), (r"spans +\d", r"memory +\S+"),
        "Spans and values against the threshold from which on spans are evicted, and what each consumer holds.",
    ),
    Question(
        "What would a restart at the checkpoint lose?", (f"raystore consumers train --rewind {CHECKPOINT}",),
        (r"steps lost", r"trained on again"),
        "A dry run of what `feed.restore(step)` would undo: which steps, and how many rollouts are trained on again. "
        "Nothing is changed by asking.",
    ),
)  # fmt: skip

HEAD = """# Three in the morning

Ten questions about a run that does not go as it should, each answered from another terminal by commands alone. What
follows was printed for a run that goes wrong in known ways, by [draw_debugging.py](draw_debugging.py), which also
checks that each answer names its cause; ids and times are those of that run. [cli.md](cli.md) has all commands.

The run: groups of four of two environments, batches of four groups, `max_lag=1`, `late="wait"`. The code agent cannot
parse one answer in six, a sandbox resets connections, and the search of one math task hangs.
"""


async def agent(task: dict[str, Any], ctx: rs.Context) -> float:
    """A stand-in that gets better with the version of its policy."""
    lots = random.Random(ctx.rollout.rollout_id)
    version, number = ctx.policy_version or 0, task["number"]
    with ctx.span("plan"):
        prompt = [lots.randrange(1000) for _ in range(20 + lots.randrange(20))]
        answer = [lots.randrange(1000) for _ in range(5 + lots.randrange(40))]
        said: Any = {"prompt": [{"role": "user", "content": task["text"]}], "finish_reason": "stop"}
        ctx.llm(prompt_ids=prompt, response_ids=answer, logprobs=[-1.0] * len(answer), model="small", **said)
    if task["env"] == "math" and number == HANGS:
        with ctx.span("tool.search", query=task["text"]):
            await asyncio.sleep(3600)
    with ctx.span("tool.run"):
        await asyncio.sleep(0.01 + 0.03 * lots.random())
        if number % 5 == 1 and ctx.attempt.sequence_id == 1 and lots.random() < 0.5:
            raise rs.Abort("sandbox-7 has reset the connection")
        if task["env"] == "code" and lots.random() < 0.16:
            int(f"answer {number}")
    if number % 6 == 0:
        return 1.0  # too easy: all rewards are the same
    return min(0.1 + 0.04 * version + 0.5 * lots.random(), 1.0)


def tasks(env: str) -> list[dict[str, Any]]:
    return [{"env": env, "number": number, "text": f"{env} question {number}"} for number in range(60)]


@contextlib.asynccontextmanager
async def run_that_hangs(journal: Path) -> AsyncIterator[str]:
    """Train until a search hangs; gives the rollout that does."""
    async with (
        rs.start(NAME, journal=journal) as store,
        rs.RunnerPool(store, agent, size=2, concurrency=6, heartbeat_seconds=0.5),
    ):
        feed = store.feed(
            "train", {"math": tasks("math"), "code": tasks("code")}, resources_id="policy", size=4, batch=4, max_lag=1,
            on_failure=rs.reward(0), require=(), budget=None, seed=None, mix={"math": 0.5, "code": 0.5}, epochs=None,
        )  # fmt: skip
        training = asyncio.create_task(train(store, feed))
        hanging = asyncio.create_task(find_hanging(store, training))
        try:
            yield await hanging
        finally:
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
            await feed.close()


async def train(store: rs.RayLightningStore, feed: rs.Feed) -> None:
    """The loop, with a validation after each step."""
    step = 0
    await feed.publish({"prompt": rs.PromptTemplate(template="Answer: {text}", engine="f-string")}, version=step)
    async for batch in feed.batches(keep=rs.keep(std=1e-6)):
        step += 1
        shown = rs.PromptTemplate(template=f"Answer in {step} words: {{text}}", engine="f-string")
        await feed.publish({"prompt": shown}, version=step)
        await batch.ack(step=step, metrics={"loss": 1 / step})
        held_out = [{"env": "math", "number": 100 + n, "text": f"held out {n}"} for n in range(4)]
        made = [await store.enqueue_rollout(task, mode="val", resources_id="policy") for task in held_out]
        await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in made], timeout=60)
        if step == CHECKPOINT:
            await feed.checkpoint(step)


async def find_hanging(store: rs.RayLightningStore, training: asyncio.Task[None]) -> str:
    """Wait until nothing but what hangs goes on."""
    quiet = 0
    while quiet < 8:
        if training.done():
            raise RuntimeError("the run has ended, and nothing hangs") from training.exception()
        running = (await store.query_rollouts(status_in=["running", "preparing", "queuing", "requeuing"])).items
        quiet = quiet + 1 if running and all(one.input["number"] == HANGS for one in running) else 0
        await asyncio.sleep(0.5)
    return running[0].rollout_id


def ask(command: str, address: str) -> str:
    """What a command prints in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--address", address], capture_output=True, text=True, timeout=120,
        env=kept | {"PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS)}, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr}")
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
    return "\n".join("\n    ".join(textwrap.wrap(line, COLUMNS)) if len(line) > WIDEST else line for line in lines)


async def page() -> str:
    """The page; raises if an answer does not say what it must."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=4)
    address = ray.get_runtime_context().gcs_address
    parts, wrong = [HEAD], []
    with tempfile.TemporaryDirectory() as directory:
        async with run_that_hangs(Path(directory) / "journal") as hanging:
            for number, question in enumerate(QUESTIONS, 1):
                parts.append(f"## {number}. {question.asked}\n\n{question.read}\n")
                for template in question.commands:
                    command = template.format(hanging=hanging)
                    printed = await asyncio.to_thread(ask, command, address)
                    parts.append(f"```console\n$ {command}\n{printed}\n```\n")
                    missing = [
                        said
                        for said in question.says
                        if not re.search(said.format(hanging=hanging), " ".join(printed.split()))
                    ]
                    wrong += [f"{command} does not say {said!r}:\n{printed}" for said in missing]
    ray.shutdown()
    if wrong:
        raise RuntimeError("\n\n".join(wrong))
    return "\n".join(parts)


if __name__ == "__main__":
    written = asyncio.run(page())
    if "--check" not in sys.argv:
        PAGE.write_text(written)
