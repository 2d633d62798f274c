"""``bench compare``: is the working tree slower than a base revision?

Both are built, and three processes take turns at every case: the base, the working tree, and the
base again, which shows how far apart processes of equal code lie on this machine. A case is slower
only if it is so beyond that and beyond 3 %, not by chance, and twice: what was slower is measured
again in new processes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from bench import arguments, machine, table
from bench.arguments import UsageError
from bench.compare import trees, worker
from bench.compare.stats import LEAST_LIMIT, Verdict, judge, sign_test
from bench.operations import OPERATIONS
from bench.operations.operation import Case

ROLES = ("base", "tree", "twin")
ROUNDS = 31  # finds a tenth of 6 cases in 19 of 20 runs, see the tests
MOST_ROUNDS, MOST_SECONDS = 201, 20.0  # until chance is small; a quiet machine needs no more
SAMPLE_SECONDS = 0.01
HEADER = ("case", "base ms", "tree ms", "tree / base (95 %)", "base / base", "p", "verdict")
Cases = Mapping[str, Case]
# The sizes of a case that does not name them.
TYPICAL: Mapping[str, Case] = {
    "lstm": replace(OPERATIONS["lstm"].typical, I=64, p=0.0),
    "rel-lstm": OPERATIONS["rel-lstm"].quick[0],
    "relevancy": OPERATIONS["relevancy"].typical,
}
QUICK = (
    "lstm:T=120,B=100,I=1,H=128",
    "lstm:T=120,B=100,I=1,H=128,p=0.5",
    "lstm:T=50,B=64,I=256,H=256",
    "lstm:T=300,B=1,I=128,H=128",
    "lstm:T=4,B=1,I=16,H=32",
    "rel-lstm:T=120,B=10,I=10,H=128",
    "relevancy:T=512",
)
DEFAULT = (
    *QUICK,
    "lstm:T=300,B=1,I=128,H=128,p=0.5",
    "lstm:T=784,B=100,I=1,H=128",
    "lstm:T=100,B=64,I=512,H=512",
    "rel-lstm:T=320,B=10,I=10,H=128",
    "relevancy:T=2048",
    "relevancy:T=8192",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    add = parser.add_argument
    add("--base", required=True, metavar="REVISION", help="what to compare with, such as main")
    text = f"an operation, or one with sizes: {QUICK[1]}; others as in the default list"
    add("--cases", nargs="+", default=[], metavar="CASE", help=text)
    add("--quick", action="store_true", help="small cases only: about half a minute")
    arguments.add_threads(parser)
    parser.set_defaults(run=run)


def chosen(texts: Sequence[str], group: Sequence[str]) -> dict[str, Case]:
    """What is measured, by the text of each case.

    An operation alone stands for all cases that the group has of it, no text for the group.
    """
    found: dict[str, Case] = {}
    for text in texts or group:
        own = [case for case in group if case.partition(":")[0] == text] or [text]
        found |= {case: _parse(case) for case in own}
    return found


def _parse(text: str) -> Case:
    op, _, given = text.partition(":")
    try:
        parts = dict(part.split("=") for part in given.split(",") if part)
        known = {*OPERATIONS[op].sizes, *(["p"] if op == "lstm" else [])}
        sizes = {name: (float if name == "p" else int)(value) for name, value in parts.items()}
        if not known.issuperset(sizes) or any(value < 0 for value in sizes.values()):
            raise ValueError
    except (KeyError, ValueError):
        raise UsageError(
            f"--cases wants one of {', '.join(TYPICAL)}, or one with sizes, as in {QUICK[1]}, "
            f"got {text!r}"
        ) from None
    return replace(TYPICAL[op], **sizes)


def run(args: argparse.Namespace) -> int:
    """Build, measure and print; returns 1 if a case has become slower."""
    torch.set_num_threads(args.threads)
    cases = chosen(args.cases, QUICK if args.quick else DEFAULT)
    repo = trees.repository(Path.cwd())
    revision = trees.commit(repo, args.base)
    base = trees.build_base(repo, revision)
    print("building the working tree", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="throughtime-tree-") as scratch:
        tree = Path(scratch, "package")
        trees.install(repo, tree)
        print("\n".join(machine.header()))
        print(f"base: {args.base} ({revision[:12]})\n")
        places = {"base": base, "tree": tree, "twin": base}
        outcome = compare(places, cases, torch.get_num_threads())
    print("\n\n".join([outcome.table(), *outcome.notes]))
    return 1 if outcome.slower else 0


@dataclass
class Outcome:
    """Seconds per case, one row per round and one column per role, and what follows from them."""

    rounds: Mapping[str, pd.DataFrame]
    verdicts: dict[str, Verdict]
    notes: list[str]

    @property
    def slower(self) -> list[str]:
        return [case for case, verdict in self.verdicts.items() if verdict.word == "slower"]

    def table(self) -> str:
        """One line per case, both trees side by side."""
        lines = []
        for case, one in self.verdicts.items():
            ms = [table.digits(self.rounds[case][role].median() * 1e3) for role in ROLES[:2]]
            ratio = f"{one.ratio:.3f} ({one.low:.3f}-{one.high:.3f})"
            word = one.word.replace("slower", "SLOWER")
            lines.append([case, *ms, ratio, f"{one.twin:.3f}", f"{one.p:.2g}", word])
        return table.markdown(lines, HEADER)


def compare(places: Mapping[str, Path], cases: Cases, threads: int) -> Outcome:
    """Measure and judge all cases; what is slower is measured again in new processes.

    ``places``: role of ``ROLES`` -> folder with the package that it runs.
    """
    rounds, notes = _measure(places, cases, threads)
    if not rounds:
        raise UsageError("no case runs in both trees:\n" + "\n".join(notes))
    limit, verdicts = judge(*_ratios(rounds))
    outcome = Outcome(rounds, verdicts, notes)
    suspects = {case: cases[case] for case in outcome.slower}
    if suspects:
        again, _ = _measure(places, suspects, threads)
        earlier = [verdict.twin for verdict in verdicts.values()]
        second_limit, second = judge(*_ratios(again), earlier)
        for case, verdict in second.items():
            if verdict.word != "slower":
                verdicts[case] = replace(verdicts[case], word="unclear")
            notes.append(
                f"{case}: measured again in new processes: {verdict.ratio:.3f} "
                f"(limit {second_limit:.1%}), {verdict.word}"
            )
    counts = Counter(verdict.word for verdict in verdicts.values())
    text = f"{', '.join(f'{count} {word}' for word, count in counts.items())}. Limit: {limit:.1%}, "
    text += "within which processes of equal code lie here (see base / base); at least 3 %, and "
    text += "twice what a case's own base / base is off."
    notes.insert(0, text)
    return outcome


def _ratios(rounds: Mapping[str, pd.DataFrame]) -> list[dict[str, pd.Series]]:
    """Of every case: tree / base, and twin / base."""
    return [{case: own[role] / own["base"] for case, own in rounds.items()} for role in ROLES[1:]]


def _measure(
    places: Mapping[str, Path], cases: Cases, threads: int
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Seconds of every case, and why others were not measured."""
    rounds, notes = {}, []
    with ExitStack() as stack:
        workers = {role: stack.enter_context(Worker(places[role], threads)) for role in ROLES}
        bar = tqdm(cases.items(), unit="case", file=sys.stderr, disable=None)
        for text, case in bar:
            bar.set_postfix_str(text)
            try:
                rounds[text] = _alternate(workers, case)
            except CannotRun as error:
                notes.append(f"{text}: not compared: {error}")
    return rounds, notes


def _alternate(workers: Mapping[str, Worker], case: Case) -> pd.DataFrame:
    """One sample per role and round; the order rotates, as the caches depend on what ran before."""
    seconds = {role: worker.ask({"case": asdict(case)}) for role, worker in workers.items()}
    repeats = math.ceil(SAMPLE_SECONDS / max(seconds["base"], 1e-7))
    samples: list[dict[str, float]] = []
    begun = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        long = time.perf_counter() - begun > MOST_SECONDS
        if turn >= ROUNDS and (long or _settled(pd.DataFrame(samples))):
            break
        begin = turn % len(ROLES)
        order = ROLES[begin:] + ROLES[:begin]
        samples.append({role: workers[role].ask({"repeats": repeats}) for role in order})
    return pd.DataFrame(samples)


def _settled(samples: pd.DataFrame) -> bool:
    """Whether both medians are known to ``LEAST_LIMIT``; on which side of 1 plays no part."""
    ends = [sign_test(samples[role] / samples["base"])[1:] for role in ROLES[1:]]
    return all(high / low < (1 + LEAST_LIMIT) ** 2 for low, high in ends)


class CannotRun(Exception):
    """A tree has no such layer, or cannot run it at these sizes."""


class Worker:
    """A process of ``worker.py`` that lives until the ``with`` block ends."""

    def __init__(self, tree: Path, threads: int) -> None:
        self._tree = tree
        command = [sys.executable, worker.__file__, str(tree), str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # it holds nothing that must be saved
        self._process.communicate()

    def ask(self, request: Mapping[str, Any]) -> float:
        """The seconds that it answers; raises ``CannotRun``, or ``UsageError`` if it has died."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UsageError(f"the process that measures {self._tree} has died, see above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CannotRun(f"{self._tree.name}: {answer['error'].splitlines()[0]}")
        return float(answer["seconds"])
