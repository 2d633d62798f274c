"""``bench rl``: recurrent reinforcement learning, training on rows of episodes and rollouts.

- ``rows``: forward and backward of ``[B, T]`` rows in which episodes start (TorchRL's case).
- ``ppo``: a PPO loss over ``[T, B]``, as a loop over steps and in one call.
- ``rollout``: one step without a gradient.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import throughtime
from bench import arguments, machine, table
from bench.arguments import UsageError
from bench.measure import gpu
from bench.measure.timing import Plan, Timer, alternate
from bench.operations.operation import DEVICES

COLUMNS = [
    "part", "T", "B", "H", "resets", "impl", "median_ms", "ratio", "error", "note", "threads",
    "machine", "torch", "command",
]  # fmt: skip
OURS = "throughtime"
WRONG = "nn.LSTM, resets ignored"
TOLERANCE = 1e-4  # relative, of results of the same function in float32
ROWS = tuple((128, 128, 256, resets) for resets in (0.0, 0.03, 0.2))
QUICK_ROWS = ((32, 16, 64, 0.03),)
LOSSES = ((128, 2, 128, 0.02), (128, 8, 128, 0.02), (128, 64, 256, 0.02))
QUICK_LOSSES = ((16, 8, 64, 0.02),)
STEPS = tuple((1, B, H, 0.0) for H in (64, 128, 256, 512) for B in (1, 8, 16, 64, 128, 512))
QUICK_STEPS = ((1, 1, 64, 0.0), (1, 8, 128, 0.0))
Sizes = tuple[int, int, int, float]
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contest:
    """Implementations of one thing; the first is ours, and all but ``wrong`` compute the same."""

    part: str
    sizes: Sizes
    runs: Mapping[str, Callable[[], Results]]
    wrong: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


def loop(lstm: nn.RNNBase, x: Tensor, done: Tensor) -> Tensor:
    """``x [T, B, I]`` step by step, the state times 1 - ``done [T, B]``: what programs do."""
    state = tuple(x.new_zeros(1, x.size(1), lstm.hidden_size) for _ in range(2))
    outputs = []
    for x_t, done_t in zip(x, done, strict=True):
        keep = (1 - done_t).view(1, -1, 1)
        output, state = lstm(x_t.unsqueeze(0), (keep * state[0], keep * state[1]))
        outputs.append(output)
    return torch.cat(outputs)


def layers(H: int, device: str) -> tuple[throughtime.LSTM, nn.LSTM]:
    torch.manual_seed(0)
    ours = throughtime.LSTM(H, H).to(device)
    return ours, ours.to_torch()


def data(sizes: Sizes, device: str) -> tuple[Tensor, Tensor]:
    """Input ``[T, B, H]`` and float marks of starts ``[T, B]``."""
    T, B, H, resets = sizes
    generator = torch.Generator().manual_seed(1)
    x, drawn = torch.randn(T, B, H, generator=generator), torch.rand(T, B, generator=generator)
    return x.to(device), (drawn < resets).float().to(device)


def rows(sizes: Sizes, device: str) -> Contest:
    ours, theirs = layers(sizes[2], device)
    x, done = data(sizes, device)
    done[0] = 0.0
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(device)

    def trained(layer: nn.Module, run: Callable[[], Tensor]) -> Callable[[], Results]:
        def call() -> Results:
            output = run()
            return output, *torch.autograd.grad(output, list(layer.parameters()), grad)

        return call

    runs = {
        OURS: trained(ours, lambda: ours(x, reset=done)[0]),
        "loop over nn.LSTM": trained(theirs, lambda: loop(theirs, x, done)),
        WRONG: trained(theirs, lambda: theirs(x)[0]),
    }
    missing = {}
    for name, make in TORCHRL.items():
        if name == TRITON and device == "cpu":
            missing[name] = "needs a GPU"
            continue
        try:
            module = make(in_key="x", out_key="y", input_size=sizes[2], hidden_size=sizes[2])
        except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
            missing[name] = str(error)
            continue
        module.to(device)
        module.lstm.load_state_dict(ours.state_dict())
        runs[name] = trained(module, _torchrl_run(module, x, done))
    return Contest("rows", sizes, runs, (WRONG,) if done.any() else (), missing)


def _torchrl(module: str, **options: Any) -> Callable[..., Any]:
    """What makes an ``LSTMModule``, of TorchRL or ours."""
    return lambda **sizes: importlib.import_module(module).LSTMModule(**sizes, **options)


TRITON = "TorchRL, Triton"
TORCHRL = {
    f"{OURS}'s LSTMModule": _torchrl("throughtime.integrations.torchrl"),
    "TorchRL, pad": _torchrl("torchrl.modules", recurrent_backend="pad"),
    "TorchRL, scan": _torchrl("torchrl.modules", recurrent_backend="scan"),
    # Three TF32 products, as ours: one alone, its default, is no float32.
    TRITON: _torchrl(
        "torchrl.modules", recurrent_backend="triton", recurrent_matmul_precision="tf32x3"
    ),
}


def _torchrl_run(module: nn.Module, x: Tensor, done: Tensor) -> Callable[[], Tensor]:
    from tensordict import TensorDict
    from torchrl.modules import set_recurrent_mode

    by_row = {"x": x.transpose(0, 1).contiguous(), "is_init": done.t().bool().unsqueeze(-1)}
    given = TensorDict(by_row, by_row["x"].shape[:2])

    def run() -> Tensor:
        with set_recurrent_mode(True):
            output: Tensor = module(given.copy())["y"]
        return output.transpose(0, 1)

    return run


class Agent(nn.Module):
    """Encoder, memory, policy and value, as CleanRL has them."""

    def __init__(self, lstm: nn.RNNBase, one_call: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        H = lstm.hidden_size
        self.lstm, self.one_call = lstm, one_call
        self.encoder, self.policy, self.value = nn.Linear(H, H), nn.Linear(H, 4), nn.Linear(H, 1)

    def loss(self, x: Tensor, done: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
        encoded = self.encoder(x).tanh()
        if self.one_call:
            features, _ = self.lstm(encoded, reset=done)
        else:
            features = loop(self.lstm, encoded, done)
        log_p = self.policy(features).log_softmax(-1)
        ratio = (log_p.gather(-1, action.unsqueeze(-1)).squeeze(-1) + 1.4).exp()
        clipped = torch.min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).mean()
        errors = (self.value(features).squeeze(-1) - advantage).square().mean()
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        loss: Tensor = 0.5 * errors - clipped - 0.01 * entropy
        return loss


def ppo(sizes: Sizes, device: str) -> Contest:
    T, B, H, _ = sizes
    x, done = data(sizes, device)
    generator = torch.Generator().manual_seed(2)
    action = torch.randint(0, 4, (T, B), generator=generator).to(device)
    advantage = torch.randn(T, B, generator=generator).to(device)

    def trained(agent: Agent) -> Callable[[], Results]:
        def call() -> Results:
            loss = agent.loss(x, done, action, advantage)
            return loss, *torch.autograd.grad(loss, list(agent.parameters()))

        return call

    ours, theirs = layers(H, device)
    agents = {
        f"{OURS}, one call": Agent(ours, True).to(device),
        f"{OURS}, loop": Agent(ours, False).to(device),
        "nn.LSTM, loop": Agent(theirs, False).to(device),
    }
    return Contest("ppo", sizes, {name: trained(agent) for name, agent in agents.items()})


def rollout(sizes: Sizes, device: str) -> Contest:
    _, B, H, _ = sizes
    ours, theirs = layers(H, device)
    cells = throughtime.LSTMCell(H, H).to(device), nn.LSTMCell(H, H).to(device)
    for cell in cells:
        weights = {name.removesuffix("_l0"): w for name, w in ours.state_dict().items()}
        cell.load_state_dict(weights)
    x, h, c = torch.randn(3, B, H, generator=torch.Generator().manual_seed(1)).to(device)
    whole, state = x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0))

    def stepped(module: nn.Module) -> Callable[[], Results]:
        @torch.no_grad()
        def call() -> Results:
            if isinstance(module, nn.RNNBase):
                _, (h_n, c_n) = module(whole, state)
                return h_n[0], c_n[0]
            found: Results = module(x, (h, c))
            return found

        return call

    modules: dict[str, nn.Module] = {f"{OURS}.LSTMCell": cells[0], "nn.LSTMCell": cells[1]}
    modules |= {f"{OURS}.LSTM": ours, "nn.LSTM": theirs}
    return Contest("rollout", sizes, {name: stepped(one) for name, one in modules.items()})


PARTS: Mapping[str, Callable[[Sizes, str], Contest]] = {
    "rows": rows,
    "ppo": ppo,
    "rollout": rollout,
}
SIZES = {"rows": ROWS, "ppo": LOSSES, "rollout": STEPS}
QUICK = {"rows": QUICK_ROWS, "ppo": QUICK_LOSSES, "rollout": QUICK_STEPS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    add = parser.add_argument
    add("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="(all)")
    add("--device", choices=DEVICES, default="cpu", help="(%(default)s)")
    add("--quick", action="store_true", help="small shapes, in seconds")
    add("--repeats", type=arguments.positive, help="rounds (at least 5 and 0.5 s of each)")
    arguments.add_threads(parser)
    arguments.add_files(parser, plot=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print and write the table; 1 if something ours computed is wrong."""
    timer = None
    if args.device == "cuda":
        if why := gpu.why_not():
            raise UsageError(f"--device cuda: {why}")
        timer = gpu.EventTimer()
        torch.backends.cudnn.allow_tf32 = False  # as that of products is
    torch.set_num_threads(args.threads)
    print("\n".join(machine.header(args.device)), flush=True)
    plan = Plan() if args.repeats is None else Plan(args.repeats, 0)
    plan = Plan(3, 0.05) if args.quick else plan
    found = pd.DataFrame(
        [
            row
            for part in args.parts
            for sizes in (QUICK if args.quick else SIZES)[part]
            for row in measured(PARTS[part](sizes, args.device), plan, args.device, timer)
        ],
        columns=COLUMNS,
    )
    print(f"\n{report(found)}")
    if args.csv is not None:
        found.to_csv(args.csv, index=False, float_format="%.6g")
    return int((found["note"] == "wrong").any())


def measured(
    contest: Contest, plan: Plan, device: str, timer: Timer | None
) -> Iterator[dict[str, Any]]:
    """A row for each implementation; what is wrong gets no time."""
    names = list(contest.runs)
    due = contest.runs[names[1]]()  # a peer's
    T, B, H, resets = contest.sizes
    shared = {"part": contest.part, "T": T, "B": B, "H": H, "resets": resets}
    errors, notes = {}, {}
    for name, call in contest.runs.items():
        errors[name] = max(_error(x.detach(), y.detach()) for x, y in zip(call(), due, strict=True))
        if name in contest.wrong:
            notes[name] = "computes something else: a bound"
        elif errors[name] > TOLERANCE:
            notes[name] = "wrong"
    right: dict[Hashable, Callable[[], object]] = {
        name: call for name, call in contest.runs.items() if notes.get(name) != "wrong"
    }
    seconds = alternate(right, plan, timer)
    for name in names:
        row: dict[str, Any] = {"impl": name, "error": errors[name], "note": notes.get(name, "")}
        if name in right:
            row["median_ms"] = seconds[name].median() * 1e3
            if names[0] in right:
                row["ratio"] = (seconds[name] / seconds[names[0]]).median()
        yield shared | row | machine.columns(device)
    for name, why in contest.missing.items():
        yield shared | {"impl": name, "note": why} | machine.columns(device)


def _error(found: Tensor, due: Tensor) -> float:
    scale = float(due.abs().max()) or 1.0
    return float((found - due).abs().max()) / scale


def report(found: pd.DataFrame) -> str:
    """A Markdown table; ratio is the time of a row divided by ours."""
    lines = []
    for row in found.itertuples():
        shape = f"{row.T}, {row.B}, {row.H}"
        numbers = ["" if pd.isna(x) else table.digits(x) for x in (row.median_ms, row.ratio)]
        lines.append([row.part, shape, f"{row.resets:.0%}", row.impl, *numbers, row.note])
    return table.markdown(lines, ["part", "T, B, H", "resets", "", "ms", "/ ours", "note"])
