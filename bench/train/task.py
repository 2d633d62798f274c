"""What a task gives to the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Sequences(Protocol):
    """A set of labelled sequences."""

    def __len__(self) -> int:
        """Number of sequences."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Input ``[T, B, features]`` and int64 targets ``[S, B]`` for the last S steps."""


@dataclass(frozen=True)
class Task:
    """Three disjoint sets and how they are learned.

    Args:
        train, validation, test: the sets.
        input_size: features per step.
        classes: number of classes.
        target_steps: S, the last steps that have a target (1: only the end of the sequence).
        scored_steps: the last steps that count for the accuracy, at most ``target_steps``.
        updates_per_epoch: updates on sequences drawn with replacement; None: each once.
    """

    train: Sequences
    validation: Sequences
    test: Sequences
    input_size: int
    classes: int
    target_steps: int = 1
    scored_steps: int = 1
    updates_per_epoch: int | None = None

    def order(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """The training indices of one epoch, one tensor ``[B]`` per update, from the generator."""
        count = len(self.train)
        if self.updates_per_epoch is None:
            return list(torch.split(torch.randperm(count, generator=generator), batch))
        drawn = torch.randint(count, (self.updates_per_epoch, batch), generator=generator)
        return list(drawn.unbind(0))
