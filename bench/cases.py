"""Which shapes are measured, and how much arithmetic each of them needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import astuple, dataclass

MODES = ("forward+backward", "forward", "inference")


@dataclass(frozen=True, order=True)
class Case:
    """One layer, one direction: input ``[steps, batch, input_size]``, ``hidden_size`` units.

    Example:
        >>> str(Case(784, 100, 1, 128))
        '784, 100, 1, 128'
    """

    steps: int
    batch: int
    input_size: int
    hidden_size: int

    def __str__(self) -> str:
        return ", ".join(str(size) for size in self.columns().values())

    def columns(self) -> dict[str, int]:
        """All sizes, by the names that tables have for them."""
        return dict(zip("TBIH", astuple(self), strict=True))

    @property
    def queries(self) -> int:
        """T * B."""
        return self.steps * self.batch

    def tiny(self) -> Case:
        """Two steps of two samples with few units."""
        return Case(2, 2, self.input_size, min(self.hidden_size, 16))


DEFAULT = (
    Case(784, 100, 1, 128),  # pixel by pixel MNIST, the h-detach paper's batch
    Case(120, 100, 1, 128),  # copying with T = 100
    Case(100, 64, 256, 256),
    Case(100, 64, 512, 512),
    Case(100, 16, 1024, 1024),
    Case(300, 1, 128, 128),
)
QUICK = (Case(120, 100, 1, 128), Case(50, 64, 256, 256), Case(300, 1, 128, 128))

SWEEP_STEPS = (10, 100, 500, 2000)
SWEEP_BATCH = (1, 8, 64, 256)
SWEEP_HIDDEN = (8, 32, 128, 512, 2048)
SWEEP_GFLOP = 120.0


def product(
    steps: Iterable[int],
    batch: Iterable[int],
    inputs: Iterable[int] | None,
    hidden: Iterable[int],
) -> tuple[Case, ...]:
    """All combinations of the given sizes; without ``inputs`` the input is as wide as the state.

    Example:
        >>> [str(case) for case in product([10], [1, 2], None, [8])]
        ['10, 1, 8, 8', '10, 2, 8, 8']
    """
    return tuple(
        Case(t, b, i, h)
        for t, b, h in itertools.product(steps, batch, hidden)
        for i in (inputs if inputs is not None else (h,))
    )


def sweep() -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The grid T 10..2000, B 1..256, H 8..2048 as (measured, left out for their size).

    A case is left out if one forward and backward needs more than ``SWEEP_GFLOP``: the largest
    corner alone would take an hour. Every T, every B and every H keeps at least one case.

    Example:
        >>> measured, left_out = sweep()
        >>> {case.hidden_size for case in measured} == set(SWEEP_HIDDEN)
        True
    """
    grid = product(SWEEP_STEPS, SWEEP_BATCH, None, SWEEP_HIDDEN)
    measured = tuple(c for c in grid if gflop(c, "forward+backward") <= SWEEP_GFLOP)
    return measured, tuple(c for c in grid if c not in measured)


def gflop(case: Case, mode: str, p: float = 0.0, *, input_grad: bool = False) -> float:
    """Arithmetic that the matrix products of one iteration need, in 10^9 operations.

    Counts only what nobody can avoid: no recurrent product at step 0 (the initial state is zero),
    none in the backward pass of a detached step, no gradient of the input unless it is asked for.
    Sigmoids, tanhs and the other elementwise work are not counted.

    Args:
        case: the shape.
        mode: one of ``MODES``.
        p: fraction of the steps 0 to 1 that are detached; matters only with a backward pass.
        input_grad: whether the input needs a gradient.

    Example:
        >>> full = gflop(Case(100, 64, 256, 256), "forward+backward")
        >>> full > gflop(Case(100, 64, 256, 256), "forward+backward", p=0.5)
        True
    """
    per_step = 2e-9 * case.batch * 4 * case.hidden_size
    recurrent = per_step * case.hidden_size * (case.steps - 1)
    projection = per_step * case.input_size * case.steps
    forward = recurrent + projection
    if mode != "forward+backward":
        return forward
    weight_gradients = recurrent + projection
    return forward + weight_gradients + (1 - p) * recurrent + (projection if input_grad else 0.0)


def gbyte(case: Case, mode: str, size: int, *, input_grad: bool = False) -> float:
    """Memory traffic that one iteration cannot avoid, in 10^9 bytes.

    Input and weights are read and the output is written; with a backward pass input, weights,
    output and its gradient are read, and the gradients of the weights are written. What is kept
    for the backward pass is not counted, because it could be computed anew.

    Args:
        case: the shape.
        mode: one of ``MODES``.
        size: bytes of a number.
        input_grad: whether the gradient of the input is written too.

    Example:
        >>> f"{gbyte(Case(10, 10, 10, 10), 'forward', 4):.3g}"
        '1.15e-05'
    """
    rows = case.steps * case.batch
    input, output = rows * case.input_size, rows * case.hidden_size
    weights = 4 * case.hidden_size * (case.input_size + case.hidden_size + 2)
    numbers = input + weights + output
    if mode == "forward+backward":
        numbers += input + weights + 2 * output + weights + (input if input_grad else 0)
    return 1e-9 * size * numbers
