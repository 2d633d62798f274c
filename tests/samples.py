"""Sample calls of every operation, for the operators of every backend, and what they must give.

A sample is a :class:`Recurrence` (the LSTM), a :class:`Layer` (RelLSTM) or an :class:`Attention`.
Its ``inputs()`` are arguments and output gradients by the names in the operators' schemas.
:func:`run` calls the operators with them, :func:`expect` the reference. ``suffix`` is empty for the
compiled CPU kernels, ``"_triton"`` for the Triton ones.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cases import Shape, as_dtype, options_for, random, random_mask, starts, tensors
from closeness import assert_as_accurate, assert_close
from throughtime import reference

Given = dict[str, Any]

EVERYTHING = 2**62
ALL = {"save": True, "need_input": True, "need_weights": True, "need_reset": True}


@dataclass(frozen=True)
class Recurrence:
    """One layer of the LSTM in one direction, with an option of ``OPTIONS``.

    ``anew``: resets start from a state.
    """

    shape: Shape
    option: str = "plain"
    anew: bool = False
    op: ClassVar = "lstm"

    def inputs(self, dtype: torch.dtype = torch.float64) -> Given:
        T, B, out = self.shape.T, self.shape.B, self.shape.P or self.shape.H
        grads = {"output": (T, B, out), "h_n": (B, out), "c_n": (B, self.shape.H)}
        options: Given = {"reverse": False} | options_for(self.shape)[self.option]
        if options.get("detach_mask") is not None:  # operators take no mask per step
            options["detach_mask"] = options["detach_mask"].view(T, -1).expand(T, B)
        leaves = tensors(self.shape, dtype) | (starts(self.shape, dtype) if self.anew else {})
        return ALL | leaves | options | _grads(grads, dtype)

    def __str__(self) -> str:
        return f"{self.shape}-{self.option}" + "-anew" * self.anew


@dataclass(frozen=True)
class Attention:
    """Sizes of one call; an earlier call of ``before`` steps left its memory if that is not 0.

    ``group`` heads of queries attend the keys of one; ``heads`` are those of keys. ``packed`` lists
    the lengths of samples that lie one behind the other in T.
    """

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
    screen_every: int = 1
    given: bool = False
    normalize: bool = False
    group: int = 1
    packed: tuple[int, ...] = ()
    op: ClassVar = "relevancy"

    def inputs(self, dtype: torch.dtype = torch.float64) -> Given:
        B, heads, T = self.B, self.heads, self.T
        sizes = {"query": self.D, "key": self.D, "value": self.Dv}
        of = {"query": heads * self.group, "key": heads, "value": heads}
        made = {n: random(B, of[n], T, d, seed=k) for k, (n, d) in enumerate(sizes.items())}
        if self.additive:
            made["score_weight"] = random(of["query"], self.D, seed=3)
        names = ("window_size", "top_k", "keep_first", "screen_every", "normalize")
        rest: Given = {name: getattr(self, name) for name in names}
        rest["given"] = random(B, heads, T, seed=4, dtype=dtype).abs() if self.given else None
        rest["return_relevance"] = self.given or self.normalize or self.screen_every > 1
        rest |= {"retained": 0, "relevance": None, "seen": None, "scale": max(1, self.D) ** -0.5}
        if self.before:
            steps = self.before
            old = {
                n: random(B, of[n], steps, d, seed=6 - k) for k, (n, d) in enumerate(sizes.items())
            }
            if self.given:
                old["given"] = random(B, heads, steps, seed=5).abs()
            ends = _ends(True, B, steps, 7)
            left = definition("relevancy", made | rest | old | ends)["memory"]
            for name in ("key", "value"):
                made[name] = torch.cat([taken(old[name], left.positions), made[name]], 2)
            rest |= {"relevance": left.relevance.to(dtype), "retained": left.retained}
            rest["seen"] = ends["lengths"]
        if self.packed:
            assert (B, sum(self.packed)) == (1, T)
            rest["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(self.packed)])
        grads = _grads({"output": (B, of["query"], T, self.Dv)}, dtype, seed=9)
        return as_dtype(made, dtype) | rest | _ends(self.lengths, B, T, 8) | grads

    def __str__(self) -> str:
        sizes = f"{self.B}x{self.heads}x{self.T}x{self.D}x{self.Dv}"
        sizes += f"-m{self.screen_every}" * (self.screen_every > 1)
        sizes += f"-g{self.group}" * (self.group > 1)
        options = ("additive", "lengths", "keep_first", "given", "normalize", "packed")
        return _id(self, sizes, *options)


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
    op: ClassVar = "rel_lstm"

    def inputs(self, dtype: torch.dtype = torch.float64) -> Given:
        T, B, H, A = self.T, self.B, self.H, self.A
        states = dict.fromkeys(("h_0", "c_0", "context_0"), (B, H))
        weights = {"weight_ih": (4 * H, self.I), "weight_hh": (4 * H, H), "bias_ih": (4 * H,)}
        weights |= {"weight_query": (A, H), "weight_key": (A, H), "weight_score": (A,)}
        sizes = {"input": (T, B, self.I), **states, **weights}
        made = {
            name: random(*size, seed=seed)
            * (1.2 / max(1, size[-1]) ** 0.5 if "weight" in name else 0.8)
            for seed, (name, size) in enumerate(sizes.items())
        }
        rest: Given = {name: getattr(self, name) for name in ("window_size", "top_k", "keep_first")}
        rest |= {"retained": 0, "relevance": None}
        if self.before:
            earlier = made | rest | {"input": random(self.before, B, self.I, seed=20)}
            found = definition("rel_lstm", earlier | _ends(True, B, self.before, 21))
            left = found["memory"]
            index = left.positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, H)
            made["memory"] = found["output"].gather(0, index)
            rest |= {"relevance": left.relevance.to(dtype), "retained": left.retained}
        mask = {"": None, "T": (T, 1), "TB": (T, B)}[self.mask]
        if mask is not None:
            mask = random_mask(*mask, p=0.5, seed=23).expand(T, B)
        rest["detach_mask"] = mask
        grads = {"output": (T, B, H)} | dict.fromkeys(("h_n", "c_n", "context_n"), (B, H))
        return (
            ALL
            | as_dtype(made, dtype)
            | rest
            | _ends(self.lengths, B, T, 22)
            | _grads(grads, dtype)
        )

    def __str__(self) -> str:
        sizes = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-A{self.A}-mask{self.mask}"
        return _id(self, sizes, "lengths", "keep_first")


def _id(case: Attention | Layer, sizes: str, *flags: str) -> str:
    sizes += f"-w{case.window_size}-k{case.top_k}-p{case.before}"
    return "-".join([sizes, *(name for name in flags if getattr(case, name))])


def _grads(
    sizes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 30
) -> dict[str, Tensor]:
    """A gradient for each result."""
    return {
        f"grad_{name}": random(*size, seed=seed + k, dtype=dtype)
        for k, (name, size) in enumerate(sizes.items())
    }


def _ends(wanted: bool, batch: int, steps: int, seed: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "lengths": torch.randint(0, steps + 1, (batch,), generator=generator) if wanted else None
    }


def taken(rows: Tensor, positions: Tensor) -> Tensor:
    """The rows ``[B, heads, S, D]`` that a memory points at."""
    index = positions.clamp(min=0).unsqueeze(-1)
    return rows.gather(2, index.expand(*index.shape[:-1], rows.size(-1)))


Sample = Recurrence | Attention | Layer
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
    Attention(2, 2, 40, 8, 0, 5, 4),  # values without features
    Attention(1, 1, 30, 6, 0, 3, 2, additive=True),
    Attention(1, 1, 60, 20, 70, 20, 30),  # more candidates than two vectors
    Attention(2, 2, 100, 33, 66, 10, 7),  # several blocks of queries
    Attention(1, 2, 150, 64, 64, 64, 64),
    Attention(2, 1, 75, 16, 16, 3, 70, before=20, lengths=True),
)
BEYOND_PAPER = (  # not by the Triton kernels
    Attention(2, 2, 23, 8, 8, 5, 4, screen_every=3),
    Attention(2, 1, 31, 17, 40, 3, 2, additive=True, screen_every=8),
    Attention(2, 2, 21, 16, 5, 4, 3, additive=True, lengths=True, before=11, screen_every=4),
    Attention(3, 2, 40, 5, 5, 1, 3, lengths=True, before=13, screen_every=5),
    Attention(2, 1, 26, 5, 5, 3, 4, keep_first=True, screen_every=6),
    Attention(2, 1, 9, 4, 4, 3, 3, before=4, screen_every=100),
    Attention(1, 1, 150, 20, 70, 20, 30, screen_every=32),
    Attention(1, 1, 130, 300, 20, 40, 20, screen_every=40),  # a product of two chains
    Attention(2, 1, 75, 16, 16, 3, 5, before=20, lengths=True, screen_every=20),
    Attention(2, 2, 40, 8, 8, 5, 4, normalize=True),
    Attention(2, 2, 40, 8, 8, 5, 4, given=True, lengths=True),
    Attention(2, 1, 40, 8, 8, 5, 4, normalize=True, additive=True, before=9, screen_every=4),
    Attention(2, 1, 40, 8, 8, 5, 4, given=True, additive=True, before=9),
    Attention(2, 2, 40, 12, 9, 5, 4, group=3),
    Attention(1, 1, 60, 16, 16, 20, 10, group=2, before=9, screen_every=4, lengths=True),
    Attention(2, 1, 30, 8, 8, 5, 4, group=2, additive=True, normalize=True),
    Attention(1, 2, 30, 8, 8, 5, 4, group=4, additive=True, before=9, given=True),
    Attention(1, 2, 60, 12, 9, 5, 4, packed=(0, 21, 1, 0, 38)),
    Attention(1, 1, 150, 16, 16, 30, 10, packed=(100, 50), screen_every=8, group=2),
    Attention(1, 2, 40, 8, 8, 5, 4, packed=(20, 20), additive=True, given=True),
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


def arguments(name: str, given: Given) -> tuple[Any, ...]:
    """What the schema of an operator asks for, in its order; what is not given is None."""
    schema = getattr(torch.ops.throughtime, name).default._schema
    return tuple(given.get(argument.name) for argument in schema.arguments)


def operate(name: str, given: Given) -> dict[str, Tensor]:
    """The results of an operator by name."""
    operator = getattr(torch.ops.throughtime, name).default
    names = [result.name for result in operator._schema.returns]
    return dict(zip(names, operator(*arguments(name, given)), strict=True))


def run(case: Sample, given: Given, suffix: str = "") -> dict[str, Tensor]:
    """Results and gradients of an operation; what it saves for itself is left out."""
    with torch.no_grad():
        found = operate(f"{case.op}_forward{suffix}", given)
        found |= operate(f"{case.op}_backward{suffix}", given | found)
    return {name: x for name, x in found.items() if name not in ("saved", "lse")}


def definition(op: str, given: Given) -> Given:
    """What the reference makes of the arguments, by the names of the operators' results."""
    function = getattr(reference, {"relevancy": "relevancy_attention"}.get(op, op))
    given = given | {"hx": (given.get("h_0"), given.get("c_0"))}
    if "reset_h" in given:
        given |= {"reset_hx": (given["reset_h"], given["reset_c"])}
    result = function(**{
        name: given.get(name)
        for name, parameter in inspect.signature(function).parameters.items()
        if name in given or parameter.default is parameter.empty
    })  # fmt: skip
    if op == "lstm":
        return {"output": result[0], "h_n": result[1][0], "c_n": result[1][1]}
    found: Given = result._asdict()
    found.pop("attention", None)
    if not given.get("return_relevance"):
        found.pop("received", None)
    return found | {"memory_index": result.memory[0], "memory_relevance": result.memory[1]}


def expect(case: Sample, given: Given, backend: str = "reference") -> dict[str, Tensor]:
    """:func:`run` by the definition, or by autograd of the CPU operators, for all leaves."""
    cpu = backend == "cpu"
    found = operate(f"{case.op}_forward", given) if cpu else definition(case.op, given)
    found = {n: x for n, x in found.items() if n not in ("memory", "saved", "lse")}
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    pairs = [(x, given[f"grad_{n}"]) for n, x in found.items() if f"grad_{n}" in given]
    outputs, grads = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), grads, materialize_grads=True, allow_unused=True
    )
    found = {name: x.detach() for name, x in found.items()}
    return found | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def detached(given: Given) -> Given:
    """The same arguments without any that requires a gradient."""
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}


def doubled(given: Given) -> Given:
    """The same numbers in float64."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in given.items()
    }


CHOICE = ("last", "memory_index", "memory_relevance")


def numbers(found: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results that are numbers, of those in ``like``."""
    return {name: found[name] for name in like if name not in CHOICE}


def assert_same(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    plain: dict[str, Tensor] | None = None,
) -> None:
    """The choice of keys exactly, values and gradients within tolerance (see closeness.py)."""
    if "last" in expected:
        index, wanted = actual["memory_index"], expected["memory_index"]
        assert torch.equal(actual["last"], expected["last"])
        assert torch.equal(index, wanted), f"slots {index.tolist()}, not {wanted.tolist()}"
        relevance, due = actual["memory_relevance"], expected["memory_relevance"]
        assert (relevance[index < 0] == -1).all() and (due[index < 0] == -1).all()
        assert_close(relevance, due.to(relevance.dtype), "relevance")
    due = numbers(expected, expected)
    assert_as_accurate(numbers(actual, due), numbers(plain or expected, due), due)
