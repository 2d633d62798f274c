"""Runs Python in a process of its own, and command lines that refuse their options."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def printed(code: str, **environment: str) -> str:
    """What code prints in a fresh interpreter, which has to end well."""
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Refusals:
    """What a command line says to mistakes."""

    def __init__(
        self, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.main, self.capsys = main, capsys

    def of_option(self, command: str, words: str) -> None:
        """argparse ends the program with 2 and says what was wanted and what it got."""
        with pytest.raises(SystemExit) as caught:
            self.main(command.split())
        assert caught.value.code == 2
        assert words in self.capsys.readouterr().err

    def of_command(self, command: str, words: str) -> None:
        """The command returns 2 and says one sentence."""
        assert self.main(command.split()) == 2
        error = self.capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
