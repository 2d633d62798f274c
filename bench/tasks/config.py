"""Everything that decides the outcome of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.errors import UsageError


@dataclass(frozen=True)
class Config:
    """One run; two runs with equal configurations on one machine give equal results.

    Args:
        task: ``"digits"``, ``"copying"`` or ``"denoise"``.
        layer: a key of ``layers.LAYERS``.
        T: delay of copying and denoise; 0 for digits, whose images decide.
        permute: digits in a fixed random pixel order, drawn from ``permute_seed``.
        mnist: folder with MNIST's IDX files; None: the digits that come with scikit-learn.
        hidden: units H.
        batch: sequences per update.
        lr: Adam's learning rate.
        clip: largest norm of the gradient.
        p: detach probability 0 to 1.
        anneal: p is 0 in the last so many epochs.
        epochs, updates_per_epoch, train_size: length of the run; the last two not for digits.
            A train_size of 0 draws new sequences at every update.
        one_hot: symbols as one-hot vectors instead of numbers.
        window_size, top_k: of relevancy screening.
        stop_at: end when two epochs in a row reach this validation accuracy.
        seed: of weights, data and masks.
        threads: threads of the process.
        device: where the model lives.
        backend: which kernels ``throughtime`` uses.
    """

    task: str
    layer: str = "throughtime"
    T: int = 0
    permute: bool = False
    permute_seed: int = 0
    mnist: str | None = None
    hidden: int = 128
    batch: int = 50
    lr: float = 2e-3
    clip: float = 1.0
    p: float = 0.25
    anneal: int = 0
    epochs: int = 60
    updates_per_epoch: int = 0
    train_size: int = 0
    one_hot: bool = False
    window_size: int = 10
    top_k: int = 15
    stop_at: float | None = None
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    backend: str = "auto"

    def save(self, path: Path, versions: Mapping[str, str]) -> None:
        """Writes the options and the versions that ran them as JSON."""
        path.write_text(json.dumps({**asdict(self), "versions": dict(versions)}, indent=2) + "\n")

    def check_resumes(self, stored: Mapping[str, object], folder: Path) -> None:
        """Makes sure that this run may go on from one with the stored options.

        More epochs than before are fine unless p is annealed, because then the number of epochs
        decides when p falls.

        Raises:
            UsageError: naming every option that differs.
        """
        mine = asdict(replace(self, epochs=0))
        theirs = {**mine, **stored, "epochs": 0}
        differing = [
            f"{option(name)} is {mine[name]!r}, was {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]
        before = stored.get("epochs")
        longer = isinstance(before, int) and self.epochs > before and self.anneal == 0
        if before != self.epochs and not longer:
            differing.append(f"--epochs is {self.epochs}, was {before}")
        if differing:
            raise UsageError(
                f"--resume: the run in {folder} was started with other options: "
                f"{'; '.join(differing)}; give the old ones, or start anew with another --out"
            )


def option(name: str) -> str:
    """The command line's spelling of a field.

    Example:
        >>> option("train_size")
        '--train-size'
    """
    return "--" + name.replace("_", "-")
