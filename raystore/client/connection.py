"""What the methods of a client share: the transport, the encoder, pages, and bulk calls in parts.

Not here: any method of the contract.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from raystore.client.pending import Call
from raystore.client.transport import Transport
from raystore.core.verbs import Many
from raystore.errors import AnswerGoneError
from raystore.types import PaginatedResult
from raystore.wire import checks, convert
from raystore.wire.convert import Encoder

T = TypeVar("T")

PART_ITEMS = 512  #: bulk calls are cut into parts of at most so many items ...
PART_BYTES = 1024 * 1024  #: ... and so many bytes, so that one caller cannot hold up the others

TRIES = 3  #: how often a long read that was interrupted is begun again

_chain_ids = itertools.count(1)


class Connection:
    """A transport to a store, and the encoder for its limits."""

    _transport: Transport
    _encoder: Encoder

    async def _page(
        self, verb: str, arguments: dict[str, Any], limit: int, offset: int, open_row: Callable[[Any], T]
    ) -> PaginatedResult[T]:
        limit = checks.whole("limit", limit, at_least=-1)
        offset = checks.whole("offset", offset, at_least=0)
        items, total = await self._many(verb, arguments | {"limit": limit, "offset": offset})
        return convert.build(
            PaginatedResult,
            {"items": [open_row(item) for item in items], "limit": limit, "offset": offset, "total": total},
        )

    async def _many(self, verb: str, arguments: dict[str, Any]) -> tuple[list[Any], Any]:
        """All rows of an answer, and what comes with them; an actor sends a long one in parts.

        If the rest of it is gone (the store was restarted meanwhile) it is asked for again from the beginning.
        """
        for again in range(TRIES, -1, -1):
            answer = await self._transport.call(verb, arguments)
            try:
                return await self._whole(answer)
            except AnswerGoneError:
                if not again:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _whole(self, answer: Any) -> tuple[list[Any], Any]:
        """All rows of an answer of which the first part has come. Raises `AnswerGoneError`."""
        if isinstance(answer, Many):
            return answer.items, answer.total
        items, beside, *more = answer
        token = more[0] if more else None
        while token is not None:
            part, _, token = await self._transport.call("more", {"token": token})
            items += part
        return items, beside

    async def _parts(self, verb: str, parts: list[dict[str, Any]]) -> list[Any]:
        """Run the parts of a bulk call; their answers. A caller that is cancelled takes back what has not left."""
        chain_id = next(_chain_ids)
        calls = self._post_parts(verb, chain_id, parts)
        try:
            return [await call for call in calls]
        except BaseException as error:
            for call in calls:
                self._transport.abandon(call)
            if len(calls) > 1 and not isinstance(error, (Exception, GeneratorExit)):
                self._transport.tell("end_chain", {"chain_id": chain_id})
            raise

    def _post_parts(self, verb: str, chain_id: int, parts: list[dict[str, Any]]) -> list[Call]:
        """Issue the parts of a bulk call together; once one is refused, so are those behind it."""
        if len(parts) == 1:
            return [self._transport.post(verb, parts[0])]
        last = len(parts) - 1
        calls = [
            self._transport.post(verb, arguments | {"chain": [chain_id, number == last]})
            for number, arguments in enumerate(parts)
        ]
        for call in calls[1:]:
            call.leader = calls[0]
        return calls


def cut(sizes: list[int]) -> list[tuple[int, int]]:
    """Where to cut a list of items of these sizes."""
    cuts, size = [0], 0
    for index, item in enumerate(sizes):
        if index > cuts[-1] and (index - cuts[-1] == PART_ITEMS or size + item > PART_BYTES):
            cuts.append(index)
            size = 0
        size += item
    ends = [*cuts[1:], len(sizes)]
    return [(first, last) for first, last in zip(cuts, ends, strict=True) if last > first]
