"""``bench relevancy``: relevancy attention beside full causal attention, over the length T."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cell import DTYPES, Cell, Contestant, Work, placed
from bench.gate import screening_steps
from bench.operation import Operation
from bench.rel_lstm import pairs
from throughtime import functional

SDPA_SCORES = 8 * 32768**2  # B * heads * T^2 beyond which a call takes minutes (at this: 26 s)
FULL_SCORES = 8 * 2048**2  # beyond which the weights alone fill gigabytes
REFERENCE_STEPS = 512


@dataclass(frozen=True)
class Case:
    """Sizes: query, key and value are ``[B, heads, T, D]``.

    Example:
        >>> str(Case(T=2048))
        '2048, 2, 4, 64, 64, 64'
    """

    T: int
    B: int = 2
    heads: int = 4
    D: int = 64
    window_size: int = 64
    top_k: int = 64
    score: str = "dot"

    def __str__(self) -> str:
        *sizes, score = asdict(self).values()
        text = ", ".join(str(size) for size in sizes)
        return text if score == "dot" else f"{text}, {score}"

    def columns(self) -> dict[str, int | str]:
        """All sizes by name."""
        return asdict(self)

    @property
    def queries(self) -> int:
        """B * heads * T."""
        return self.B * self.heads * self.T

    def tiny(self) -> Case:
        """Eight steps."""
        return dataclasses.replace(self, T=8)


DEFAULT = tuple(Case(T) for T in (512, 1024, 2048, 4096, 8192, 16384))
QUICK = tuple(Case(T) for T in (512, 2048))


class Relevancy(Operation):
    """Relevancy attention, and full attention as a peer in speed."""

    name = "relevancy"
    kernel = "relevancy_attention"
    heading = "T, B, heads, D, window, top_k"
    labels: ClassVar[Mapping[str, str]] = {
        "sdpa": "full attention (sdpa)",
        "full": "full attention by hand",
    }
    default_peers = ("sdpa",)
    other_functions = ("sdpa", "full")
    scores = ("dot", "additive")
    sizes: ClassVar[Mapping[str, str]] = {
        "T": "steps",
        "B": "batch",
        "heads": "attention heads",
        "D": "features per head",
        "window_size": "latest keys that a query attends",
        "top_k": "retained keys that it attends",
    }
    typical: ClassVar[Mapping[str, Sequence[int]]] = {
        "T": [case.T for case in DEFAULT],
        **{name: [getattr(DEFAULT[0], name)] for name in list(sizes)[1:]},
    }
    typical_quick: ClassVar[Mapping[str, Sequence[int]]] = {"T": [case.T for case in QUICK]}

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
        """D."""
        return case.D

    def why_not(self, contestant: Contestant, cell: Cell) -> str | None:
        """Full attention is quadratic, the reference a Python loop: large cases take too long."""
        case: Case = cell.case
        scores = case.queries * case.T
        if contestant.impl in self.other_functions and case.score != "dot":
            return f"cannot run: full attention has no {case.score} score"
        if contestant.impl == "sdpa" and scores > SDPA_SCORES:
            return "not measured: its time grows with T^2, one call would take minutes"
        if contestant.impl == "full" and scores > FULL_SCORES:
            return "not measured: its memory grows with T^2, the weights would fill gigabytes"
        if contestant.backend == "reference" and case.T > REFERENCE_STEPS:
            return "not measured: a Python loop over T, one call would take many seconds"
        return None

    def shortened(self, case: Case) -> Case:
        """``gate.screening_steps``."""
        return dataclasses.replace(case, T=screening_steps(case.T, case.window_size, case.top_k))

    def gflop(self, impl: str, cell: Cell) -> float:
        """Scores and outputs; backward four products of the same size. Full attention has its own.

        Scores that a backward pass computes anew are not counted, as they could be kept.
        """
        case: Case = cell.case
        full = impl in self.other_functions
        window, top_k = (case.T, 0) if full else (case.window_size, case.top_k)
        attended = case.B * case.heads * pairs(case.T, window, top_k)
        return 1e-9 * attended * 4 * case.D * (3 if cell.mode == "forward+backward" else 1)

    def gbyte(self, impl: str, cell: Cell) -> float:
        """Query, key and value read, output written; backward these, its gradient, and theirs."""
        tensors = 4 + (7 if cell.mode == "forward+backward" else 0)
        numbers: int = cell.case.queries * cell.case.D * tensors
        return 1e-9 * DTYPES[cell.dtype].itemsize * numbers

    def work(self, contestant: Contestant, cell: Cell, *, exact: bool = False) -> Work:
        """Inputs from seed 3, output gradient from seed 4."""
        case: Case = cell.case
        shape = (case.B, case.heads, case.T, case.D)
        generator = torch.Generator().manual_seed(3)
        made = {name: torch.randn(shape, generator=generator) for name in ("query", "key", "value")}
        if case.score == "additive":
            weight = torch.randn(case.heads, case.D, generator=generator) / case.D**0.5
            made["score_weight"] = weight
        leaves = {name: placed(x, cell, exact=exact).requires_grad_() for name, x in made.items()}
        output_grad = torch.randn(shape, generator=torch.Generator().manual_seed(4))

        def call() -> dict[str, Tensor]:
            return _call(contestant, case, leaves)

        return Work(call, leaves, placed(output_grad, cell, exact=exact))


def _call(contestant: Contestant, case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``last`` tells which keys were chosen: a difference there is far beyond the gate's limit."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    if contestant.impl == "sdpa":
        return {"output": F.scaled_dot_product_attention(query, key, value, is_causal=True)}
    if contestant.impl == "full":
        future = torch.ones(case.T, case.T, dtype=torch.bool, device=query.device).triu(1)
        scores = case.D**-0.5 * query @ key.transpose(2, 3)
        return {"output": scores.masked_fill(future, -torch.inf).softmax(3) @ value}
    output, last = functional.relevancy_attention(  # type: ignore[call-overload]
        query,
        key,
        value,
        case.window_size,
        case.top_k,
        score=case.score,
        score_weight=inputs.get("score_weight"),
        return_retained=True,
        backend=contestant.backend or "auto",
    )
    return {"output": output, "last": last}
