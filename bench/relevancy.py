"""``bench relevancy``: relevancy attention beside full causal attention, over the length T."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from throughtime.bench import arguments, versus
from throughtime.bench.errors import UsageError
from throughtime.bench.gate import Errors, allowed, relative_errors, screening_steps
from torch import Tensor

from throughtime import functional

SDPA_SCORES = 8 * 32768**2  # B * heads * T^2 beyond which a call takes minutes (at this: 26 s)
REFERENCE_STEPS = 1024


@dataclass(frozen=True)
class Case:
    """Sizes: query, key and value are ``[B, heads, T, D]``.

    Example:
        >>> str(Case(T=2048))
        '2048, 2, 4, 64, 64, 64'
    """

    T: int
    B: int = 2
    heads: int = 4
    D: int = 64
    window_size: int = 64
    top_k: int = 64
    score: str = "dot"

    def __str__(self) -> str:
        sizes = (self.T, self.B, self.heads, self.D, self.window_size, self.top_k)
        text = ", ".join(str(size) for size in sizes)
        return text if self.score == "dot" else f"{text}, {self.score}"

    def columns(self) -> dict[str, int | str]:
        """All sizes by name."""
        return asdict(self)

    @property
    def queries(self) -> int:
        """B * heads * T."""
        return self.B * self.heads * self.T


DEFAULT = tuple(Case(T) for T in (512, 1024, 2048, 4096, 8192, 16384))
QUICK = tuple(Case(T) for T in (512, 2048))


class Relevancy:
    """Relevancy attention, and full attention as a peer in speed."""

    name = "relevancy"
    heading = "T, B, heads, D, window, top_k"
    labels: Mapping[str, str] = MappingProxyType({
        "throughtime": "throughtime",
        "sdpa": "full attention (sdpa)",
        "reference": "reference",
    })  # fmt: skip

    def why_not(self, impl: str, case: Case) -> str | None:
        """Full attention is quadratic, the reference a Python loop: large cases take too long."""
        if impl == "sdpa" and case.queries * case.T > SDPA_SCORES:
            return "not measured: its time grows with T^2, one call would take minutes"
        if impl == "reference" and case.T > REFERENCE_STEPS:
            return "not measured: a Python loop over T, one call would take many seconds"
        return None

    def work(
        self, impl: str, case: Case, dtype: torch.dtype, backend: str
    ) -> Callable[[str], object]:
        """The same inputs for every implementation of a case."""
        inputs = _inputs(case, dtype)
        grad = torch.randn(
            case.B, case.heads, case.T, case.D, generator=torch.Generator().manual_seed(4)
        ).to(dtype)

        def iterate(mode: str) -> object:
            if mode == "inference":
                with torch.inference_mode():
                    return _call(impl, case, inputs, backend)[0]
            output = _call(impl, case, inputs, backend)[0]
            if mode == "forward":
                return output
            return torch.autograd.grad(output, inputs, grad)

        return iterate

    def errors(self, impl: str, case: Case, dtype: torch.dtype, backend: str) -> Errors | None:
        """Values, gradients and the choice of keys against the float64 reference, at a shorter T.

        The limit is that of ``gate.check``, with the reference as the plain loop. ``last`` holds
        whole numbers below T, so that one key chosen otherwise is far beyond the limit.
        """
        if impl == "sdpa":
            return None
        steps = screening_steps(case.T, case.window_size, case.top_k)
        small = replace(case, T=steps)
        exact = _results("reference", small, torch.float64, "auto")
        plain = relative_errors(_results("reference", small, dtype, "auto"), exact)
        del plain["last"]
        found = relative_errors(_results(impl, small, dtype, backend), exact)
        return Errors(found, allowed(plain, dtype))

    def memory_arguments(self, case: Case) -> list[str]:
        """The sizes in their order."""
        return [str(value) for value in case.columns().values()]


def _inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and, for the additive score, its weight; leaves that need gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[int, ...]] = [(case.B, case.heads, case.T, case.D)] * 3
    shapes += [(case.heads, case.D)] if case.score == "additive" else []
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    if case.score == "additive":
        made[3] /= case.D**0.5
    return [x.to(dtype).requires_grad_() for x in made]


def _call(
    impl: str, case: Case, inputs: list[Tensor], backend: str
) -> tuple[Tensor, Tensor | None]:
    query, key, value, *weight = inputs
    if impl == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True), None
    output, last = functional.relevancy_attention(  # type: ignore[call-overload]
        query,
        key,
        value,
        case.window_size,
        case.top_k,
        score=case.score,
        score_weight=weight[0] if weight else None,
        return_retained=True,
        backend="reference" if impl == "reference" else backend,
    )
    return output, last


def _results(impl: str, case: Case, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    # float64 holds the same numbers, so that the choice of keys can be compared.
    inputs = [x.detach().to(dtype).requires_grad_() for x in _inputs(case, torch.float32)]
    output, last = _call(impl, case, inputs, backend)
    assert last is not None
    names = ("d query", "d key", "d value", "d score_weight")
    grads = torch.autograd.grad(output.square().sum(), inputs)
    with torch.inference_mode():
        inferred = _call(impl, case, inputs, backend)[0]
    found = {"output": output.detach(), "inference": inferred} | dict(
        zip(names, grads, strict=False)
    )
    return {name: x.double() for name, x in found.items()} | {"last": last.double()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench relevancy``."""
    add = parser.add_argument_group("shapes (all T)").add_argument
    add("--T", type=arguments.positive, nargs="+", help="(512 ... 16384)")
    for name, default in (("B", 2), ("heads", 4), ("D", 64), ("window-size", 64)):
        add(f"--{name}", type=arguments.positive, default=default, help=f"({default})")
    add("--top-k", type=arguments.natural, default=64, help="(64)")
    add("--score", choices=("dot", "additive"), default="dot", help="(dot)")
    versus.add_arguments(parser, Relevancy())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark."""
    if args.score == "additive" and "sdpa" in args.peers:
        raise UsageError("--peers sdpa has no additive score: give --peers without it")
    steps = args.T or [case.T for case in (QUICK if args.quick else DEFAULT)]
    sizes = (args.B, args.heads, args.D, args.window_size, args.top_k, args.score)
    return versus.run(args, Relevancy(), [Case(T, *sizes) for T in steps])


def main(arguments: list[str]) -> None:
    """Measures memory in this process: impl, the sizes of ``memory_arguments``, and the rest."""
    impl, *sizes, score, dtype, backend, threads = arguments
    T, B, heads, D, window_size, top_k = (int(size) for size in sizes)
    case = Case(T, B, heads, D, window_size, top_k, score)
    versus.print_growth(Relevancy(), replace(case, T=8), case, (impl, dtype, backend, threads))


if __name__ == "__main__":
    main(sys.argv[1:])
