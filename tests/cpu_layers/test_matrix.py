"""Tiles and matrices: packing, products and outer products against PyTorch in float64.

"narrow" operands are bfloat16 with float32 sums: the same functions, with one storage type more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

KINDS = pytest.mark.parametrize("kind", ["float32", "float64", "narrow"])


class Kind:
    """The functions and the dtypes of one kind of operand."""

    def __init__(self, layer: Any, kind: str) -> None:
        self.suffix = "_narrow" if kind == "narrow" else ""
        self.operand = torch.bfloat16 if kind == "narrow" else getattr(torch, kind)
        self.sum = torch.float64 if kind == "float64" else torch.float32
        self.layer = layer
        self.lanes = layer.lanes(self.sum)
        of = torch.empty(0, dtype=self.operand)
        self.rows, self.padding, self.depth = (
            layer(name, of) for name in ("product_rows", "row_padding", "depth")
        )

    def call(self, function: str, *arguments: Any) -> None:
        """bfloat16 goes as its bits: the sums choose the function."""
        self.layer(
            function + self.suffix,
            *(
                x.view(torch.int16) if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
                for x in arguments
            ),
        )

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(self.operand)

    def left(self, blocks: int, rows: int, k_count: int) -> Tensor:
        """[blocks, rows, K] as the left operand of a product, between NaN that no product reads."""
        shape = (blocks, up(rows, self.padding), up(k_count, self.depth) + 3)
        a = torch.full(shape, torch.nan, dtype=self.operand)
        a[..., :-3] = 0
        a[:, :rows, :k_count] = self.randn(blocks, rows, k_count)
        return a

    def panels(self, weight: Tensor, vectors: int, width: int) -> Tensor:
        """[K, columns] in panels of ``width`` vectors of columns.

        Each is K-major in pieces of ``depth``, of which one vector of columns is contiguous: two k
        lie side by side there if the operand is one of pairs.
        """
        depth, pair = self.depth, 2 if self.operand == torch.bfloat16 else 1
        k_count, columns = weight.shape
        more = (0, vectors * self.lanes - columns, 0, up(k_count, depth) - k_count)
        whole = torch.nn.functional.pad(weight, more)
        return torch.cat([
            x.reshape(-1, depth // pair, pair, x.size(1) // self.lanes, self.lanes)
            .permute(0, 3, 1, 4, 2).reshape(-1)
            for x in whole.split(width * self.lanes, 1)
        ])  # fmt: skip


def up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@KINDS
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_packing(layer: Any, kind: str, transposed: bool, width: int) -> None:
    of = Kind(layer, kind)
    for rows, columns in ((1, 1), (5, 70), (33, 16), (70, 9)):
        weight = of.randn(rows, columns)
        matrix = weight.t() if transposed else weight
        wanted = of.panels(matrix, up(matrix.size(1), of.lanes) // of.lanes, width)
        found = torch.full((len(wanted) + 1,), 7.0, dtype=of.operand)
        of.call("pack", weight.to(of.sum), rows, columns, int(transposed), width, found)
        assert torch.equal(found, torch.cat([wanted, found.new_tensor([7.0])]))


def assert_sum(found: Tensor, parts: list[Tensor]) -> None:
    """found is the sum of the parts, within the roundings of a sum of such sizes."""
    size = sum(part.abs() for part in parts)
    assert ((found - sum(parts)).abs() <= 4 * torch.finfo(found.dtype).eps * size).all()


def terms(a: Tensor, b: Tensor) -> list[Tensor]:
    """a @ b in float64 as its positive and its negative terms."""
    whole, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return [(whole + sizes) / 2, (whole - sizes) / 2]


@KINDS
@pytest.mark.parametrize(("vectors", "width"), [(1, 4), (2, 2), (3, 4), (7, 4), (5, 1)])
def test_products(layer: Any, kind: str, vectors: int, width: int) -> None:
    of = Kind(layer, kind)
    columns = vectors * of.lanes
    for rows in {1, 2, 15, 17, *range(3, 2 * of.rows + 2, 1 + of.rows // 4)}:
        for k_count, blocks in ((1, 1), (2 * of.depth, 3), (320, 2), (300, 1)):
            a, weight = of.left(blocks, rows, k_count), of.randn(blocks * k_count, columns)
            bias = torch.randn(columns).to(of.sum)
            before = torch.randn(rows, columns + 1).to(of.sum)
            packed = of.panels(weight, vectors, width)
            whole = terms(a[:, :rows, :k_count].transpose(0, 1).reshape(rows, -1), weight)
            addend = torch.randn_like(before)
            for begun, row, other in ((1, None, None), (0, bias, None), (0, None, addend)):
                found = before.clone()
                numbers = (rows, k_count, blocks, packed, vectors, width, begun)
                of.call("product", a, *numbers, row, other, found)
                added = bias.expand(rows, -1) if other is None else other[:, :-1]
                assert_sum(found[:, :-1], [*whole, before[:, :-1] if begun else added])
                assert torch.equal(found[:, -1], before[:, -1])


@KINDS
def test_no_product_reads_past_the_rows_of_its_left_operand(layer: Any, kind: str) -> None:
    of = Kind(layer, kind)
    for rows in (*range(1, 101), 113, 160, 170):
        past = layer("reads_past_the_rows", torch.empty(0, dtype=of.operand), rows, 3 * of.depth)
        assert past == 0, rows


@KINDS
def test_bits_do_not_depend_on_the_tile(layer: Any, kind: str) -> None:
    """A row has one result, however many rows and panels a product has."""
    of = Kind(layer, kind)
    vectors, k_count = 7, 300
    columns = vectors * of.lanes
    a, weight = of.left(1, 40, k_count), of.randn(k_count, columns)
    bias = torch.randn(columns).to(of.sum)
    found = {}
    for width in (1, 2, 4):
        packed = of.panels(weight, vectors, width)
        for rows in (1, 2, 5, 13, 40):
            out = torch.zeros(rows, columns + 1, dtype=of.sum)
            of.call("product", a, rows, k_count, 1, packed, vectors, width, 0, bias, None, out)
            found[width, rows] = out
    assert all(torch.equal(x, found[4, 40][: len(x)]) for x in found.values())


@pytest.mark.parametrize("size", [1, 1e-34, 1e-37, 1e-39, 1e36, torch.inf, torch.nan], ids=str)
def test_the_stand_in_has_the_bits_of_amx(layer: Any, stand_in: Any, size: float) -> None:
    """Also where products or operands are subnormal, which is zero, or overflow, and of NaN."""
    if layer.isa != "amx":
        pytest.skip("this processor has no AMX, or this is another instruction set's turn")
    of = Kind(layer, "narrow")
    for rows, k_count, vectors in ((1, 1, 1), (16, 32, 2), (17, 70, 3), (32, 300, 7)):
        a, weight = of.left(1, rows, k_count), of.randn(k_count, vectors * of.lanes)
        if 0 < size < torch.inf:
            a[..., :k_count] *= size
        else:
            a[0, rows // 2, k_count // 2] = size
        numbers = (a, rows, k_count, 1, of.panels(weight, vectors, 4), vectors, 4, 1, None, None)
        before = torch.randn(rows, vectors * of.lanes + 1) * (size if size < 1 else 1)
        one, other = before.clone(), before.clone()
        of.call("product", *numbers, one)
        Kind(stand_in, "narrow").call("product", *numbers, other)
        assert torch.equal(bits(one), bits(other))
        assert layer("tiles_in_use") == 0, "torch's own kernels may need the unit next"


def bits(numbers: Tensor) -> Tensor:
    """One of all NaN."""
    return numbers.nan_to_num(torch.nan, torch.inf, -torch.inf).view(torch.int32)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_outer_products(layer: Any, kind: str) -> None:
    of = Kind(layer, kind)
    for n, vectors, rows in ((1, 1, 0), (1, 1, 1), (8, 3, 40), (13, 6, 600)):
        a, b = of.randn(max(rows, 1), n), of.randn(max(rows, 1), vectors * of.lanes)
        before = torch.randn(n, vectors * of.lanes).to(of.sum)
        found = before.clone()
        of.call("outer_products", a, n, b, vectors, rows, found)
        assert_sum(found, [*terms(a[:rows].t(), b[:rows]), before])
