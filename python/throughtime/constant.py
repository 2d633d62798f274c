"""Marks functions for ``torch.compile`` without an import of it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """Do what ``torch.compiler.assume_constant_result`` does, without its import of Dynamo.

    That import takes a second of CPU time.

    Args:
        function: ``torch.compile`` calls it while it traces, and keeps the result. A plain
            function, which may call one that has a cache: Dynamo traces what a cache wraps.

    Returns:
        The same function, with the mark that Dynamo looks for.

    Raises:
        TypeError: if it is wrapped in an object, such as a cache.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"constant_result wants a plain function, got {type(function).__name__}")
    vars(function)["_dynamo_marked_constant"] = True
    return function
