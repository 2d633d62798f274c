"""Every room of tests is one that pytest looks into."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_pytest_passes_over_no_room(pytestconfig: pytest.Config) -> None:
    """Its own list of folders to pass over has common names, such as "build"."""
    rooms = {path.parent.relative_to(HERE).parts[0] for path in HERE.glob("*/**/test_*.py")}
    patterns = pytestconfig.getini("norecursedirs")
    assert "build" in rooms
    assert [room for room in rooms for pattern in patterns if fnmatch(room, pattern)] == []
