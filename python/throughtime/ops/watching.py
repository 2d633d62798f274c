"""What watches the calls of layers: nothing, or what ``throughtime.gradient_flow`` puts here.

A call asks once, in its forward pass. A watched call of compiled kernels runs the watcher's
function in place of its backward operator; the definition shows it every step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from throughtime.ops.autograd import recording

Observe = Callable[[int, Tensor, Tensor], object]
Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Results = TypeVar("Results", bound=tuple[Any, ...])


class Steps(Protocol):
    """One call of a definition that is watched.

    Attributes:
        args: the record that it runs with.
    """

    args: Any

    def observe(self, t: int, h_t: Tensor, c_t: Tensor) -> None:
        """Take the states of a step, as they are in the graph."""

    def finish(self, results: Results) -> Results:
        """Take the results, as they are in the graph, and give what the caller gets."""


class Watcher(Protocol):
    """What is told of calls."""

    def call(self, split: Any, gradient: bool) -> None:
        """Learn that one layer in one direction begins.

        Args:
            split: how its batch is divided into episodes, or None.
            gradient: whether there will be one.
        """

    def kernels(
        self, operation: Any, args: Any, results: tuple[Tensor, ...]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Give what runs in place of the backward operator of this call."""

    def definition(self, args: Any) -> Steps:
        """Give what sees the steps of this call."""


class _Watch(threading.local):
    """Per thread, and set per instance, for the reasons of ``backends.selection._Preference``."""

    def __init__(self) -> None:
        self.watcher: Watcher | None = None


_watch = _Watch()


def watcher() -> Watcher | None:
    """The watcher of the calls that this thread makes now."""
    return _watch.watcher


def watch(watcher: Watcher | None) -> None:
    """Put a watcher in place, or None."""
    _watch.watcher = watcher


def begin(args: tuple[Any, ...], split: Any = None) -> None:
    """Tell the watcher that one layer in one direction begins, its batch divided by ``split``."""
    if _watch.watcher is not None:
        _watch.watcher.call(split, _has_gradient(args))


def watched(run: Callable[[Arguments, Observe | None], Results], args: Arguments) -> Results:
    """Run a definition, which the watcher sees step by step."""
    if _watch.watcher is None or not _has_gradient(args):
        return run(args, None)
    steps = _watch.watcher.definition(args)
    return steps.finish(run(steps.args, steps.observe))


def _has_gradient(args: tuple[Any, ...]) -> bool:
    wanted = (isinstance(x, Tensor) and x.requires_grad for x in args)
    return recording() and any(wanted)


def backward_of(
    operation: Any, args: Any, results: tuple[Tensor, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """What runs in the backward pass of a call that is made now."""
    watcher = _watch.watcher
    if watcher is None:
        run: Callable[..., tuple[Tensor, ...]] = operation.backward_op
        return run
    return watcher.kernels(operation, args, results)
