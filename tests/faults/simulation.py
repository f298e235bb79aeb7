"""A store, its disk, its clients and the way between them, in one thread, by the lots of one seed.

Batches and answers are dropped, doubled, delayed and overtake each other; the store dies at any moment, with some of
what it had not committed on disk; another process goes on while it may still run. Clients repeat what got no answer.
At the end the four counts: what was acknowledged and is lost, what is there twice, what nobody asked for, and whether a
replay of the disk is the state that the store has.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from raystore.core import check
from raystore.core.claims import JOB_ENDED
from raystore.core.snapshot import digest
from raystore.core.state import Settings
from raystore.errors import FencedError
from raystore.journal import compaction
from raystore.journal.compaction import Snapshotter
from raystore.journal.files import Directory, JournalPosition
from raystore.journal.format import WriterInfo
from raystore.journal.opening import Opened, resume_writing
from raystore.journal.recorder import Recorder
from raystore.journal.replay import Replay
from raystore.journal.span_bodies import SpanBodies
from raystore.remote import server_session
from raystore.remote.server_session import Endpoint
from raystore.service.clock import ManualClock, NoAlarm
from raystore.service.service import PROTOCOL, Service
from raystore.types.options import StoreConfig
from raystore.wire import frames
from raystore.wire.codec import encode

SETTINGS = Settings(
    eviction_bytes=10**9, safe_bytes=10**8, keep_duplicates=True, on_disk=True, suspect_patience_seconds=0.3
)
TIME = 4.0  #: seconds that pass, in all: less than a claim may wait to be acknowledged


class Lost(Exception):
    """No answer came, as when an actor cannot be reached."""


class Disk:
    """What survives: everything that was committed, and a part of the rest; and a snapshot of some of it."""

    def __init__(self) -> None:
        self.records: list[list[bytes]] = []
        self.committed = 0
        self.epoch = 0
        self.path = Path(tempfile.mkdtemp(prefix="simulated-"))
        self.snapshot: Path | None = None

    def crash(self, lots: random.Random) -> None:
        """The process that writes dies, in the middle of whatever it does."""
        del self.records[lots.randint(self.committed, len(self.records)) :]

    def open(self) -> Any:
        """What a process finds that begins to write now; it makes sure of that first."""
        self.committed = len(self.records)
        return self.follow()

    def follow(self, upto: int | None = None, *, from_snapshot: bool = True) -> Replay:
        """What whoever looks now finds."""
        snapshot = self.snapshot if from_snapshot else None
        follower = Replay() if snapshot is None else Replay.from_snapshot(snapshot)
        for number, record in enumerate(self.records[:upto], 1):
            if number > follower.last:
                follower.apply(number, [memoryview(chunk) for chunk in record])
        assert not follower.differences, f"verified otherwise at {follower.differences}"
        return follower

    def compact(self, upto: int) -> None:
        """A helper makes a snapshot up to a record."""
        if upto <= 0 or (self.snapshot is not None and int(self.snapshot.name) >= upto):
            return
        path = self.path / str(upto)
        self.follow(upto).write_snapshot(path, JournalPosition(1, 1, 0, upto))
        self.snapshot = path


class SimulatedWriter:
    """The writing end of a journal, which commits when it is told to."""

    def __init__(self, disk: Disk) -> None:
        disk.epoch += 1
        self.disk, self.epoch = disk, disk.epoch
        self.last = self.durable = len(disk.records)
        self._waiting: list[tuple[int, Any]] = []

    def when_failed(self, on_failure: Any) -> None:
        """Who finds out that it was replaced, finds out by its answers here."""

    def close_soon(self) -> None:
        """Nobody refers to its store any more."""

    def reserve(self, size: int) -> None:
        """There is always space."""

    def regain_space(self) -> bool:
        return True

    def append(self, record: Any) -> int:
        if self.is_newest:
            self.disk.records.append([bytes(chunk) for chunk in record])
        self.last += 1
        return self.last

    @property
    def is_newest(self) -> bool:
        return self.disk.epoch == self.epoch

    def when_durable(self, number: int, told: Any) -> bool:
        if number <= self.durable:
            return False
        self._waiting.append((number, told))
        return True

    def commit(self, upto: int) -> None:
        """Everything up to here is on disk; a writer that has a successor finds that out now."""
        if not self.is_newest:
            error = FencedError("simulated", self.epoch)
            waiting, self._waiting = self._waiting, []
            for _, told in waiting:
                told(error)
            return
        self.durable = self.disk.committed = max(min(upto, self.last), self.durable)
        ready = [told for number, told in self._waiting if number <= self.durable]
        self._waiting = [(number, told) for number, told in self._waiting if number > self.durable]
        for told in ready:
            told(None)


class World:
    """One run."""

    def __init__(
        self,
        seed: int,
        *,
        peers: int = 3,
        loss: float = 0.15,
        twice: float = 0.15,
        crashes: float = 0.03,
        snapshots: float = 0.01,
    ) -> None:
        self.lots = random.Random(seed)
        self.loss, self.twice, self.crashes, self.snapshots = loss, twice, crashes, snapshots
        self.disk = Disk()
        self.kills = 0
        self.lingering: list[SimulatedWriter] = []  # of processes that were replaced and still run
        self.time_left = TIME
        self.mortals: list[str] = []  # sessions of processes that claim and die
        self.mortals_made = 0
        self.start()
        self.peers = [Peer(self, f"p{number}") for number in range(peers)]

    def start(self) -> None:
        """A process begins, with what is on disk."""
        self.log = SimulatedWriter(self.disk)
        found = self.disk.open()
        info = WriterInfo(store_id="s", name="n", writer=None)
        writer: Any = self.log  # in the place of a JournalWriter
        resume_writing(found, writer, SETTINGS, info=info, after=JournalPosition(0, 0, 0, 0), now=time.time())
        directory = Directory("simulated")  # of which nothing is read: spans are in memory here
        bodies = SpanBodies(directory)
        snapshotter = Snapshotter(directory, self.log.epoch, found.operations, bodies.forget_files)
        opened = Opened(
            found.state, directory, Recorder(writer), "s", self.log.epoch, found.now, [], bodies, snapshotter
        )  # fmt: skip
        config = StoreConfig(clock="manual", journal="simulated", duplicate_spans="keep")
        self.service = Service(config, capacity_bytes=2**33, alarm=NoAlarm, name="n", opened=opened)
        self.service._seeds = random.Random(self.lots.random())
        self.endpoint = Endpoint(self.service)

    def replace(self) -> None:
        """The store's process dies, or is believed to be dead and goes on."""
        self.kills += 1
        if self.lots.random() < 0.3:
            self.lingering.append(self.log)  # it has a successor and does not know it
        else:
            self.break_calls()
        self.disk.crash(self.lots)
        self.start()

    def break_calls(self) -> None:
        """A process has ended: calls that are under way get no answer, also those that went to another."""
        for peer in self.peers:
            peer.unreachable()

    async def call(self, parts: list[bytes]) -> Any:
        """A call to the store, with all that may become of it."""
        await self.pause()
        if self.lots.random() < self.loss:
            raise Lost
        endpoint, log = self.endpoint, self.log
        if self.lots.random() < self.twice:
            self.spawn(endpoint.exchange(tuple(parts)))  # it comes twice
        try:
            answer = await endpoint.exchange(tuple(parts))
        except FencedError:
            raise Lost from None  # its process has ended
        await self.pause()
        is_gone = log is not self.log and log not in self.lingering
        if is_gone or self.lots.random() < self.loss:
            raise Lost
        return answer

    def spawn(self, coroutine: Any) -> None:
        self.tasks.append(_start(coroutine))

    async def pause(self) -> None:
        for _ in range(self.lots.randrange(4)):
            await asyncio.sleep(0)

    async def run(self, operations: int) -> dict[str, int]:
        """Let every peer do so much; what came of it."""
        self.tasks: list[asyncio.Future[Any]] = []
        server_session.SLICE_SECONDS = self.lots.choice([-1.0, 1.0])  # a batch is cut behind each operation, or never
        compaction.VERIFY_LAG = self.lots.choice([0, 5])
        working = [_start(peer.work(operations)) for peer in self.peers]
        while not all(task.done() for task in working):
            for task in working:
                if task.done():
                    task.result()
            await asyncio.sleep(0)
            log = self.lots.choice([self.log, self.log, *self.lingering])
            if self.lots.random() < 0.6:
                log.commit(self.lots.randint(log.durable, log.last))
                if not log.is_newest:  # it has found out, and ends
                    await self.pause()
                    self.lingering.remove(log)
                    self.break_calls()
            if self.lots.random() < self.snapshots:
                self.disk.compact(self.lots.randint(0, self.disk.committed))
            if self.lots.random() < self.crashes:
                self.replace()
            self.live_and_die()
        for task in working:
            task.result()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.log.commit(self.log.last)
        return self.counts()

    def live_and_die(self) -> None:
        """Processes beside the peers claim something, hold it or not, and die together; and time passes."""
        service = self.service
        if self.lots.random() < 0.03:
            self.mortals_made += 1
            name = f"mortal-{self.mortals_made}"
            session = service.open_session(name, process=[None, "", self.mortals_made, 0, None, False])
            wanted = {"queues": ["default"], "limit": self.lots.randint(1, 3), "worker_id": None}
            claimed = service.call(session, 0, "dequeue", wanted, lambda ticket, value: False)
            if self.lots.random() < 0.7:
                service.acknowledge(session, [(r.rollout_id, a.attempt_id) for r, a, _ in claimed])
            self.mortals.append(name)
        if self.mortals and self.lots.random() < 0.03:
            dying = self.lots.sample(self.mortals, self.lots.randint(1, len(self.mortals)))
            self.mortals = [name for name in self.mortals if name not in dying]
            service.end_sessions([(name, self.lots.choice(["process gone", JOB_ENDED])) for name in dying])
        if self.time_left > 0 and self.lots.random() < 0.05:
            seconds = self.lots.uniform(0.0, 0.2)
            self.time_left -= seconds
            assert isinstance(service.clock, ManualClock)
            service.clock.tick(seconds, sessions=True)
            service.advance()

    def counts(self) -> dict[str, int]:
        """Lost, doubled, unexpected, out of order, and whether the disk says the same as the memory."""
        state = self.service.state
        check.check(state)
        made: dict[Any, list[Any]] = {}
        for entry in state.entries.values():
            made.setdefault(entry.rollout.input, []).append(entry)
        asked = {value for peer in self.peers for value in peer.asked}
        lost = doubled = disordered = 0
        for peer in self.peers:
            lost += sum(value not in made for value in peer.enqueued)
            numbers = [made[value][0].number for value in peer.asked if value in made]
            disordered += numbers != sorted(numbers)
            for rollout_id, attempt_id, span_id in peer.spans:
                there = [s for s in state.spans.of(rollout_id, attempt_id) if s.span_id == span_id]
                lost += not there
                doubled += len(there) > 1
            for rollout_id, attempt_id, status in peer.finished:
                attempts = {a.attempt_id: a for a in state.entries[rollout_id].attempts}
                lost += attempt_id not in attempts or attempts[attempt_id].status != status
            for rollout_id, attempt_id in peer.claimed:
                lost += attempt_id not in {a.attempt_id for a in state.entries[rollout_id].attempts}
            for consumer, consumed in peer.consumed.items():
                lost += sum(consumer not in state.entries[i].taken for i in consumed)
                doubled += len(consumed) - len(set(consumed))
        orphaned = sum(
            (rollout_id, attempt_id) not in next(peer.claimed for peer in self.peers if peer.name == holder)
            for rollout_id, entry in state.entries.items()
            for attempt_id, holder in entry.holders.items()
            if not holder.startswith("mortal")
        )
        claims = [key for peer in self.peers for key in peer.claimed]
        groups = {value for peer in self.peers for value in peer.grouped}
        sizes = {value: GROUP if value in groups else 1 for value in made}
        for value, entries in made.items():  # a feed replaces members that the infrastructure failed too often
            group = state.groups.of(entries[0].rollout)
            sizes[value] += group.renewed if group is not None else 0
        doubled += sum(len(entries) > sizes[value] for value, entries in made.items()) + len(claims) - len(set(claims))
        lost += sum(len(entries) < sizes[value] for value, entries in made.items())
        for peer in self.peers:  # each item that was drawn is under way, trained, or has ended otherwise; none twice
            feed = state.feeds.get(peer.feed)
            indexes = [] if feed is None else [item.index for item in (*feed.items.values(), *feed.trained.values())]
            ended = {int(one.group_id.rpartition("/")[2]) for one in (feed.endings if feed is not None else ())}
            lost += len(set(range(peer.drawn)) - set(indexes) - ended)
            doubled += len(indexes) - len(set(indexes))
        return {
            "lost": lost,
            "doubled": doubled,
            "unexpected": len(made.keys() - asked),
            "disordered": disordered,
            "orphaned": orphaned,
            "replay differs": int(digest(self.disk.follow(from_snapshot=False).state) != digest(state)),
            "snapshot differs": int(digest(self.disk.follow().state) != digest(state)),
        }


GROUP = 2  #: rollouts of a group
#: Of the feed of a peer: batches of one group, and one ahead.
RULE: dict[str, Any] = {
    "resources_id": "policy", "batch": 1, "max_lag": 1, "max_running": None, "late": "wait", "order": "oldest",
    "on_failure": "mask", "failure_reward": None, "race": False, "judged": False, "batch_tokens": None,
    "max_filtered": None, "in_a_row": None, "share": None, "window": 20, "requeues": 0,
}  # fmt: skip
KINDS = [
    "enqueue", "group", "dequeue", "dequeue", "park", "span", "finish", "finish", "take", "take groups", "ack", "read",
    "release", "more", "draw", "draw", "take of feed",
]  # fmt: skip


class Peer:
    """A client process: operations in order, two batches under way, repeated until they are answered."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.epoch = 0
        self.answered = 0
        self.ahead: set[int] = set()
        self.sequences = itertools.count(1)
        self.tickets = itertools.count(1)
        self.numbers = itertools.count(1)
        self.acknowledgements: list[Any] = []
        self.received: list[int] = []
        self.parked: dict[int, dict[str, Any]] = {}
        self.early: dict[int, list[Any]] = {}
        self.again: list[list[Any]] = []
        self.running: list[tuple[str, str]] = []
        # By consumer, of which it has one of rollouts and one of groups:
        self.batch: dict[str, int] = {}  # held
        self.newest: dict[str, int] = {}  # acknowledged
        self.held: dict[tuple[str, int], list[str]] = {}
        self.steps = itertools.count(1)
        self.feed = f"{name} feed"
        self.begun = 0  # steps until its feed hands out
        self.drawn = 0
        self.is_drawing = False
        self.given_up = asyncio.Event()
        # what it was told
        self.asked: list[bytes] = []
        self.enqueued: list[bytes] = []
        self.claimed: list[tuple[str, str]] = []
        self.spans: list[tuple[str, str, str]] = []
        self.finished: list[tuple[str, str, str]] = []
        self.consumed: dict[str, list[str]] = {}  # by consumer
        self.grouped: list[bytes] = []

    def unreachable(self) -> None:
        """What is under way has no answer coming."""
        gone, self.given_up = self.given_up, asyncio.Event()
        gone.set()

    async def work(self, operations: int) -> None:
        under_way: list[asyncio.Future[Any]] = []
        done = 0
        while done < operations or under_way or self.parked or self.again:
            if len(under_way) < 2:
                batch, self.again = self.again, []
                while done < operations and len(batch) < self.world.lots.randint(1, 4):
                    batch.append(self.next_operation())
                    done += 1
                if done >= operations and self.parked and not batch:  # so that nobody waits for ever
                    batch.append(self.enqueue())
                if batch:
                    under_way.append(_start(self.send(batch)))
            await asyncio.sleep(0)
            for task in [task for task in under_way if task.done()]:
                under_way.remove(task)
                task.result()

    def next_operation(self) -> list[Any]:
        kind = self.world.lots.choice(KINDS)
        if kind in ("span", "finish") and self.running:
            rollout_id, attempt_id = self.world.lots.choice(self.running)
            names = {"rollout_id": rollout_id, "attempt_id": attempt_id}
            if kind == "span":
                span = [
                    next(self.numbers),
                    f"{self.name}-{next(self.numbers)}",
                    "t",
                    None,
                    "n",
                    None,
                    None,
                    None,
                    b"b",
                    -1,
                ]
                return ["add_spans", names | {"spans": [span]}]
            self.running.remove((rollout_id, attempt_id))
            return ["update_attempt", names | {"changes": {"status": "succeeded"}}]
        if kind in ("dequeue", "park"):
            timeout = 1e6 if kind == "park" else 0.0
            return ["dequeue", {"queues": ["default"], "limit": 1, "worker_id": None, "timeout": timeout}]
        if kind == "take":
            return ["take", {"consumer": self.name, "count": 2, "timeout": 0.0}]
        if kind == "take groups":
            return ["take_groups", {"consumer": f"{self.name} of groups", "count": 2, "timeout": 0.0}]
        if kind == "take of feed" and self.begun == 2:
            return ["take_groups", {"consumer": self.feed, "count": 1, "timeout": 0.0}]
        if kind == "draw" and not self.is_drawing:
            return self.draw()
        if kind == "ack" and self.batch:
            consumer, batch = self.batch.popitem()
            self.newest[consumer] = batch
            return ["ack", {"consumer": consumer, "batch": batch, "at_step": next(self.steps), "note": None}]
        if kind == "release":
            ids = [rollout_id for rollout_id, _ in self.claimed]
            return ["release", {"rollout_ids": ids * 40}]  # in several pieces, once there are some
        if kind == "more":
            return ["more", {"token": 0}]
        return ["get_latest_resources", {}] if kind == "read" else self.enqueue(as_group=kind == "group")

    def draw(self) -> list[Any]:
        """The next step of its feed: it begins, publishes, and then draws an item at a time."""
        pumped = {"feed": self.feed, "pump": "p"}
        self.begun += 1
        if self.begun == 1:
            return ["open_feed", pumped | {"rule": RULE, "streams": [["", 1.0, None, None]], "changed": "refuse"}]
        if self.begun == 2:
            weights = {"resources": b"\x01\x80", "holds_objects": False, "objects": []}
            return ["publish_feed", pumped | weights | {"version": 0, "digest": ""}]
        self.begun, self.is_drawing = 2, True
        value = encode(f"{self.name}/{next(self.numbers)}", "input", 1000)
        assert isinstance(value, bytes)
        self.asked.append(value)
        self.grouped.append(value)
        group = {"member": {"input": value, "metadata": None}, "n": GROUP, "group_id": f"{self.feed}/{self.drawn}"}
        position = {"at": [0, self.drawn], "to": [0, self.drawn + 1], "over": False, "state_after": None}
        return [
            "feed_add",
            pumped | position | {"stream": "", "requests": [group], "items": [["", 0, self.drawn]], "skipped": []},
        ]

    def enqueue(self, *, as_group: bool = False) -> list[Any]:
        value = encode(f"{self.name}/{next(self.numbers)}", "input", 1000)
        assert isinstance(value, bytes)
        self.asked.append(value)
        member = {"input": value, "metadata": None}
        if as_group:
            self.grouped.append(value)
            return ["enqueue_groups", {"groups": [{"member": member, "n": GROUP}], "gives": "groups"}]
        return ["enqueue", {"requests": [member]}]

    async def send(self, operations: list[list[Any]]) -> None:
        sequence, first = next(self.sequences), next(self.tickets)
        for _ in operations[1:]:
            next(self.tickets)
        claims, self.acknowledgements = self.acknowledgements, []
        received, self.received = self.received, []
        packed = [frames.pack_operation(*operation) for operation in operations]
        while True:
            header = [PROTOCOL, "test", self.name, sequence, self.answered, sorted(self.ahead), first, claims, received]
            calling = _start(self.world.call(frames.join(header, packed)))
            giving_up = _start(self.given_up.wait())
            await asyncio.wait({calling, giving_up}, return_when=asyncio.FIRST_COMPLETED)
            giving_up.cancel()
            if not calling.done():
                calling.cancel()
                continue
            if calling.exception() is not None:
                if not isinstance(calling.exception(), Lost):
                    calling.result()
                continue
            epoch, outcome, *rest = frames.unpack_answer(calling.result())
            if epoch < self.epoch:
                continue
            assert outcome == frames.DONE, f"a batch was answered {outcome}"
            break
        replies, later, _, _ = rest
        of_before = list(self.parked) if epoch > self.epoch and self.epoch else []
        self.ahead.add(sequence)
        while self.answered + 1 in self.ahead:
            self.answered += 1
            self.ahead.discard(self.answered)
        for number, (operation, reply) in enumerate(zip(operations, replies, strict=True)):
            self.take_answer(operation, first + number, reply)
        for ticket, reply in later:
            if ticket in self.received:
                continue
            self.received.append(ticket)
            if (arguments := self.parked.pop(ticket, None)) is not None:
                self.take_answer(["dequeue", arguments], ticket, reply)
            else:
                self.early[ticket] = reply
        for ticket in of_before:
            if (arguments := self.parked.pop(ticket, None)) is not None:
                self.again.append(["dequeue", arguments | {"of": ticket}])
        self.epoch = epoch

    def take_answer(self, operation: list[Any], ticket: int, reply: list[Any]) -> None:
        verb, arguments = operation
        if reply[0] == frames.PARKED and ticket in self.early:  # the answer has overtaken this
            reply = self.early.pop(ticket)
        if reply[0] == frames.PARKED:
            self.parked[ticket] = {name: value for name, value in arguments.items() if name != "of"}
            return
        if verb == "more":
            assert reply[1] == "AnswerGoneError"
            return
        if verb == "ack" and reply[0] == frames.VALUE:
            consumer = arguments["consumer"]
            self.consumed.setdefault(consumer, []).extend(self.held[consumer, arguments["batch"]])
            return
        if verb in ("take", "take_groups") and reply[0] == frames.ERROR and reply[1] == "BatchHeldError":
            return  # of one whose answer may still be on its way
        assert reply[0] == frames.VALUE, f"{operation} was answered {reply}"
        if verb == "enqueue":
            self.enqueued += [request["input"] for request in arguments["requests"]]
        elif verb == "enqueue_groups":
            self.enqueued += [request["member"]["input"] for request in arguments["groups"]]
        elif verb == "feed_add":
            self.is_drawing = False
            if reply[1] == [0, self.drawn + 1]:  # else there was no place
                self.drawn += 1
                self.enqueued.append(arguments["requests"][0]["member"]["input"])
        elif verb == "dequeue":
            for rollout, attempt, _ in reply[1]:
                self.claimed.append((rollout[0], attempt[1]))
                self.running.append((rollout[0], attempt[1]))
                self.acknowledgements.append((rollout[0], attempt[1]))
        elif verb == "add_spans":
            self.spans.append((arguments["rollout_id"], arguments["attempt_id"], arguments["spans"][0][1]))
        elif verb == "update_attempt":
            self.finished.append((arguments["rollout_id"], arguments["attempt_id"], "succeeded"))
        elif verb in ("take", "take_groups"):
            consumer, number = arguments["consumer"], reply[1][1]
            if number > self.newest.get(consumer, 0):  # else asked before it was acknowledged
                self.batch[consumer] = number
                pairs = [item for item in reply[1][0] if not isinstance(item[0], str)]  # and no group
                self.held[consumer, number] = [rollout[0] for rollout, _ in pairs]
                if verb == "take_groups":
                    assert len(pairs) == GROUP * (len(reply[1][0]) - len(pairs)), "a group came in part"


def simulate(seed: int, operations: int = 40, **how: Any) -> tuple[dict[str, int], int]:
    """The counts of one run, and how often the store was killed in it."""
    slice_seconds, verify_lag = server_session.SLICE_SECONDS, compaction.VERIFY_LAG
    loop = asyncio.new_event_loop()
    world = World(seed, **how)
    try:
        return loop.run_until_complete(asyncio.wait_for(world.run(operations), 20)), world.kills
    finally:
        server_session.SLICE_SECONDS, compaction.VERIFY_LAG = slice_seconds, verify_lag
        shutil.rmtree(world.disk.path)
        loop.run_until_complete(_end())
        loop.close()


def _start(coroutine: Any) -> asyncio.Future[Any]:
    """A task whose end is seen by somebody in any case, also if its run is broken off."""
    task: asyncio.Future[Any] = asyncio.ensure_future(coroutine)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task


async def _end() -> None:
    """Nothing is left behind, also of a run that was broken off."""
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
