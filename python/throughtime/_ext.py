"""Loads the compiled extensions, and tells why one is missing.

torch is imported before them: their library references are resolved by the libraries that torch has
already loaded.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

import torch

Part = Literal["cpu", "cuda"]

_WHAT = {"cpu": "the compiled CPU kernels", "cuda": "the CUDA kernels"}
_INSTALL = {
    "cpu": (
        "reinstall throughtime where torch >= 2.10 and a C++ compiler are present: "
        "`pip install --force-reinstall --no-deps --no-cache-dir .` in its source folder"
    ),
    "cuda": (
        "reinstall throughtime where a torch for CUDA and the CUDA toolkit are present: "
        "`THROUGHTIME_BUILD=cuda pip install --force-reinstall --no-deps --no-cache-dir .` in its "
        "source folder"
    ),
}


def _reason_from_build(part: Part) -> str:
    try:
        info = importlib.import_module("throughtime._build_info")
    except ImportError:
        return f"{_WHAT[part]} were not built; {_INSTALL[part]}"
    reason = str(info.left_out.get(part, f"{_WHAT[part]} are not in this installation"))
    return reason if "pip install" in reason else f"{reason}; {_INSTALL[part]}"


def _load(part: Part, name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError:
        return None, _reason_from_build(part)
    except ImportError as error:
        reason = f"{_WHAT[part]} do not load under torch {torch.__version__} ({error}); "
        return None, reason + _INSTALL[part]


extension, _missing = _load("cpu", "throughtime._C")
cuda_extension, _missing_cuda = _load("cuda", "throughtime._C_cuda")


def why_missing(part: Part = "cpu") -> str | None:
    """None if the extension is loaded, otherwise the reason and the way out."""
    return _missing if part == "cpu" else _missing_cuda
