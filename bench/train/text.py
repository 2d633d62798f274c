"""The task text: the next character of a text file, at every step."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.arguments import UsageError
from bench.train.config import Config
from bench.train.task import Sequences, Task

VALIDATION, TEST = 0.05, 0.05  # of the text, its end
MOST_CHARACTERS = 256  # symbols of a sequence are bytes


def make(config: Config) -> Task:
    """Pieces of T characters, each to be told from those before it in its piece.

    The first nine tenths of the file are for training; the seed orders their pieces.
    """
    text = _read(config.file)
    characters = sorted(set(text))
    if len(characters) > MOST_CHARACTERS:
        raise UsageError(
            f"--file: wanted a text of at most {MOST_CHARACTERS} different characters, got "
            f"{len(characters)} in {config.file}; name another one, or transliterate it"
        )
    number = {character: k for k, character in enumerate(characters)}
    symbols = torch.tensor([number[character] for character in text], dtype=torch.uint8)
    ends = [round(len(text) * share) for share in (0, 1 - VALIDATION - TEST, 1 - TEST, 1)]
    parts = [symbols[ends[k] : ends[k + 1]] for k in range(3)]
    if min(map(len, parts)) <= config.T:
        raise UsageError(
            f"--file: wanted a text of at least {round((config.T + 1) / TEST)} characters for "
            f"--T {config.T}, got {len(text)} in {config.file}; give a smaller --T"
        )
    train, validation, test = (_pieces(part, config.T, len(characters)) for part in parts)
    return Task(
        train,
        validation,
        test,
        features=len(characters),
        classes=len(characters),
        target_steps=config.T,
        scored_steps=config.T,
    )


def _pieces(symbols: torch.Tensor, steps: int, features: int) -> Sequences:
    count = (len(symbols) - 1) // steps
    inputs, targets = symbols[: count * steps], symbols[1 : count * steps + 1]
    return Sequences(inputs.view(-1, steps), targets.view(-1, steps), steps, features)


def _read(name: str | None) -> str:
    if name is None:
        raise UsageError("--file: wanted a text file, got none; name one")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file: wanted a text in UTF-8, got {name}: {error}") from error
