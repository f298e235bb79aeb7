"""Every verb on a terminal: against a store on Ray, and against the journal of a run that was killed."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import raystore as rs
from raystore.cli.consumers import _fate
from raystore.cli.diff import Side, differences
from raystore.cli.drawing import Screen
from raystore.cli.program import FAMILIES
from raystore.cli.reading import View
from tests.cli.commands import COLOURS, Shown, here, piped
from tests.cli.small_run import HOSTILE
from tests.helpers import make_span, present

#: Each verb with arguments, and what it must say of the small run.
VERBS: list[tuple[list[str], list[str]]] = [
    (["status"], [r"2 queuing", r"gpu-only +1", r"trainer +groups", r"6 complete, 6 trained"]),
    (["rollouts", "--limit", "4"], [r"stuck +running", r"waiting +queuing", r"4 of 35"]),
    (["rollouts", "--status", "failed", "--tag", "env=code"], [r"raises-0 +failed +agent_error", r"ValueError"]),
    (["rollouts", "--queue", "nowhere"], [r"no rollout matches"]),
    (["groups", "--status", "trained", "--limit", "2"], [r"code-2-0|math-\d-\d", r"2 of 6"]),
    (["consumers"], [r"trainer +groups +6"]),
    (["consumers", "trainer"], [r"1 +1 +4 +0\.15 +yes +loss 1\.5, kl 0\.01", r"3 +1 +4 +0\.45 +no"]),
    (["consumers", "--rewind", "1"], [r"steps lost +2 \(2 to 3\)", r"trained on again +8", r"all of them are there"]),
    (["workers"], [r"runner-3 +busy +1 min 32 s +stuck|runner-3 +busy", r"runner-1 +idle.*node-a"]),
    (["resources"], [r"policy +3 +2 ", r"weights: <raystore\.types\.contract\.ObjectResource, a pickle of \d+"]),
    (["resources", "policy"], [r"policy +3 +2", r"policy +1 +0", r"api_key: \(hidden\)", r"Think step by step"]),
    (["resources", "policy", "--version", "1"], [r"endpoint: http://10\.0\.0\.0/v1"]),
    (["resources", "policy", "--diff", "1", "3"], [r"-    \{question\}", r"\+    Think step by step"]),
    (["show", "raises-0"], [r"parsing\.py:12 in parse", r"✗ parse", r"ValueError: invalid literal", r"\+500 ms"]),
    (["show", "retried"], [r"2 attempts", r"failed +infra", r"succeeded +ok +0\.5", r"connection reset"]),
    (["show", "stuck"], [r"rollout stuck +running", r"prepare +█+"]),
    (["show", "deleted"], [r"was deleted; its story is left", r"\+500 ms +running", r"deleted"]),
    (["show", "waiting"], [r"input +<tests\.cli\.small_run\._opened, a pickle of \d+ bytes, not opened>"]),
    (["show", "math-0-1"], [r"group math-0-1 +trained", r"members", r"group_complete"]),
    (["errors"], [r"the policy's doing +4 attempts, 12%", r"3 +agent_error +agents/parsing\.py:12", r"1 +infra"]),
    (["slow", "--limit", "3"], [r"median of 32", r"stuck +1 min 32 s +23\.\d|stuck ", r"chat qwen3-4b 2\.1 s \(53%\)"]),
    (["top", "--once"], [r"2 queuing", r"queued +default|queued +gpu-only", r"runner-3", r"trainer"]),
    (["limits"], [r"who limited whom|a journal does not know this|nothing was waited for"]),
    (["tail", "--last", "3", "--no-follow"], [r"claimed +stuck|running +stuck", r"enqueued +last"]),
    (["curve"], [r"train +mean reward by policy version", r"val +0\.25 +0\.75", r"train +0\.15 +0\.5444 .* 29 +4"]),
    (["curve", "--by", "time", "--mode", "val"], [r"seconds since the first", r"val "]),
    (["report"], [r"trained +6 +12 +50%", r"under way +6 +12", r"the store still has", r"Only 6 groups"]),
    (["diff", "1", "3"], [r"loss +1\.5 +0\.5", r"\+2\.3 sd +reward +0\.15 +0\.45", r"\+    Think step by step"]),
    (["watch", "--once", "--fail-on", "errors>0.5@20"], [r"errors>0\.5@20: no, it is 0\.\d"]),
]  # fmt: skip


def ids(case: Any) -> str:
    return " ".join(case) if isinstance(case, list) and case and case[0] in _NAMES else ""


_NAMES = {name for family in FAMILIES.values() for name, _, _ in family}


@pytest.mark.parametrize(("command", "said"), VERBS, ids=ids)
def test_a_verb_says_what_is_so(where: list[Any], command: list[str], said: list[str]) -> None:
    """On a terminal of 120 columns, in colours."""
    shown = here(*command, *where)
    assert shown.code == 0 and shown.err == "", shown
    for part in said:
        assert re.search(part, shown.text), f"{part!r} is not in:\n{shown.text}"
    nothing_came_through(shown)
    assert all(len(line) <= 120 for line in shown.lines)


@pytest.mark.parametrize("command", [command for command, _ in VERBS], ids=ids)
def test_a_verb_fits_forty_columns(killed: Path, command: list[str]) -> None:
    """No line is longer, and the ids that it is about are there."""
    shown = here(*command, "--journal", killed, columns=40)
    assert shown.code == 0
    assert max(map(len, shown.lines)) <= 40, shown.text
    nothing_came_through(shown)


@pytest.mark.parametrize("command", [command for command, _ in VERBS], ids=ids)
def test_a_verb_gives_json(killed: Path, command: list[str]) -> None:
    """One document, or a line for each change; in ASCII, so that no control character is in it."""
    shown = piped(*command, "--json", "--journal", killed)
    assert shown.code == 0 and shown.err == ""
    assert shown.out.isascii() and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown.out)
    documents = shown.out.splitlines() if command[0] == "tail" else [shown.out]
    assert all(isinstance(json.loads(document), dict) for document in documents)
    assert "sk-secret" not in shown.out


@pytest.mark.parametrize("command", [command for command, _ in VERBS], ids=ids)
def test_a_verb_writes_no_escape_code_into_a_pipe(killed: Path, command: list[str]) -> None:
    """Nor blanks at the ends of lines."""
    shown = piped(*command, "--journal", killed)
    assert shown.code == 0 and "\x1b" not in shown.out
    assert all(line == line.rstrip() for line in shown.out.splitlines())


def test_every_verb_that_reads_is_tried() -> None:
    """A new one is put into the list of this file, or of the one that tries it."""
    elsewhere = {"list", "start", "stop", "demo", "why", "doctor", "export", "evaluations"}
    assert _NAMES - elsewhere == {command[0] for command, _ in VERBS}


def nothing_came_through(shown: Shown) -> None:
    """All that a terminal acts upon are the colours that were meant."""
    left = COLOURS.sub("", shown.out)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", left), repr(left)


def test_what_a_user_wrote_is_shown_and_not_obeyed(where: list[Any]) -> None:
    """Escape sequences, titles, bells, turned text, in metadata, span names, messages and errors."""
    for command in (["show", "hostile"], ["show", "hostile", "--all"], ["errors"], ["rollouts", "--limit", "50"]):
        shown = here(*command, *where)
        nothing_came_through(shown)
        assert r"\x1b]0;title\x07" in "".join(shown.lines)
    assert HOSTILE.count("\x1b") == 3


def test_a_conversation_is_told_by_what_is_new(killed: Path) -> None:
    """The messages of the call before are not repeated; a tool call shows its arguments."""
    found = json.loads(piped("rollouts", "--group", "math-1-0", "--json", "--journal", killed).out)["rollouts"]
    shown = here("show", found[0]["rollout_id"], "--journal", killed)
    assert shown.text.count("What is 17 * 23?") == 1
    assert '→ calculator({"expression": "17 * 23"})' in shown.text
    assert "… 3 messages as before" in shown.text and "tool: 391" in shown.text
    assert "21 + 12 tokens, no token ids, ended by stop" in shown.text
    calls = json.loads(piped("show", found[0]["rollout_id"], "--json", "--journal", killed).out)["model_calls"]
    assert [call["finish_reason"] for call in calls] == ["stop", "stop"]


def test_a_picture_of_the_curve(killed: Path, tmp_path: Path) -> None:
    """SVG, with one line for each mode."""
    picture = tmp_path / "reward.svg"
    assert here("curve", "--svg", picture, "--journal", killed).code == 0
    drawn = picture.read_text()
    assert drawn.startswith("<svg") and drawn.count("<polyline") == 2 and ">val<" in drawn
    refused = here("curve", "--svg", tmp_path / "no" / "where.svg", "--journal", killed)
    assert refused.code == 2 and "cannot write" in refused.err


def test_two_runs_are_compared(killed: Path, tmp_path: Path) -> None:
    """By the directories of their journals; the largest effect first."""
    other = tmp_path / "other"
    with rs.InMemoryLightningStore(journal=str(other)) as store:
        for number in range(4):
            store.sync.enqueue_rollout(number, rollout_id=f"r{number}", tags={"env": "math"})
            claimed = present(store.sync.dequeue_rollout("w"))
            store.sync.update_attempt(f"r{number}", claimed.attempt.attempt_id, status="failed")
    shown = here("diff", killed, other, columns=300)
    assert shown.code == 0
    effects = [abs(float(found)) for found in re.findall(r"^ *([+-]\d+\.\d) sd", shown.text, re.MULTILINE)]
    assert effects == sorted(effects, reverse=True) and max(effects) > 0.8
    assert re.search(r"\+\d\.\d sd +ended as failed +12\.\d% +100\.0%", shown.text)


def test_status_says_what_holds_a_queue_back(tmp_path: Path) -> None:
    """Pauses, limits, and resources that cannot be had."""
    with rs.InMemoryLightningStore(journal=str(tmp_path / "journal")) as store:
        for queue in ("stopped", "bounded", "free"):
            store.sync.enqueue_many_rollouts([rs.EnqueueRolloutRequest(input=1, queue=queue)] * 2)
        store.sync.pause(["stopped"], keep=True)
        store.sync.limit_queue("bounded", max_running=1, per_minute=5)
        store.sync.dequeue_rollout(queues=["bounded"])
        during = json.loads(piped("status", "--json", "--journal", tmp_path / "journal").out)
    assert during["queue_lengths"] == {"stopped": 2, "bounded": 1, "free": 2}  # of a run that goes on
    shown = here("status", "--journal", tmp_path / "journal")
    assert re.search(r"stopped +2 +paused", shown.text), shown.text
    assert re.search(r"bounded +1 +at most 1 at once, 5 a minute \(reached\)", shown.text)
    assert re.search(r"free +2 *$", shown.text, re.MULTILINE)


async def test_a_rewind_tells_what_cannot_be_had_again() -> None:
    """Spans that were evicted, rollouts that are gone."""
    with rs.InMemoryLightningStore(eviction_memory_threshold=20_000, safe_memory_threshold=10_000) as store:
        claimed = await store.start_rollout("x")
        await store.add_span(make_span(claimed, attributes={"much": "x" * 50_000}))
        await store.update_attempt(claimed.rollout_id, "latest", status="succeeded")
        await store.add_span(make_span(await store.start_rollout("y"), attributes={"much": "x" * 50_000}))
        view = View(store, Screen(io.StringIO()), False, 0.0, False)
        assert await _fate(view, claimed.rollout_id) == "have lost spans to eviction"
        assert await _fate(view, "nowhere") == "do not exist any more"
        assert await _fate(view, (await store.start_rollout("z")).rollout_id) == "whole"


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("errors>0.1@20", 1), ("errors>0.9@20", 0), ("errors>0@100", 0), ("infra>0", 0), ("reward<0.9@10", 1),
        ("reward>0.9@10", 0), ("idle>1m", 1), ("idle>10m", 0), ("queue>1", 1), ("queue>2", 0), ("seconds>500ms@5", 1),
    ],
)  # fmt: skip
def test_watch_tells_bad_news_by_its_exit_code(killed: Path, condition: str, code: int) -> None:
    """A condition that looks at more rollouts than have finished does not hold."""
    shown = here("watch", "--fail-on", condition, "--journal", killed)
    assert shown.code == code and condition in shown.text and shown.err == ""


def test_metrics_of_a_step_and_of_its_rollouts() -> None:
    """What a trainer said of a whole step stands apart; what it said of each rollout is compared as all else."""
    one, other = Side("one", 2), Side("other", 2)
    one.note(['{"loss": 2, "advantage": 0.5}', '{"loss": 2, "advantage": -0.5}'])
    other.note(["no json", '{"loss": 1, "advantage": [1]}', None])
    assert one.metrics == {"loss": 2} and other.metrics == {"loss": 1}
    assert one.values == {"metric advantage": [0.5, -0.5]} and other.values == {}


def test_effects_of_differences() -> None:
    """In standard deviations, shares likewise; infinite where nothing varies, none where a side has nothing."""
    one, other = Side("one", 4), Side("other", 4)
    one.values, other.values = {"a": [0.0, 2.0], "b": [1.0, 1.0], "c": [1.0], "d": [3.0]}, {"a": [2.0, 4.0], "b": [2.0]}
    one.flags, other.flags = {"x": 2, "y": 1}, {"x": 2, "y": 3}
    found = {difference.what: difference.effect for difference in differences(one, other)}
    assert next(iter(found)) == "b" and found["b"] == math.inf
    assert found["a"] == pytest.approx(2 / math.sqrt(2)) and found["c"] == found["d"] == 0
    assert found["y"] == pytest.approx(2 * math.asin(math.sqrt(0.75)) - 2 * math.asin(math.sqrt(0.25)))
    assert "x" not in found
