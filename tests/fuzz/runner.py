"""Runs programs in forked processes: each is announced before it runs, so that a death names it."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fuzz.outcome import Outcome, of_error
from fuzz.program import Spec, render

SPARE_BYTES = 4 << 30  # address space of a process beyond what it has when it starts
SECONDS = 20  # for one program


def execute(spec: Spec) -> Outcome:
    """Runs one program in this process."""
    names: dict[str, object] = {}
    program = render(spec)
    try:
        exec("import torch, throughtime\nfrom throughtime import functional", names)
        for kind, source in program.steps:
            try:
                exec(compile(source, "<fuzz>", "exec"), names)
            except Exception as error:  # noqa: BLE001  # any is an outcome
                if kind == "make":
                    return Outcome("unmade", repr(error))
                return of_error(error, spec)
    except SystemExit as error:
        return Outcome("undocumented", repr(error))
    return Outcome("fine")


def _child(specs: Iterable[Spec], pipe: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    with os.fdopen(pipe, "w") as out:
        for number, spec in enumerate(specs):
            print(json.dumps([number]), file=out, flush=True)
            outcome = execute(spec)
            print(json.dumps([number, outcome.kind, outcome.text]), file=out, flush=True)


@dataclass
class _Process:
    pid: int
    pipe: int

    @staticmethod
    def start(specs: list[Spec]) -> _Process:
        read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            return _Process(pid, read)
        os.close(read)
        status = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            _child(specs, write)
            status = 0
        except BaseException:  # noqa: BLE001  # the parent sees the status
            traceback.print_exc()
        finally:
            os._exit(status)

    def lines(self) -> Iterator[str | None]:
        """What it says; None when it has been silent for SECONDS."""
        text = b""
        while True:
            ready, _, _ = select.select([self.pipe], [], [], SECONDS)
            if not ready:
                yield None
                return
            piece = os.read(self.pipe, 1 << 16)
            if not piece:
                return
            text += piece
            *whole, text = text.split(b"\n")
            yield from (line.decode() for line in whole)

    def end(self) -> str:
        """Ends it; how it ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        return _words(os.waitpid(self.pid, 0)[1])

    def wait(self) -> str:
        """How it ended by itself."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.pipe)
                return _words(status)
            time.sleep(0.002)
        return self.end()


def _words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"status {os.WEXITSTATUS(status)}" if status else ""


def run(specs: list[Spec]) -> Iterator[tuple[Spec, Outcome]]:
    """The outcome of each program; after a death the rest runs in a new process.

    The process that calls it must not have run anything on several threads before: it forks.
    """
    done = 0
    while done < len(specs):
        first = done
        process = _Process.start(specs[first:])
        silent = False
        for line in process.lines():
            if line is None:
                silent = True
                break
            number, *outcome = json.loads(line)
            if outcome:
                yield specs[first + number], Outcome(*outcome)
                done = first + number + 1
        if silent:
            process.end()
            yield specs[done], Outcome("hang", f"nothing came in {SECONDS} s")
            done += 1
            continue
        how = process.wait()
        if how:
            # Death after the last program: what one of them left behind.
            at = min(done, len(specs) - 1)
            yield specs[at], Outcome("crash", how)
            done += 1


def outcome_of(spec: Spec) -> Outcome:
    """The outcome of one program in a process of its own."""
    [(_, outcome)] = run([spec])
    return outcome


def prepare() -> None:
    """What every forked process inherits: imports, and no thread yet."""
    torch.set_num_threads(2)
