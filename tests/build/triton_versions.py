"""Compiles the Triton kernels with every Triton that is supported: `make test-versions`.

Of every minor version from the oldest that is supported on, the last that pip finds is unpacked
beside the running Python's torch. What is compiled is the installed package. No GPU is needed.
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


def compile_kernels(version: str) -> int:
    """Compiles them with a Triton and returns how many there are."""
    folder = WORK / f"triton-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    run(*pip, f"triton=={version}")
    environment = {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    module = "throughtime.triton_kernels.compile"
    command = [sys.executable, "-W", "ignore", "-m", module, "--targets", *TARGETS]
    told = run(*command, environment=os.environ | environment)
    shutil.rmtree(folder)
    return told.count("| sm_")


def main() -> int:
    """1 if a Triton does not compile a kernel, or spills more registers than known."""
    bad = 0
    for version in supported():
        try:
            print(f"Triton {version}: {compile_kernels(version)} kernels compiled", flush=True)
        except Failed as failure:
            print(f"Triton {version}: {failure}", flush=True)
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main())
