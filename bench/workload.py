"""One measured iteration: a layer, its input, and the gradient that starts the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from throughtime.bench import peers
from throughtime.bench.cases import Case
from torch import Tensor, nn


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


@dataclass
class Workload:
    """A layer with everything that one iteration needs; ``p`` is the detached fraction."""

    layer: nn.Module
    input: Tensor  # [T, B, I]
    output_grad: Tensor  # [T, B, H]
    mask: Tensor | None  # [T]

    @classmethod
    def make(
        cls,
        impl: str,
        case: Case,
        p: float,
        dtype: torch.dtype,
        *,
        backend: str = "auto",
        input_grad: bool = False,
    ) -> Workload:
        """The same weights, input and output gradient for every implementation of a case."""
        layer = peers.build(impl, case.input_size, case.hidden_size, backend=backend, seed=0)
        generator = torch.Generator().manual_seed(2)
        rows = (case.steps, case.batch)
        x = torch.randn(*rows, case.input_size, generator=generator)
        output_grad = torch.randn(*rows, case.hidden_size, generator=generator)
        return cls(
            layer.to(dtype),
            x.to(dtype).requires_grad_(input_grad),
            output_grad.to(dtype),
            fixed_mask(case.steps, p) if peers.PEERS[impl].detaches else None,
        )

    def run(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The forward pass."""
        if self.mask is None:
            result: tuple[Tensor, tuple[Tensor, Tensor]] = self.layer(self.input)
        else:
            result = self.layer(self.input, detach_mask=self.mask)
        return result

    def iterate(self, mode: str) -> None:
        """One iteration of a mode of ``cases.MODES``; gradients of the previous one are dropped."""
        if mode == "inference":
            with torch.inference_mode():
                self.run()
        elif mode == "forward":
            self.run()
        else:
            for parameter in self.layer.parameters():
                parameter.grad = None
            self.input.grad = None
            output, _ = self.run()
            torch.autograd.backward(output, self.output_grad)
