"""Everything a store knows, and the few ways in which a record is replaced.

`State` holds the tables; the functions that change them are in one file for each noun (`verbs` lists them). Code that
replaces a rollout, an attempt or a worker calls `put_rollout`, `put_attempt` or `put_worker`, which keep indexes,
references and holders consistent.
`ReplyCache` keeps the replies of a session's batches, in case a batch comes again. The reply of a change is kept until
the client has received it. Of a reply that handed over claims or a batch only the keys are kept. Nothing is kept of a
read, which runs again.
Not here: decisions (`lifecycle` and the verbs), time (`Step` carries it), durability.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha1
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple
from zlib import crc32

from raystore.core.evaluation_table import EvaluationTable
from raystore.core.feed_table import FeedTable
from raystore.core.gates import Gates
from raystore.core.group_table import GroupTable
from raystore.core.indexes import ChangeFeed, CompletionLog, Crowds, Indexes, WatchSets
from raystore.core.lifecycle import ACTIVE, BUSY, LIVE, OPEN, UNCHARGED, is_busy, is_live
from raystore.core.meters import Meters
from raystore.core.payload import Opaque, Payload, of_attempt, size_of
from raystore.core.queues import Deadlines, LazyHeap, Order, Queues
from raystore.core.records import Attempt, Config, Rollout, Worker, declare, declared, packed, pairs, shown, unpacked
from raystore.core.resources import Freed, ResourceTable
from raystore.core.schema import As, Part
from raystore.core.spans import SpanTable
from raystore.errors import (
    AttemptNotFoundError,
    ClaimLostError,
    RolloutNotFoundError,
    StoreError,
    StoreOverloadedError,
    from_record,
    to_record,
)

CLAIM_SECONDS = 5.0  #: a claim that is not acknowledged for so long is withdrawn
SESSION_SILENCE_SECONDS = 60.0  #: a session that was not heard for so long has ended
SESSION_RECORD_SECONDS = 600.0  #: how long the record of an ended session answers its late batches

IDLE_WORKERS = 10_000  #: that are not busy: of these the newest are kept, by when they were heard of,
SURPLUS = 250  #: and so many beyond go at once

RETRY_SECONDS = 5.0  #: after which a call that exceeded a fixed limit may be tried again

Patience = tuple[bool, str]  #: what waits for a bounded time: True and a reserved session, False and a suspect
AttemptKey = tuple[str, str]  #: rollout id and attempt id; an attempt id alone is only unique within its rollout
BatchKey = tuple[str, int]  #: consumer and number
HandedKey = AttemptKey | BatchKey  #: what an answer hands over, and its caller is to acknowledge


@dataclass(slots=True)
class Settings:
    """The resolved configuration: plain numbers, decided once when the store starts."""

    eviction_bytes: int
    safe_bytes: int
    spans_only: bool = False  # a custom estimator measures spans, so that only spans can count
    keep_duplicates: bool = False
    pause_when_full: bool = False
    max_deliveries: int = 3
    suspect_patience_seconds: float = 10.0
    max_queued: int | None = None
    retention_seconds: float | None = None
    retention_count: int | None = None
    keep_resources: int | None = None
    default_config: Config = field(default_factory=Config)
    on_disk: bool = False  # a journal has every span, so that evicting one loses nothing
    consumers: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # known from the start; filter of each


@dataclass(slots=True, eq=False)
class Step:
    """One change of the state: its time, the session that asked, and the seed of the ids it mints."""

    now: float
    age: float  # claims and sessions age on a clock of their own (manual clocks)
    seed: int = 0
    session: Session | None = None
    minted: int = 0  # ids so far
    record: int = 0  # number of the record of a journal that has the bytes of what runs; 0 without one
    operation: int = 0  # and of the operation within it

    def mint(self, prefix: str, digits: int, taken: Container[str]) -> str:
        """An id in the contract's format, the same at every replay of this step, and not one that is taken.

        Among ten million rollouts two would get one id in one store of six.
        """
        self.minted += 1
        made = prefix + sha1(f"{self.seed}/{self.minted}".encode()).hexdigest()[:digits]
        while made in taken:
            made = prefix + sha1(made.encode()).hexdigest()[:digits]
        return made

    def chance(self, name: str) -> float:
        """A random number from 0 up to 1 for something with a name, the same at every replay of this step."""
        return int(sha1(f"{self.seed}/{name}".encode()).hexdigest()[:13], 16) / 16**13


Pair = tuple[Rollout, Attempt | None]  #: a rollout with its latest attempt


@dataclass(slots=True, eq=False)
class Chain:
    """What the parts of one bulk call share."""

    notes: dict[str, Any] = field(default_factory=dict)
    refusal: StoreError | None = None
    is_last: bool = False  # the part that runs is the last one


def _by_key(rows: list[Any]) -> dict[Any, Any]:
    return {(key[0], key[1]): value for key, value in rows}


InChain = Annotated[Chain, As(Part)]  #: given as its id, and whether this is its last part


def _chains_packed(chains: dict[int, Chain]) -> list[Any]:
    return [(number, chain.notes, chain.refusal and to_record(chain.refusal)) for number, chain in chains.items()]


def _chains_unpacked(rows: list[Any]) -> dict[int, Chain]:
    chains = {}
    for number, notes, refusal in rows:
        error = from_record(*refusal) if refusal is not None else None
        chains[number] = Chain(notes, error if isinstance(error, StoreError) else None)
    return chains


# What a reply says.
VALUE, ERROR, PARKED, NOTICE = range(4)
PARTLY = -1  #: kept of a long operation of which some pieces have run; never sent

Reply = list[Any]
AGAIN: Reply = []  #: placeholder: run this operation again if the batch is repeated
HANDED_KEPT = 64  #: tickets whose handed-over claims are remembered, beyond twice the open claims


class BatchReplies(NamedTuple):
    """The replies of one batch, as far as it has run."""

    first_ticket: int
    replies: list[Reply]


def _kept_again(rows: list[Any]) -> dict[int, BatchReplies]:
    return {sequence: BatchReplies(first_ticket, list(replies)) for sequence, (first_ticket, replies) in rows}


def _handed_again(rows: list[Any]) -> dict[int, list[Any]]:
    return {ticket: [(key[0], key[1]) for key in keys] for ticket, keys in rows}


@dataclass(slots=True, eq=False)
class ReplyCache:
    """The replies of one session. A replay need not reproduce what was sent and answered."""

    #: The sequence number of the batch that is to run next.
    expected: int = declare(1, in_digest=False)
    #: The client has all answers up to here ...
    answered: int = declare(0, in_digest=False)
    #: ... and these.
    ahead: set[int] = declare(make=set, pack=list, unpack=set, in_digest=False)
    kept: dict[int, BatchReplies] = declare(make=dict, pack=pairs, unpack=_kept_again, in_digest=False)
    #: By ticket: the keys of claims, or of a batch, that parked calls were handed.
    handed: dict[int, list[Any]] = declare(make=dict, pack=pairs, unpack=_handed_again, in_digest=False)

    def answers_received(self, answered: int, ahead: Iterable[int]) -> None:
        """The client has the answers of all batches up to one, and those of some later ones."""
        for sequence in [number for number in self.kept if number <= answered]:
            del self.kept[sequence]
        self.answered = max(self.answered, answered)
        if ahead or self.ahead:
            self.ahead = {number for number in self.ahead.union(ahead) if number > self.answered}
        self.expected = max(self.expected, answered + 1)
        while self.expected in self.ahead:  # the client has its answer: a batch of reads leaves no trace here
            self.expected += 1

    def find(self, sequence: int, first_ticket: int) -> BatchReplies | None:
        """The replies of a batch that came before; None if the client has them.

        A batch without replies that the client has no answer of changed nothing.
        """
        is_answered = sequence <= self.answered or sequence in self.ahead
        return None if is_answered else self.kept.get(sequence, BatchReplies(first_ticket, []))

    def end(self, sequence: int) -> None:
        """A batch has run to its end."""
        self.expected = sequence + 1
        while self.expected in self.ahead:
            self.expected += 1

    def hand(self, ticket: int, keys: list[Any], *still_open: Collection[Any]) -> None:
        """A parked call was handed claims, or a batch."""
        if len(self.handed) > HANDED_KEPT + 2 * sum(map(len, still_open)):  # half can go: worth it
            self.handed = {
                t: k for t, k in self.handed.items() if any(key in there for key in k for there in still_open)
            }
        self.handed[ticket] = keys
        self.note(ticket, [PARKED])

    def note(self, ticket: int, reply: Reply) -> None:
        """Keep another reply of an operation from now on."""
        for kept in self.kept.values():
            number = ticket - kept.first_ticket
            if 0 <= number < len(kept.replies):
                kept.replies[number] = reply


@dataclass(slots=True, eq=False)
class Session:
    """One client process: its claims, the attempts and batches that it holds, and the notices for it."""

    session_id: str
    #: When it was heard last, on the clock by which sessions age.
    last_heard: float = declare(in_digest=False)
    #: Whether it is the session of the store's own process, which ends with the store.
    eternal: bool = declare(False)
    ended_at: float | None = declare(None)
    #: Claims that are not acknowledged, and since when.
    claims: dict[AttemptKey, float] = declare(make=dict, pack=pairs, unpack=_by_key, shows=list)
    held: dict[AttemptKey, None] = declare(
        make=dict, pack=list, unpack=lambda rows: dict.fromkeys((key[0], key[1]) for key in rows), shows=list
    )
    #: Batches of consumers that it holds; those that are not acknowledged, with since when.
    batches: dict[BatchKey, float | None] = declare(make=dict, pack=pairs, unpack=_by_key, shows=list)
    #: Withdrawn claims, which a late acknowledgement may re-instate.
    lost: dict[AttemptKey, Attempt] = declare(make=dict, pack=pairs, unpack=_by_key, shows=pairs)
    #: Kind, rollout id, attempt id.
    notices: list[tuple[str, str, str]] = declare(
        make=list, pack=list, unpack=lambda rows: [tuple(row) for row in rows], in_digest=False
    )
    #: Bulk calls of which the last part has not come yet.
    chains: dict[int, Chain] = declare(make=dict, pack=_chains_packed, unpack=_chains_unpacked, shows=_chains_packed)
    #: Rollouts that a long deletion of it will reach, of which some pieces are still to run.
    deleting: dict[str, None] = declare(make=dict, pack=list, unpack=dict.fromkeys, shows=list)
    replies: ReplyCache = declare(
        stored_as="line",
        make=ReplyCache,
        pack=packed,
        unpack=lambda values: unpacked(ReplyCache, values),
        in_digest=False,
    )
    #: Which process it is: see `raystore.remote.lifelines`. None if it did not say.
    process: list[Any] | None = declare(None)
    #: Since when it gets no other work, because it runs a suspect or is drained for one; None once it is idle again.
    reserved_since: float | None = declare(None)

    @property
    def is_idle(self) -> bool:
        """Whether the process runs nothing."""
        return not self.claims and not self.held


@dataclass(slots=True, eq=False)
class Taken:
    """That a consumer has taken a rollout: in which batch, which step of its model consumed it, whether for ever."""

    batch: int
    step: int | None = declare(None)
    note: str | None = declare(None)
    is_durable: bool = declare(False)


@dataclass(slots=True, eq=False)
class Consumer:
    """Who trains on finished rollouts: what it asks for, awaits and holds, and what its durable model consumed."""

    #: "rollouts" or "groups"; None as long as it has taken nothing. Those of older snapshots take rollouts.
    takes: str | None = declare("rollouts")
    #: What it is given (`training.Filter`); None as long as it has not said.
    filter: dict[str, Any] | None = declare(None)
    #: What it is to be given, in this order.
    awaiting: OrderedDict[str, None] = declare(make=OrderedDict, pack=list, unpack=OrderedDict.fromkeys, shows=list)
    #: What it is to be given, in this order, if it takes groups.
    groups: OrderedDict[str, None] = declare(make=OrderedDict, pack=list, unpack=OrderedDict.fromkeys, shows=list)
    #: Those of `awaiting`, or of `groups`, that it had taken before.
    returned: dict[str, None] = declare(make=dict, pack=list, unpack=dict.fromkeys, shows=list)
    #: Unfinished rollouts, or open groups, that fit its filter; None until they are needed.
    coming: dict[str, None] | None = declare(None, in_snapshot=False, in_digest=False)
    #: Batches so far.
    made: int = declare(0)
    #: Batches that it holds and has not consumed, with the session of each; None once that has ended.
    holders: dict[int, str | None] = declare(make=dict, pack=pairs, unpack=dict)
    #: Since when each of these is held by that session. A replay need not reproduce it: older journals do not have it.
    since: dict[int, float] = declare(make=dict, pack=pairs, unpack=dict, in_digest=False)
    #: Of these, those whose session took them over from one that had ended.
    inherited: dict[int, None] = declare(make=dict, pack=list, unpack=dict.fromkeys, shows=list)
    #: Rollouts of batches that no checkpoint has released.
    batches: dict[int, list[str]] = declare(make=dict, pack=pairs, unpack=dict)
    #: The groups of each of these, if it takes groups.
    grouped: dict[int, list[str]] = declare(make=dict, pack=pairs, unpack=dict)
    #: Of those batches, which step consumed which.
    steps: dict[int, int] = declare(make=dict, pack=pairs, unpack=dict)
    #: The model is durable at this step.
    checkpoint: int | None = declare(None)
    #: In the completion log: up to here it was given everything. Of a journal of format 1, while that is read.
    cursor: int | None = declare(None)
    #: The one batch that it holds. Of a journal of format 1, while that is read.
    open: int | None = declare(None)


NOBODY: Mapping[str, Taken] = MappingProxyType({})  #: shared by all rollouts that nobody took


@dataclass(slots=True, eq=False)
class AttemptClock:
    """When an attempt started and gave its last sign of life, on the clock that stands still in pauses."""

    start: float
    beat: float | None = declare(None)


@dataclass(slots=True, eq=False)
class Saved:
    """What an agent saved last: which attempt, the newest number of a span then, its reward then, and the state."""

    attempt_id: str
    mark: int
    reward: float | None
    payload: Opaque


def _saved_packed(saved: Saved | None) -> list[Any] | None:
    return None if saved is None else [saved.attempt_id, saved.mark, saved.reward, saved.payload]


def _saved_unpacked(row: list[Any] | None) -> Saved | None:
    return None if row is None else Saved(*row)


def _saved_shown(saved: Saved) -> list[Any]:
    data = saved.payload.data if isinstance(saved.payload, Payload) else saved.payload or b""
    return [saved.attempt_id, saved.mark, saved.reward, len(data), crc32(data)]


def _taken_packed(taken: Mapping[str, Taken]) -> list[Any]:
    return [[consumer, packed(of_one)] for consumer, of_one in taken.items()]


def _taken_unpacked(rows: list[Any]) -> Mapping[str, Taken]:
    return {consumer: unpacked(Taken, values) for consumer, values in rows} or NOBODY


@dataclass(slots=True, eq=False)
class Entry:
    """All that is known of one rollout."""

    rollout: Rollout
    #: In the order in which rollouts came.
    number: int
    #: The arguments of a caller-given id, to tell a repetition from a conflict.
    given: tuple[Any, ...] | None = declare(None, unpack=lambda row: row if row is None else tuple(row))
    #: Bytes that count for it, apart from its spans.
    bytes: int = declare(0)
    #: In the order of their sequence ids; each with its clock.
    attempts: list[Attempt] = declare(make=list)
    clocks: list[AttemptClock] = declare(make=list, shows=lambda clocks: [shown(clock) for clock in clocks])
    #: Its place in line, kept for when it comes back.
    order: Order | None = declare(None, unpack=lambda row: row if row is None else (row[0], row[1]))
    #: Somebody has read its spans. Reading costs nothing in a journal, so a snapshot does not know.
    read: bool = declare(False, in_snapshot=False, in_digest=False)
    released: bool = declare(False)
    #: The eviction class whose heap it is in, if it is in one.
    evicts_as: int = declare(0, in_snapshot=False, in_digest=False)
    #: Its status before the latest attempt, for a claim that is taken back.
    former: str = declare("queuing")
    #: It may end the process that runs it: it is handed out alone, if that can be had.
    suspect: bool = declare(False)
    #: Charged ones: aborts, and losses for which it is to blame.
    deliveries: int = declare(0)
    #: Of these, losses of which a rule decides.
    blames: int = declare(0, is_later=True)
    #: How often it was lost with its process after its claim was acknowledged.
    losses: int = declare(0)
    #: How many of its claims nobody acknowledged.
    withdrawals: int = declare(0)
    #: How many of its attempts, the first ones, no allowance counts any more, since it was requeued by hand.
    forgiven: int = declare(0, is_later=True)
    #: Session id by attempt id.
    holders: dict[str, str] = declare(make=dict, pack=pairs, unpack=dict)
    #: By consumer; replaced, never edited.
    taken: Mapping[str, Taken] = declare(
        make=lambda: NOBODY, pack=_taken_packed, unpack=_taken_unpacked,
        shows=lambda taken: sorted((name, shown(of_one)) for name, of_one in taken.items()),
    )  # fmt: skip
    #: The newest state that an agent saved, for the attempt that comes next.
    saved: Saved | None = declare(None, is_later=True, pack=_saved_packed, unpack=_saved_unpacked, shows=_saved_shown)
    #: Of attempts that went on from a saved state: up to which number of a span they did. None: of none.
    marks: dict[str, int] | None = declare(
        None, is_later=True, pack=lambda marks: marks and pairs(marks), unpack=lambda rows: dict(rows) if rows else None
    )
    #: The version of its resources that the latest attempt has switched to; referred to as long as that attempt lives.
    refreshed: int | None = declare(None, is_later=True)
    #: The chunk of a snapshot that it is in (`snapshot.LazyChunk`); only as long as nobody needed it.
    chunk: Any = field(init=False, repr=False)

    def __getattr__(self, name: str) -> Any:
        """A field that is not there yet: the entry is as it was found in a snapshot."""
        if name == "chunk" or name not in _ENTRY_FIELDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.chunk.load()
        return getattr(self, name)

    @property
    def is_sealed(self) -> bool:
        """Whether somebody trains on it, or has: nothing about it is decided any more."""
        return bool(self.taken)

    @property
    def is_held(self) -> bool:
        """Whether somebody may have to train on it again."""
        return any(not taken.is_durable for taken in self.taken.values())

    @property
    def pair(self) -> Pair:
        """The rollout with its latest attempt."""
        return self.rollout, self.latest

    @property
    def latest(self) -> Attempt | None:
        """The attempt that decides the rollout's status."""
        return self.attempts[-1] if self.attempts else None

    @property
    def charged(self) -> int:
        """How many attempts count against `max_attempts`: not those whose outcome has a rule of its own."""
        free = UNCHARGED
        if self.rollout.config.retry_rules:
            free = free.union(rule.outcome for rule in self.rollout.config.retry_rules)
        counted = self.attempts[self.forgiven :] if self.forgiven else self.attempts
        return sum(attempt.outcome not in free for attempt in counted)


_ENTRY_FIELDS = frozenset(field.name for field in declared(Entry))


@dataclass(slots=True)
class EvictionPass:
    """What one eviction pass did, or has done so far."""

    rollout_ids: list[str] = field(default_factory=list)
    spans: int = 0
    bytes: int = 0
    unread: list[str] = field(default_factory=list)  # finished and never read: somebody may miss them
    written: set[str] = field(default_factory=set)  # rollouts that were written to meanwhile: they go last


@dataclass(slots=True)
class Effects:
    """What steps left to do for whoever runs the store, which takes it after them (`State.take_effects`)."""

    #: Rollouts that have finished, or are gone: somebody may wait for them.
    finished: list[str] = field(default_factory=list)
    #: Queues from which there may be something to hand out.
    queues: set[str] = field(default_factory=set)
    #: Sessions that have ended.
    ended: list[str] = field(default_factory=list)
    #: Sessions that have notices to be sent.
    noticed: set[str] = field(default_factory=set)
    #: Values of resources that are gone: others may let go of their objects.
    freed: list[Freed] = field(default_factory=list)
    #: A consumer that waits for a batch may be given one now.
    has_batches: bool = False
    #: Feeds whose pumps may have something to do.
    feeds: set[str] = field(default_factory=set)
    #: A claim was withdrawn, since nobody acknowledged it: its session may be dead.
    has_withdrawn: bool = False
    #: There are more ended sessions or idle workers than are kept.
    has_surplus: bool = False
    #: What people decided about pauses and limits, in words, for the log.
    said: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


def require_room(what: str, number: int, bound: int) -> None:
    """Raise `StoreOverloadedError` if a fixed limit leaves no room for one more. Other limits are set by users."""
    if number >= bound:
        raise StoreOverloadedError(what, number, bound, RETRY_SECONDS)


def last_heard_of(worker: Worker) -> float:
    """When a worker was heard of last."""
    stamps = (worker.last_heartbeat_time, worker.last_dequeue_time, worker.last_busy_time, worker.last_idle_time)
    return max((stamp for stamp in stamps if stamp is not None), default=0.0)


class State:
    """All tables of one store."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings = settings
        self.entries: dict[str, Entry] = {}
        self.queues: Queues = Queues()
        self.gates: Gates = Gates()  # of those queues that somebody has paused or limited
        self.suspects: dict[str, float] = {}  # suspects that wait for a session of their own, and since when
        self.drained: str | None = None  # the session that takes no work until it is idle, for a suspect
        self.indexes: Indexes = Indexes()
        self.workers: dict[str, Worker] = {}
        self.consumers: dict[str, Consumer] = {}  # those that are known
        self.forgotten: dict[str, Consumer] = {}
        self.groups: GroupTable = GroupTable()
        self.feeds: FeedTable = FeedTable()
        self.moved_feeds: dict[str, None] = self.feeds.moved  # those that look at their items at the end of the step
        self.evaluations: EvaluationTable = EvaluationTable()
        self.moved_members: dict[str, str] = {}  # of groups, which look at them at the end of the step; group of each
        self.resources: ResourceTable = ResourceTable(settings.keep_resources)
        self.spans: SpanTable = SpanTable(keep_duplicates=settings.keep_duplicates)
        self.sessions: dict[str, Session] = {}
        self.deleting: dict[str, Session] = {}  # those of which a long deletion is under way
        self.changes: ChangeFeed = ChangeFeed()
        self.meters: Meters = Meters()  # in snapshots, and in no digest
        self.completions: CompletionLog = CompletionLog()
        self.crowds: Crowds = Crowds()  # that queries have met; no journal keeps them
        self.watched: WatchSets = WatchSets()  # of callers of this process; no journal keeps them
        self.deadlines: Deadlines[str] = Deadlines(self._rollout_deadline)
        self.group_deadlines: Deadlines[str] = Deadlines(self._group_deadline)
        self.claim_deadlines: Deadlines[tuple[str, HandedKey]] = Deadlines(self._claim_deadline)
        self.session_deadlines: Deadlines[str] = Deadlines(self._session_deadline)
        self.patience_deadlines: Deadlines[Patience] = Deadlines(self._patience_deadline)
        self.paused: float = 0.0  # seconds in which the store stood still, by which deadlines move
        self.rollouts_made = 0
        self.attempts_made = 0
        self.attempt_count: int = 0
        self.payload_bytes: int = 0  # of rollouts with their attempts, and of workers: what a user gave
        # Rollouts with spans in memory: a heap for each `training.eviction_class`, by when they started.
        self.eviction_heaps: list[LazyHeap[str, tuple[float, int]]] = [LazyHeap() for _ in range(7)]
        # Rollouts that the retention rule may delete, by when they ended: released or consumed; read, and neither.
        self.disposable_released: LazyHeap[str, float] = LazyHeap()
        self.disposable_read: LazyHeap[str, float] = LazyHeap()
        self.eviction_pass: EvictionPass | None = None  # one that has more to do
        self.evicted_rollouts = 0
        self.eviction_passes = 0
        self.memory_full = False  # the store hands out no work
        self.waits_for: str | None = None  # the consumer that memory is full of
        # Records that are kept for a while only, in the order in which they go. A replay is told which ones go, so that
        # it does not need this: `gather` finds them after it.
        self.ended_sessions: dict[str, None] = {}
        self.idle_workers: dict[str, None] = {}
        self.effects: Effects = Effects()
        self.resources.freed = self.effects.freed
        self.withdrawals = 0
        self.reservations = 0
        self.touched: dict[str, None] = {}  # with a journal: rollouts that have changed since they were verified last

    def configure(self, settings: Settings) -> None:
        """Go on with other settings."""
        self.settings = settings
        self.spans.keep_duplicates = settings.keep_duplicates
        self.resources.keep = settings.keep_resources

    @property
    def is_quiet(self) -> bool:
        """Whether the steps so far have left nothing to do, and nothing should be evicted; each operation asks."""
        effects = self.effects
        return not (
            effects.finished or effects.queues or effects.noticed or effects.has_batches or effects.ended
            or effects.has_withdrawn or effects.has_surplus or effects.freed or effects.said or effects.feeds
            or self.spans.bytes + self.payload_bytes + self.resources.bytes + self.groups.bytes
            > self.settings.eviction_bytes
            or self.memory_full or self.eviction_pass is not None
        )  # fmt: skip

    @property
    def is_full(self) -> bool:
        """Whether something should be evicted."""
        return self.total_bytes > self.settings.eviction_bytes or self.memory_full or self.eviction_pass is not None

    def take_effects(self) -> Effects:
        """What steps have left to do since this was asked last."""
        effects, self.effects = self.effects, Effects()
        self.resources.freed = self.effects.freed
        return effects

    def offer_all(self) -> None:
        """Offer the work of all queues again: which sessions may have it has changed."""
        self.effects.queues.update(self.queues.lengths())

    def gather(self) -> None:
        """Find, after a replay, the records that are kept for a while only."""
        ended = [session for session in self.sessions.values() if session.ended_at is not None]
        ended.sort(key=lambda session: session.ended_at or 0.0)
        self.ended_sessions = dict.fromkeys(session.session_id for session in ended)
        idle = sorted((worker for worker in self.workers.values() if not is_busy(worker)), key=last_heard_of)
        self.idle_workers = dict.fromkeys(worker.worker_id for worker in idle)

    # -- look-ups ------------------------------------------------------------------------------------------------

    def entry(self, rollout_id: str) -> Entry:
        """The rollout with this id."""
        entry = self.entries.get(rollout_id)
        if entry is None:
            raise RolloutNotFoundError(rollout_id)
        return entry

    def index_of(self, entry: Entry, attempt_id: str) -> int | None:
        """Index of an attempt by its own id; the newest are looked at first, since they are asked for."""
        attempts = entry.attempts
        for index in range(len(attempts) - 1, -1, -1):
            if attempts[index].attempt_id == attempt_id:
                return index
        return None

    def find_attempt(self, entry: Entry, attempt_id: str, session: Session | None = None) -> int:
        """Index of an attempt; "latest" names the newest."""
        attempts = entry.attempts
        if attempts and attempts[-1].attempt_id == attempt_id:
            return len(attempts) - 1
        if attempt_id == "latest":
            if not attempts:
                raise AttemptNotFoundError(entry.rollout.rollout_id)
            return len(attempts) - 1
        if (found := self.index_of(entry, attempt_id)) is not None:
            return found
        key = (entry.rollout.rollout_id, attempt_id)
        if session is not None and key in session.lost:
            raise ClaimLostError(*key)
        raise AttemptNotFoundError(*key)

    # -- what a long deletion will reach ---------------------------------------------------------------------------

    def reserve(self, session: Session, rollout_ids: list[str]) -> None:
        """Keep rollouts for a long deletion: nobody is given them to train on any more."""
        session.deleting = dict.fromkeys(rollout_ids)
        self.deleting[session.session_id] = session

    def is_reserved(self, rollout_id: str) -> bool:
        """Whether a deletion will reach a rollout."""
        return any(rollout_id in session.deleting for session in self.deleting.values())

    # -- replacing records ---------------------------------------------------------------------------------------

    def touch(self, rollout_id: str) -> None:
        """Note that a rollout has changed."""
        if self.settings.on_disk:
            self.touched[rollout_id] = None

    def touch_group(self, group_id: str) -> None:
        """Note that a group has changed."""
        if self.settings.on_disk:
            self.groups.touched[group_id] = None

    def put_rollout(self, entry: Entry, rollout: Rollout) -> None:
        """Replace a rollout by one of the same status (`rollouts.move` gives it another one)."""
        self.touch(rollout.rollout_id)
        entry.rollout = rollout

    def note_member(self, rollout: Rollout) -> None:
        """Let the group of a rollout, if it has one, look at it at the end of the step."""
        if (group := self.groups.of(rollout)) is not None:
            self.moved_members[rollout.rollout_id] = group.group_id

    def put_attempt(self, entry: Entry, index: int, attempt: Attempt) -> None:
        """Replace an attempt (or append one), and what follows from whether it is live."""
        old = entry.attempts[index] if index < len(entry.attempts) else None
        if self.settings.on_disk:
            self.touched[attempt.rollout_id] = None
        if index >= len(entry.attempts) - 1:
            before = entry.attempts[-1].worker_id if entry.attempts else None
            if before != attempt.worker_id:
                self.indexes.move(attempt.rollout_id, "worker", before, attempt.worker_id)
            if old is not None and entry.rollout.group_id is not None and attempt.outcome != old.outcome:
                self.note_member(entry.rollout)
        if (old is None and (attempt.metadata is not None or attempt.error is not None)) or (
            old is not None and (attempt.metadata is not old.metadata or attempt.error is not old.error)
        ):
            self._account(entry, old, attempt)
        if old is None:
            entry.attempts.append(attempt)
            entry.clocks.append(AttemptClock(attempt.start_time - self.paused))
            self.attempt_count += 1
        else:
            entry.attempts[index] = attempt
        was_live = old is not None and (old.status, old.outcome) in LIVE
        lives = (attempt.status, attempt.outcome) in LIVE
        if was_live != lives:
            if attempt.resources_version is not None:
                self.resources.refer(entry.rollout.resources_id, attempt.resources_version, 1 if lives else -1)
            if entry.refreshed is not None and index == len(entry.attempts) - 1:
                self.resources.refer(entry.rollout.resources_id, entry.refreshed, 1 if lives else -1)
            if lives and old is not None:  # else whoever added it says who holds it
                self.hold(entry, attempt.attempt_id)
            elif not lives:
                self.let_go(entry, attempt.attempt_id)

    def remove_latest(self, entry: Entry) -> Attempt:
        """Take the latest attempt back as if it had never been."""
        attempt = entry.attempts[-1]
        self.touch(attempt.rollout_id)
        self._account(entry, attempt, None)
        self.let_go(entry, attempt.attempt_id)
        entry.holders.pop(attempt.attempt_id, None)
        if is_live(attempt):
            self.resources.refer(entry.rollout.resources_id, attempt.resources_version, -1)
        former = entry.attempts[-2].worker_id if len(entry.attempts) > 1 else None
        if former != attempt.worker_id:
            self.indexes.move(attempt.rollout_id, "worker", attempt.worker_id, former)
        entry.attempts.pop()
        entry.clocks.pop()
        entry.forgiven = min(entry.forgiven, len(entry.attempts))
        self.attempt_count -= 1
        return attempt

    def _account(self, entry: Entry, old: Attempt | None, new: Attempt | None) -> None:
        """Count the values of an attempt that has changed."""
        more = of_attempt(new.metadata, new.error) if new is not None else 0
        more -= of_attempt(old.metadata, old.error) if old is not None else 0
        entry.bytes += more
        self.payload_bytes += more

    def put_worker(self, worker_id: str, **changes: Any) -> Worker:
        """Replace the record of a worker, which was heard of just now, perhaps for the first time."""
        before = self.workers.get(worker_id) or Worker(worker_id)
        worker = self.workers[worker_id] = before.evolve(**changes)
        if worker.heartbeat_stats is not before.heartbeat_stats:
            self.payload_bytes += size_of(worker.heartbeat_stats) - size_of(before.heartbeat_stats)
        idle = self.idle_workers
        idle.pop(worker_id, None)
        if worker.status != BUSY:
            idle[worker_id] = None  # behind all others
            if len(idle) >= IDLE_WORKERS + SURPLUS:
                self.effects.has_surplus = True
        return worker

    # -- who runs what -------------------------------------------------------------------------------------------

    def hold(self, entry: Entry, attempt_id: str) -> None:
        """Note in its holder's session that the attempt is live."""
        session = self.sessions.get(entry.holders.get(attempt_id, ""))
        key = (entry.rollout.rollout_id, attempt_id)
        if session is not None and session.ended_at is None and key not in session.claims:
            session.held[key] = None

    def let_go(self, entry: Entry, attempt_id: str) -> None:
        """Note in its holder's session that the attempt is live no longer."""
        session = self.sessions.get(entry.holders.get(attempt_id, ""))
        if session is None:
            return
        key = (entry.rollout.rollout_id, attempt_id)
        session.held.pop(key, None)
        session.claims.pop(key, None)
        if session.is_idle and (self.suspects or session.reserved_since is not None):
            session.reserved_since = None
            self.offer_all()

    def take_hold(self, entry: Entry, attempt_id: str, session: Session | None) -> None:
        """Make `session` the holder of an attempt."""
        if session is None or entry.holders.get(attempt_id) == session.session_id:
            return
        self.let_go(entry, attempt_id)
        entry.holders[attempt_id] = session.session_id
        attempt = entry.attempts[self.find_attempt(entry, attempt_id)]
        if is_live(attempt):
            self.hold(entry, attempt_id)

    def notify(self, entry: Entry, attempt_id: str, kind: str) -> None:
        """Tell the holder of an attempt what became of it."""
        session = self.sessions.get(entry.holders.get(attempt_id, ""))
        if session is not None and session.ended_at is None:
            session.notices.append((kind, entry.rollout.rollout_id, attempt_id))
            self.effects.noticed.add(session.session_id)

    def ask_for_sign(self, session: Session, age: float) -> float:
        """For how long a session has not spoken, in seconds. It is woken: it speaks now, if its process lives."""
        self.effects.noticed.add(session.session_id)
        return age - session.last_heard

    # -- deadlines -----------------------------------------------------------------------------------------------

    def _rollout_deadline(self, rollout_id: str) -> float | None:
        """When the latest attempt of a rollout expires, or its backoff ends."""
        entry = self.entries.get(rollout_id)
        if entry is None or entry.rollout.status not in ACTIVE:
            return self.queues.backs_off_until(rollout_id)
        attempt = entry.latest
        if attempt is None or attempt.status not in ACTIVE:
            return None
        config, clock = entry.rollout.config, entry.clocks[-1]
        deadline = None
        if config.timeout_seconds is not None:
            deadline = clock.start + config.timeout_seconds
        if config.unresponsive_seconds is not None:
            beat = clock.start if clock.beat is None else clock.beat
            silence = beat + config.unresponsive_seconds
            deadline = silence if deadline is None else min(deadline, silence)
        return deadline

    def _group_deadline(self, group_id: str) -> float | None:
        group = self.groups.get(group_id)
        return group.deadline if group is not None and group.is_open and group.rests_since is None else None

    def _claim_deadline(self, key: tuple[str, HandedKey]) -> float | None:
        session = self.sessions.get(key[0])
        if session is None:
            return None
        consumer, number = handed = key[1]
        is_batch = isinstance(number, int)
        since = session.batches.get((consumer, number)) if is_batch else session.claims.get(handed)  # type: ignore[arg-type]
        return None if since is None else since + CLAIM_SECONDS

    def _session_deadline(self, session_id: str) -> float | None:
        session = self.sessions.get(session_id)
        if session is None or session.eternal:
            return None
        if session.ended_at is not None:
            return session.ended_at + SESSION_RECORD_SECONDS
        return session.last_heard + SESSION_SILENCE_SECONDS

    def _patience_deadline(self, key: Patience) -> float | None:
        if key[0]:
            session = self.sessions.get(key[1])
            since = session.reserved_since if session is not None and session.ended_at is None else None
        else:
            since = self.suspects.get(key[1])
        return None if since is None else since + self.settings.suspect_patience_seconds

    def guard_all(self) -> None:
        """Guard every deadline there is, after a replay."""
        self.gather()
        for status in ACTIVE:
            for rollout_id in self.indexes.find(("status", status)):
                self.deadlines.guard(rollout_id)
        self.guard_backoffs()
        self.guard_groups()
        self.guard_sessions()

    def guard_backoffs(self) -> None:
        """Guard the ends of backoffs."""
        for rollout_id in self.queues.backing_off:
            self.deadlines.guard(rollout_id)

    def guard_groups(self) -> None:
        """Guard the deadlines of open groups."""
        for group_id in self.groups.having(OPEN):
            self.group_deadlines.guard(group_id)

    def guard_sessions(self) -> None:
        """Guard the deadlines of sessions, claims, rates, and suspects that wait for a session of their own."""
        for queue in self.gates.limits:
            self.gates.deadlines.guard(queue)
        for rollout_id in self.suspects:
            self.patience_deadlines.guard((False, rollout_id))
        for session in self.sessions.values():
            self.session_deadlines.guard(session.session_id)
            self.patience_deadlines.guard((True, session.session_id))
            handed: list[HandedKey] = [*session.claims, *session.batches]
            for key in handed:
                self.claim_deadlines.guard((session.session_id, key))

    def may_be_due(self, step: Step) -> bool:
        """Whether `expiry.advance` may have something to do; answers quickly, since every operation asks."""
        settings = self.settings
        return (
            self.deadlines.soonest < step.now - self.paused
            or self.group_deadlines.soonest < step.now - self.paused
            or self.claim_deadlines.soonest < step.age
            or self.session_deadlines.soonest < step.age
            or self.patience_deadlines.soonest < step.age
            or self.gates.deadlines.soonest < step.now
            or settings.retention_seconds is not None
            or settings.retention_count is not None
        )

    # -- sums ----------------------------------------------------------------------------------------------------

    @property
    def total_bytes(self) -> int:
        """What counts towards the memory thresholds."""
        if self.settings.spans_only:
            return self.spans.bytes
        return self.spans.bytes + self.payload_bytes + self.resources.bytes + self.groups.bytes
