"""Which backend runs: argument > ``with backend(...)`` > THROUGHTIME_BACKEND > "auto".

An explicit choice, from any of the first three, runs or raises; only "auto" looks further.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from throughtime.backends.backend import (
    NAMES,
    OPERATIONS,
    ORDER,
    Backend,
    BackendName,
    Request,
    can_run,
    passed_over,
    unknown,
)
from throughtime.backends.requirements import missing_kernels
from throughtime.constant import constant_result

VARIABLE = "THROUGHTIME_BACKEND"

_logger = logging.getLogger("throughtime")
_NOT_THE_USERS = tuple(
    str(folder) + os.sep for folder in (Path(__file__).parents[1], Path(torch.__file__).parent)
)


class _Preference(threading.local):
    """The name set by ``with backend(...)`` in this thread.

    A thread-local and not a ContextVar, because Dynamo cannot trace ContextVar.get. It does guard
    on an attribute of a thread-local, and evaluates the guard in the calling thread, so that a
    compiled function follows the context it is called in. The attribute has to be set per instance
    (in ``__init__``, which runs once per thread): a class attribute would be taken for a constant.
    """

    def __init__(self) -> None:
        self.name: str | None = None


_preference = _Preference()
_warned: set[str] = set()


class backend:
    """Chooses the backend of every layer that this thread calls inside a ``with`` block.

    A layer's own ``backend=`` argument, other than ``"auto"``, has precedence.

    Args:
        name: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError: if ``name`` is not a backend.

    Example:
        >>> import torch, throughtime
        >>> lstm = throughtime.LSTM(3, 2)
        >>> with throughtime.backend("reference"):
        ...     output, _ = lstm(torch.randn(5, 4, 3))
        >>> assert output.shape == (5, 4, 2)
    """

    def __init__(self, name: BackendName) -> None:
        check_name(name)
        self.name = name
        self.previous: list[str | None] = []

    def __enter__(self) -> None:
        self.previous.append(_preference.name)
        _preference.name = self.name

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _preference.name = self.previous.pop()


def check_name(name: str, source: str = "backend") -> None:
    """Raise ValueError, naming ``source``, unless ``name`` is a backend or "auto"."""
    if name not in NAMES:
        raise ValueError(unknown(name, source))


def preferred(argument: str) -> tuple[str, str]:
    """The name in force and where it comes from, for a layer whose argument is ``argument``."""
    if argument != "auto":
        check_name(argument)
        return argument, f"backend={argument!r}"
    name = _preference.name
    if name is not None:
        return name, f"throughtime.backend({name!r})"
    variable = os.environ.get(VARIABLE)
    if variable:
        check_name(variable, f"environment variable {VARIABLE}")
        return variable, f"environment variable {VARIABLE}={variable}"
    return "auto", "backend='auto'"


def choose(argument: str, request: Request) -> str:
    """The backend that runs ``request``.

    Args:
        argument: what the layer was given as ``backend=``.
        request: what is to be run.

    Returns:
        A name other than "auto".

    Raises:
        RuntimeError: if an explicit choice cannot run; it never falls back.
        ValueError: if a name is not a backend.
    """
    name, source = preferred(argument)
    if name != "auto":
        reason = can_run(name, request)
        if reason is not None:
            raise RuntimeError(f"{source} cannot run this {request.op}: {reason}")
        return name
    reasons: list[str] = []
    for candidate in ORDER:
        reason = passed_over(candidate, request)
        if reason is None:
            _report(request.op, candidate, tuple(reasons))
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError(f"no backend can run this {request.op}: " + "; ".join(reasons))


def chosen(argument: str, request: Request) -> Backend[Any, Any]:
    """The backend that :func:`choose` names."""
    return OPERATIONS[request.op][choose(argument, request)]


@constant_result
def _report(op: str, chosen: str, reasons: tuple[str, ...]) -> None:
    """Log why faster backends were passed over; runs while tracing, so compiled code tells too."""
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("%s runs on backend %r; passed over: %s", op, chosen, "; ".join(reasons))
    if chosen == "reference":
        reason = missing_kernels()
        if reason is not None and any(reason in passed for passed in reasons):
            warn_once(f"throughtime runs its slow pure PyTorch {op}: {reason}")


def warn_once(message: str) -> None:
    """Warn once per process, whatever filters and places the caller has."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=users_level())


def users_level() -> int:
    """The ``stacklevel`` of the first line, seen from the caller, that is not ours or torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    return level


def configure_logging() -> None:
    """Give the "throughtime" logger the level in THROUGHTIME_LOG_LEVEL, and a handler to show it.

    Raises:
        ValueError: if the variable holds no level of the logging module.
    """
    level = os.environ.get("THROUGHTIME_LOG_LEVEL")
    if not level:
        return
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if level.upper() not in levels:
        raise ValueError(
            "environment variable THROUGHTIME_LOG_LEVEL should be one of "
            f"{', '.join(levels)}, got {level!r}"
        )
    _logger.setLevel(level.upper())
    if not _logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        _logger.addHandler(handler)
