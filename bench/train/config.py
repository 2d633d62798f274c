"""The options of a training run: each field of ``Config`` is an option of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import arguments
from bench.arguments import UsageError
from bench.train.model import LAYERS

TASKS = {
    "pixels": "classify images read pixel by pixel: digits of 8 x 8, or IDX files as MNIST's",
    "copying": "remember ten symbols over T steps; the defaults are the h-detach paper's",
    "denoise": "remember ten symbols scattered over T steps (relevancy screening paper)",
    "text": "the next character of a text file; bits per character: loss / log 2",
    "series": "classify time series of different lengths, from the UEA and UCR archives",
}
RECALL = ("copying", "denoise")
SIZED = (*RECALL, "text")  # by --T
OPTIMIZERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
CGROUP = Path("/sys/fs/cgroup")

# "images" is the task pixels with --images.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "pixels": {},
    "images": {"batch": 100, "lr": 1e-3, "epochs": 200, "anneal": 40},
    "copying": {
        "T": 100, "batch": 100, "lr": 1e-3, "p": 0.5, "epochs": 600, "anneal": 40,
        "updates_per_epoch": 1000, "train_size": 100_000,
    },
    "denoise": {
        "T": 200, "batch": 10, "lr": 1e-3, "p": 0.0, "epochs": 200,
        "updates_per_epoch": 1000, "one_hot": True, "window_size": 15,
    },
    "text": {"T": 150, "batch": 64, "p": 0.0, "epochs": 20},
    "series": {"batch": 16, "p": 0.0},
}  # fmt: skip
# Runs of minutes on two cores, the same for every layer; new sequences at every update.
PRESET: Mapping[str, Any] = {
    "T": 50, "hidden": 64, "batch": 10, "lr": 2e-3, "p": 0.0, "anneal": 0, "epochs": 100,
    "updates_per_epoch": 500, "train_size": 0, "one_hot": True,
}  # fmt: skip


def _option(
    default: Any, text: str, kind: Callable[[str], Any] = str, metavar: str | None = "N",
    *, tasks: tuple[str, ...] = tuple(TASKS), choices: tuple[str, ...] | None = None,
) -> Any:  # fmt: skip
    about = {"text": text, "kind": kind, "metavar": metavar, "tasks": tasks, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    """One run; two runs with equal configurations on one machine give equal results."""

    task: str
    layer: str = _option(
        "throughtime", "layer that is trained", metavar=None, choices=tuple(LAYERS)
    )
    T: int = _option(0, "steps of delay, or of a piece", arguments.positive, tasks=SIZED)
    permute: bool = _option(False, "read pixels in a fixed random order", tasks=("pixels",))
    permute_seed: int = _option(0, "seed of that order", arguments.natural, tasks=("pixels",))
    images: str | None = _option(None, "folder of IDX files", str, "DIR", tasks=("pixels",))
    file: str | None = _option(None, "text in UTF-8", str, "FILE", tasks=("text",))
    dataset: str = _option("JapaneseVowels", "name in the archive", str, "NAME", tasks=("series",))
    hidden: int = _option(128, "units", arguments.positive, "H")
    batch: int = _option(50, "sequences per update, of all processes", arguments.positive, "B")
    lr: float = _option(2e-3, "learning rate", arguments.above_zero, "X")
    optimizer: str = _option("adam", "of the weights", metavar=None, choices=tuple(OPTIMIZERS))
    clip: float = _option(
        1.0, "largest norm of the gradient; 0: any", arguments.not_below_zero, "X"
    )
    chrono: int = _option(0, "T_max of chrono initialisation; 0: none", arguments.natural)
    p: float = _option(0.25, "detach probability", arguments.probability, "P")
    anneal: int = _option(0, "p is 0 in the last N epochs", arguments.natural)
    epochs: int = _option(60, "length of the run", arguments.positive)
    updates_per_epoch: int = _option(0, "length of an epoch", arguments.positive, tasks=RECALL)
    train_size: int = _option(
        0, "training sequences; 0: new ones at every update", arguments.natural, tasks=RECALL
    )
    one_hot: bool = _option(False, "symbols as one-hot vectors, not numbers", tasks=RECALL)
    window_size: int = _option(10, "latest steps attended by rel-*", arguments.positive)
    top_k: int = _option(15, "earlier steps retained by rel-*", arguments.natural)
    screen_every: int = _option(
        1, "queries between changes of what rel-attention retains", arguments.positive, "M"
    )
    normalize: bool = _option(False, "rel-attention counts attention by number of keys")
    seed: int = _option(0, "of weights, data and masks", arguments.natural)
    threads: int = _option(torch.get_num_threads, "(as torch has them)", arguments.thread_count)
    device: str = _option("cpu", "where the model lives", metavar="NAME")
    backend: str = _option("auto", "which kernels throughtime uses", metavar="NAME")

    @property
    def steps(self) -> int:
        """Of a sequence: known before any data are read, but for series."""
        if self.task in RECALL:
            return self.T + 20
        return {"text": self.T, "pixels": 784 if self.images else 64}.get(self.task, 1)

    @property
    def title(self) -> str:
        return f"{self.task}, {LAYERS[self.layer].label}, p = {self.p:g}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run is kept unless ``--out`` says so."""
        words = {"permuted": self.permute, "images": self.images, f"T{self.T}": self.T}
        parts = [self.task, *(word for word, told in words.items() if told), self.layer]
        return Path("runs", "-".join([*parts, f"p{self.p:g}", f"seed{self.seed}"]))

    def check_memory(self, delays: Sequence[int] = ()) -> None:
        """Makes sure that the least memory that a run needs is free; evaluated at ``delays``."""
        steps = max([self.steps, *(delay + 20 for delay in delays)])
        batch = self.batch if self.task in RECALL else min(self.batch, 60_000)
        # Weights (3 H^2 float32 at least), gradients and Adam's two moments; but for the gradients
        # once more, as the checkpoint is made in memory. Output, its gradient, and what the
        # backward pass needs. Answers and inputs. Indices of an epoch.
        needed = 7 * 4 * 3 * self.hidden**2 + 6 * 4 * steps * batch * self.hidden
        needed += self.train_size * (80 + steps) + 8 * self.updates_per_epoch * batch
        free = free_memory()
        if self.device == "cpu" and needed > free:
            raise UsageError(
                f"wanted a run that fits into {free / 2**30:.3g} GiB, the free memory, got one "
                f"that needs at least {needed / 2**30:.3g} GiB; give smaller numbers: --hidden, "
                "--batch, --T, --transfer, --train-size or --updates-per-epoch"
            )

    def check_resumes(self, stored: Mapping[str, Any], source: Path) -> None:
        """Makes sure that this run may continue the one with the stored options.

        More epochs than before are fine unless p is annealed: then the number of epochs decides
        when p becomes 0. Other threads compute the same. An option that the stored run lacks is
        younger than that run: its default does what the run did.
        """
        stored = {entry.name: entry.default for entry in fields(self)} | dict(stored)
        before = stored["epochs"]
        longer = self.anneal == 0 and isinstance(before, int) and self.epochs > before
        differing = [
            f"{flag(name)} is {value!r}, was {stored[name]!r}"
            for name, value in asdict(self).items()
            if stored[name] != value and name != "threads" and not (name == "epochs" and longer)
        ]
        if differing:
            raise UsageError(
                f"--resume: {source} is of a run with other options: {'; '.join(differing)}; "
                "give the old ones, or start anew with another --out"
            )


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    return min(free, limit - used)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, task: str, *, several: bool = False) -> None:
    """The options of a task, one for each field; what is not given stays absent.

    With ``several`` an option that is no switch takes any number of values.
    """
    for entry in fields(Config):
        about = entry.metadata
        if task not in about.get("tasks", ()):
            continue
        default = DEFAULTS[task].get(entry.name, entry.default)
        kwargs: dict[str, Any] = {"help": about["text"], "default": argparse.SUPPRESS}
        if isinstance(default, bool):
            kwargs["action"] = "store_true"
        else:
            kwargs |= {"nargs": "+"} if several else {}
            kwargs |= {"type": about["kind"]} | {k: about[k] for k in ("metavar", "choices")}
            kwargs["help"] += f" ({default})" if isinstance(default, (int, float, str)) else ""
        parser.add_argument(flag(entry.name), **kwargs)


def from_arguments(args: argparse.Namespace) -> Config:
    """The run that the options describe, defaults filled in; a UsageError if they contradict."""
    given = {e.name: getattr(args, e.name) for e in fields(Config) if hasattr(args, e.name)}
    kind = "images" if "images" in given else args.task
    preset = getattr(args, "preset", None)
    values = dict(DEFAULTS[kind]) | dict(PRESET if preset else {})
    layer = LAYERS[given.get("layer", "throughtime")]
    if layer.screens or "p" not in layer.options:
        values |= {"p": 0.0, "anneal": 0}
    if layer.screens and kind == "copying":
        values["one_hot"] = True
    config = Config(**(values | given))
    for name, value in given.items():
        using = [key for key, other in LAYERS.items() if name in other.options]
        if value and using and config.layer not in using:
            raise UsageError(
                f"{flag(name)} makes no difference to --layer {config.layer}, got {value}: "
                f"leave it out, or use one of {', '.join(using)}"
            )
    if config.anneal > config.epochs:
        raise UsageError(
            f"--anneal must be at most --epochs ({config.epochs}), got {config.anneal}"
        )
    return config
