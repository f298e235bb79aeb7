"""A feed on a clock of its own, whose rollouts take as long, and earn as much, as a seed says."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from random import Random
from typing import Any

from raystore.core.feed_table import FeedEntry
from raystore.core.lifecycle import FINISHED
from raystore.core.state import Session, Step
from raystore.reports.selection import SelectionReport, selection_report
from tests.core.conftest import Core
from tests.core.test_feeds import Loop

Earns = Callable[[Random, float], float]  #: the reward of a rollout, by how much longer than usual it takes

TURN_TOKENS = 20


class Patient(Core):
    """A core whose sessions do not age: nobody speaks while nothing happens."""

    def step(self, session: Session | None = None) -> Step:
        self.seed += 1
        return Step(self.now, 0.0, self.seed, session)


class World:
    """Everybody who has a part in a feed; `run` lets all of them work until the items end."""

    def __init__(
        self,
        seed: int,
        earns: Earns,
        *,
        items: int = 400,
        size: int = 4,
        group: dict[str, Any] | None = None,
        spread: float = 1.0,
        train_seconds: float = 2.0,
        fails: float = 0.0,
        keeps: Callable[[list[float]], bool] | None = None,
        epochs: int = 1,
        **rule: Any,
    ) -> None:
        self.core, self.random = Patient(), Random(seed)
        self.earns, self.spread, self.fails, self.keeps = earns, spread, fails, keeps
        self.train_seconds = train_seconds
        streams = rule.pop("streams", None)
        self.loop = Loop(self.core, items, streams=streams, size=size, judged=keeps is not None, **rule)
        self.loop.group |= group or {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.version, self.is_training, self.epochs = 0, False, epochs
        self.difficulty: dict[str, float] = {}
        self.slow: dict[str, float] = {}  #: by environment, how much longer its rollouts take

    @property
    def feed(self) -> FeedEntry:
        return self.loop.feed

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.core.now + seconds, next(self.order), event))

    def run(self, until: int | None = None) -> None:
        """Work until nothing is left, or so many batches were acknowledged."""
        if not self.version:
            self.loop.publish(0)
            self.version = 1
        while until is None or self.feed.acks < until:
            self.loop.draw()
            self._claim()
            if self.keeps is not None:
                self._judge(self.keeps)
            self._take()
            if not self.events:
                return
            self.core.now, _, event = heapq.heappop(self.events)
            event()

    def _claim(self) -> None:
        for key in self.core.hold(self.loop.runner, 1_000):
            rollout = self.core.state.entries[key[0]].rollout
            hard = self.difficulty.setdefault(str(rollout.group_id), self.random.gauss(0, 1))
            longer = 0.7 * hard + 0.7 * self.random.gauss(0, 1)
            environment = str(rollout.group_id).split("/")[1]
            seconds = math.exp(self.spread * longer) * self.slow.get(environment, 1.0)
            reward = None if self.random.random() < self.fails else self.earns(self.random, longer)
            self.later(seconds, lambda key=key, reward=reward, n=longer: self._finish(key, reward, n))  # type: ignore[misc]

    def _finish(self, key: tuple[str, str], reward: float | None, longer: float) -> None:
        if self.core.state.entries[key[0]].rollout.status in FINISHED:
            return
        turns = max(round(3 + longer), 1)
        calls = {"turns": turns, "prompt_tokens": 0, "response_tokens": turns * TURN_TOKENS, "finish_reasons": {}}
        status, outcome = ("succeeded", "ok") if reward is not None else ("failed", "agent_error")
        spans = [] if reward is None else [[-1, "s", "t", None, "a", 1.0, 2.0, reward, b"body", -1]]
        self.core.run(
            "finish", session=self.loop.runner, rollout_id=key[0], attempt_id=key[1], spans=spans,
            changes={"status": status, "outcome": outcome, "calls": calls},
        )  # fmt: skip

    def _judge(self, keeps: Callable[[list[float]], bool]) -> None:
        verdicts = []
        for group_id in self.loop.work()["judge"]:
            chosen = self.core.state.groups.by_id[group_id].chosen
            rewards = [self.core.state.entries[i].rollout.reward or 0.0 for i in chosen]
            why = None if keeps(rewards) else f"spread of rewards is {max(rewards) - min(rewards):.3g}, not above 0.1"
            verdicts.append([group_id, why, None, []])
        if verdicts:
            self.core.run("feed_judge", session=self.loop.driver, feed="f", pump=self.loop.pump, verdicts=verdicts)

    def _take(self) -> None:
        if self.is_training:
            return
        batch = self.loop.rule["batch"]
        found = self.core.run(
            "take_groups", session=self.loop.driver, consumer="f", count=batch, timeout=1.0, max_open=1
        )
        if found is None or not found[1]:
            return
        self.is_training = True
        self.later(self.train_seconds, lambda: self._acknowledge(found[1]))

    def _acknowledge(self, number: int) -> None:
        """A step of the model is done, unless the batch was undone meanwhile."""
        self.is_training = False
        if number not in self.core.state.consumers["f"].holders:
            return
        self.loop.publish(self.version, str(self.version))
        self.core.run("ack", session=self.loop.driver, consumer="f", batch=number, at_step=self.version, note=None)
        self.version += 1

    def report(self, since: float | None = None) -> SelectionReport:
        return selection_report(self.core.run("selection", consumer="f", since=since))


def longer_earns_more(random: Random, longer: float) -> float:
    """Long rollouts are good ones, as where thinking pays."""
    return min(max(0.5 + 0.2 * longer + 0.15 * random.gauss(0, 1), 0.0), 1.0)


def longer_earns_less(random: Random, longer: float) -> float:
    """Long rollouts are lost ones, as where an agent goes in circles."""
    return longer_earns_more(random, -longer)


def all_earn_alike(random: Random, longer: float) -> float:
    """How long it takes says nothing."""
    return min(max(0.5 + 0.25 * random.gauss(0, 1), 0.0), 1.0)
