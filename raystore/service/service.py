"""The store at work: the core behind one entry point, with a clock, ids, waiting calls and one timer.

Every operation runs as one short, synchronous step under one lock, so the service may be called from any thread and
event loop; in an actor the lock is never contended. What a step leaves to do (wake waiters, hand out work, evict, set
the timer) is done before the lock is released. All changes of state pass through here as steps.
Not here: decisions (`core`), batches and their order (`inbox`), encoding (`wire`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import secrets
import threading
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from raystore.core import bounds, check, claims, eviction, verbs, wanted, watchdog, workers
from raystore.core.resources import FREED, OBJECT_IDS_WARNED
from raystore.core.state import HandedKey, Session, State, Step
from raystore.core.steps import STEPS
from raystore.core.verbs import CHANGING, VERBS
from raystore.errors import (
    OverloadedError,
    ReadOnlyError,
    SessionEndedError,
    StoreClosedError,
    StoreCorruptError,
    StoreError,
    copy_of,
)
from raystore.journal.objects import JournalObjects
from raystore.journal.opening import Opened
from raystore.journal.recorder import Recorder, Source, local_source
from raystore.journal.span_bodies import Bodies
from raystore.journal.writer import FULL_SECONDS, Log
from raystore.options import StoreConfig, resolve
from raystore.service import reports, shell
from raystore.service.clock import Alarm, Clock, ManualClock
from raystore.service.liveness import Probes
from raystore.service.offers import Offers
from raystore.service.pools import UNSERVED_SECONDS, Pools
from raystore.service.shell import SHELL
from raystore.service.waiters import Deliver, Waiter, Waiters
from raystore.service.watches import Watches

logger = logging.getLogger("raystore.store")

PROTOCOL = 4  #: version of the session protocol; client and store refuse each other when it differs
TICK_SECONDS = 1.0  #: between looks at the clock while there are deadlines, so that a standstill is measured
LATE_SECONDS = 1.0  #: an armed deadline found later than this was a pause of the process


class Service:
    """One store."""

    def __init__(
        self,
        config: StoreConfig,
        *,
        capacity_bytes: int,
        alarm: Callable[[Callable[[], None]], Alarm],
        name: str | None = None,
        opened: Opened | None = None,
        on_failure: Callable[[StoreError], None] | None = None,
    ) -> None:
        """`on_failure` ends the process, for which another one goes on; without it callers are told."""
        self.config = config
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.journal = opened
        self._recorder: Recorder | None = None
        self._bodies: Bodies | None = None
        if opened is None:
            self.state = State(resolve(config, capacity_bytes))
            wanted.introduce(self.state, self.state.settings)
            self.store_id, self.epoch, not_before = secrets.token_hex(8), time.time_ns(), 0.0
        else:
            self.state, self.store_id, self.epoch = opened.state, opened.store_id, opened.epoch
            not_before = opened.not_before
            self._recorder = opened.recorder
            self._bodies = Bodies(opened.directory)
        self.objects: JournalObjects | None = None
        self.state.gather()
        self.keeper = None if opened is None else opened.keeper
        if self.keeper is not None and self._bodies is not None:
            self.keeper.on_done = self._bodies.forget_files
        self.on_failure = on_failure
        self.clock: Clock = (ManualClock if config.clock == "manual" else Clock)(not_before)
        self.waiters = Waiters()
        self.watches = Watches()
        self.pools = Pools()
        self._offers = Offers(self)
        self.operations = 0
        self.actor_calls = 0
        self.spans_lost: Counter[str] = Counter()  # by reason, as runners tell this process
        self.overloads = 0  # what was refused since there was too much of something
        self.last_eviction_seconds = 0.0
        self._eviction_seconds = 0.0  # of the pass that is under way
        self.on_notice: Callable[[str], None] = lambda session_id: None  # wakes the session's listen call
        self.started = time.monotonic()
        self._lock = threading.RLock()
        self._alarm = alarm(self._ring)
        self._seeds = random.Random()  # seeded by the system; ids need to be different, not secret
        self._armed: float | None = None
        self._armed_for: tuple[Any, ...] = ()
        self._failed: StoreError | None = None
        if self._recorder is not None:
            self._watch(self._recorder.log)
        elif opened is not None:
            self._failed = opened.held or ReadOnlyError(str(opened.directory.path))
        self._closed = False
        self._withdrawals_seen = 0
        self.probes = Probes()
        self._object_ids = reports.ObjectIds()
        self._deferred: deque[Callable[[], None]] = deque()
        self._unneeded: deque[list[str]] = deque()  # objects of the journal whose files may go now
        self._afterwards: deque[Callable[[], None]] = deque()
        if opened is not None and self._recorder is not None:
            needed = self.state.resources.addresses
            self.objects = JournalObjects(opened.directory, needed=needed, bound=config.journal_object_bytes)
            self._hold_back_what_is_missing()
        self._wait_in(self.state.queues.lengths())

    def _hold_back_what_is_missing(self) -> None:
        """References of a process before this one lead nowhere; only what the journal keeps can still be had."""
        assert self.objects is not None
        resources = self.state.resources
        for held in resources.all_newest():
            objects = resources.objects_of(held.resources_id, held.version)
            if any(address is None for address, _ in objects):
                why = "the store was started again, and the journal does not keep its objects"
            elif not all(address is not None and self.objects.files.has(address) for address, _ in objects):
                why = "the store was started again, and the file of an object is missing in the journal"
            else:
                continue
            if self.do("hold_back", self.step(), held.resources_id, held.version, why):
                logger.warning(
                    "Resources %s version %d cannot be had: %s. What waits for them is held back until they are "
                    "published again", held.resources_id, held.version, why,
                )  # fmt: skip

    # -- the entry point ---------------------------------------------------------------------------------------------

    def call(self, session: Session, ticket: int, verb: str, arguments: dict[str, Any], deliver: Deliver) -> Any:
        """Run one operation; its answer, or `PARKED` if the answer will come through `deliver`."""
        source = None
        if self._recorder is not None and verb in CHANGING:
            source = local_source(session.session_id, ticket, verb, arguments)
        if self._deferred:
            self._do(self._deferred)
        try:
            with self._lock:
                step = self._begin(session, source)
                try:
                    return self._perform(step, ticket, verb, arguments, deliver)
                finally:
                    self._end()
        finally:
            if self._afterwards:
                self._do(self._afterwards)

    @contextlib.contextmanager
    def slice(
        self, session: Session, source: Source | None = None
    ) -> Iterator[Callable[[int, str, dict[str, Any], Deliver], Any]]:
        """Run several operations of a session, which share one instant and one seed, with nothing in between.

        `source` is what a journal needs to know of operations that change something.
        """
        try:
            with self._lock:
                step = self._begin(session, source)
                try:
                    yield functools.partial(self._perform, step)
                finally:
                    self._end()
        finally:
            if self._afterwards:
                self._do(self._afterwards)

    def _end(self) -> None:
        if self._unneeded:
            self._remove_objects()
        if self._recorder is not None:
            self._recorder.end()
            if self.keeper is not None:
                self.keeper.look(self._recorder, self.state, self.clock.now())
        if len(self.state.resources.object_ids) > OBJECT_IDS_WARNED:
            self._object_ids.warn(len(self.state.resources.object_ids))
        self._arm()

    def _begin(self, session: Session, source: Source | None) -> Step:
        if self._closed:
            raise StoreClosedError(self.name or self.store_id)
        if self._recorder is not None:
            self._recorder.begin(source)
        step = self.step(session)
        if self.waiters.deadlines and self.waiters.are_overdue(step.now):
            self._settle()
        return step

    def _perform(self, step: Step, ticket: int, verb: str, arguments: dict[str, Any], deliver: Deliver) -> Any:
        self.operations += 1
        if self._failed is not None and verb in CHANGING:
            raise copy_of(self._failed)
        state = self.state
        recorder, is_item = self._recorder, False
        if self.clock.is_manual:  # it may have been moved by the operation before
            step = self.step(step.session)
        own = SHELL.get(verb)
        spec = VERBS.get(verb, own)
        try:
            if self._failed is None and watchdog.may_be_due(state, step):
                self._advance(step, verb, arguments)
            is_refused = spec is None or not spec.fits(arguments)
            if recorder is not None:
                recorder.item(step, ticket, verb, arguments, is_refused=is_refused)
                is_item = True
            if spec is None or is_refused:
                raise verbs.refusal(step, spec, verb, arguments)
            if own is None:
                return verbs.perform(state, step, spec, arguments)
            if step.session is not None and step.session.ended_at is not None:
                raise SessionEndedError(step.session.session_id)
            return own.run(self, shell.Asked(step, ticket, deliver), **arguments)
        except StoreError as refusal:  # before anything changed
            self.overloads += isinstance(refusal, OverloadedError)
            raise
        except Exception:
            if verb not in CHANGING:  # a read (or `check`) that fails leaves the state as it was
                raise
            self._fail(verb, arguments, is_item=is_item)
        finally:
            is_news = state.has_news or state.withdrawals != self._withdrawals_seen
            if is_news or state.is_full or self.waiters.by_changes:
                rollout_id = arguments.get("rollout_id")
                self._settle(rollout_id if isinstance(rollout_id, str) else None)

    def defer(self, action: Callable[[], None]) -> None:
        """Do something before the next operation; may be called from anywhere, a garbage collection included."""
        self._deferred.append(action)

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do something once the lock is released, under which this is called: it may use the store."""
        self._afterwards.append(action)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock, and do afterwards what is to be done then."""
        try:
            with self._lock:
                yield
        finally:
            self._do(self._afterwards)

    def _do(self, actions: deque[Callable[[], None]]) -> None:
        """Do what was put off; without the lock."""
        while actions:
            try:
                action = actions.popleft()
            except IndexError:  # another thread was quicker
                return
            action()

    def step(self, session: Session | None = None) -> Step:
        now = self.clock.now()
        if self._armed is not None and now > self._armed + LATE_SECONDS and not self.clock.is_manual:
            self.do("pause", Step(now), now - self._armed)
            logger.warning("The store stood still for %.1f s; deadlines move by as much", now - self._armed)
            self._armed, self._armed_for = None, ()
        age = self.clock.age() if self.clock.is_manual else now
        return Step(now, seed=self._seeds.getrandbits(64), session=session, age=age)

    def _advance(self, step: Step, verb: str = "", arguments: dict[str, Any] | None = None) -> bool:
        """Work off a slice of what is due; whether there was anything."""
        if self.is_disk_full:
            return False  # what is due stays due
        spec = VERBS.get(verb)
        named = spec.rollouts_named(arguments) if spec and arguments else ()
        due = watchdog.due(self.state, step, named)
        if due:
            self.do("advance", step, *due.lists())
        return bool(due)

    def do(self, kind: str, step: Step, *arguments: Any) -> Any:
        """A change that is no operation of a caller."""
        minted, reservations = step.minted, self.state.reservations
        try:
            done = STEPS[kind](self.state, step, *arguments)
        except Exception:
            self._fail(kind, {})
        is_change = done or kind != "hand_over" or self.state.reservations != reservations
        if self._recorder is not None and is_change:
            self._recorder.change(kind, step, minted, arguments)
        return done

    def catch_up(self) -> None:
        """Work off all that is due by now."""
        with self._held():
            while self._failed is None and watchdog.may_be_due(self.state, step := self.step()):
                if not self._advance(step):
                    break

    def advance(self) -> None:
        """Work off what is due by now, and let those who wait have what it brings."""
        self._advance(self.step())
        self._settle()

    def _fail(self, verb: str, arguments: dict[str, Any], *, is_item: bool = False) -> NoReturn:
        """The state can no longer be trusted: take no more changes, and let whoever waits know."""
        rollout_id = arguments.get("rollout_id")
        story = check.story(self.state, rollout_id) if isinstance(rollout_id, str) else []
        failed = StoreCorruptError(verb, "\n".join(story), traceback.format_exc())
        logger.critical("%s", failed)
        self._failed = failed
        if self._recorder is not None and is_item:
            self._recorder.left_out(failed)
        if self._recorder is None or self.on_failure is None:
            self._refuse_waiters(failed)
        else:
            end = self.on_failure  # once it is known what is not to be run again
            if not self._recorder.log.then(self._recorder.log.last, lambda error: end(error or failed)):
                end(failed)
        raise failed

    def _refuse_waiters(self, error: StoreError) -> None:
        for waiter in self.waiters.all():
            self._offers.answer(waiter, copy_of(error))

    def with_bodies(self, items: list[Any]) -> list[Any]:
        """Spans with those bodies that are on disk only; other records as they are."""
        return items if self._bodies is None else self._bodies.load(items)

    @property
    def stands_still(self) -> bool:
        """Whether nothing ever changes here, so that there is nothing to wait for."""
        return isinstance(self._failed, ReadOnlyError)

    @property
    def is_disk_full(self) -> bool:
        """Whether nothing can be written down at the moment."""
        return self._recorder is not None and self._recorder.log.is_full

    # -- durability --------------------------------------------------------------------------------------------------

    def when_safe(self, told: Callable[[StoreError | None], None]) -> bool:
        """Call `told` once everything that has happened so far is as durable as was asked for; False if it is.

        What an answer says must not leave before. `told` gets the error if that will never be; on any thread.
        """
        recorder = self._recorder
        return recorder is not None and recorder.log.then(recorder.position, told)

    def _watch(self, log: Log) -> None:
        """Hear of the end of the journal; one of a store that nobody refers to any more is let go of."""
        failed = weakref.WeakMethod(self._journal_failed)

        def tell(error: StoreError) -> None:
            if (method := failed()) is not None:
                method(error)

        log.watch(tell)
        weakref.finalize(self, log.let_go).atexit = False

    def _journal_failed(self, error: StoreError) -> None:
        """On the writer's thread."""
        if self.on_failure is not None:
            self.on_failure(error)
        with self._lock:
            self._failed = error
            self._refuse_waiters(error)

    # -- after a step ------------------------------------------------------------------------------------------------

    def _settle(self, writing: str | None = None) -> None:
        """Do what a step left to do, and let those who wait have what it brought, until nothing is left."""
        if self._failed is not None:
            return
        state = self.state
        if state.resources.freed:
            self._let_go_of_objects()
        if state.is_full:
            if self._recorder is not None:
                state.spans.written = self._recorder.log.durable
            self._evict(writing)
        while True:
            if state.withdrawals != self._withdrawals_seen:
                self._withdrawals_seen = state.withdrawals
                self._suspend()
            if state.has_surplus:
                self._forget()
            ended, state.ended = state.ended, []
            for session_id in ended:
                self._drop_waiters(session_id)
                self.on_notice(session_id)
            for waiter in self.waiters.expired(self.clock.now()):
                self._offers.answer_expired(waiter)
            if state.finished or state.came_back:
                self._offers.give_finished()
            elif state.queues_touched:
                touched, state.queues_touched = state.queues_touched, set()
                if not self.pools.are_served(touched):
                    self._wait_in(touched)
                for waiter in self.waiters.wanting(touched):
                    if not any(map(state.queues.offers, touched)):
                        break
                    self._offers.offer(waiter)
            else:
                break
        if self.pools.at is not None and self.pools.at <= self.clock.age():
            self._name_unserved()
        self._offers.give_changes()
        noticed, state.noticed = state.noticed, set()
        for session_id in noticed:
            self.on_notice(session_id)

    def _let_go_of_objects(self) -> None:
        """Values were freed: tell who holds their objects, and delete files once that is as durable as they were."""
        state = self.state
        freed, state.resources.freed = state.resources.freed, []
        for one in freed:
            session = state.sessions.get(one.publisher or "")
            if session is not None and session.ended_at is None and not session.eternal:
                session.notices.append((FREED, one.resources_id, str(one.version)))
                state.noticed.add(session.session_id)
        unneeded = [address for one in freed for address in one.addresses]
        if unneeded and self.objects is not None:
            if not self.when_safe(lambda error: None if error is not None else self._unneeded.append(unneeded)):
                self._unneeded.append(unneeded)

    def _remove_objects(self) -> None:
        """Delete files, unless the same object was published again meanwhile."""
        assert self.objects is not None
        needed = self.state.resources.addresses
        while self._unneeded:
            self.objects.remove(address for address in self._unneeded.popleft() if address not in needed)

    def _forget(self) -> None:
        """Let go of records that nobody needs any more, once there are too many of them."""
        state = self.state
        state.has_surplus = False
        if surplus := watchdog.surplus(state):
            self.do("advance", self.step(), *surplus.lists())
        if gone := workers.surplus(state):
            self.do("forget_workers", self.step(), gone)

    def _evict(self, writing: str | None) -> None:
        started = time.perf_counter()
        was_full = self.state.memory_full
        done = eviction.run(self.state, self.step(), writing)
        self._eviction_seconds += time.perf_counter() - started
        if self.state.memory_full != was_full:
            reports.memory_full(self.state)
        if done is not None:
            self.last_eviction_seconds = self._eviction_seconds
            reports.eviction(done, self.last_eviction_seconds)
        if self.state.eviction_pass is None:
            self._eviction_seconds = 0.0

    # -- time --------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Set the timer to the next instant at which something may happen although nobody calls.

        It may ring for nothing: what moves a deadline later, or makes it meaningless, leaves it set.
        """
        if self._soonest() == self._armed_for:
            return
        age_deadline = watchdog.next_age_deadline(self.state)
        ages = [deadline for deadline in (age_deadline, self.probes.at, self.pools.at) if deadline is not None]
        in_seconds = [max(deadline - self.clock.age(), 0.0) for deadline in ages]
        deadline = watchdog.next_deadline(self.state)
        self._armed = None
        if not self.clock.is_manual:
            now = self.clock.now()
            times = [time for time in (deadline, self.waiters.next_deadline()) if time is not None]
            in_seconds += [max(time - now, 0.0) for time in times]
            core = [time for time in (deadline, age_deadline) if time is not None]
            self._armed = min(max(min(core), now), now + TICK_SECONDS) if core else None
            in_seconds += [TICK_SECONDS] if core else []
        if self.state.eviction_pass is not None:
            in_seconds.append(0.0)
        if self.is_disk_full:
            in_seconds = [max(seconds, FULL_SECONDS) for seconds in in_seconds]
        # Deadlines are strict: a hair later, so that the ring finds them passed.
        self._alarm.set(min(in_seconds) + 0.001 if in_seconds else None)
        self._armed_for = self._soonest()  # as it is now that `next_deadline` has looked

    def _soonest(self) -> tuple[Any, ...]:
        """What the alarm depends on: while it stays the same, the alarm may stay."""
        state, waiters = self.state, self.waiters
        return (
            state.deadlines.soonest, state.claim_deadlines.soonest, state.session_deadlines.soonest,
            state.patience_deadlines.soonest, state.paused,
            waiters.next_deadline() if waiters.deadlines else None, self.probes.at, self.pools.at,
            state.eviction_pass and state.eviction_pass.spans,
        )  # fmt: skip

    def _ring(self) -> None:
        with self._held():
            self._armed_for = ()  # it has rung
            if self._closed or self._failed is not None:
                return
            with contextlib.suppress(StoreCorruptError):  # which has been said
                self._advance(self.step())
                self._probe()
                self._settle()
            self._arm()

    # -- sessions ----------------------------------------------------------------------------------------------------

    def open_session(self, session_id: str, *, eternal: bool = False, process: list[Any] | None = None) -> Session:
        """A client process speaks for the first time; it may have said which process it is."""
        with self._held():
            bounds.admit("sessions", claims.live_sessions(self.state), bounds.SESSIONS)
            self.do("open_session", self.step(), session_id, eternal, process)
            self._arm()
            return self.state.sessions[session_id]

    def heard(self, session: Session) -> None:
        """A session spoke: it is alive, and may be handed work."""
        with self._lock:
            session.last_heard = self.clock.age()
            if self.probes.heard(session.session_id):
                for waiter in self.waiters.of_session(session.session_id):
                    if waiter.verb == "dequeue":
                        self._offers.offer(waiter)
                self._settle()
                self._arm()

    def acknowledge(self, session: Session, keys: list[HandedKey]) -> list[HandedKey]:
        """The callers of a session have these claims and batches; returns those that are lost."""
        try:
            with self._lock:
                if self._closed:
                    raise StoreClosedError(self.name or self.store_id)
                lost: list[HandedKey] = self.do("acknowledge", self.step(session), session.session_id, keys)
                if lost or self.state.has_news or self.waiters.by_changes:
                    self._settle()
                self._arm()
                return lost
        finally:
            if self._afterwards:
                self._do(self._afterwards)

    def claims_left(self, session: Session) -> None:
        """The claims of a session leave only now, so that the time in which they are to be acknowledged begins."""
        with self._lock:
            age = self.clock.age()
            for key in session.claims:
                session.claims[key] = age
            for batch, since in session.batches.items():
                session.batches[batch] = None if since is None else age

    def end_session(self, session: Session, *, why: str) -> None:
        """A client process has ended."""
        with self._held():
            self.do("end_session", self.step(), session.session_id, why)
            self._settle()
            self._arm()

    def end_sessions(self, ended: list[tuple[str, str]]) -> None:
        """Client processes are gone, all of them before anything is handed to somebody else; and why each is."""
        with self._held():
            if self._closed or self._failed is not None or self.is_disk_full:
                return
            for session_id, why in ended:
                if self.is_live(session_id):
                    self.do("end_session", self.step(), session_id, why)
            if ended:
                self._settle()
                self._arm()

    def is_live(self, session_id: str) -> bool:
        """Whether a session is known and has not ended."""
        session = self.state.sessions.get(session_id)
        return session is not None and session.ended_at is None

    def is_waiting(self, session_id: str) -> bool:
        """Whether a call of this session is parked."""
        return self.waiters.has_session(session_id)

    def _drop_waiters(self, session_id: str) -> None:
        for waiter in self.waiters.of_session(session_id):
            self.waiters.remove(waiter)
        self.watches.drop_session(session_id)
        self.probes.heard(session_id)
        self._wait_in(self.pools.drop_session(session_id))
        self.refuse_what_never_comes()

    def _wait_in(self, queues: Iterable[str]) -> None:
        """Rollouts may wait in these queues: note those that nobody serves."""
        self.pools.wait_in(filter(self.state.queues.length, queues), self.clock.age())

    def _name_unserved(self) -> None:
        lengths = self.state.queues.lengths()
        for queue in self.pools.to_name(lengths, self.clock.age()):
            reports.unserved(queue, lengths[queue], UNSERVED_SECONDS, self.pools.served)

    def refuse_what_never_comes(self, *parked: Waiter) -> None:
        """Tell those who wait for what only pools would do that cannot work: these calls, or all."""
        if self.pools.have_failed:
            self._offers.refuse_what_never_comes(parked or self.waiters.all(), self.pools)

    def _suspend(self) -> None:
        """A claim was withdrawn: ask those who wait for work whether they live, before handing out more."""
        waiting = (self.state.sessions.get(session_id) for session_id in self.waiters.sessions_wanting_work())
        self.probes.suspend((s.session_id for s in waiting if s is not None and not s.eternal), self.clock.age())
        self._probe()

    def _probe(self) -> None:
        for session_id in self.probes.due(self.clock.age(), is_work_waiting=self.state.queues.are_offering):
            self.on_notice(session_id)

    def close(self) -> None:
        """Answer everybody who waits with what there is, and take no more calls."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for waiter in self.waiters.all():
                self._offers.answer_expired(waiter)
            self._alarm.close()
        if self.keeper is not None:
            self.keeper.close()
        if self._recorder is not None:
            self._recorder.log.close()
        if self._bodies is not None:
            self._bodies.forget_files()

    def info(self) -> dict[str, Any]:
        """Who this store is."""
        return {
            "store_id": self.store_id,
            "name": self.name,
            "epoch": self.epoch,
            "protocol": PROTOCOL,
            "limits": self.config.all_limits(),
            "pid": os.getpid(),
        }
