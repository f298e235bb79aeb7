"""What calls that wait are given, once there is something for them or their time is over.

Not here: which calls wait (`waiters`), when to look (`service`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raystore import shell
from raystore.core import consumers, verbs
from raystore.waiters import Waiter

if TYPE_CHECKING:
    from raystore.service import Service


class Offers:
    """The answers of one service to calls that wait."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def answer(self, waiter: Waiter, value: Any) -> bool:
        """Give a call its answer; whether its caller is there."""
        self._service.waiters.remove(waiter)
        return waiter.deliver(waiter.ticket, value)

    def give_finished(self) -> None:
        """Rollouts have finished, or came back to a consumer: let those have them who wait for that."""
        state, waiters = self._service.state, self._service.waiters
        finished, state.finished = state.finished, []
        for rollout_id in finished:
            for waiter in waiters.finished(rollout_id):
                self.answer_wait(waiter)
        news, state.came_back = None if state.came_back else len(finished), False
        for waiter in waiters.reading("take"):
            self.offer_batch(waiter, news)
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

    def answer_expired(self, waiter: Waiter) -> None:
        """The time of a call is over: it gets what there is."""
        arguments = waiter.arguments
        if waiter.verb == "wait":
            self.answer(waiter, shell.finished(self._service.state, arguments["rollout_ids"]))
        elif waiter.verb == "dequeue":
            self.answer(waiter, [])
        elif waiter.verb == "take":
            self.give_batch(waiter, must=True)
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

    def offer_batch(self, waiter: Waiter, finished: int | None) -> None:
        """Give rollouts to a consumer that waits for a batch, once enough have finished; None: look anew."""
        wanted = waiter.arguments
        wanted["missing"] -= wanted["missing"] if finished is None else finished
        if wanted["missing"] > 0:
            return
        wanted["missing"] = consumers.missing(self._service.state, wanted["consumer"], wanted["count"])
        if not wanted["missing"]:
            self.give_batch(waiter, must=False)

    def give_batch(self, waiter: Waiter, *, must: bool) -> None:
        """Let a consumer take a batch; one that is too small if it `must` be now."""
        step = self._service.step(self._service.state.sessions.get(waiter.session_id))
        wanted = (waiter.arguments["consumer"], waiter.arguments["count"])
        self.answer(waiter, self._service.do("take", step, *wanted, must))
