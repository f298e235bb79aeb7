"""What users write, as a type checker sees it: `tests/test_types.py` runs mypy in its strict form on this file.

Never run. Every way to a rollout gives its attempt without a question first, and what is misspelt is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import raystore as rs


async def every_way_to_a_rollout(store: rs.LightningStore) -> list[rs.Attempt]:
    """Rollouts from every method that gives one."""
    started: rs.AttemptedRollout = await store.start_rollout("x")
    claimed: rs.AttemptedRollout | None = await store.dequeue_rollout("w")
    attempts: list[rs.Attempt] = [started.attempt]
    if claimed is not None:
        attempts.append(claimed.attempt)
    attempts += [r.attempt for r in await store.dequeue_many_rollouts(limit=2)]
    attempts += [r.attempt for r in await store.query_rollouts(status_in=["running"])]
    attempts += [r.attempt for r in await store.wait_for_rollouts(rollout_ids=["x"], timeout=1)]
    attempts += [r.attempt for r in await store.cancel_rollouts(["x"])]
    attempts += [r.attempt for r in await store.requeue(["x"])]
    attempts += [r.attempt for r in (await store.completed()).items]
    attempts += [r.attempt for r in (await store.take(8, consumer="t")).rollouts]
    attempts += [r.attempt for g in (await store.take_groups(8, consumer="g")).groups for r in g.rollouts]
    attempts += [r.attempt async for r in store.as_completed(["x"])]
    found = await store.get_rollout_by_id("x")
    attempts.append(found.attempt)
    waited = await store.wait_for_rollout("x", timeout=1)
    if waited is not None:
        attempts.append(waited.attempt)
    updated = await store.update_rollout("x", status="running")
    attempts += [updated.attempt, (await store.start_attempt("x")).attempt]
    return attempts


async def one_that_may_not_have_been_attempted(store: rs.LightningStore) -> str:
    """The question may be asked, and narrows."""
    found = await store.get_rollout_by_id("x")
    if found is None:
        return "unknown"
    if isinstance(found, rs.AttemptedRollout):
        return found.attempt.status
    rollout: rs.Rollout = found
    return rollout.status


def blocking(store: rs.RayLightningStore) -> list[int | None]:
    """The same through the blocking twin."""
    versions = [r.attempt.policy_version for r in store.sync.wait_for_rollouts(rollout_ids=["x"])]
    versions += [r.attempt.policy_version for r in store.sync.as_completed(["x"])]
    return [*versions, store.sync.get_rollout_by_id("x").attempt.policy_version]


async def what_is_misspelt(store: rs.LightningStore) -> None:
    """Each ignored error must be one: mypy says which is not needed."""
    found = await store.get_rollout_by_id("x")
    print(found.atempt)  # type: ignore[union-attr]
    print((await store.take(1, consumer="t")).rollouts[0].attempt.sttus)  # type: ignore[union-attr]
    print(rs.Rolout)  # type: ignore[attr-defined]
    print(rs.to_record)  # type: ignore[attr-defined]
    rs.start(durabilty="power")  # type: ignore[call-arg]
    rs.InMemoryLightningStore(on_memory_full="wait")  # type: ignore[arg-type]
    rs.ClaimLostError("ro-1")  # type: ignore[call-arg]
    rs.TraceStatus(status_code="FINE")  # type: ignore[arg-type]


async def groups(store: rs.LightningStore) -> list[float | None]:
    """Made alone and together, found again, and taken whole."""
    made = await store.enqueue_group("x", 8, min_size=4, spare=1, replace=2, deadline_seconds=600)
    requests = [rs.EnqueueGroupRequest(input=n, n=8, group_id=f"g{n}") for n in range(4)]
    members: list[str] = [i for group in await store.enqueue_many_groups(requests) for i in group.members]
    found: rs.Group | None = await store.get_group(made[0].group_id or "")
    status: rs.GroupStatus = "complete"
    if found is not None and found.status == status:
        print(found.why, found.deadline_time, members)
    print(len(await store.query_groups(status_in=["open", "failed"])))
    await store.query_groups(status_in=["opened"])  # type: ignore[list-item]
    batch: rs.GroupBatch = await store.take_groups(4, consumer="t", timeout=1)
    await store.ack(batch, step=1)
    taken: rs.TakenGroup = batch.groups[0]
    return taken.rewards


async def the_rest(store: rs.LightningStore) -> None:
    """Names and answers that are no rollouts."""
    resources: dict[str, rs.ResourceUnion] = {"p": rs.PromptTemplate(template="t", engine="f-string")}
    await store.add_resources(resources)
    value: rs.AttributeValue = [1, 2]
    span = rs.Span.from_attributes(attributes={"k": value}, status=rs.TraceStatus(status_code="OK"))
    await store.add_span(span)
    consumers = (await store.statistics())["consumers"]
    print(consumers["t"]["checkpoint"], (await store.statistics())["total_spans"])


def facts_of_errors(error: rs.StoreError) -> str | None:
    """What an error is about, without its text."""
    match error:
        case rs.JournalHeldError(path=path, record=record):
            return f"{path}:{record + 1}"
        case rs.OverloadedError() | rs.JournalFullError():
            return f"in {error.retry_after_seconds:.1f} s"
        case rs.ConflictError():
            return error.rollout_id
    return None


def options_of_a_store() -> rs.InMemoryLightningStore:
    """Written apart from the call."""
    options: rs.StoreOptions = {"retention": {"max_rollouts": 3}, "consumers": ["t"], "limits": {"span_bytes": 2**20}}
    return rs.InMemoryLightningStore(**options)


async def any_store_will_do() -> None:
    """Both stores are stores, and can be made."""
    for store in (rs.InMemoryLightningStore(), rs.start()):
        await every_way_to_a_rollout(store)


class Logged(rs.InMemoryLightningStore):
    """A store of one's own, whose methods have the forms of the contract."""

    async def add_span(self, span: rs.Span) -> rs.Span | None:
        """Add a span."""
        return await super().add_span(span)

    async def dequeue_rollout(
        self, worker_id: str | None = None, *, timeout: float = 0.0, queues: Sequence[str] = ("default",)
    ) -> rs.AttemptedRollout | None:
        """Claim a rollout."""
        return await super().dequeue_rollout(worker_id, timeout=timeout, queues=queues)
