"""What a client's session knows and decides. Pure: it is given the time, and answers with what is to be done.

Operations leave in the order in which they were posted, in numbered batches, of which few are under way at once. A
batch that gets no answer is sent again under its number, and the store runs it once. An operation that waits is
*parked* at the store; its answer comes later, with a listen call or beside the answers of a batch, and comes again
until the store has heard that it was received. What an answer hands over (claims, or a batch to train on) is
acknowledged once its caller runs again, and given back if there is no caller any more.

A session that the store has ended is *renewed* under another id: it executed nothing of what it had not answered.
When another process of the store answers (a newer *epoch*), calls that were parked in the one before are sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raystore.client.transport import PendingCall, giving_back
from raystore.core.payload import PLAIN, Payload
from raystore.core.resources import FREED
from raystore.core.state import HandedKey
from raystore.core.verbs import CHANGING
from raystore.errors import (
    OutcomeUnknownError,
    OverloadedError,
    ProtocolMismatchError,
    StoreClosedError,
    StoreUnavailableError,
    copy_of,
    from_record,
)
from raystore.wire import frames
from raystore.wire.frames import Packed

BATCH_BYTES = 384 * 1024  #: of a batch, which Ray carries inline
BULK_BYTES = 1024 * 1024  #: of a batch once as much as this waits
BATCH_OPERATIONS = 512
WINDOW = 3  #: batches under way at once: one is on its way, one runs, the answers of one are on their way
WORTH_OPERATIONS = 32  #: another batch leaves beside the first if so many operations wait ...
WORTH_BYTES = 48 * 1024  #: ... or so many bytes: each batch costs two processes a millisecond, whatever it carries

RETRY_SECONDS = 60.0  #: for so long a batch without an answer is sent again
PAUSE_SECONDS = 0.1  #: before a batch is sent again; doubled each time ...
PAUSE_MOST_SECONDS = 2.0  #: ... up to this, so that a claim is asked for before it is withdrawn
LISTEN_RETRY_SECONDS = 0.5  #: after a listen call that got no answer

PENDING_SECONDS = 0.02  #: after which an operation leaves although its loop has not asked for a batch
AWAKE_SECONDS = 0.5  #: after a batch, in which the timer looks at short intervals: waking it with each call costs more
ACKNOWLEDGE_SECONDS = 0.5  #: for so long an acknowledgement waits for operations to leave with
KEEP_ALIVE_SECONDS = 10.0  #: of silence, while no listen call can be parked

FREED_EARLY_KEPT = 1_000  #: versions whose "freed" came before the answer to the call that published them

Version = tuple[str, int]  #: of resources: id and version
_NOTHING = bytes([PLAIN, 0xC0])  # the encoded None


@dataclass(slots=True, eq=False, kw_only=True)
class Operation(PendingCall):
    """One operation, packed, and the place of its answer. The state puts the answer there, and wakes nobody."""

    packed: Packed
    issued: float
    then: Callable[[Any], None] | None = None  # called with the value that answers it, before anybody else has it
    hands: Callable[[dict[str, Any], Any], list[HandedKey]] | None = None  # keys of what its answer hands over
    handed: Sequence[HandedKey] = ()  # ... once it is there
    sent: bool = False
    abandoned: bool = False

    @property
    def changes(self) -> bool:
        """Whether running it twice would be wrong."""
        return self.verb in CHANGING

    def repack(self, now: float, **more: Any) -> None:
        """Pack a call that waits anew: its timeout is what is left of it by now. `more`: further arguments."""
        if self.arguments is None:
            return
        timeout = self.arguments.get("timeout")
        if timeout is not None:
            more["timeout"] = max(self.issued + timeout - now, 0.0)
        if more:
            self.packed = frames.pack_operation(self.verb, self.arguments | more)


@dataclass(slots=True, eq=False)
class Batch:
    """Operations that travel together."""

    session_id: str
    sequence: int
    operations: list[Operation]
    header: list[Any]  # what the actor's `Endpoint.exchange` takes beside the operations
    failing_since: float | None = None
    retries: int = 0

    def has(self, ticket: int) -> bool:
        """Whether the operation with this ticket is in it."""
        return bool(self.operations) and self.operations[0].ticket <= ticket <= self.operations[-1].ticket


class Listen(NamedTuple):
    """A listen call: whose it is, and the tickets of what has been received."""

    session_id: str
    received: list[int]
    epoch: int


class Actions(NamedTuple):
    """What follows from an answer."""

    answered: Sequence[Operation] = ()  #: whose callers are to be woken
    notices: Sequence[Sequence[str]] = ()  #: to be handed to handlers
    lost: Sequence[Sequence[Any]] = ()  #: keys of what was acknowledged too late
    listen: Listen | None = None  #: a call to be parked


class Due(NamedTuple):
    """What the timer has to do now, and when it is to look again; None: when it is woken."""

    batches: list[Batch]
    listen: Listen | None
    at: float | None


class HeldObjects:
    """References to the objects that this process has published, by version of resources.

    Ray frees an object that nobody refers to, and what the store refers to dies with its process. So the publisher
    refers to it as well until the store says that nobody needs it, and tells each new process of the store about it.
    """

    def __init__(self) -> None:
        self._held: dict[Version, tuple[Any, ...]] = {}
        self._freed_early: dict[Version, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, version: Version, references: tuple[Any, ...]) -> None:
        """Refer to the objects of a version that was published, unless they have been freed already."""
        if version not in self._freed_early:
            self._held[version] = references
        self._freed_early.pop(version, None)

    def free(self, versions: Iterable[Sequence[Any]]) -> None:
        """Let go of the objects of versions that nobody needs."""
        for resources_id, number in versions:
            version = (resources_id, int(number))
            if self._held.pop(version, None) is None:
                self._freed_early[version] = None
                if len(self._freed_early) > FREED_EARLY_KEPT:
                    del self._freed_early[next(iter(self._freed_early))]

    def told(self) -> list[tuple[str, int, Payload]]:
        """All of them, as they are told to the store."""
        return [(*version, Payload(_NOTHING, references)) for version, references in self._held.items()]


class SessionState:
    """The session of one client process. Its owner holds a lock around every call, and acts without it."""

    def __init__(
        self,
        store: str,
        epoch: int,
        client: tuple[int, str],
        process: Sequence[Any] | None,
        now: float,
        *,
        make_id: Callable[[], str],
        jitter: Callable[[], float],
    ) -> None:
        self.store = store  # its name, for errors
        self.epoch: int = epoch  # number of the store's process
        self.session_id: str = make_id()
        self.failure: Exception | None = None  # why no operation can succeed any more
        self.is_closing = False
        self.held: HeldObjects = HeldObjects()
        self._client = client  # protocol and version of this side
        self._process = process  # this one, as it is told to the store
        self._make_id = make_id
        self._jitter = jitter  # a factor for each pause, so that a thousand clients do not come back at once
        self._sent_at = now
        # Operations that wait to leave, and the loops that will ask for a batch.
        self._waiting: deque[Operation] = deque()
        self._waiting_bytes = 0
        self._next_ticket = 1
        self._loops: set[Any] = set()
        self._is_listening = False
        self._no_listen_before = now
        self._begin()

    def _begin(self) -> None:
        """Begin with a session of which nothing is known yet, or go on without any."""
        # Batches, and the answers to them.
        self._next_sequence = 1
        self._under_way: dict[int, Batch] = {}
        self._answered = 0  # all batches up to here have their answers
        self._answered_ahead: set[int] = set()  # and these
        self._repeats: list[tuple[float, Batch]] = []  # when to send which batch again
        # Parked calls by ticket, and the listen call for them.
        self._parked: dict[int, Operation] = {}
        self._early: dict[int, list[Any]] = {}  # answers that came before the word that their call is parked
        self._received: dict[int, None] = {}  # tickets of which the store is to hear that their answers are here
        self._noticed = 0  # number of the newest notice, which count downwards
        self._hint = 0  # number of the newest hint whether listening is wanted: answers overtake each other
        self._is_wanted = False
        # What answers handed over: to whom and since when, until the caller runs; then what is to be acknowledged.
        self._arrived: dict[HandedKey, tuple[Operation, float]] = {}
        self._acknowledgements: dict[HandedKey, float] = {}

    # -- operations that leave ---------------------------------------------------------------------------------------

    @property
    def has_pending(self) -> bool:
        """Whether something waits to be sent, or for an answer."""
        return bool(self._waiting or self._under_way)

    def post(self, operation: Operation) -> bool:
        """Take an operation. Whether its loop must ask for a batch; it asks once for all it posts meanwhile.

        Raises `failure`, and `StoreClosedError` while the session closes.
        """
        if self.failure is not None:
            raise copy_of(self.failure)
        if self.is_closing and operation.verb != "close_session":
            raise StoreClosedError(self.store)
        operation.ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting.append(operation)
        self._waiting_bytes += operation.packed.size
        loop = operation.loop
        if loop is None or loop in self._loops:
            return False
        self._loops.add(loop)
        return True

    def next_batch(
        self, now: float, loop: Any = None, *, awake: Collection[Any] = (), is_needed: bool = False
    ) -> Batch | None:
        """The batch that should leave now, if one should.

        Args:
            now: the time.
            loop: the one that asks, if it is one.
            awake: loops that will ask, once their callers have run: what waits for them first leaves then.
            is_needed: whether a batch should leave even without operations, as the window allows.
        """
        self._loops.discard(loop)
        waiting, under_way = self._waiting, len(self._under_way)
        if self.failure is not None or under_way >= WINDOW or (awake and waiting and waiting[0].loop in awake):
            return None
        if under_way:
            is_worth = len(waiting) >= WORTH_OPERATIONS or self._waiting_bytes >= WORTH_BYTES
        else:
            is_worth = bool(waiting)
        if not is_worth and not is_needed:
            return None
        limit = BULK_BYTES if self._waiting_bytes > BULK_BYTES else BATCH_BYTES
        most = len(waiting)
        if most >= 2 * WORTH_OPERATIONS:  # the free places of the window share what waits
            most = min(max(-(-most // (WINDOW - under_way)), WORTH_OPERATIONS), BATCH_OPERATIONS)
        operations: list[Operation] = []
        size = 0
        while waiting and len(operations) < most:
            head = waiting[0]
            # Tickets of a batch count up from its first, so a gap (of one that was dropped) ends it.
            if operations and (size + head.packed.size > limit or head.ticket != operations[-1].ticket + 1):
                break
            waiting.popleft()
            self._waiting_bytes -= head.packed.size
            future = (head.leader or head).future
            if future is not None and future.cancelled():
                continue  # nobody waits for it, and it has not left: it never was
            head.sent = True
            operations.append(head)
            size += head.packed.size
        sequence = self._next_sequence
        self._next_sequence += 1
        first = operations[0].ticket if operations else 0
        header = [*self._client, self.session_id, sequence, self._answered, list(self._answered_ahead), first]
        header += [list(self._acknowledgements), list(self._received)]
        if not self._answered and not self._answered_ahead:  # the store may not know this session yet
            header.append(self._process)
        self._acknowledgements, self._received = {}, {}
        batch = self._under_way[sequence] = Batch(self.session_id, sequence, operations, header)
        self._sent_at = now
        return batch

    def abandon(self, operation: Operation, now: float) -> bool:
        """The caller has gone: an operation that has not left is dropped, a wait is cancelled, a claim given back.

        Returns whether the store is to hear of it.
        """
        operation.abandoned = True
        if not operation.sent:
            if operation in self._waiting:
                self._waiting.remove(operation)
                self._waiting_bytes -= operation.packed.size
        elif keys := [key for key, (claimer, _) in self._arrived.items() if claimer is operation]:
            self._give_back(keys, now)
            return True
        elif operation.ticket in self._parked:
            self._cancel_wait(operation, now)
            return True
        return False

    def hold_again(self, now: float) -> None:
        """Tell the store which objects this process has; it answers with those that nobody needs."""
        if len(self.held):
            self._tell("hold_objects", {"versions": self.held.told()}, now, self.held.free)

    def _put_back(self, operations: Iterable[Operation]) -> None:
        """Let operations that were sent in vain wait again, before all others; everything gets a new ticket."""
        self._waiting = deque([*operations, *self._waiting])
        self._waiting_bytes = sum(operation.packed.size for operation in self._waiting)
        for operation in self._waiting:
            operation.ticket = self._next_ticket
            self._next_ticket += 1

    def _tell(
        self, verb: str, arguments: dict[str, Any], now: float, then: Callable[[Any], None] | None = None
    ) -> None:
        """Post what nobody waits for; a session that has ended, or is about to, gives back everything anyway."""
        if self.failure is None and not self.is_closing:
            self.post(Operation(verb, packed=frames.pack_operation(verb, arguments), issued=now, then=then))

    # -- answers to batches ------------------------------------------------------------------------------------------

    def reply(self, batch: Batch, epoch: int, outcome: int, rest: list[Any], now: float) -> Actions:
        """Take the answer to a batch."""
        if batch.session_id != self.session_id or self.failure is not None:
            return Actions()  # of a session that was renewed: its operations were sent again
        if outcome == frames.REFUSED:
            protocol, version = self._client
            return self.fail(ProtocolMismatchError(f"{version}, protocol {protocol}", rest[0]))
        if outcome == frames.BROKEN:
            error = from_record(*rest[0])
            if isinstance(error, OverloadedError):  # the store takes nothing of this session, for now
                return self._drop(batch, lambda operation: error, now)
            return self.fail(error)  # it came back and could not go on
        if epoch < self.epoch:  # of a process that has been replaced, and does not know it yet
            return self.no_answer(batch, "a process answered that was replaced", now)
        if outcome == frames.ENDED:
            return self.renew(epoch, now)
        replies, later, lost, hint = rest
        pairs = list(zip(batch.operations, replies, strict=True))
        parked_before = self._follow(epoch) if epoch > self.epoch else None
        self._under_way.pop(batch.sequence, None)
        self._answered_ahead.add(batch.sequence)
        while self._answered + 1 in self._answered_ahead:
            self._answered += 1
            self._answered_ahead.discard(self._answered)
        answered: list[Operation] = []
        for operation, reply in pairs:
            if reply[0] == frames.VALUE and operation.then is None and operation.hands is None:
                operation.answer = reply[1]
                answered.append(operation)
            elif reply[0] != frames.PARKED:
                self._take(operation, reply, answered, now)
            elif (early := self._early.pop(operation.ticket, None)) is not None:
                self._take(operation, early, answered, now)
            else:
                self._parked[operation.ticket] = operation
                if operation.abandoned:
                    self._cancel_wait(operation, now)
        if hint[0] > self._hint:
            self._hint, self._is_wanted = hint
        notices = self._receive(later, answered, now) if later else ()
        if parked_before is not None:
            self._resume(parked_before, now)
        listen = None if self._is_listening else self._listen(now)
        return Actions(answered, notices, lost, listen)

    def no_answer(self, batch: Batch, why: str, now: float) -> Actions:
        """A batch has no answer: it may have run. It is sent again with the same identity, for a while."""
        if batch.session_id != self.session_id or self.failure is not None:
            return Actions()
        if batch.failing_since is None:
            batch.failing_since = now
        if now - batch.failing_since > RETRY_SECONDS:
            return self.give_up(batch, f"no answer for {RETRY_SECONDS:g} s. {why}", now)
        pause = min(PAUSE_SECONDS * 2**batch.retries, PAUSE_MOST_SECONDS)
        batch.retries += 1
        self._repeats.append((now + pause * self._jitter(), batch))
        return Actions()

    def give_up(self, batch: Batch, why: str, now: float) -> Actions:
        """Nobody knows what became of a batch."""

        def doubt(operation: Operation) -> Exception:
            kind = OutcomeUnknownError if operation.changes else StoreUnavailableError
            return kind(self.store, why)

        return self._drop(batch, doubt, now)

    def _drop(self, batch: Batch, why: Callable[[Operation], Exception], now: float) -> Actions:
        """Refuse the operations of a batch, which leaves a gap: what follows goes on in another session."""
        operations, batch.operations = batch.operations, []
        for operation in operations:
            operation.error = copy_of(why(operation))
        return Actions([*operations, *self.renew(self.epoch, now).answered])

    def _take(self, operation: Operation, reply: list[Any], answered: list[Operation], now: float) -> None:
        """Take the answer to one operation, at once or later; what it hands over goes back if nobody is there."""
        answered.append(operation)
        if reply[0] == frames.ERROR:
            operation.error = from_record(reply[1], reply[2])
            return
        value = operation.answer = reply[1]
        if operation.then is not None:
            operation.then(value)
        if operation.hands is not None and value and (keys := operation.hands(operation.arguments or {}, value)):
            operation.handed = keys
            if operation.abandoned:
                self._give_back(keys, now)
            else:
                self._arrived.update(dict.fromkeys(keys, (operation, now)))

    # -- answers that come later -------------------------------------------------------------------------------------

    def listened(self, listen: Listen, epoch: int, outcome: int, rest: list[Any], now: float) -> Actions:
        """Take the answer to a listen call."""
        if self.failure is not None:
            return Actions()
        self._is_listening = False
        if listen.session_id != self.session_id:
            return Actions(listen=self._listen(now))
        if outcome == frames.BROKEN:
            return self.fail(from_record(*rest[0]))
        if epoch < self.epoch:
            self._no_listen_before = now + LISTEN_RETRY_SECONDS
            return Actions()
        if outcome == frames.ENDED and self._parked:
            return self.renew(epoch, now)
        if outcome != frames.DONE:
            self._is_wanted = False  # the store knows nothing of this session
            return Actions()
        later, hint = rest
        parked_before = self._follow(epoch) if epoch > self.epoch else None
        if hint[0] > self._hint:
            self._hint, self._is_wanted = hint
        self._is_wanted = self._is_wanted or bool(later)  # for the store is to hear what was received
        answered: list[Operation] = []
        notices = self._receive(later, answered, now)
        if parked_before is not None:
            self._resume(parked_before, now)
        return Actions(answered, notices, listen=self._listen(now))

    def not_listened(self, listen: Listen, now: float) -> None:
        """A listen call has no answer: another one follows in a moment, and says again what was received."""
        self._is_listening = False
        self._no_listen_before = now + LISTEN_RETRY_SECONDS
        if listen.session_id == self.session_id:  # else the same tickets would be other calls
            self._received = dict.fromkeys(listen.received) | self._received

    def _listen(self, now: float) -> Listen | None:
        """The listen call that is to be parked now, if the store holds something for this process."""
        is_possible = not self._is_listening and now >= self._no_listen_before and self.failure is None
        if not is_possible or not (self._is_wanted or self._parked):
            return None
        self._is_listening = True
        received, self._received = self._received, {}
        return Listen(self.session_id, list(received), self.epoch)

    def _receive(self, later: list[Any], answered: list[Operation], now: float) -> list[Sequence[str]]:
        """Take answers of parked calls, and notices; what has come before is only confirmed once more."""
        notices = []
        for ticket, reply in later:
            if ticket in self._received:
                continue
            self._received[ticket] = None
            if reply[0] == frames.NOTICE:
                if ticket >= self._noticed:  # it has come before, and the store will hear so
                    continue
                self._noticed = ticket
                if reply[1] == FREED:
                    self.held.free([reply[2:]])
                else:
                    notices.append(reply[1:])
            elif (operation := self._parked.pop(ticket, None)) is not None:
                self._take(operation, reply, answered, now)
            elif any(batch.has(ticket) for batch in self._under_way.values()):
                self._early[ticket] = reply
        return notices

    def _cancel_wait(self, operation: Operation, now: float) -> None:
        """Nobody waits for a parked call any more; an answer that crosses this still finds it, to be given back."""
        ticket = operation.ticket

        def cancelled(answer: Any) -> None:
            if answer is True:  # nothing will come for it
                self._parked.pop(ticket, None)

        self._tell("cancel_wait", {"of": ticket}, now, cancelled)

    # -- what answers hand over --------------------------------------------------------------------------------------

    def seen(self, keys: Iterable[HandedKey], now: float, *, is_acknowledged: bool = False) -> None:
        """The caller runs and has what it was handed; the store is to hear so, unless it knows already."""
        for key in keys:
            if self._arrived.pop(key, None) is not None and not is_acknowledged:
                self._acknowledgements[key] = now

    def _give_back(self, keys: Iterable[HandedKey], now: float) -> None:
        for key in keys:
            self._arrived.pop(key, None)
            self._acknowledgements.pop(key, None)
            verb, arguments = giving_back(key)
            self._tell(verb, arguments, now)

    # -- time --------------------------------------------------------------------------------------------------------

    def due(self, now: float) -> Due:
        """What is due although no loop comes by: batches to send, a call to park."""
        self._loops = {loop for loop in self._loops if not loop.is_closed()}
        times = []
        if self._arrived:
            self._answer_for_busy_callers(now)
            times.append(now + ACKNOWLEDGE_SECONDS / 2)
        batches = [batch for when, batch in self._repeats if when <= now]
        self._repeats = [(when, batch) for when, batch in self._repeats if when > now]
        times += [when for when, _ in self._repeats]
        for batch in batches:
            batch.header[4:6] = self._answered, list(self._answered_ahead)
            self._sent_at = now
        if self._waiting and self._waiting[0].issued <= now - PENDING_SECONDS:
            batches += iter(lambda: self.next_batch(now), None)
        listen = None if self._is_listening else self._listen(now)
        is_silent = not self._is_listening and (self._is_wanted or bool(self._parked))  # which would end the session
        oldest = min(self._acknowledgements.values(), default=None)
        is_overdue = oldest is not None and oldest <= now - ACKNOWLEDGE_SECONDS
        if is_overdue or (is_silent and self._sent_at <= now - KEEP_ALIVE_SECONDS):
            if (empty := self.next_batch(now, is_needed=True)) is not None:
                batches.append(empty)
        elif oldest is not None:
            times.append(oldest + ACKNOWLEDGE_SECONDS)
        if is_silent:
            times.append(self._sent_at + KEEP_ALIVE_SECONDS)
        if now < self._no_listen_before:
            times.append(self._no_listen_before)
        if self._waiting or self._under_way or self._sent_at > now - AWAKE_SECONDS:
            times.append(now + PENDING_SECONDS)
        return Due(batches, listen, min(times, default=None))

    def _answer_for_busy_callers(self, now: float) -> None:
        """Acknowledge what arrived a while ago, its caller being busy; give back what came for a loop that ended."""
        gone = []
        for key, (operation, since) in list(self._arrived.items()):
            loop = operation.loop  # None: its caller is a thread
            if loop is not None and loop.is_closed():
                gone.append(operation)
            elif since <= now - ACKNOWLEDGE_SECONDS and (loop is None or loop.is_running()):
                self._acknowledgements.setdefault(key, since)
                self._arrived[key] = (operation, float("inf"))
        for operation in gone:
            self.abandon(operation, now)

    # -- another process of the store, another session, the end ------------------------------------------------------

    def _follow(self, epoch: int) -> list[Operation]:
        """Take the epoch of a newer process of the store; returns the calls that were parked in the one before."""
        self.epoch = epoch
        self._hint, self._is_wanted = 0, True  # its hints are numbered from the beginning
        return list(self._parked.values())

    def _resume(self, operations: list[Operation], now: float) -> None:
        """Send calls again that were parked in a process that is no more, unless it had answered them.

        A call that may have been handed work in that process asks for this work first.
        """
        operations = [op for op in operations if op.ticket in self._parked and not op.abandoned]
        for operation in operations:
            del self._parked[operation.ticket]
            operation.repack(now, **({} if operation.hands is None else {"of": operation.ticket}))
        self._put_back(operations)
        self.hold_again(now)

    def renew(self, epoch: int, now: float) -> Actions:
        """The store knows this session no longer: what it cannot have executed is sent in a new one.

        What was sent once was never executed, since an ended session executes nothing. Of what was sent more than
        once, reads run again, and writes have an unknown outcome.
        """
        if self.is_closing:  # the store has let go of all that this session held, which is what was wanted
            return self.fail(StoreClosedError(self.store))
        sent = [(op, batch.retries > 0 and op.changes) for batch in self._under_way.values() for op in batch.operations]
        unknown = [operation for operation, is_unknown in sent if is_unknown]
        for operation in unknown:
            operation.error = OutcomeUnknownError(self.store, "the session ended before the answer came")
        repeated = [*self._parked.values(), *(operation for operation, is_unknown in sent if not is_unknown)]
        repeated = [operation for operation in repeated if not operation.abandoned]
        for operation in repeated:
            operation.repack(now)
        self.epoch = epoch
        self.session_id = self._make_id()
        self._begin()
        self._put_back(repeated)
        self.hold_again(now)
        return Actions(unknown)

    def fail(self, error: Exception) -> Actions:
        """No operation can succeed any more: everybody who waits is told, and everybody who comes."""
        if self.failure is not None:
            return Actions()
        self.failure = error
        operations = [operation for batch in self._under_way.values() for operation in batch.operations]
        operations += [*self._parked.values(), *self._waiting]
        self._waiting.clear()
        self._waiting_bytes = 0
        self._begin()
        self.held = HeldObjects()
        for operation in operations:
            operation.error = copy_of(error)
        return Actions(operations)
