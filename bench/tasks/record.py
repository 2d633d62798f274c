"""What a run leaves in its folder: config.json, checkpoint.pt, log.csv, curves.svg and .png."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench.errors import UsageError
from bench.tasks.config import Config


@dataclass(frozen=True)
class Epoch:
    """One row of log.csv.

    ``updates`` counts from the start of the run; ``seconds`` and ``sequences_per_s`` are those of
    training alone, without evaluation; accuracies are fractions, the training one the mean over
    the epoch; gradient norms are taken before clipping.
    """

    epoch: int
    updates: int
    seconds: float
    loss: float
    train_accuracy: float
    validation_accuracy: float
    test_accuracy: float
    grad_norm_median: float
    grad_norm_max: float
    p: float
    sequences_per_s: float

    def line(self, epochs: int) -> str:
        """The summary that is printed after the epoch."""
        width = len(str(epochs))
        return (
            f"epoch {self.epoch:{width}d}/{epochs}  loss {self.loss:.4f}  accuracy: "
            f"train {self.train_accuracy:.3f} validation {self.validation_accuracy:.3f} "
            f"test {self.test_accuracy:.3f}  gradient norm: median {self.grad_norm_median:.3g} "
            f"max {self.grad_norm_max:.3g}  p {self.p:g}  "
            f"{self.sequences_per_s:.0f} sequences/s  {self.seconds:.1f} s"
        )


COLUMNS = tuple(field.name for field in fields(Epoch))


def best(history: Iterable[Epoch]) -> Epoch:
    """The epoch with the best validation accuracy, the first of equals."""
    return max(history, key=lambda epoch: (epoch.validation_accuracy, -epoch.epoch))


class RunFolder:
    """The folder of one run; every file in it is replaced as a whole or not at all.

    Args:
        path: the folder; made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"

    def start(self, config: Config, versions: dict[str, str]) -> None:
        """Begins a new run.

        Raises:
            UsageError: if the folder already holds one.
        """
        if self.checkpoint.exists():
            raise UsageError(
                f"{self.path} already holds a run; add --resume to continue it, "
                "or name another folder with --out"
            )
        self._make()
        config.save(self.path / "config.json", versions)

    def resume(self, config: Config, versions: dict[str, str]) -> dict[str, Any] | None:
        """The state after the last finished epoch, or None if there is none yet.

        Raises:
            UsageError: if that run had other options or its files cannot be read.
        """
        if not self.checkpoint.exists():
            return None
        try:
            stored = json.loads((self.path / "config.json").read_text())
            state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        except Exception as error:
            raise UsageError(
                f"--resume: cannot read the run in {self.path} ({type(error).__name__}); "
                "start anew with another --out"
            ) from error
        config.check_resumes(stored, self.path)
        config.save(self.path / "config.json", versions)
        return state

    def save(self, state: dict[str, Any], history: Iterable[Epoch]) -> None:
        """Writes checkpoint and log."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        _replace(self.checkpoint, buffer.getvalue())
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows({k: _plain(v) for k, v in asdict(epoch).items()} for epoch in history)
        _replace(self.path / "log.csv", text.getvalue().encode())

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out: cannot make {self.path}: {error.strerror}") from error


def _plain(value: float) -> float | str:
    return f"{value:.6g}" if isinstance(value, float) else value


def _replace(path: Path, content: bytes) -> None:
    """Writes beside the file and renames: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
