"""Draws what each choice of a feed does to a straggler: the pictures of docs/rl.md.

Nothing in them is made up: each panel is a run of the store's own core, on a clock without a process. Its runners take
as long as is written here, one time unit is a second, and a trainer takes one batch after another.
Run `python docs/draw_choices.py` to write docs/rl/*.svg; `--check` says whether they are up to date, and a test asks.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from raystore.core import claims, expiry, verbs
from raystore.core.lifecycle import FINISHED
from raystore.core.payload import digest_of_bytes
from raystore.core.state import Session, Settings, State, Step

FOLDER = Path(__file__).with_name("rl")

RULE: dict[str, Any] = {
    "resources_id": "policy", "batch": 2, "max_lag": 1, "max_running": None, "late": "wait", "order": "oldest",
    "on_failure": "mask", "failure_reward": None, "race": False, "judged": False, "batch_tokens": None,
    "max_filtered": None, "in_a_row": None, "share": None, "window": 200, "requeues": 3,
}  # fmt: skip


# -- a run of the core -------------------------------------------------------------------------------------------------


@dataclass
class Bar:
    """One rollout: whose member it is, when it ran, and how it ended."""

    group_id: str
    begins: float
    ends: float
    how: str
    is_slow: bool


@dataclass
class Play:
    """A feed over `items` items, with enough runners; `takes` says how long a member runs and how it ends."""

    takes: Callable[[int, int], tuple[float, str]]
    items: int
    size: int = 1
    of_groups: Mapping[str, Any] = field(default_factory=dict)
    train_seconds: float = 1.0
    rule: Mapping[str, Any] = field(default_factory=dict)
    bars: dict[str, Bar] = field(default_factory=dict)
    batches: list[tuple[float, float, list[str]]] = field(default_factory=list)
    completed: dict[str, float] = field(default_factory=dict)
    lags: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = State(Settings(10**9, 10**8, max_deliveries=1))
        self.now = 0.0
        self.seed = count(1)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = count()
        self.trainer, self.runner = self.open("trainer"), self.open("runner")
        self.version = 0
        self.is_training = False
        rule = RULE | dict(self.rule)
        self.run("open_feed", self.trainer, feed="feed", pump="pump", rule=rule, streams=[["", 1.0, self.items, None]],
                 changed="refuse")  # fmt: skip
        self.publish()
        while True:
            while self.moves():
                pass
            if not self.events:
                break
            self.now, _, event = heapq.heappop(self.events)
            event()

    def step(self, session: Session | None = None) -> Step:
        return Step(self.now, 0.0, next(self.seed), session)

    def open(self, name: str) -> Session:
        return claims.open_session(self.state, self.step(), name)

    def run(self, verb: str, session: Session, **arguments: Any) -> Any:
        step = self.step(session)
        verbs.STEPS["advance"](self.state, step, *expiry.due(self.state, step).lists())
        return verbs.run(self.state, step, verb, arguments)

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), event))

    def publish(self) -> None:
        self.run("publish_feed", self.trainer, feed="feed", pump="pump", version=self.version, digest=str(self.version),
                 resources=b"\x00", holds_objects=False, objects=[])  # fmt: skip
        self.version += 1

    def moves(self) -> bool:
        """Let everybody do what can be done now; whether anybody did."""
        return self.draw() or self.claim() or self.take()

    def draw(self) -> bool:
        """The pump: as many groups as there are places for."""
        work = self.run("feed_work", self.trainer, feed="feed", pump="pump", timeout=0.0)
        drawn = self.state.feeds.by_name["feed"].streams[""].cursor
        indexes = range(drawn, min(drawn + work["places"].get("", 0), self.items))
        if not indexes:
            return False
        member = {"input": b"\x00", "metadata": None, "digests": [digest_of_bytes(b"")] * 2}
        requests = [{"member": member, "n": self.size, "group_id": f"{i + 1}", **self.of_groups} for i in indexes]
        self.run(
            "feed_add", self.trainer, feed="feed", pump="pump", stream="", at=[0, drawn], to=[0, indexes.stop],
            over=indexes.stop == self.items, state_after=None, requests=requests,
            items=[["", 0, i] for i in indexes], skipped=[],
        )  # fmt: skip
        return True

    def claim(self) -> bool:
        """A runner for each rollout that waits."""
        claimed = self.run("dequeue", self.runner, queues=["default"], limit=1, worker_id=None)
        for rollout, attempt, _ in claimed:
            key = (rollout.rollout_id, attempt.attempt_id)
            verbs.STEPS["acknowledge"](self.state, self.step(self.runner), self.runner.session_id, [key])
            members = list(self.state.groups.by_id[rollout.group_id].members)
            index, place = int(rollout.group_id.split("~")[0]) - 1, members.index(rollout.rollout_id)
            is_first = "~" not in rollout.group_id
            seconds, how = self.takes(index, place) if is_first else (1.0, "succeeded")
            self.bars[rollout.rollout_id] = Bar(rollout.group_id, self.now, float("inf"), how, seconds >= SLOW)
            self.later(seconds, partial(self.finish, key, how))
        return bool(claimed)

    def finish(self, key: tuple[str, str], how: str) -> None:
        """The end of a rollout, unless it was cancelled."""
        if self.state.entries[key[0]].rollout.status in FINISHED:
            return
        outcome = {"succeeded": "ok", "failed": "agent_error", "lost": "infra"}[how]
        changes = {"status": "succeeded" if how == "succeeded" else "failed", "outcome": outcome}
        self.run("finish", self.runner, rollout_id=key[0], attempt_id=key[1], spans=[], changes=changes)
        self.note()

    def note(self) -> None:
        """Look which rollouts and groups have ended."""
        for rollout_id, bar in self.bars.items():
            status = self.state.entries[rollout_id].rollout.status
            if bar.ends == float("inf") and status in FINISHED:
                bar.ends, bar.how = self.now, "cancelled" if status == "cancelled" else bar.how
        for group_id, group in self.state.groups.by_id.items():
            if group.status == "complete":
                self.completed.setdefault(group_id, self.now)

    def take(self) -> bool:
        """The trainer: the next batch, if there is one and it has none."""
        if self.is_training:
            return False
        batch = RULE["batch"] if "batch" not in self.rule else self.rule["batch"]
        found = self.run("take_groups", self.trainer, consumer="feed", count=batch, timeout=1.0, max_open=1)
        if found is None or not found[1]:
            return False
        items, number = found
        group_ids = [item.group_id for item in items if not isinstance(item, tuple)]
        self.is_training = True
        for row in self.run("feed_items", self.trainer, feed="feed", group_ids=group_ids):
            self.lags[row[0]] = row[4] + row[5]
        self.batches.append((self.now, self.now + self.train_seconds, group_ids))
        self.later(self.train_seconds, partial(self.acknowledge, number))
        return True

    def acknowledge(self, number: int) -> None:
        """A step of the model is done: publish it, then make room for more work."""
        self.publish()
        self.run("ack", self.trainer, consumer="feed", batch=number, at_step=number, note=None)
        self.is_training = False
        self.note()

    @property
    def ends(self) -> float:
        """When the last rollout, or if there are several groups the last batch, was over."""
        ends = [bar.ends for bar in self.bars.values()]
        return max(ends if self.items == 1 else [*ends, *(end for _, end, _ in self.batches)])

    def status(self, group_id: str) -> str:
        return self.state.groups.by_id[group_id].status


# -- pictures ----------------------------------------------------------------------------------------------------------

UNIT, ROW, LEFT, TOP, GAP = 22, 16, 34, 30, 26
BLUE, ORANGE, GREY, RED, DARK, PALE = "#7ab", "#e80", "#888", "#c33", "#146", "#eee"

Panel = tuple[list[str], float, float]  #: what is drawn, width and height


def text(x: float, y: float, words: str, **style: str) -> str:
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}"{more}>{words}</text>'


def box(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{ROW - 4}" fill="{fill}"/>'


def cross(x: float, y: float) -> str:
    return f'<path d="M{x - 5:g} {y:g}l10 12m-10 0l10 -12" stroke="{RED}" stroke-width="2"/>'


def at(seconds: float) -> float:
    return LEFT + UNIT * seconds


def batch(begin: float, end: float, y: float, number: int) -> list[str]:
    """The training of a batch."""
    middle = text((at(begin) + at(end)) / 2, y + 10, str(number), text_anchor="middle", fill="white")
    return [box(at(begin), y, UNIT * (end - begin) - 1, DARK), middle]


def of_groups(title: str, play: Play) -> Panel:
    """A row for each group: in flight, in the queue, and the batch that it was trained in; the trainer below."""
    said = [text(0, 14, title, font_weight="bold")]
    trained = {group_id: number for number, (_, _, ids) in enumerate(play.batches) for group_id in ids}
    rows = sorted({bar.group_id for bar in play.bars.values()}, key=lambda i: (int(i.split("~")[0]), i))
    for row, group_id in enumerate(rows):
        y = TOP + ROW * row
        said.append(text(LEFT - 6, y + 10, group_id, text_anchor="end", fill="#555"))
        (bar,) = (bar for bar in play.bars.values() if bar.group_id == group_id)
        said.append(box(at(bar.begins), y, UNIT * (bar.ends - bar.begins), ORANGE if bar.is_slow else BLUE))
        if play.status(group_id) == "stale":
            said += [cross(at(bar.ends), y), text(at(bar.ends) + 9, y + 10, "stale", fill=RED)]
        if group_id in trained:
            begin, end, _ = play.batches[trained[group_id]]
            done = at(play.completed[group_id])
            said.append(f'<line x1="{done:g}" x2="{at(begin):g}" y1="{y + 6}" y2="{y + 6}" stroke="{GREY}"/>')
            said += batch(begin, end, y, trained[group_id] + 1)
            if lag := play.lags[group_id]:
                said.append(text(at(end) + 4, y + 10, f"lag {lag}", fill="#555"))
    y = TOP + ROW * len(rows) + 4
    said.append(text(LEFT - 6, y + 10, "train", text_anchor="end", fill="#555"))
    said.append(box(at(0), y, UNIT * play.ends, PALE))
    for number, (begin, end, _) in enumerate(play.batches, 1):
        said += batch(begin, end, y, number)
    return said, at(play.ends) + 40, y + ROW


def of_members(title: str, play: Play) -> Panel:
    """A row for each member of the only group, and what became of it."""
    said = [text(0, 14, title, font_weight="bold")]
    (group,) = play.state.groups.by_id.values()
    right = at(play.ends) + 10
    for row, (rollout_id, bar) in enumerate(play.bars.items()):
        y = TOP + ROW * row
        colour = RED if bar.how in ("failed", "lost") else ORANGE if bar.is_slow else BLUE
        said.append(text(LEFT - 6, y + 10, f"{row + 1}", text_anchor="end", fill="#555"))
        said.append(box(at(bar.begins), y, UNIT * (bar.ends - bar.begins), colour))
        if bar.how == "cancelled":
            said.append(cross(at(bar.ends), y))
        words = "not needed" if bar.how == "succeeded" else bar.how
        if rollout_id in group.chosen:
            words = "trained" if bar.how == "succeeded" else "failed, trained with reward 0"
        elif bar.how == "failed":
            words = "failed, replaced" if len(play.bars) > group.n else "failed, masked"
        said.append(text(right, y + 10, words, fill="#555"))
    y = TOP + ROW * len(play.bars)
    end = at(play.completed[group.group_id])
    said.append(f'<line x1="{end:g}" x2="{end:g}" y1="{TOP - 4}" y2="{y + 2}" stroke="{DARK}"/>')
    said.append(text(end, y + 14, f"complete: {len(group.chosen)} of {group.n}", text_anchor="middle", fill=DARK))
    return said, right + 140, y + ROW


def legend(words: Sequence[tuple[str, str]]) -> Panel:
    """What the colours mean."""
    said, x = [], 0.0
    for colour, name in words:
        said += [box(x, 0, 14, colour), text(x + 19, 10, name, fill="#555")]
        x += 40 + 5.6 * len(name)
    return said, x, ROW


GROUPS_LEGEND = legend(
    [(BLUE, "in flight"), (ORANGE, "the straggler"), (GREY, "complete, in the queue (line)"), (DARK, "trained"),
     (PALE, "the trainer waits")]
)  # fmt: skip
SPARES_LEGEND = legend([(BLUE, "runs"), (ORANGE, "the straggler"), (RED, "lost")])
FAILURES_LEGEND = legend([(BLUE, "runs"), (RED, "failed")])


def sheet(panels: Sequence[Panel], columns: int, below: Panel) -> str:
    """Panels beside and below each other, as one SVG."""
    widths = [max(panel[1] for panel in panels[column::columns]) + GAP for column in range(columns)]
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    said, y = [], GAP / 2
    for row in [*rows, [below]]:
        x = GAP / 2
        for (parts, _, _), width in zip(row, widths, strict=False):
            said.append(f'<g transform="translate({x:g} {y:g})">{"".join(parts)}</g>')
            x += width
        y += max(height for _, _, height in row) + GAP
    width = max(sum(widths), below[1] + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {y:g}" width="{width:g}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width:g}" height="{y:g}" fill="white"/>'
        f"{''.join(said)}</svg>\n"
    )


# -- what is shown -----------------------------------------------------------------------------------------------------

QUICK = (1.0, 1.5, 1.2, 2.0, 1.0, 1.6, 1.3, 1.1, 1.8, 1.4, 1.2, 1.0)  # seconds of groups, in turn
STRAGGLER, SLOW = 1, 7.5


def groups_take(index: int, place: int) -> tuple[float, str]:
    return (SLOW if index == STRAGGLER else QUICK[index % len(QUICK)]), "succeeded"


def members_take(third: tuple[float, str]) -> Callable[[int, int], tuple[float, str]]:
    """Members of which the third is the one that is looked at."""
    return lambda index, place: third if place == 2 else ((2.0, 2.6, 0.0, 3.0, 2.3)[place], "succeeded")


def pictures() -> dict[str, str]:
    """Each picture by its name."""

    def groups(title: str, items: int = 12, train_seconds: float = 1.0, **rule: Any) -> Panel:
        return of_groups(title, Play(groups_take, items, rule=rule, train_seconds=train_seconds))

    def members(title: str, third: tuple[float, str], rule: Mapping[str, Any], **of: Any) -> Panel:
        return of_members(title, Play(members_take(third), 1, 4, of, rule=rule))

    slow, lost, failed = (SLOW, "succeeded"), (1.2, "lost"), (1.2, "failed")
    lates = [groups(f'late="{value}"', late=value) for value in ("wait", "train", "drop", "requeue")]
    orders = [
        groups(f'order="{value}", late="train", max_lag=2', train_seconds=1.4, order=value, late="train", max_lag=2)
        for value in ("oldest", "ready_first", "in_order")
    ]
    lags = [groups(f"max_lag={value}", 16, max_lag=value) for value in (0, 2, 8)]
    spares = [
        members("spare=0: one is lost", lost, {}),
        members("spare=1: one is lost", lost, {}, spare=1),
        members("spare=1: one is slow", slow, {}, spare=1),
        members("spare=1, race=True: one is slow", slow, {"race": True}, spare=1),
    ]
    failures = [
        members("on_failure=rs.reward(0)", failed, {"on_failure": "reward", "failure_reward": 0.0}),
        members('on_failure="mask", min_size=2', failed, {"on_failure": "mask"}, min_size=2),
        members('on_failure="replace", replace=1', failed, {"on_failure": "replace"}, replace=1),
    ]
    return {
        "late": sheet(lates, 2, GROUPS_LEGEND),
        "order": sheet(orders, 2, GROUPS_LEGEND),
        "max_lag": sheet(lags, 1, GROUPS_LEGEND),
        "spare": sheet(spares, 2, SPARES_LEGEND),
        "on_failure": sheet(failures, 2, FAILURES_LEGEND),
    }


if __name__ == "__main__":
    drawn = pictures()
    if "--check" in sys.argv:
        there = {path.stem: path.read_text() for path in FOLDER.glob("*.svg")}
        sys.exit(there != drawn)
    FOLDER.mkdir(exist_ok=True)
    for name, picture in drawn.items():
        (FOLDER / f"{name}.svg").write_text(picture)
