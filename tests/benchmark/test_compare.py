"""``bench compare``: green for equal code, red for slower code, and honest where noise hides it."""

from __future__ import annotations

import math
import random
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bench import __main__ as bench
from bench.arguments import UsageError
from bench.compare import command, stats, trees, worker

from throughtime import _install

CASES = [f"case {k}" for k in range(6)]


def simulate(
    seed: int, *, slowdown: float = 1.0, process: float
) -> tuple[float, dict[str, stats.Verdict]]:
    """Judged ratios of a shared machine: long tails, and every process with its own speed.

    ``slowdown`` is that of the first case.
    """
    draw = random.Random(seed)

    def sample(speed: float) -> float:
        busy = draw.expovariate(1 / 0.5) if draw.random() < 0.15 else 0.0
        return speed * math.exp(draw.gauss(0, 0.02)) + busy

    ratios, twins = {}, {}
    for case in CASES:
        base, twin, work = (math.exp(draw.gauss(0, process / math.sqrt(2))) for _ in range(3))
        work *= slowdown if case == CASES[0] else 1.0
        taken = [(sample(base), sample(twin), sample(work)) for _ in range(31)]
        ratios[case] = [w / b for b, _, w in taken]
        twins[case] = [t / b for b, t, _ in taken]
    return stats.judge(ratios, twins)


def red(verdicts: dict[str, stats.Verdict]) -> list[str]:
    return [case for case, verdict in verdicts.items() if verdict.word == "slower"]


@pytest.mark.parametrize("process", [0.0, 0.02, 0.05])
def test_equal_code_is_green(process: float) -> None:
    runs = [simulate(seed, process=process)[1] for seed in range(200)]
    assert sum(not red(verdicts) for verdicts in runs) >= 0.95 * len(runs)


def test_a_tenth_slower_is_red() -> None:
    runs = [simulate(seed, slowdown=1.1, process=0.01)[1] for seed in range(200)]
    assert sum(red(verdicts) == CASES[:1] for verdicts in runs) >= 0.95 * len(runs)


def test_a_gain_is_told_and_is_not_red() -> None:
    runs = [simulate(seed, slowdown=1 / 1.1, process=0.01)[1][CASES[0]].word for seed in range(100)]
    assert runs.count("faster") >= 95 and "slower" not in runs


def test_noise_between_processes_hides_a_tenth_and_the_limit_says_so() -> None:
    runs = [simulate(seed, slowdown=1.1, process=0.08) for seed in range(100)]
    assert sum(bool(red(verdicts)) for _, verdicts in runs) <= 10
    assert sum(limit > 0.1 for limit, _ in runs) >= 95


def test_an_odd_case_hides_no_other() -> None:
    """Where the processes of one case lie far apart, it alone is unclear."""
    twins = {case: [1.01] * 31 for case in CASES} | {"odd": [0.7] * 31, "odder": [0.69] * 31}
    ratios = {case: [1.0] * 31 for case in CASES} | {"odd": [1.5] * 31, "odder": [1.5] * 31}
    ratios[CASES[0]] = [1.1] * 31
    limit, verdicts = stats.judge(ratios, twins)
    assert limit < 0.05 and red(verdicts) == CASES[:1]


def test_few_rounds_prove_nothing() -> None:
    _, verdicts = stats.judge({"a": [2.0] * 4}, {"a": [1.0] * 4})
    assert verdicts["a"].word == "unclear"


def test_sign_test_counts() -> None:
    assert stats.sign_test([2.0] * 10)[0] == stats.sign_test([0.5] * 10)[0] == 2**-9
    assert stats.sign_test([1.0] * 10)[0] == 1.0  # equal is neither above nor below
    assert stats.sign_test([2.0, 0.5])[0] == 1.0
    _, verdicts = stats.judge({"a": [2.0] * 10, "b": [1.0] * 10}, {"a": [1.0], "b": [1.0]})
    assert verdicts["a"].p == 2 * 2**-9  # of two cases


def test_interval_encloses_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(400):
        _, low, high = stats.sign_test([draw.expovariate(1.0) for _ in range(15)])
        hits += low <= math.log(2) <= high
    assert 0.93 * 400 <= hits <= 0.995 * 400  # 96.5 % for 15 samples


def test_limit_grows_with_the_difference_between_twins() -> None:
    assert stats.noise_limit([1.0] * 6, 6) == stats.LEAST_LIMIT
    low, high = (stats.noise_limit([1 + d, 1 - d] * 3, 6) for d in (0.02, 0.05))
    assert 0.03 < low < high


# Processes and trees

FAKE_TORCH = """
float32 = None
class Tensor:
    def to(self, dtype): return self
def randn(*shape): return Tensor()
def manual_seed(seed): pass
def set_num_threads(threads): pass
class autograd:
    def grad(output, inputs, grad): pass
"""
FAKE_LAYER = """
import time
print("a layer that talks")
class LSTM:
    def __init__(self, *sizes): pass
    def to(self, dtype): return self
    def parameters(self): return []
    def __call__(self, input, detach_mask=None): time.sleep({seconds}); return [None]
"""


def make_tree(folder: Path, seconds: float | str) -> Path:
    """A tree whose LSTM takes the given time; it starts at once, as it has no torch."""
    (folder / "throughtime").mkdir(parents=True)
    (folder / "torch.py").write_text(FAKE_TORCH)
    (folder / "throughtime" / "__init__.py").write_text(FAKE_LAYER.format(seconds=seconds))
    return folder


LSTM = command.chosen(["lstm:T=5,B=1,I=1,H=1"], ())
LSTM = {"lstm:T=5": next(iter(LSTM.values()))}


def compare_trees_of(tmp_path: Path, seconds: float | str) -> command.Outcome:
    base, tree = make_tree(tmp_path / "base", 0.005), make_tree(tmp_path / "tree", seconds)
    return command.compare({"base": base, "twin": base, "tree": tree}, LSTM, threads=1)


def test_an_equal_tree_is_not_slower(tmp_path: Path) -> None:
    outcome = compare_trees_of(tmp_path, 0.005)
    assert outcome.slower == []
    assert outcome.verdicts["lstm:T=5"].ratio == pytest.approx(1.0, abs=0.2)


def test_a_tree_that_sleeps_is_slower_twice(tmp_path: Path) -> None:
    outcome = compare_trees_of(tmp_path, 0.02)
    assert outcome.slower == ["lstm:T=5"]
    assert outcome.verdicts["lstm:T=5"].ratio > 1.5
    assert "SLOWER" in outcome.table()
    assert outcome.notes[0].startswith("1 slower. Limit: ")
    assert "measured again in new processes" in outcome.notes[1]


def test_what_is_slower_only_once_is_unclear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = f"0.02 if __import__('pathlib').Path({str(tmp_path / 'slow')!r}).exists() else 0.005"
    (tmp_path / "slow").touch()
    judge = command.judge

    def judge_then_recover(*arguments: Any) -> Any:
        (tmp_path / "slow").unlink(missing_ok=True)
        return judge(*arguments)

    monkeypatch.setattr(command, "judge", judge_then_recover)
    outcome = compare_trees_of(tmp_path, seconds)
    assert outcome.slower == []
    assert outcome.verdicts["lstm:T=5"].word == "unclear"


@pytest.mark.parametrize(("enough", "rounds"), [(0, command.ROUNDS), (33, 33)])
def test_rounds_go_on_until_chance_is_small(
    enough: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_settled", lambda samples: len(samples["tree"]) >= enough)
    assert len(compare_trees_of(tmp_path, 0.005).rounds["lstm:T=5"]) == rounds


@pytest.mark.parametrize(
    ("tree", "twin", "settled"), [(0, 0, True), (0.2, 0, False), (0, 0.2, False)]
)
def test_settled_asks_both_medians(tree: float, twin: float, settled: bool) -> None:
    samples = {"base": [1.0] * 31, "tree": [1.0, 1.0 + tree] * 15 + [1.0]}
    samples["twin"] = [1.0, 1.0 + twin] * 15 + [1.0]
    assert command._settled(pd.DataFrame(samples)) == settled


def test_a_tree_without_the_layer_is_not_compared(tmp_path: Path) -> None:
    base = make_tree(tmp_path / "base", 0.0)
    (base / "throughtime" / "__init__.py").write_text("")
    places = {"base": base, "twin": base, "tree": make_tree(tmp_path / "tree", 0.0)}
    with pytest.raises(UsageError) as caught:
        command.compare(places, LSTM, threads=1)
    assert "no case runs in both trees" in str(caught.value)
    assert "lstm:T=5: not compared: base: AttributeError: " in str(caught.value)


def test_a_process_that_dies_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path, 0.0)
    (tree / "throughtime" / "__init__.py").write_text("raise SystemExit('no kernels here')")
    with command.Worker(tree, 1) as worker, pytest.raises(UsageError, match="has died, see above"):
        worker.ask({"case": asdict(LSTM["lstm:T=5"])})
    assert "no kernels here" in capfd.readouterr().err


def test_a_worker_refuses_another_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(make_tree(tmp_path / "other", 0.0)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with command.Worker(empty, 1) as worker, pytest.raises(UsageError):
        worker.ask({"case": asdict(LSTM["lstm:T=5"])})
    assert f"not from {empty}" in capfd.readouterr().err


@pytest.mark.parametrize("case", ["lstm:T=4,B=2,I=3,H=5,p=0.5", "rel-lstm:T=4", "relevancy:T=9"])
def test_worker_measures_every_operation(case: str) -> None:
    (chosen,) = command.chosen([case], ()).values()
    gradients = worker.make(asdict(chosen))()
    assert len(gradients) == {"lstm": 4, "rel-lstm": 7, "relevancy": 3}[chosen.op]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "text", ["gru", "lstm:W=3", "lstm:T", "lstm:T=x", "relevancy:p=0.5", "relevancy:top_k=-1"]
)
def test_a_wrong_case_is_a_sentence(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        command.chosen([text], command.QUICK)
    words = "--cases wants one of lstm, rel-lstm, relevancy, or one with sizes, as in lstm:T=120,"
    assert words in str(caught.value) and f"got {text!r}" in str(caught.value)


def test_cases_of_both_groups_are_cases() -> None:
    quick = command.chosen([], command.QUICK)
    everything = command.chosen([], command.DEFAULT)
    assert quick.items() <= everything.items() and len(everything) == len(command.DEFAULT)
    only = command.chosen(["rel-lstm"], command.DEFAULT)
    assert {case.op for case in only.values()} == {"rel-lstm"} and len(only) == 2


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A checkout with two commits of a package that needs no compiler, and a change since."""
    folder = tmp_path / "repo"
    package = folder / "python" / "throughtime"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "throughtime"\nversion = "0"\n'
        '[tool.setuptools.packages.find]\nwhere = ["python"]\n'
    )
    (package / "__init__.py").write_text("which = 'base'")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (package / "__init__.py").write_text("which = 'later'")
    subprocess.run([*git, "commit", "-q", "-a", "-m", "second"], check=True)
    (package / "__init__.py").write_text("which = 'tree'")
    return folder


def test_base_is_what_was_committed_and_is_built_once(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = trees.commit(repo, "HEAD~1")
    base = trees.build_base(repo, revision)
    assert base.is_relative_to(repo / "build")
    assert (base / "throughtime" / "__init__.py").read_text() == "which = 'base'"
    assert (repo / "python" / "throughtime" / "__init__.py").read_text() == "which = 'tree'"
    monkeypatch.setattr(trees, "install", None)
    assert trees.build_base(repo, revision) == base
    monkeypatch.setenv("CXXFLAGS", "-O0")
    with pytest.raises(TypeError):  # other flags make another build
        trees.build_base(repo, revision)


def test_a_build_that_fails_says_how(repo: Path, tmp_path: Path) -> None:
    (repo / "pyproject.toml").write_text("[build-system]\nrequires = 3\n")
    with pytest.raises(UsageError) as caught:
        trees.install(repo, tmp_path / "out")
    assert "pip install --quiet" not in str(caught.value).splitlines()[-1]
    assert f"pip install {_install.source('[test]')}" in str(caught.value)


def test_places_without_a_base_are_sentences(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.main(["compare", "--base", "main"]) == 2
    assert "lies in none: change to one" in capsys.readouterr().err
    monkeypatch.chdir(repo / "python")
    assert bench.main(["compare", "--base", "nothing"]) == 2
    assert "--base wants a revision of" in capsys.readouterr().err
