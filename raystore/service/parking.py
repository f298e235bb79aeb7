"""Calls that wait: each is parked until there is something for it or its time is over, and is answered exactly once.

A verb that has nothing for its caller answers None; its call is parked here under what it waits for. After each step
the service says what happened, and only the calls concerned are tried again: nothing is polled.
Not here: how an answer reaches its caller (`ParkedCall.deliver`, from the transport).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from operator import attrgetter
from typing import Any

from raystore.core import evaluations, feeds, rollouts, training
from raystore.core.queues import LazyHeap
from raystore.core.state import Pair, Session, State, Step, require_room
from raystore.core.verbs import WaitsFor
from raystore.errors import StoreError, copy_of
from raystore.service.clock import Clock
from raystore.service.presence import LivenessChecks, Pools

WAITERS = 100_000  #: calls that wait, at most
FOR_EVER_SECONDS = 1e9  #: a call with a longer timeout waits without a limit
#: Kinds of calls that wait for runners: they are refused if only pools that cannot work serve their queues.
_NEEDS_RUNNERS = frozenset({"rollouts", "batch", "completions", "evaluation"})

PARKED: Any = object()  #: answer of a call that waits; the real one goes to its `deliver`

#: Gives an answer to the caller with this ticket; False if it is gone, so that what was handed to it can be taken back.
Deliver = Callable[[int, Any], bool]


@dataclass(slots=True)
class Caller:
    """Who asks, and how to answer later."""

    step: Step
    ticket: int
    deliver: Deliver

    @property
    def session_id(self) -> str:
        """The session that asks."""
        assert self.step.session is not None
        return self.step.session.session_id


@dataclass(slots=True, eq=False)
class ParkedCall:
    """One call that waits."""

    number: int
    session_id: str
    ticket: int
    waits_for: WaitsFor
    arguments: dict[str, Any]
    deadline: float | None  # on the store's clock
    deliver: Deliver
    missing: set[str]  # rollouts that it waits for
    cursor: int | None = None  # behind what it has seen, of completions or changes
    among: frozenset[str] | None = None  # the only rollouts whose completion it waits for


_Calls = dict[int, ParkedCall]  # by number, so the longest waiting first


class Parking:
    """The parked calls of one store."""

    def __init__(
        self,
        state: State,
        *,
        step: Callable[[Session | None], Step],
        do: Callable[..., Any],
        clock: Clock,
        regain_space: Callable[[], bool],
        liveness: LivenessChecks,
        pools: Pools,
    ) -> None:
        """`step` begins a step, `do` runs and records it; nothing is changed while `regain_space` returns False."""
        self._state, self._step, self._do, self._clock = state, step, do, clock
        self._regain_space, self._liveness, self._pools = regain_space, liveness, pools
        self._made = 0
        self._all: _Calls = {}
        self._by_ticket: dict[tuple[str, int], ParkedCall] = {}
        self._by_session: dict[str, _Calls] = {}
        self._by_rollout: dict[str, _Calls] = {}
        self._by_queue: dict[str, _Calls] = {}
        self.by_kind: dict[str, _Calls] = {}  #: by what they wait for
        self._deadlines: LazyHeap[int, float] = LazyHeap()  # of calls by number
        self.timed: int = 0  #: how many calls have a deadline

    def __len__(self) -> int:
        return len(self._all)

    # -- coming and going --------------------------------------------------------------------------------------------

    def park(self, caller: Caller, waits_for: WaitsFor, arguments: dict[str, Any]) -> Any:
        """Park the call of a verb that answered None; raises `StoreOverloadedError` if too many wait."""
        require_room("calls that wait", len(self._all), WAITERS)
        call = self._call(caller, waits_for, arguments)
        self._all[call.number] = call
        self._by_ticket[call.session_id, call.ticket] = call
        for calls, key in self._places(call):
            calls.setdefault(key, {})[call.number] = call
        if call.deadline is not None:
            self._deadlines.put(call.number, call.deadline)
            self.timed += 1
        if self._pools.have_failed:
            self._refuse_without_runners([call])
        return PARKED

    def _call(self, caller: Caller, waits_for: WaitsFor, arguments: dict[str, Any]) -> ParkedCall:
        timeout = arguments["timeout"]
        deadline = None if timeout is None or timeout > FOR_EVER_SECONDS else caller.step.now + timeout
        self._made += 1
        call = ParkedCall(
            self._made, caller.session_id, caller.ticket, waits_for, arguments, deadline, caller.deliver, set()
        )
        if waits_for == "rollouts":
            call.missing.update(rollouts.unfinished_among(self._state, arguments["rollout_ids"]))
        elif waits_for == "completions":
            call.cursor, call.among = arguments["cursor"], self._state.watched.find(arguments.get("among"))
            self._completed(call)
        elif waits_for == "changes":
            call.cursor = arguments["cursor"]
            self._changed(call)
        return call

    def _places(self, call: ParkedCall) -> Iterator[tuple[dict[str, _Calls], str]]:
        yield self.by_kind, call.waits_for
        yield self._by_session, call.session_id
        for queue in call.arguments["queues"] if call.waits_for == "work" else ():
            yield self._by_queue, queue
        for rollout_id in call.missing:
            yield self._by_rollout, rollout_id

    def _remove(self, call: ParkedCall) -> None:
        del self._all[call.number]
        del self._by_ticket[call.session_id, call.ticket]
        if call.deadline is not None:
            self._deadlines.pop(call.number, None)
            self.timed -= 1
        for calls, key in self._places(call):
            if (there := calls.get(key)) is not None:
                there.pop(call.number, None)
                if not there:
                    del calls[key]

    def _answer(self, call: ParkedCall, value: Any) -> bool:
        """Give a call its answer; whether its caller is there."""
        self._remove(call)
        return call.deliver(call.ticket, value)

    def cancel(self, session_id: str, ticket: int) -> bool:
        """The caller waits no longer; whether its call was still parked."""
        call = self._by_ticket.get((session_id, ticket))
        if call is not None:
            self._remove(call)
        return call is not None

    def drop_session(self, session_id: str) -> None:
        """A process has ended: nobody is there to be answered."""
        for call in self._of_session(session_id):
            self._remove(call)

    def close(self) -> None:
        """Answer all calls with what there is."""
        for call in list(self._all.values()):
            self._give_what_there_is(call)

    def refuse(self, error: StoreError) -> None:
        """Answer all calls with an error."""
        for call in list(self._all.values()):
            self._answer(call, copy_of(error))

    def _of_session(self, session_id: str) -> list[ParkedCall]:
        return list(self._by_session.get(session_id, {}).values())

    def _of_kind(self, waits_for: WaitsFor) -> list[ParkedCall]:
        return list(self.by_kind.get(waits_for, {}).values())

    def has_session(self, session_id: str) -> bool:
        """Whether a call of a session is parked."""
        return session_id in self._by_session

    def sessions_wanting_work(self) -> list[str]:
        """Sessions that wait for work, the longest waiting first."""
        calls = {call.number: call for there in self._by_queue.values() for call in there.values()}
        return list(dict.fromkeys(calls[number].session_id for number in sorted(calls)))

    # -- time --------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When the first call runs out of time."""
        first = self._deadlines.first() if self._deadlines else None
        return None if first is None else first[0]

    def are_overdue(self, now: float) -> bool:
        """Whether a call has run out of time."""
        deadline = self.next_deadline()
        return deadline is not None and deadline <= now

    def expire(self, now: float) -> None:
        """Answer the calls that have run out of time with what there is."""
        expired = []
        while self.are_overdue(now):
            expired.append(self._all[self._deadlines.take()])
        for call in expired:
            self._give_what_there_is(call)

    def _give_what_there_is(self, call: ParkedCall) -> None:
        if call.waits_for == "batch":
            self._offer_batch(call, is_over=True)
        else:
            self._answer(call, self.what_there_is(call))

    def what_there_is(self, call: ParkedCall) -> Any:
        """The answer of a call whose time is over; for a call that waits for a batch see `_offer_batch`."""
        if call.waits_for == "rollouts":
            return rollouts.finished_by_now(self._state, call.arguments["rollout_ids"])
        if call.waits_for == "feed":
            return self._feed_work(call, is_over=True)
        if call.waits_for == "evaluation":
            return self._evaluated(call, is_over=True)
        return [] if call.waits_for == "work" else ([], call.cursor)

    def answer_of(self, caller: Caller, waits_for: WaitsFor, arguments: dict[str, Any]) -> Any:
        """The answer of a call in a store in which nothing ever changes, where it would wait for ever."""
        return self.what_there_is(self._call(caller, waits_for, arguments))

    # -- what happened -----------------------------------------------------------------------------------------------

    def finished(self, rollout_ids: Iterable[str]) -> None:
        """Rollouts have finished: answer those who wait for that."""
        for rollout_id in rollout_ids:
            for call in self._by_rollout.pop(rollout_id, {}).values():
                call.missing.discard(rollout_id)
                if not call.missing:
                    self._answer_wait(call)
        for call in self._of_kind("batch"):  # consumers await other rollouts than before
            self._offer_batch(call)
        for call in self._of_kind("evaluation"):
            if (result := self._evaluated(call)) is not None:
                self._answer(call, result)
        for call in self._of_kind("completions"):
            if items := self._completed(call):
                self._answer(call, (items, call.cursor))

    def _answer_wait(self, call: ParkedCall) -> None:
        missing = rollouts.unfinished_among(self._state, call.arguments["rollout_ids"])
        if not missing:
            self._answer(call, self.what_there_is(call))
            return
        for rollout_id in missing:  # it had finished, and was queued again meanwhile
            call.missing.add(rollout_id)
            self._by_rollout.setdefault(rollout_id, {})[call.number] = call

    def _completed(self, call: ParkedCall) -> list[Pair]:
        asked = call.arguments
        items, call.cursor = rollouts.completed_after(
            self._state, call.cursor, asked["limit"], asked["filters"], call.among
        )
        return items

    def changed(self) -> None:
        """Something has changed: answer those who wait for changes of that kind."""
        for call in self._of_kind("changes"):
            if items := self._changed(call):
                self._answer(call, (items, call.cursor))

    def _changed(self, call: ParkedCall) -> list[Any]:
        asked = call.arguments
        items, call.cursor = self._state.changes.after(call.cursor, asked["kinds"], asked["limit"])
        return items

    def work_came(self, queues: set[str]) -> None:
        """There may be work in these queues: hand it to those who wait for it, the longest waiting first."""
        state, gates = self._state, self._state.gates
        if gates.pauses or gates.limits:
            queues = set(gates.open_among(queues, self._clock.now()))
        for call in self._wanting(queues):
            if gates.limits:  # the claim before may have been the last one that they allow
                queues = set(gates.open_among(queues, self._clock.now()))
            if not any(map(state.queues.offers, queues)):
                break
            self.offer(call)

    def _wanting(self, queues: Iterable[str]) -> Iterator[ParkedCall]:
        waiting = [list(self._by_queue.get(queue, {}).values()) for queue in queues]  # each in order of number
        last = 0
        for call in merge(*waiting, key=attrgetter("number")):
            if call.number > last:  # once, although it waits for several queues
                last = call.number
                yield call

    def session_spoke(self, session_id: str) -> None:
        """A session that was suspended lives: its calls may be handed work again."""
        for call in self._of_session(session_id):
            if call.waits_for == "work":
                self.offer(call)

    def offer(self, call: ParkedCall) -> None:
        """Hand work to a call that waits for it, if there is some for it."""
        state, asked = self._state, call.arguments
        session = state.sessions.get(call.session_id)
        if session is None or session.ended_at is not None:
            return
        queues = asked["queues"]
        if state.gates.pauses or state.gates.limits:
            queues = state.gates.open_among(queues, self._clock.now())
        if not any(map(state.queues.offers, queues)) or not self._regain_space():
            return
        if call.session_id in self._liveness.suspended:
            self._liveness.ask_soon(self._clock.age())
            return
        wanted = (asked["queues"], asked["limit"], asked["worker_id"])
        claimed = self._do("hand_over", self._step(session), call.session_id, call.ticket, *wanted)
        if not claimed:
            return
        if not self._answer(call, claimed):  # its caller has gone
            keys = [(rollout.rollout_id, attempt.attempt_id) for rollout, attempt, _ in claimed]
            self._do("take_back", self._step(session), call.session_id, keys)

    def _offer_batch(self, call: ParkedCall, *, is_over: bool = False) -> None:
        """Give a consumer what there is, if waiting brings no more or its time `is_over`."""
        state, asked = self._state, call.arguments
        session = state.sessions.get(call.session_id)
        consumer, count = asked["consumer"], asked["count"]
        known = state.consumers.get(consumer)
        if session is None or session.ended_at is not None or known is None:  # it was forgotten
            self._answer(call, ([], 0))
            return
        refusal = training.why_not(state, session, consumer, asked.get("max_open", 1), self._clock.age())
        if refusal is not None:
            self._answer(call, refusal)
            return
        if not (is_over or training.is_ready(state, consumer, known, count)):
            return
        if not training.has_something(state, consumer, known, count) or not self._regain_space():
            feed = state.feeds.get(consumer)
            if is_over or (feed is not None and feed.is_over):
                self._answer(call, ([], 0))
            return
        batch = self._do("hand_batch", self._step(session), call.session_id, call.ticket, consumer, count)
        if not self._answer(call, batch):  # its caller has gone
            self._do("take_back", self._step(session), call.session_id, [(consumer, batch[1])])

    def feeds_changed(self, names: Iterable[str]) -> None:
        """There may be something to do for those who draw the items of these feeds."""
        changed = set(names)
        for call in self._of_kind("feed"):
            if call.arguments["feed"] in changed and (found := self._feed_work(call)) is not None:
                self._answer(call, found)

    def _feed_work(self, call: ParkedCall, *, is_over: bool = False) -> Any:
        """What there is to do for who draws the items of a feed, or why it is to draw no more; None: nothing."""
        asked = call.arguments | ({"timeout": 0.0} if is_over else {})
        try:
            return feeds.work(self._state, self._step(self._state.sessions.get(call.session_id)), **asked)
        except StoreError as refusal:
            return refusal

    def _evaluated(self, call: ParkedCall, *, is_over: bool = False) -> Any:
        """The result of an evaluation, or why there is none; None: it still runs."""
        asked = call.arguments | ({"timeout": 0.0} if is_over else {})
        try:
            return evaluations.result(self._state, self._step(self._state.sessions.get(call.session_id)), **asked)
        except StoreError as refusal:  # it was forgotten
            return refusal

    def pools_changed(self) -> None:
        """Pools cannot work: refuse those who wait for nothing but what such pools would do."""
        if self._pools.have_failed:
            self._refuse_without_runners(list(self._all.values()))

    def _refuse_without_runners(self, calls: Iterable[ParkedCall]) -> None:
        for call in calls:
            if call.waits_for not in _NEEDS_RUNNERS:
                continue
            awaited: Iterable[str] | None = call.missing if call.waits_for == "rollouts" else None
            if call.waits_for == "evaluation":
                asked = call.arguments
                awaited = evaluations.unfinished(self._state, asked["name"], asked["version"], asked["branch"])
            if call.among is not None:
                awaited = rollouts.unfinished_among(self._state, call.among)
            refusal = self._pools.why_never(self._state, awaited)
            if refusal is None:
                continue
            known = self._state.consumers.get(call.arguments["consumer"]) if call.waits_for == "batch" else None
            if known is not None and training.has_something(
                self._state, call.arguments["consumer"], known, call.arguments["count"]
            ):
                self._offer_batch(call, is_over=True)
            else:
                self._answer(call, refusal)
