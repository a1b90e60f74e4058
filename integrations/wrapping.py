"""Wrapping functions of other libraries, once however often a registration runs."""

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["wrap_once"]


def wrap_once(owner: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace a function of a module or class by `wrapper(function)`, unless that has been done before.

    Args:
        owner: the module or class.
        name: of its function.
        wrapper: makes the new function, which takes over name and docstring.
    """
    original = getattr(owner, name)
    if not hasattr(original, "_aqlm_tensor"):
        wrapped: Any = functools.wraps(original)(wrapper(original))
        wrapped._aqlm_tensor = True
        setattr(owner, name, wrapped)
