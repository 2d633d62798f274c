"""The task series: classify time series of several features and of different lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from bench.arguments import UsageError, require
from bench.train.config import Config
from bench.train.pixels import VALIDATION
from bench.train.task import ALL, Task

PARTS = ("train", "test")


@dataclass(frozen=True)
class Series:
    """A stored set: N series ``[T_n, features]`` and their classes ``[N]``."""

    inputs: list[Tensor]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor, share: slice = ALL) -> tuple[PackedSequence, Tensor]:
        """Packed series and int64 targets ``[1, B]``."""
        indices = indices[share]
        chosen = [self.inputs[index] for index in indices.tolist()]
        return pack_sequence(chosen, enforce_sorted=False), self.targets[indices].unsqueeze(0)


def make(config: Config) -> Task:
    """A data set of the UEA and UCR archives that sktime has or fetches, by its name.

    Features are scaled by mean and standard deviation of the training set; missing values are 0
    then. A sixth of that set validates.
    """
    load = require("sktime.datasets").load_UCR_UEA_dataset
    try:
        frames = [load(config.dataset, split=part, return_X_y=True) for part in PARTS]
    except Exception as error:  # each data set fails in its own way
        raise UsageError(
            f"--dataset: wanted a classification set that sktime has or can fetch, got "
            f"{config.dataset!r} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "JapaneseVowels, PLAID, ACSF1 and OSULeaf come with it"
        ) from error
    parts = [[_steps(row) for row in frame.itertuples(index=False)] for frame, _ in frames]
    learned = torch.cat(parts[0])
    learned = learned[learned.isfinite().all(1)]
    mean, scale = learned.mean(0), learned.std(0).clamp(min=torch.finfo().eps)
    classes = {label: k for k, label in enumerate(sorted({*frames[0][1], *frames[1][1]}))}
    whole, test = (
        Series([((x - mean) / scale).nan_to_num(0) for x in part],
               torch.tensor([classes[label] for label in labels]))
        for part, (_, labels) in zip(parts, frames, strict=True)
    )  # fmt: skip
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    held = math.ceil(len(order) * VALIDATION)
    validation, train = (_part(whole, some) for some in (order[:held], order[held:]))
    return Task(train, validation, test, features=len(mean), classes=len(classes))


def _steps(row: Any) -> Tensor:
    """A row of sktime's nested table, one cell per feature, as ``[T, features]``."""
    return torch.stack([torch.tensor(cell.to_numpy(), dtype=torch.float32) for cell in row], 1)


def _part(series: Series, indices: Tensor) -> Series:
    return Series([series.inputs[k] for k in indices.tolist()], series.targets[indices])
