"""The package's entrances, each as a few steps with valid arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import throughtime  # noqa: F401  # defines torch.ops.throughtime

if TYPE_CHECKING:
    from fuzz.program import Spec


@dataclass(frozen=True)
class Call:
    """``result = callee(fixed, **arguments)``; what is not ``ours`` may refuse its arguments."""

    result: str
    callee: str
    arguments: dict[str, str]
    fixed: str = ""
    ours: bool = True


Steps = Iterator["str | Call"]

# Small sizes, and some that fill several vectors, chunks, groups and workers.
SIZES = {
    "T": (1, 2, 3, 5, 9, 40),
    "B": (1, 2, 3, 5, 9, 40),
    "I": (1, 2, 5, 20, 60),
    "H": (2, 3, 5, 16, 17, 40),
    "R": (1, 2, 5),  # outputs of a projection; also heads
    "A": (1, 3, 16, 20),  # attention units
    "D": (1, 3, 8, 20),
    "window": (1, 2, 3, 5, 50),
    "top_k": (0, 1, 2, 5, 50),
    "earlier": (0, 1, 2, 4),
    "layers": (1, 2),
}
OPTIONS = {
    "double": 0.3, "bias": 0.7, "projection": 0.3, "lengths": 0.4, "reset": 0.3, "mask": 0.6,
    "mask_shared": 0.5, "reverse": 0.3, "save": 0.8, "state": 0.6, "memory": 0.5,
    "keep_first": 0.2, "additive": 0.5, "need_input": 0.8, "need_weights": 0.8, "grads": 0.7,
    "train": 0.7, "reference": 0.1, "bidirectional": 0.3, "batch_first": 0.3, "sorted": 0.4,
    "again": 0.4, "no_batch": 0.1,
}  # fmt: skip

_BACKWARD = (
    "grads = [x.sum() for x in torch.utils._pytree.tree_leaves(result) "
    "if isinstance(x, torch.Tensor) and x.requires_grad]"
)
# What may change between two calls.
VARIABLES = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "weight_key", "lengths", "reset",
             "detach_mask", "saved", "last", "output", "query", "key", "lse",
             "result[0]")  # fmt: skip


def steps(spec: Spec) -> Steps:
    """The source of a target's preparations, and its calls."""
    return TARGETS[spec.target](spec)


def _random(spec: Spec, *sizes: int | str) -> str:
    shape = ", ".join(str(spec.sizes.get(str(size), size)) for size in sizes)
    dtype = ", dtype=torch.float64" if spec.options["double"] else ""
    return f"torch.randn({shape}{dtype})"


def _if(wanted: bool, text: str) -> str:
    return text if wanted else "None"


def _raw(name: str, values: dict[str, str], result: str) -> Iterator[str | Call]:
    """An operator with the arguments that its schema asks for."""
    schema = getattr(torch.ops.throughtime, name).default._schema
    names = [argument.name for argument in schema.arguments]
    for argument in names:
        if values[argument].startswith(("torch.", "(")):
            yield f"{argument} = {values[argument]}"
            values[argument] = argument
    yield Call(
        result, f"torch.ops.throughtime.{name}", {argument: values[argument] for argument in names}
    )


def _recurrent(spec: Spec) -> dict[str, str]:
    """What LSTM and RelLSTM share."""
    s, o = spec.sizes, spec.options
    T, B, H = s["T"], s["B"], s["H"]
    mask = f"(torch.rand({T}) < 0.5)" if o["mask_shared"] else f"(torch.rand({T}, {B}) < 0.5)"
    bias = _if(o["bias"], _random(spec, 4 * H))
    return {
        "input": _random(spec, "T", "B", "I"),
        "c_0": _random(spec, "B", "H"),
        "weight_ih": _random(spec, 4 * H, "I"),
        "weight_hh": _random(spec, 4 * H, "H"),
        "bias": bias,
        "bias_ih": bias,
        "bias_hh": bias,
        "lengths": _if(o["lengths"], f"torch.randint(0, {T + 1}, ({B},))"),
        "detach_mask": _if(o["mask"], mask),
        "grad_c_n": _if(o["grads"], _random(spec, "B", "H")),
        "reverse": str(o["reverse"]),
        "save": "True",
        "need_input": str(o["need_input"]),
        "need_weights": str(o["need_weights"]),
    }


def _lstm_values(spec: Spec) -> dict[str, str]:
    s, o = spec.sizes, spec.options
    projected = o["projection"] and s["R"] < s["H"]
    R = s["R"] if projected else s["H"]
    return _recurrent(spec) | {
        "h_0": _random(spec, "B", R),
        "weight_hh": _random(spec, 4 * s["H"], R),
        "weight_hr": _if(projected, _random(spec, R, "H")),
        "reset": _if(o["reset"], f"(torch.rand({s['T']}, {s['B']}) < 0.3)"),
        "grad_output": _if(o["grads"] or o["save"], _random(spec, "T", "B", R)),
        "grad_h_n": _if(o["grads"], _random(spec, "B", R)),
    }


def raw_lstm(spec: Spec) -> Steps:
    """Both operators of the LSTM."""
    values = _lstm_values(spec)
    yield from _raw("lstm_forward", values, "result")
    yield "output, h_n, c_n, saved = result"
    values |= {"output": "output", "saved": "saved"}
    yield from _raw("lstm_backward", values, "gradients")


def _rel_values(spec: Spec) -> dict[str, str]:
    s, o = spec.sizes, spec.options
    retained = min(s["earlier"], s["top_k"])
    prefix = retained + min(s["earlier"], s["window"] - 1)
    memory = o["memory"]
    return _recurrent(spec) | {
        "h_0": _random(spec, "B", "H"),
        "context_0": _random(spec, "B", "H"),
        "memory": _if(memory, _random(spec, prefix, "B", "H")),
        "relevance": _if(memory, _random(spec, prefix, "B")),
        "weight_query": _random(spec, "A", "H"),
        "weight_key": _random(spec, "A", "H"),
        "weight_score": _random(spec, "A"),
        "retained": str(retained if memory else 0),
        "window_size": str(s["window"]),
        "top_k": str(s["top_k"]),
        "keep_first": str(o["keep_first"]),
        "grad_output": _if(o["grads"] or o["save"], _random(spec, "T", "B", "H")),
        "grad_h_n": _if(o["grads"], _random(spec, "B", "H")),
        "grad_context_n": _if(o["grads"], _random(spec, "B", "H")),
    }


def raw_rel_lstm(spec: Spec) -> Steps:
    """Both operators of the RelLSTM."""
    values = _rel_values(spec)
    yield from _raw("rel_lstm_forward", values, "result")
    yield "last, saved = result[4], result[-1]"
    values |= {"last": "last", "saved": "saved"}
    yield from _raw("rel_lstm_backward", values, "gradients")


def _attention_values(spec: Spec) -> dict[str, str]:
    s, o = spec.sizes, spec.options
    retained = min(s["earlier"], s["top_k"]) if o["memory"] else 0
    prefix = retained + min(s["earlier"], s["window"] - 1) if o["memory"] else 0
    return {
        "query": _random(spec, "B", "R", "T", "D"),
        "key": _random(spec, "B", "R", s["T"] + prefix, "D"),
        "value": _random(spec, "B", "R", s["T"] + prefix, "A"),
        "score_weight": _if(o["additive"], _random(spec, "R", "D")),
        "lengths": _if(o["lengths"], f"torch.randint(0, {s['T'] + 1}, ({s['B']},))"),
        "relevance": _if(o["memory"], _random(spec, "B", "R", prefix)),
        "retained": str(retained),
        "window_size": str(s["window"]),
        "top_k": str(s["top_k"]),
        "scale": "0.5",
        "keep_first": str(o["keep_first"]),
        "grad_output": _random(spec, "B", "R", "T", "A"),
    }


def raw_relevancy(spec: Spec) -> Steps:
    """Both operators of relevancy attention."""
    values = _attention_values(spec)
    yield from _raw("relevancy_forward", values, "result")
    yield "output, lse, last = result[:3]"
    values |= {"output": "output", "lse": "lse", "last": "last"}
    yield from _raw("relevancy_backward", values, "gradients")


def _named(values: dict[str, str], names: tuple[str, ...], spec: Spec) -> Iterator[str]:
    """Assignments of the arguments that are tensors; afterwards ``values`` holds their names."""
    for name in names:
        if values[name].startswith(("torch.", "(")):
            wants = spec.options["train"] and "randn" in values[name]
            yield f"{name} = {values[name]}{'.requires_grad_()' if wants else ''}"
            values[name] = name


def _finish() -> Steps:
    yield _BACKWARD
    yield Call("gradients", "torch.autograd.backward", {}, "grads")


_LSTM_ARGUMENTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "detach_mask",
                   "lengths", "reset")  # fmt: skip


def functional_lstm(spec: Spec) -> Steps:
    """One layer in one direction or in both, and backward."""
    values = _lstm_values(spec)
    yield from _named(values, ("input", "h_0", "c_0", *_LSTM_ARGUMENTS), spec)
    backend = "'reference'" if spec.options["reference"] else "'auto'"
    if spec.options["bidirectional"]:
        weights = ", ".join(values[name] for name in _LSTM_ARGUMENTS[:5])
        pair = "torch.stack([{0}, {0}])"
        hx = f"({pair.format('h_0')}, {pair.format('c_0')})"
        arguments = {
            "input": "input",
            "hx": _if(spec.options["state"], hx),
            "weights": f"(({weights}), ({weights}))",
            "detach_mask": "({0}, {0})".format(values["detach_mask"]),
            "lengths": values["lengths"],
            "backend": backend,
        }
        yield Call("result", "functional.bidirectional_lstm", arguments)
    else:
        arguments = {"input": "input", "hx": _if(spec.options["state"], "(h_0, c_0)")}
        arguments |= {name: values[name] for name in _LSTM_ARGUMENTS}
        arguments |= {"reverse": values["reverse"], "backend": backend}
        yield Call("result", "functional.lstm", arguments)
    yield from _finish()


_REL_ARGUMENTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_query", "weight_key",
                  "weight_score", "window_size", "top_k", "detach_mask", "lengths")  # fmt: skip


def functional_rel_lstm(spec: Spec) -> Steps:
    """One layer, then on from its state, and backward."""
    values = _rel_values(spec)
    yield from _named(values, ("input", "h_0", "c_0", *_REL_ARGUMENTS), spec)
    arguments = {"input": "input", "hx": _if(spec.options["state"], "(h_0, c_0)")}
    arguments |= {name: values[name] for name in _REL_ARGUMENTS}
    arguments["retain"] = "'first'" if spec.options["keep_first"] else "'relevant'"
    yield Call("result", "functional.rel_lstm", arguments)
    if spec.options["again"]:
        fields = ("h", "c", "context", "memory", "relevance", "position", "length", "retained")
        yield "state = result[1]"
        yield Call("state", "throughtime.RelState", {name: f"state.{name}" for name in fields})
        yield Call("result", "functional.rel_lstm", {**arguments, "hx": "state"})
    yield from _finish()


def functional_attention(spec: Spec) -> Steps:
    """Attention with or without a cache, and backward."""
    values = _attention_values(spec)
    values["key"], values["value"] = (
        _random(spec, "B", "R", "T", "D"),
        _random(spec, "B", "R", "T", "A"),
    )
    names = ("query", "key", "value", "window_size", "top_k", "score_weight", "lengths")
    yield from _named(values, names, spec)
    again = spec.options["again"]
    if again:
        yield "cache = throughtime.RelevancyCache()"
    arguments = {name: values[name] for name in names} | {
        "score": "'additive'" if spec.options["additive"] else "'dot'",
        "scale": "None" if spec.options["additive"] else "0.5",
        "retain": "'first'" if spec.options["keep_first"] else "'relevant'",
        "cache": "cache" if again else "None",
        "return_retained": str(not again),
    }
    yield Call("result", "functional.relevancy_attention", arguments)
    if again:
        fields = ("key", "value", "relevance", "position", "length", "retained", "options")
        yield Call(
            "cache", "throughtime.RelevancyCache", {name: f"cache.{name}" for name in fields}
        )
        yield Call("result", "functional.relevancy_attention", arguments)
    else:
        yield Call("positions", "functional.retained_positions",
                   {"last": "result[1]", "window_size": values["window_size"],
                    "top_k": values["top_k"]})  # fmt: skip
    yield from _finish()


def _packed(spec: Spec) -> Steps:
    """A PackedSequence, made by hand from a right one's parts."""
    s = spec.sizes
    dtype = ", dtype=torch.float64" if spec.options["double"] else ""
    sort = not spec.options["sorted"]
    yield f"lengths = torch.randint(1, {s['T'] + 1}, ({s['B']},))"
    if not sort:
        yield "lengths = lengths.sort(descending=True)[0]"
    yield (
        f"parts = [torch.randn(n, {s['I']}{dtype}) for n in lengths.tolist()]\n"
        f"packed = torch.nn.utils.rnn.pack_sequence(parts, enforce_sorted={not sort})"
    )
    names = ("data", "batch_sizes", *(("sorted_indices", "unsorted_indices") if sort else ()))
    yield Call("input", "torch.nn.utils.rnn.PackedSequence", {n: f"packed.{n}" for n in names},
               ours=False)  # fmt: skip


def _module(spec: Spec, name: str, options: dict[str, str], packed: bool) -> Steps:
    s, o = spec.sizes, spec.options
    directions = 2 if options.get("bidirectional") == "True" else 1
    dtype = "torch.float64" if o["double"] else "torch.float32"
    yield Call("layer", f"throughtime.{name}", options | {"dtype": dtype})
    shape = (
        ["T", "I"] if o["no_batch"] else ["B", "T", "I"] if o["batch_first"] else ["T", "B", "I"]
    )
    if packed:
        yield from _packed(spec)
    else:
        yield f"input = {_random(spec, *shape)}{'.requires_grad_()' if o['train'] else ''}"
    batch = [] if o["no_batch"] and not packed else ["B"]
    count = s["layers"] * directions
    R = options.get("proj_size", "0")
    states = [_random(spec, count, *batch, R if R != "0" else "H"),
              _random(spec, count, *batch, "H")]  # fmt: skip
    arguments = {"input": "input", "hx": _if(o["state"], f"({', '.join(states)})")}
    if o["mask"] and not packed:
        arguments["detach_mask"] = f"(torch.rand({s['T']}) < 0.5)"
    if o["reset"] and name == "LSTM" and not packed:
        size = f"{s['T']}, {s['B']}" if batch else f"{s['T']}"
        arguments["reset"] = f"(torch.rand({size}) < 0.5)"
    for key in ("detach_mask", "reset"):
        if key in arguments:
            yield f"{key} = {arguments[key]}"
            arguments[key] = key
    yield Call("result", "layer", arguments)
    if o["again"]:
        yield Call("result", "layer", arguments | {"hx": "result[1]"})
    yield from _finish()


def _lstm_options(spec: Spec) -> dict[str, str]:
    s, o = spec.sizes, spec.options
    projected = o["projection"] and s["R"] < s["H"]
    return {
        "input_size": str(s["I"]),
        "hidden_size": str(s["H"]),
        "num_layers": str(s["layers"]),
        "bias": str(o["bias"]),
        "batch_first": str(o["batch_first"]),
        "bidirectional": str(o["bidirectional"]),
        "proj_size": str(s["R"] if projected else 0),
        "detach_prob": "0.5" if o["train"] else "0",
    }


def module_lstm(spec: Spec) -> Steps:
    """The module, on a tensor."""
    return _module(spec, "LSTM", _lstm_options(spec), packed=False)


def module_lstm_packed(spec: Spec) -> Steps:
    """The module, on a PackedSequence."""
    return _module(spec, "LSTM", _lstm_options(spec), packed=True)


def _rel_options(spec: Spec) -> dict[str, str]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "detach_prob")
    values = _lstm_options(spec)
    return {name: values[name] for name in names} | {
        "window_size": str(spec.sizes["window"]),
        "top_k": str(spec.sizes["top_k"]),
        "attention_size": str(spec.sizes["A"]),
    }


def module_rel_lstm(spec: Spec) -> Steps:
    """The module, on a tensor."""
    return _module(spec, "RelLSTM", _rel_options(spec), packed=False)


def module_rel_lstm_packed(spec: Spec) -> Steps:
    """The module, on a PackedSequence."""
    return _module(spec, "RelLSTM", _rel_options(spec), packed=True)


def module_attention(spec: Spec) -> Steps:
    """The module, with a cache."""
    s, o = spec.sizes, spec.options
    dtype = "torch.float64" if o["double"] else "torch.float32"
    options = {
        "embed_dim": str(s["D"] * s["R"]),
        "num_heads": str(s["R"]),
        "window_size": str(s["window"]),
        "top_k": str(s["top_k"]),
        "score": "'additive'" if o["additive"] else "'dot'",
        "dtype": dtype,
    }
    yield Call("layer", "throughtime.RelevancyAttention", options)
    yield f"input = {_random(spec, 'B', 'T', s['D'] * s['R'])}"
    if o["lengths"]:
        yield f"lengths = torch.randint(0, {s['T'] + 1}, ({s['B']},))"
    yield "cache = throughtime.RelevancyCache()"
    arguments = {"input": "input", "lengths": _if(o["lengths"], "lengths"),
                 "cache": _if(o["again"], "cache")}  # fmt: skip
    yield Call("result", "layer", arguments)
    if o["again"]:
        yield Call("result", "layer", arguments)
    yield from _finish()


def raw_gpu(spec: Spec) -> Steps:
    """The operators of GPUs on the CPU, which has no implementation of them, or on meta tensors."""
    values = _lstm_values(spec)
    s, o = spec.sizes, spec.options
    D = "1" if o["reference"] else ""
    front = (D,) if D else ()
    middle = (s["T"], s["B"], *front)
    values |= {
        "projected": _random(spec, *middle, 4 * s["H"]),
        "bias": _if(o["bias"], _random(spec, *front, 4 * s["H"])),
        "h_0": _random(spec, *front, "B", "H"),
        "c_0": _random(spec, *front, "B", "H"),
        "weight_hh": _random(spec, *front, 4 * s["H"], "H"),
        "reset": "None",
        "lengths": "None",
    }
    for name, text in values.items():
        if text.startswith("torch.randn") and o["train"]:
            values[name] = text + ".to('meta')"
    name = "lstm_recurrence_forward" + ("" if D else "_triton")
    yield from _raw(name, values, "result")


TARGETS: dict[str, Callable[[Spec], Steps]] = {
    function.__name__: function
    for function in (
        raw_lstm, raw_rel_lstm, raw_relevancy, raw_gpu, functional_lstm, functional_rel_lstm,
        functional_attention, module_lstm, module_lstm_packed, module_rel_lstm,
        module_rel_lstm_packed, module_attention,
    )
}  # fmt: skip
