"""The place of torch's own LSTM operators in its dispatcher, and what else stands there.

torch has ``aten::lstm.input`` (a tensor) and ``aten::lstm.data`` (a packed sequence). Both are
compositions, so every dispatch key is free. Ours takes three:

- AutogradCPU and AutogradCUDA, which every call of plain tensors meets, also under ``no_grad``;
- BackendSelect, which ``inference_mode`` leaves in place, and which nothing else asks about: with
  a kernel for CPU instead, ``torch.export`` would no longer decompose the operators.

What is registered stays for the life of the process, because a library that is destroyed beside
running threads calls freed kernels. The handles (``handle.py``) say whether ours runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from throughtime.ops.registration import lasting, register

OPERATORS = ("aten::lstm.input", "aten::lstm.data")
KEYS = ("AutogradCPU", "AutogradCUDA", "BackendSelect")

_STOCK = ("debug", "Tracer", "CompositeImplicitAutograd[alias]")  # what torch registers itself
_HOOKS = (
    "_dispatch_dump",
    "_dispatch_keys",
    "_dispatch_tls_is_dispatch_key_included",
    "_dispatch_tls_local_include_set",
    "_dynamo.eval_frame.set_code_exec_strategy",
    "_parse_dispatch_key",
)
_WAY_OUT = "use throughtime.replace(model), which leaves torch's operators alone"

_placing = threading.Lock()
_placed: set[str] = lasting("_placed", set)


def put_in_place(kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Register a kernel per operator, once per process.

    Raises:
        RuntimeError: if this torch lacks a hook, or something else stands in the place.
    """
    missing = _missing_hooks()
    if missing:
        raise RuntimeError(
            f"accelerate: torch {torch.__version__} has no {' and no '.join(missing)}; {_WAY_OUT}"
        )
    with _placing:
        others = displaced()
        if others is not None:
            raise RuntimeError(f"accelerate: {others}; {_WAY_OUT}")
        for operator, kernel in kernels.items():
            register(torch.library.impl, operator, KEYS, kernel)
            _placed.add(operator)


def displaced() -> str | None:
    """Say what else than torch's and ours is registered for one of the operators, or None."""
    return next(filter(None, map(_foreign, OPERATORS)), None)


def _foreign(operator: str) -> str | None:
    ours = set(KEYS) if operator in _placed else set()
    for line in torch._C._dispatch_dump(operator).splitlines():
        key, registered, place = line.partition(": registered at ")
        key = key.removesuffix(" (inactive)")
        if key in ours and "library.py" in place:
            ours.remove(key)
        elif registered and key not in _STOCK:
            place = place.partition(" ::")[0]
            return f"another implementation of {operator} was registered for {key} at {place}"
    return None


def _missing_hooks() -> list[str]:
    """The names that this torch lacks."""
    missing = []
    for hook in _HOOKS:
        found: Any = torch._C
        for name in hook.split("."):
            found = getattr(found, name, None)
        if found is None:
            missing.append(f"torch._C.{hook}")
    return missing
