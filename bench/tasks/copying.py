"""The copying task: remember ten symbols over T steps, then say them.

Source: Kanuparthi et al., ICLR 2019 (arXiv 1810.03023), section on the copying task, with the
layout of the authors' code: the input is one number per step. Kerg et al., NeurIPS 2020 (arXiv
2006.09471), give it as a one-hot vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tasks.data import Stream, Task

SYMBOLS = 10
ALPHABET = 8
MARKER = 9
CLASSES = 9
VALIDATION_SIZE = 1000
TEST_SIZE = 5000


@dataclass(frozen=True)
class CopyingSequences:
    """Copying sequences; only the symbols are stored, the rest follows from ``delay``.

    Args:
        symbols: int64 ``[N, 10]`` from 1 to 8.
        delay: T, the steps between the last symbol and the first answer.
        one_hot: ten features per step instead of one number.

    Example:
        >>> data = CopyingSequences(torch.arange(1, 9).repeat(2)[:10].unsqueeze(0), delay=3)
        >>> x, y = data.batch(torch.tensor([0]))
        >>> x[:, 0, 0].int().tolist()
        [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        >>> y[:, 0].tolist()
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    """

    symbols: Tensor
    delay: int
    one_hot: bool = False

    def __len__(self) -> int:
        return len(self.symbols)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Input float ``[T + 20, B, 1 or 10]``: ten symbols, T - 1 zeros, a 9, ten zeros.

        Target int64 ``[T + 20, B]``: T + 10 zeros, then the ten symbols.
        """
        symbols = self.symbols[indices].T  # [10, B]
        x = torch.zeros(self.delay + 2 * SYMBOLS, len(indices), dtype=torch.int64)
        y = torch.zeros_like(x)
        x[:SYMBOLS] = symbols
        x[SYMBOLS + self.delay - 1] = MARKER
        y[-SYMBOLS:] = symbols
        return encode(x, MARKER + 1 if self.one_hot else None), y


def encode(x: Tensor, features: int | None) -> Tensor:
    """Symbols int64 ``[T, B]`` as float ``[T, B, features]``, one-hot, or ``[T, B, 1]``."""
    return x.unsqueeze(2).float() if features is None else F.one_hot(x, features).float()


def make(
    delay: int,
    *,
    train_size: int,
    updates_per_epoch: int,
    seed: int,
    one_hot: bool = False,
) -> Task:
    """The task with a delay of T steps; all data come from the seed.

    Args:
        delay: T, 1 or more; sequences have T + 20 steps.
        train_size: number of training sequences (h-detach paper: 100 000); 0: new ones at every
            update.
        updates_per_epoch: updates that make an epoch (h-detach paper: 1000).
        seed: of the symbols.
        one_hot: ten features per step instead of one number.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, generator: torch.Generator = generator) -> CopyingSequences:
        symbols = torch.randint(1, ALPHABET + 1, (count, SYMBOLS), generator=generator)
        return CopyingSequences(symbols, delay, one_hot)

    stream = Stream(lambda n, g: draw(n, g).batch(torch.arange(n)), seed)
    return Task(
        train=draw(train_size) if train_size else stream,
        validation=draw(VALIDATION_SIZE),
        test=draw(TEST_SIZE),
        input_size=MARKER + 1 if one_hot else 1,
        classes=CLASSES,
        target_steps=delay + 2 * SYMBOLS,
        scored_steps=SYMBOLS,
        updates_per_epoch=updates_per_epoch,
    )
