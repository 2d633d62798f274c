"""Handwritten digits, read pixel by pixel: the class is asked for after the last pixel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.errors import require
from bench.tasks import idx
from bench.tasks.data import Task

SPLIT_SEED = 0
BUNDLED_TEST = 0.2
VALIDATION = 1 / 6


@dataclass(frozen=True)
class PixelSequences:
    """Images as sequences of one pixel per step.

    Args:
        pixels: float ``[N, T]`` from 0 to 1.
        labels: int64 ``[N]``.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Input ``[T, B, 1]`` and target ``[1, B]``."""
        x = self.pixels[indices].T.unsqueeze(-1).contiguous()
        return x, self.labels[indices].unsqueeze(0)

    def subset(self, indices: Tensor) -> PixelSequences:
        """The sequences at these indices."""
        return PixelSequences(self.pixels[indices], self.labels[indices])


def permutation(steps: int, seed: int) -> Tensor:
    """The one order in which all images are read under ``--permute``.

    Example:
        >>> bool((permutation(64, 0) == permutation(64, 0)).all())
        True
    """
    return torch.randperm(steps, generator=torch.Generator().manual_seed(seed))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint parts in which every class has the same share.

    Args:
        labels: int64 ``[N]``.
        fraction: share of the second part, 0 to 1.
        seed: decides who goes where.

    Returns:
        (indices of the first part, indices of the second), each sorted.

    Example:
        >>> first, second = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), 0.5, seed=0)
        >>> len(first), len(second)
        (3, 3)
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        second[shuffled[: round(fraction * len(members))]] = True
    return torch.nonzero(~second).flatten(), torch.nonzero(second).flatten()


def make(*, mnist: Path | None = None, permute_seed: int | None = None) -> Task:
    """Pixel by pixel digits with held-out test and validation sets.

    The split never depends on a run's seed, so runs are comparable.

    Args:
        mnist: folder with MNIST's IDX files (T = 784); None takes the 1797 images of 8 x 8
            pixels that come with scikit-learn (T = 64).
        permute_seed: read the pixels in this fixed random order; None reads row by row.
    """
    if mnist is None:
        everything = _bundled()
        kept, held_out = stratified_split(everything.labels, BUNDLED_TEST, SPLIT_SEED)
        learning, test = everything.subset(kept), everything.subset(held_out)
    else:
        learning, test = (_mnist(mnist, part) for part in idx.PARTS)
    if permute_seed is not None:
        order = permutation(learning.pixels.shape[1], permute_seed)
        learning = PixelSequences(learning.pixels[:, order], learning.labels)
        test = PixelSequences(test.pixels[:, order], test.labels)
    kept, held_out = stratified_split(learning.labels, VALIDATION, SPLIT_SEED)
    return Task(
        train=learning.subset(kept),
        validation=learning.subset(held_out),
        test=test,
        input_size=1,
        classes=idx.CLASSES,
        target_steps=1,
        scored_steps=1,
    )


def _bundled() -> PixelSequences:
    bunch = require("sklearn.datasets").load_digits()
    pixels = torch.tensor(bunch.data, dtype=torch.float32) / 16  # grey values 0 to 16
    return PixelSequences(pixels, torch.tensor(bunch.target, dtype=torch.int64))


def _mnist(folder: Path, part: str) -> PixelSequences:
    images, labels = idx.read_pair(folder, part)
    return PixelSequences(images.flatten(1).float() / 255, labels.long())
