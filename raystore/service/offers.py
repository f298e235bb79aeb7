"""What calls that wait are given, once there is something for them or their time is over.

Not here: which calls wait (`waiters`), when to look (`service`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from raystore.core import training, verbs
from raystore.service import shell
from raystore.service.pools import Pools
from raystore.service.waiters import Waiter

if TYPE_CHECKING:
    from raystore.service.service import Service


class Offers:
    """The answers of one service to calls that wait."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def answer(self, waiter: Waiter, value: Any) -> bool:
        """Give a call its answer; whether its caller is there."""
        self._service.waiters.remove(waiter)
        return waiter.deliver(waiter.ticket, value)

    def give_finished(self, finished: Iterable[str]) -> None:
        """Rollouts have finished, or came back to a consumer: let those have them who wait for that."""
        state, waiters = self._service.state, self._service.waiters
        for rollout_id in finished:
            for waiter in waiters.finished(rollout_id):
                self.answer_wait(waiter)
        for waiter in waiters.reading("take"):
            self.offer_batch(waiter)
        for waiter in waiters.reading("completed"):
            items, cursor = verbs.completed_after(state, **waiter.arguments)
            waiter.arguments["cursor"] = cursor
            if items:
                self.answer(waiter, (items, cursor))

    def give_changes(self) -> None:
        """Let those have what changed who wait for changes."""
        for waiter in self._service.waiters.reading("changes"):
            changes, cursor = verbs.changes_after(self._service.state, **waiter.arguments)
            waiter.arguments["cursor"] = cursor
            if changes:
                self.answer(waiter, (changes, cursor))

    def answer_wait(self, waiter: Waiter) -> None:
        """All that a call waited for has finished."""
        rollout_ids = waiter.arguments["rollout_ids"]
        missing = shell.unfinished(self._service.state, rollout_ids)
        if missing:  # one that had finished was queued again meanwhile
            self._service.waiters.wait_for(waiter, missing)
        else:
            self.answer(waiter, shell.finished(self._service.state, rollout_ids))

    def refuse_what_never_comes(self, waiters: Iterable[Waiter], pools: Pools) -> None:
        """Answer those that wait for nothing but what pools would do that cannot work; a batch is given as it is."""
        state = self._service.state
        for waiter in waiters:
            if waiter.verb not in ("wait", "take", "completed"):
                continue
            refusal = pools.why_never(state, waiter.missing if waiter.verb == "wait" else None)
            if refusal is None:
                continue
            known = state.consumers.get(waiter.arguments["consumer"]) if waiter.verb == "take" else None
            if known is not None and training.has_something(state, known):
                self.offer_batch(waiter, is_over=True)
            else:
                self.answer(waiter, refusal)

    def answer_expired(self, waiter: Waiter) -> None:
        """The time of a call is over: it gets what there is."""
        arguments = waiter.arguments
        if waiter.verb == "wait":
            self.answer(waiter, shell.finished(self._service.state, arguments["rollout_ids"]))
        elif waiter.verb == "dequeue":
            self.answer(waiter, [])
        elif waiter.verb == "take":
            self.offer_batch(waiter, is_over=True)
        else:
            self.answer(waiter, ([], arguments["cursor"]))

    def offer(self, waiter: Waiter) -> None:
        """Hand work to a call that waits for it, if there is some for it."""
        session = self._service.state.sessions.get(waiter.session_id)
        if session is None or session.ended_at is not None:
            return
        if not any(map(self._service.state.queues.offers, waiter.arguments["queues"])):
            return
        if self._service.is_disk_full:
            return
        if waiter.session_id in self._service.probes:
            self._service.probes.hurry(self._service.clock.age())
            return
        wanted = (waiter.arguments["queues"], waiter.arguments["limit"], waiter.arguments["worker_id"])
        step = self._service.step(session)
        claimed = self._service.do("hand_over", step, waiter.session_id, waiter.ticket, *wanted)
        if not claimed:
            return
        value = [(entry.rollout, entry.attempts[-1], entry.is_watched) for entry in claimed]
        if not self.answer(waiter, value):  # its caller has gone
            keys = [(rollout.rollout_id, attempt.attempt_id) for rollout, attempt, _ in value]
            self._service.do("take_back", self._service.step(session), waiter.session_id, keys)

    def offer_batch(self, waiter: Waiter, *, is_over: bool = False) -> None:
        """Give a consumer that waits for a batch what there is, if waiting brings no more, or its time `is_over`."""
        state, wanted = self._service.state, waiter.arguments
        session = state.sessions.get(waiter.session_id)
        consumer, count = wanted["consumer"], wanted["count"]
        known = state.consumers.get(consumer)
        if session is None or session.ended_at is not None or known is None:  # it was forgotten
            self.answer(waiter, ([], 0))
            return
        refusal = training.why_not(state, session, consumer, wanted["max_open"])
        if refusal is not None:
            self.answer(waiter, refusal)
            return
        if not (is_over or training.is_ready(state, known, count)):
            return
        if not training.has_something(state, known) or self._service.is_disk_full:
            if is_over:
                self.answer(waiter, ([], 0))
            return
        step = self._service.step(session)
        batch = self._service.do("hand_batch", step, waiter.session_id, waiter.ticket, consumer, count)
        if not self.answer(waiter, batch):  # its caller has gone
            self._service.do("take_back", self._service.step(session), waiter.session_id, [(consumer, batch[1])])
