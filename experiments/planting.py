"""Planting: replaces a function of the product while training runs. The product has no switch for it."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

Function = Callable[..., Any]


@dataclass(frozen=True)
class Substitute:
    """A function, and owner.replaces, in whose place it stands.

    It gets what it replaces as `right`, and the arguments of each call by name.
    """

    owner: Any
    replaces: str
    function: Function


@contextmanager
def planted(*substitutes: Substitute | None) -> Iterator[None]:
    """A context in which the product has these functions; None plants nothing."""
    with ExitStack() as stack:
        for substitute in substitutes:
            if substitute is not None:
                stack.enter_context(replaced(substitute.owner, substitute.replaces, by_name(substitute)))
        yield


def by_name(substitute: Substitute) -> Function:
    """The function as callers of what it replaces call it."""
    right = inspect.getattr_static(substitute.owner, substitute.replaces)
    signature = inspect.signature(right)

    def call_right(*args: Any, **named: Any) -> Any:
        call = signature.bind(*args, **named)
        return right(*call.args, **call.kwargs)  # a decorator may take no names

    @functools.wraps(right)
    def other(*args: Any, **named: Any) -> Any:
        return substitute.function(call_right, **signature.bind(*args, **named).arguments)

    return other


@contextmanager
def replaced(owner: Any, name: str, other: Any) -> Iterator[None]:
    """A context in which `other` stands for owner.name: in that class, or in every module that imported it by name."""
    right, places = getattr(owner, name), [owner]
    if inspect.ismodule(owner):
        places = [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is right]
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch.object(place, name, other))
        yield
