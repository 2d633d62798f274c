"""``bench rel-lstm``: one RelLSTM layer beside its authors' loop and beside nn.LSTM."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

import torch
from throughtime.bench import arguments, versus
from throughtime.bench.gate import Errors, allowed, relative_errors, screening_steps
from throughtime.bench.loop_rel_lstm import LoopRelLSTM
from torch import Tensor, nn

import throughtime

LOOP_ROWS = 20_000  # B * T beyond which a call of a Python loop takes many seconds


@dataclass(frozen=True)
class Case:
    """Sizes: input ``[T, B, I]``, H units, attention of size H.

    Example:
        >>> str(Case(320, 10, 10))
        '320, 10, 10, 128, 10, 15'
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int = 128
    window_size: int = 10
    top_k: int = 15

    def __str__(self) -> str:
        return ", ".join(str(size) for size in asdict(self).values())

    def columns(self) -> dict[str, int | str]:
        """All sizes by name, and the score."""
        return {**asdict(self), "score": "additive"}

    @property
    def queries(self) -> int:
        """B * T."""
        return self.B * self.T


# Copying with T = 300 and 100 (one-hot), pixel by pixel MNIST.
DEFAULT = (Case(320, 10, 10), Case(120, 64, 10), Case(784, 100, 1))
QUICK = (Case(120, 10, 10),)


class RelLstm:
    """One RelLSTM layer; nn.LSTM of the same size as a peer in speed."""

    name = "rel-lstm"
    heading = "T, B, I, H, window, top_k"
    labels: Mapping[str, str] = MappingProxyType({
        "throughtime": "throughtime",
        "loop": "authors' loop",
        "torch": "nn.LSTM",
        "reference": "reference",
    })  # fmt: skip

    def why_not(self, impl: str, case: Case) -> str | None:
        """The Python loops take long."""
        if impl in ("loop", "reference") and case.queries > LOOP_ROWS:
            return "not measured: a Python loop, one call would take many seconds"
        return None

    def work(
        self, impl: str, case: Case, dtype: torch.dtype, backend: str
    ) -> Callable[[str], object]:
        """The same weights and inputs for every implementation of a case."""
        layer = _layer(impl, case, backend).to(dtype)
        x, grad = (
            torch.randn(case.T, case.B, size, generator=torch.Generator().manual_seed(seed)).to(
                dtype
            )
            for seed, size in ((2, case.I), (3, case.H))
        )
        parameters = list(layer.parameters())

        def iterate(mode: str) -> object:
            if mode == "inference":
                with torch.inference_mode():
                    return layer(x)[0]
            output = layer(x)[0]
            if mode == "forward":
                return output
            return torch.autograd.grad(output, parameters, grad)

        return iterate

    def errors(self, impl: str, case: Case, dtype: torch.dtype, backend: str) -> Errors | None:
        """Output, inference and gradients against the float64 reference, at a shorter T.

        The limit is that of ``gate.check``, with the reference as the plain loop.
        """
        if impl == "torch":
            return None
        steps = screening_steps(case.T, case.window_size, case.top_k)
        small = replace(case, T=steps)
        exact = _results("reference", small, torch.float64, "auto")
        plain = relative_errors(_results("reference", small, dtype, "auto"), exact)
        found = relative_errors(_results(impl, small, dtype, backend), exact)
        return Errors(found, allowed(plain, dtype))

    def memory_arguments(self, case: Case) -> list[str]:
        """The sizes in their order."""
        return [str(size) for size in asdict(case).values()]


def _layer(impl: str, case: Case, backend: str) -> nn.Module:
    torch.manual_seed(0)
    if impl == "torch":
        return nn.LSTM(case.I, case.H)
    kind = LoopRelLSTM if impl == "loop" else throughtime.RelLSTM
    return kind(
        case.I,
        case.H,
        window_size=case.window_size,
        top_k=case.top_k,
        backend="reference" if impl == "reference" else backend,  # type: ignore[arg-type]
    )


def _results(impl: str, case: Case, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    layer = _layer(impl, case, backend).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(case.T, case.B, case.I, generator=generator).to(dtype).requires_grad_()
    output = layer(x)[0]
    named = {"input": x} | dict(layer.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), list(named.values()))
    with torch.inference_mode():
        inferred = layer(x)[0]
    found = {"output": output.detach(), "inference": inferred}
    found |= {f"d {name}": grad for name, grad in zip(named, grads, strict=True)}
    return {name: x.double() for name, x in found.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench rel-lstm``."""
    add = parser.add_argument_group("shapes (all T and B)").add_argument
    add("--T", type=arguments.positive, nargs="+", help="steps")
    add("--B", type=arguments.positive, nargs="+", help="batch (10)")
    add("--I", type=arguments.positive, help="features per step (10; 1 for the default T 784)")
    add("--H", type=arguments.positive, help="units (128)")
    add("--window-size", type=arguments.positive, help="(10)")
    add("--top-k", type=arguments.natural, help="(15)")
    versus.add_arguments(parser, RelLstm())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark."""
    chosen: tuple[Case, ...] = QUICK if args.quick else DEFAULT
    if args.T or args.B:
        chosen = tuple(Case(T, B, 10) for T in args.T or [320] for B in args.B or [10])
    sizes = {name: getattr(args, name) for name in ("I", "H", "window_size", "top_k")}
    given = {name: size for name, size in sizes.items() if size is not None}
    return versus.run(args, RelLstm(), [replace(case, **given) for case in chosen])


def main(arguments: list[str]) -> None:
    """Measures memory in this process: impl, the sizes of ``memory_arguments``, and the rest."""
    impl, *sizes, dtype, backend, threads = arguments
    case = Case(*(int(size) for size in sizes))
    versus.print_growth(RelLstm(), replace(case, T=3), case, (impl, dtype, backend, threads))


if __name__ == "__main__":
    main(sys.argv[1:])
