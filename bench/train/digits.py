"""The task digits: handwritten digits, read pixel by pixel; the class is asked for at the end."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bench.arguments import UsageError
from bench.train.config import Config
from bench.train.task import Sequences, Task

CLASSES = 10
SIDE = 28
PARTS = ("train", "t10k")  # of MNIST: for learning, for the test
SPLIT_SEED = 0
BUNDLED_TEST = 0.2
VALIDATION = 1 / 6


def split(sequences: Sequences, fraction: float) -> tuple[Sequences, Sequences]:
    """Two disjoint parts, always the same; the second has ``fraction`` of every class."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    labels = sequences.targets.flatten()
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(CLASSES):
        members = torch.nonzero(labels == label).flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        second[shuffled[: round(fraction * len(members))]] = True
    pixels, targets = sequences.inputs, sequences.targets
    return Sequences(pixels[~second], targets[~second]), Sequences(pixels[second], targets[second])


def make(config: Config) -> Task:
    """The 1797 bundled images of 8 x 8 pixels, or MNIST; the split is the same for every seed."""
    if config.mnist is None:
        bunch = load_digits()
        pixels = torch.tensor(bunch.data, dtype=torch.float32) / 16  # grey values 0 to 16
        bundled = Sequences(pixels, torch.tensor(bunch.target).unsqueeze(1))
        learning, test = split(bundled, BUNDLED_TEST)
    else:
        learning, test = (read_mnist(Path(config.mnist), part) for part in PARTS)
    if config.permute:
        generator = torch.Generator().manual_seed(config.permute_seed)
        order = torch.randperm(config.steps, generator=generator)
        learning, test = (Sequences(s.inputs[:, order], s.targets) for s in (learning, test))
    train, validation = split(learning, VALIDATION)
    if not len(validation):
        raise UsageError(
            f"--mnist: {config.mnist}: wanted training images of which a sixth can be held out "
            f"for validation, got {len(learning)}; give 4 or more of one digit"
        )
    return Task(train, validation, test, features=1, classes=CLASSES)


def read_mnist(folder: Path, part: str) -> Sequences:
    """One part of MNIST from its IDX files, checked against each other."""
    images = _read(folder, f"{part}-images", SIDE, SIDE)
    labels = _read(folder, f"{part}-labels")
    if len(images) != len(labels) or int(labels.max()) >= CLASSES:
        found = f"{len(labels)} up to {int(labels.max())}"
        raise _broken(folder / f"{part}-labels", f"{len(images)} labels from 0 to 9", found)
    return Sequences(images.flatten(1).float() / 255, labels.unsqueeze(1))


def _read(folder: Path, stem: str, *sizes: int) -> Tensor:
    """The values ``[N, *sizes]`` of an IDX file in any of its usual spellings, plain or gzipped.

    Source: the home page of the MNIST database (LeCun, Cortes, Burges): a magic number that holds
    the number of dimensions, their sizes, all of them big-endian uint32, and the values.
    """
    dimensions = 1 + len(sizes)
    end = f"idx{dimensions}-ubyte"
    names = [f"{stem}{separator}{end}{suffix}" for separator in "-." for suffix in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise _broken(folder, f"one of {', '.join(names)}", "no such file")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        magic, count, *others = np.frombuffer(data, ">u4", 1 + dimensions).tolist()
        values = np.frombuffer(data, "u1", offset=4 + 4 * dimensions).reshape(count, *others)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise _broken(path, "a whole IDX file", str(error)) from error
    if magic != 0x800 + dimensions or others != list(sizes) or count == 0:
        wanted = f"the magic number {0x800 + dimensions} and the sizes {['N', *sizes]}"
        raise _broken(path, wanted, f"{magic} and {[count, *others]}")
    return torch.tensor(values)


def _broken(path: Path, wanted: str, found: str) -> UsageError:
    return UsageError(f"--mnist: {path}: wanted {wanted}, found {found}; download the file again")
