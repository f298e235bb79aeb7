"""The text of errors: words that our messages have in common, calls that do not fit, and the errors of agents.

`explained` has whoever calls a function wrongly told which argument was meant, and how the function is called.
"""

from __future__ import annotations

import difflib
import inspect
import pickle
import reprlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import wraps
from inspect import Parameter, Signature
from typing import Any, Concatenate, ParamSpec, TypeVar

PART_LETTERS = 3  #: length from which a name that is part of another one counts as near it
NAMED = 5  #: things of one kind that a message names
SHOWN = 100  #: characters of a value that a message shows

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = SHOWN


def meant(name: Any, known: Iterable[str]) -> str:
    """The known name that is nearest, as the end of a sentence; empty if none is near."""
    if not isinstance(name, str) or not 0 < len(name) < 100:
        return ""
    names = [one for one in known if isinstance(one, str)]
    found = difflib.get_close_matches(name, names, n=1)
    if not found and len(name) >= PART_LETTERS:
        found = [one for one in names if len(one) >= PART_LETTERS and (one in name or name in one)]
    return f"; did you mean {found[0]!r}?" if found else ""


def either(names: Sequence[str]) -> str:
    """Alternatives as a sentence has them: a, b or c."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def quoted(names: Iterable[str]) -> str:
    """Names in quotation marks: 'a', 'b'."""
    return ", ".join(map(repr, names))


def shown(value: Any) -> Any:
    """A value as an error carries it: plain, and no longer than a line. Shown again, it stays the same."""
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63):
        return value
    if type(value) is str:
        return value if len(value) <= SHOWN + 40 else f"{value[:SHOWN]}... ({len(value)} characters)"
    return f"<{type(value).__name__} {_SHORT.repr(value)[:SHOWN]}>"


# -- calls that do not fit a function ----------------------------------------------------------------------------------

# Python says that a name is unexpected or an argument missing, and not what to write instead. `explained` wraps a
# function, which costs a stack frame for each call. So the four methods that are called most are not wrapped: they
# accept any arguments, and raise `unfit`.

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


# -- errors that agents raise ------------------------------------------------------------------------------------------

# An error's class may have a `__str__` that raises, or attributes that cannot be set (a frozen dataclass). Users must
# see their error all the same, so no function here raises.

NOTE = "raystore: "  #: begins each of our notes
MAX_CAUSES = 20  #: of an error that are looked at; a chain of causes may be circular


def text_of(error: BaseException) -> str:
    """`str(error)`, or a placeholder if that raises."""
    try:
        return str(error)
    except Exception as another:
        return f"<its text cannot be had: {type(another).__name__}>"


def summary(error: BaseException) -> str:
    """An error in one line: its class and its text."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def report(error: BaseException) -> str:
    """An error with its traceback, causes and notes; only its summary if Python cannot format them."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception as another:
        return f"{summary(error)}\n(its traceback cannot be shown: {type(another).__name__})\n"


def last_line(text: str) -> str:
    """The most informative line of a report: the last one, which names the error, with our note if one follows it."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip(" |+-"))]  # without frames of groups
    if not lines:
        return ""
    return f"{lines[-2]}; {lines[-1]}" if len(lines) > 1 and lines[-1].startswith(NOTE) else lines[-1]


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, once, if its class permits."""
    try:
        if NOTE + note not in getattr(error, "__notes__", ()):
            error.add_note(NOTE + note)
    except Exception:  # noqa: S110 - the error matters more than the note
        pass


def portable(error: Exception) -> Exception:
    """The error itself if it has a text and can be pickled, else a RuntimeError with its last line."""
    try:
        str(error)
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(last_line(report(error)))
    return error


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group and of the groups in it; of any other error, itself."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, newest first, each group followed by its leaves."""
    for _ in range(MAX_CAUSES):
        if error is None:
            return
        yield error
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        error = error.__cause__ or error.__context__
