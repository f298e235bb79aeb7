"""Rollouts of 30 turns on runners that live for two seconds each: with `ctx.save` they end, without it they never do.

An agent plays a game of many turns, each of which costs time, as a call of a model does. The kernel kills every runner
two seconds after it began to work: a node that is taken away without a word. The agents save their game after each
turn, and the next attempt goes on from there: its spans begin with those of the turns that were saved, and are one
trajectory. The same agents without `ctx.save` begin anew each time, and none of them ends. A ledger, a file to which
each turn is written before it is played, says what was paid for.

    python examples/07_long_rollouts.py --runners 2 --steps 9 --seed 0
"""

import asyncio
import logging
import random
import signal
import time
from collections import Counter
from typing import Any

import harness

import raystore as rs

TURNS = 30
TURN_SECONDS = 0.1
LIFE_SECONDS = 2.0  # of a runner, from its first rollout on; a game takes 3 s
CONCURRENCY = 3
PATIENCE_SECONDS = 8.0  # for which games without `ctx.save` are watched
PRICE = 1.1  # at most so many times is a turn paid for, on average
VOCABULARY = 1_000


def move(seed: int, turn: int) -> list[int]:
    """What the model answers in a turn: the same whoever asks."""
    lots = random.Random(f"{seed}/{turn}")
    return [lots.randrange(VOCABULARY) for _ in range(5)]


def write(path: str, line: str) -> None:
    """Append a line to a file of several processes."""
    with open(path, "a") as file:  # the line is written at once, so that it does not mix with another
        file.write(line)


class Player:
    """Plays games to their ends, each from where it was saved, in a process that is soon killed."""

    def setup(self) -> None:
        self.is_doomed = False

    async def __call__(self, task: dict[str, Any], ctx: rs.Context) -> float:
        if not self.is_doomed:
            self.is_doomed = True
            signal.setitimer(signal.ITIMER_REAL, LIFE_SECONDS)  # of which a process dies, unless it handles SIGALRM
        tokens, played = ctx.saved or ([0], 0)
        for turn in range(played, TURNS):
            write(task["ledger"], f"{task['game']} {turn}\n")
            with ctx.span("turn", number=turn):
                await asyncio.sleep(TURN_SECONDS)
                answer = move(task["game"], turn)
                ctx.llm(prompt_ids=tokens, response_ids=answer, logprobs=[-1.0] * len(answer))
            tokens = tokens + answer
            if task["saves"]:
                await ctx.save((tokens, turn + 1))
        return 1.0


async def killed_of(store: rs.RayLightningStore, rollouts: list[rs.Rollout]) -> set[str | None]:
    """The runners that died with one of these rollouts."""
    attempts = [attempt for one in rollouts for attempt in await store.query_attempts(one.rollout_id)]
    return {attempt.worker_id for attempt in attempts if attempt.outcome == "runner_lost"}


async def games(
    run: harness.Run, store: rs.RayLightningStore, *, saves: bool, timeout: float
) -> tuple[list[rs.Rollout], Counter[str], set[str | None]]:
    """Play games while runners are killed: those that have ended in time, what was paid for, and who was killed."""
    ledger = (run.folder / f"ledger-{'with' if saves else 'without'}").absolute()
    ledger.write_text("")
    pool = rs.RunnerPool(store, Player, size=run.runners, concurrency=CONCURRENCY)
    await asyncio.to_thread(pool.start)
    try:
        tasks = [{"game": 1_000 * run.seed + game, "saves": saves, "ledger": str(ledger)} for game in range(run.steps)]
        made = await store.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=task) for task in tasks])
        ended = await store.wait_for_rollouts(rollout_ids=[one.rollout_id for one in made], timeout=timeout)
    finally:
        await asyncio.to_thread(pool.stop, drain=False)
    for rollout in ended:
        await check(run, store, rollout)
    return list(ended), Counter(ledger.read_text().splitlines()), await killed_of(store, list(made))


wrong: list[str] = []


async def check(run: harness.Run, store: rs.RayLightningStore, rollout: rs.Rollout) -> None:
    """Whether the spans of a game are one whole trajectory, with each turn once."""
    attempts = await store.query_attempts(rollout.rollout_id)
    spans = await store.query_spans(rollout.rollout_id, "latest")
    turns = [span.attributes["number"] for span in spans if span.name == "turn"]
    found = rs.trajectories(spans)
    expected = [0, *(token for turn in range(TURNS) for token in move(rollout.input["game"], turn))]
    if turns != list(range(TURNS)) or [list(one.token_ids) for one in found] != [expected]:
        wrong.append(f"{rollout.rollout_id}: the spans of its {len(attempts)} attempts are not one trajectory")
    if rollout.status != "succeeded":
        wrong.append(f"{rollout.rollout_id} has {rollout.status}")
    run.log(game=rollout.input["game"], attempts=len(attempts), turns=len(turns), status=rollout.status)


async def main(run: harness.Run) -> bool:
    logging.getLogger("raystore.runner").setLevel(logging.ERROR)  # no line for each runner that is killed on purpose
    # A lost rollout says nothing of itself here, since all of them are lost: none is suspected, and none given up.
    async with rs.start(max_deliveries=1_000, suspect_patience_seconds=0.0) as store:
        began = time.monotonic()
        ended, paid, killed = await games(run, store, saves=True, timeout=300.0)
        seconds = time.monotonic() - began
        without, paid_without, killed_without = await games(run, store, saves=False, timeout=PATIENCE_SECONDS)
    price = sum(paid.values()) / (run.steps * TURNS)
    print(
        f"with ctx.save:    {len(ended)} of {run.steps} games of {TURNS} turns ended in {seconds:.0f} s, while "
        f"{len(killed)} runners were killed; each turn was paid for {price:.3f} times, at most {max(paid.values())}"
    )
    print(
        f"without ctx.save: {len(without)} ended in {PATIENCE_SECONDS:g} s, while {len(killed_without)} runners were "
        f"killed; {sum(paid_without.values())} turns were paid for"
    )
    run.draw({"times that a turn was paid for": [
        sum(paid[f"{1_000 * run.seed + game} {turn}"] for game in range(run.steps)) / run.steps
        for turn in range(TURNS)
    ]}, label="with ctx.save")  # fmt: skip
    if len(ended) < run.steps:
        wrong.append("not all games ended")
    if price > PRICE or len(paid) != run.steps * TURNS:
        wrong.append(f"each turn was paid for {price:.3f} times, {len(paid)} different ones at least once")
    if not killed or not killed_without:
        wrong.append("no runner was killed")
    if without:
        wrong.append("games ended although they were begun anew each time")
    for fault in wrong:
        print(f"WRONG: {fault}")
    if not wrong:
        print("it went on: no saved turn was played twice, and none was lost")
    return not wrong


if __name__ == "__main__":
    harness.run("long_rollouts", main, __doc__, runners=2, steps=9)
