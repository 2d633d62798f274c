"""Loads the compiled extensions, and tells why one is missing.

torch is imported before them: their library references are resolved by the libraries that torch has
already loaded.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Literal

import torch

from throughtime import _install

Part = Literal["cpu", "cuda"]

_WHAT = {"cpu": "the compiled CPU kernels", "cuda": "the CUDA kernels"}
_NEEDS = {
    "cpu": "torch >= 2.10 and a C++ compiler",
    "cuda": "a torch for CUDA, the CUDA toolkit and a C++ compiler",
}


def _load(part: Part, name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError:
        reason = _not_built(part)
    except ImportError as error:
        reason = f"{_WHAT[part]} do not load under torch {torch.__version__} ({error})"
    return None, f"{reason}; where there are {_NEEDS[part]}, run {_install.again(part)}"


def _not_built(part: Part) -> str:
    """Why a part is not here: this torch could not run it, or what setup.py recorded."""
    if part == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is without CUDA"
    try:
        info = importlib.import_module("throughtime._build_info")
    except ImportError:
        return f"{_WHAT[part]} were not built"
    because = info.left_out.get(part)
    when = f" (when it was built: {because})" if because else ""
    return f"{_WHAT[part]} are not in this installation{when}"


extension, _missing = _load("cpu", "throughtime._C")
cuda_extension, _missing_cuda = _load("cuda", "throughtime._C_cuda")


def _choose_instruction_set(name: str | None) -> None:
    """Run another instruction set's kernels than the best that the processor has."""
    if not name or extension is None:
        return
    known = extension.runnable_isas()
    if name not in known:
        raise ValueError(
            f"environment variable THROUGHTIME_CPU_ISA should be one of {', '.join(known)}, which "
            f"this processor and this build have, got {name!r}"
        )
    extension.set_isa(name)


_choose_instruction_set(os.environ.get("THROUGHTIME_CPU_ISA"))


def why_missing(part: Part = "cpu") -> str | None:
    """None if the extension is loaded, otherwise the reason and the way out."""
    return _missing if part == "cpu" else _missing_cuda
