"""Trajectories and batches: turns as one sequence, each generated token in one loss, the same in all dialects."""

from __future__ import annotations

import subprocess
import sys
from array import array
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

import raystore as rs
from tests.spans.written import DIALECTS, Turn, span


def turn(prompt: Any, response: list[int] | list[Any], number: int | str = 1, **more: Any) -> Turn:
    """A turn with a log-probability for each token, told apart by its number."""
    return Turn(list(prompt), list(response), [-token / 4 for token in response], f"chatcmpl-{number}", **more)


def read(*turns: Any, dialect: str = "genai", **ids: Any) -> list[rs.Trajectory]:
    """The trajectories of these turns."""
    return rs.trajectories([made for one in turns for made in DIALECTS[dialect](one, **ids)])


def test_turns_become_one_sequence() -> None:
    """Prompt, answer, what a tool said, answer: generated tokens are marked, with their log-probabilities."""
    first, second, third = turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5, 6], [7], 2), turn([1, 2, 3, 4, 5, 6, 7], [8], 3)
    reward = span("agentlightning.reward", {"reward": 0.5})
    (found,) = rs.trajectories([*(s for t in (first, second, third) for s in DIALECTS["genai"](t)), reward])
    assert found.token_ids == array("i", [1, 2, 3, 4, 5, 6, 7, 8])
    assert list(found.loss_mask) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert found.logprobs is not None and list(found.logprobs) == [0, 0, -0.75, -1, 0, 0, -1.75, -2]
    assert found.turns == ((2, 4), (6, 7), (7, 8)) and len(found.span_ids) == 3
    assert list(found.policy_versions) == [-1] * 8
    assert (found.reward, found.role, found.split, found.rollout_id, found.attempt_id) == (0.5, None, None, "ro", "at")
    assert repr(found) == "<Trajectory in ro: 3 turns, 8 tokens, 4 generated, reward 0.5>" and len(found) == 8


def test_each_token_knows_its_policy_version() -> None:
    """Also if the weights changed between two turns; one turn without log-probabilities leaves the whole without."""
    spans = [*DIALECTS["genai"](turn([1], [2])), *DIALECTS["genai"](turn([1, 2, 3], [4, 5], 2))]
    for version, made in enumerate(spans, 7):
        made.attributes["raystore.policy_version"] = version
    (found,) = rs.trajectories(spans)
    assert list(found.policy_versions) == [-1, 7, -1, 8, 8] and found.logprobs is not None
    del spans[0].attributes["gen_ai.output.logprobs"]
    assert rs.trajectories(spans)[0].logprobs is None


PARTS: dict[str, tuple[list[int], Literal["drift", "branch", "other"], int]] = {
    "tokenised again": ([1, 2, 3, 44, 5], "drift", 3),
    "the end of the answer dropped": ([1, 2, 3, 5, 6], "drift", 3),
    "sampled again": ([1, 2], "branch", 2),
    "sampled again within the answer": ([1, 2, 3], "branch", 3),
    "another prompt": ([1, 9, 3, 4], "other", 1),
    "nothing in common": ([9, 9, 9, 9, 9], "other", 0),
    "an empty prompt": ([], "branch", 0),
}


@pytest.mark.parametrize("how", PARTS)
def test_what_does_not_continue_begins_anew_and_says_why(how: str) -> None:
    """Its prompt is context, so that no generated token is trained on twice."""
    prompt, reason, token = PARTS[how]
    first, second = read(turn([1, 2], [3, 4]), turn(prompt, [8], 2))
    assert first.split is None and list(first.loss_mask) == [0, 0, 1, 1]
    assert list(second.token_ids) == [*prompt, 8] and list(second.loss_mask) == [0] * len(prompt) + [1]
    assert second.split == rs.Split(reason, token, first.span_ids[0])
    assert f"token {token}" in str(second.split) and first.span_ids[0] in str(second.split)


def test_a_branch_after_an_answer() -> None:
    """Two continuations of one answer: the first goes on, the second says that it branches, not that it drifted."""
    first, second = read(turn([1], [2]), turn([1, 2, 3], [4], 2), turn([1, 2, 5], [6], 3))
    assert (list(first.token_ids), list(second.token_ids)) == ([1, 2, 3, 4], [1, 2, 5, 6])
    assert list(second.loss_mask) == [0, 0, 0, 1] and second.split
    assert second.split.reason == "branch" and second.split.token == 2


def test_interleaved_conversations_are_told_apart_by_their_tokens() -> None:
    """Each turn finds the sequence that it continues, the longest one, in whatever order they come."""
    a, b = [1, 1], [2, 2]
    found = read(
        turn(a, [3], 1), turn(b, [4], 2), turn([*b, 4, 5], [6], 3), turn([*a, 3, 7], [8], 4),
        turn([*a, 3, 7, 8, 9], [10], 5), turn(a, [3, 7], 6), turn([*a, 3, 7, 11], [12], 7),
    )  # fmt: skip
    assert [list(t.token_ids) for t in found] == [[1, 1, 3, 7, 8, 9, 10], [2, 2, 4, 5, 6], [1, 1, 3, 7, 11, 12]]
    assert [len(t.turns) for t in found] == [3, 2, 2]


def test_agents_have_sequences_of_their_own() -> None:
    """Roles tell policies apart, also where one agent's prompt continues another's."""
    spans = []
    for role, one in (
        ("planner", turn([1], [2])),
        ("solver", turn([1, 2, 3], [4], 2)),
        ("planner", turn([1, 2, 5], [6], 3)),
    ):
        agent = span(role, {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": role})
        (made,) = DIALECTS["genai"](one)
        made.parent_id = agent.span_id
        spans += [made, agent]
    found = rs.trajectories(spans)
    assert [(t.role, list(t.token_ids), t.split) for t in found] == [
        ("planner", [1, 2, 5, 6], None), ("solver", [1, 2, 3, 4], None)
    ]  # fmt: skip
    assert "of planner in ro" in repr(found[0])


def test_attempts_and_rollouts_never_join() -> None:
    """Each has the reward of its own."""
    spans = []
    for number, ids in enumerate(
        ({"attempt_id": "a"}, {"attempt_id": "b"}, {"rollout_id": "other", "attempt_id": "a"})
    ):
        spans += DIALECTS["genai"](turn([1], [2]), **ids)
        spans += DIALECTS["genai"](turn([1, 2], [3], 2), **ids)
        spans.append(span("agentlightning.reward", {"reward": number}, **ids))
    found = rs.trajectories(spans)
    assert [(t.rollout_id, t.attempt_id, t.reward, list(t.token_ids)) for t in found] == [
        ("ro", "a", 0.0, [1, 2, 3]), ("ro", "b", 1.0, [1, 2, 3]), ("other", "a", 2.0, [1, 2, 3])
    ]  # fmt: skip


def test_ids_beyond_32_bits_and_empty_answers() -> None:
    """Token ids of any size continue each other; an empty answer is a turn with nothing to learn."""
    (found,) = read(turn([1, 2**40], [3]), turn([1, 2**40, 3], [2**41], 2))
    assert found.token_ids == array("q", [1, 2**40, 3, 2**41])
    (found,) = read(turn([1], []), turn([1], [2], 2), turn([1, 2, 2**40], [3], 3))
    assert found.turns == ((1, 1), (1, 2), (3, 4)) and list(found.loss_mask) == [0, 1, 0, 1]


def test_an_odd_turn_leaves_the_rest_in_place(caplog: pytest.LogCaptureFixture) -> None:
    """The turn after it takes its answer for context."""
    spans = [DIALECTS["genai"](t)[0] for t in (turn([1], [2]), turn([1, 2, 3], [4], 2), turn([1, 2, 3, 4, 5], [6], 3))]
    spans[1].attributes["gen_ai.output.token_ids"] = "abc"
    (found,) = rs.trajectories(spans)
    assert list(found.token_ids) == [1, 2, 3, 4, 5, 6] and list(found.loss_mask) == [0, 1, 0, 0, 0, 1]
    assert spans[1].span_id in caplog.text


# -- batches -----------------------------------------------------------------------------------------------------------


def group(dialect: str) -> list[Any]:
    """A GRPO group: four rollouts of one prompt, of several turns each, with a sub-agent, drift and a reward."""
    spans = []
    for member in range(4):
        ids = {"rollout_id": f"ro-{member}", "attempt_id": "at"}
        answer = [10 + member, 20, 30]
        turns = [
            turn([1, 2, 3], answer, f"{member}-1"),
            turn([7, 7], [8, member], f"{member}-2"),  # a sub-agent in between
            turn([1, 2, 3, *answer, 4, 5], [6] * (member + 1), f"{member}-3"),
            turn([7, 7, 8, member, 9], [11], f"{member}-4"),
            turn([1, 2, 3, 10 + member, 2030, 4, 5], [12], f"{member}-5"),  # "20 30" tokenised again
        ]
        spans += [made for one in turns for made in DIALECTS[dialect](one, **ids)]
        spans.append(span("agentlightning.annotation", {"agentlightning.reward.0.value": member / 2}, **ids))
    return spans


def test_a_group_in_any_dialect_is_the_same_batch() -> None:
    """Tokens, masks, log-probabilities and rewards, of seven dialects, two of which trace each call twice."""
    batches = {dialect: rs.collate(rs.trajectories(group(dialect)), pad_id=0) for dialect in DIALECTS}
    first = batches.pop("llm")
    assert first["token_ids"].shape == (12, 12) and first["loss_mask"].sum() == 4 * (3 + 2 + 1 + 1) + 1 + 2 + 3 + 4
    assert list(first["token_ids"][0]) == [1, 2, 3, 10, 20, 30, 4, 5, 6, 0, 0, 0]
    assert list(first["loss_mask"][0]) == [0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0]
    assert list(first["rewards"]) == [member / 2 for member in range(4) for _ in range(3)]
    for dialect, batch in batches.items():
        assert batch.keys() == first.keys()
        for name, values in batch.items():
            assert values.dtype == first[name].dtype and np.array_equal(values, first[name]), (dialect, name)
    reasons = {d: [t.split and t.split.reason for t in rs.trajectories(group(d))] for d in DIALECTS}
    assert set(map(tuple, reasons.values())) == {(None, "other", "drift") * 4}


def test_shapes_of_a_batch() -> None:
    """As documented: padding at the right, nan for what is not known."""
    long, short = read(turn([1, 2], [3]), turn([1, 2, 3, 4], [5], 2), turn([9], [9], 3))
    short = replace(short, logprobs=None, reward=1.0, policy_versions=array("q", [-1, 6]))
    batch = rs.collate(iter([long, short]), pad_id=np.int64(-7))  # type: ignore[arg-type]  # taken all the same
    assert batch["token_ids"].tolist() == [[1, 2, 3, 4, 5], [9, 9, -7, -7, -7]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["policy_versions"].tolist() == [[-1] * 5, [-1, 6, -1, -1, -1]]
    assert batch["lengths"].tolist() == [5, 2]
    assert np.array_equal(batch["rewards"], np.array([np.nan, 1], np.float32), equal_nan=True)
    wanted = np.array([[0, 0, -0.75, 0, -1.25], [0, np.nan, 0, 0, 0]], np.float32)
    assert np.array_equal(batch["logprobs"], wanted, equal_nan=True)
    assert {name: values.dtype.name for name, values in batch.items()} == {
        "token_ids": "int64", "attention_mask": "int64", "loss_mask": "int64", "logprobs": "float32",
        "policy_versions": "int64", "lengths": "int64", "rewards": "float32",
    }  # fmt: skip
    empty = rs.collate([], pad_id=0)
    assert empty["token_ids"].shape == (0, 0) and empty["rewards"].shape == (0,)


@pytest.mark.parametrize("wrong", [{"pad_id": None}, {"pad_id": True}, {"pad_id": 1.5}, {"pad_id": "0"}], ids=str)
def test_a_wrong_pad_id_is_refused(
    wrong: dict[str, None] | dict[str, bool] | dict[str, float] | dict[str, str],
) -> None:
    """By name, and so are rows that are no trajectories."""
    with pytest.raises(rs.InvalidValueError, match="pad_id="):
        rs.collate([], **wrong)
    with pytest.raises(rs.InvalidValueError, match="trajectories=3.*rs.trajectories"):
        rs.collate(3, pad_id=0)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(rs.InvalidValueError, match=r"trajectories\[0\]=.*rs.trajectories"):
        rs.collate(rs.triplets(DIALECTS["genai"](turn([1], [2]))), pad_id=0)  # type: ignore[arg-type]


def test_without_numpy_collate_says_what_to_install() -> None:
    """And the rest works without it."""
    code = """
import sys
sys.modules["numpy"] = None
import raystore as rs
ids = {"gen_ai.input.token_ids": [1], "gen_ai.output.token_ids": [2]}
(made,) = rs.trajectories([rs.Span.from_attributes(attributes=ids)])
try:
    rs.collate([made], pad_id=0)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "rs.collate needs numpy: pip install numpy\n"
