"""``demo``: a few minutes: right gradients, same accuracy, less time, what h-detach does."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tqdm import trange

import throughtime
from bench import machine, plots
from bench.train.config import Config
from bench.train.folder import RunFolder
from bench.train.trainer import Epoch, Trainer, best

EPOCHS, QUICK_EPOCHS = 40, 3
RUNS = {
    "throughtime": Config("pixels", p=0.0),
    "nn.LSTM": Config("pixels", layer="torch", p=0.0),
}
# Both check each value and gradient against the float64 reference before they measure.
ODD = "lstm --T 16 --B 5 100 --I 3 --H 7 128 --p 0 0.5 --backends auto --peers --repeats 1"
SPEED = "lstm --quick --p 0 0.5 --peers torch loop --backends auto"
ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Path("throughtime-demo")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs, not {EPOCHS}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs all parts; returns 1 if a result of ours is wrong."""
    start = time.perf_counter()
    with RunFolder(args.out) as folder:
        print("## Every value and gradient, at odd sizes\n", flush=True)
        code = _bench(ODD.split())
        print("\n## Speed\n", flush=True)
        code = max(code, _bench(SPEED.split()))
        if code > 1:
            return code
        histories = _train(QUICK_EPOCHS if args.quick else EPOCHS)
        title = f"digits, pixel by pixel; {machine.name()}"
        path = folder.write_figure("demo", plots.curves(histories, title))
        flow = _gradient_flow(folder.path / "gradient-flow.svg")
    print(f"\nplots: {path}, {flow}\n{time.perf_counter() - start:.0f} s in all")
    return code


def _bench(words: Sequence[str]) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return abs(subprocess.run([sys.executable, "-m", "bench", *words], env=environment).returncode)


def _train(epochs: int) -> dict[str, list[Epoch]]:
    """The same digits from the same seed, by each entry of ``RUNS``.

    The runs take turns epoch by epoch, so that a slow spell of the machine affects all of them.
    """
    print(f"\n## Digits pixel by pixel, T = 64, H = 128, {epochs} epochs, same seed\n", flush=True)
    trainers = {name: Trainer(replace(run, epochs=epochs)) for name, run in RUNS.items()}
    for epoch in trange(1, epochs + 1, unit="epoch", disable=None):
        for trainer in trainers.values():
            trainer.run(lambda _: None, until=epoch)
    histories = {name: trainer.history for name, trainer in trainers.items()}
    table = {
        name: {
            "loss, epoch 1": f"{history[0].loss:.6f}",
            "loss, last": f"{history[-1].loss:.4f}",
            "test accuracy": f"{best(history).test_accuracy:.3f}",
            "sequences/s": f"{statistics.median(one.sequences_per_s for one in history):.0f}",
            "seconds": f"{sum(one.seconds for one in history):.1f}",
        }
        for name, history in histories.items()
    }
    print(pd.DataFrame(table).T.to_string())
    ours, theirs = (history[0].loss for history in histories.values())
    print(
        f"\nBoth compute the same: their losses in epoch 1 differ by "
        f"{abs(ours - theirs) / theirs:.0e} of their size; rounding makes later epochs drift apart."
    )
    return histories


def _gradient_flow(path: Path) -> Path:
    """Where h-detach helps: weights as large as training makes them, a loss on the last step.

    A new layer has nothing to detach: its gradient vanishes within some steps.
    """
    print("\n## The gradient of every step, T = 100, H = 128, loss on the last step\n", flush=True)
    flows = {}
    for name, scale, bias, p in (
        ("a new layer", 1, None, 0.0),
        ("weights times 4, forget bias 2", 4, 2.0, 0.0),
        ("the same, p = 0.25", 4, 2.0, 0.25),
    ):
        torch.manual_seed(0)
        lstm = throughtime.LSTM(1, 128, forget_bias=bias, detach_prob=p)
        with torch.no_grad():
            lstm.weight_hh_l0 *= scale
        with throughtime.gradient_flow(lstm) as flows[name]:
            lstm(torch.rand(100, 20, 1))[0][-1].square().sum().backward()
        print(f"{name}: {flows[name]}")
    large = flows.pop("weights times 4, forget bias 2")
    large.plot(path, others=flows)
    return path
