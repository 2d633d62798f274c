"""PackedSequence: layout, order of the batch, states, masks and resets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from cases import random, random_mask
from closeness import assert_close
from throughtime import LSTM, RelLSTM, RelState

LENGTHS = (2, 5, 3)


def packed() -> PackedSequence:
    return pack_sequence(sequences(), enforce_sorted=False)


def sequences() -> list[Tensor]:
    return [random(length, 4, seed=k) for k, length in enumerate(LENGTHS)]


def make(**options: object) -> LSTM:
    torch.manual_seed(1)
    return LSTM(4, 5, dtype=torch.float64, **options)


def assert_same_states(together: Any, alone: Any, b: int) -> None:
    """The states of one sample; slots that are empty alone need not be there together."""
    if isinstance(together, RelState):
        for one, other in zip(together.position[:, :, b], alone.position[:, :, 0], strict=True):
            assert one[one >= 0].tolist() == other[other >= 0].tolist()
        together, alone = ((state.h, state.c, state.context) for state in (together, alone))
    for one, other in zip(together, alone, strict=True):
        assert_close(one[:, b], other[:, 0])


@pytest.mark.parametrize("kind", ["LSTM", "bidirectional LSTM", "RelLSTM"])
def test_each_sequence_alone_gives_the_same(backend: str, kind: str) -> None:
    """Outputs, states and gradients, with masks and resets given in the caller's batch order."""
    count, layer, options = 2, nn.Module(), {}
    if kind == "RelLSTM":
        sizes = {"num_layers": 2, "window_size": 2, "top_k": 2}
        layer = RelLSTM(4, 5, **sizes, dtype=torch.float64, backend=backend)
        _, hx = layer(packed())
        hx = hx.detach()
    else:
        count = 4 if kind.startswith("bi") else 2
        layer = make(num_layers=2, bidirectional=count == 4, backend=backend)
        hx = (random(count, 3, 5, seed=7), random(count, 3, 5, seed=8))
        options["reset"] = random_mask(5, 3, p=0.3, seed=2)
    options["detach_mask"] = random_mask(count, 5, 3, p=0.5, seed=1)
    parameters = list(layer.parameters())

    output, states = layer(packed(), hx, **options)
    assert isinstance(output, PackedSequence)
    padded, _ = pad_packed_sequence(output)
    weight = random(5, 3, padded.size(2), seed=5)
    found = torch.autograd.grad((padded * weight).sum(), parameters)

    total = torch.zeros((), dtype=torch.float64)
    for b, sequence in enumerate(sequences()):
        length, one = LENGTHS[b], slice(b, b + 1)
        own = (
            hx.index_select(torch.tensor([b]))
            if kind == "RelLSTM"
            else tuple(x[:, one] for x in hx)
        )
        shorter = {name: x[..., :length, one] for name, x in options.items()}
        alone, end = layer(sequence.unsqueeze(1), own, **shorter)
        assert_close(padded[:length, b], alone[:, 0])
        assert_same_states(states, end, b)
        total = total + (alone[:, 0] * weight[:length, b]).sum()
    for mine, expected in zip(found, torch.autograd.grad(total, parameters), strict=True):
        assert_close(mine, expected)


def gradient(lstm: LSTM, mask: Tensor | None) -> Tensor:
    output, _ = lstm(packed(), detach_mask=mask)
    return torch.autograd.grad(output.data.square().sum(), lstm.weight_hh_l0)[0]


def test_a_mask_per_step_counts_positions_in_the_sample(backend: str) -> None:
    lstm, mask = make(backend=backend, bidirectional=True), random_mask(5, p=0.5, seed=3)
    first = gradient(lstm, mask)
    for same in (mask.unsqueeze(1).expand(5, 3), mask.view(1, 5, 1).expand(2, 5, 1)):
        assert torch.equal(gradient(lstm, same), first)
    assert (gradient(lstm, None) - first).abs().max() > 1e-4


def test_draws_one_mask_of_the_longest_length() -> None:
    lstm = make(detach_prob=0.5, num_layers=2)
    torch.manual_seed(3)
    drawn = gradient(lstm, None)
    torch.manual_seed(3)
    assert torch.equal(gradient(lstm, (torch.rand(10) < 0.5).view(2, 5, 1)), drawn)
