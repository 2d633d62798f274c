"""The one way in which this package registers anything with torch.

torch keeps registrations for the life of the process, and compiled code holds on to operators, but
the modules of this package may run again: by ``importlib.reload``, or when they are imported after
they were purged from ``sys.modules``. So everything is registered once, and what is registered
calls the functions that the last import gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Per registration the functions that it calls now. They lie beside the operators and live as long.
_functions: dict[tuple[object, ...], dict[int | str, Callable[..., Any]]] = vars(
    torch.ops.throughtime
).setdefault("_functions", {})


def register(registrar: Callable[..., Any], operator: str, *details: Any, **options: Any) -> None:
    """``registrar("throughtime::operator", *details, **options)``, but once per process.

    A repetition only replaces the functions among ``details`` and ``options``.

    Args:
        registrar: a function of ``torch.library``: ``define``, ``impl``, ``register_fake``,
            ``register_autograd`` or ``register_vmap``.
        operator: its name, without the namespace.
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
        f"throughtime::{operator}",
        *(calls.get(place, detail) for place, detail in enumerate(details)),
        **{name: calls.get(name, option) for name, option in options.items()},
    )
    _functions[key] = functions


def _call(functions: dict[int | str, Callable[..., Any]], name: int | str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return functions[name](*args, **kwargs)

    return call
