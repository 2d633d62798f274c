"""A few calls as Python source, drawn by Hypothesis: which, with which arguments and faults."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from fuzz.breakages import CHANGES, CHANGES_BEFORE_BACKWARD, kinds_for
from fuzz.targets import OPTIONS, SIZES, TARGETS, Call

HEAD = "import torch, throughtime\nfrom throughtime import functional\n"


@dataclass
class Program:
    """``steps`` (kind, source): a ``make`` may fail by itself, a ``call`` is what is looked at."""

    target: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # names of the arguments with a fault

    def __str__(self) -> str:
        return HEAD + "\n".join(source for _, source in self.steps)


# A byte for each size and option: one draw costs a tenth of thirty.
_BYTES = st.binary(min_size=len(SIZES) + len(OPTIONS), max_size=len(SIZES) + len(OPTIONS))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """One in six is valid, the others have one, two or three faults, of different names."""
    target = draw(st.sampled_from(list(TARGETS)))
    drawn = iter(draw(_BYTES))
    sizes = {name: values[next(drawn) * len(values) // 256] for name, values in SIZES.items()}
    options = {name: next(drawn) >= 256 * (1 - p) for name, p in OPTIONS.items()}
    steps = [
        replace(step, arguments=dict(step.arguments)) if isinstance(step, Call) else step
        for step in TARGETS[target](sizes, options)
    ]
    calls = [k for k, step in enumerate(steps) if isinstance(step, Call)]
    made = [str(step).partition(" = ")[0] for step in steps]
    program, before = Program(target), dict[int, list[str]]()
    for number in range(draw(st.sampled_from((0, 1, 1, 1, 2, 3)))):
        k = draw(st.sampled_from(calls))
        call = steps[k]
        assert isinstance(call, Call)
        if draw(st.integers(0, 9)) == 9:
            # torch's own backward ends the process there, and the reference consists of it.
            shrinking = () if options["reference"] else CHANGES_BEFORE_BACKWARD
            text = draw(st.sampled_from((*CHANGES, *shrinking)))
            k = calls[-1] if text in CHANGES_BEFORE_BACKWARD else k
            variables = [n for n in made[:k] if n.isidentifier()] + ["saved", "last", "result[0]"]
            name = draw(st.sampled_from(variables))
            line = text.replace("{}", name)
        elif call.arguments:
            name = draw(st.sampled_from(list(call.arguments)))
            valid = call.arguments[name]
            wrong = draw(st.sampled_from(kinds_for(name, valid, target.startswith("raw_"))))
            line = f"{name}_{number} = {wrong.replace('{}', valid)}"
        else:
            continue
        if name in program.wrong:  # what makes the second must not trip over the first
            continue
        if line.startswith(f"{name}_{number} = "):
            call.arguments[name] = f"{name}_{number}"
        before.setdefault(k, []).append(line)
        program.wrong.append(name)
    program.steps.append(("make", "torch.manual_seed(0)"))
    for k, step in enumerate(steps):
        program.steps += [("make", line) for line in before.get(k, ())]
        ours = isinstance(step, Call) and step.ours
        program.steps.append(("call" if ours else "make", str(step)))
    return program
