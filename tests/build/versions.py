"""Builds and tests the package beside other versions of torch and Python: `make test-versions`.

What is tested is HEAD, not what lies uncommitted. For each pair of versions an environment
is made, the core tests run there twice, and it is removed:

    source  the package is compiled in the environment
    wheel   it is compiled once, beside the torch of the running Python, and installed everywhere

A row of the table is written as soon as it is known, and a row of the same commit is not run again:
an interrupted run goes on where it was. Other versions of torch bring CUDA along, some GB each.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "bench" / "results" / "versions.csv"
WORK = ROOT / "build" / "versions"
KEY = ("torch", "python", "install")
COLUMNS = (*KEY, "built", "passed", "failed", "skipped", "seconds", "commit")
CORE = (  # every operator on every backend that a CPU can run: values, gradients, errors, compile
    "accelerate", "accelerate_handle", "accelerate_torch", "backends", "compile", "cpu_kernels",
    "distributed", "episodes", "errors", "functional_lstm", "gradient_table", "import", "lstm_cell",
    "module_lstm", "operators", "packed", "parity_nn_lstm", "properties", "relevancy",
    "relevancy_kernels", "relevancy_modules", "replacement", "saved", "schedule",
    "second_derivatives",
)  # fmt: skip
REQUIREMENTS = (  # An older Triton's interpreter cannot run beside NumPy 2.4.
    "setuptools>=77", "ninja", "allpairspy", "tqdm", "hypothesis", "numpy<2.4", "pybind11",
    "pytest>=8.4", "pytest-timeout",
)  # fmt: skip
# Warnings are errors here. Dynamo's of Python 3.13.0 and NumPy's of an old Triton's interpreter are
# no fault of ours.
CALM = ("-W", "ignore:Guards may run slower:RuntimeWarning",
        "-W", "ignore:Conversion of an array with ndim:DeprecationWarning")  # fmt: skip

Row = dict[str, str]
Rows = dict[tuple[str, ...], Row]


class Failed(Exception):
    """A command failed; the message holds its last lines."""


def run(
    *command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """What a command prints."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env=environment,
    )  # fmt: skip
    if done.returncode != 0:
        raise Failed("\n".join(done.stdout.strip().splitlines()[-15:]))
    return done.stdout


def number(version: str) -> tuple[int, ...]:
    """``(2, 13, 0)`` of ``"2.13.0+cpu"``."""
    return tuple(map(int, version.partition("+")[0].split(".")))


def releases(package: str, oldest: str) -> list[str]:
    """The oldest version of a package and, of every minor version from there on, the last."""
    told = run(sys.executable, "-m", "pip", "index", "versions", package)
    listed = re.search(r"^Available versions: (.+)$", told, re.MULTILINE)
    assert listed is not None, told
    known = {version.partition("+")[0] for version in listed[1].split(", ")}
    supported = sorted((v for v in known if number(v) >= number(oldest)), key=number)
    last = {number(version)[:2]: version for version in supported}
    return sorted({supported[0], *last.values()}, key=number)


def torch_releases() -> list[str]:
    """The oldest torch that is supported and, of every minor version, the last that pip finds."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return releases("torch", re.findall(r'"torch>=([\d.]+)"', text)[0])


def interpreters() -> dict[str, str]:
    """Every Python from 3.10 on that is at hand, by minor version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    commands = [sys.executable, *map(str, sorted(pyenv.glob("versions/3.*/bin/python")))]
    commands += filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 20)))
    found: dict[str, str] = {}
    for command in commands:
        try:
            version = run(command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
        except Failed:
            continue
        if number(version) >= (3, 10):
            found.setdefault(version.strip(), command)
    return dict(sorted(found.items(), key=lambda item: number(item[0])))


def all_pairs(torches: Sequence[str], pythons: Sequence[str]) -> list[tuple[str, str]]:
    """The oldest and the newest torch with every Python, those between with one each, in turn."""
    ends = (torches[0], torches[-1])
    return [
        (version, python)
        for k, version in enumerate(torches)
        for python in (pythons if version in ends else [pythons[k % len(pythons)]])
    ]


def check_out(commit: str, folder: Path) -> Path:
    """Writes the files of a commit, so that what is compiled in the checkout is left alone."""
    shutil.rmtree(folder, ignore_errors=True)
    archive = folder.with_suffix(".zip")
    archive.parent.mkdir(parents=True, exist_ok=True)
    run("git", "archive", "--format=zip", "--output", archive, commit, cwd=ROOT)
    shutil.unpack_archive(archive, folder)
    return folder


def make_wheel(sources: Path, folder: Path) -> Path:
    """Compiles a wheel beside the running Python's torch."""
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    run(sys.executable, "-m", "pip", "wheel", *options, folder, sources)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: Path, python: str, version: str) -> Path:
    """Makes a virtual environment with a torch and returns its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", f"torch=={version}", *REQUIREMENTS)
    return inside


def install_and_test(python: Path, what: Path, sources: Path, log: Path) -> Row:
    """Installs the sources or a wheel, runs the core tests, and returns what came of it."""
    options = ["--quiet", "--force-reinstall", "--no-deps", "--no-build-isolation"]
    try:
        run(python, "-m", "pip", "install", *options, what)
        code = "from throughtime import _build_info as i; print('built:', i.built.get('cpu', 'no'))"
        built = run(python, "-c", code).rpartition("built: ")[2].strip()
    except Failed as failure:
        print(failure, flush=True)
        return {"built": "no"}
    files = [path for name in CORE for path in (sources / "tests").glob(f"*/test_{name}.py")]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CALM, *files]
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        subprocess.run(command, cwd=sources, stdout=out, stderr=subprocess.STDOUT, check=False)
    seconds = f"{time.perf_counter() - start:.0f}"
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    counts |= {w: int(n) for n, w in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    counts["failed"] += counts.pop("error")
    return {"built": built, **{name: str(n) for name, n in counts.items()}, "seconds": seconds}


def read(table: Path) -> Rows:
    """The rows of an earlier run, by version of torch, of Python, and the way of installing."""
    if not table.is_file():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def write(table: Path, rows: Rows) -> None:
    ordered = sorted(rows, key=lambda key: (number(key[0]), number(key[1]), key[2]))
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in ordered)


def main() -> int:
    """Runs what the table lacks; 1 if a row is bad or an environment could not be made."""
    parser = argparse.ArgumentParser("versions.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the table (%(default)s)")
    parser.add_argument(
        "--pairs", nargs="+", metavar="TORCH:PYTHON", help="such as 2.10.0:3.11 (default: many)"
    )
    args = parser.parse_args()
    os.environ["THROUGHTIME_BUILD"] = "cpu"
    pythons = interpreters()
    pairs = [tuple(pair.split(":")) for pair in args.pairs or ()]
    pairs = pairs or all_pairs(torch_releases(), list(pythons))
    rows, bad = read(args.out), 0
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=ROOT).strip()
    sources = check_out(commit, WORK / "sources")
    print(f"commit {commit}: the wheel, beside torch {torch.__version__}", flush=True)
    wheel = make_wheel(sources, WORK / "wheel")
    ways = {"source": sources, f"wheel of {torch.__version__}": wheel}
    for place, (version, python) in enumerate(pairs, 1):
        title = f"[{place}/{len(pairs)}] torch {version}, Python {python}"
        lacking = [w for w in ways if rows.get((version, python, w), {}).get("commit") != commit]
        try:
            if lacking:
                print(f"{title}: making an environment", flush=True)
                inside = environment(WORK / "environment", pythons[python], version)
        except Failed as failure:
            print(failure, flush=True)
            bad += 1
            continue
        for way in ways:
            key = (version, python, way)
            if way in lacking:
                log = WORK / f"{version}-{python}-{way.partition(' ')[0]}.log"
                rows[key] = dict(zip(KEY, key, strict=True)) | {"commit": commit}
                rows[key] |= install_and_test(inside, ways[way], sources, log)
                write(args.out, rows)
            row = rows[key]
            bad += row["built"] == "no" or row["failed"] != "0" or row["passed"] == "0"
            print(
                f"{title}: " + ", ".join(f"{n} {row.get(n, '')}" for n in COLUMNS[2:]), flush=True
            )
    shutil.rmtree(WORK / "environment", ignore_errors=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
