"""The task pixels: images read pixel by pixel; the class is asked for at the end."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bench.arguments import UsageError
from bench.train.config import Config
from bench.train.task import Sequences, Task

TEST = 0.2  # of the images that come with scikit-learn
VALIDATION = 1 / 6
SPLIT_SEED = 0
IDX = {"images": 3, "labels": 1}  # kind of file and its dimensions
SETS = {"train": "train", "test": "t10k"}


def make(config: Config) -> Task:
    """The 1797 digits of 8 x 8 pixels that scikit-learn has, or a folder of IDX files.

    The split is the same for every seed.
    """
    if config.images is None:
        bunch = load_digits()
        learning, test = split(_sequences(bunch.data / 16, bunch.target), TEST)
    else:
        folder = Path(config.images)
        learning, test = (
            _sequences(read_idx(folder, part, "images") / 255, read_idx(folder, part, "labels"))
            for part in SETS.values()
        )
    if config.permute:
        generator = torch.Generator().manual_seed(config.permute_seed)
        order = torch.randperm(learning.inputs.size(1), generator=generator)
        learning, test = (Sequences(s.inputs[:, order], s.targets) for s in (learning, test))
    train, validation = split(learning, VALIDATION)
    return Task(train, validation, test, features=1, classes=int(learning.targets.max()) + 1)


def split(sequences: Sequences, fraction: float) -> tuple[Sequences, Sequences]:
    """Two disjoint parts, always the same; the second has ``fraction`` of every class."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    labels = sequences.targets.flatten()
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        second[shuffled[: round(fraction * len(members))]] = True
    pixels, targets = sequences.inputs, sequences.targets
    return Sequences(pixels[~second], targets[~second]), Sequences(pixels[second], targets[second])


def read_idx(folder: Path, part: str, kind: str) -> Tensor:
    """One file as MNIST has them, compressed or not: images ``[N, pixels]`` or labels ``[N]``.

    Its name is like ``train-images-idx3-ubyte.gz``. It begins with two zeros, the type 8 (uint8),
    the number of dimensions, and each of them as a big-endian 32-bit number.
    """
    name = f"{part}-{kind}-idx{IDX[kind]}-ubyte"
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise UsageError(
            f"--images: wanted {name} or {name}.gz in {folder}, got neither; MNIST and "
            "Fashion-MNIST come as such files (Debian: dataset-fashion-mnist)"
        )
    try:
        opened = gzip.open if found[0].suffix == ".gz" else open
        with opened(found[0], "rb") as file:
            content = file.read()
        head = 4 + 4 * IDX[kind]
        if content[:4] != bytes([0, 0, 8, IDX[kind]]):
            raise ValueError(f"its first bytes are {content[:4].hex(' ')}")
        sizes = np.frombuffer(content, ">u4", IDX[kind], 4).tolist()
        array = np.frombuffer(content, np.uint8, offset=head).reshape(sizes)
    except (EOFError, OSError, ValueError) as error:
        raise UsageError(
            f"--images: wanted an IDX file of {kind} in {found[0]}, got a damaged or other one: "
            f"{error}; get it again"
        ) from error
    return torch.from_numpy(array.copy()).flatten(1) if kind == "images" else torch.tensor(array)


def _sequences(pixels: object, labels: object) -> Sequences:
    return Sequences(
        torch.as_tensor(pixels, dtype=torch.float32), torch.as_tensor(labels).unsqueeze(1)
    )
