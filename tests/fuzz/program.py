"""A few calls as Python source: how they are spelled, with which arguments, with which faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from fuzz import targets
from fuzz.breakages import CHANGES, CHANGES_BEFORE_BACKWARD, kinds_for

HEAD = "import torch, throughtime\nfrom throughtime import functional\n"


@dataclass(frozen=True)
class Break:
    """What stands in place of one argument of one call; ``{}`` in it is the valid one."""

    call: int
    argument: str
    text: str
    before: bool = False  # or what happens before the call to a variable of that name


@dataclass(frozen=True)
class Spec:
    """All that a seed decides, and what shrinking takes away again."""

    seed: int
    target: str
    sizes: dict[str, int]
    options: dict[str, bool]
    breaks: tuple[Break, ...] = ()

    @property
    def valid(self) -> bool:
        """Nothing is wrong in it: it has to run."""
        return not self.breaks


@dataclass
class Program:
    """``steps`` (kind, source): a ``make`` may fail by itself, a ``call`` is what is looked at."""

    steps: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return HEAD + "\n".join(source for _, source in self.steps)


def drawn(seed: int) -> Spec:
    """The program of a seed: one in four is valid, the others have one, two or three faults."""
    rng = random.Random(seed)
    target = rng.choice(list(targets.TARGETS))
    sizes = {name: rng.choice(values) for name, values in targets.SIZES.items()}
    options = {name: rng.random() < p for name, p in targets.OPTIONS.items()}
    spec = Spec(seed, target, sizes, options)
    calls = _calls(spec)
    raw = target.startswith("raw_")
    breaks = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        index = rng.randrange(len(calls))
        if rng.random() < 0.1:
            name = rng.choice(targets.VARIABLES)
            # torch's own backward ends the process there, and the reference consists of it.
            shrinking = () if spec.options["reference"] else CHANGES_BEFORE_BACKWARD
            text = rng.choice((*CHANGES, *shrinking))
            index = len(calls) - 1 if text in CHANGES_BEFORE_BACKWARD else index
            breaks.append(Break(index, name, text, before=True))
            continue
        if not calls[index].arguments:
            continue
        name, valid = rng.choice(list(calls[index].arguments.items()))
        breaks.append(Break(index, name, rng.choice(kinds_for(name, valid, raw))))
    # One fault a name: what makes the second must not trip over the first.
    return replace(spec, breaks=tuple({wrong.argument: wrong for wrong in breaks}.values()))


def _calls(spec: Spec) -> list[targets.Call]:
    return [step for step in targets.steps(spec) if isinstance(step, targets.Call)]


def render(spec: Spec) -> Program:
    """The source of a program."""
    program = Program([("make", f"torch.manual_seed({spec.seed})")])
    index = -1
    for step in targets.steps(spec):
        if isinstance(step, str):
            program.steps.append(("make", step))
            continue
        index += 1
        shown = dict(step.arguments)
        for number, wrong in enumerate(spec.breaks):
            if wrong.call != index:
                continue
            if wrong.before:
                program.steps.append(("make", wrong.text.replace("{}", wrong.argument)))
            if wrong.before or wrong.argument not in shown:
                continue
            valid = shown[wrong.argument]
            wrong_name = f"{wrong.argument}_{number}"
            shown[wrong.argument] = wrong_name
            program.steps.append(("make", f"{wrong_name} = {wrong.text.replace('{}', valid)}"))
        arguments = ", ".join([f"{name}={value}" for name, value in shown.items()])
        kind = "call" if step.ours else "make"
        program.steps.append((kind, f"{step.result} = {step.callee}({step.fixed}{arguments})"))
    return program
