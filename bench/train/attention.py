"""A small Transformer of causal attention, in place of a recurrent layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import throughtime

BLOCKS, HEADS = 2, 4
LONGEST_WAVE = 1000  # of the positions, in steps over 2 pi


class Block(nn.Module):
    """Attention, then two linear layers, each added to its normalised input."""

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.attention_norm, self.linear_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attention = throughtime.RelevancyAttention(
            hidden_size, HEADS, batch_first=False, **options
        )
        self.linear = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Linear(2 * hidden_size, hidden_size),
        )

    def forward(self, input: Tensor) -> Tensor:
        x = input + self.attention(self.attention_norm(input))
        summed: Tensor = x + self.linear(self.linear_norm(x))
        return summed


class Transformer(nn.Module):
    """Maps ``[T, B, input_size]`` or packed to ``[T, B, hidden_size]`` and no state.

    Positions are added as sines and cosines. ``options`` are those of ``RelevancyAttention``.
    """

    def __init__(self, input_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Linear(input_size, hidden_size)
        self.blocks = nn.Sequential(*(Block(hidden_size, **options) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(hidden_size)
        rates = torch.arange(0, hidden_size, 2) * (-math.log(LONGEST_WAVE) / hidden_size)
        self.register_buffer("rates", rates.exp(), persistent=False)

    def forward(self, input: Tensor | PackedSequence) -> tuple[Tensor | PackedSequence, None]:
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input)
            output, _ = self(padded)  # causal: no step sees the padding after it
            return pack_padded_sequence(output, lengths, enforce_sorted=False), None
        angles = torch.arange(len(input), device=input.device).outer(self.get_buffer("rates"))
        positions = torch.cat([angles.sin(), angles.cos()], dim=1).unsqueeze(1)
        return self.norm(self.blocks(self.embedding(input) + positions)), None
