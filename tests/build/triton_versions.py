"""Compiles the Triton kernels with every Triton that is supported: `make test-versions`.

Of every minor version from the oldest that is supported on, the last that pip finds is unpacked
beside the running Python's torch. What is compiled is the installed package. No GPU is needed. What
spills more than known is told: each version allots registers in its own way.
"""

from __future__ import annotations

import os
import re
import shutil
import sys

from versions import ROOT, WORK, Failed, releases, run

TARGETS = ("sm_80", "sm_90")  # an older Triton may not know newer ones


def supported() -> list[str]:
    """The oldest Triton that is supported and, of every minor version, the last."""
    oldest = re.findall(
        r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )
    return releases("triton", oldest[0])


def compile_kernels(version: str) -> tuple[int, list[str]]:
    """Compiles them with a Triton; how many there are, and what spills more than known."""
    folder = WORK / f"triton-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    run(*pip, f"triton=={version}")
    environment = {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    module = "throughtime.triton_kernels.compile"
    command = [sys.executable, "-W", "ignore", "-m", module, "--any-spills", "--targets", *TARGETS]
    told = run(*command, environment=os.environ | environment)
    shutil.rmtree(folder)
    return told.count("| sm_"), [line for line in told.splitlines() if " spills " in line]


def main() -> int:
    """1 if a Triton does not compile a kernel."""
    bad = 0
    for version in supported():
        try:
            kernels, spills = compile_kernels(version)
            print(f"Triton {version}: {kernels} kernels compiled", *spills, sep="\n", flush=True)
        except Failed as failure:
            print(f"Triton {version}: {failure}", flush=True)
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main())
