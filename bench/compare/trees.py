"""Two revisions of the package, each built into a folder of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from bench.arguments import UsageError
from throughtime import _install

BUILD_VARIABLES = ("CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "THROUGHTIME_BUILD")


def repository(folder: Path) -> Path:
    """The checkout of throughtime that a folder lies in, or a ``UsageError``."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or not Path(top, "python", "throughtime").is_dir():
        raise UsageError(
            f"bench compare builds two revisions from a git checkout of throughtime, but {folder} "
            "lies in none: change to one"
        )
    return Path(top)


def commit(repo: Path, revision: str) -> str:
    """The full hash of a revision, or a ``UsageError``."""
    found = _git(repo, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found is None:
        raise UsageError(
            f"--base wants a revision of {repo}, got {revision!r}: `git log` lists them, "
            "`git fetch` gets those of others"
        )
    return found


def build_base(repo: Path, revision: str) -> Path:
    """The folder that holds the package of a commit (its full hash), built unless it is there.

    It is kept below ``build/compare``, named after all that the build depends on. The sources come
    from ``git archive``: an interrupted run would leave a worktree registered.
    """
    setting = [revision, torch.__version__, sysconfig.get_platform(), sys.version]
    setting += [os.environ.get(name, "") for name in BUILD_VARIABLES]
    key = hashlib.sha256("\n".join(setting).encode()).hexdigest()[:12]
    target = repo / "build" / "compare" / f"{revision[:12]}-{key}"
    if not target.is_dir():
        kept = target.relative_to(repo)
        print(f"building {revision[:12]}, once: some minutes; kept in {kept}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="throughtime-base-") as scratch:
            source, made = Path(scratch, "source"), target.with_suffix(".part")
            archive = Path(scratch, "source.zip")
            _run("git", "-C", str(repo), "archive", "--output", str(archive), revision)
            shutil.unpack_archive(archive, source)
            install(source, made)
        made.rename(target)  # what is there under its own name is complete
    return target


def install(source: Path, target: Path) -> None:
    """Install the package of a source tree into a folder; a failed build is a ``UsageError``."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # Without isolation, or the build would have no torch and leave the kernels out.
    options = ("--no-deps", "--no-build-isolation", "--upgrade", "--target", str(target))
    _run(*pip, *options, str(source))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise UsageError(
            f"{' '.join(command[:4])} ... failed:\n{last}\nBuilding needs setuptools, ninja and a "
            f"compiler: pip install {_install.source('[test]')}"
        )


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"bench compare needs git, which cannot run here: {error}") from error
    return done.stdout.strip() if done.returncode == 0 else None
