"""What bounds the rows that miss their goals: parties that do only what no store on Ray can leave out.

Run `python -m benchmarks.bounds [--only 1,3] [--rounds 5]`. Each party takes the place of our store in a row: an empty
actor that takes the same bytes in as many calls, then one more thing at a time (`bare`). All take turns with our store
and with whom the row is held against, so that a ratio says what a store would reach whose own code took no time.
Not here: where the time of our store goes (`profile`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from typing import Any

import ray
from ray.util.queue import Queue

import raystore as rs
from benchmarks import against, bare
from benchmarks.bare import Bare, Batches
from benchmarks.durability import _folder
from benchmarks.ingest import IN_FLIGHT, _addressed
from benchmarks.lifecycles import lifecycle_rate
from benchmarks.parties import Naive, Program, close_idle, enqueue
from benchmarks.table import HEADER, Goal, Line, Measure, alternate, at_least, at_most, bound, compare
from raystore.remote.session_state import WINDOW
from raystore.wire import frames
from raystore.wire.convert import to_attempt, to_attempted_rollout
from tests.support import shapes
from tests.support.actors import Limit, killing
from tests.support.measure import percentile


async def claimed_row(store: Any, task: Any) -> Any:
    """What a store answers to a claim of a task, as plain values."""
    await store.enqueue_rollout(task)
    asked = {"queues": ["default"], "limit": 1, "worker_id": "worker-0", "timeout": 0.0}
    (claimed,) = await store._transport.call("dequeue", asked)
    return frames.unpack(frames.pack(claimed).frame, [])


def rate(work: Callable[[], Awaitable[Any]], count: float) -> Measure:
    """How many a second, of work that does so many."""

    async def measure() -> float:
        started = time.perf_counter()
        await work()
        return count / (time.perf_counter() - started)

    return measure


def by(callers: int, times: int, call: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """So many calls, shared by callers of which each awaits its own."""

    async def work() -> None:
        left = iter(range(times))

        async def one() -> None:
            for _ in left:
                await call()

        await asyncio.gather(*(one() for _ in range(callers)))

    return work


def lines_of(row: int, samples: dict[str, list[float]], base: str, goal: Goal, *, unit: str, did: str) -> list[Line]:
    """A line for each party but the base."""
    return [
        compare(row, party, samples, base, goal, unit=unit, did=did, ours=party) for party in samples if party != base
    ]


# -- lifecycles --------------------------------------------------------------------------------------------------------


def carried(batches: Batches, desks: list[shapes.Desk], rollouts: int, *, packs: bool) -> Measure:
    """Rollouts per second of coroutines that await each operation of a lifecycle. `packs`: anew for each."""
    finish = bare.finishing()

    async def work() -> None:
        left = iter(range(rollouts))

        async def one(desk: shapes.Desk) -> None:
            claim, ready = bare.claiming(desk.worker_id), [bare.adding(span) for span in desk.spans]
            for _ in left:
                await batches.ask(bare.claiming(desk.worker_id) if packs else claim)
                for span, operation in zip(desk.spans, ready, strict=True):
                    await batches.ask(bare.adding(span) if packs else operation)
                await batches.ask(bare.finishing() if packs else finish)

        await asyncio.gather(*map(one, desks))

    return rate(work, rollouts)


async def concurrent(rounds: int) -> list[Line]:
    """Row 1."""
    lines, rollouts = [], 4096
    with ExitStack() as stack:
        ours, naive = stack.enter_context(rs.start()), stack.enter_context(closing(Naive()))
        actor = stack.enter_context(killing(Bare.remote(await claimed_row(ours, {"task": 1}))))
        for coroutines, goal in ((64, 15), (256, 25)):
            desks = shapes.desks(rs.Span, "lifecycle", coroutines)
            mine = lifecycle_rate(ours, desks, rollouts)
            await mine()
            before = await ours.statistics()
            await mine()
            calls = (await ours.statistics())["actor_calls"] - before["actor_calls"]
            size = sum(map(len, [bare.claiming("worker-1"), *map(bare.adding, desks[0].spans), bare.finishing()]))
            parts = bare.cut(bytes(size * rollouts // calls))
            parties: dict[str, Measure | None] = {
                "as many calls of as many bytes": rate(by(WINDOW, calls, lambda: actor.take.remote(*parts)), rollouts),  # noqa: B023
                "operations, each awaited": carried(Batches(actor.take, reads=False), desks, rollouts, packs=False),
                "and packed and unpacked": carried(Batches(actor.read, reads=True), desks, rollouts, packs=True),
                "ours": mine,
                "naive": lifecycle_rate(naive, desks, 192),
            }
            samples = await alternate(rounds, parties)
            did = f"{coroutines} coroutines; {calls / rollouts:.2f} calls and {size:,} bytes a rollout"
            lines += lines_of(1, samples, "naive", at_least(goal), unit="rollouts/s", did=did)
    return lines


async def sequential(rounds: int) -> list[Line]:
    """Row 3."""
    rollouts = 800
    with ExitStack() as stack:
        ours, naive = stack.enter_context(rs.start()), stack.enter_context(closing(Naive()))
        actor = stack.enter_context(killing(Bare.remote()))
        pooled = stack.enter_context(rs.start())
        (desk,) = shapes.desks(rs.Span, "gathered", 1)
        claim, rest = bare.claiming("worker-1"), bare.joined([*map(bare.adding, desk.spans), bare.finishing()])

        async def agent(task: Any, ctx: Any) -> None:
            for span in desk.spans:
                ctx.add(span)

        async def two_calls() -> None:
            await actor.take.remote(claim)
            await actor.take.remote(rest)

        async def in_pool() -> None:
            await pooled.wait_for_rollouts(rollout_ids=await enqueue(pooled, rollouts))

        stack.enter_context(rs.RunnerPool(pooled, agent, size=1, concurrency=1))
        samples = await alternate(
            rounds,
            {
                "(a) two empty calls": rate(by(1, rollouts, two_calls), rollouts),
                "(a) ours": lifecycle_rate(ours, [desk], rollouts, "gathered"),
                "(b) one empty call": rate(by(1, rollouts, lambda: actor.take.remote(rest)), rollouts),
                "(b) ours, in a pool": rate(in_pool, rollouts),
                "naive": lifecycle_rate(naive, [desk], 160, "gathered"),
            },
        )
    did = f"one after the other; {len(rest):,} bytes in the last call"
    lines = lines_of(3, samples, "naive", at_least(8), unit="rollouts/s", did=did)
    plain = lines_of(3, samples, "naive", at_least(3.5), unit="rollouts/s", did=did)
    return [*plain[:2], *lines[2:]]


async def in_process(rounds: int) -> list[Line]:
    """Row 7."""
    rollouts, few = 4000, 500
    with ExitStack() as stack:
        ours = stack.enter_context(rs.InMemoryLightningStore())
        agl = stack.enter_context(closing(Program("work")))
        desks = shapes.desks(rs.Span, "lifecycle", 16)
        claimed = await claimed_row(ours, {"task": 1})
        ready = to_attempted_rollout(claimed)

        class Only:
            """A store whose methods only pack what they are given, and build what they answer."""

            def __init__(self, *, packs: bool, builds: bool) -> None:
                self.packs, self.builds = packs, builds

            async def dequeue_rollout(self, worker_id: str) -> Any:
                return to_attempted_rollout(claimed) if self.builds else ready

            async def add_span(self, span: Any) -> Any:
                if self.packs:
                    bare.body(span)
                return span

            async def update_attempt(self, rollout_id: str, attempt_id: str, *, status: str) -> Any:
                return to_attempt(claimed[1]) if self.builds else None

        def near(store: Any) -> Measure:
            async def measure() -> float:
                if store is ours:
                    await enqueue(ours, rollouts)
                return rollouts / await shapes.work_in_process(store, desks, rollouts)

            return measure

        async def theirs() -> float:
            return few / float(await agl.ask("lifecycle_in_process", rollouts=few, concurrency=16))

        samples = await alternate(
            rounds,
            {
                "awaited methods that do nothing": near(Only(packs=False, builds=False)),
                "that pack each span": near(Only(packs=True, builds=False)),
                "and build the answers": near(Only(packs=True, builds=True)),
                "ours": near(ours),
                "agl-memory": theirs,
            },
        )
    return lines_of(7, samples, "agl-memory", at_least(10), unit="rollouts/s", did="in process, 16 coroutines")


# -- bytes in bulk -----------------------------------------------------------------------------------------------------


async def bulk_spans(rounds: int) -> list[Line]:
    """Row 4."""
    calls, per_call = 48, 512
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        limit, actor = stack.enter_context(killing(Limit.remote())), stack.enter_context(killing(Bare.remote()))
        (desk,) = shapes.desks(rs.Span, "lifecycle", 1)
        spans = [desk.spans[number % shapes.SPANS] for number in range(per_call)]
        data = os.urandom(len(bare.adding(*spans)))

        async def only_packed() -> None:
            bare.joined([bare.adding(*spans)])

        async def packed() -> None:
            bare.unpack(await actor.read.remote(*bare.cut(bare.joined([bare.adding(*spans)]))))

        async def ours() -> float:
            lists, rollout_ids = await _addressed(store, desk.spans, calls, per_call)
            measured = await over(lambda: store.add_many_spans(lists.pop()))()
            await store.delete_rollouts(rollout_ids)
            return measured

        def over(call: Callable[[], Awaitable[Any]]) -> Measure:
            return rate(by(IN_FLIGHT, calls, call), calls * per_call)

        samples = await alternate(
            rounds,
            {
                "packed, and not sent": over(only_packed),
                "as many bytes, in parts": over(lambda: actor.take.remote(*bare.cut(data))),
                "packed, sent and unpacked": over(packed),
                "ours": ours,
                "limit": over(lambda: limit.take.remote(data)),
            },
        )
    did = f"{calls} calls of {per_call} spans, {len(data) / per_call:,.0f} bytes each, {IN_FLIGHT} callers"
    return lines_of(4, samples, "limit", at_least(0.6), unit="spans/s", did=did)


class _Prober:
    """Makes empty calls one after the other, and remembers how long each took."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._is_stopped = False

    async def calls(self, count: int) -> list[float]:
        """So many, or until `stop`; seconds of each."""
        self._is_stopped = False
        taken: list[float] = []
        while len(taken) < count and not self._is_stopped:
            started = time.perf_counter()
            await self._actor.take.remote(b"")
            taken.append(time.perf_counter() - started)
        return taken

    async def stop(self) -> None:
        """Let `calls` return."""
        self._is_stopped = True


Prober: Any = ray.remote(num_cpus=0)(_Prober)


async def beside_large(rounds: int) -> list[Line]:
    """Row 5: small calls."""
    lines = []
    with ExitStack() as stack:
        limit = stack.enter_context(killing(Limit.remote()))
        prober = stack.enter_context(killing(Prober.remote(limit)))
        for name, size, calls in (("20 spans of 64 KiB", 2**20, 120), ("spans of 1 MiB", 2**20, 192)):
            data = os.urandom(size)
            samples: dict[str, list[float]] = {f"empty calls beside {name}": [], "quiet": []}
            for _ in range(rounds):
                samples["quiet"].append(percentile(await prober.calls.remote(400), 99) * 1000)
                probing = prober.calls.remote(10**6)
                await by(IN_FLIGHT, calls, lambda: limit.take.remote(data))()  # noqa: B023
                stopping = prober.stop.remote()
                samples[f"empty calls beside {name}"].append(percentile(await probing, 99) * 1000)
                await stopping
            did = f"p99 of another process's empty calls beside {calls} calls of {size:,} bytes to the same empty actor"
            lines += lines_of(5, samples, "quiet", at_most(3), unit="ms", did=did)
    return lines


async def pauses(rounds: int) -> list[Line]:
    """Row 13."""
    (desk,) = shapes.desks(rs.Span, "lifecycle", 1)
    claim, finish = bare.claiming(None), bare.finishing()
    add = bare.adding(*(desk.spans[number % shapes.SPANS] for number in range(64)))
    lines = []
    for name, reads in (("as many calls of as many bytes", False), ("and unpacked", True)):
        longest = []
        for _ in range(rounds):
            with killing(Bare.remote()) as actor:
                await actor.watch.remote()
                batches = Batches(actor.read if reads else actor.take, reads=reads)

                async def feed(batches: Batches = batches) -> None:
                    for operation in (claim, add, finish):
                        await batches.ask(operation)

                await by(32, 2 * 2**30 // len(add), feed)()
                longest.append(await actor.longest_pause.remote() * 1000)
        did = f"2 GiB in operations of {len(add):,} bytes to an actor that keeps nothing, 32 callers"
        lines.append(bound(13, f"longest pause, {name}", longest, at_most(20, "ms"), did=did))
    return lines


# -- as a queue --------------------------------------------------------------------------------------------------------


async def as_queue(rounds: int) -> list[Line]:
    """Row 18."""
    task = shapes.words(random.Random(1), 1000)
    callers, times, many, per_call = 64, 64 * 32, 5000, 625
    with ExitStack() as stack:
        store = stack.enter_context(rs.start())
        queue = Queue(actor_options={"num_cpus": 0})
        stack.callback(queue.shutdown, force=True)
        claimed = await claimed_row(store, task)
        actor = stack.enter_context(killing(Bare.remote(claimed)))
        plain, packed = Batches(actor.take, reads=False), Batches(actor.read, reads=True)
        put, get = bare.enqueuing(task), bare.claiming(None)
        put_many = bare.joined([bare.enqueuing(*[task] * per_call)])
        calls = range(many // per_call)

        async def awaited() -> None:
            await plain.ask(put)
            await plain.ask(get)

        async def read() -> None:
            await packed.ask(bare.enqueuing(task))
            await packed.ask(bare.claiming(None))

        async def built() -> None:
            await packed.ask(bare.enqueuing(task))
            _, (answer,) = await packed.ask(bare.claiming(None))
            to_attempted_rollout(answer)

        async def ours() -> None:
            await store.enqueue_rollout(task)
            await store.dequeue_rollout(timeout=10)

        async def theirs() -> None:
            await queue.put_async(task)
            await queue.get_async()

        parties = {"operations, each awaited": awaited, "and packed and unpacked": read, "and claims built": built,
                   "ours": ours, "ray Queue": theirs}  # fmt: skip
        single = await alternate(rounds, {name: rate(by(callers, times, one), times) for name, one in parties.items()})

        async def all_sent(*, packs: bool) -> list[Any]:
            """The claims of as many tasks as are put."""
            sent = [
                actor.read.remote(*bare.cut(bare.joined([bare.enqueuing(*[task] * per_call)])))
                if packs
                else actor.take.remote(*bare.cut(put_many))
                for _ in calls
            ]
            await asyncio.gather(*sent)
            answers = await asyncio.gather(*(actor.give.remote(per_call) for _ in calls))
            return [row for answer in answers for row in bare.unpack(answer)] if packs else []

        async def in_bulk_built() -> None:
            with frames.collector_paused():
                made = [to_attempted_rollout(row) for row in await all_sent(packs=True)]
            assert len(made) == many

        async def ours_in_bulk() -> float:
            requests = [rs.EnqueueRolloutRequest(input=task) for _ in range(many)]
            started = time.perf_counter()
            await store.enqueue_many_rollouts(requests)
            got = await store.dequeue_many_rollouts(limit=many)
            seconds = time.perf_counter() - started
            await store.delete_rollouts([rollout.rollout_id for rollout in got])
            return many / seconds

        async def theirs_in_bulk() -> None:
            queue.put_nowait_batch([task for _ in range(many)])
            queue.get_nowait_batch(many)

        bulk = await alternate(
            rounds,
            {
                "as many bytes, both ways": rate(lambda: all_sent(packs=False), many),
                "and packed and unpacked": rate(lambda: all_sent(packs=True), many),
                "and claims built": rate(in_bulk_built, many),
                "ours": ours_in_bulk,
                "ray Queue": rate(theirs_in_bulk, many),
            },
        )
    did = f"{callers} callers put and get a 1 KB task {times // callers} times"
    lines = lines_of(18, single, "ray Queue", at_least(8), unit="tasks/s", did=did)
    did = f"{many} tasks of 1 KB put and got, {per_call} a call (the queue: all in one)"
    return lines + lines_of(18, bulk, "ray Queue", at_least(0.3), unit="tasks/s", did=did)


# -- a journal, and CPU ------------------------------------------------------------------------------------------------


async def journal(rounds: int) -> list[Line]:
    """Row 21."""
    rollouts = 4096
    with ExitStack() as stack:
        folder = stack.enter_context(_folder())
        plain, durable = stack.enter_context(rs.start()), stack.enter_context(rs.start(journal=folder / "power"))
        claimed = await claimed_row(plain, {"task": 1})
        actor = stack.enter_context(killing(Bare.remote(claimed, str(folder / "bare"))))
        desks = shapes.desks(rs.Span, "lifecycle", 64)
        written, read = Batches(actor.write, reads=True), Batches(actor.read, reads=True)
        samples = await alternate(
            rounds,
            {
                "packed, unpacked, written and synced": carried(written, desks, rollouts, packs=True),
                "packed and unpacked": carried(read, desks, rollouts, packs=True),
                "ours, journal 'power'": lifecycle_rate(durable, desks, rollouts),
                "ours": lifecycle_rate(plain, desks, rollouts),
            },
        )
    did, names = f"lifecycles; 64 coroutines; {rollouts} rollouts a round", list(samples)
    return [
        compare(21, mine, samples, base, at_least(0.7), unit="rollouts/s", did=did, ours=mine)
        for mine, base in (names[:2], names[2:])
    ]


async def cpu(rounds: int) -> list[Line]:
    """Row 25."""
    turns, callers = 312, 32
    desks = shapes.desks(rs.Span, "lifecycle", callers)
    ready = bare.adding(desks[0].spans[0])
    trees = {"ours": against.ROOT, against.BASE: against.worktree(against.BASE)}
    client: dict[str, list[float]] = {name: [] for name in ("operations, each awaited", "and packed", *trees)}
    store: dict[str, list[float]] = {name: [] for name in ("unpacked, and answers packed", *trees)}
    with killing(Bare.remote()) as actor:

        async def taken(batches: Batches, *, packs: bool) -> tuple[float, float]:
            """CPU of client and actor for an operation, in microseconds."""

            async def one(desk: shapes.Desk) -> None:
                for turn in range(turns):
                    await batches.ask(bare.adding(desk.spans[turn % shapes.SPANS]) if packs else ready)

            theirs, mine = await actor.cpu_seconds.remote(), time.process_time()
            await asyncio.gather(*map(one, desks))
            mine, theirs = time.process_time() - mine, await actor.cpu_seconds.remote() - theirs
            return mine / (turns * callers) * 1e6, theirs / (turns * callers) * 1e6

        for _ in range(rounds):
            least = []
            for method, packs in ((actor.take, False), (actor.read, True)):
                tries = [await taken(Batches(method, reads=packs), packs=packs) for _ in range(3)]
                least.append([min(side) for side in zip(*tries, strict=True)])
            (awaited, taken_), (packed, read) = least
            client["operations, each awaited"].append(awaited)
            client["and packed"].append(packed)
            store["unpacked, and answers packed"].append(read - taken_)
            for name, tree in trees.items():
                found = (await asyncio.to_thread(against.measure, tree, ["spans"], 1.0))["spans"]
                client[name].append(found["client"])
                store[name].append(found["store beyond empty"])
    did = "CPU of the client for an operation; 32 coroutines add spans"
    lines = lines_of(25, client, against.BASE, at_most(0.5), unit="µs", did=did)
    did = "CPU of the store for an operation, beyond an empty actor; 32 coroutines add spans"
    return lines + lines_of(25, store, against.BASE, at_most(0.5), unit="µs", did=did)


ROWS: dict[int, Callable[[int], Awaitable[list[Line]]]] = {
    1: concurrent, 3: sequential, 4: bulk_spans, 5: beside_large, 7: in_process, 13: pauses, 18: as_queue, 21: journal,
    25: cpu,
}  # fmt: skip


async def run(numbers: list[int], rounds: int) -> None:
    """Print the lines of these rows."""
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for number in numbers:
        for line in await ROWS[number](rounds):
            print("| " + " | ".join(line.cells()) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.bounds", description=__doc__)
    parser.add_argument("--only", default=",".join(map(str, ROWS)), help=f"of {', '.join(map(str, ROWS))}")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    wanted = [int(number) for number in options.only.split(",")]
    if unknown := set(wanted) - ROWS.keys():
        parser.error(f"--only names rows {sorted(unknown)}; there are {sorted(ROWS)}")
    logging.getLogger("raystore").setLevel(logging.WARNING)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        asyncio.run(run(wanted, options.rounds))
    finally:
        close_idle()
        ray.shutdown()
    sys.exit(0)
