"""Cases of relevancy screening for the operators of every backend, and what they must give.

The operators are called by name: ``suffix`` is empty for the compiled CPU kernels, ``"_triton"``
for the Triton ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import throughtime  # noqa: F401  (defines the operators)
from cases import random, random_mask
from closeness import assert_as_accurate, assert_close
from throughtime import reference
from throughtime.reference.screening import Memory

ops: Any = torch.ops.throughtime
EVERYTHING = 2**62


@dataclass(frozen=True)
class Attention:
    """Sizes of one call; an earlier call of ``before`` steps left its memory if that is not 0."""

    B: int
    heads: int
    T: int
    D: int
    Dv: int
    window_size: int
    top_k: int
    additive: bool = False
    lengths: bool = False
    before: int = 0
    keep_first: bool = False

    @property
    def scale(self) -> float:
        return float(self.D**-0.5)

    def __str__(self) -> str:
        flags = [name for name in ("additive", "lengths", "keep_first") if getattr(self, name)]
        sizes = f"{self.B}x{self.heads}x{self.T}x{self.D}x{self.Dv}-w{self.window_size}"
        return "-".join([sizes, f"k{self.top_k}", f"p{self.before}", *flags])


@dataclass(frozen=True)
class Layer:
    """Sizes of one RelLSTM call."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    A: int
    window_size: int
    top_k: int
    lengths: bool = False
    before: int = 0
    keep_first: bool = False
    mask: str = ""

    def __str__(self) -> str:
        flags = [name for name in ("lengths", "keep_first") if getattr(self, name)]
        sizes = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-A{self.A}-w{self.window_size}"
        return "-".join([sizes, f"k{self.top_k}", f"p{self.before}", *flags, self.mask or "uncut"])


ATTENTION = (
    Attention(1, 1, 1, 1, 1, 1, 0),
    Attention(2, 2, 23, 8, 8, 5, 4),
    Attention(2, 1, 23, 17, 40, 3, 2, additive=True),
    Attention(3, 2, 9, 3, 19, 2, 50, lengths=True),
    Attention(2, 2, 14, 16, 5, 4, 3, additive=True, lengths=True, before=11),
    Attention(2, 1, 5, 4, 4, 9, 3, before=4),
    Attention(1, 2, 12, 33, 66, 40, 2, before=7, lengths=True),
    Attention(2, 1, 30, 5, 5, 1, 3, additive=True, before=3),
    Attention(2, 1, 20, 5, 5, 3, 4, keep_first=True),
    Attention(1, 1, 60, 20, 70, 20, 30),  # more candidates than two vectors
)
LAYERS = (
    Layer(1, 1, 1, 1, 1, 1, 0),
    Layer(20, 3, 3, 19, 21, 3, 4, mask="T"),
    Layer(15, 5, 2, 16, 3, 2, 3, lengths=True, mask="TB"),
    Layer(9, 3, 20, 4, 16, 4, 2, lengths=True, before=11),
    Layer(3, 2, 1, 5, 5, 6, 3, before=4, mask="T"),
    Layer(12, 2, 3, 17, 1, 3, EVERYTHING),
    Layer(12, 2, 3, 17, 4, 40, 2, before=5),
    Layer(14, 2, 3, 8, 8, 3, 2, keep_first=True),
    Layer(7, 37, 3, 20, 20, 2, 2, lengths=True, mask="TB"),  # groups of uneven height
    Layer(30, 40, 5, 20, 20, 3, 3),  # several chunks of rows per group
    Layer(5, 60, 3, 260, 20, 2, 2),  # weights too large for the L2 cache
)


def some_lengths(batch: int, steps: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, steps + 1, (batch,), generator=generator)


def attention_inputs(case: Attention, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of the operator; what an earlier call left comes from the reference."""
    B, heads, T = case.B, case.heads, case.T
    q, k, v = (
        random(B, heads, T, size, seed=seed) for seed, size in enumerate((case.D, case.D, case.Dv))
    )
    w = random(heads, case.D, seed=3) if case.additive else None
    relevance, retained = None, 0
    if case.before:
        k_0 = random(B, heads, case.before, case.D, seed=4)
        v_0 = random(B, heads, case.before, case.Dv, seed=5)
        left = reference.relevancy_attention(
            random(B, heads, case.before, case.D, seed=6),
            k_0,
            v_0,
            w,
            some_lengths(B, case.before, seed=7),
            None,
            retained=0,
            window_size=case.window_size,
            top_k=case.top_k,
            scale=case.scale,
        ).memory
        k, v = (torch.cat([taken(old, left), new], 2) for old, new in ((k_0, k), (v_0, v)))
        relevance, retained = left.relevance.to(dtype), left.retained
    named = {"query": q, "key": k, "value": v, "score_weight": w}
    leaves = {n: x.to(dtype).requires_grad_() for n, x in named.items() if x is not None}
    lengths = some_lengths(B, T, seed=8) if case.lengths else None
    return {**leaves, "lengths": lengths, "relevance": relevance, "retained": retained}


def taken(rows: Tensor, memory: Memory) -> Tensor:
    index = memory.positions.clamp(min=0).unsqueeze(-1)
    return rows.gather(2, index.expand(*index.shape[:-1], rows.size(-1)))


def run_attention(
    case: Attention, given: dict[str, Any], grad: Tensor, suffix: str = ""
) -> dict[str, Any]:
    """The operators' results and gradients by name."""
    q, k, v, w = (given.get(name) for name in ("query", "key", "value", "score_weight"))
    lengths, relevance, retained = given["lengths"], given["relevance"], given["retained"]
    with torch.no_grad():
        output, lse, last, index, left = getattr(ops, f"relevancy_forward{suffix}")(
            q,
            k,
            v,
            w,
            lengths,
            relevance,
            retained,
            case.window_size,
            case.top_k,
            case.scale,
            case.keep_first,
        )
        grads = getattr(ops, f"relevancy_backward{suffix}")(
            grad, q, k, v, w, lengths, output, lse, last, retained, case.window_size, case.scale
        )
    names = ("query", "key", "value", "score_weight")
    found = {f"grad {n}": g for n, g in zip(names, grads, strict=True) if n in given}
    return {"output": output, **found, "last": last, "memory": (index, left)}


def expect_attention(case: Attention, given: dict[str, Any], grad: Tensor) -> dict[str, Any]:
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    result = reference.relevancy_attention(
        given["query"],
        given["key"],
        given["value"],
        given.get("score_weight"),
        given["lengths"],
        given["relevance"],
        retained=given["retained"],
        window_size=case.window_size,
        top_k=case.top_k,
        scale=case.scale,
        keep_first=case.keep_first,
    )
    grads = torch.autograd.grad(result.output, list(leaves.values()), grad, materialize_grads=True)
    found = {f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}
    memory = (result.memory.positions, result.memory.relevance)
    return {"output": result.output.detach(), **found, "last": result.last, "memory": memory}


def assert_same(
    actual: dict[str, Any], expected: dict[str, Any], plain: dict[str, Any] | None = None
) -> None:
    """The choice of keys exactly, values and gradients within tolerance (see closeness.py)."""
    assert torch.equal(actual["last"], expected["last"])
    (index, relevance), (wanted_index, wanted) = actual["memory"], expected["memory"]
    assert torch.equal(index, wanted_index), f"slots {index.tolist()}, not {wanted_index.tolist()}"
    assert (relevance[index < 0] == -1).all() and (wanted[index < 0] == -1).all()
    assert_close(relevance, wanted.to(relevance.dtype), "relevance")
    got, due = numbers(actual), numbers(expected)
    assert_as_accurate(got, due if plain is None else numbers(plain), due)


def numbers(found: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in found.items() if name not in ("last", "memory")}


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers as leaves in float64."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in given.items()
    }


def layer_inputs(case: Layer, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments of the operator by name; biases as one."""
    B, H, A = case.B, case.H, case.A
    sizes = {
        "input": (case.T, B, case.I),
        "h_0": (B, H),
        "c_0": (B, H),
        "context_0": (B, H),
        "weight_ih": (4 * H, case.I),
        "weight_hh": (4 * H, H),
        "bias": (4 * H,),
        "weight_query": (A, H),
        "weight_key": (A, H),
        "weight_score": (A,),
    }
    made = {
        name: random(*size, seed=seed) * (1.2 / size[-1] ** 0.5 if "weight" in name else 0.8)
        for seed, (name, size) in enumerate(sizes.items())
    }
    relevance, retained = None, 0
    if case.before:
        earlier = {**made, "input": random(case.before, B, case.I, seed=20)}
        left = run_reference(case, earlier, some_lengths(B, case.before, seed=21))
        index = left.memory.positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, H)
        made["memory"] = left.output.gather(0, index)
        relevance, retained = left.memory.relevance.to(dtype), left.memory.retained
    leaves = {name: x.to(dtype).requires_grad_() for name, x in made.items()}
    lengths = some_lengths(B, case.T, seed=22) if case.lengths else None
    shape = {"T": (case.T,), "TB": (case.T, B)}.get(case.mask)
    mask = None if shape is None else random_mask(*shape, p=0.5, seed=23)
    rest = {"lengths": lengths, "mask": mask, "relevance": relevance, "retained": retained}
    return {**leaves, **rest}


def run_reference(case: Layer, given: dict[str, Any], lengths: Tensor | None) -> Any:
    return reference.rel_lstm(
        given["input"],
        given["h_0"],
        given["c_0"],
        given["context_0"],
        given.get("memory"),
        given.get("relevance"),
        given["weight_ih"],
        given["weight_hh"],
        given["bias"],
        None,
        given["weight_query"],
        given["weight_key"],
        given["weight_score"],
        lengths=lengths,
        detach_mask=given.get("mask"),
        retained=given.get("retained", 0),
        window_size=case.window_size,
        top_k=case.top_k,
        keep_first=case.keep_first,
    )


OUTPUTS = ("output", "h_n", "c_n", "context_n")
GRADIENTS = ("input", "h_0", "c_0", "context_0", "memory", "weight_ih", "weight_hh", "bias")
GRADIENTS += ("weight_query", "weight_key", "weight_score")


def layer_grads(case: Layer, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = [(case.T, case.B, case.H)] + [(case.B, case.H)] * 3
    return [random(*size, seed=30 + k, dtype=dtype) for k, size in enumerate(sizes)]


def run_layer(
    case: Layer, given: dict[str, Any], grads: list[Tensor], suffix: str = ""
) -> dict[str, Any]:
    weights = [given[name] for name in ("weight_ih", "weight_hh")]
    attention = [given[name] for name in ("weight_query", "weight_key", "weight_score")]
    with torch.no_grad():
        *outputs, last, index, left, saved = getattr(ops, f"rel_lstm_forward{suffix}")(
            *(given[name] for name in ("input", "h_0", "c_0", "context_0")),
            given.get("memory"),
            given["relevance"],
            *weights,
            given["bias"],
            None,
            *attention,
            given["lengths"],
            given["mask"],
            given["retained"],
            case.window_size,
            case.top_k,
            case.keep_first,
            True,
        )
        found = getattr(ops, f"rel_lstm_backward{suffix}")(
            *grads,
            given["input"],
            given["c_0"],
            *weights,
            *attention,
            given["lengths"],
            given["mask"],
            last,
            saved,
            given["retained"],
            case.window_size,
            True,
            True,
        )
    found = without_second_bias(found)
    result = dict(zip(OUTPUTS, outputs, strict=True))
    result |= {f"grad {n}": g for n, g in zip(GRADIENTS, found, strict=True) if n in given}
    return {**result, "last": last, "memory": (index, left)}


def without_second_bias(grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by the names in ``GRADIENTS``: both biases have the same, in memory of its own."""
    one, other = grads[7:9]
    assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert one.numel() == 0 or one.data_ptr() != other.data_ptr()
    return [*grads[:8], *grads[9:]]


def expect_layer(case: Layer, given: dict[str, Any], grads: list[Tensor]) -> dict[str, Any]:
    result = run_reference(case, given, given["lengths"])
    leaves = {name: given[name] for name in GRADIENTS if name in given}
    found = torch.autograd.grad(
        result[:4], list(leaves.values()), grads, materialize_grads=True, allow_unused=True
    )
    expected = {name: x.detach() for name, x in zip(OUTPUTS, result[:4], strict=True)}
    expected |= {f"grad {n}": g for n, g in zip(leaves, found, strict=True)}
    memory = (result.memory.positions, result.memory.relevance)
    return {**expected, "last": result.last, "memory": memory}


def flat(found: dict[str, Any]) -> dict[str, Tensor]:
    index, relevance = found.pop("memory")
    return {**found, "index": index, "relevance": relevance}
