"""What is measured: a cell, who takes part in it, and what each of them computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

OURS = "throughtime"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Contestant:
    """Who computes: an implementation, and for ours the kernels that it takes.

    Example:
        >>> str(Contestant("throughtime", "cpu")), str(Contestant("torch"))
        ('throughtime (cpu)', 'torch')
    """

    impl: str
    backend: str | None = None

    def __str__(self) -> str:
        return f"{self.impl} ({self.backend})" if self.backend else self.impl

    @property
    def ours(self) -> bool:
        """Whether this package computes."""
        return self.impl == OURS


@dataclass(frozen=True)
class Cell:
    """What every contestant computes; ``case`` holds the sizes, as the operation knows them."""

    case: Any
    dtype: str = "float32"
    p: float = 0.0
    mode: str = "forward+backward"
    device: str = "cpu"
    input_grad: bool = False


def fixed_mask(steps: int, p: float) -> Tensor | None:
    """A detach mask ``[T]`` with exactly ``round(p * T)`` detached steps; None for p = 0.

    The count is fixed, so that runs differ in their speed only, not in their work.

    Example:
        >>> int(fixed_mask(10, 0.5).sum())
        5
    """
    if p == 0:
        return None
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(1))
    return order < round(p * steps)


Placed = TypeVar("Placed", Tensor, nn.Module)


def placed(thing: Placed, cell: Cell, *, exact: bool) -> Placed:
    """A tensor or module, made in float32 on the CPU, where and in what the cell computes.

    ``exact``: in float64, but with numbers that the cell's dtype can hold.
    """
    rounded = thing.to(device=cell.device, dtype=DTYPES[cell.dtype])
    return rounded.double() if exact else rounded


@dataclass(frozen=True)
class Work:
    """One contestant with its weights and inputs, ready to compute.

    Args:
        call: the forward pass; returns named results, the output first. What is not floating
            point takes no part in the backward pass.
        leaves: what gets a gradient, by name.
        output_grad: the gradient of the output, from which the backward pass starts.
    """

    call: Callable[[], Mapping[str, Tensor]]
    leaves: Mapping[str, Tensor]
    output_grad: Tensor
    _wanted: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_wanted", list(self.leaves.values()))

    def iterate(self, mode: str) -> object:
        """One measured iteration of a mode of ``cases.MODES``."""
        if mode == "inference":
            with torch.inference_mode():
                return self.call()
        results = self.call()
        if mode == "forward":
            return results
        return torch.autograd.grad(results["output"], self._wanted, self.output_grad)

    def results(self) -> dict[str, Tensor]:
        """Every value and gradient, and the output of inference, in float64 on the CPU."""
        results = self.call()
        outputs = [x for x in results.values() if x.is_floating_point()]
        starts = [self.output_grad, *(torch.ones_like(x) for x in outputs[1:])]
        grads = torch.autograd.grad(outputs, self._wanted, starts, materialize_grads=True)
        with torch.inference_mode():
            inferred = self.call()["output"]
        found = dict(results) | {"inference": inferred}
        found |= {f"d {name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        return {name: x.detach().double().cpu() for name, x in found.items()}
