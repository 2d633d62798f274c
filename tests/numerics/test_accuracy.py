"""The rule for numbers: the error against float64 is at most twice that of plain PyTorch.

Plain PyTorch is ``nn.LSTM``, or the reference where there is no such layer, in the same dtype; the
error is the root mean square over a tensor. ``pytest -s`` of this file prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import compiled_kernels  # noqa: F401
from cases import RESULTS, random, with_gradients
from closeness import assert_rule, rms
from samples import Attention, Layer, doubled, expect, numbers, run
from throughtime import LSTM

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One LSTM: T, B, I, H, what its numbers are like, and where the loss is."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    kind: str = "default"
    loss: str = "all"

    def __str__(self) -> str:
        return f"{self.kind}-{self.loss}-T{self.T}-B{self.B}-I{self.I}-H{self.H}"


def scaled(factor: float) -> Callable[[nn.LSTM, Tensor], Tensor]:
    return lambda layer, x: factor * x


def without_bias(layer: nn.LSTM, x: Tensor) -> Tensor:
    layer.bias_ih_l0.zero_(), layer.bias_hh_l0.zero_()
    return 1e-30 * x


def saturated(layer: nn.LSTM, x: Tensor) -> Tensor:
    layer.bias_ih_l0.add_(10 * random(4 * layer.hidden_size, seed=3, dtype=torch.float32))
    return x


def remembering(layer: nn.LSTM, x: Tensor) -> Tensor:
    H = layer.hidden_size
    layer.bias_ih_l0[:H] -= 3
    layer.bias_ih_l0[H : 2 * H] += 7
    return x


def one_huge(layer: nn.LSTM, x: Tensor) -> Tensor:
    x[len(x) // 2, 0, 0] = 1e37
    return x


KINDS: dict[str, Callable[[nn.LSTM, Tensor], Tensor]] = {
    "default": scaled(1.0),
    "packed": scaled(1.0),  # nn.LSTM has another path for it
    "large": scaled(100.0),
    "huge": scaled(1e30),
    "tiny": without_bias,
    "one-huge": one_huge,
    "saturated": saturated,
    "memory": remembering,
}

CASES = (
    *(Case(100, 8, 32, 96, kind) for kind in KINDS),
    *(Case(60, 32, 32, 96, kind, "last") for kind in ("default", "packed", "saturated", "memory")),
    Case(300, 1, 128, 128),
    Case(784, 10, 1, 128),
    Case(100, 30, 1, 128, "packed", "last"),
    Case(30, 16, 256, 256),
    Case(12, 8, 1024, 1024),
    Case(12, 8, 600, 1024, "packed", "last"),
    Case(3000, 2, 4, 16, "memory"),
    Case(4000, 1, 4, 16, "packed"),  # theirs takes memory and time with the square of T
    pytest.param(Case(50_000, 1, 4, 32, "memory", "last"), marks=pytest.mark.slow),
    pytest.param(Case(100, 16, 1024, 1024), marks=pytest.mark.slow),
    pytest.param(Case(784, 100, 1, 128), marks=pytest.mark.slow),
)


def train(layer: nn.Module, case: Case, x: Tensor, lengths: Tensor) -> Named:
    leaves = {"input": x}
    for seed, name in enumerate(("h_0", "c_0"), 5):
        leaves[name] = random(1, case.B, case.H, seed=seed).float().to(x.dtype)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    given, *states = leaves.values()
    result = layer(
        pack_padded_sequence(given, lengths) if case.kind == "packed" else given, tuple(states)
    )
    used = ("h_n", "c_n") if case.loss == "last" else RESULTS
    return with_gradients(result, leaves | dict(layer.named_parameters()), used)


def show(name: str, actual: Named, plain: Named, exact: Named) -> None:
    """One line of the table: the output, and the tensor of the largest ratio."""
    errors = {n: (rms(actual[n], e), rms(plain[n], e)) for n, e in exact.items()}
    ratio = {n: ours / max(theirs, 1e-9) for n, (ours, theirs) in errors.items()}
    print(f"\n{name}:", end="")
    for n in ("output", max(ratio, key=lambda n: ratio[n])):
        print(f"  {n} {errors[n][0]:.1e} / {errors[n][1]:.1e} = {ratio[n]:.2f}", end="")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lstm(case: Case) -> None:
    theirs = nn.LSTM(case.I, case.H)
    x = random(case.T, case.B, case.I, seed=1, dtype=torch.float32)
    with torch.no_grad():
        x = KINDS[case.kind](theirs, x)
    ours = LSTM(case.I, case.H, backend="cpu")
    ours.load_state_dict(theirs.state_dict())
    # Nearly equal: with the loss on the last step a gradient in h_0 is the shortest sample's alone,
    # and the error of one sample is chance.
    lengths = torch.linspace(case.T, case.T - 3, case.B).long()
    actual, plain = (train(layer, case, x, lengths) for layer in (ours, theirs))
    exact = train(theirs.double(), case, x.double(), lengths)
    show(str(case), actual, plain, exact)
    assert_rule(actual, plain, exact)


# The first keys are kept, so that rounding cannot change the choice.
SCREENED = (
    Layer(200, 4, 8, 96, 64, 6, 4, keep_first=True),
    Layer(12, 4, 300, 600, 300, 4, 3, keep_first=True),
    Layer(320, 1, 3, 20, 20, 300, 5, keep_first=True),
    pytest.param(Layer(1000, 6, 3, 20, 20, 5, 4, keep_first=True), marks=pytest.mark.slow),
    Attention(2, 2, 150, 64, 64, 10, 10, keep_first=True),
    Attention(2, 2, 150, 64, 64, 10, 10, additive=True, keep_first=True),
    Attention(1, 1, 700, 16, 16, 650, 5, keep_first=True),
    Attention(1, 1, 400, 16, 16, 390, 5, additive=True, keep_first=True),
    Attention(2, 1, 1500, 8, 8, 4, 4, additive=True, keep_first=True),
    Attention(1, 1, 40, 1500, 1500, 8, 4, keep_first=True),
)


@pytest.mark.parametrize("case", SCREENED, ids=str)
def test_screening(case: Attention | Layer) -> None:
    for factor in (1.0, 8.0) if isinstance(case, Attention) else (1.0,):
        given = case.inputs(torch.float32)
        if isinstance(case, Attention):
            given["query"].data *= factor
        found = run(case, given), expect(case, given), expect(case, doubled(given))
        assert all(torch.equal(one["last"], found[0]["last"]) for one in found)
        actual, plain, exact = (numbers(one, found[2]) for one in found)
        show(f"{case} * {factor}", actual, plain, exact)
        assert_rule(actual, plain, exact)
