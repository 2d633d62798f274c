"""What a task gives to the trainer, whatever its data are."""

from __future__ import annotations

from collections.abc import Callable
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
class Stream:
    """Sequences without end: every batch is drawn anew, from its first index alone.

    So the order of the data, whose state a checkpoint holds, decides the data too.

    Args:
        draw: makes ``count`` sequences, input and target, from a generator.
        seed: another seed gives other sequences for the same index.
    """

    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    seed: int

    def __len__(self) -> int:
        return 2**40

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As many new sequences as there are indices."""
        # torch's generator takes the low 32 bits of its seed and hardly mixes them: batches from
        # seeds in arithmetic progression resemble each other.
        mixed = (int(indices[0]) * 0x9E3779B97F4A7C15 + self.seed * 0xBF58476D1CE4E5B9) % 2**64
        mixed = (mixed ^ (mixed >> 31)) * 0x94D049BB133111EB % 2**64
        return self.draw(len(indices), torch.Generator().manual_seed(mixed >> 32))


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
    target_steps: int
    scored_steps: int
    updates_per_epoch: int | None = None

    def order(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """The training indices of one epoch, one tensor ``[B]`` per update.

        Args:
            batch: sequences per update; the last update of an epoch may get fewer.
            generator: the order depends on its state alone.
        """
        count = len(self.train)
        if self.updates_per_epoch is None:
            return list(torch.split(torch.randperm(count, generator=generator), batch))
        drawn = torch.randint(count, (self.updates_per_epoch, batch), generator=generator)
        return list(drawn.unbind(0))
