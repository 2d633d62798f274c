"""What a benchmark knows of an operation: sizes, peers, arithmetic, and one iteration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

OURS = "throughtime"
LAST_STEP = "last-step"  # forward+backward, with a loss on the last step alone
MODES = ("forward+backward", LAST_STEP, "forward", "inference")
DEVICES = ("cpu", "cuda")
AUTOCAST = "autocast"  # float32 tensors, under torch.autocast in bfloat16
DTYPES = {n: getattr(torch, n) for n in ("float32", "float64", "bfloat16", "float16")}
DTYPES[AUTOCAST] = torch.float32
# float32 under torch.set_float32_matmul_precision, and the rounding of an operand that it allows.
TF32 = 2.0**-11  # of a GPU, by either
PRECISIONS = {"float32-high": ("high", 2.0**-16), "float32-medium": ("medium", 2.0**-7)}
DTYPES |= dict.fromkeys(PRECISIONS, torch.float32)
REPLACED_STEPS, MOST_STEPS = 32, 1024
SIZES = ("T", "B", "I", "H", "heads", "D", "window_size", "top_k", "screen_every")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all contestants compute, by columns of the CSV; None: the operation has no such size."""

    op: str
    T: int
    B: int
    I: int | None = None  # noqa: E741
    H: int | None = None
    heads: int | None = None
    D: int | None = None
    window_size: int | None = None
    top_k: int | None = None
    screen_every: int | None = None
    score: str | None = None
    dtype: str = "float32"
    p: float | None = None
    mode: str = MODES[0]
    device: str = "cpu"
    input_grad: bool = False

    def __str__(self) -> str:
        return sizes_text(asdict(self))

    @property
    def trains(self) -> bool:
        """Whether the backward pass is part of the iteration."""
        return self.mode in (MODES[0], LAST_STEP)

    @property
    def width(self) -> int:
        """The size that ``throughtime.explain`` asks for."""
        return self.H or self.D or 1

    @property
    def operands(self) -> torch.dtype:
        """What products multiply."""
        dtype: torch.dtype = torch.bfloat16 if self.dtype == AUTOCAST else DTYPES[self.dtype]
        return dtype

    @property
    def rounding(self) -> float:
        """Of one operand of a product, relative."""
        if self.device == "cuda" and self.dtype in PRECISIONS:
            return TF32
        return PRECISIONS.get(self.dtype, ("", torch.finfo(self.operands).eps))[1]

    @contextmanager
    def precision(self) -> Iterator[None]:
        """While it lasts, torch's switches for products of float32 are what the dtype says.

        cuDNN's RNNs, and so our CUDA kernels, take TF32 by a switch of their own.
        """
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision(PRECISIONS.get(self.dtype, ("highest",))[0])
        torch.backends.cudnn.allow_tf32 = self.dtype in PRECISIONS
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    @property
    def itemsize(self) -> int:
        return int(DTYPES[self.dtype].itemsize)

    @property
    def queries(self) -> int:
        """Results per iteration: B * T, or B * heads * T."""
        return self.B * self.T * (self.heads or 1)


def sizes_text(row: Mapping[str, Any]) -> str:
    """The sizes of a case or of a row, in the order of ``SIZES``, and a score other than dot."""
    known = [str(row[name]) for name in SIZES if pd.notna(row.get(name))]
    additive = pd.notna(row["heads"]) and row["score"] == "additive"
    return ", ".join([*known, "additive"] if additive else known)


@dataclass(frozen=True)
class Contestant:
    """An implementation; ``backend`` names the kernels of ours."""

    impl: str
    backend: str | None = None

    def __str__(self) -> str:
        return f"{self.impl} ({self.backend})" if self.backend else self.impl

    @property
    def ours(self) -> bool:
        return self.impl == OURS


REFERENCE = Contestant(OURS, "reference")


@dataclass(frozen=True)
class Peer:
    """Another implementation; ``why_not`` says why it is not measured, or None."""

    label: str
    make: Callable[[Case], nn.Module] | None = None
    detaches: bool = False  # otherwise it is timed at p = 0
    same_function: bool = True  # otherwise it is a peer in speed only
    why_not: Callable[[Case], str | None] = lambda case: None


@dataclass(frozen=True)
class Work:
    """One contestant with weights and inputs.

    ``call`` returns named results, the output first; ``leaves`` get gradients of it. What has no
    backward pass everywhere is compared in ``inference_only``.
    """

    call: Callable[[], Mapping[str, Tensor]]
    leaves: Mapping[str, Tensor]
    output_grad: Tensor
    inference_only: bool = False

    def iterate(self, mode: str) -> object:
        if mode == "inference":
            with torch.inference_mode():
                return self.call()
        results = self.call()
        if mode == "forward":
            return results
        output, grad = results["output"], self.output_grad
        if mode == LAST_STEP:  # of [T, B, H] or [B, heads, T, D]
            last = -1 if output.dim() == 3 else (..., -1, slice(None))
            output, grad = output[last], grad[last]
        return torch.autograd.grad(output, list(self.leaves.values()), grad)

    def results(self) -> dict[str, Tensor]:
        """Every value, every gradient, and the output of inference, in float64 on the CPU."""
        with torch.inference_mode():
            inferred = {"inference": self.call()["output"]}
        if self.inference_only:
            return _double(inferred)
        results = self.call()
        outputs = [x for x in results.values() if x.is_floating_point()]
        starts = [self.output_grad, *(torch.ones_like(x) for x in outputs[1:])]
        leaves = list(self.leaves.values())
        grads = torch.autograd.grad(outputs, leaves, starts, materialize_grads=True)
        found = {f"d {name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        return _double({**results, **inferred, **found})


def _double(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().cpu() for name, x in found.items()}


def fixed_mask(steps: int, p: float | None) -> Tensor | None:
    """A detach mask ``[T]`` with exactly ``round(p * T)`` detached steps; None for p = 0."""
    if not p:
        return None
    return torch.randperm(steps, generator=torch.Generator().manual_seed(1)) < round(p * steps)


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Placed = TypeVar("Placed", Tensor, nn.Module)


def placed(thing: Placed, case: Case, *, exact: bool) -> Placed:
    """On the device and in the dtype of the case; ``exact``: then in float64."""
    rounded = thing.to(device=case.device, dtype=DTYPES[case.dtype])
    return rounded.double() if exact else rounded


Call = Callable[[], Mapping[str, Tensor]]


def computed(call: Call, case: Case, *, exact: bool) -> Call:
    """The call in the precision of the case, or as it is."""
    if exact or case.dtype != AUTOCAST:
        return call
    return torch.autocast(case.device, case.operands)(call)


class Operation:
    """One operation; every function takes its sizes as a ``Case``."""

    name: str
    kernel: str  # its name in throughtime.explain
    sizes: Mapping[str, str]  # size -> its meaning
    default: Sequence[Case]
    quick: Sequence[Case]
    typical: Case  # has the sizes that are not given
    peers: Mapping[str, Peer]
    default_peers: Sequence[str]
    ps: Sequence[float] | None = None  # detached fractions; None: nothing to detach
    scores: Sequence[str] = ()

    def gflop(self, impl: str, case: Case) -> float:
        """10^9 operations of the products that no implementation can avoid."""
        raise NotImplementedError

    def gbyte(self, impl: str, case: Case) -> float:
        """10^9 bytes of inputs, weights, outputs and gradients, once per pass."""
        raise NotImplementedError

    def work(self, contestant: Contestant, case: Case, *, exact: bool = False) -> Work:
        """With the same weights and inputs for every contestant (``exact``: see ``placed``)."""
        raise NotImplementedError

    def shortened(self, case: Case) -> Case:
        """The case at a T at which the float64 reference takes seconds at most.

        Retained states are replaced at it: it is more than window plus top_k.
        """
        window_size, top_k = case.window_size or 0, case.top_k or 0
        return replace(case, T=min(case.T, window_size + top_k + REPLACED_STEPS, MOST_STEPS))

    def reference_why_not(self, case: Case) -> str | None:
        """Why our reference is not measured, or None."""
        return None

    def why_not(self, contestant: Contestant, case: Case) -> str | None:
        """Why a contestant is not measured, or None."""
        if not contestant.ours:
            return self.peers[contestant.impl].why_not(case)
        return self.reference_why_not(case) if contestant == REFERENCE else None

    @property
    def heading(self) -> str:
        return ", ".join(self.sizes).replace("window_size", "window")

    def case(self, **columns: Any) -> Case:
        """A case of this operation; ``I`` is ``H`` and the score typical unless they are given."""
        if "I" in self.sizes:
            columns.setdefault("I", columns.get("H"))
        columns["score"] = columns.get("score") or self.typical.score
        return Case(op=self.name, **columns)

    def combinations(
        self, given: Mapping[str, Sequence[int]], score: str | None = None
    ) -> list[Case]:
        """All combinations of the given sizes; the typical ones stand in for the others."""
        typical = {name: getattr(self.typical, name) for name in self.sizes}
        values = {name: [size] for name, size in typical.items() if size is not None} | dict(given)
        return [
            self.case(**dict(zip(values, combination, strict=True)), score=score)
            for combination in itertools.product(*values.values())
        ]

    def same_function(self, impl: str) -> bool:
        """Whether an implementation computes what ours does."""
        return impl == OURS or self.peers[impl].same_function

    def timed(self, impl: str, case: Case) -> Case:
        """What an implementation runs: the case, at p = 0 if it has no h-detach."""
        detaches = self.ps is None or impl == OURS or self.peers[impl].detaches
        return case if detaches else replace(case, p=0.0)
