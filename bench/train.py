"""``train digits|copying|denoise``: trains one recurrent layer and records the run."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import throughtime
from bench import arguments
from bench.errors import UsageError, require
from bench.tasks import attention, model, tasks, transfer
from bench.tasks.config import Config, option
from bench.tasks.layers import LAYERS
from bench.tasks.record import Epoch, RunFolder, best
from bench.tasks.trainer import NonFiniteLossError, Trainer

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"batch": 50, "lr": 2e-3, "p": 0.25, "epochs": 60, "anneal": 0},
    "mnist": {"batch": 100, "lr": 1e-3, "p": 0.25, "epochs": 200, "anneal": 40},
    "copying": {
        "T": 100,
        "batch": 100,
        "lr": 1e-3,
        "p": 0.5,
        "epochs": 600,
        "anneal": 40,
        "updates_per_epoch": 1000,
        "train_size": 100_000,
    },
    "denoise": {
        "T": 200,
        "batch": 10,
        "lr": 1e-3,
        "p": 0.0,
        "epochs": 200,
        "updates_per_epoch": 1000,
        "one_hot": True,
        "window_size": 15,
    },
}
# Runs of minutes on two cores, the same for every layer; new sequences at every update.
_RECALL = {
    "T": 50,
    "hidden": 64,
    "batch": 10,
    "lr": 2e-3,
    "p": 0.0,
    "anneal": 0,
    "one_hot": True,
    "train_size": 0,
    "epochs": 100,
    "updates_per_epoch": 500,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "copying": {"quick": {**_RECALL, "window_size": 10, "top_k": 15}},
    "denoise": {"quick": {**_RECALL, "window_size": 15, "top_k": 15}},
}
PRESET_TRANSFER = (500, 5000)
QUICK: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 3},
    "mnist": {"epochs": 1, "anneal": 0},
    "copying": {"epochs": 3, "anneal": 1, "updates_per_epoch": 20, "train_size": 2000},
    "denoise": {"epochs": 3, "updates_per_epoch": 20, "T": 50},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tasks, one subcommand each."""
    add = parser.add_subparsers(
        title="tasks", required=True, metavar="TASK", dest="task"
    ).add_parser
    digits_parser = add(
        "digits",
        help="handwritten digits, one pixel per step",
        description="Classify digits read pixel by pixel: 8 x 8 from scikit-learn, or MNIST.",
    )
    digits_parser.add_argument("--permute", action="store_true", help="a fixed random pixel order")
    digits_parser.add_argument("--permute-seed", type=int, metavar="N", help="of that order (0)")
    digits_parser.add_argument("--mnist", metavar="DIR", help="read MNIST's IDX files from there")
    copying_parser = add(
        "copying",
        help="remember ten symbols over T steps",
        description="The h-detach paper's copying task; the defaults are the paper's.",
    )
    denoise_parser = add(
        "denoise",
        help="remember ten symbols scattered over T steps",
        description="The relevancy screening paper's denoise task.",
    )
    for task_parser, delay in ((copying_parser, 100), (denoise_parser, 200)):
        add_option = task_parser.add_argument
        add_option("--T", type=arguments.positive, metavar="N", help=f"delay ({delay})")
        add_option("--updates-per-epoch", type=arguments.positive, metavar="N")
        add_option(
            "--train-size", type=arguments.natural, metavar="N", help="0: new at every update"
        )
        add_option(
            "--one-hot", action="store_true", default=None, help="one-hot symbols, not numbers"
        )
        add_option(
            "--preset", choices=("quick",), help="T 50, H 64, batch 10: minutes on two cores"
        )
        add_option(
            "--transfer",
            type=arguments.positive,
            nargs="+",
            metavar="T",
            help="accuracy at other T after training (preset: 500 5000)",
        )
    for task_parser in (digits_parser, copying_parser, denoise_parser):
        _add_common(task_parser)
        task_parser.set_defaults(run=run)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", choices=list(LAYERS), help="(throughtime)")
    parser.add_argument("--hidden", type=arguments.positive, metavar="H", help="units (128)")
    parser.add_argument("--batch", type=arguments.positive, metavar="B", help="per update")
    parser.add_argument("--lr", type=arguments.above_zero, metavar="X", help="Adam's learning rate")
    parser.add_argument("--clip", type=arguments.above_zero, metavar="X", help="norm limit (1.0)")
    parser.add_argument("--p", type=arguments.probability, metavar="P", help="detach probability")
    parser.add_argument(
        "--anneal", type=arguments.natural, metavar="N", help="last N epochs: p = 0"
    )
    parser.add_argument("--epochs", type=arguments.positive, metavar="N")
    parser.add_argument(
        "--stop-at", type=arguments.probability, metavar="A", help="validation accuracy to end at"
    )
    parser.add_argument(
        "--window-size",
        type=arguments.positive,
        metavar="N",
        help="of rel-* layers (10; denoise 15)",
    )
    parser.add_argument("--top-k", type=arguments.natural, metavar="N", help="of rel-* layers (15)")
    parser.add_argument(
        "--plot",
        choices=("attention",),
        help="also draw what a rel-* or mem-* layer attends, and what it retains",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="weights, order, masks (0)")
    parser.add_argument("--threads", type=arguments.positive, metavar="N")
    parser.add_argument("--device", metavar="NAME", help="(cpu)")
    parser.add_argument("--backend", metavar="NAME", help="which kernels throughtime uses (auto)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(runs/TASK-LAYER-...)")
    parser.add_argument("--resume", action="store_true", help="continue after the last epoch")
    parser.add_argument("--quick", action="store_true", help="a short look instead of a full run")


def make_config(args: argparse.Namespace) -> Config:
    """The run that the options describe, defaults filled in.

    Raises:
        UsageError: if options contradict each other.
    """
    kind = "mnist" if getattr(args, "mnist", None) else args.task
    values: dict[str, Any] = {"task": args.task, "threads": torch.get_num_threads()}
    values.update(DEFAULTS[kind])
    if args.quick and getattr(args, "preset", None):
        raise UsageError("--quick and --preset both say how long to train: give one of them")
    if args.quick:
        values.update(QUICK[kind])
    if getattr(args, "preset", None):
        values.update(PRESETS[kind][args.preset])
    layer = LAYERS[args.layer or "throughtime"]
    if layer.screens or not layer.detaches:
        values["p"], values["anneal"] = 0.0, 0
    if layer.screens and kind == "copying":
        values["one_hot"] = True
    for field in fields(Config):
        given = getattr(args, field.name, None)
        if given is not None:
            values[field.name] = given
    config = Config(**values)
    if args.plot == "attention" and not layer.screens:
        screening = ", ".join(name for name, layer in LAYERS.items() if layer.screens)
        raise UsageError(
            f"--plot attention: --layer {config.layer} has no attention; use one of {screening}"
        )
    for name in ("window_size", "top_k"):
        if getattr(args, name) is not None and name not in layer.options:
            using = ", ".join(key for key, other in LAYERS.items() if name in other.options)
            raise UsageError(
                f"{option(name)} makes no difference to --layer {config.layer}: "
                f"leave it out, or use one of {using}"
            )
    if config.p > 0 and not layer.detaches:
        raise UsageError(
            f"--layer {config.layer} has no h-detach, so --p must be 0, got {config.p:g}; "
            "use --layer throughtime for p > 0"
        )
    if config.anneal > config.epochs:
        raise UsageError(
            f"--anneal must be at most --epochs ({config.epochs}), got {config.anneal}"
        )
    return config


def make_trainer(config: Config) -> Trainer:
    """Data, model and trainer of a run, from its seed.

    Raises:
        UsageError: if the device or the backend cannot be used.
    """
    torch.set_num_threads(config.threads)
    task = tasks.make(config)
    try:
        classifier = model.build(
            config.layer,
            input_size=task.input_size,
            hidden_size=config.hidden,
            classes=task.classes,
            target_steps=task.target_steps,
            p=config.p,
            window_size=config.window_size,
            top_k=config.top_k,
            backend=config.backend,
            seed=config.seed,
        ).to(config.device)
    except (RuntimeError, ValueError, AssertionError) as error:  # torch asserts a missing CUDA
        message = str(error).splitlines()[0]
        raise UsageError(
            f"--device {config.device}, --backend {config.backend}: {message}"
        ) from error
    return Trainer(classifier, task, config)


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0, 1 if the loss is no number any more, 130 after Ctrl-C."""
    require("tqdm")
    require("matplotlib")
    config = make_config(args)
    folder = RunFolder(args.out or Path("runs") / _name(config))
    _announce(args, config, folder)
    state = folder.resume(config, _versions()) if args.resume else None
    if state is None:
        folder.start(config, _versions())
    trainer = make_trainer(config)
    if state is not None:
        trainer.load_state_dict(state)
        print(f"continuing after epoch {len(trainer.history)}", flush=True)
    elif args.resume:
        print(f"{folder.path} holds no finished epoch yet: starting from the beginning")

    code = _train(trainer, folder, args)
    if trainer.history:
        plots = _draw(trainer.history, config, folder)
        chosen = best(trainer.history)
        print(
            f"best validation accuracy {chosen.validation_accuracy:.3f} in epoch {chosen.epoch}: "
            f"test accuracy {chosen.test_accuracy:.3f}"
        )
        print(f"log: {folder.path / 'log.csv'}\nplot: {plots}")
    if code == 0:
        _transfer(args, trainer, folder)
        if args.plot == "attention":
            _draw_attention(trainer, folder)
    return code


def _train(trainer: Trainer, folder: RunFolder, args: argparse.Namespace) -> int:
    config = trainer.config

    def on_epoch(epoch: Epoch) -> None:
        folder.save(trainer.state_dict(), trainer.history)
        bar.finish()
        print(epoch.line(config.epochs), flush=True)

    bar = _Bar(trainer)
    try:
        trainer.run(on_epoch, bar)
    except KeyboardInterrupt:
        bar.finish()
        done = len(trainer.history)
        print(
            f"stopped in epoch {done + 1}; {done} finished epochs are kept in {folder.path}\n"
            f"continue with: {_resume_command(args, folder)}",
            file=sys.stderr,
        )
        return INTERRUPTED
    except NonFiniteLossError as error:
        bar.finish()
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class _Bar:
    """One progress bar per epoch on stderr, absent where stderr is no terminal."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._bar: Any = None

    def __call__(self, loss: float, accuracy: float, norm: float, rate: float) -> None:
        if self._bar is None:
            config = self._trainer.config
            task = self._trainer.task
            updates = task.updates_per_epoch or -(-len(task.train) // config.batch)
            self._bar = require("tqdm").tqdm(
                total=updates,
                desc=f"epoch {len(self._trainer.history) + 1}/{config.epochs}",
                file=sys.stderr,
                leave=False,
                disable=None,
            )
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {accuracy:.3f}, gradient {norm:.3g}, {rate:.0f} seq/s",
            refresh=False,
        )
        self._bar.update()

    def finish(self) -> None:
        """Removes the bar of the epoch."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _announce(args: argparse.Namespace, config: Config, folder: RunFolder) -> None:
    print(
        f"{config.task}: {LAYERS[config.layer].label}, H {config.hidden}, batch {config.batch}, "
        f"lr {config.lr:g}, p {config.p:g}, {config.epochs} epochs, seed {config.seed}, "
        f"{config.threads} threads -> {folder.path}"
    )
    if config.layer == "torch" and args.p is None:
        print("nn.LSTM has no h-detach: training with p = 0")


def _draw(history: list[Epoch], config: Config, folder: RunFolder) -> Path:
    from bench import plots

    title = f"{config.task}, {LAYERS[config.layer].label}, p = {config.p:g}, seed {config.seed}"
    figure = plots.curves(history, title)
    for suffix in ("svg", "png"):
        plots.save(figure, folder.path / f"curves.{suffix}")
    return folder.path / "curves.svg"


def _transfer(args: argparse.Namespace, trainer: Trainer, folder: RunFolder) -> None:
    """Prints and writes the accuracy at other lengths, if they are wanted."""
    delays = getattr(args, "transfer", None)
    if delays is None and getattr(args, "preset", None):
        delays = PRESET_TRANSFER
    if not delays:
        return
    found = transfer.accuracies(trainer, delays)
    for delay, accuracy in found.items():
        print(f"accuracy at T = {delay} without further training: {accuracy:.4f}", flush=True)
    path = folder.path / "transfer.csv"
    transfer.write(path, found, trainer)
    print(f"transfer: {path}")


def _draw_attention(trainer: Trainer, folder: RunFolder) -> None:
    from bench import plots

    drawn = attention.picture(trainer)
    assert drawn is not None, "make_config refuses --plot attention for other layers"
    weights, retained = (x.cpu().numpy() for x in drawn)
    config = trainer.config
    title = f"{config.task}, {LAYERS[config.layer].label}, one test sequence"
    figure = plots.attention(weights, retained, title)
    for suffix in ("svg", "png"):
        plots.save(figure, folder.path / f"attention.{suffix}")
    print(f"attention: {folder.path / 'attention.svg'}")


def _name(config: Config) -> str:
    parts = [config.task, config.layer, f"p{config.p:g}", f"seed{config.seed}"]
    parts[1:1] = [f"T{config.T}"] if config.T else []
    parts[1:1] = ["mnist"] if config.mnist else []
    parts[1:1] = ["permuted"] if config.permute else []
    return "-".join(parts)


def _versions() -> dict[str, str]:
    return {
        "throughtime": throughtime.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _resume_command(args: argparse.Namespace, folder: RunFolder) -> str:
    words: list[str] = list(args.command_line)
    if not args.resume:
        words.append("--resume")
    if args.out is None:
        words += ["--out", str(folder.path)]
    return shlex.join(["python", "-m", "bench", *words])
