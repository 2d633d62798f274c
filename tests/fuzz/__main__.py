"""``python -m fuzz``, from tests/: so many calls from seeds, or so many minutes of them.

    python -m fuzz --calls 2000
    python -m fuzz --minutes 10 --seed 123456
    python -m fuzz --show 4711

Prints how many calls ended in which way, and each one that must not end so as a snippet; its exit
status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator

from fuzz.outcome import BAD, Outcome
from fuzz.program import Spec, drawn, render
from fuzz.runner import outcome_of, prepare, run
from fuzz.shrink import shrunk

BATCH = 500  # programs of a process, if none ends it
MOST_SHOWN = 10  # snippets of one kind and target


def _programs(first: int, calls: int, seconds: float) -> Iterator[tuple[Spec, Outcome]]:
    """Programs from a seed on, without those whose arguments torch itself did not make."""
    end, made = time.monotonic() + seconds, 0
    for seed in itertools.count(first, BATCH):
        for spec, outcome in run([drawn(seed + k) for k in range(BATCH)]):
            yield spec, outcome
            made += outcome.kind != "unmade"
            if made == calls or time.monotonic() > end:
                return


def _show(spec: Spec, outcome: Outcome) -> None:
    alone = outcome_of(spec)
    again = alone.kind == outcome.kind
    # A program that hangs costs its whole time at every try.
    small = shrunk(spec, outcome.kind, 8 if outcome.kind == "hang" else 200) if again else spec
    print(f"\n# seed {spec.seed}: {outcome.kind}, {outcome.text.splitlines()[0][:300]}")
    if not again:
        print(f"# alone it is {alone.kind}: something that ran before it has a part in this")
    print(f"# {spec.target}\n{render(small)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=-1, help="how many programs")
    parser.add_argument("--minutes", type=float, default=1e9, help="or for how long")
    parser.add_argument("--seed", type=int, help="the first seed; otherwise a random one")
    parser.add_argument("--show", type=int, metavar="SEED", help="print that program and its end")
    parser.add_argument("--also", default="", help="kinds to show beside the bad ones: vague,...")
    given = parser.parse_args()
    prepare()
    if given.show is not None:
        spec = drawn(given.show)
        print(render(spec))
        print(outcome_of(spec))
        return 0
    first = random.SystemRandom().randrange(1 << 40) if given.seed is None else given.seed
    print(f"fuzz: seeds from {first}", flush=True)
    shown: Counter[tuple[str, str]] = Counter()
    counts: Counter[str] = Counter()
    bad = (*BAD, *given.also.split(","))
    for spec, outcome in _programs(first, given.calls, 60 * given.minutes):
        counts[outcome.kind] += 1
        if outcome.kind in bad:
            shown[outcome.kind, spec.target] += 1
            if shown[outcome.kind, spec.target] <= MOST_SHOWN:
                _show(spec, outcome)
    print("\nfuzz:", ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    for (kind, target), n in shown.most_common():
        print(f"fuzz: {n} {kind} in {target}")
    return 1 if any(counts[kind] for kind in BAD) else 0


sys.exit(main())
