"""What an evaluation says: its result, and the scores of its items; `LightningStore.evaluate` says what they are for.

Not here: how they are computed (`core.scores`), the evaluation itself (`client.evaluation`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

__all__ = ["EvaluationResult", "EvaluationScore"]

EVALUATION: str = "eval"  #: the tag that names the evaluation of a rollout


def is_sample(one: Any) -> bool:
    """Whether a rollout is a sample of an evaluation, or a group an item of one, so that nobody trains on it."""
    name = one.tags.get(EVALUATION)
    return name is not None and one.mode == "val" and (one.group_id or "").startswith(f"{name}@")


class EvaluationScore(BaseModel):
    """What some items of an evaluation came to; each item counts the same.

    Attributes:
        items: how many there are.
        samples: of them that have finished, those that failed included.
        passed: samples whose reward is above the threshold.
        failed: samples that failed, were cancelled or deleted, or have no reward.
        mean: the reward, of a failed sample the `failure_reward`; None if nothing has finished.
        confidence: the 95 % interval of the mean; None of fewer than two items.
        pass_at: by k the chance that one of k samples of an item passes: of 1, 2, 4, ... and of all samples.
        pass_confidence: the 95 % interval of each of these; those of fewer than two items are left out.
    """

    items: int
    samples: int
    passed: int
    failed: int
    mean: float | None
    confidence: tuple[float, float] | None
    pass_at: dict[int, float]
    pass_confidence: dict[int, tuple[float, float]]


class EvaluationResult(BaseModel):
    """Where an evaluation stands, or what it came to.

    Attributes:
        name: of the evaluation: those of one name are a curve.
        version: of the policy: the one that it is pinned to, else the newest one when it began; None if there was none.
        branch: of that version; each rewind of a feed begins one.
        feed: whose branch that is; None without a feed.
        pinned: whether all attempts run with that version.
        versions: the least and the greatest version that samples ran with; None if they had none.
        status: "running", "finished", or "dropped" with what it had.
        why: it was dropped, or waits for its version; None otherwise.
        undone: whether a restore of its feed has undone its version.
        items: how many it has.
        enqueued: of these, how many its process has enqueued.
        samples: of each item.
        threshold: a sample with a greater reward has passed.
        failure_reward: the reward of a sample that failed.
        start_time: of its first call.
        end_time: when its last sample had finished, or it was dropped; None while it runs.
        overall: the score of all items, so far if it runs.
        environments: the score by environment.
    """

    name: str
    version: int | None
    branch: int
    feed: str | None
    pinned: bool
    versions: tuple[int, int] | None
    status: Literal["running", "finished", "dropped"]
    why: str | None
    undone: bool
    items: int
    enqueued: int
    samples: int
    threshold: float
    failure_reward: float
    start_time: float
    end_time: float | None
    overall: EvaluationScore
    environments: dict[str, EvaluationScore]
