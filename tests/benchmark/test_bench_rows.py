"""The one table of all benchmarks: what is written is read again, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import rows
from bench.errors import UsageError
from bench.rows import Row

COLUMNS = (
    "op,T,B,I,H,heads,D,window_size,top_k,score,dtype,p,mode,device,impl,backend,threads,"
    "median_ms,q1_ms,q3_ms,runs,ratio,ratio_q1,ratio_q3,reference_ratio,best_peer_ratio,gflops,"
    "share_of_matmul,gbs,share_of_bandwidth,us_per_query,peak_mb,error,note,machine,torch,version,"
    "date,command"
)


def make(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "op": "lstm",
        "T": 5,
        "B": 3,
        "I": 2,
        "H": 4,
        "dtype": "float32",
        "p": 0.5,
        "mode": "forward",
        "device": "cpu",
        "impl": "throughtime",
        "backend": "cpu",
        "threads": 2,
    }
    return Row(**(values | changes))


def test_the_columns_keep_their_names_and_order() -> None:
    assert ",".join(rows.SCHEMA) == COLUMNS
    assert all(rows.SCHEMA.values())


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = [
        make(median_ms=1.25, runs=7, ratio=1.0, error=1e-7, machine="a machine, 2 cores"),
        make(impl="sdpa", backend=None, heads=4, D=8, p=None, note='cannot run: no, it "can\'t"'),
    ]
    path = tmp_path / "new" / "rows.csv"
    rows.write_csv(path, written)
    first, *lines = path.read_text().splitlines()
    assert first == COLUMNS and len(lines) == 2
    assert lines[0].startswith("lstm,5,3,2,4,,,,,,float32,0.5,forward,cpu,throughtime,cpu,2,1.25,,")
    assert rows.read_csv(path) == written


def test_contestants_of_a_cell_share_it() -> None:
    ours, peer = make(), make(impl="loop", backend=None, median_ms=3.0)
    assert ours.cell == peer.cell != make(p=0.0).cell
    assert (ours.contestant, peer.contestant) == ("throughtime (cpu)", "loop")
    assert ours.ours and not peer.ours


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("share_of_matmul", "share_of_sgemm"), "lacks share_of_matmul and has share_of_sgemm"),
        (("op,T", "T,op"), "has them in another order"),
        (("lstm,5,", "lstm,five,"), "line 2: T wants a whole number, got 'five'"),
        ((",0.5,", ",half,"), "line 2: p wants a number, got 'half'"),
        (("lstm,5,", "lstm,,"), "line 2: T is empty"),
        (("lstm,5,", "lstm,5"), "line 2: wanted 39 fields"),
        (("lstm,5,", "lstm,5,,"), "line 2: wanted 39 fields"),
    ],
)
def test_another_table_is_refused(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.write_csv(path, [make()])
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UsageError) as caught:
        rows.read_csv(path)
    assert words in str(caught.value) and "measure again" in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none.csv: No such file"):
        rows.read_csv(tmp_path / "none.csv")


def test_the_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    """As a user runs it, in a process of its own: the column is committed with the results."""
    shape = ["--T", "2", "--B", "1", "--H", "2", "--backends", "auto", "--repeats", "1"]
    command = ["throughtime", "bench", "lstm", *shape, "--peers", "--no-memory", "--csv", "a.csv"]
    subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, check=True, capture_output=True)
    written = {row.command for row in rows.read_csv(tmp_path / "a.csv")}
    assert written == {f"python -m {' '.join(command)}"}
