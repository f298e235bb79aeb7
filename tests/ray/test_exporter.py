"""The figures of a store as Ray's own Prometheus endpoint gives them, and the dashboard that shows them."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.core.meters import Meters
from raystore.remote.exporter import FIGURES, Exporter
from tests.conftest import MakeRayStore
from tests.helpers import until

ROOT = Path(__file__).parent.parent.parent
LINE = re.compile(r"^ray_(\w+)\{(.*)\} ([-+.\deE]+|NaN)$")


def scrape() -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """What the agents of Ray's nodes export of ours: by name, by labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if (match := LINE.match(line)) and match[1].startswith(("raystore_", "agl_")):
                labels = tuple(sorted(re.findall(r'(\w+)="([^"]*)"', match[2])))
                found.setdefault(match[1], {})[labels] = float(match[3])
    return found


def of(found: Any, name: str, **labels: str) -> float | None:
    """The value of a metric with these labels."""
    wanted = set(labels.items())
    return next((value for key, value in found.get(name, {}).items() if wanted <= set(key)), None)


@pytest.mark.timeout(180)
async def test_ray_exports_the_figures(make_ray_store: MakeRayStore) -> None:
    """All of them, with what the store has counted; and each query of the dashboard finds its metric there."""
    store = make_ray_store()
    name = (await store.actor.describe.remote())["name"]

    async def agent(task: int, ctx: rs.Context) -> float:
        if task == 0 and ctx.attempt.sequence_id == 1:
            raise ValueError("tried again")
        ctx.llm(prompt_ids=[1, 2, 3], response_ids=[4], logprobs=[-1.0], finish_reason="stop")
        return task / 10

    async with rs.RunnerPool(store, agent, size=1, concurrency=4):
        twice = rs.RolloutConfig(max_attempts=2, retry_condition=["failed"])
        made = [await store.enqueue_rollout(number, mode="train", config=twice) for number in range(8)]
        await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in made], timeout=60)
        await store.enqueue_group("waits", 2, queue="nobody")
        waiting = asyncio.create_task(store.take(50, consumer="trainer", timeout=120))

        async def is_there() -> Any:
            found = scrape()
            is_whole = of(found, "agl_rollouts_total", store=name, status="succeeded", mode="train") == 8
            waited = of(found, "raystore_consumer_waited_seconds", store=name, consumer="trainer")
            return (
                found if is_whole and waited and of(found, "raystore_queue_length", store=name, queue="nobody") else 0
            )

        found = await until(is_there, within=90)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    expected = {figure.name for figure in FIGURES}
    assert expected <= found.keys(), expected - found.keys()
    assert of(found, "raystore_attempts_retried_total", store=name, outcome="agent_error") == 1
    assert of(found, "raystore_rollouts_finished_total", store=name, outcome="ok") == 8
    assert of(found, "raystore_tokens_total", store=name, kind="prompt") == 24
    assert of(found, "raystore_turns_total", store=name) == 8
    assert of(found, "raystore_reward", store=name, mode="train") == pytest.approx(0.35)
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {found_ for query in queries for found_ in re.findall(r"\bray_((?:raystore|agl)_\w+)", query)}
    assert named <= found.keys()
    assert len(queries) >= 12


def test_what_was_counted_is_exported_once() -> None:
    """Though a bucket is seen as often as it is looked at."""
    meters = Meters()
    exporter = Exporter.__new__(Exporter)
    exporter._counted = {}

    class Service:
        def figures(self, seconds: float) -> Any:
            return {}, {}, meters.since(0)

    exporter._service = Service()  # type: ignore[assignment]  # the one method that it uses
    meters.at(5.0).enqueued = 3
    assert exporter.read().came[("enqueued",)] == 3
    assert ("enqueued",) not in exporter.read().came
    meters.at(6.0).enqueued += 2
    meters.at(15.0).enqueued += 4
    assert exporter.read().came[("enqueued",)] == 6
