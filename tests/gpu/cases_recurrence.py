"""The recurrence of one LSTM layer in one direction, as GPU kernels take it: cases and values.

Expected values come from a loop over single samples in float64, gradients from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import plain_lstm, random, random_mask
from closeness import TOLERANCE, assert_close


@dataclass(frozen=True)
class Case:
    """Sizes and options of one run through the recurrence."""

    T: int
    B: int
    H: int
    dtype: torch.dtype = torch.float64
    lengths: bool = False
    reset: bool = False
    reverse: bool = False
    mask: str = ""  # "T", "TB", or none
    grads: str = "output h c"
    tf32: bool = False

    @property
    def sums(self) -> torch.dtype:
        """The dtype of sums and of c."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        flags = [name for name in ("lengths", "reset", "reverse", "tf32") if getattr(self, name)]
        flags += [f"mask{self.mask}"] if self.mask else []
        return "-".join([f"T{self.T}", f"B{self.B}", f"H{self.H}", str(self.dtype)[6:], *flags])


@dataclass
class Given:
    """What a case is run on; gradients that are not given are None."""

    projected: Tensor
    h_0: Tensor
    c_0: Tensor
    weight_hh: Tensor
    lengths: Tensor | None
    reset: Tensor | None
    detach_mask: Tensor | None
    grads: list[Tensor | None]

    @property
    def past(self) -> Tensor:
        """[T, B], True past a sample's end."""
        T, B, _ = self.projected.shape
        ends = torch.full((B,), T) if self.lengths is None else self.lengths
        return torch.arange(T).unsqueeze(1) >= ends


def inputs(case: Case, seed: int = 0) -> Given:
    """What the case is run on; another ``seed`` for another direction of the same layer."""
    T, B, H, S, A = case.T, case.B, case.H, case.dtype, case.sums
    # One sample without a step, one with all, the others between.
    ends = torch.tensor([T - 1, 0, T] + [2, 3, 1] * B)[:B].clamp(max=T)
    mask = {
        "": None,
        "T": random_mask(T, p=0.4, seed=seed + 5),
        "TB": random_mask(T, B, p=0.4, seed=seed + 6),
    }
    shapes = {"output": (T, B, H), "h": (B, H), "c": (B, H)}
    return Given(
        random(T, B, 4 * H, seed=seed + 1, dtype=A),
        random(B, H, seed=seed + 2, dtype=S),
        random(B, H, seed=seed + 3, dtype=A),
        (1.5 / H**0.5 * random(4 * H, H, seed=seed + 4)).to(S),
        ends if case.lengths else None,
        random_mask(T, B, p=0.3, seed=seed + 7) if case.reset else None,
        mask[case.mask],
        [
            random(*shape, seed=k, dtype=A if name == "c" else S) if name in case.grads else None
            for k, (name, shape) in enumerate(shapes.items(), seed + 8)
        ],
    )


def long_memory(dtype: torch.dtype, steps: int = 400) -> tuple[Case, Given]:
    """A cell that remembers 150 to 3,000 steps, and a loss on the last h alone, past large c.

    1 - f is 0.007 to 0.0003: what rounding takes of it, the gradients of the first steps lose.
    """
    case = Case(steps, 1, 8, dtype, grads="h")
    given = inputs(case)
    given.c_0 = 3 * math.exp(steps / 3000) * given.c_0.sign()  # 3 is left of it
    biases = torch.linspace(5, 8, case.H)
    gates = given.projected.unflatten(2, (4, case.H))
    gates[:, :, 0] = 0.3 * gates[:, :, 0] - biases
    gates[:, :, 1] = 0.3 * gates[:, :, 1] + biases
    given.weight_hh *= 0.1
    given.grads = [None if grad is None else 64 * grad for grad in given.grads]
    return case, given


# Of the gradients after a long way, relative to their norm.
LONG_MEMORY = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def assert_remembers(found: dict[str, Tensor], case: Case, given: Given) -> None:
    """That gradients have come through all steps, to every unit and every gate of them."""
    wanted = expect(case, given)

    def parts(values: dict[str, Tensor]) -> dict[str, Tensor]:
        gates = values["grad_gates"].double().chunk(4, 2)
        units = values["grad_c_0"].double()[0]
        return {"c_n": values["c_n"].double()} | {
            f"grad {name}": x for name, x in (*zip("ifgo", gates, strict=True),
                                              *zip(range(case.H), units, strict=True))
        }  # fmt: skip

    actual, exact, allowed = parts(found), parts(wanted), LONG_MEMORY[case.dtype]
    for name, x in actual.items():
        error = ((x - exact[name]).norm() / exact[name].norm()).item()
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.0e}"


Operator = Callable[..., Sequence[Tensor]]


def run(
    case: Case, given: list[Given], forward: Operator, backward: Operator
) -> list[dict[str, Tensor]]:
    """Results per direction by the operators of the recurrence.

    The second direction travels against ``case.reverse``.
    """

    def together(values: list[Tensor | None], dim: int = 0) -> Tensor | None:
        present = [x for x in values if x is not None]
        return torch.stack(present, dim) if present else None

    projected, h_0, c_0, weight, reset, mask = (
        together([getattr(g, name) for g in given], 2 if name == "projected" else 0)
        for name in ("projected", "h_0", "c_0", "weight_hh", "reset", "detach_mask")
    )
    bias = torch.stack([random(4 * case.H, seed=20 + d).to(case.sums) for d in range(len(given))])
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(2).expand(-1, -1, case.B)
    lengths, reverse = given[0].lengths, case.reverse
    output, h_n, c_n, *saved = forward(
        projected - bias, bias, h_0, c_0, weight, lengths, reset, reverse, True, case.tf32
    )
    grads = [together([g.grads[i] for g in given], 0 if i else 2) for i in range(3)]
    made = backward(*grads, c_0, weight, *saved, lengths, reset, mask, reverse, case.tf32)
    names = ("output", "h_n", "c_n", "grad_gates", "grad_h_0", "grad_c_0")
    found = dict(zip(names, (output, h_n, c_n, *made), strict=True))
    return [
        {name: x[:, :, d] if x.dim() == 4 else x[d] for name, x in found.items()}
        for d in range(len(given))
    ]


def check(
    case: Case,
    directions: int,
    forward: Operator,
    backward: Operator,
    low_precision: dict[torch.dtype, float],
) -> None:
    """Against ``expect``, twice the same; nothing past the end is read, no input is changed."""
    given, unchanged = ([inputs(case, seed=30 * d) for d in range(directions)] for _ in range(2))
    for g in given:
        for x in (g.projected, g.grads[0]):
            if x is not None:
                x[g.past] = torch.nan
    found, again = (run(case, given, forward, backward) for _ in range(2))
    for d, one in enumerate(found):
        assert all(torch.equal(x, again[d][name]) for name, x in one.items())
        for name in ("h_0", "c_0", "weight_hh"):
            assert torch.equal(getattr(given[d], name), getattr(unchanged[d], name)), name
        travel = replace(case, reverse=case.reverse != (d == 1))
        assert_matches(one, expect(travel, unchanged[d]), case.dtype, low_precision)
        for name in ("output", "grad_gates"):
            assert (one[name][given[d].past] == 0).all(), name


def expect(case: Case, given: Given) -> dict[str, Tensor]:
    """The same in float64, sample by sample."""
    leaves = [x.double().requires_grad_() for x in (given.projected, given.h_0, given.c_0)]
    output, states = plain_lstm(
        leaves[0],
        (leaves[1], leaves[2]),
        torch.eye(4 * case.H, dtype=torch.float64),
        given.weight_hh.double(),
        detach_mask=given.detach_mask,
        lengths=given.lengths,
        reset=given.reset,
        reverse=case.reverse,
    )
    results = (output, *states)
    loss = sum(
        (value * grad.double()).sum()
        for value, grad in zip(results, given.grads, strict=True)
        if grad is not None
    )
    wanted = torch.autograd.grad(loss, leaves, materialize_grads=True)
    names = ("output", "h_n", "c_n", "grad_gates", "grad_h_0", "grad_c_0")
    dtypes = (case.dtype, case.dtype, case.sums, case.dtype, case.sums, case.sums)
    values = (*(value.detach() for value in results), *wanted)
    return {n: v.to(d) for n, d, v in zip(names, dtypes, values, strict=True)}


def assert_matches(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    dtype: torch.dtype,
    low_precision: dict[torch.dtype, float],
) -> None:
    """Relative to the largest entry, within the dtype's tolerance or ``low_precision``."""
    for name, wanted in expected.items():
        if dtype in TOLERANCE:
            assert_close(found[name], wanted, name)
            continue
        assert found[name].dtype == wanted.dtype, name
        scale = max(1.0, wanted.abs().max().item())
        error = (found[name].double() - wanted.double()).abs().max().item() / scale
        assert error <= low_precision[dtype], f"{name}: {error:.2e}"
