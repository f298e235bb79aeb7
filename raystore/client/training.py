"""Training on each finished rollout exactly once: batches of a consumer, tied to the checkpoints of its model.

Not here: what each method means (`raystore.api`), what decides (`raystore.core.training`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raystore.client.connection import Connection
from raystore.errors import AnswerGoneError
from raystore.types import Batch, LedgerEntry, RolloutMode, RolloutStatus, TagValue
from raystore.wire import checks, convert
from raystore.wire.checks import validated

A_BATCH = "pass what take() gave"


class TrainingMethods(Connection):
    """Training on each finished rollout exactly once."""

    async def take(
        self,
        n: int,
        *,
        consumer: str,
        timeout: float = 0.0,
        mode: RolloutMode | None = None,
        tags: Mapping[str, TagValue] | None = None,
        queue: str | None = None,
        group_id: str | None = None,
        status_in: Sequence[RolloutStatus] | None = None,
        max_open: int = 1,
    ) -> Batch:
        arguments: dict[str, Any] = {
            "consumer": checks.identifier("consumer", consumer),
            "count": checks.whole("n", n, at_least=1),
            "timeout": checks.duration("timeout", timeout),
            **checks.filter_arguments(mode=mode, tags=tags, queue=queue, group_id=group_id, status_in=status_in),
        }
        if checks.whole("max_open", max_open, at_least=1) != 1:
            arguments["max_open"] = max_open
        answer = await self._transport.call("take", arguments)
        number = answer[1]
        try:
            items, _ = await self._whole(answer)
        except AnswerGoneError:  # the store was restarted between the parts of a long answer
            items, _ = await self._many("get_batch", {"consumer": consumer, "batch": number})
        except GeneratorExit:
            raise
        except BaseException:  # its caller has gone between the parts
            self._transport.post("nack", {"consumer": consumer, "batch": number})
            raise
        rollouts = [convert.to_any_rollout(item) for item in items]
        return convert.build(Batch, {"consumer": consumer, "number": number, "rollouts": rollouts})

    async def ack(self, batch: Batch, *, step: int, note: str | None = None) -> None:
        named = _named(batch) | {"at_step": checks.whole("step", step, at_least=0)}
        await self._transport.call("ack", named | {"note": checks.optional_text("note", note)})

    async def nack(self, batch: Batch) -> None:
        await self._transport.call("nack", _named(batch))

    async def checkpoint(self, consumer: str, step: int) -> int:
        return int(await self._transport.call("checkpoint", _at(consumer, step)))

    async def rewind(self, consumer: str, step: int) -> int:
        return int(await self._transport.call("rewind", _at(consumer, step)))

    async def forget_consumer(self, name: str) -> int:
        return int(await self._transport.call("forget_consumer", {"consumer": checks.identifier("name", name)}))

    async def ledger(self, consumer: str) -> list[LedgerEntry]:
        rows, _ = await self._many("ledger", {"consumer": checks.identifier("consumer", consumer)})
        names = tuple(LedgerEntry.model_fields)
        return [convert.build(LedgerEntry, dict(zip(names, row, strict=True))) for row in rows]


def _named(batch: Batch) -> dict[str, object]:
    values = validated(
        "batch", Batch, batch, A_BATCH
    ).__dict__  # it may have been changed since, or made, without validation
    return {
        "consumer": checks.identifier("batch.consumer", values.get("consumer")),
        "batch": checks.whole("batch.number", values.get("number"), at_least=0),
    }


def _at(consumer: str, step: int) -> dict[str, object]:
    return {"consumer": checks.identifier("consumer", consumer), "at_step": checks.whole("step", step, at_least=0)}
