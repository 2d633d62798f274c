"""The task digits: handwritten digits, read pixel by pixel; the class is asked for at the end."""

from __future__ import annotations

import torch
from sklearn.datasets import fetch_openml, load_digits
from torch import Tensor

from bench.arguments import UsageError
from bench.train.config import Config
from bench.train.task import Sequences, Task

CLASSES = 10
MNIST_TEST = 10_000  # the last images
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
        learning, test = split(_sequences(bunch.data / 16, bunch.target), BUNDLED_TEST)
    else:
        pixels, labels = read_mnist(config.mnist)
        learning = _sequences(pixels[:-MNIST_TEST] / 255, labels[:-MNIST_TEST])
        test = _sequences(pixels[-MNIST_TEST:] / 255, labels[-MNIST_TEST:])
    if config.permute:
        generator = torch.Generator().manual_seed(config.permute_seed)
        order = torch.randperm(config.steps, generator=generator)
        learning, test = (Sequences(s.inputs[:, order], s.targets) for s in (learning, test))
    train, validation = split(learning, VALIDATION)
    return Task(train, validation, test, features=1, classes=CLASSES)


def read_mnist(folder: str) -> tuple[Tensor, Tensor]:
    """The 70,000 images and their labels, as scikit-learn keeps them in a folder.

    It takes them from openml.org unless they are there, in the order of the original files.
    """
    try:
        bunch = fetch_openml("mnist_784", version=1, data_home=folder, as_frame=False)
    except (EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--mnist: wanted MNIST in {folder}, or from openml.org, got: {reason}; name a folder "
            "where scikit-learn has put it on a machine with a network"
        ) from error
    return torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target.astype(int))


def _sequences(pixels: object, labels: object) -> Sequences:
    return Sequences(
        torch.as_tensor(pixels, dtype=torch.float32), torch.as_tensor(labels).unsqueeze(1)
    )
