"""``sweep TASK``: one training run for each combination of the given values, one thread each.

The runs go through joblib's processes. Each keeps a folder of its own and continues where it
stopped, so a sweep that is killed and started again loses an epoch of what was running.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import joblib
import pandas as pd
from tqdm import tqdm

from bench import arguments, plots
from bench.train import transfer
from bench.train.config import TASKS, Config, add_options, from_arguments
from bench.train.folder import RunFolder
from bench.train.trainer import Trainer, TrainingError

STOPPED = "stopped.txt"  # why training could not go on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="tasks", required=True, metavar="TASK", dest="task")
    for task, text in TASKS.items():
        command = commands.add_parser(task, help=text, description=text)
        add_options(command, task, several=True)
        add = command.add_argument
        add("--jobs", type=arguments.positive, default=joblib.cpu_count(), help="(%(default)s)")
        add("--out", type=Path, metavar="DIR", required=True, help="folder of all runs")
        command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the grid; returns 0, also where runs diverged: their rows say so."""
    grid = {
        entry.name: values
        for entry in fields(Config)
        if isinstance(values := getattr(args, entry.name, None), list)
    }
    varied = {name: values for name, values in grid.items() if len(values) > 1}
    runs = {}
    # Seeds change slowest: a sweep that is cut short has some runs of every combination.
    grid = dict(sorted(grid.items(), key=lambda item: item[0] != "seed"))
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        config = from_arguments(argparse.Namespace(**(vars(args) | given)))
        name = "-".join(f"{key}{given[key]}" for key in grid if key in varied) or config.folder.name
        runs[name] = config
    table = run_all(runs, args.out, jobs=args.jobs)
    with RunFolder(args.out) as folder:
        path = folder.write_table("epochs.csv", table.to_dict("records"))
        plot = folder.write_figure("sweep", plots.spread(table, [*varied], args.task))
    print(f"{summary(table, [*varied])}\n\nrows: {path}\nplot: {plot}")
    return 0


def run_all(
    runs: Mapping[str, Config], out: Path, *, jobs: int, delays: Sequence[int] = ()
) -> pd.DataFrame:
    """Finishes each run in a folder of its name below ``out``; a row for each of their epochs.

    Column ``run`` has the name. The first runs start first. Whatever ends the process, finished
    epochs are kept. ``delays`` are other T at which a finished run is tried: columns
    ``accuracy_T``.
    """
    work = (
        joblib.delayed(finish)(replace(config, threads=1), out / name, delays)
        for name, config in runs.items()
    )
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    for _ in tqdm(parallel(work), total=len(runs), unit="run", file=sys.stderr, disable=None):
        pass
    return collect(runs, out)


def finish(config: Config, path: Path, delays: Sequence[int]) -> None:
    """Runs or continues one run."""
    trainer = Trainer(config)
    with RunFolder(path) as folder:
        if folder.checkpoint.exists():
            folder.resume(trainer)
        else:
            folder.start(config)
        if (path / STOPPED).exists():
            return
        try:
            trainer.run(lambda _: folder.save(trainer))
        except TrainingError as error:
            folder.write(STOPPED, str(error).encode())
            return
        if delays and not (path / transfer.FILE).exists():
            folder.write_table(transfer.FILE, [*transfer.transfer(trainer, delays)])


def collect(runs: Mapping[str, Config], out: Path) -> pd.DataFrame:
    """The rows of all runs, as far as they went."""
    tables = []
    for name, config in runs.items():
        log, elsewhere, stopped = (
            out / name / file for file in ("log.csv", transfer.FILE, STOPPED)
        )
        if not log.exists() and not stopped.exists():
            continue  # not begun
        table = pd.read_csv(log) if log.exists() else pd.DataFrame(index=[0])
        end = table.index[-1]
        table = table.assign(run=name, stopped="", **asdict(config))
        if stopped.exists():
            table.loc[end, "stopped"] = stopped.read_text()
        if elsewhere.exists():
            for row in pd.read_csv(elsewhere).itertuples():
                table.loc[end, f"accuracy_{row.T}"] = row.accuracy
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def summary(table: pd.DataFrame, varied: Sequence[str]) -> str:
    """Median and quartiles over seeds of the last validation accuracy, for each combination."""
    keys = [name for name in varied if name != "seed"] or ["task"]
    last = table.groupby(list({*keys, "seed"}), sort=False).tail(1).groupby(keys)
    found = last.validation_accuracy.quantile([0.25, 0.5, 0.75]).unstack()
    found.columns = ["25 %", "median", "75 %"]
    found["runs"] = last.size()
    found["stopped"] = last.stopped.agg(lambda reasons: int((reasons != "").sum()))
    return str(found.to_string(float_format="%.4f"))
