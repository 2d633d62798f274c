"""No order in which blocks of a GPU hand over h and its gradients goes wrong (protocol.py)."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from protocol import WAITING, Action, Fault, Program, Steps, Use, Word, explore, program_of

# Numbers of Site in csrc/common/cuda/device.cuh.
START, PARTS, STEP, COPY, GATES, BACK, SUMS = range(7)

Trace = Callable[["Case"], Program]
Mutate = Callable[[Program], Program]


class Case:
    """What trace.cpp runs; a block has a warp for every 8 of its units, or ``warps``."""

    def __init__(self, name: str, T: int, H: int, ranks: int, **more: int) -> None:
        self.name = name
        sizes = {"parts": 1, "warps": -(-H // ranks // 8), "detach": 0} | more
        backward, grid = "backward" in name, "grid" in name
        self.words = [str(int(x)) for x in (backward, grid, T, H, ranks, *sizes.values())]

    def __repr__(self) -> str:
        return f"{self.name} {' '.join(self.words[2:])}"


FORWARD = Case("forward", 6, 16, 2)
FORWARD_PARTS = Case("forward", 4, 16, 2, parts=2)
BACKWARD = Case("backward", 6, 16, 2)
# Of the two jobs of a block the second sends nothing to block 0, which does not wait for it.
BACKWARD_JOBS = Case("backward", 3, 40, 2)
GRID = Case("forward grid", 5, 32, 2)
GRID_BACKWARD = Case("backward grid", 5, 32, 2)
CASES = [
    FORWARD,
    FORWARD_PARTS,
    BACKWARD,
    BACKWARD_JOBS,
    GRID,
    GRID_BACKWARD,
    Case("forward", 4, 32, 2),
    Case("forward", 4, 24, 3),
    Case("forward", 3, 40, 2),  # a warp without units leaves before the others
    Case("backward", 4, 32, 2),
    Case("backward", 3, 24, 3),
    Case("backward", 3, 64, 2, parts=2),
    Case("backward", 6, 16, 2, detach=1),  # not every step is a round
    Case("forward grid", 4, 24, 3),
    Case("forward grid", 4, 16, 2, parts=2),
    Case("backward grid", 4, 24, 3),
    Case("backward grid", 4, 32, 2, parts=2, warps=4),
]


@pytest.fixture(scope="module")
def run(trace: Path) -> Trace:
    """What the kernel of a case does."""

    @functools.cache
    def record(words: tuple[str, ...]) -> str:
        return subprocess.check_output([trace, *words], text=True, timeout=60)

    return lambda case: program_of(record(tuple(case.words)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_of_steps_goes_wrong(case: Case, run: Trace) -> None:
    program = run(case)
    actions = {action.what for steps in program.values() for action in steps.actions}
    assert {"add", "poll"} <= actions if "grid" in case.name else {"send", "wait"} <= actions
    print(f"\n{explore(program)} states")


Change = Callable[[int, Action], "Action | None"]


def changed(steps: Steps, change: Change) -> Steps:
    """``change`` of each action and its place; None leaves the action out, and joins its uses."""
    made = Steps(steps.warp, [steps.uses[0]], [])
    for k, action in enumerate(steps.actions):
        if other := change(k, action):
            made.actions.append(other)
            made.uses += steps.uses[k + 1 : k + 2]
        else:
            made.uses[-1].touched += steps.uses[k + 1].touched
    return made


def every_warp(change: Change) -> Mutate:
    return lambda program: {warp: changed(steps, change) for warp, steps in program.items()}


def without(what: str, site: int | None = None) -> Mutate:
    return every_warp(lambda k, x: None if x.what == what and site in (None, *x.numbers[:1]) else x)


@every_warp
def never_armed_again(k: int, action: Action) -> Action | None:
    """Only before the start."""
    return None if action.what == "expect" and k > 2 else action


def no_wait(program: Program) -> Program:
    return without("wait")(never_armed_again(program))


def one_mailbox(program: Program) -> Program:
    """One mbarrier takes all rounds."""
    every = {x.numbers[0] for steps in program.values() for x in steps.actions if x.what == "wait"}
    even, odd = sorted(every)

    def change(k: int, action: Action) -> Action | None:
        if action.what == "wait":
            mbarrier, round_ = action.numbers[:2]
            return replace(action, numbers=(even, 2 * round_ + (mbarrier == odd)))
        if action.what == "expect":
            first = k < 2 and action.numbers[0] == odd
            return None if first else replace(action, numbers=(even, action.numbers[1]))
        sent = {key: replace(x, mbarrier=even) for key, x in action.messages.items()}
        return replace(action, messages=sent)

    return every_warp(change)(program)


def one_wait_late(program: Program) -> Program:
    """Each wait is for the round before."""
    made = {}
    for warp, steps in program.items():
        rounds = [None, *(x for x in steps.actions if x.what == "wait")]
        late = iter(rounds)
        made[warp] = changed(steps, lambda k, x: next(late) if x.what == "wait" else x)  # noqa: B023
    return made


def leaves_early(program: Program) -> Program:
    """Each warp ends in place of its last wait."""
    for steps in program.values():
        last = max(k for k, action in enumerate(steps.actions) if action.what == "wait")
        steps.actions[last:] = steps.actions[-1:]
        del steps.uses[last + 1 :]
    return program


def one_buffer(*, messages: bool = False, exchange: bool = False) -> Mutate:
    """Two buffers become one: of what warp 0 of block 0 sends to itself, or of what it writes."""
    block = -1 if exchange else 0

    def mutate(program: Program) -> Program:
        uses: list[Use] = [x for action in program[0, 0].actions for x in action.messages.values()]
        if not messages:
            start = next(k for k, x in enumerate(program[0, 0].actions) if x.what in WAITING)
            uses = program[0, 0].uses[start + 1 :]
        written = [
            [w for _, (b, w), writes in use.touched if b == block and writes] for use in uses
        ]
        begins = [min(words) for words in written if words]
        first, size = min(begins), abs(begins[1] - begins[0])
        assert size > 0

        def fold(word: Word) -> Word:
            second = (word[0] < 0) == exchange and first + size <= word[1] < first + 2 * size
            return (word[0], word[1] - size) if second else word

        for use in (use for steps in program.values() for use in steps.every_use()):
            use.touched = [(at, fold(word), writes) for at, word, writes in use.touched]
        return program

    return mutate


EARLY, GONE, STUCK = "may begin before the end of", "after all of that block has left", "all wait"
TWICE = "armed twice"
FAULTS: list[tuple[str, Mutate, tuple[Case, ...], str]] = [
    ("no wait", no_wait, (FORWARD, FORWARD_PARTS, BACKWARD, BACKWARD_JOBS), EARLY),
    ("one wait late", one_wait_late, (FORWARD, BACKWARD), TWICE),
    ("one wait late", one_wait_late, (FORWARD_PARTS, BACKWARD_JOBS), EARLY),
    ("never armed", without("expect"), (FORWARD, BACKWARD), STUCK),
    ("never armed again", never_armed_again, (FORWARD, BACKWARD), STUCK),
    ("one mailbox", one_mailbox, (FORWARD, BACKWARD), EARLY),
    ("leaves early", leaves_early, (FORWARD, BACKWARD, BACKWARD_JOBS), GONE),
    ("one buffer of mail", one_buffer(messages=True), (FORWARD, FORWARD_PARTS, BACKWARD), EARLY),
    ("one buffer of da", one_buffer(), (BACKWARD_JOBS,), EARLY),
    ("one buffer of the grid", one_buffer(exchange=True), (GRID, GRID_BACKWARD), EARLY),
    ("nothing counted", without("add"), (GRID, GRID_BACKWARD), STUCK),
    ("nothing polled", without("poll"), (GRID, GRID_BACKWARD), EARLY),
    ("no start", without("cluster", START), (FORWARD, BACKWARD), EARLY),
    ("no start", without("block", START), (GRID,), EARLY),
    ("no barrier of parts", without("block", PARTS), (FORWARD_PARTS,), EARLY),
    ("no barrier of the step", without("block", STEP), (GRID,), EARLY),
    ("no barrier of the copy", without("block", COPY), (GRID,), EARLY),
    ("no barrier of the gates", without("block", GATES), (BACKWARD_JOBS, GRID_BACKWARD), EARLY),
    ("no barrier of the step back", without("block", BACK), (GRID_BACKWARD,), EARLY),
    ("no barrier of the sums", without("block", SUMS), (GRID_BACKWARD,), EARLY),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mutate", "case", "what"),
    [
        pytest.param(mutate, case, what, id=f"{name}, {case}")
        for name, mutate, cases, what in FAULTS
        for case in cases
    ],
)
def test_a_fault_is_found(mutate: Mutate, case: Case, what: str, run: Trace) -> None:
    with pytest.raises(Fault) as found:
        explore(mutate(run(case)))
    print(f"\n{found.value}")
    assert what in str(found.value)
