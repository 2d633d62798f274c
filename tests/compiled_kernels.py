"""The compiled CPU kernels; a test module that imports this is skipped where they are missing."""

from __future__ import annotations

from typing import Any

import pytest

from throughtime import _ext

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension
