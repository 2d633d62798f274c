"""The one way in which this package registers anything with torch.

torch keeps registrations for the life of the process, and compiled code holds on to operators, but
the modules of this package may run again: by ``importlib.reload``, or when they are imported after
they were purged from ``sys.modules``. So everything is registered once, and what is registered
calls the functions that the last import gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Lasting = TypeVar("Lasting")


def lasting(name: str, make: Callable[[], Lasting]) -> Lasting:
    """What lies beside the operators and lives as long: made by the first import, then the same."""
    found: Lasting = vars(torch.ops.throughtime).setdefault(name, make())
    return found


# Per registration the functions that it calls now.
_functions: dict[tuple[object, ...], dict[int | str, Callable[..., Any]]] = lasting(
    "_functions", dict
)


def register(registrar: Callable[..., Any], operator: str, *details: Any, **options: Any) -> None:
    """``registrar("throughtime::operator", *details, **options)``, but once per process.

    A repetition only replaces the functions among ``details`` and ``options``.

    Args:
        registrar: a function of ``torch.library``: ``define``, ``impl``, ``register_fake``,
            ``register_autograd`` or ``register_vmap``.
        operator: its name; without a namespace it is one of this package.
        details, options: what the registrar takes; hashable.

    Raises:
        RuntimeError: if torch refuses, as it does an operator that it has with another schema.

    Example:
        >>> import torch
        >>> from throughtime.ops.registration import register
        >>> for amount in (1, 2):
        ...     register(torch.library.define, "add_amount", "(Tensor x) -> Tensor")
        ...     register(torch.library.impl, "add_amount", "cpu", lambda x: x + amount)
        >>> torch.ops.throughtime.add_amount(torch.zeros(1))
        tensor([2.])
    """
    given = dict(enumerate(details)) | options
    functions = {name: value for name, value in given.items() if callable(value)}
    rest = tuple((name, value) for name, value in given.items() if name not in functions)
    key = (registrar, operator, *rest)
    if key in _functions:
        _functions[key].update(functions)
        return
    calls = {name: _call(functions, name) for name in functions}
    registrar(
        operator if "::" in operator else f"throughtime::{operator}",
        *(calls.get(place, detail) for place, detail in enumerate(details)),
        **{name: calls.get(name, option) for name, option in options.items()},
    )
    _functions[key] = functions


def _call(functions: dict[int | str, Callable[..., Any]], name: int | str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return functions[name](*args, **kwargs)

    _hide_from_dynamo(call)
    return call


def _hide_from_dynamo(function: Callable[..., Any]) -> None:
    """Do what ``torch.compiler.disable`` does, without its import of Dynamo (a second).

    Between the parts of a graph that it breaks, Dynamo would trace what an operator does.
    """
    eval_frame: Any = torch._C._dynamo.eval_frame
    skip = eval_frame._FrameAction.SKIP
    strategy = eval_frame._FrameExecStrategy(skip, skip)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
