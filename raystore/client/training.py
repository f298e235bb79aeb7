"""Training on each finished rollout exactly once: batches of a consumer, tied to the checkpoints of its model.

Not here: what each method means (`raystore.api`), what decides (`raystore.core.consumers`).
"""

from __future__ import annotations

from raystore import convert
from raystore.client.connection import Connection
from raystore.convert import validated
from raystore.types import Batch, LedgerEntry


class TrainingMethods(Connection):
    """Training on each finished rollout exactly once."""

    async def take(self, n: int, *, consumer: str, timeout: float = 0.0) -> Batch:
        arguments = {
            "consumer": convert.identifier("consumer", consumer),
            "count": convert.whole("n", n, at_least=1),
            "timeout": convert.duration("timeout", timeout),
        }
        items, number = await self._many("take", arguments)
        rollouts = [convert.pair(item) for item in items]
        return convert.build(Batch, {"consumer": consumer, "number": number, "rollouts": rollouts})

    async def ack(self, batch: Batch, *, step: int, note: str | None = None) -> None:
        named = _named(batch) | {"at_step": convert.whole("step", step, at_least=0)}
        await self._transport.call("ack", named | {"note": convert.optional_text("note", note)})

    async def nack(self, batch: Batch) -> None:
        await self._transport.call("nack", _named(batch))

    async def checkpoint(self, consumer: str, step: int) -> int:
        return int(await self._transport.call("checkpoint", _at(consumer, step)))

    async def rewind(self, consumer: str, step: int) -> int:
        return int(await self._transport.call("rewind", _at(consumer, step)))

    async def ledger(self, consumer: str) -> list[LedgerEntry]:
        rows, _ = await self._many("ledger", {"consumer": convert.identifier("consumer", consumer)})
        names = tuple(LedgerEntry.model_fields)
        return [convert.build(LedgerEntry, dict(zip(names, row, strict=True))) for row in rows]


def _named(batch: Batch) -> dict[str, object]:
    values = validated(Batch, batch).__dict__  # it may have been changed since, or made, without validation
    return {
        "consumer": convert.identifier("batch.consumer", values.get("consumer")),
        "batch": convert.whole("batch.number", values.get("number"), at_least=0),
    }


def _at(consumer: str, step: int) -> dict[str, object]:
    return {"consumer": convert.identifier("consumer", consumer), "at_step": convert.whole("step", step, at_least=0)}
