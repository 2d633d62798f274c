"""The recurrence of one LSTM layer in one direction, as GPU kernels take it: cases and values.

Expected values come from a loop over single samples in float64, gradients from autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import random, random_mask
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

    @property
    def sums(self) -> torch.dtype:
        """The dtype of sums and of c."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        flags = [name for name in ("lengths", "reset", "reverse") if getattr(self, name)]
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


def long_memory(dtype: torch.dtype, steps: int = 2000) -> tuple[Case, Given]:
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

    actual, exact = parts(found), parts(wanted)
    for name, x in actual.items():
        error, allowed = (
            ((x - exact[name]).norm() / exact[name].norm()).item(),
            LONG_MEMORY[case.dtype],
        )
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.0e}"


def expect(case: Case, given: Given) -> dict[str, Tensor]:
    """The same in float64, sample by sample; every choice is a Python ``if``."""
    x, h_0, c_0 = (
        value.double().requires_grad_() for value in (given.projected, given.h_0, given.c_0)
    )
    weight = given.weight_hh.double()
    rows = [[torch.zeros(case.H, dtype=torch.float64)] * case.B for _ in range(case.T)]
    final_h, final_c = [], []
    for b in range(case.B):
        h, c = h_0[b], c_0[b]
        end = case.T if given.lengths is None else int(given.lengths[b])
        for t in reversed(range(end)) if case.reverse else range(end):
            if given.reset is not None and given.reset[t, b]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            mask = given.detach_mask
            if mask is not None and (mask[t] if mask.dim() == 1 else mask[t, b]):
                h = h.detach()
            i, f, g, o = (x[t, b] + weight @ h).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            rows[t][b] = h
        final_h.append(h)
        final_c.append(c)
    results = [torch.stack([torch.stack(r) for r in rows]), torch.stack(final_h),
               torch.stack(final_c)]  # fmt: skip
    loss = sum(
        (value * grad.double()).sum()
        for value, grad in zip(results, given.grads, strict=True)
        if grad is not None
    )
    wanted = torch.autograd.grad(loss, (x, h_0, c_0), allow_unused=True, materialize_grads=True)
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
