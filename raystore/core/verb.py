"""One entry of a table of verbs: what runs, whether it changes anything, which arguments it takes.

Not here: the tables (`verbs`, and the service's own in `shell`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raystore.errors import InvalidValueError


@dataclass(slots=True, frozen=True)
class Verb:
    """One entry of the table."""

    run: Callable[..., Any]
    changes: bool = True
    names: tuple[str, ...] = ()  # arguments that name rollouts
    _known: frozenset[str] | None = field(init=False)  # None: any, handed on to a query, which changes nothing
    _required: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        code = self.run.__code__
        known = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
        takes_any = bool(code.co_flags & inspect.CO_VARKEYWORDS)
        object.__setattr__(self, "_known", None if takes_any else frozenset(known))
        object.__setattr__(self, "_required", frozenset(known) - frozenset(self.run.__kwdefaults__ or ()))

    def require(self, verb: str, arguments: dict[str, Any]) -> None:
        """Refuse what are no arguments of the verb; a peer's nonsense must not fail inside the core."""
        self.require_names(verb, arguments)

    def require_names(self, verb: str, arguments: dict[str, Any]) -> None:
        """Refuse arguments that the verb does not have, and a call without those that it needs."""
        if not self._required <= arguments.keys() or not (self._known is None or arguments.keys() <= self._known):
            raise InvalidValueError("operation", (verb, sorted(arguments)), "a verb of this store with its arguments")

    def rollouts_named(self, arguments: dict[str, Any]) -> list[str]:
        """The rollouts a call is about, which time must have caught up with before it runs."""
        named: list[str] = []
        for name in self.names:
            value = arguments.get(name)
            if isinstance(value, str):
                named.append(value)
            elif value is not None:
                named.extend(value)
        return named
