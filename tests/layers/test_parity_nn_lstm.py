"""``throughtime.LSTM`` against ``torch.nn.LSTM``, over every option, forward and all gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from cases import RESULTS, random, with_gradients
from closeness import assert_all_close
from throughtime import LSTM

T, B, INPUT_SIZE, H = 4, 3, 2, 5
LENGTHS = {"sorted": [4, 2, 1], "unsorted": [2, 4, 3]}
INPUTS = ("batched", "unbatched", *LENGTHS)
NAMES = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")
OPTIONS = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product((1, 2), (True, False), (False, True), (False, True), (0, 2))
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items())


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.LSTM, LSTM]:
    """Both layers, which draw the same weights from a seed."""
    torch.manual_seed(1)
    theirs = nn.LSTM(INPUT_SIZE, H, dtype=dtype, **options)
    drawn_next = torch.rand(1)
    torch.manual_seed(1)
    ours = LSTM(INPUT_SIZE, H, dtype=dtype, **options)
    assert torch.equal(torch.rand(1), drawn_next)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(x, expected[name]) for name, x in ours.state_dict().items())
    return theirs, ours


def make_input(kind: str, batch_first: bool) -> tuple[Tensor, Tensor | PackedSequence]:
    """A leaf, and the input made of it."""
    leaf = random(T, B, INPUT_SIZE, seed=1)
    if kind == "unbatched":
        leaf = leaf[:, 0].clone().requires_grad_()
        return leaf, leaf
    leaf = (leaf.transpose(0, 1).contiguous() if batch_first else leaf).requires_grad_()
    if kind == "batched":
        return leaf, leaf
    lengths = torch.tensor(LENGTHS[kind])
    packed = pack_padded_sequence(leaf, lengths, batch_first, enforce_sorted=kind == "sorted")
    return leaf, packed


def make_states(layer: nn.LSTM, kind: str) -> tuple[Tensor, Tensor]:
    count = layer.num_layers * (1 + layer.bidirectional)
    shape = (count,) if kind == "unbatched" else (count, B)
    h_0 = random(*shape, layer.proj_size or H, seed=2).requires_grad_()
    return h_0, random(*shape, H, seed=3).requires_grad_()


def run(layer: nn.LSTM, kind: str, with_states: bool) -> dict[str, Tensor]:
    """All results and gradients of one call."""
    leaf, made = make_input(kind, layer.batch_first)
    states = make_states(layer, kind) if with_states else None
    result = layer(made, states)
    if isinstance(made, PackedSequence):
        assert isinstance(result[0], PackedSequence)
        for mine, given in zip(result[0][1:], made[1:], strict=True):
            assert mine is given or torch.equal(mine, given)
    leaves = {"input": leaf} | dict(zip(("h_0", "c_0"), states or (), strict=False))
    return with_gradients(result, leaves | dict(layer.named_parameters()))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_results_and_gradients(options: dict[str, Any], kind: str) -> None:
    theirs, ours = pair(**options)
    for with_states in (False, True):
        expected, found = run(theirs, kind, with_states), run(ours, kind, with_states)
        assert_all_close(found, expected)
        for name in RESULTS:
            assert found[name].stride() == expected[name].stride()


def test_reset_parameters_draws_what_theirs_draws() -> None:
    for layer in (layers := pair()):
        torch.manual_seed(4)
        layer.reset_parameters()
    assert torch.equal(*(layer.weight_hh_l0 for layer in layers))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("more", [{}, {"proj_size": 2}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_dropout_draws_what_theirs_draws(
    kind: str, more: dict[str, Any], bidirectional: bool
) -> None:
    layers = pair(bidirectional=bidirectional, dropout=0.5, num_layers=3, **more)
    found = []
    for layer in layers:
        torch.manual_seed(5)
        found.append(run(layer, kind, True) | {"drawn next": torch.rand(1).double()})
    assert_all_close(found[1], found[0])
    assert (run(layers[1], kind, True)["output"] - found[1]["output"]).abs().max() > 1e-3
    assert_all_close(*(run(layer.eval(), kind, True) for layer in layers[::-1]))


def test_no_grad_and_eval_give_the_training_values(backend: str) -> None:
    _, ours = pair(num_layers=2)
    ours.backend = backend
    x = random(T, B, INPUT_SIZE, seed=1)
    trained, _ = ours(x)
    with torch.no_grad():
        assert torch.equal(ours(x)[0], trained)
    with torch.inference_mode():
        assert torch.equal(ours(x)[0], trained)
    evaluated, _ = ours.eval()(x)
    assert torch.equal(evaluated, trained)
    evaluated.sum().backward()
    assert ours.weight_hh_l0.grad is not None
