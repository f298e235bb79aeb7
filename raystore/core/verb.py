"""One entry of a table of verbs: what runs, whether it changes anything, which arguments it takes.

Not here: the tables (`verbs`, and the service's own in `shell`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raystore.core.schema import Schema
from raystore.errors import InvalidValueError


@dataclass(slots=True, frozen=True)
class Verb:
    """One entry of the table."""

    run: Callable[..., Any]
    changes: bool = True
    names: tuple[str, ...] = ()  # arguments that name rollouts
    hands: Callable[[dict[str, Any], Any], list[Any]] | None = None  # keys of what an answer hands over, to arguments
    fits: Callable[[Any], bool] = field(init=False)  # whether arguments are what the function's annotations ask for
    schema: Schema = field(init=False)

    def __post_init__(self) -> None:
        schema = Schema(self.run)
        object.__setattr__(self, "schema", schema)
        object.__setattr__(self, "fits", schema.fits)

    def require(self, verb: str, arguments: dict[str, Any]) -> None:
        """Refuse what are no arguments of the verb; nobody's nonsense may fail inside the core."""
        if not self.fits(arguments):
            raise self.schema.refusal(verb, arguments)

    def require_names(self, verb: str, arguments: dict[str, Any]) -> None:
        """Refuse arguments that the verb does not have, and a call without those that it needs."""
        if not self.schema.required <= arguments.keys() or not arguments.keys() <= self.schema.names:
            raise InvalidValueError("operation", (verb, sorted(arguments)), "a verb of this store with its arguments")

    def rollouts_named(self, arguments: dict[str, Any]) -> list[str]:
        """The rollouts a call is about, which time must have caught up with before it runs; it may still be refused."""
        named: list[str] = []
        for name in self.names:
            value = arguments.get(name)
            if isinstance(value, str):
                named.append(value)
            elif isinstance(value, (list, tuple)):
                named.extend(item for item in value if isinstance(item, str))
        return named
