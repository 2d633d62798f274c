"""`reproduce`: facts about gradients, sweeps, verdicts from stored rows, and the page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from bench.__main__ import main
from bench.reproduce import claims, command, gradients, training
from bench.reproduce.claims import CLAIMS
from bench.train.trainer import Trainer

from throughtime import functional

BY_NAME = {claim.name: claim for claim in CLAIMS}


def test_hops_and_their_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gradients.hops()
    assert rows.p.tolist() == [0, 0.25, 0.5, 1] and rows.error.max() < 1e-14
    assert BY_NAME["hops"].judge(rows).verdict == "holds"
    right = gradients._by_hops

    def one_less(*args: Any) -> Any:
        return right(*args)[1:]

    monkeypatch.setattr(gradients, "_by_hops", one_less)
    wrong = gradients.hops()
    assert wrong.error.min() > 1e-3
    assert BY_NAME["hops"].judge(wrong).verdict == "does not hold here"


def test_detaching_lowers_what_large_weights_blow_up() -> None:
    rows = gradients.weight_scale()
    assert BY_NAME["weight-scale"].judge(rows).verdict == "holds"
    size = rows.set_index(["scale", "forget_bias", "p"]).gradient
    assert size[8, 2.0].is_monotonic_decreasing and size[8, 2.0].iloc[0] > 1e3
    flat = rows.assign(gradient=1.0)
    assert BY_NAME["weight-scale"].judge(flat).verdict == "does not hold here"


def test_the_gradient_of_a_state_is_that_of_autograd() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.manual_seed(0)
    layer = gradients.LoopLSTM(3, 5, dtype=torch.float64)
    output, _ = layer(x)
    found = gradients._of_states(output, output[-1].sum())
    # The last state is the loss's own; of an earlier one: the same layer goes on from it.
    assert found[3] == pytest.approx(10**0.5)
    weights = [weight.detach() for weight in layer.parameters()]
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    _, (h, c) = functional.lstm(x[:2], (zeros, zeros), *weights)
    h = h.detach().requires_grad_()
    later, _ = functional.lstm(x[2:], (h, c.detach()), *weights)
    h_only = torch.autograd.grad(later[-1].sum(), h)[0].norm().item()
    assert found[1] > 0 and h_only > 0
    # h_2 depends on h_1 through the gates alone: c_1 is a value of its own in the loop.
    assert found[1] == pytest.approx(h_only)


def test_an_untrained_layer_retains_its_first_steps() -> None:
    rows = gradients.retained()
    assert rows.share.sum() == pytest.approx(15) and (rows.share[211:] == 0).all()
    assert rows.share[:5].min() > 0.7 and rows.share[40:].mean() < 0.05


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.1, 0.9, 0.6, 0.5, 0.9, 0.6], 2), ([0.9, 0.75, 0.7, 0.71], 0), ([0.1] * 3, 0), ([], 0)],
)
def test_falls(values: list[float], expected: int) -> None:
    assert training.falls(pd.Series(values, dtype=float)) == expected


def test_a_sweep_names_its_kinds_and_its_last_rows() -> None:
    common = {"task": "copying", "T": 3, "hidden": 8, "batch": 4, "epochs": 2}
    common |= {"updates_per_epoch": 3, "p": 0.0}
    sweep = training.Sweep("s", common, {"a, b": {}, "c": {"p": 0.5}}, seeds=(0, 10))
    rows = sweep(training.Setup(Path("runs"), 1))
    assert rows.groupby(["kind", "seed"]).size().to_dict() == {
        (kind, seed): 2 for kind in ("a, b", "c") for seed in (0, 10)
    }
    assert Path("runs/s/a, b, seed 10/log.csv").exists()
    last = training.last(rows)
    assert (last.epoch == 2).all() and len(last) == 4
    one = rows[(rows.kind == "c") & (rows.seed == 10)]
    found = last[(last.kind == "c") & (last.seed == 10)].iloc[0]
    assert found.grad_norm_max == one.grad_norm_max.max()
    assert found.cpu_seconds == one.cpu_seconds.sum()


@pytest.mark.parametrize(
    ("ours", "others", "verdict"),
    [
        ([0.9, 0.8, 1.0, 1.0], [0.2, 0.3, 0.1, 0.2], "holds"),
        ([0.2, 0.3, 0.1, 0.2], [0.9, 0.8, 1.0, 1.0], "does not hold here"),
        ([0.2, 0.9, 0.1, 0.8], [0.3, 0.7, 0.2, 0.85], "cannot be told here"),
        ([1.0, 1.0], [0.0, 0.0], "cannot be told here"),
    ],
)
def test_seeds_decide(ours: list[float], others: list[float], verdict: str) -> None:
    assert claims._better(pd.Series(ours), pd.Series(others)) == verdict


def test_the_page_and_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "--claims", "hops", "distance", "--out", "page", "--runs", "runs"]
    assert main(words) == 0
    page = Path("page/reproduction.md").read_text()
    assert "## hops: holds" in page and "## distance: holds" in page and "stability" not in page
    assert "![distance](distance.svg)" in page and Path("page/distance.svg").exists()
    assert page in capsys.readouterr().out
    rows = Path("page/hops.csv").read_bytes()
    picture = Path("page/distance.svg").read_bytes()
    monkeypatch.setattr(gradients, "hops", lambda: pytest.fail("measured again"))
    assert main(words) == 0 and Path("page/hops.csv").read_bytes() == rows
    assert Path("page/distance.svg").read_bytes() == picture  # no noise in a repository


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> pd.DataFrame:
        raise KeyboardInterrupt

    monkeypatch.setattr(gradients, "weight_scale", stop)
    words = ["reproduce", "--claims", "hops", "weight-scale", "--out", "page"]
    assert main(words) == 130
    assert Path("page/hops.csv").exists() and not Path("page/weight-scale.csv").exists()
    assert "## hops: holds" in Path("page/reproduction.md").read_text()


def test_a_sweep_that_was_cut_short_is_shown_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"task": "copying", "T": 3, "hidden": 8, "batch": 4, "epochs": 2}
    small |= {"updates_per_epoch": 3, "p": 0.0}
    claim = dataclasses.replace(
        BY_NAME["copying-100"], hours=False, measure=training.Sweep("s", small, {"p 0": {}}, (0, 1))
    )
    monkeypatch.setattr(command, "CLAIMS", [claim])
    one, epochs = Trainer._epoch, iter(range(9))

    def stops(self: Trainer) -> object:
        if next(epochs) == 3:
            raise KeyboardInterrupt
        return one(self)

    monkeypatch.setattr(Trainer, "_epoch", stops)
    words = ["reproduce", "--out", "page", "--runs", "runs", "--jobs", "1"]
    assert main(words) == 130
    stored = pd.read_csv("page/copying-100.csv")
    assert len(stored) == 3 and stored.unfinished.all()
    assert "cannot be told here" in Path("page/reproduction.md").read_text()
    assert main(words) == 0
    stored = pd.read_csv("page/copying-100.csv")
    assert len(stored) == 4 and "unfinished" not in stored
    assert main(words) == 0 and next(epochs) == 5


@pytest.mark.parametrize(("more", "expected"), [([], ["short"]), (["--full"], ["long", "short"])])
def test_hours_are_left_out_unless_asked_for(
    more: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def claim(name: str, hours: bool) -> claims.Claim:
        def measure(setup: training.Setup) -> pd.DataFrame:
            measured.append(name)
            return gradients.retained()

        return dataclasses.replace(BY_NAME["retained"], name=name, hours=hours, measure=measure)

    monkeypatch.setattr(command, "CLAIMS", [claim("long", True), claim("short", False)])
    assert main(["reproduce", "--out", "page", *more]) == 0
    assert measured == expected


def test_claims_of_hours() -> None:
    copying = {"copying-100", "copying-100-rates", "copying-100-default"}
    screening = {"screening-copying", "screening-denoise", "normalize"}
    assert {claim.name for claim in CLAIMS if claim.hours} == copying | screening


def screened(**accuracies: list[float]) -> pd.DataFrame:
    """Last rows of runs, by kind: ``m_1`` is "m 1"."""
    return pd.DataFrame(
        {"kind": kind.replace("_", " "), "seed": seed, "validation_accuracy": accuracy}
        for kind, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ).assign(grad_norm_max=1.0, cpu_seconds=60.0, updates=30, stopped="")


@pytest.mark.parametrize(
    ("m_64", "verdict"),
    [
        ([0.9, 0.9, 0.91], "holds"),
        ([0.5, 0.6, 0.55, 0.5], "does not hold here"),
        ([0.8, 0.95, 0.85], "cannot be told here"),  # lower, by less than seeds differ
        ([0.9, 0.9], "cannot be told here"),
    ],
)
def test_chunked_screening_is_judged_by_its_lowest(m_64: list[float], verdict: str) -> None:
    each = [0.91, 0.89, 0.9, 0.92]
    rows = screened(m_1=each, m_16=each, m_32=each, m_64=m_64, full=[1.0])
    found = BY_NAME["screening-denoise"].judge(rows)
    assert found.verdict == verdict
    assert ("m 64" in found.ours) == (verdict == "does not hold here")
    assert found.table is not None and found.table.layer.tolist()[-1] == "full"


@pytest.mark.parametrize("name", ["screening-denoise", "normalize"])
def test_no_claim_counts_a_run_that_goes_on(name: str) -> None:
    values = [0.9] * 3
    rows = screened(**{"m_1": values, "m_16": values, "m_32": values, "m_64": values,
                       "m_1,_normalized": values})  # fmt: skip
    begun = rows.assign(seed=3, updates=1)
    found = BY_NAME[name].judge(pd.concat([rows, begun], ignore_index=True))
    assert found.table is not None and set(found.table.seeds) == {3}


@pytest.mark.parametrize(
    ("name", "base", "kinds"),
    [
        ("normalize", "screening-denoise", ["m 1"]),
        ("copying-100-rates", "copying-100", ["p 0", "p 0.25", "p 0.5"]),
    ],
)
def test_claims_share_runs(name: str, base: str, kinds: list[str]) -> None:
    one, other = BY_NAME[name].measure, BY_NAME[base].measure
    assert isinstance(one, training.Sweep) and isinstance(other, training.Sweep)
    assert one.name == other.name and one.common == other.common and one.seeds == other.seeds
    assert sorted(one.kinds.keys() & other.kinds.keys()) == kinds
    assert all(one.kinds[kind] == other.kinds[kind] for kind in kinds)


def test_kinds_of_the_copying_claims_have_folders_of_their_own() -> None:
    found: dict[str, dict[str, Any]] = {}
    for claim in CLAIMS:
        if claim.name.startswith("copying-100"):
            assert isinstance(claim.measure, training.Sweep)
            for kind, options in claim.measure.kinds.items():
                run = dict(claim.measure.common) | dict(options)
                assert found.setdefault(kind, run) == run
    assert len(found) == 3 * (2 * 3 + 1)


def test_attention_by_number_of_keys() -> None:
    rows = screened(**{"m_1": [0.5] * 4, "m_1,_normalized": [0.8, 0.9, 0.8, 0.7]})
    assert BY_NAME["normalize"].judge(rows).verdict == "holds"


def copied(*runs: tuple[float, int, int, float], stopped: str | None = None) -> pd.DataFrame:
    """Last rows of runs: p, seed, updates, accuracy."""
    names = ["p", "seed", "updates", "validation_accuracy"]
    rows = pd.DataFrame(runs, columns=names)
    falls = rows.assign(validation_accuracy=1.0, updates=1)  # each run begins with a fall to come
    both = pd.concat([falls, rows], ignore_index=True)
    return both.assign(kind=both.p.map("p {:g}".format), cpu_seconds=1.0, stopped=stopped, lr=1e-3,
                       clip=0.0, grad_norm_max=1 / (1 + both.p))  # fmt: skip


SEEDS_0 = [(0.0, seed, 30, 0.9) for seed in range(3)]


@pytest.mark.parametrize(
    ("detached", "copying", "rates"),
    [
        ([0.9, 0.95, 0.9], "holds", "does not hold here"),
        ([0.6, 0.7, 0.6], "does not hold here", "does not hold here"),
        ([0.95, 0.95], "cannot be told here", "cannot be told here"),
    ],
)
def test_p_0_and_p_a_half_want_seeds(detached: list[float], copying: str, rates: str) -> None:
    rows = copied(*SEEDS_0, *((0.5, seed, 30, value) for seed, value in enumerate(detached)))
    assert BY_NAME["copying-100"].judge(rows).verdict == copying
    assert BY_NAME["copying-100-rates"].judge(rows).verdict == rates


def test_fewer_falls_are_steadier() -> None:
    rows = copied(*((0.0, seed, 30, 0.1) for seed in range(3)),
                  *((0.5, seed, 30, 0.9) for seed in range(3)))  # fmt: skip
    found = BY_NAME["copying-100-rates"].judge(rows)
    assert found.verdict == "holds" and "p 0: 1.00 falls" in found.ours


def test_a_run_that_goes_on_counts_for_nothing() -> None:
    rows = copied(*SEEDS_0, *((0.5, seed, 30 - seed, 0.95) for seed in range(3)))
    found = BY_NAME["copying-100"].judge(rows)
    assert found.verdict == "cannot be told here" and "4 runs ended" in found.ours
    assert found.table is not None and found.table["runs that reach 90 %"].tolist() == [3, 1]
    diverged = copied(*SEEDS_0, *((0.5, seed, 30 - seed, 0.95) for seed in range(3)), stopped="nan")
    assert "6 runs ended" in BY_NAME["copying-100"].judge(diverged).ours
