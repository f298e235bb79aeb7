"""Better TypeErrors for calls that do not fit a function: they name the argument that was meant, and the signature.

Python says that a name is unexpected or an argument missing, and not what to write instead. `explained` wraps a
function, which costs a stack frame for each call. So the four methods that are called most are not wrapped: they accept
any arguments, and raise `unfit`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import wraps
from inspect import Parameter, Signature
from typing import Any, Concatenate, ParamSpec, TypeVar

from raystore.errors.text import either, meant

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")

_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
NOT_GIVEN: Any = object()  #: the value of a required argument that was left out, where a method is to say so itself
_THE_REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def explained(function: F) -> F:
    """The same function, of the same kind and signature; whoever calls it wrongly is told how it is called."""

    @wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is None:  # the function did not begin
                raise _told(function, given, named, error) from None
            raise

    kind: Any = called
    if inspect.isasyncgenfunction(function):

        @wraps(function)
        async def kind(*given: Any, **named: Any) -> Any:
            async with aclosing(called(*given, **named)) as items:
                async for item in items:
                    yield item

    elif inspect.iscoroutinefunction(function):

        @wraps(function)
        async def kind(*given: Any, **named: Any) -> Any:
            return await called(*given, **named)

    return kind  # type: ignore[no-any-return]


def explained_with(options: Iterable[Parameter]) -> Callable[[F], F]:
    """The same for a function with these `**options`: its signature lists them, and any other is refused."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        fixed = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        signature = own.replace(parameters=[*fixed, *options])

        @wraps(function)
        def called(*given: Any, **named: Any) -> Any:
            try:
                signature.bind(*given, **named)
            except TypeError as error:
                raise _told(called, given, named, error) from None
            return function(*given, **named)

        called.__signature__ = signature  # type: ignore[attr-defined]
        return called  # type: ignore[return-value]

    return decorate


def explain_methods(cls: type, names: Iterable[str]) -> None:
    """Wrap methods of a class, also inherited ones, in `explained`; those that accept any arguments only hide that."""
    for name in names:
        method = getattr(cls, name, None)
        if not inspect.isfunction(method):
            continue
        signature = inspect.signature(method)
        rest = [parameter for parameter in signature.parameters.values() if parameter.kind in _THE_REST]
        if rest:
            shown = [parameter for parameter in signature.parameters.values() if parameter.kind not in _THE_REST]
            method.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
            required = [one for one in shown[1:] if one.kind in _BY_POSITION and one.default is Parameter.empty]
            method.__defaults__ = (NOT_GIVEN,) * len(required) + (method.__defaults__ or ())
        else:
            setattr(cls, name, explained(method))


def typed_as(form: Callable[Concatenate[Any, P], R]) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, P], R]]:
    """Give a method the signature of another one for type checkers, so that subclasses can override it."""
    return lambda method: method


def unfit(method: Callable[..., Any], unnamed: Sequence[Any], unknown: Mapping[str, Any], **required: Any) -> TypeError:
    """The TypeError for too many positional arguments, unknown keywords, or a required argument that is `NOT_GIVEN`."""
    signature = inspect.signature(method)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    taken = [None for parameter in signature.parameters.values() if parameter.kind in _BY_POSITION]
    named = {} if unnamed else {name: value for name, value in required.items() if value is not NOT_GIVEN}
    return TypeError(_text(method.__name__, signature, [*taken, *unnamed] if unnamed else (), {**named, **unknown}))


def _told(function: Callable[..., Any], given: Sequence[Any], named: Mapping[str, Any], error: TypeError) -> TypeError:
    signature = inspect.signature(function)
    name, first = function.__name__, next(iter(signature.parameters), None)
    if name == "__init__":
        name = function.__qualname__.split(".")[-2]
    if first == "self":
        signature, given = signature.replace(parameters=list(signature.parameters.values())[1:]), given[1:]
    return TypeError(_text(name, signature, given, named) or str(error))


def _text(name: str, signature: Signature, given: Sequence[Any], named: Mapping[str, Any]) -> str:
    """What does not fit, which name was meant, and the form of the call; empty if it cannot be said better."""
    parameters = signature.parameters
    by_position = [parameter.name for parameter in parameters.values() if parameter.kind in _BY_POSITION]
    by_name = [parameter for parameter in parameters if parameter not in by_position]
    needed = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is Parameter.empty and parameter.kind not in _THE_REST
    ]
    missing = [one for one in needed if one not in named and one not in by_position[: len(given)]]
    unknown = [one for one in named if one not in parameters]
    twice = [one for one in by_position[: len(given)] if one in named]
    said = [f"has no argument {one!r}{meant(one, missing) or meant(one, parameters)}" for one in unknown]
    if len(given) > len(by_position):
        form = either([f"{one}=..." for one in (missing or by_name)[:3]])
        rest = f"; give the others by name ({form})" if by_name else ""
        said.append(f"takes {len(by_position) or 'no'} arguments by position, and got {len(given)}{rest}")
    elif missing and not any(meant(one, missing) for one in unknown):
        said.append(f"needs {' and '.join(f'{one}=' for one in missing)}, which was not given")
    said += [f"got {one!r} twice, by position and by name" for one in twice]
    if not said:
        return ""
    shown = [parameter.replace(annotation=Parameter.empty) for parameter in parameters.values()]
    what = ", and ".join(one.removesuffix("?") for one in said)
    return f"{name}() {what}{'?' if said[-1].endswith('?') else '.'} It is called as {name}{Signature(shown)}"
