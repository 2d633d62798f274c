"""``train TASK``: trains one recurrent layer and keeps the run in a folder."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import arguments, plots
from bench.arguments import INTERRUPTED
from bench.train import transfer
from bench.train.config import RECALL, TASKS, Config, add_options, from_arguments
from bench.train.folder import RunFolder, WriteError
from bench.train.model import LAYERS
from bench.train.ranks import Ranks, joined
from bench.train.trainer import Epoch, Trainer, TrainingError, best

PRESET_TRANSFER = (500, 5000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="tasks", required=True, metavar="TASK", dest="task")
    for task, text in TASKS.items():
        command = commands.add_parser(task, help=text, description=text)
        add_options(command, task)
        add = command.add_argument
        add("--out", type=Path, metavar="DIR", help="folder of the run (runs/TASK-LAYER-...)")
        add("--resume", action="store_true", help="continue after the last finished epoch")
        if task in RECALL:
            add("--preset", choices=("quick",), help="T 50, H 64, batch 10: minutes on two cores")
            text = "accuracy at other T after training (preset: 500 5000)"
            add("--transfer", type=arguments.positive, nargs="+", metavar="T", help=text)
        command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0, 1 if training failed, 130 after Ctrl-C."""
    config = from_arguments(args)
    preset = PRESET_TRANSFER if getattr(args, "preset", None) else ()
    delays = getattr(args, "transfer", None) or preset
    config.check_memory(delays)
    path = args.out or config.folder
    with joined(config.device) as ranks, _speaking(ranks):
        return _run(args, config, path, delays, ranks)


def _run(
    args: argparse.Namespace, config: Config, path: Path, delays: Sequence[int], ranks: Ranks
) -> int:
    processes = f" in each of {ranks.world} processes" if ranks.world > 1 else ""
    print(
        f"{config.task}: {LAYERS[config.layer].label}, H {config.hidden}, batch {config.batch}, "
        f"lr {config.lr:g}, p {config.p:g}, {config.epochs} epochs, seed {config.seed}, "
        f"{config.threads} threads{processes} -> {path}"
    )
    if config.layer == "torch" and not hasattr(args, "p"):
        print("nn.LSTM has no h-detach: training with p = 0")
    trainer = Trainer(config, bar=ranks.rank == 0, ranks=ranks)
    with RunFolder(path, writes=ranks.rank == 0) as folder:
        if args.resume and folder.checkpoint.exists():
            folder.resume(trainer)
            print(f"continuing after epoch {len(trainer.history)}", flush=True)
        else:
            folder.start(config)
            if args.resume:
                print(f"{path} holds no finished epoch yet: starting from the beginning")
        try:
            _train(trainer, folder)
            if delays:
                _transfer(trainer, delays, folder)
            return 0
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except (KeyboardInterrupt, WriteError) as error:
            failed = isinstance(error, WriteError)
            words = ["python", "-m", "bench", *args.command_line]
            words += [] if args.resume else ["--resume"]
            print(
                f"{f'error: {error}' if failed else 'stopped'}\n"
                f"{folder.kept} finished epochs are kept in {path}\n"
                f"continue with: {shlex.join(words)}",
                file=sys.stderr,
            )
            return 1 if failed else INTERRUPTED


def _speaking(ranks: Ranks) -> contextlib.AbstractContextManager[object]:
    """The first process alone prints."""
    if ranks.rank == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def _train(trainer: Trainer, folder: RunFolder) -> None:
    """Trains, draws the curves however training ends, and prints where everything is."""

    def on_epoch(epoch: Epoch) -> None:
        folder.save(trainer)
        print(epoch.line(trainer.config.epochs), flush=True)

    stopped: BaseException | None = None
    try:
        trainer.run(on_epoch)
    except (KeyboardInterrupt, TrainingError) as error:
        stopped = error
    if trainer.history:
        plot = folder.write_figure(
            "curves", plots.curves({trainer.config.layer: trainer.history}, trainer.config.title)
        )
        chosen = best(trainer.history)
        print(
            f"best validation accuracy {chosen.validation_accuracy:.3f} in epoch {chosen.epoch}: "
            f"test accuracy {chosen.test_accuracy:.3f}\nweights: {folder.path / 'best.pt'}\n"
            f"log: {folder.path / 'log.csv'}\nplot: {plot}"
        )
    if stopped is not None:
        raise stopped


def _transfer(trainer: Trainer, delays: Sequence[int], folder: RunFolder) -> None:
    """Prints and writes the accuracy at other lengths, after the trained one."""
    rows = []
    for row in transfer.transfer(trainer, delays):
        accuracy = "accuracy at T = {T} without further training: {accuracy:.4f}"
        print(accuracy.format(**row), flush=True)
        rows.append(row)
    print(f"transfer: {folder.write_table(transfer.FILE, rows)}")
