"""How a user's function of responses is to be called: told by the names and places of its parameters."""

import inspect
import itertools
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, Signature
from types import MethodType
from typing import Any, NamedTuple

import torch

# Names of parameters that say what they want, whatever their order
RESERVED = {
    **dict.fromkeys(("responses", "completions", "texts"), "responses"),
    "prompts": "prompts",
    "completion_ids": "completion_ids",
}
# Words in names of parameters that say so, too, unless the data set has a column of that name
RESPONSES = {name + s for name in ("response", "completion", "text", "output", "generation") for s in ("", "s")}
PROMPTS = {"prompt", "prompts", "query", "queries"}
OF_TRL = {"trainer_state", "log_extra", "log_metric"}  # which its trainers give: None is what these stay here
VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
MOST_WRAPPERS = 20  # around each other


class Source(NamedTuple):
    """What a parameter gets: a column of the data set by its name, else responses, prompts or completion_ids."""

    name: str
    is_column: bool = False


@dataclass(frozen=True)
class Arguments:
    """What a function is called with, by position and by keyword; parameters in `kept` keep their defaults."""

    by_position: list[Source]
    by_keyword: dict[str, Source]
    kept: list[str]

    @property
    def columns(self) -> list[str]:
        """The columns of the data set among them."""
        sources = [*self.by_position, *self.by_keyword.values()]
        return list(dict.fromkeys(source.name for source in sources if source.is_column))


RESPONSES_ALONE = Arguments([Source("responses")], {}, [])


def match_arguments(signature: Signature, bound: Container[str] = (), columns: Collection[str] = ()) -> Arguments:
    """What to call a function of this signature with, where the data set has these columns.

    A parameter is understood by its name: responses, prompts, completion_ids, a column. A first one of any other name
    gets the responses. One with a default is filled, too, unless `bound` says that its value was chosen. `**kwargs`
    gets all columns, and what of completions, prompts and completion_ids no parameter has. Raises ValueError with the
    reason where a parameter is not understood; one with a default other than None keeps it.
    """
    parameters = list(signature.parameters.values())
    kinds = [p.kind for p in parameters]
    if kinds == [Parameter.VAR_POSITIONAL]:
        return Arguments([Source("responses"), Source("prompts")], {}, [])
    # 1. what each parameter is
    named = [p for p in parameters if p.kind not in VARIADIC and p.name not in bound]
    sources = {name: Source(role) for name, role in _roles(named, columns).items()}
    for p in named:
        if p.name in columns and p.name not in sources:
            sources[p.name] = Source(p.name, is_column=True)
    unknown = [p for p in named if p.name not in sources]
    for p in unknown:
        if p.default is p.empty or (p.default is None and p.name not in OF_TRL):
            raise ValueError(f"nothing says what {p.name!r} is")
    takes_any_name = Parameter.VAR_KEYWORD in kinds and Parameter.VAR_POSITIONAL not in kinds
    if not takes_any_name and not {Source("responses"), Source("completion_ids")} & {*sources.values()}:
        raise ValueError("it asks for no responses")
    # 2. how it is handed over
    places = [p.name for p in named if p.kind != p.KEYWORD_ONLY]
    filled_places = list(itertools.takewhile(sources.__contains__, places))
    by_position = [sources[name] for name in filled_places]
    by_keyword = {name: source for name, source in sources.items() if name not in filled_places}
    if Parameter.VAR_KEYWORD in kinds:
        taken = {p.name for p in parameters}
        rest = {"completions": Source("responses"), "prompts": Source("prompts")}
        rest |= {"completion_ids": Source("completion_ids")}
        rest = {name: source for name, source in rest.items() if source not in sources.values()}
        rest = {name: Source(name, is_column=True) for name in columns} | rest
        by_keyword |= {name: source for name, source in rest.items() if name not in taken}
    elif Parameter.VAR_POSITIONAL in kinds and filled_places == places and Source("prompts") not in sources.values():
        by_position.append(Source("prompts"))
    return Arguments(by_position, by_keyword, [p.name for p in unknown])


def _roles(named: list[Parameter], columns: Collection[str]) -> dict[str, str]:
    """Which parameter gets the responses, the prompts and the tokens: the first claim to each counts."""
    required = [p for p in named if p.default is p.empty]
    places = [p for p in named if p.kind != p.KEYWORD_ONLY]
    roles: dict[str, str] = {}

    def claim(parameter: Parameter, role: str | None) -> None:
        if role is not None and role not in roles.values():
            roles.setdefault(parameter.name, role)

    # 1. Parameters with a reserved name
    for p in named:
        claim(p, RESERVED.get(p.name.lower()))
    # 2. Required parameters with such a word in their names
    for p in required:
        if p.name not in columns:
            claim(p, _role(p.name.lower().split("_")))
    # 3. The first parameter, if it is required and its name says nothing
    for p in places[:1]:
        if p in required and p.name not in columns:
            claim(p, "responses")
    # 4. Optional parameters with such a name
    for p in named:
        if p.name not in columns:
            claim(p, _role([p.name.lower()]))
    # 5. Whatever might be the responses, also where a column has its name
    if "responses" not in roles.values():
        for p in required:
            if _role(p.name.lower().split("_")) == "responses":
                claim(p, "responses")
    if len(places) == 1:
        claim(places[0], "responses")
    return roles


def _role(words: list[str]) -> str | None:
    """What a parameter whose name consists of these words wants, if that is understood: no ids of texts."""
    if words[-1] in ("id", "ids"):
        return None
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
