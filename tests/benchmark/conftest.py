"""Every benchmark test works in a folder of its own, and measures the machine by small arrays."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.measure import timing
from bench.train import recall, transfer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "GEMM_SIZE", 64)
    monkeypatch.setattr(timing, "COPY_BYTES", 2**20)
    monkeypatch.setattr(recall, "VALIDATION_SIZE", 30)
    monkeypatch.setattr(recall, "TEST_SIZE", 40)
    monkeypatch.setattr(transfer, "SEQUENCES", 20)
    monkeypatch.chdir(tmp_path)
