"""Marks functions for torch.compile without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which imports Dynamo: a second of CPU time.

    Args:
        function: what torch.compile calls while it traces, and whose result it keeps.

    Returns:
        The function, with the mark that Dynamo looks for.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
