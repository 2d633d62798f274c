"""``python -m fuzz``, from tests/: so many calls from a seed, or so many minutes of them.

    python -m fuzz --calls 2000
    python -m fuzz --minutes 10 --seed 123456

Hypothesis draws the programs and makes those smaller that end badly. Prints how many programs ended
in which way, and each one that must not end so as a snippet; its exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from functools import cache

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

from fuzz.programs import Program, programs
from fuzz.worker import BAD, Worker

ROUND = 2000  # programs of one seed


class Fault(Exception):
    """A program that ended as it must not."""


@cache
def fault(title: str) -> type[Fault]:
    """A class of its own, since Hypothesis takes faults of one class for the same."""
    return type(title, (Fault,), {})


def search(
    seed: int, calls: int, end: float, bad: tuple[str, ...]
) -> tuple[Counter[str], Fault | None]:
    """How the programs of a seed ended, and the smallest program with a fault, if any."""
    worker, counts = Worker(), Counter[str]()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=calls, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    @hypothesis.given(programs())
    def run(program: Program) -> None:
        if time.monotonic() > end:
            return
        kind, text = worker.run(program)
        counts[kind] += 1
        if kind in bad:
            first = text.splitlines()[0][:300]
            raise fault(f"{kind} in {program.target}")(f"# {kind}: {first}\n{program}")

    try:
        run()
    except Fault as found:
        return counts, found
    return counts, None


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=1 << 60, help="how many programs")
    parser.add_argument("--minutes", type=float, default=1e9, help="or for how long")
    parser.add_argument("--seed", type=int, help="the first seed; otherwise a random one")
    parser.add_argument("--also", default="", help="kinds to show beside the bad ones: vague,...")
    given = parser.parse_args()
    torch.set_num_threads(2)  # each forked process inherits it
    seed = random.SystemRandom().randrange(1 << 40) if given.seed is None else given.seed
    print(f"fuzz: seeds from {seed}", flush=True)
    end, bad = time.monotonic() + 60 * given.minutes, (*BAD, *given.also.split(","))
    counts, faults = Counter[str](), Counter[str]()
    while time.monotonic() < end and (left := given.calls - counts.total()) > 0:
        more, found = search(seed, min(left, ROUND), end, bad)
        counts, seed = counts + more, seed + 1
        if found:
            faults[type(found).__name__] += 1
            print(f"\n# {type(found).__name__}, seed {seed - 1}\n{found}", flush=True)
    print("\nfuzz:", ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    for title, n in faults.most_common():
        print(f"fuzz: {n} times {title}")
    return 1 if faults else 0


sys.exit(main())
