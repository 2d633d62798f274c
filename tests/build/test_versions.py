"""tests/build/versions.py, which `make test-versions` runs, and the table that it left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import triton_versions
import versions

TORCHES = ["2.10.0", "2.11.0", "2.12.1", "2.13.0"]


def test_the_ends_meet_every_python_and_the_rest_one_each() -> None:
    assert versions.all_pairs(TORCHES, ["3.10", "3.13"]) == [
        *[("2.10.0", "3.10"), ("2.10.0", "3.13"), ("2.11.0", "3.13"), ("2.12.1", "3.10")],
        *[("2.13.0", "3.10"), ("2.13.0", "3.13")],
    ]


def test_the_last_patch_of_every_supported_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "torch (2.12.1)\nAvailable versions: 2.12.1, 2.12.0, 2.11.0+cpu, 2.10.1, 2.10.0, 2.9.1\n"
    monkeypatch.setattr(versions, "run", lambda *command: told)
    assert versions.torch_releases() == ["2.10.0", "2.10.1", "2.11.0", "2.12.1"]


def test_the_oldest_and_the_newest_supported_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "triton (3.9.0)\nAvailable versions: 3.9.0, 3.6.1, 3.6.0, 3.5.1, 3.5.0, 3.4.0\n"
    monkeypatch.setattr(versions, "run", lambda *command: told)
    assert triton_versions.supported() == ["3.5.0", "3.5.1", "3.6.1", "3.9.0"]


def test_pythons_at_hand() -> None:
    found = versions.interpreters()
    assert found["{}.{}".format(*sys.version_info)] == sys.executable
    assert "3.9" not in found


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, made = tmp_path / "versions.csv", []
    counts = {"built": "avx2", "passed": "5", "failed": "0", "skipped": "0", "seconds": "1"}

    def environment(folder: Path, python: str, version: str) -> Path:
        made.append(version)
        if version == "2.11.0" and len(made) == 2:
            raise KeyboardInterrupt
        return folder

    monkeypatch.setenv("THROUGHTIME_BUILD", "cpu")  # as main() sets it
    monkeypatch.setattr(versions, "WORK", tmp_path / "work")
    monkeypatch.setattr(versions, "run", lambda *command, cwd=None: "abc1234\n")
    monkeypatch.setattr(versions, "check_out", lambda commit, folder: folder)
    monkeypatch.setattr(versions, "make_wheel", lambda sources, folder: folder)
    monkeypatch.setattr(versions, "interpreters", lambda: {"3.11": "python3.11"})
    monkeypatch.setattr(versions, "environment", environment)
    monkeypatch.setattr(versions, "install_and_test", lambda *arguments: counts)
    pairs = ["2.10.0:3.11", "2.11.0:3.11"]
    monkeypatch.setattr(sys, "argv", ["versions.py", "--out", str(table), "--pairs", *pairs])
    with pytest.raises(KeyboardInterrupt):
        versions.main()
    assert [key[0] for key in versions.read(table)] == ["2.10.0", "2.10.0"]
    assert versions.main() == 0
    assert made == ["2.10.0", "2.11.0", "2.11.0"]
    counts["failed"] = "1"
    monkeypatch.setattr(versions, "run", lambda *command, cwd=None: "def5678\n")
    assert versions.main() == 1  # another commit is tested anew, and what fails is told
    assert [row["commit"] for row in versions.read(table).values()] == ["def5678"] * 4


def test_the_stored_table_has_the_oldest_torch_and_newer_ones_than_that_of_make_install() -> None:
    rows = versions.read(versions.OUT).values()
    torches = {versions.number(row["torch"])[:2] for row in rows}
    assert min(torches) == (2, 10) and max(torches) > (2, 13)
    assert all(row["built"] != "no" and int(row["passed"]) > 1000 for row in rows)
