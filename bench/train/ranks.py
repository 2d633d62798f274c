"""The processes of one run: alone, or as many as ``torchrun`` started.

Every process draws the same batches and takes its share of each. Gradients are averaged by
DistributedDataParallel, so the run is that of one process with the whole batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process is number ``rank`` of ``world``, on the device ``device``."""

    rank: int
    world: int
    device: torch.device

    def share(self, count: int) -> slice:
        """The samples of this process among ``count``; sizes differ by one at most."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def seed(self, *numbers: int) -> int:
        """A seed of its own for each process and each choice of numbers."""
        words = np.random.SeedSequence([*numbers, self.rank, self.world]).generate_state(2)
        return int(words[0]) << 31 ^ int(words[1])

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients over the processes."""
        return DistributedDataParallel(model) if self.world > 1 else model

    def sum(self, values: list[float]) -> list[float]:
        """Each value added up over the processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return [float(value) for value in total]


def alone(device: str = "cpu") -> Ranks:
    return Ranks(0, 1, torch.device(device))


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started with this one, or this one alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield alone(device)
        return
    own = torch.device(device)
    if own.type == "cuda" and own.index is None:
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Ranks(distributed.get_rank(), world, own)
    finally:
        distributed.destroy_process_group()
