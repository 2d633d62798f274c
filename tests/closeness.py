"""The one table of tolerances, by dtype, and the rules beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Relative to the largest entry of the expected tensor: rounding of a sum over T steps and H units
# is proportional to its terms, not to its (perhaps cancelled) result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def assert_close(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Assert equal shape and dtype, and values within the tolerance of the dtype of ``actual``."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    if not actual.numel():
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = _relative_error(actual, expected)
    tolerance = TOLERANCE[actual.dtype]
    assert error <= tolerance, f"{name}: relative error {error:.2e}, tolerance {tolerance:.0e}"


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """``assert_close`` for every named tensor."""
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], name)


def assert_as_accurate(
    actual: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Assert relative errors within twice plain PyTorch's worst one and 32 roundings.

    The benchmark's rule, for gradients that are differences of nearly equal terms. Those of
    attention scores sum to zero over the keys, so rounding is proportional to more than the result.
    """
    assert list(actual) == list(plain) == list(exact)
    worst = max(_relative_error(plain[name], wanted) for name, wanted in exact.items())
    for name, wanted in exact.items():
        assert torch.isfinite(actual[name]).all(), f"{name}: not finite"
        error, allowed = _relative_error(actual[name], wanted), TOLERANCE[actual[name].dtype]
        allowed = max(allowed, 2 * worst + 32 * torch.finfo(actual[name].dtype).eps)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.1e}"


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape, f"{actual.shape} is not {exact.shape}"
    if not actual.numel():
        return 0.0
    scale = max(1e-3, exact.abs().max().item())
    return (actual.double() - exact.double()).abs().max().item() / scale


def rms(actual: Tensor, exact: Tensor) -> float:
    """Root mean square error, relative to the root mean square of ``exact``."""
    size = exact.square().mean().sqrt().item()
    return (actual.double() - exact).square().mean().sqrt().item() / (size or 1.0)


def assert_rule(
    actual: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Assert a root mean square error of at most twice plain PyTorch's, or of one rounding."""
    assert list(actual) == list(plain) == list(exact)
    for name, wanted in exact.items():
        assert actual[name].dtype == plain[name].dtype, name
        error, allowed = rms(actual[name], wanted), 2 * rms(plain[name], wanted)
        allowed = max(allowed, torch.finfo(actual[name].dtype).eps)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
