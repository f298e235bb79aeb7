"""The store at work: the core behind one entry point, with a clock, ids, waiting calls and one timer.

Every operation runs as one short, synchronous step under one lock, so the service may be called from any thread and
event loop; in an actor the lock is never contended. What a step leaves to do (answer parked calls, hand out work,
evict, set the timer) is done before the lock is released. All changes of state pass through here as steps.
Not here: decisions (`core`), batches and their order (`remote.server_session`).
"""

from __future__ import annotations

import contextlib
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
from typing import Annotated, Any, NoReturn

import psutil

from raystore.core import check, claims, expiry, feeds, meters, pauses, retention, training, verbs, workers
from raystore.core.findings import Finding
from raystore.core.meters import Bucket
from raystore.core.queues import NEVER
from raystore.core.resources import FREED, OBJECT_IDS_WARNED, Freed
from raystore.core.schema import Id, LossReason, Positive, Rule, Text, Whole
from raystore.core.state import EvictionPass, HandedKey, Session, State, Step, require_room
from raystore.core.verbs import CHANGING, STEPS, VERBS, Verb
from raystore.errors import (
    InvalidValueError,
    OverloadedError,
    ReadOnlyError,
    SessionEndedError,
    StoreClosedError,
    StoreCorruptError,
    StoreError,
    copy_of,
)
from raystore.journal.compaction import Snapshotter
from raystore.journal.files import JournalObjects
from raystore.journal.opening import Opened
from raystore.journal.recorder import Recorder, Source, local_source
from raystore.journal.span_bodies import SpanBodies
from raystore.journal.writer import FULL_SECONDS, JournalWriter
from raystore.reports.log import a_minute, logger_of, once
from raystore.service import sampling
from raystore.service.clock import Alarm, Clock, ManualClock
from raystore.service.diagnosis.known import Known, journal_of
from raystore.service.diagnosis.why import memory_full, why
from raystore.service.diagnosis.work import unserved
from raystore.service.parking import Caller, Deliver, Parking
from raystore.service.presence import NO_QUEUES, UNSERVED_SECONDS, LivenessChecks, Pools
from raystore.service.sampling import Sampler
from raystore.types.options import StoreConfig, resolve

logger: logging.Logger = logger_of("raystore.store")

PROTOCOL = 5  #: version of the session protocol; client and store refuse each other when it differs
TICK_SECONDS = 1.0  #: between looks at the clock while there are deadlines, so that a standstill is measured
Moment = Annotated[float, Rule("0 <= {v} < 1e12", "a number of seconds, 0 or more")]

LATE_SECONDS = 1.0  #: an armed deadline found later than this was a pause of the process


class Service:
    """One store."""

    store_id: str
    epoch: int

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
        """`on_failure` ends this process, so that another one takes its place; without it, callers get the error."""
        self.config = config
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.journal = opened
        self._recorder: Recorder | None = None
        self._bodies: SpanBodies | None = None
        if opened is None:
            self.state: State = State(resolve(config, capacity_bytes))
            training.introduce(self.state, self.state.settings)
            self.store_id, self.epoch, not_before = secrets.token_hex(8), time.time_ns(), 0.0
        else:
            self.state, self.store_id, self.epoch = opened.state, opened.store_id, opened.epoch
            not_before = opened.not_before
            self._recorder = opened.recorder
            self._bodies = opened.bodies
        self.objects: JournalObjects | None = None
        self.state.gather()
        self.snapshotter: Snapshotter | None = None if opened is None else opened.snapshotter
        self.on_failure = on_failure
        self.clock: Clock = (ManualClock if config.clock == "manual" else Clock)(not_before)
        self.liveness: LivenessChecks = LivenessChecks()
        self.pools: Pools = Pools()
        self.parking: Parking = Parking(
            self.state, step=self.step, do=self.do, clock=self.clock, regain_space=self.regain_space,
            liveness=self.liveness, pools=self.pools,
        )  # fmt: skip
        self.sampler: Sampler = Sampler()
        self.operations: int = 0
        self.actor_calls = 0
        self.spans_lost: Counter[str] = Counter()  # by reason, as runners tell this process
        self.overloads: int = 0  # calls that were refused at a limit
        self.last_eviction_seconds: float = 0.0
        self._eviction_seconds = 0.0  # of the pass that is under way
        self.on_notice: Callable[[str], None] = lambda session_id: None  # wakes the session's listen call
        self.started: float = time.monotonic()
        self._lock = threading.RLock()
        self._alarm = alarm(self._ring)
        self._seeds = random.Random()  # seeded by the system; ids need to be different, not secret
        self._armed: float | None = None
        self._rings_at: float = NEVER  # when the alarm rings, on the clock by which sessions age
        self._rings_not_before: float = 0.0  # whatever is due
        self._failed: StoreError | None = None
        if self._recorder is not None:
            self._watch(self._recorder.writer)
        elif opened is not None:
            self._failed = opened.held or ReadOnlyError(str(opened.directory.path))
        self._closed = False
        #: To be done before the next operation; may be added to from anywhere, a garbage collection included.
        self.deferred: deque[Callable[[], None]] = deque()
        self._unneeded: deque[list[str]] = deque()  # objects of the journal whose files may go now
        #: To be done once the lock is released, under which it is added to: it may use the store.
        self.afterwards: deque[Callable[[], None]] = deque()
        if opened is not None and self._recorder is not None:
            needed = self.state.resources.addresses
            self.objects = JournalObjects(opened.directory, needed=needed, bound=config.journal_object_bytes)
            self._hold_back_what_is_missing()
        self._wait_in(self.state.queues.lengths())

    def _hold_back_what_is_missing(self) -> None:
        """After a restart, hold back the rollouts whose resources refer to objects that the journal does not keep."""
        assert self.objects is not None
        resources = self.state.resources
        newest = [(held.resources_id, held.version) for held in resources.all_newest()]
        for resources_id, version in dict.fromkeys([*newest, *self.state.evaluations.pins()]):
            objects = resources.objects_of(resources_id, version)
            if any(address is None for address, _ in objects):
                why = "the store was started again, and the journal does not keep its objects"
            elif not all(address is not None and self.objects.files.has(address) for address, _ in objects):
                why = "the store was started again, and the file of an object is missing in the journal"
            else:
                continue
            if self.do("hold_back", self.step(), resources_id, version, why):
                logger.warning(
                    "Resources %s version %d cannot be had: %s. What waits for them is held back until they are "
                    "published again", resources_id, version, why,
                )  # fmt: skip

    # -- the entry point ---------------------------------------------------------------------------------------------

    def call(self, session: Session, ticket: int, verb: str, arguments: dict[str, Any], deliver: Deliver) -> Any:
        """Run one operation; its answer, or `PARKED` if the answer will come through `deliver`."""
        step = self.begin(session, self.source_of(session, ticket, verb, arguments) if self._recorder else None)
        try:
            return self.perform(step, ticket, verb, arguments, deliver)
        finally:
            self.end()

    def source_of(self, session: Session, ticket: int, verb: str, arguments: dict[str, Any]) -> Source | None:
        """What a journal needs to know of an operation that comes alone, if it may change something."""
        is_recorded = self._recorder is not None and verb in CHANGING
        return local_source(session.session_id, ticket, verb, arguments) if is_recorded else None

    def begin(self, session: Session, source: Source | None = None) -> Step:
        """Take the lock for operations of a session (`perform`), which share one instant and one seed; then `end`.

        `source` is what a journal needs to know of operations that change something.
        """
        if self.deferred:
            self._do(self.deferred)
        self._lock.acquire()
        try:
            if self._closed:
                raise StoreClosedError(self.name or self.store_id)
            if self._recorder is not None:
                self._recorder.begin(source)
            step = self.step(session)
            session.last_heard = step.age
            if self.liveness.suspended:
                self._spoke(session)
            if self.parking.timed and self.parking.are_overdue(step.now):
                self._settle()
            return step
        except BaseException:
            self._lock.release()
            raise

    def end(self) -> None:
        """Do what is left to do, release the lock, and do what was put off until then."""
        try:
            if self._unneeded:
                self._remove_objects()
            if self._recorder is not None:
                self._recorder.flush()
                if self.snapshotter is not None:
                    self.snapshotter.after_step(self._recorder, self.state, self.clock.now())
            state, rings_at = self.state, self._rings_at
            if len(state.resources.object_ids) > OBJECT_IDS_WARNED:
                self._warn_of_object_ids()
            if self._rings_not_before < rings_at and (
                state.claim_deadlines.soonest < rings_at
                or state.session_deadlines.soonest < rings_at
                or state.patience_deadlines.soonest < rings_at
                or (self.liveness.at is not None and self.liveness.at < rings_at)
                or (self.pools.at is not None and self.pools.at < rings_at)
                or (self.sampler.at is not None and self.sampler.at < rings_at)
                or state.eviction_pass is not None
                or (
                    not self.clock.is_manual  # else these wait for a tick
                    and (
                        state.deadlines.soonest + state.paused < rings_at
                        or state.group_deadlines.soonest + state.paused < rings_at
                        or state.gates.deadlines.soonest < rings_at
                        or (self.parking.timed and (self.parking.next_deadline() or NEVER) < rings_at)
                    )
                )
            ):
                self._arm()
        finally:
            self._lock.release()
            if self.afterwards:
                self._do(self.afterwards)

    def perform(self, step: Step, ticket: int, verb: str, arguments: dict[str, Any], deliver: Deliver) -> Any:
        """Run one operation of those that `begin` began; its answer, or `PARKED`. Raises what refuses it."""
        self.operations += 1
        if self._failed is not None and verb in CHANGING:
            raise copy_of(self._failed)
        state, session = self.state, step.session
        recorder, is_item = self._recorder, False
        if self.clock.is_manual:  # it may have been moved by the operation before
            step = self.step(session)
        spec = VERBS.get(verb) or PROCESS_VERBS.get(verb)
        try:
            if self._failed is None and state.may_be_due(step):
                self._advance(step, verb, arguments)
            is_refused = spec is None or not spec.fits(arguments)
            if recorder is not None:
                recorder.item(step, ticket, verb, arguments, is_refused=is_refused)
                is_item = True
            if spec is None or is_refused:
                raise verbs.refusal(step, spec, verb, arguments)
            if session is not None and session.ended_at is not None:  # by an operation before it in the same batch
                raise SessionEndedError(session.session_id)
            if verb in PROCESS_VERBS:
                return spec.run(self, Caller(step, ticket, deliver), **arguments)
            if spec.serves and session is not None:
                queues = arguments[spec.serves]
                if not self.pools.asked_by.get(session.session_id, NO_QUEUES).issuperset(queues):
                    self.pools.asked(session.session_id, queues)
            if arguments.get("chain") is None:
                answer = spec.run(state, step, **arguments)
                if state.moved_members or state.moved_feeds:
                    feeds.settle(state, step)
            else:
                answer = verbs.perform(state, step, spec, arguments)
            if answer is not None or spec.waits_for is None:
                return answer
            stands_still = isinstance(self._failed, ReadOnlyError)  # so that there is nothing to wait for
            park = self.parking.answer_of if stands_still else self.parking.park
            if self.sampler.at is None and not stands_still:
                self.sampler.begin(step.age)
            return park(Caller(step, ticket, deliver), spec.waits_for, arguments)
        except StoreError as refusal:  # before anything changed
            self.overloads += isinstance(refusal, OverloadedError)
            raise
        except Exception:
            if verb not in CHANGING:  # a read (or `check`) that fails leaves the state as it was
                raise
            self._fail(verb, arguments, is_item=is_item)
        finally:
            if not state.is_quiet or "changes" in self.parking.by_kind:
                rollout_id = arguments.get("rollout_id")
                self._settle(rollout_id if isinstance(rollout_id, str) else None)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock, and do afterwards what is to be done then."""
        try:
            with self._lock:
                yield
        finally:
            self._do(self.afterwards)

    def _do(self, actions: deque[Callable[[], None]]) -> None:
        """Do what was put off; without the lock."""
        while actions:
            try:
                action = actions.popleft()
            except IndexError:  # another thread was quicker
                return
            action()

    def step(self, session: Session | None = None) -> Step:
        clock = self.clock
        now = clock.now() if clock.is_manual else time.monotonic() + clock.offset
        if self._armed is not None and now > self._armed + LATE_SECONDS and not clock.is_manual:
            self.do("pause", Step(now, now), now - self._armed)
            logger.warning(
                "The store stood still for %.1f s; deadlines move by as much", now - self._armed,
                extra=a_minute("stood still", self.store_id),
            )  # fmt: skip
            self._armed, self._rings_at = None, NEVER
        return Step(now, clock.age() if clock.is_manual else now, self._seeds.getrandbits(64), session)

    def _advance(self, step: Step, verb: str = "", arguments: dict[str, Any] | None = None) -> bool:
        """Work off a slice of what is due; whether there was anything."""
        if not self.regain_space():
            return False  # what is due stays due
        spec = VERBS.get(verb)
        named = spec.rollouts_named(arguments) if spec and arguments else ()
        due = expiry.due(self.state, step, named)
        if due:
            self.do("advance", step, *due.lists())
        return bool(due)

    def do(self, kind: str, step: Step, *arguments: Any) -> Any:
        """Run and record a step (`core.verbs.STEPS`): a change that is no operation of a caller."""
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
            while self._failed is None and self.state.may_be_due(step := self.step()):
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
            self.parking.refuse(failed)
        else:
            end = self.on_failure  # once it is known what is not to be run again
            if not self._recorder.writer.when_durable(self._recorder.writer.last, lambda error: end(error or failed)):
                end(failed)
        raise failed

    def with_bodies(self, items: list[Any]) -> list[Any]:
        """Spans with those bodies that are on disk only; other records as they are."""
        return items if self._bodies is None else self._bodies.load(items)

    def regain_space(self) -> bool:
        """Allocate space for the journal again if its disk was full; whether changes can be written down."""
        return self._recorder is None or self._recorder.writer.regain_space()

    # -- durability --------------------------------------------------------------------------------------------------

    def when_safe(self, told: Callable[[StoreError | None], None]) -> bool:
        """Call `told` once everything that has happened so far is as durable as was asked for; False if it is.

        What an answer says must not leave before. `told` gets the error if that will never be; on any thread.
        """
        recorder = self._recorder
        return recorder is not None and recorder.writer.when_durable(recorder.position, told)

    def _watch(self, writer: JournalWriter) -> None:
        """Learn of a failure of the journal; close the journal when this service is garbage collected."""
        failed = weakref.WeakMethod(self._journal_failed)

        def tell(error: StoreError) -> None:
            if (method := failed()) is not None:
                method(error)

        writer.when_failed(tell)
        weakref.finalize(self, writer.close_soon).atexit = False

    def _journal_failed(self, error: StoreError) -> None:
        """On the writer's thread."""
        if self.on_failure is not None:
            self.on_failure(error)
        with self._lock:
            self._failed = error
            self.parking.refuse(error)

    # -- after a step ------------------------------------------------------------------------------------------------

    def _settle(self, writing: str | None = None) -> None:
        """Do what a step left to do, and let those who wait have what it brought, until nothing is left."""
        if self._failed is not None:
            return
        state = self.state
        if state.is_full:
            if self._recorder is not None:
                state.spans.written = self._recorder.writer.durable
            self._evict(writing)
        noticed: set[str] = set()
        while True:
            effects = state.take_effects()
            for said in effects.said:
                logger.info("%s", said)
            if effects.freed:
                self._let_go_of_objects(effects.freed)
            if effects.has_withdrawn:
                self._suspend()
            if effects.has_surplus:
                self._forget()
            for session_id in effects.ended:
                self._forget_session(session_id)
                self.on_notice(session_id)
            if self.parking.timed:
                self.parking.expire(self.clock.now())
            if self.parking.by_kind and (effects.finished or effects.has_batches):
                self.parking.finished(effects.finished)
            if effects.feeds and self.parking.by_kind:
                self.parking.feeds_changed(effects.feeds)
            if effects.queues:
                if not effects.queues <= self.pools.servers.keys():
                    self._wait_in(effects.queues)
                self.parking.work_came(effects.queues)
            noticed |= effects.noticed
            has_acted = effects.freed or effects.has_withdrawn or effects.has_surplus or effects.ended
            if not (has_acted or self.parking.by_kind) or not state.effects:
                break
        if self.pools.at is not None and self.pools.at <= self.clock.age():
            self._name_unserved()
        if "changes" in self.parking.by_kind:
            self.parking.changed()
        for session_id in noticed:
            self.on_notice(session_id)

    def _let_go_of_objects(self, freed: list[Freed]) -> None:
        """Values were freed: notify the processes that hold their objects; delete files once the change is durable."""
        for one in freed:
            session = self.state.sessions.get(one.publisher or "")
            if session is not None and session.ended_at is None and not session.eternal:
                session.notices.append((FREED, one.resources_id, str(one.version)))
                self.state.effects.noticed.add(session.session_id)
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
        if surplus := expiry.surplus(state):
            self.do("advance", self.step(), *surplus.lists())
        if gone := workers.surplus(state):
            self.do("forget_workers", self.step(), gone)

    def _evict(self, writing: str | None) -> None:
        started = time.perf_counter()
        was_full = self.state.memory_full
        done = retention.relieve_memory(self.state, self.step(), writing)
        self._eviction_seconds += time.perf_counter() - started
        if self.state.memory_full != was_full:
            self._log_memory()
        if done is not None:
            self.last_eviction_seconds = self._eviction_seconds
            self._log_eviction(done)
        if self.state.eviction_pass is None:
            self._eviction_seconds = 0.0

    # -- time --------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Set the timer to the next instant at which something may happen although nobody calls.

        It may ring for nothing: what moves a deadline later, or makes it meaningless, leaves it set.
        """
        state, is_manual = self.state, self.clock.is_manual
        age = self.clock.age()
        age_deadline = expiry.next_age_deadline(state)
        of_process = (self.liveness.at, self.pools.at, self.sampler.at)
        ages = [deadline for deadline in (age_deadline, *of_process) if deadline is not None]
        in_seconds = [max(deadline - age, 0.0) for deadline in ages]
        deadline = expiry.next_deadline(state)
        self._armed = None
        if not is_manual:
            now = self.clock.now()
            soonest = (deadline, self.parking.next_deadline(), state.gates.deadlines.next())
            times = [time for time in soonest if time is not None]
            in_seconds += [max(time - now, 0.0) for time in times]
            core = [time for time in (deadline, age_deadline) if time is not None]
            self._armed = min(max(min(core), now), now + TICK_SECONDS) if core else None
            in_seconds += [TICK_SECONDS] if core else []
        if state.eviction_pass is not None:
            in_seconds.append(0.0)
        least = 0.0 if self.regain_space() else FULL_SECONDS  # else nothing could be written down sooner
        seconds = max(min(in_seconds, default=NEVER), least)
        if not in_seconds and self._rings_at == NEVER:  # it is not set, and there is nothing to set it for
            return
        self._rings_at, self._rings_not_before = age + seconds, age + least
        # Deadlines are strict: a hair later, so that the ring finds them passed.
        self._alarm.set(seconds + 0.001 if in_seconds else None)

    def _ring(self) -> None:
        with self._held():
            self._rings_at = NEVER  # it has rung
            if self._closed or self._failed is not None:
                return
            with contextlib.suppress(StoreCorruptError):  # which has been said
                self._advance(self.step())
                self._probe()
                self._settle()
            self._sample()
            self._arm()

    # -- sessions ----------------------------------------------------------------------------------------------------

    def open_session(self, session_id: str, *, eternal: bool = False, process: list[Any] | None = None) -> Session:
        """A client process speaks for the first time; it may have said which process it is."""
        with self._held():
            require_room("sessions", claims.live_sessions(self.state), claims.SESSIONS)
            self.do("open_session", self.step(), session_id, eternal, process)
            self._arm()
            return self.state.sessions[session_id]

    def heard(self, session: Session) -> None:
        """A session spoke without an operation: it is alive, and may be handed work."""
        with self._lock:
            session.last_heard = self.clock.age()
            if self.liveness.suspended:
                self._spoke(session)

    def _spoke(self, session: Session) -> None:
        if self.liveness.spoke(session.session_id):
            self.parking.session_spoke(session.session_id)
            self._settle()
            self._arm()

    def acknowledge(self, session: Session, keys: list[HandedKey]) -> list[HandedKey]:
        """The callers of a session have these claims and batches; returns those that are lost."""
        step = self.begin(session)
        try:
            lost: list[HandedKey] = self.do("acknowledge", step, session.session_id, keys)
            if lost or not self.state.is_quiet or "changes" in self.parking.by_kind:
                self._settle()
            return lost
        finally:
            self.end()

    def claims_left(self, session: Session) -> None:
        """Start the time to acknowledge the claims of a session anew: the answer with them leaves only now."""
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
            if self._closed or self._failed is not None or not self.regain_space():
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

    def _forget_session(self, session_id: str) -> None:
        self.parking.drop_session(session_id)
        self.state.watched.drop_session(session_id)
        self.liveness.spoke(session_id)
        self._wait_in(self.pools.drop_session(session_id))
        self.parking.pools_changed()

    def _wait_in(self, queues: Iterable[str]) -> None:
        """Rollouts may wait in these queues: note those that nobody serves."""
        self.pools.wait_in(filter(self.state.queues.length, queues), self.clock.age())

    def _name_unserved(self) -> None:
        lengths = self.state.queues.lengths()
        for queue in self.pools.to_name(lengths, self.clock.age()):
            found = unserved(self.pools, queue, lengths[queue], UNSERVED_SECONDS)
            logger.warning("%s %s", found.text, found.remedy)

    def _suspend(self) -> None:
        """A claim was withdrawn: ask those who wait for work whether they live, before handing out more."""
        waiting = (self.state.sessions.get(session_id) for session_id in self.parking.sessions_wanting_work())
        self.liveness.suspend((s.session_id for s in waiting if s is not None and not s.eternal), self.clock.age())
        self._probe()

    def _probe(self) -> None:
        for session_id in self.liveness.due(self.clock.age(), is_work_waiting=self.state.queues.are_offering):
            self.on_notice(session_id)

    def _sample(self) -> None:
        behind = 0.0 if self._recorder is None else self._recorder.writer.behind_seconds
        now, age = self.clock.now(), self.clock.age()
        self.sampler.look(now, age, self.state, self.parking, is_behind=behind > sampling.LATE_SECONDS)

    # -- verbs of the process ----------------------------------------------------------------------------------------

    def _cancel_wait(self, caller: Caller, *, of: int) -> bool:
        return self.parking.cancel(caller.session_id, of)

    def _report_pool(
        self, caller: Caller, *, pool_id: Id, queues: list[Id], failures: Whole, error: Text | None
    ) -> None:
        """The runners of a pool fail before they are ready, or (without an error) one is ready."""
        self.pools.report(pool_id, caller.session_id, queues, failures, error)
        self.parking.pools_changed()

    def _report_spans_lost(self, caller: Caller, *, counts: dict[LossReason, Positive]) -> None:
        """What a runner has counted of lost spans since its last report."""
        self.spans_lost.update(counts)

    def _statistics(self, caller: Caller) -> dict[str, Any]:
        return check.counts(self.state) | {
            **pauses.describe(self.state, caller.step.now),
            "uptime": time.monotonic() - self.started,
            "memory_capacity_bytes": self.capacity_bytes,
            "waiters": len(self.parking),
            "operations": self.operations,
            "actor_calls": self.actor_calls,
            "overloads": self.overloads,
            "unserved_queues": self.pools.unserved(self.state.queues.lengths(), self.clock.age()),
            "spans_lost": dict(self.spans_lost),
            "last_eviction_seconds": self.last_eviction_seconds,
            "cpu_seconds": time.process_time(),
            "rss_bytes": psutil.Process().memory_info().rss,
            "journal": self.snapshotter.statistics() if self.snapshotter is not None else None,
        }

    def figures(self, seconds: float) -> tuple[dict[str, Any], dict[str, Any], list[Bucket]]:
        """Statistics, the metrics of the last seconds, and their buckets; for who exports them."""
        with self._lock:
            caller = Caller(self.step(), 0, lambda ticket, answer: False)
            metrics = self._metrics(caller, seconds=seconds, versions=0)
            return self._statistics(caller), metrics, self.state.meters.since(caller.step.now - seconds)

    def _metrics(self, caller: Caller, *, seconds: Moment, versions: Whole) -> dict[str, Any]:
        state, now = self.state, caller.step.now
        buckets = state.meters.since(now - seconds)
        newest = list(state.meters.versions.items())[-versions:] if versions else []
        writer = None if self._recorder is None else self._recorder.writer
        return {
            "time": now,
            "seconds": seconds,
            "bucket_seconds": meters.BUCKET_SECONDS,
            "total": meters.totals(buckets),
            "buckets": [bucket.describe() for bucket in buckets],
            "rewards": [
                {"resources_id": resources_id, "version": version, "mode": mode, **moments.summary()}
                for (resources_id, version, mode), moments in newest
            ],
            **sampling.described(self.sampler.since(now - seconds)),
            "memory": {
                "spans": state.spans.bytes,
                "values": state.payload_bytes,
                "resources": state.resources.bytes,
                "groups": state.groups.bytes,
                "total": state.total_bytes,
                "eviction_threshold": state.settings.eviction_bytes,
                "safe_threshold": state.settings.safe_bytes,
                "capacity": self.capacity_bytes,
            },
            "journal_lag_seconds": None if writer is None else writer.behind_seconds,
            "operations": self.operations,
            "actor_calls": self.actor_calls,
        }

    def _story(self, caller: Caller, *, rollout_id: Id) -> list[str]:
        story = check.story(self.state, rollout_id)
        if rollout_id in self.state.queues:
            story += [finding.text for finding in self.why(rollout_id=rollout_id)]
        return story

    def _why(self, caller: Caller, *, rollout_id: Id | None, group_id: Id | None, consumer: Id | None) -> list[Finding]:
        return self.why(rollout_id=rollout_id, group_id=group_id, consumer=consumer)

    def why(self, **whose: str | None) -> list[Finding]:
        """What keeps work from going on, the binding constraint first; see `diagnosis`."""
        return why(self.state, self._known(), **whose)

    def _known(self) -> Known:
        parked, writer = self.parking.by_kind, None if self._recorder is None else self._recorder.writer
        if self.journal is not None and writer is None:  # time stands still at the end of the journal
            return Known(self.journal.not_before, self.journal.not_before, failed=self._failed)
        return Known(
            now=self.clock.now(),
            age=self.clock.age(),
            pools=self.pools,
            idle=len(parked.get("work", ())),
            suspended=len(self.liveness.suspended),
            asking=frozenset(call.arguments["consumer"] for call in parked.get("batch", {}).values()),
            journal=None if writer is None else journal_of(writer),
            failed=self._failed,
        )

    def _check(self, caller: Caller) -> None:
        check.check(self.state)

    def _tick(self, caller: Caller, *, seconds: Moment, sessions: bool) -> None:
        if not isinstance(self.clock, ManualClock):
            raise InvalidValueError("clock", self.config.clock, "a store started with clock='manual'")
        self.clock.tick(seconds, sessions=sessions)
        self._rings_at = NEVER  # what it was set for may be due earlier now
        self.advance()

    # -- what the log is told ----------------------------------------------------------------------------------------

    def _log_eviction(self, done: EvictionPass) -> None:
        """One line for each pass; a warning if finished rollouts lost spans that nobody had read."""
        level = logging.WARNING if done.unread else logging.INFO
        unread = f"; {len(done.unread)} finished rollouts had not been read: {done.unread[:3]}" if done.unread else ""
        logger.log(
            level, "Evicted %d spans (%d bytes) of %d rollouts in %.4f s%s",
            done.spans, done.bytes, len(done.rollout_ids), self.last_eviction_seconds, unread,
            extra=a_minute("evicted", self.store_id) if done.unread else None,
        )  # fmt: skip

    def _log_memory(self) -> None:
        """Once for each pause: who is in the way, and what helps."""
        state = self.state
        if not state.memory_full:
            logger.info("Hands out work again: %d bytes are in use", state.total_bytes)
            return
        found = memory_full(state)
        logger.warning("%s %s", found.text, found.remedy)

    def _warn_of_object_ids(self) -> None:
        """Many ids hold objects: likely a leak of weights. Said once."""
        logger.warning(
            "%d resources ids hold objects, and none of them is freed while its id stays. Publish new weights with "
            "update_resources() under one id, or start the store with keep_resources=N (told once)",
            len(self.state.resources.object_ids), extra=once("object ids", self.store_id),
        )  # fmt: skip

    def close(self) -> None:
        """Answer everybody who waits with what there is, and take no more calls."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.parking.close()
            self._alarm.close()
        if self.snapshotter is not None:
            self.snapshotter.close()
        if self._recorder is not None:
            self._recorder.writer.close()
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


#: Verbs about the process of the store, which change nothing that a journal keeps.
PROCESS_VERBS: dict[str, Verb] = {
    "cancel_wait": Verb(Service._cancel_wait, changes=False),
    "report_pool": Verb(Service._report_pool, changes=False),
    "report_spans_lost": Verb(Service._report_spans_lost, changes=False),
    "statistics": Verb(Service._statistics, changes=False),
    "metrics": Verb(Service._metrics, changes=False),
    "story": Verb(Service._story, changes=False),
    "why": Verb(Service._why, changes=False),
    "check": Verb(Service._check, changes=False),
    "tick": Verb(Service._tick, changes=False),
}
