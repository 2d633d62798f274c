"""A backend of an operation: what it needs, and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

import torch

Arguments = TypeVar("Arguments")
Results = TypeVar("Results")

BackendName = Literal["auto", "cuda", "triton", "cpu", "reference"]

NAMES: tuple[str, ...] = get_args(BackendName)

# Fastest first: "auto" takes the first that can run.
ORDER: tuple[str, ...] = NAMES[1:]


class Request(NamedTuple):
    """What a backend is asked to run.

    ``op`` is the name of an operation; ``hidden_size`` is H, or for relevancy attention the
    features of a head, D. ``device`` and ``dtype`` are None while they are not known yet, as in the
    constructor of a module; only what can never run is refused then. ``beyond_paper`` lists what a
    call of relevancy attention asks for that the paper does not have.
    """

    op: str
    hidden_size: int
    proj_size: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    cell: str = "lstm"
    reset_hx: bool = False
    return_cells: bool = False
    beyond_paper: tuple[str, ...] = ()


class Work(NamedTuple):
    """A layer whose work is to be divided; ``outputs`` is P, or H without projection.

    Of relevancy attention ``hidden`` is D, ``heads`` are those with keys of their own, ``attended``
    is the number of keys of a query, and ``score`` the name of the score.
    """

    dtype: torch.dtype
    steps: int
    batch: int
    directions: int
    inputs: int
    hidden: int
    outputs: int
    attention: int
    heads: int
    attended: int
    score: str


# Says why a backend cannot run a request, in one sentence with the way out, or None if it can.
Requirement = Callable[[Request], str | None]


@dataclass(frozen=True)
class Backend(Generic[Arguments, Results]):
    """One implementation of an operation.

    Args:
        name: one of ``ORDER``.
        requirements: what it needs, in the order in which reasons are given.
        run: makes the record of results from the record of arguments, which are checked and of one
            dtype, but for ``float32_weights``.
        run_both: runs two directions of one layer side by side, where that is faster than one
            after the other.
        run_cells: makes a record that holds every c_t too.
        recomputes: whether it knows what it need not save with ``recompute``. Others run their
            forward again in the backward pass.
        float32_weights: whether it takes float32 weights with an input of this dtype. Autocast
            leaves them as they are then, and so their gradients.
        describe: says how it divides the work of a layer, a line each, on a GPU (its name and what
            it has) or on so many threads of the CPU; see :func:`throughtime.explain`.
    """

    name: str
    requirements: tuple[Requirement, ...]
    run: Callable[[Arguments], Results]
    run_both: Callable[[Arguments, Arguments], Results] | None = None
    run_cells: Callable[[Arguments], Any] | None = None
    recomputes: bool = False
    float32_weights: Callable[[torch.dtype], bool] = lambda dtype: False
    describe: Callable[[Any, Work], list[str]] | None = None

    def why_not(self, request: Request) -> str | None:
        """Say why it cannot run a request, or None if it can."""
        for requirement in self.requirements:
            reason = requirement(request)
            if reason is not None:
                return reason
        return None


# operation -> name of the backend -> the backend
OPERATIONS: dict[str, dict[str, Backend[Any, Any]]] = {}


def offer(op: str, *backends: Backend[Any, Any]) -> None:
    """Make the backends of an operation known under its name."""
    OPERATIONS[op] = {backend.name: backend for backend in backends}


def can_run(name: str, request: Request) -> str | None:
    """Say why backend ``name`` cannot run ``request``, or None if it can.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name not in ORDER:
        raise ValueError(unknown(name, "backend", ORDER))
    backend = OPERATIONS[request.op].get(name)
    if backend is None:
        return (
            f"there are no {name.upper()} kernels for {request.op} in this version yet; {WAY_OUT}"
        )
    return backend.why_not(request)


def passed_over(name: str, request: Request) -> str | None:
    """Say why "auto" does not take backend ``name``, or None if it may."""
    reason = can_run(name, request)
    if reason is None and name == "triton" and request.device == torch.device("cpu"):
        return "Triton's interpreter is for tests and runs only where it is asked for"
    return reason


def unknown(name: object, source: str, names: tuple[str, ...] = NAMES) -> str:
    """The message for a name that is none of ``names``; ``source`` is where it came from."""
    return f"{source} should be one of {', '.join(map(repr, names))}, got {name!r}"


WAY_OUT = "use backend='reference' or 'auto'"
