"""bench/gpu.sh without a GPU, and what it names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.__main__ import make_parser

from cases import Shape
from cases_gpu import TIERS, force, plan_of
from throughtime import _ext

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/gpu.sh"
STAGES = ("build", "env", "latency", "test", "sanitize", "bench", "tf32", "episodes", "attention",
          "nccl")  # fmt: skip

if shutil.which("bash") is None:
    pytest.skip("bash is not installed", allow_module_level=True)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def gpu_sh(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={name: x for name, x in os.environ.items() if name != "PYTEST_ARGS"} | variables,
    )


def test_a_dry_run_prints_every_stage_in_order_and_writes_nothing(tmp_path: Path) -> None:
    done = gpu_sh("--dry-run", "--out", tmp_path / "some where")
    assert done.returncode == 0 and not done.stderr and list(tmp_path.iterdir()) == []
    assert re.findall(r"^== (\w+)$", done.stdout, re.MULTILINE) == list(STAGES)
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert "THROUGHTIME_BUILD=cuda" in commands[0] and "--no-build-isolation" in commands[0]
    tests = [line for line in commands if "-m pytest" in line]
    # Else conftest.py would have Triton's kernels interpreted on the CPU.
    assert len(tests) == 4 and all("TRITON_INTERPRET=0" in line for line in tests)
    tools = re.findall(r"compute-sanitizer --tool (\w+)", done.stdout)
    assert tools == ["memcheck", "racecheck", "synccheck"]
    assert all("GPU_REPEATS=3" in line for line in commands if "--tool" in line)
    shapes = [
        re.findall(rf"--T (\d+) --B (\d+) --H (\d+) --dtype {dtypes} --p 0", done.stdout)
        for dtypes in ("float16 bfloat16 float32", "float32-high")
    ]
    assert shapes[0] == shapes[1] == [
        ("1024", "16", "128"), ("1024", "64", "256"), ("1024", "16", "768"),
        ("1024", "64", "1024"), ("1024", "33", "200"), ("2048", "16", "512"),
    ]  # fmt: skip
    longest = [int(seconds) for seconds in re.findall(r"timeout (?:--\S+ )?(\d+)", done.stdout)]
    measuring = [line for line in commands if "-m bench" in line]
    assert max(longest) < 600 and all("timeout" in line for line in measuring)
    assert r"some\ where/latency.csv" in done.stdout
    assert r"--csv " + str(tmp_path) + r"/some\ where/lstm-H128-B16.csv" in done.stdout


def test_bench_knows_the_options_of_every_stage() -> None:
    commands = re.findall(r"-m bench (.*)", gpu_sh("--dry-run").stdout)
    assert len(commands) == 15
    found = set()
    for words in map(shlex.split, commands):
        args = make_parser(words).parse_args(words)
        assert getattr(args, "device", None) == "cuda" or args.devices == ["cuda"]
        found.add(words[0])
    assert found == {"lstm", "rl", "relevancy", "train"}


def test_stages_in_the_order_asked_for_and_arguments_of_pytest() -> None:
    done = gpu_sh("--dry-run", "test", "env", PYTEST_ARGS="-x -k 'one or two'")
    assert re.findall(r"^== (\w+)$", done.stdout, re.MULTILINE) == ["test", "env"]
    assert r"-x -k one\ or\ two" in done.stdout


def test_every_file_of_gpu_tests_is_run() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests/gpu").glob("test_*.py")
        if re.search(r"^pytestmark = \[\s*\*gpu,", path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(found) >= 4
    (command,) = [x for x in gpu_sh("--dry-run", "test").stdout.splitlines() if "pytest" in x]
    assert set(re.findall(r"tests/gpu/\w+\.py", command)) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tset"], "there is no stage 'tset', only build env latency test sanitize bench tf32"),
        (["--fast"], "there is no option --fast"),
        (["--out"], "--out wants a value"),
        (["--out", "--dry-run"], "--out wants a value"),
        (["--wheels", "no-such-folder"], "there is no wheel in 'no-such-folder'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = gpu_sh(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"gpu.sh: {done.stderr[8:]}" and message in done.stderr
    assert done.stderr.endswith("see bench/gpu.sh --help\n") and done.stderr.count("\n") == 1


def test_help_names_every_stage_and_option() -> None:
    text = gpu_sh("--help").stdout
    for word in (*STAGES, "--out", "--wheels", "--python", "--dry-run", "PYTEST_ARGS"):
        assert re.search(rf"^ *{word}\b", text, re.MULTILINE), word


@without_gpu
def test_without_a_gpu_it_stops_with_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu_sh("--python", sys.executable, "--out", out)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu.sh: an NVIDIA GPU is needed, and ")
    assert "Torch not compiled with CUDA" in done.stderr and not out.exists()


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *"torch.cuda.get_device_name"*) echo "Fake GPU (80 GB)" ;;
  *"import throughtime"*|*"import pytest"*|*torch.ones*) ;;
  *"bench lstm"*"--H 768"*) echo "this shape broke"; exit 3 ;;
  *"bench lstm"*)
    for file; do :; done
    echo "$*" > "$file"
    ;;
  *"-m throughtime env") echo "GPU: fake"; exit 4 ;;
  *) echo "unexpected: $*"; exit 9 ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder of programs that act as if there were a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "python": FAKE_PYTHON,
        "nvcc": '#!/bin/sh\nfor file; do :; done\nprintf "#!/bin/sh\\necho a,b > \\$1" > "$file"\n'
        'chmod +x "$file"\n',
        "compute-sanitizer": '#!/bin/sh\necho "Error: Device not supported"\nexit 1\n',
        "nvidia-smi": "#!/bin/sh\necho the driver\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def test_a_stage_that_fails_stops_no_other_and_the_exit_code_tells(
    fake: Path, tmp_path: Path
) -> None:
    """With the script in a copy of its tree: it writes to build/ and a folder named by the GPU."""
    tree = tmp_path / "tree"
    out = tree / "bench/results/fake-gpu-80-gb"
    (tree / "bench").mkdir(parents=True)
    shutil.copy(SCRIPT, tree / "bench")
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--python", str(fake / "python"),
         "env", "latency", "sanitize", "bench"],
        cwd=tree, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "CUDA_HOME"}
        | {"PATH": f"{fake}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    results = dict(
        re.findall(r"^(\w+) +(passed|skipped|FAILED \(\d+\)) +\d+ s$", done.stdout, re.M)
    )
    assert results == {
        "env": "FAILED (4)", "latency": "passed", "sanitize": "skipped", "bench": "FAILED (1)",
    }  # fmt: skip
    assert "skipped: compute-sanitizer cannot watch a GPU here: Error: Device" in done.stdout
    assert (out / "latency.csv").read_text() == "a,b\n" and "\na,b\n" in done.stdout
    # The shapes after the one that broke as well.
    files = [
        f"lstm-{shape}.csv"
        for shape in ("H1024-B64", "H128-B16", "H200-B33", "H256-B64", "H512-B16")
    ]
    assert sorted(path.name for path in out.glob("lstm-*")) == files
    assert "--peers torch compiled-loop" in (out / files[0]).read_text()
    log = (out / "gpu.log").read_text()
    for text in ("Fake GPU (80 GB)", "the driver", "GPU: fake", "this shape broke", "FAILED (4)"):
        assert text in log, text


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_latency_names_every_measurable_constant_of_the_plan() -> None:
    plan = (ROOT / "csrc/lstm/cuda/plan.h").read_text("utf-8")
    measurable, marker, _ = plan.partition("// Slopes of these")
    constants = set(re.findall(r"\b(k\w+) = [\d.]+[,;]", measurable)) if marker else set()
    table = (ROOT / "bench/gpu/latency.cu").read_text("utf-8")
    assert len(constants) == 13 and set(re.findall(r"OF_PLAN\((k\w+)\)", table)) == constants


@pytest.mark.parametrize(("tier", "dtype", "shape"), TIERS, ids=str)
def test_every_tier_of_the_gpu_tests_fits_an_h100(
    tier: str, dtype: torch.dtype, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    if _ext.extension is None:
        pytest.skip("the plan is known to the compiled extension")
    force(monkeypatch, tier)
    assert plan_of(shape, dtype, gpu="H100") == [tier, tier]
