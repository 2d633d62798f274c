"""``bench rel-lstm``: one RelLSTM layer beside its authors' loop and beside nn.LSTM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import throughtime
from bench import cases
from bench.cell import DTYPES, Cell, Contestant, Work, fixed_mask, placed
from bench.gate import screening_steps
from bench.loop_rel_lstm import LoopRelLSTM
from bench.operation import Operation

LOOP_ROWS = 20_000  # B * T beyond which a call of a Python loop takes many seconds


@dataclass(frozen=True)
class Case:
    """Sizes: input ``[T, B, I]``, H units, attention of size H.

    Example:
        >>> str(Case(320, 10, 10))
        '320, 10, 10, 128, 10, 15'
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int = 128
    window_size: int = 10
    top_k: int = 15

    def __str__(self) -> str:
        return ", ".join(str(size) for size in asdict(self).values())

    def columns(self) -> dict[str, int | str]:
        """All sizes by name, and the score."""
        return {**asdict(self), "score": "additive"}

    @property
    def queries(self) -> int:
        """B * T."""
        return self.B * self.T

    def tiny(self) -> Case:
        """Three steps."""
        return dataclasses.replace(self, T=3)


# Copying with T = 300 and 100 (one-hot), pixel by pixel MNIST.
DEFAULT = (Case(320, 10, 10), Case(120, 64, 10), Case(784, 100, 1))
QUICK = (Case(120, 10, 10),)


def pairs(steps: int, window_size: int, top_k: int) -> int:
    """How many (query, key) pairs a sequence of ``steps`` queries attends, each to its own key too.

    Example:
        >>> pairs(3, window_size=2, top_k=0), pairs(4, window_size=2, top_k=1)
        (5, 9)
    """
    return sum(min(k, window_size) + min(max(k - window_size, 0), top_k) for k in range(steps + 1))


class RelLstm(Operation):
    """One RelLSTM layer; nn.LSTM of the same size as a peer in speed."""

    name = "rel-lstm"
    kernel = "rel_lstm"
    heading = "T, B, I, H, window, top_k"
    labels: ClassVar[Mapping[str, str]] = {"loop": "authors' loop", "torch": "nn.LSTM"}
    default_peers = ("loop", "torch")
    detaching_peers = ("loop",)
    other_functions = ("torch",)
    default_ps = (0.0,)
    sizes: ClassVar[Mapping[str, str]] = {
        "T": "steps",
        "B": "batch",
        "I": "features per step",
        "H": "units",
        "window_size": "latest states that a step attends",
        "top_k": "retained states that it attends",
    }
    typical: ClassVar[Mapping[str, Sequence[int]]] = {
        name: [size] for name, size in asdict(DEFAULT[0]).items()
    }
    typical_quick: ClassVar[Mapping[str, Sequence[int]]] = {"T": [QUICK[0].T]}

    def default(self) -> Sequence[Case]:
        """``DEFAULT``."""
        return DEFAULT

    def quick(self) -> Sequence[Case]:
        """``QUICK``."""
        return QUICK

    def case(self, sizes: Mapping[str, Any]) -> Case:
        """A case from its fields."""
        return Case(**sizes)

    def hidden_size(self, case: Case) -> int:
        """H."""
        return case.H

    def why_not(self, contestant: Contestant, cell: Cell) -> str | None:
        """The Python loops take long."""
        loops = contestant.impl == "loop" or contestant.backend == "reference"
        if loops and cell.case.queries > LOOP_ROWS:
            return "not measured: a Python loop, one call would take many seconds"
        return None

    def shortened(self, case: Case) -> Case:
        """``gate.screening_steps``."""
        return dataclasses.replace(case, T=screening_steps(case.T, case.window_size, case.top_k))

    def gflop(self, impl: str, cell: Cell) -> float:
        """An LSTM's; queries and keys; scores (the sum over w . tanh) and contexts.

        h-detach spares nothing: what a detached step passes to the attention needs the product.
        """
        case: Case = cell.case
        backward = cell.mode == "forward+backward"
        gates = cases.gflop(_lstm_case(case), cell.mode, input_grad=cell.input_grad)
        if impl == "torch":
            return gates
        projections = 2 * 2 * case.H**2 * case.B * (case.T - 1)
        attention = 4 * case.H * case.B * pairs(case.T - 1, case.window_size, case.top_k)
        return gates + 1e-9 * (projections + attention) * (3 if backward else 1)

    def gbyte(self, impl: str, cell: Cell) -> float:
        """An LSTM's, and the weights of the attention: read, with a backward pass also written."""
        case: Case = cell.case
        size = DTYPES[cell.dtype].itemsize
        lstm = cases.gbyte(_lstm_case(case), cell.mode, size, input_grad=cell.input_grad)
        if impl == "torch":
            return lstm
        passes = 3 if cell.mode == "forward+backward" else 1
        return lstm + 1e-9 * size * passes * (2 * case.H**2 + case.H)

    def work(self, contestant: Contestant, cell: Cell, *, exact: bool = False) -> Work:
        """Weights from seed 0, input from seed 2, output gradient from seed 3."""
        case: Case = cell.case
        layer = placed(_layer(contestant, case), cell, exact=exact)
        x, output_grad = (
            placed(torch.randn(case.T, case.B, size, generator=generator), cell, exact=exact)
            for size, generator in (
                (case.I, torch.Generator().manual_seed(2)),
                (case.H, torch.Generator().manual_seed(3)),
            )
        )
        x.requires_grad_(cell.input_grad)
        mask = fixed_mask(case.T, cell.p) if self.detaches(contestant.impl) else None
        options = {} if mask is None else {"detach_mask": mask.to(cell.device)}

        def call() -> dict[str, Tensor]:
            return {"output": layer(x, **options)[0]}

        leaves = {"input": x} if cell.input_grad else {}
        return Work(call, leaves | dict(layer.named_parameters()), output_grad)


def _lstm_case(case: Case) -> cases.Case:
    return cases.Case(case.T, case.B, case.I, case.H)


def _layer(contestant: Contestant, case: Case) -> nn.Module:
    torch.manual_seed(0)
    if contestant.impl == "torch":
        return nn.LSTM(case.I, case.H)
    kind = LoopRelLSTM if contestant.impl == "loop" else throughtime.RelLSTM
    return kind(
        case.I,
        case.H,
        window_size=case.window_size,
        top_k=case.top_k,
        backend=contestant.backend or "auto",  # type: ignore[arg-type]
    )
