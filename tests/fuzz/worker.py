"""Runs programs in a forked process, which may die of one, and says what came of each."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from fuzz.programs import HEAD, Program

SPARE_BYTES = 4 << 30  # address space of a process beyond what it has when it starts
SECONDS = 20  # for one program
PROGRAMS = 500  # of a process, if none ends it

# Words of implementations, which tell a caller nothing.
_INTERNAL = re.compile(
    r"INTERNAL ASSERT|std::|bad_alloc|ERROR_CODE_CHECK|API call failed|_M_|\bc10::|\bnullptr\b"
)
_ALIASES = {
    "bias_ih": ("bias",), "bias_hh": ("bias",), "hx": ("hidden", "h_0", "c_0", "state"),
    "weights": ("weight", "bias"), "input_size": ("input",),
}  # fmt: skip
# What torch itself says, before any code of ours runs or where memory ends.
_OF_TORCH = re.compile(
    r"Could not run|run on a GPU|allocate|memory|Storage size|overflow|Expected a value of type|"
    r"incompatible function arguments|unexpected type|Overflow"
)

BAD = ("crash", "hang", "internal", "refused", "undocumented")


class Outcome(NamedTuple):
    """What a program came to.

    ``kind``: fine, clean, vague (an error that names no argument), undocumented (of another type
    than those of the docstrings), memory (there was too little), unmade (torch itself did not make
    an argument), or one of BAD.
    """

    kind: str
    text: str = ""


def _of_error(error: BaseException, program: Program) -> Outcome:
    """The outcome of a call that raised."""
    # torch writes its own stack below the first line.
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, MemoryError):
        return Outcome("memory", text)
    if _INTERNAL.search(text):
        return Outcome("internal", text)
    if not isinstance(error, (RuntimeError, TypeError, ValueError)):
        return Outcome("internal" if program.target.startswith("raw_") else "undocumented", text)
    if program.target == "raw_gpu" and _OF_TORCH.search(text):
        return Outcome("clean", text)
    if not program.wrong:
        return Outcome("refused", text)
    names = [name for wrong in program.wrong for name in (wrong, *_ALIASES.get(wrong, ()))]
    named = any(name in text for name in names)
    return Outcome("clean" if named or _OF_TORCH.search(text) else "vague", text)


def execute(program: Program) -> Outcome:
    """Runs one program in this process."""
    names: dict[str, object] = {}
    exec(HEAD, names)
    for kind, source in program.steps:
        try:
            exec(compile(source, "<fuzz>", "exec"), names)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # any is an outcome
            return Outcome("unmade", repr(error)) if kind == "make" else _of_error(error, program)
    return Outcome("fine")


def _serve(pipe: Connection[Any, Any]) -> None:
    """Runs what comes until the pipe is closed."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    while (program := pipe.recv()) is not None:
        pipe.send(execute(program))


class Worker:
    """The process, started again after each death and each ``PROGRAMS`` programs.

    It is forked, so the one that holds it must not have run anything on several threads.
    """

    def __init__(self) -> None:
        self._left = 0

    def run(self, program: Program) -> Outcome:
        """What came of the program; a death after the last one of a process counts as its own."""
        if not self._left:
            self._start()
        self._left -= 1
        self._pipe.send(program)
        if not self._pipe.poll(SECONDS):
            self._process.kill()
            self._left = 0
            return Outcome("hang", f"nothing came in {SECONDS} s")
        try:
            outcome: Outcome = self._pipe.recv()
            if self._left:
                return outcome
            self._pipe.send(None)
        except EOFError:
            self._left = 0
        self._process.join(SECONDS)
        code = self._process.exitcode
        return Outcome("crash", f"exit code {code}") if code else outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._left = PROGRAMS
