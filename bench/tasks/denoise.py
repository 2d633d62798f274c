"""The denoise task: remember ten symbols that lie anywhere among T + 9 steps of nothing.

Unlike in copying, the first keys are mostly blank, so a policy that keeps the first ones must fail.

Source: Kerg et al., NeurIPS 2020 (arXiv 2006.09471), with the layout of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.tasks.copying import ALPHABET, SYMBOLS, TEST_SIZE, VALIDATION_SIZE, encode
from bench.tasks.data import Stream, Task

MARKER = 10
CLASSES = 10


@dataclass(frozen=True)
class DenoiseSequences:
    """Denoise sequences.

    Args:
        symbols: int64 ``[N, 10]`` from 1 to 8.
        places: int64 ``[N, 10]``, ascending steps below T + 9.
        delay: T; sequences have T + 20 steps.
        one_hot: eleven features per step instead of one number.

    Example:
        >>> data = DenoiseSequences(torch.full((1, 10), 7), torch.arange(10).unsqueeze(0) + 2, 4)
        >>> x, y = data.batch(torch.tensor([0]))
        >>> x[:, 0, 0].int().tolist()
        [0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        >>> y[-11:, 0].tolist()
        [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]
    """

    symbols: Tensor
    places: Tensor
    delay: int
    one_hot: bool = False

    def __len__(self) -> int:
        return len(self.symbols)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Input float ``[T + 20, B, 1 or 11]``: T + 9 steps with symbols, a 10, ten zeros.

        Target int64 ``[T + 20, B]``: T + 10 zeros, then the ten symbols in their order.
        """
        symbols = self.symbols[indices].T  # [10, B]
        x = torch.zeros(self.delay + 2 * SYMBOLS, len(indices), dtype=torch.int64)
        y = torch.zeros_like(x)
        x.scatter_(0, self.places[indices].T, symbols)
        x[self.delay + SYMBOLS - 1] = MARKER
        y[-SYMBOLS:] = symbols
        return encode(x, MARKER + 1 if self.one_hot else None), y


def make(
    delay: int,
    *,
    train_size: int,
    updates_per_epoch: int,
    seed: int,
    one_hot: bool = True,
) -> Task:
    """The task with T + 9 steps for the symbols; all data come from the seed.

    Args:
        delay: T, 1 or more.
        train_size: number of training sequences; 0: new ones at every update, as the authors do.
        updates_per_epoch: updates that make an epoch.
        seed: of symbols and places.
        one_hot: eleven features per step instead of one number.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, generator: torch.Generator = generator) -> DenoiseSequences:
        symbols = torch.randint(1, ALPHABET + 1, (count, SYMBOLS), generator=generator)
        random = torch.rand(count, delay + SYMBOLS - 1, generator=generator)
        places = random.topk(SYMBOLS, dim=1).indices.sort(dim=1).values
        return DenoiseSequences(symbols, places, delay, one_hot)

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
