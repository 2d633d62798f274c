"""PackedSequence: layout, order of the batch, states, masks and resets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from cases import random, random_mask
from closeness import assert_close
from throughtime import LSTM

LENGTHS = (2, 5, 3)


def sequences() -> list[Tensor]:
    return [random(length, 4, seed=k) for k, length in enumerate(LENGTHS)]


def make(**options: object) -> LSTM:
    torch.manual_seed(1)
    return LSTM(4, 5, dtype=torch.float64, **options)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_each_sequence_alone_gives_the_same(backend: str, bidirectional: bool) -> None:
    """Outputs, states and gradients, with masks and resets given in the caller's batch order."""
    lstm = make(num_layers=2, bidirectional=bidirectional, backend=backend)
    count = 4 if bidirectional else 2
    hx = (random(count, 3, 5, seed=7), random(count, 3, 5, seed=8))
    mask = random_mask(count, 5, 3, p=0.5, seed=1)
    reset = random_mask(5, 3, p=0.3, seed=2)
    parameters = list(lstm.parameters())

    packed = pack_sequence(sequences(), enforce_sorted=False)
    output, (h_n, c_n) = lstm(packed, hx, detach_mask=mask, reset=reset)
    assert isinstance(output, PackedSequence)
    padded, _ = pad_packed_sequence(output)
    weight = random(5, 3, padded.size(2), seed=5)
    loss = (padded * weight).sum() + h_n.square().sum() + c_n.square().sum()
    found = torch.autograd.grad(loss, parameters)

    total = torch.zeros((), dtype=torch.float64)
    for b, sequence in enumerate(sequences()):
        length = LENGTHS[b]
        alone, (h, c) = lstm(
            sequence.unsqueeze(1),
            (hx[0][:, b : b + 1], hx[1][:, b : b + 1]),
            detach_mask=mask[:, :length, b : b + 1],
            reset=reset[:length, b : b + 1],
        )
        assert_close(padded[:length, b], alone[:, 0])
        assert_close(h_n[:, b], h[:, 0])
        assert_close(c_n[:, b], c[:, 0])
        total = total + (alone[:, 0] * weight[:length, b]).sum()
        total = total + h.square().sum() + c.square().sum()
    for mine, expected in zip(found, torch.autograd.grad(total, parameters), strict=True):
        assert_close(mine, expected)


def test_a_mask_per_step_counts_positions_in_the_sample(backend: str) -> None:
    lstm = make(backend=backend, bidirectional=True)
    mask = random_mask(5, p=0.5, seed=3)
    packed = pack_sequence(sequences(), enforce_sorted=False)
    gradients = []
    for given in (mask, mask.unsqueeze(1).expand(5, 3), mask.view(1, 5, 1).expand(2, 5, 1)):
        output, _ = lstm(packed, detach_mask=given)
        gradients.append(torch.autograd.grad(output.data.square().sum(), lstm.weight_hh_l0)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    output, _ = lstm(packed)
    uncut = torch.autograd.grad(output.data.square().sum(), lstm.weight_hh_l0)[0]
    assert (uncut - gradients[0]).abs().max() > 1e-4


def test_draws_one_mask_of_the_longest_length() -> None:
    lstm = make(detach_prob=0.5, num_layers=2)
    packed = pack_sequence(sequences(), enforce_sorted=False)
    torch.manual_seed(3)
    first, _ = lstm(packed)
    grad = torch.autograd.grad(first.data.square().sum(), lstm.weight_hh_l1)[0]
    torch.manual_seed(3)
    mask = (torch.rand(10) < 0.5).view(2, 5, 1)
    second, _ = lstm(packed, detach_mask=mask)
    assert torch.equal(torch.autograd.grad(second.data.square().sum(), lstm.weight_hh_l1)[0], grad)
