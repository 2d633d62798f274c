"""The tasks copying and denoise: remember ten symbols over many steps, then say them.

A sequence of T + 20 steps shows ten symbols from 1 to 8 among T + 9 steps, then a marker, then ten
zeros; the ten symbols are asked for in the last ten steps. In copying the symbols are the first ten
steps; in denoise they lie anywhere, so a policy that keeps the first states must fail.

Sources: copying: Kanuparthi et al., ICLR 2019 (arXiv 1810.03023), with the layout of the authors'
code, one number per step. Denoise, and one-hot vectors: Kerg et al., NeurIPS 2020 (arXiv
2006.09471).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.train.config import Config
from bench.train.task import ALL, Sequences, Task

SYMBOLS = 10
ALPHABET = 8
MARKERS = {"copying": 9, "denoise": 10}
VALIDATION_SIZE = 1000
TEST_SIZE = 5000


def draw(config: Config, count: int, generator: torch.Generator) -> Sequences:
    symbols = torch.randint(1, ALPHABET + 1, (count, SYMBOLS), generator=generator)
    places = torch.arange(SYMBOLS).expand(count, SYMBOLS)
    if config.task == "denoise":
        random = torch.rand(count, config.T + SYMBOLS - 1, generator=generator)
        places = random.topk(SYMBOLS).indices.sort().values
    inputs = torch.zeros(count, config.steps, dtype=torch.uint8)
    inputs.scatter_(1, places, symbols.byte())
    inputs[:, -SYMBOLS - 1] = MARKERS[config.task]
    return Sequences(inputs, symbols, config.steps, features(config))


def features(config: Config) -> int:
    """Of each step: a one-hot vector or a number."""
    return MARKERS[config.task] + 1 if config.one_hot else 1


@dataclass(frozen=True)
class Stream:
    """Sequences without end: every batch is drawn anew, from its first index and the seed alone.

    So a checkpoint holds the data by holding their order.
    """

    config: Config

    def __len__(self) -> int:
        return 2**40

    def batch(self, indices: Tensor, share: slice = ALL) -> tuple[Tensor, Tensor]:
        """As many new sequences as there are indices."""
        # torch's generator takes the low 32 bits of its seed and hardly mixes them: batches from
        # seeds in arithmetic progression resemble each other.
        mixed = int(indices[0]) * 0x9E3779B97F4A7C15 + self.config.seed * 0xBF58476D1CE4E5B9
        mixed %= 2**64
        mixed = (mixed ^ (mixed >> 31)) * 0x94D049BB133111EB % 2**64
        generator = torch.Generator().manual_seed(mixed >> 32)
        return draw(self.config, len(indices), generator).batch(torch.arange(len(indices)), share)


def make(config: Config) -> Task:
    """Copying or denoise; all data come from the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    return Task(
        train=draw(config, config.train_size, generator) if config.train_size else Stream(config),
        validation=draw(config, VALIDATION_SIZE, generator),
        test=draw(config, TEST_SIZE, generator),
        features=features(config),
        classes=MARKERS[config.task],
        target_steps=config.steps,
        scored_steps=SYMBOLS,
        updates_per_epoch=config.updates_per_epoch,
    )
