"""``gradient_flow`` of gradients whose squares leave the range of their dtype."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import throughtime
from throughtime import LSTM, RelevancyAttention, RelLSTM
from throughtime.diagnostics import GradientFlow

LAYERS: dict[str, Any] = {
    "LSTM": lambda: LSTM(2, 16),
    "reverse": lambda: LSTM(2, 16, bidirectional=True),
    "RelLSTM": lambda: RelLSTM(2, 16, window_size=5, top_k=3),
    "RelevancyAttention": lambda: RelevancyAttention(2, 1, 5, 3, batch_first=True),
}
SCALES = [
    (torch.float32, 1e22), (torch.float32, 1e-25), (torch.float64, 1e180), (torch.float64, 1e-220),
]  # fmt: skip


def layer_of(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = LAYERS[kind]().to(dtype)
    return layer


def recorded(layer: nn.Module, scale: float, steps: int = 30, updates: int = 1) -> GradientFlow:
    weight = next(layer.parameters())
    x = torch.rand(steps, 4, 2, generator=torch.Generator().manual_seed(1)).to(weight)
    with throughtime.gradient_flow(layer) as flow:
        for _ in range(updates):
            output = (
                layer(x.transpose(0, 1))[:, -1]
                if isinstance(layer, RelevancyAttention)
                else (layer(x)[0][[0, -1]])
            )
            (output.sum() * scale).backward()
    return flow


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_factor_of_the_loss_is_one_of_the_numbers(
    kind: str, dtype: torch.dtype, scale: float
) -> None:
    layer = layer_of(kind, dtype)
    plain, flow = recorded(layer, 1.0), recorded(layer, scale)
    near = pytest.approx
    shares = {"cut", "attention", "kappa", "effective", "zeros", "subnormals"}
    for row, wanted in zip(flow.table(), plain.table(), strict=True):
        for name in list(wanted)[4:]:
            factor = 1.0 if name in shares else scale
            # Of rest, a difference, only what is more than rounding.
            least = 1e-5 * scale * wanted["dc_90"] if name.startswith("rest") else 0
            assert row[name] == near(factor * wanted[name], rel=1e-3, abs=least, nan_ok=True), name
    if kind == "RelevancyAttention":
        return
    assert str(flow) == str(plain)
    for found, wanted in zip(flow.horizon(), plain.horizon(), strict=True):
        for name in ("dh", "dc", "decades"):
            assert found[name] == near(wanted[name], rel=1e-4)
    for found, wanted in zip(flow.parameters(), plain.parameters(), strict=True):
        assert found["norm"] == near(scale * wanted["norm"], rel=1e-4, abs=0)
        assert found["cell_share"] == near(wanted["cell_share"], rel=1e-4)
        assert found["cosine"] == near(wanted["cosine"], rel=1e-4)


def test_the_share_of_a_mask() -> None:
    layer = layer_of("LSTM", torch.float32)
    mask = torch.arange(30) % 3 == 0
    x, cuts = torch.rand(30, 4, 2), []
    for scale in (1.0, 1e-25):
        with throughtime.gradient_flow(layer) as flow:
            (layer(x, detach_mask=mask)[0].sum() * scale).backward()
        cuts.append([row["cut"] for row in flow.table()])
    assert cuts[1] == pytest.approx(cuts[0], rel=1e-3) and max(cuts[0]) > 0.1


@pytest.mark.parametrize(("backend_name", "scale"), [("cpu", 1.0), ("reference", 1e-12)])
def test_a_loss_on_the_last_of_150_steps(tmp_path: Path, backend_name: Any, scale: float) -> None:
    """The table, its own zeros, the verdict and the picture say the same."""
    torch.manual_seed(0)
    lstm = LSTM(2, 48, backend=backend_name)
    x = torch.rand(150, 8, 2)
    with throughtime.gradient_flow(lstm) as flow:
        for _ in range(2):
            (lstm(x)[0][-1].sum() * scale).backward()
    found, table = flow.gradients(), flow.table()
    for row in table:
        for name, part in (("dh", found.dh), ("dc", found.dc), ("cell", found.dc_cell)):
            wanted = norms(part[row["step"]]).quantile(0.5).item()
            assert row[name] == pytest.approx(wanted, rel=1e-5, abs=0)
        assert row["dc"] > 0 or row["zeros"] > 0.5
        assert row["dc"] > 1e-38 or row["zeros"] + row["subnormals"] > 0.5
    assert 0 < min(row["dc"] for row in table) < 1e-27 * scale
    (h,) = re.findall(r"the h path falls to 10\^-(\S+) over 149 steps", str(flow))
    assert float(h) == pytest.approx(math.log10(table[-1]["dc"] / table[0]["rest"]), abs=0.1)
    (row,) = flow.horizon()
    grown = math.log10(table[0]["dc"] / table[-1]["dc"])
    assert row["decades"] == pytest.approx(grown / 1.49, rel=1e-9)
    pytest.importorskip("matplotlib")
    flow.plot(tmp_path / "flow.svg")
    ticks = re.findall(r"10\^\{-(\d+)\}", (tmp_path / "flow.svg").read_text())
    assert max(int(tick) for tick in ticks) >= (40 if scale < 1 else 28)


def norms(x: Tensor) -> Tensor:
    return x.double().norm(dim=1)


@pytest.mark.parametrize("direction", [0, 1])
def test_the_cell_path_over_more_steps_than_float32_has(direction: int) -> None:
    """Forget gates of one half: 2^-(T - 1), though 2^-149 is the last number of float32."""
    lstm = LSTM(1, 3, bidirectional=True)
    for weight in lstm.parameters():
        nn.init.zeros_(weight)
    with throughtime.gradient_flow(lstm) as flow:
        output = lstm(torch.zeros(201, 2, 1))[0]
        (output[0, :, 3:] if direction else output[-1, :, :3]).sum().backward()
    call = flow._updates.call(0, direction, 0)
    parts: Any = flow._updates.parts(call)
    wanted = 2.0 ** -torch.arange(201, dtype=torch.float64).unsqueeze(1).expand(201, 2)
    torch.testing.assert_close(parts.transport(), wanted if direction else wanted.flip(0))
