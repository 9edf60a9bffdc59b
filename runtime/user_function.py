"""How a user's function of responses and prompts is to be called: told by the names and places of its parameters."""

import inspect
import itertools
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, Signature
from types import MethodType
from typing import Any

import torch

# Names of parameters that say what they want, whatever their order; other names are understood by order.
RESPONSES = {name + s for name in ("response", "completion", "text", "output", "generation") for s in ("", "s")}
PROMPTS = {"prompt", "prompts", "query", "queries"}
VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
MOST_WRAPPERS = 20  # around each other


@dataclass(frozen=True)
class Arguments:
    """What a function is called with, by position and by keyword: each is "responses" or "prompts"."""

    by_position: list[str]
    by_keyword: dict[str, str]


def match_arguments(signature: Signature, bound: Container[str] = ()) -> Arguments | None:
    """What to call a function of this signature with; None where that is not clear.

    A parameter is understood by its name, or else by its place: responses first, prompts second. One with a default is
    filled where its name is understood, unless `bound` says that its value was chosen. `**kwargs` gets the prompts.
    """
    parameters = list(signature.parameters.values())
    kinds = [p.kind for p in parameters]
    if kinds == [Parameter.VAR_POSITIONAL]:
        return Arguments(["responses", "prompts"], {})
    named = [p for p in parameters if p.kind not in VARIADIC and p.name not in bound]
    roles = _roles(named)
    required = [p.name for p in named if p.default is p.empty]
    if "responses" not in roles.values() or any(name not in roles for name in required):
        return None

    places = [p.name for p in named if p.kind != p.KEYWORD_ONLY]
    filled_places = list(itertools.takewhile(roles.__contains__, places))
    by_position = [roles[name] for name in filled_places]
    by_keyword = {name: role for name, role in roles.items() if name not in filled_places}
    if "prompts" not in roles.values():
        if Parameter.VAR_KEYWORD in kinds:
            by_keyword["prompts"] = "prompts"
        elif Parameter.VAR_POSITIONAL in kinds and filled_places == places:
            by_position.append("prompts")
    return Arguments(by_position, by_keyword)


def _roles(named: list[Parameter]) -> dict[str, str]:
    """Which parameter gets the responses and which the prompts: the first claim to either counts."""
    required = [p for p in named if p.default is p.empty]
    places = [p for p in named if p.kind != p.KEYWORD_ONLY]
    claims: list[tuple[str, str | None]] = []
    # 1. A required parameter with such a word in its name
    claims += [(p.name, _role(p.name.lower().split("_"))) for p in required]
    # 2. A required parameter whose name says nothing, by its place
    for parameter, role in zip(places, ("responses", "prompts"), strict=False):
        if parameter in required and _role(parameter.name.lower().split("_")) is None:
            claims.append((parameter.name, role))
    # 3. Any parameter with such a name
    claims += [(p.name, _role([p.name.lower()])) for p in named]
    # 4. The first
    claims += [(p.name, "responses") for p in places[:1]]
    roles: dict[str, str] = {}
    for name, claimed in claims:
        if claimed is not None and claimed not in roles.values():
            roles.setdefault(name, claimed)
    return roles


def _role(words: list[str]) -> str | None:
    """What a parameter whose name consists of these words wants, if that is understood."""
    if PROMPTS & {*words}:
        return "prompts"
    return "responses" if RESPONSES & {*words} else None


def called_signature(function: Callable[..., Any]) -> Signature:
    """The signature of a function, or of what a wrapper that takes anything passes it on to (raises ValueError)."""
    signature = inspect.signature(function, follow_wrapped=False)
    for _ in range(MOST_WRAPPERS):
        takes_anything = signature.parameters and all(p.kind in VARIADIC for p in signature.parameters.values())
        wrapped = _wrapped(function) if takes_anything else None
        if wrapped is None:
            break
        function = wrapped
        signature = inspect.signature(function, follow_wrapped=False)
    return signature


def _wrapped(function: Any) -> Callable[..., Any] | None:
    """The one function that a wrapper calls, where it can be told; inspect knows only those made by functools.wraps."""
    if isinstance(function, partial):
        inner = _wrapped(function.func)
        return inner and partial(inner, *function.args, **function.keywords)
    if inspect.ismethod(function):
        inner = _wrapped(function.__func__)
        return inner and MethodType(inner, function.__self__)
    if isinstance(function, torch.nn.Module):
        return function.forward
    if hasattr(function, "__wrapped__"):
        return function.__wrapped__
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        candidates = list((variables.nonlocals or variables.globals).values())
    else:
        candidates = list(getattr(function, "__dict__", {}).values())
    functions = [x for x in candidates if callable(x) and not isinstance(x, type)]
    if not functions and not inspect.isfunction(function):
        return _wrapped(MethodType(type(function).__call__, function))
    return functions[0] if len(functions) == 1 else None
