"""The handle of ``accelerate``: whether ours runs, with which h-detach, and what has run."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import Counter
from types import TracebackType
from typing import NoReturn

import torch

from throughtime.acceleration.registration import displaced
from throughtime.backends.selection import users_level
from throughtime.functional.checks import check_flag
from throughtime.nn.h_detach import HDetach
from throughtime.ops.registration import lasting

_logger = logging.getLogger("throughtime")


class Acceleration(HDetach):
    """Result of :func:`throughtime.accelerate`; ``str()`` of it says what ran, and how often.

    While it is in force, ``nn.LSTM`` of every thread of the process runs on our kernels. Of several
    handles the one that was made last decides. ``with`` removes it at the end of the block.

    Args:
        detach_prob: as in :func:`throughtime.accelerate`.
        detach_shared: as in :func:`throughtime.accelerate`.
        generator: as in :func:`throughtime.accelerate`.

    Example:
        >>> import torch, throughtime
        >>> lstm = torch.nn.LSTM(3, 4)
        >>> with throughtime.accelerate() as handle:
        ...     output, _ = lstm(torch.randn(5, 2, 3))
        >>> assert sum(handle.calls.values()) == 1 and not handle.in_force
    """

    def __init__(
        self,
        detach_prob: float = 0.0,
        detach_shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        check_flag("accelerate: detach_shared", detach_shared)
        self.detach_prob = detach_prob
        self.detach_shared = detach_shared
        self.generator = generator
        self._calls: Counter[str] = Counter()
        self._process = os.getpid()
        _handles.append(self)

    @property
    def calls(self) -> Counter[str]:
        """Number of calls so far: ``"cpu kernels"``, or ``"original: "`` and the reason."""
        with _lock:
            return self._calls.copy()

    @property
    def in_force(self) -> bool:
        """Whether this handle decides now."""
        return innermost() is self

    def count(self, what: str) -> None:
        """Add one to the calls of a kind, and log the first.

        Args:
            what: a key of ``calls``.
        """
        with _lock:
            self._calls[what] += 1
            first = self._calls[what] == 1
        if first:
            _logger.debug("accelerate: a call of nn.LSTM: %s", what)

    def remove(self) -> None:
        """End it; the handle made before it, if there is one, decides again."""
        if self not in _handles:
            return
        later = len(_handles) - 1 - _handles.index(self)
        _handles.remove(self)
        if later:
            _warn(
                f"accelerate: a handle was removed before {later} made after it, of which the last "
                "stays in force; remove that one too"
            )
        problem = displaced()
        if problem is not None:
            _warn(f"accelerate: {problem}, so not every call came to this handle")

    def __enter__(self) -> Acceleration:
        if self not in _handles:
            raise RuntimeError("accelerate: this handle was removed; call accelerate again")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "accelerate: a handle belongs to its process; a process that is spawned calls "
            "throughtime.accelerate itself, or inherits THROUGHTIME_ACCELERATE=1"
        )

    def __str__(self) -> str:
        state = "in force" if self.in_force else "under another" if self in _handles else "removed"
        where = f"process {os.getpid()}"
        if os.getpid() != self._process:
            where += f", forked from {self._process}"
        lines = [f"accelerate: {state} in {where}, detach_prob={self.detach_prob}"]
        lines += [f"  {count} calls, {what}" for what, count in self.calls.most_common()]
        problem = displaced()
        return "\n".join([*lines, f"  {problem}"] if problem else lines)

    __repr__ = __str__


def innermost() -> Acceleration | None:
    """The handle that decides, or None."""
    try:
        return _handles[-1]
    except IndexError:
        return None


_handles: list[Acceleration] = lasting("_handles", list)  # in the order in which they were made
_lock = threading.Lock()


def _renew_lock() -> None:
    """A thread that held the lock is not in the forked process, and would hold it for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=users_level())
