"""What a task gives to the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

ALL = slice(None)


class Data(Protocol):
    """A set of sequences."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, share: slice = ALL) -> tuple[Tensor | PackedSequence, Tensor]:
        """Input ``[T, B, features]``, or packed, and int64 targets ``[S, B]``, of a share."""
        ...


@dataclass(frozen=True)
class Sequences:
    """A stored set: ``inputs`` ``[N, T]`` and ``targets`` ``[N, K]`` for the last K steps.

    Args:
        inputs: numbers, or symbols that become one-hot vectors.
        targets: classes.
        steps: S, at least K; the target of the steps before the last K is 0.
        features: length of the one-hot vectors; 1 for numbers.
    """

    inputs: Tensor
    targets: Tensor
    steps: int = 1
    features: int = 1

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor, share: slice = ALL) -> tuple[Tensor, Tensor]:
        """Input float ``[T, B, features]`` and int64 targets ``[S, B]``."""
        indices = indices[share]
        x = self.inputs[indices].T.contiguous()
        coded = F.one_hot(x.long(), self.features) if self.features > 1 else x.unsqueeze(2)
        targets = self.targets[indices].T.long()
        return coded.float(), F.pad(targets, (0, 0, self.steps - len(targets), 0))


@dataclass(frozen=True)
class Task:
    """Three disjoint sets and how they are learned; ``train`` may be drawn anew for ever."""

    train: Data
    validation: Data
    test: Data
    features: int
    classes: int
    target_steps: int = 1  # the last steps that have a target
    scored_steps: int = 1  # the last steps that count for the accuracy
    updates_per_epoch: int | None = None  # on sequences drawn with replacement; None: each once

    def order(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """The training indices of one epoch, one tensor ``[B]`` per update, from the generator."""
        count = len(self.train)
        if self.updates_per_epoch is None:
            return list(torch.split(torch.randperm(count, generator=generator), batch))
        drawn = torch.randint(count, (self.updates_per_epoch, batch), generator=generator)
        return list(drawn.unbind(0))
