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

    def vectors(self, columns: int) -> int:
        return -(-columns // self.lanes)


def panels_of(weight: Tensor, vectors: int, width: int, lanes: int) -> Tensor:
    """[K, columns] in panels of ``width`` vectors of columns, each K-major."""
    whole = torch.nn.functional.pad(weight, (0, vectors * lanes - weight.size(1)))
    return torch.cat([x.reshape(-1) for x in whole.split(width * lanes, 1)])


@KINDS
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_packing(layer: Any, kind: str, transposed: bool, width: int) -> None:
    of = Kind(layer, kind)
    for rows, columns in ((1, 1), (5, 70), (33, 16), (70, 9)):
        weight = of.randn(rows, columns)
        matrix = weight.t() if transposed else weight
        vectors = of.vectors(matrix.size(1))
        wanted = panels_of(matrix, vectors, width, of.lanes)
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
    most_rows = layer("register_rows", torch.empty(0, dtype=of.sum))
    for rows in range(1, 2 * most_rows + 2):
        for k_count, blocks in ((1, 1), (6, 3), (300, 2)):
            a, weight = of.randn(blocks, rows, k_count + 3), of.randn(blocks * k_count, columns)
            bias = torch.randn(columns).to(of.sum)
            before = torch.randn(rows, columns + 1).to(of.sum)
            packed = panels_of(weight, vectors, width, of.lanes)
            whole = terms(a[..., :k_count].transpose(0, 1).reshape(rows, -1), weight)
            for begun in (0, 1):
                found = before.clone()
                numbers = (rows, k_count, blocks, packed, vectors, width, begun)
                of.call("product", a, *numbers, bias, found)
                assert_sum(found[:, :-1], [*whole, bias.expand(rows, -1), begun * before[:, :-1]])
                assert torch.equal(found[:, -1], before[:, -1])


@KINDS
def test_bits_do_not_depend_on_the_tile(layer: Any, kind: str) -> None:
    """A row has one result, however many rows and panels a product has."""
    of = Kind(layer, kind)
    vectors, k_count = 7, 300
    columns = vectors * of.lanes
    a, weight = of.randn(1, 13, k_count + 3), of.randn(k_count, columns)
    bias = torch.randn(columns).to(of.sum)
    found = {}
    for width in (1, 2, 4):
        packed = panels_of(weight, vectors, width, of.lanes)
        for rows in (1, 2, 5, 13):
            out = torch.zeros(rows, columns + 1, dtype=of.sum)
            of.call("product", a, rows, k_count, 1, packed, vectors, width, 0, bias, out)
            found[width, rows] = out
    assert all(torch.equal(x, found[4, 13][: len(x)]) for x in found.values())


@KINDS
def test_outer_products(layer: Any, kind: str) -> None:
    of = Kind(layer, kind)
    for n, vectors, rows in ((1, 1, 0), (1, 1, 1), (8, 3, 40), (13, 6, 600)):
        a, b = of.randn(max(rows, 1), n), of.randn(max(rows, 1), vectors * of.lanes)
        before = torch.randn(n, vectors * of.lanes).to(of.sum)
        found = before.clone()
        of.call("outer_products", a, n, b, vectors, rows, found)
        assert_sum(found, [*terms(a[:rows].t(), b[:rows]), before])
