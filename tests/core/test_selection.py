"""What a feed trained on and threw away: exact counts, through rewinds and snapshots; and biases, said in words."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raystore.core.check import check
from raystore.core.fates import ENDINGS, UNDER_WAY
from raystore.core.selection import (
    ALIKE,
    OTHER,
    REASONS,
    VALUES,
    WINDOW_SECONDS,
    Bits,
    Fate,
    Selection,
    Spread,
    class_of,
    middle_of,
)
from raystore.core.snapshot import restore, sections
from raystore.core.state import State
from raystore.errors import InvalidValueError
from raystore.reports.selection import SelectionReport, selection_report
from tests.core.selection_world import Patient, World, all_earn_alike, longer_earns_less, longer_earns_more
from tests.core.test_feeds import Loop

numbers = st.lists(st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-5), max_size=100)


def spread_of(values: list[float]) -> Spread:
    spread = Spread()
    for value in values:
        spread.add(value)
    return spread


# -- sketches ----------------------------------------------------------------------------------------------------------


@given(numbers)
def test_classes_are_in_the_order_of_their_numbers(values: list[float]) -> None:
    """And the middle of a class is within 5 % of each of its numbers."""
    ordered = sorted(values)
    assert [class_of(value) for value in ordered] == sorted(map(class_of, values))
    for value in values:
        assert abs(middle_of(class_of(value)) - value) <= 0.05 * abs(value)


@given(numbers, numbers)
def test_spreads_add_up_and_numbers_go_out_again(some: list[float], others: list[float]) -> None:
    merged, whole = spread_of(some), spread_of(some + others)
    merged.merge(spread_of(others))
    assert list(merged.classes()) == list(whole.classes()) and merged.count == whole.count
    for value in others:
        whole.add(value, -1)
    assert list(whole.classes()) == list(spread_of(some).classes()) and whole.count == len(some)
    assert list(Spread.of(json.loads(json.dumps(merged.image()))).classes()) == list(merged.classes())


def test_what_is_no_number_does_not_count() -> None:
    spread = spread_of([1.0])
    for value in (None, float("nan"), float("inf")):
        spread.add(value)
    assert spread.count == 1 and spread.total == 1.0


@given(st.sets(st.integers(0, 20_000)), st.sets(st.integers(0, 20_000)))
def test_bits(some: set[int], others: set[int]) -> None:
    one, other = Bits(), Bits()
    for index in some:
        one.put(index, True)
    for index in others:
        other.put(index, True)
    count, indexes = Bits.of(one.image()).without(Bits.of(other.image()))
    assert (count, list(indexes)) == (len(some - others), sorted(some - others))


def fate(**given_: Any) -> Fate:
    usual: dict[str, Any] = {
        "ending": "trained", "reason": "ok", "is_cut": False, "seconds": 1.0, "turns": 1, "tokens": 2, "reward": 0.5,
        "version": 1,
    }  # fmt: skip
    return Fate(**(usual | given_))


def test_windows_are_few_and_the_older_the_longer() -> None:
    """A year of them is a few dozen; each count stays in one that covers its time."""
    known = Selection()
    hours = 24 * 365
    for hour in range(hours):
        known.count(hour * 3600.0, [fate()], [], "trained")
    assert len(known.windows) <= (ALIKE + 1) * 20
    lengths = [window.length for window in known.windows]
    assert lengths == sorted(lengths, reverse=True) and max(Counter(lengths).values()) <= ALIKE
    assert sum(window.endings["trained"].rollouts for window in known.windows) == hours
    last_day = known.since((hours - 24) * 3600.0)
    assert last_day is not None and 24 <= last_day.endings["trained"].rollouts <= 24 * 3
    assert known.since(None) is not None and known.since((hours + 1) * 3600.0) is None


def test_an_event_of_ten_minutes_is_in_one_window() -> None:
    known = Selection()
    for second in range(0, int(WINDOW_SECONDS), 10):
        known.count(float(second), [fate()], [], "trained")
    assert len(known.windows) == 1


def test_values_and_reasons_are_bounded() -> None:
    """A tag with an id in it would else be kept for each rollout."""
    known = Selection()
    for number in range(1000):
        fates = [fate(version=number, reason=f"reason {number}")]
        known.count(float(number % 60), fates, [("tag id", str(number))], "trained")
    (window,) = known.windows
    for dimension in ("version", "tag id"):
        rows = {value: tally for (name, value), tally in window.values.items() if name == dimension}
        assert len(rows) == VALUES + 1 and rows[OTHER][0] == 1000 - VALUES
    assert len(window.endings["trained"].reasons) == REASONS + 1


# -- counts ------------------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "wait": {},
    "train": {"late": "train"},
    "drop": {"late": "drop"},
    "requeue": {"late": "requeue"},
    "race": {"race": True, "group": {"spare": 2}},
    "mask": {"fails": 0.2, "group": {"min_size": 2}},
    "replace": {"fails": 0.2, "on_failure": "replace", "group": {"replace": 4}},
    "reward": {"fails": 0.2, "on_failure": "reward", "failure_reward": 0.0},
    "spare": {"group": {"spare": 1}, "fails": 0.1, "on_failure": "replace"},
    "keep": {"keeps": lambda rewards: max(rewards) - min(rewards) > 0.1},
}


def world_of(name: str, seed: int = 1, **more: Any) -> World:
    given_ = {"items": 120, "batch": 8, "max_lag": 1, **SHAPES[name], **more}
    return World(seed, given_.pop("earns", longer_earns_more), **given_)


def counted(world: World) -> dict[str, int]:
    return {one.ending: one.rollouts for one in world.report().endings}


@pytest.mark.parametrize("name", SHAPES)
def test_each_rollout_that_was_started_has_one_ending(name: str) -> None:
    """At any time: what was started is trained, thrown away or under way; and trained is what was acknowledged."""
    world = world_of(name)
    for until in (*range(1, 12, 2), None):
        world.run(until)
        state, report = world.core.state, world.report()
        started = sum(bool(entry.attempts) for entry in state.entries.values())
        assert report.started == started == sum(one.rollouts for one in report.endings)
        acknowledged = sum(taken.step is not None for e in state.entries.values() for taken in e.taken.values())
        assert report.trained == acknowledged
        assert {one.ending for one in report.endings} <= ENDINGS.keys()
        for one in report.endings:
            assert sum(one.reasons.values()) == one.rollouts == one.duration.count
            assert one.share == pytest.approx(one.rollouts / started)
    check(world.core.state)
    assert UNDER_WAY not in counted(world)
    stream = world.feed.streams[""]
    assert {e: n for kinds in report.items.values() for e, n in kinds.items()} == stream.endings
    expected = {
        "wait": {"trained"}, "train": {"trained"}, "drop": {"trained", "stale"}, "requeue": {"trained", "stale"},
        "race": {"trained", "raced"}, "mask": {"trained", "masked"}, "replace": {"trained", "replaced"},
        "reward": {"trained"}, "spare": {"trained", "failed", "spare"}, "keep": {"trained", "filtered"},
    }[name]  # fmt: skip
    assert expected <= counted(world).keys()


@pytest.mark.parametrize("name", SHAPES)
def test_a_rewind_counts_out_again(name: str) -> None:
    """Whatever was acknowledged later than the step is as if it had not been; trained again, it counts again."""
    world = world_of(name)
    world.run(until=4)
    before = counted(world)
    step = max(world.core.state.consumers["f"].steps.values())
    trained = dict(world.feed.trained)
    world.run(until=9)
    world.core.run("rewind", session=world.loop.driver, consumer="f", at_step=step)
    assert dict(world.feed.trained).keys() == trained.keys()
    after = counted(world)
    assert after["trained"] == before["trained"]
    assert sum(after.values()) == sum(bool(entry.attempts) for entry in world.core.state.entries.values())
    world.loop.publish(step, "again")
    world.version = step + 1
    world.run()
    check(world.core.state)
    report = world.report()
    assert report.started == sum(bool(entry.attempts) for entry in world.core.state.entries.values())
    assert report.trained == sum(bool(entry.taken) for entry in world.core.state.entries.values())


@pytest.mark.parametrize("name", ["drop", "keep", "race"])
def test_a_snapshot_holds_it(name: str) -> None:
    """A state that is restored has the same report, and can undo what was counted before."""
    world = world_of(name)
    world.run(until=6)
    copy = State(world.core.state.settings)
    image = [(name, json_like(value)) for name, value in sections(world.core.state, {})]
    restore(copy, image, lambda chunk: chunk)
    before = world.report()
    world.core.state, world.loop.core.state = copy, copy
    world.loop.runner, world.loop.driver = (
        copy.sessions[one.session_id] for one in (world.loop.runner, world.loop.driver)
    )
    assert world.report() == before
    step = min(copy.consumers["f"].steps.values())
    world.core.run("rewind", session=world.loop.driver, consumer="f", at_step=step)
    assert world.report().trained == 8 * 4


def json_like(value: Any) -> Any:
    """A value as it comes from a file: tuples are lists."""
    if isinstance(value, (list, tuple)):
        return [json_like(item) for item in value]
    return {key: json_like(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_items_that_were_never_trained_on_are_named() -> None:
    """Over all epochs; an item that is trained on in any of them is not starved."""
    world = world_of("drop", items=60)
    world.run()
    (row,) = world.report().starved.values()
    endings = {item.group_id: item for item in world.feed.trained.values()}
    trained = {item.index for item in endings.values()}
    assert row == (60 - len(trained), sorted(set(range(60)) - trained))
    assert f"Items {', '.join(map(str, row[1][:8]))}" in world.report().sentences[-1]


def test_a_name_that_nobody_has() -> None:
    world = world_of("wait")
    with pytest.raises(InvalidValueError, match=r"'g'.*the name of a feed.*there are 'f'"):
        world.core.run("selection", consumer="g", since=None)


def test_a_rollout_that_went_on_counts_with_all_its_work() -> None:
    """It ran for the time of all attempts of its work, without its waits; of its calls only the last are known."""
    loop = Loop(Patient(), 1, size=1, batch=1)
    core = loop.core
    loop.publish()
    loop.draw()
    calls = {"turns": 2, "prompt_tokens": 1, "response_tokens": 9, "finish_reasons": {}}
    for seconds in (10.0, 20.0):
        runner = core.open(f"runner {seconds}")
        (key,) = core.hold(runner)
        core.tick(seconds)
        core.run("save", session=runner, rollout_id=key[0], attempt_id=key[1], saved_state=b"\x01\x01", spans=[])
        core.end(runner)
        core.tick(100.0)
    (key,) = core.hold(loop.runner)
    assert core.state.entries[key[0]].latest.resumed_from is not None  # type: ignore[union-attr]
    core.tick(5.0)
    core.run(
        "finish", session=loop.runner, rollout_id=key[0], attempt_id=key[1], spans=[],
        changes={"status": "succeeded", "outcome": "ok", "calls": calls},
    )  # fmt: skip
    (ended,) = selection_report(core.run("selection", consumer="f", since=None)).endings
    assert (ended.duration.mean, ended.turns.count, ended.tokens.count) == (35.0, 0, 0)


def test_of_nothing_nothing_is_drawn() -> None:
    """Nor compared: no number is made of what was never started."""
    loop = Loop(Patient(), 1, size=1, batch=1)
    report = selection_report(loop.core.run("selection", consumer="f", since=None))
    assert (report.started, report.curves, report.comparisons, report.endings) == (0, {}, [], [])
    assert report.sentences == ["Nothing was started for 'f' in this time"]


# -- biases ------------------------------------------------------------------------------------------------------------

EARNS = {"more": longer_earns_more, "less": longer_earns_less, "alike": all_earn_alike}


def report_of(name: str, earns: str, seed: int) -> SelectionReport:
    world = world_of(name, seed, items=1000, earns=EARNS[earns])
    world.run()
    return world.report()


def biases(report: SelectionReport) -> dict[str, bool]:
    """What is biased, and whether what was trained on has more of it."""
    return {one.dimension: one.trained > one.started for one in report.comparisons if one.is_biased}


@pytest.mark.parametrize(("name", "earns", "seed"), [*itertools.product(["wait", "train"], EARNS, [1])])
def test_no_bias_is_found_where_nothing_is_thrown_away(name: str, earns: str, seed: int) -> None:
    report = report_of(name, earns, seed)
    assert biases(report) == {} and not report.is_biased
    assert any(sentence.startswith("No bias found") for sentence in report.sentences)


@pytest.mark.parametrize(("name", "earns", "seed"), [*itertools.product(["drop", "race"], EARNS, [1, 2])])
def test_what_is_cut_for_being_slow_biases_durations_and_what_goes_with_them(name: str, earns: str, seed: int) -> None:
    """Rewards too, in the direction of their correlation; if there is none, they are as they should be."""
    report = report_of(name, earns, seed)
    found = biases(report)
    assert found["duration"] is False
    assert found.get("reward") == {"more": False, "less": True, "alike": None}[earns]
    words = " ".join(report.sentences)
    assert "What was trained on ran 0." in words
    ending = {"drop": "stale", "race": "raced"}[name]
    assert f"most of that by what ended as {ending}" in words
    direction = {"more": "below", "less": "above"}.get(earns)
    assert ("The mean reward of what was trained on" in words) == (direction is not None)
    if direction is not None:
        assert f", {direction} the " in words
    assert ("race=True cut off" in words) == (name == "race")


def test_the_estimate_of_what_was_cut_is_near_the_truth() -> None:
    """Durations and rewards of all rollouts, had none been cut off: the world knows them."""
    longer = Random(7)
    truth = [longer.gauss(0, 1) for _ in range(20_000)]
    for name in ("drop", "race"):
        report = report_of(name, "more", 3)
        reward = next(one for one in report.comparisons if one.dimension == "reward")
        everything = sum(longer_earns_more(longer, one) for one in truth) / len(truth)
        assert abs(reward.started - everything) < 0.5 * abs(reward.trained - everything)


def test_failures_that_are_replaced_are_said() -> None:
    report = report_of("replace", "more", 1)
    (sentence,) = [one for one in report.sentences if one.startswith("on_failure='replace'")]
    assert "20%" in sentence or "19%" in sentence or "21%" in sentence
    assert "With a reward of 0 for them" in sentence


def test_a_filter_is_told_as_what_it_is() -> None:
    """Groups that agree are filtered; the numbers of each are not kept apart."""
    report = report_of("keep", "more", 1)
    filtered = next(one for one in report.endings if one.ending == "filtered")
    assert list(filtered.reasons) and all("#" in reason for reason in filtered.reasons)
    assert len(filtered.reasons) <= 4


def test_an_environment_that_is_dropped_more_often_is_found() -> None:
    """By its name, as a share of what was started."""
    streams = [["quick", 1.0, 400, "f"], ["slow", 1.0, 400, "f"]]
    world = World(1, all_earn_alike, items=400, streams=streams, late="drop", batch=8, max_lag=1)
    world.slow = {"slow": 6.0}  # as long as three steps
    world.run()
    report = world.report()
    found = {one.value for one in report.comparisons if one.dimension == "environment" and one.is_biased}
    assert "slow" in found
    assert any("Of environment 'slow'" in sentence for sentence in report.sentences)


def test_few_groups_say_nothing() -> None:
    world = world_of("drop", items=40)
    world.run(until=2)
    report = world.report()
    assert report.comparisons == [] and any("too few to tell" in sentence for sentence in report.sentences)


def test_a_report_of_nothing() -> None:
    world = world_of("wait")
    report = world.report()
    assert report.started == 0 and report.endings == [] and not report.is_biased
    assert report.table() and report.svg().startswith("<svg")
    assert report.sentences == ["Nothing was started for 'f' in this time"]


def test_a_picture_shows_both_distributions() -> None:
    picture = report_of("drop", "more", 1).svg()
    assert picture.count("<polyline") == 8 and picture.count(">trained on</text>") == 4
