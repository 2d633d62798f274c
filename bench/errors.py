"""The one kind of error that a command reports as a sentence instead of a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType

from throughtime import _install


class UsageError(Exception):
    """Something the person at the keyboard can put right; the message says what and how."""


def require(module: str) -> ModuleType:
    """Import a module that comes with the ``bench`` extra, or raise a ``UsageError``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = (error.name or module).split(".")[0]
        distribution = "scikit-learn" if name == "sklearn" else name
        raise UsageError(
            f"this command needs {distribution}, which is not installed; "
            f"install it with: pip install {_install.source('[bench]')}"
        ) from error
