"""``demo``: the package in a few minutes: same accuracy, right gradients, less time."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import throughtime
from bench import machine, plots, speed_plots, table, train
from bench.errors import require
from bench.measure.engine import Bench
from bench.measure.timing import Plan
from bench.measure.verify import Verifier
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, Contestant
from bench.tasks.config import Config
from bench.tasks.layers import LAYERS
from bench.tasks.record import Epoch, best

EPOCHS = 40
QUICK_EPOCHS = 3
LSTM = OPERATIONS["lstm"]
CHECKED = [
    LSTM.case(T=t, B=b, I=i, H=h, p=p)
    for t, b, i, h in ((16, 5, 3, 7), (16, 100, 1, 128), (16, 16, 64, 256), (50, 1, 17, 33))
    for p in (0.0, 0.5)
]


@dataclass(frozen=True)
class Entry:
    """One training run of the demo."""

    layer: str
    p: float

    def __str__(self) -> str:
        return LAYERS[self.layer].label + (f", p = {self.p:g}" if self.p else "")


RUNS = (Entry("throughtime", 0.0), Entry("throughtime", 0.25), Entry("torch", 0.0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument(
        "--out", type=Path, default=Path("throughtime-demo"), metavar="DIR", help="(%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="3 epochs instead of 40")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs all parts; returns 1 if a result of ours is not right."""
    require("tqdm")
    require("matplotlib")
    start = time.perf_counter()
    for line in machine.header():
        print(line)
    backend = throughtime.explain("lstm", hidden_size=128).chosen
    print(f"throughtime runs here: {backend} backend\n", flush=True)

    right = _print_correctness()
    histories = _train(QUICK_EPOCHS if args.quick else EPOCHS)
    bench = Bench(
        LSTM, peers=["torch", "loop"], ps=[0.0, 0.5], memory=False, plan=Plan(seconds=0.5)
    )
    print("## Speed\n", flush=True)
    rows = bench.rows(LSTM.quick)
    print(table.report(rows))

    path = args.out / "demo.png"
    plots.save(_picture(histories, rows), path)
    print(f"\nplot: {path}\n{time.perf_counter() - start:.0f} s in all")
    return 0 if right and not bench.red else 1


def _print_correctness() -> bool:
    """The largest error of each value and gradient against the float64 reference."""
    print("## Kernel against the float64 reference: largest relative error, float32\n", flush=True)
    lines = []
    right = True
    header: list[str] = []
    for case in CHECKED:
        errors = Verifier(LSTM, case).check(Contestant(OURS))
        header = list(errors.relative)
        texts = [f"{value:.0e}" for value in errors.relative.values()]
        verdict = "right" if errors.passed else f"WRONG: {errors.worst}"
        lines.append([str(case), f"{case.p:g}", *texts, verdict])
        right = right and errors.passed
    print(table.markdown(lines, ["T, B, I, H", "p", *header, ""]), end="\n\n")
    return right


def _train(epochs: int) -> dict[str, list[Epoch]]:
    """The same digits from the same seed with every entry of ``RUNS``.

    The runs take turns epoch by epoch, so that a slow spell of the machine hits all of them. That
    changes nothing in them: only one draws masks, so nobody disturbs its random numbers.
    """
    print(f"## Digits pixel by pixel, T = 64, H = 128, {epochs} epochs, same seed\n", flush=True)
    base = Config("digits", epochs=epochs, threads=torch.get_num_threads())
    trainers = {
        str(entry): train.make_trainer(replace(base, layer=entry.layer, p=entry.p))
        for entry in RUNS
    }
    with require("tqdm").tqdm(
        total=epochs * len(RUNS), unit="epoch", file=sys.stderr, disable=None
    ) as bar:
        for epoch in range(1, epochs + 1):
            for name, trainer in trainers.items():
                bar.set_postfix_str(name)
                trainer.run(on_epoch=functools.partial(_advance, bar), until=epoch)
    histories = {name: trainer.history for name, trainer in trainers.items()}
    header = ["layer", "loss, epoch 1", "loss, last", "test accuracy", "sequences/s", "seconds"]
    lines = [_training_line(name, history) for name, history in histories.items()]
    print(table.markdown(lines, header))
    ours, _, theirs = (history[0].loss for history in histories.values())
    print(
        f"\nAt p = 0 both compute the same: their losses in epoch 1 differ by "
        f"{abs(ours - theirs) / theirs:.0e} of their size; rounding makes later epochs drift "
        "apart.\nAt p > 0 the gradient is another one; sequences this short do not need it, "
        "and only show its speed.\n"
    )
    return histories


def _advance(bar: Any, epoch: Epoch) -> None:
    bar.update()


def _training_line(name: str, history: Sequence[Epoch]) -> list[str]:
    chosen = best(history)
    return [
        name,
        f"{history[0].loss:.6f}",
        f"{history[-1].loss:.4f}",
        f"{chosen.test_accuracy:.3f} (best validation: epoch {chosen.epoch})",
        f"{statistics.median(epoch.sequences_per_s for epoch in history):.0f}",
        f"{sum(epoch.seconds for epoch in history):.1f}",
    ]


def _picture(runs: Mapping[str, Sequence[Epoch]], rows: pd.DataFrame) -> Any:
    """Training runs side by side above, the benchmark below."""
    rows = speed_plots.prepared(rows)
    canvas, panels = plots.figure(3, [3.4, speed_plots.bars_height(rows)])
    loss, accuracy, norm = panels[:3]
    for k, (name, history) in enumerate(runs.items()):
        style = {"color": plots.COLOURS[k], "linestyle": plots.DASHES[k], "label": name}
        epochs = [epoch.epoch for epoch in history]
        seconds = list(itertools.accumulate(epoch.seconds for epoch in history))
        loss.plot(epochs, [epoch.loss for epoch in history], **style)
        accuracy.plot(seconds, [epoch.test_accuracy for epoch in history], **style)
        norm.plot(epochs, [epoch.grad_norm_median for epoch in history], **style)
    loss.set(ylabel="training loss", ylim=(0, None))
    accuracy.set(ylabel="test accuracy", xlabel="seconds of training", ylim=(0, 1))
    norm.set_ylabel("gradient norm, median")
    plots.plain_log(norm)
    for panel in (loss, norm):
        plots.epoch_axis(panel)
    accuracy.legend(frameon=False, fontsize="small", loc="lower right")
    speed_plots.draw_bars(panels[3:], rows, ["median_ms", "ratio", "gflops"])
    plots.legend_below(canvas, panels[3], columns=3)
    canvas.suptitle(f"digits, pixel by pixel (above); {speed_plots.title(rows)}", fontsize="small")
    return canvas
