"""Loads the compiled extension, and tells why there is none.

torch is imported before the extension: the extension's library references are resolved by the
libraries that torch has already loaded.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_INSTALL = (
    "reinstall throughtime where torch >= 2.10 and a C++ compiler are present: "
    "`pip install --force-reinstall --no-deps --no-cache-dir .` in its source folder"
)

extension: ModuleType | None
_missing: str | None


def _reason_from_build() -> str:
    try:
        info = importlib.import_module("throughtime._build_info")
    except ImportError:
        return f"the compiled CPU kernels were not built; {_INSTALL}"
    reason = info.left_out.get("cpu", "the compiled CPU kernels are not in this installation")
    return str(reason) if "pip install" in reason else f"{reason}; {_INSTALL}"


try:
    extension = importlib.import_module("throughtime._C")
    _missing = None
except ModuleNotFoundError:
    extension = None
    _missing = _reason_from_build()
except ImportError as error:
    extension = None
    _missing = f"the compiled CPU kernels do not load under torch {torch.__version__} ({error}); "
    _missing += _INSTALL


def why_missing() -> str | None:
    """None if the extension is loaded, otherwise the reason and the way out."""
    return _missing
