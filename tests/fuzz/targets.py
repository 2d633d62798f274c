"""The package's entrances, each as a few steps with valid arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import throughtime
from throughtime import functional


@dataclass
class Call:
    """``result = callee(fixed, **arguments)``; what is not ``ours`` may refuse its arguments."""

    result: str
    callee: str
    arguments: dict[str, str]
    fixed: str = ""
    ours: bool = True

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.result} = {self.callee}({self.fixed}{given})"


Sizes = dict[str, int]
Options = dict[str, bool]
Steps = Iterator["str | Call"]
Target = Callable[[Sizes, Options], Steps]

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
    "every": (1, 2, 5, 50),
    "layers": (1, 2),
    "group": (1, 1, 2, 3),  # heads of queries for one of keys
}
OPTIONS = {
    "double": 0.3, "bias": 0.7, "projection": 0.3, "lengths": 0.4, "reset": 0.3, "mask": 0.6,
    "mask_shared": 0.5, "reverse": 0.3, "state": 0.6, "memory": 0.5, "keep_first": 0.2,
    "additive": 0.5, "anew": 0.5, "need_input": 0.8, "need_weights": 0.8, "need_reset": 0.8,
    "grads": 0.7, "train": 0.7, "given": 0.3, "normalize": 0.2,
    "reference": 0.1, "bidirectional": 0.3, "batch_first": 0.3, "sorted": 0.4, "again": 0.4,
    "no_batch": 0.1, "recompute": 0.3, "return_cells": 0.3, "packed": 0.2,
}  # fmt: skip


def _random(o: Options, *shape: int) -> str:
    sizes = ", ".join(map(str, shape))
    return f"torch.randn({sizes}{', dtype=torch.float64' if o['double'] else ''})"


def _if(wanted: bool, text: str) -> str:
    return text if wanted else "None"


def _common(s: Sizes, o: Options) -> dict[str, str]:
    """Arguments that stand in several signatures, by name."""
    T, B, H = s["T"], s["B"], s["H"]
    retained = min(s["earlier"], s["top_k"]) if o["memory"] else 0
    bias = _if(o["bias"], _random(o, 4 * H))
    mask = f"(torch.rand({T}{'' if o['mask_shared'] else f', {B}'}) < 0.5)"
    names = ("window_size", "top_k", "num_layers", "input_size", "hidden_size", "attention_size",
             "screen_every")  # fmt: skip
    sizes = ("window", "top_k", "layers", "I", "H", "A", "every")
    flags = (
        "reverse", "recompute", "need_input", "need_weights", "need_reset", "keep_first",
        "bidirectional", "batch_first", "normalize", "return_cells",
    )  # fmt: skip
    return {
        **{name: str(s[size]) for name, size in zip(names, sizes, strict=True)},
        **{name: str(o[name]) for name in flags},
        "bias": str(o["bias"]), "bias_ih": bias, "bias_hh": bias, "save": "True",
        "lengths": _if(o["lengths"], f"torch.randint(0, {T + 1}, ({B},))"),
        "detach_mask": _if(o["mask"], mask),
        "reset": _if(o["reset"], f"(torch.rand({T}, {B}) < 0.3)"),
        "retained": str(retained),
        "detach_prob": "0.5" if o["train"] else "0",
        "retain": "'first'" if o["keep_first"] else "'relevant'",
        "score": "'additive'" if o["additive"] else "'dot'",
        "backend": "'reference'" if o["reference"] else "'auto'",
        "dtype": "torch.float64" if o["double"] else "torch.float32",
        "hx": _if(o["state"], "(h_0, c_0)"),
    }  # fmt: skip


def _prefix(s: Sizes, o: Options) -> int:
    earlier = min(s["earlier"], s["top_k"]) + min(s["earlier"], s["window"] - 1)
    return earlier if o["memory"] else 0


def _lstm(s: Sizes, o: Options) -> dict[str, str]:
    T, B, H = s["T"], s["B"], s["H"]
    projected = o["projection"] and s["R"] < H
    R = s["R"] if projected else H
    anew = o["reset"] and o["anew"]
    return _common(s, o) | {
        "reset_h": _if(anew, _random(o, T, B, R)), "reset_c": _if(anew, _random(o, T, B, H)),
        "reset_hx": _if(anew, "(reset_h, reset_c)"),
        "input": _random(o, T, B, s["I"]), "h_0": _random(o, B, R), "c_0": _random(o, B, H),
        "weight_ih": _random(o, 4 * H, s["I"]), "weight_hh": _random(o, 4 * H, R),
        "weight_hr": _if(projected, _random(o, R, H)), "proj_size": str(R if projected else 0),
    }  # fmt: skip


def _rel_lstm(s: Sizes, o: Options) -> dict[str, str]:
    B, H, A, prefix = s["B"], s["H"], s["A"], _prefix(s, o)
    return _lstm(s, o | {"projection": False}) | {
        "context_0": _random(o, B, H), "memory": _if(o["memory"], _random(o, prefix, B, H)),
        "relevance": _if(o["memory"], _random(o, prefix, B)), "weight_query": _random(o, A, H),
        "weight_key": _random(o, A, H), "weight_score": _random(o, A),
    }  # fmt: skip


def _gives(o: Options) -> bool:
    """Whether relevance is given in place of attention, which takes no option beside it."""
    return o["given"] and not o["keep_first"] and not o["normalize"]


def _attention(s: Sizes, o: Options, prefix: int = 0) -> dict[str, str]:
    B, R, T, D = (s[name] for name in "BRTD")
    heads = R * s["group"]
    packed = o["packed"] and not o["memory"] and not o["lengths"]
    B = 1 if packed else B
    return _common(s, o) | {
        "query": _random(o, B, heads, T, D), "key": _random(o, B, R, T + prefix, D),
        "value": _random(o, B, R, T + prefix, s["A"]),
        "score_weight": _if(o["additive"], _random(o, heads, D)),
        "cu_seqlens": _if(packed, _bounds(s)),
        "relevance": _if(o["memory"], _random(o, B, R, prefix)),
        "seen": _if(o["memory"], f"torch.randint(0, 10, ({B},))"),
        "given": _if(_gives(o), _random(o, B, R, T) + ".abs()"),
        "return_relevance": str(o["given"]),
        "scale": "None" if o["additive"] else "0.5",
        "embed_dim": str(D * heads), "num_heads": str(heads), "num_key_value_heads": str(R),
    }  # fmt: skip


def _bounds(s: Sizes) -> str:
    """Where packed samples begin and end."""
    return f"torch.tensor([0, {s['T'] // 2}, {s['T']}])"


def _named(values: dict[str, str], names: list[str], trains: bool) -> Iterator[str]:
    """Assignments of the arguments that are tensors; afterwards ``values`` holds their names."""
    for name in names:
        if values.get(name, "").startswith(("torch.rand", "(torch.rand")):
            leaf = trains and "randn(" in values[name]
            yield f"{name} = {values[name]}{'.requires_grad_()' if leaf else ''}"
            values[name] = name


def _operator(name: str, values: dict[str, str], result: str) -> Steps:
    """An operator with the arguments that its schema asks for."""
    schema = getattr(torch.ops.throughtime, name).default._schema
    names = [argument.name for argument in schema.arguments]
    yield from _named(values, names, trains=False)
    yield Call(result, f"torch.ops.throughtime.{name}", {name: values[name] for name in names})
    yield f"{', '.join(each.name for each in schema.returns)} = {result}"
    values |= {each.name: each.name for each in schema.returns}


def _raw(op: str, family: Callable[[Sizes, Options], dict[str, str]]) -> Target:
    """Both operators of an operation."""

    def steps(s: Sizes, o: Options) -> Steps:
        values = family(s, o)
        if op == "relevancy":
            values["scale"] = "0.5"
        elif o["mask"]:  # of operators they have one form, [T, B]
            values["detach_mask"] = f"(torch.rand({s['T']}, {s['B']}) < 0.5)"
        yield from _operator(f"{op}_forward", values, "result")
        for name in ("output", "h_n", "c_n", "context_n", "cells"):
            wanted = name in values and (o["grads"] or name == "output")
            values[f"grad_{name}"] = _if(wanted, f"torch.ones_like({name})")
        yield from _operator(f"{op}_backward", values, "gradients")

    return steps


def _raw_gpu(s: Sizes, o: Options) -> Steps:
    """The operators of GPUs on the CPU, which has no implementation of them, or on meta tensors."""
    B, H, front = s["B"], s["H"], (1,)
    values = _common(s, o) | {
        "projected": _random(o, s["T"], B, *front, 4 * H),
        "bias": _if(o["bias"], _random(o, *front, 4 * H)), "h_0": _random(o, *front, B, H),
        "c_0": _random(o, *front, B, H), "weight_hh": _random(o, *front, 4 * H, H),
        "reset": "None", "lengths": "None", "tf32": "False",
    }  # fmt: skip
    for name, text in values.items():
        if text.startswith("torch.randn") and o["train"]:
            values[name] = text + ".to('meta')"
    suffix = "" if o["reference"] else "_triton"
    yield from _operator(f"lstm_recurrence_forward{suffix}", values, "result")


def _finish() -> Steps:
    yield ("grads = [x.sum() for x in torch.utils._pytree.tree_leaves(result) "
           "if isinstance(x, torch.Tensor) and x.requires_grad]")  # fmt: skip
    yield Call("gradients", "torch.autograd.backward", {}, "grads")


def _takes(function: Callable[..., Any], values: dict[str, str]) -> dict[str, str]:
    """Those of the values that a function has arguments for."""
    return {n: values[n] for n in inspect.signature(function).parameters if n in values}


def _again(o: Options, state: str, fields: str, arguments: dict[str, str], callee: str) -> Steps:
    """The call once more, from a state that is made of the fields of the first one's."""
    if o["again"]:
        yield "state = result[1]"
        names = fields.split()
        yield Call("state", f"throughtime.{state}", {name: f"state.{name}" for name in names})
        yield Call("result", callee, {**arguments, "hx": "state"})


def functional_lstm(s: Sizes, o: Options) -> Steps:
    """One layer in one direction or in both, and backward."""
    values = _lstm(s, o)
    yield from _named(values, ["h_0", "c_0", *values], o["train"])
    name = "lstm"
    if o["bidirectional"]:
        name, order = "bidirectional_lstm", ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = ", ".join(values[each] for each in (*order, "weight_hr"))
        pair = "torch.stack([{0}, {0}])"
        values |= {
            "hx": _if(o["state"], f"({pair.format('h_0')}, {pair.format('c_0')})"),
            "weights": f"(({weights}), ({weights}))",
            "detach_mask": "({0}, {0})".format(values["detach_mask"]),
        }
        del values["reset"], values["reset_hx"]
    yield Call("result", f"functional.{name}", _takes(getattr(functional, name), values))
    yield from _finish()


def functional_rel_lstm(s: Sizes, o: Options) -> Steps:
    """One layer, then on from its state, and backward."""
    values = _rel_lstm(s, o)
    yield from _named(values, ["h_0", "c_0", *values], o["train"])
    arguments = _takes(functional.rel_lstm, values | {"backend": "'auto'"})
    yield Call("result", "functional.rel_lstm", arguments)
    fields = "h c context memory relevance position length retained"
    yield from _again(o, "RelState", fields, arguments, "functional.rel_lstm")
    yield from _finish()


def functional_attention(s: Sizes, o: Options) -> Steps:
    """Attention with or without a cache, and backward."""
    again = o["again"]
    values = _attention(s, o) | {"cache": _if(again, "cache"), "return_retained": str(not again)}
    values["relevance"] = values["given"]
    yield from _named(values, list(values), o["train"])
    if again:
        yield "cache = throughtime.RelevancyCache()"
    arguments = _takes(functional.relevancy_attention, values | {"backend": "'auto'"})
    yield Call("result", "functional.relevancy_attention", arguments)
    if again:
        fields = ("key", "value", "relevance", "position", "length", "retained", "options")
        given = {name: f"cache.{name}" for name in fields}
        yield Call("cache", "throughtime.RelevancyCache", given)
        yield Call("result", "functional.relevancy_attention", arguments)
    else:
        given = _takes(functional.retained_positions, values | {"last": "result[1]"})
        yield Call("positions", "functional.retained_positions", given)
    yield from _finish()


def functional_attention_varlen(s: Sizes, o: Options) -> Steps:
    """Attention of packed samples, and backward."""
    T, R, D = (s[name] for name in "TRD")
    values = _attention(s, o | {"memory": False}) | {
        "query": _random(o, T, R * s["group"], D), "key": _random(o, T, R, D),
        "value": _random(o, T, R, s["A"]), "cu_seqlens": _bounds(s), "return_retained": "True",
        "relevance": _if(_gives(o), _random(o, T, R) + ".abs()"),
    }  # fmt: skip
    yield from _named(values, list(values), o["train"])
    arguments = _takes(functional.relevancy_attention_varlen, values | {"backend": "'auto'"})
    yield Call("result", "functional.relevancy_attention_varlen", arguments)
    yield from _finish()


def _packed(s: Sizes, o: Options) -> Steps:
    """A PackedSequence, made by hand from a right one's parts."""
    yield f"lengths = torch.randint(1, {s['T'] + 1}, ({s['B']},))"
    if o["sorted"]:
        yield "lengths = lengths.sort(descending=True)[0]"
    row = _random(o, 0, s["I"]).replace("(0,", "(n,")
    yield f"parts = [{row} for n in lengths.tolist()]"
    yield f"packed = torch.nn.utils.rnn.pack_sequence(parts, enforce_sorted={o['sorted']})"
    names = ("data", "batch_sizes", "sorted_indices", "unsorted_indices")[: 2 if o["sorted"] else 4]
    given = {name: f"packed.{name}" for name in names}
    yield Call("input", "torch.nn.utils.rnn.PackedSequence", given, ours=False)


def _module(name: str, packed: bool) -> Target:
    """A layer, on a tensor or on a PackedSequence."""

    def steps(s: Sizes, o: Options) -> Steps:
        kind = getattr(throughtime, name)
        values = (_lstm if name == "LSTM" else _rel_lstm)(s, o)
        yield Call("layer", f"throughtime.{name}", _takes(kind, values | {"backend": "'auto'"}))
        batch = [] if o["no_batch"] and not packed else [s["B"]]
        if packed:
            yield from _packed(s, o)
        else:
            shape = [*batch, s["T"]] if o["batch_first"] else [s["T"], *batch]
            leaf = ".requires_grad_()" if o["train"] else ""
            yield f"input = {_random(o, *shape, s['I'])}{leaf}"
        count = s["layers"] * (2 if o["bidirectional"] and name == "LSTM" else 1)
        R = int(values["proj_size"]) or s["H"]
        states = [_random(o, count, *batch, size) for size in (R, s["H"])]
        arguments = {"input": "input", "hx": _if(o["state"], f"({', '.join(states)})")}
        if o["mask"] and not packed:
            yield f"detach_mask = torch.rand({s['T']}) < 0.5"
            arguments["detach_mask"] = "detach_mask"
        if o["reset"] and not packed:
            yield f"reset = torch.rand({', '.join(map(str, shape))}) < 0.5"
            arguments["reset"] = "reset"
        if o["return_cells"] and name == "LSTM":
            arguments["return_cells"] = "True"
        yield Call("result", "layer", arguments)
        if o["again"]:
            yield Call("result", "layer", arguments | {"hx": "result[1]"})
        yield from _finish()

    return steps


def module_cell(s: Sizes, o: Options) -> Steps:
    """One step, and another."""
    values = _lstm(s, o | {"projection": False})
    sizes = {name: values[name] for name in ("input_size", "hidden_size", "bias", "dtype")}
    yield Call("layer", "throughtime.LSTMCell", sizes)
    batch = [] if o["no_batch"] else [s["B"]]
    x, h, c = (_random(o, *batch, size) for size in (s["I"], s["H"], s["H"]))
    arguments = {"input": x, "hx": _if(o["state"], f"({h}, {c})")}
    if o["reset"]:
        yield f"reset = torch.rand({batch}) < 0.5"
        arguments["reset"] = "reset"
    yield f"torch.set_grad_enabled({o['train']})"
    yield Call("result", "layer", arguments)
    yield Call("result", "layer", arguments | {"hx": "result"})
    yield "torch.set_grad_enabled(True)"
    yield "result = [*result, torch.zeros(1, requires_grad=True)]"
    yield from _finish()


def module_attention(s: Sizes, o: Options) -> Steps:
    """The module, with a cache."""
    values = _attention(s, o)
    kind = throughtime.RelevancyAttention
    options = {"bias": "True", "batch_first": "True", "backend": "'auto'", "retain": "'relevant'"}
    yield Call("layer", "throughtime.RelevancyAttention", _takes(kind, values | options))
    yield f"input = {_random(o, s['B'], s['T'], int(values['embed_dim']))}"
    yield from _named(values, ["lengths"], trains=False)
    yield "cache = throughtime.RelevancyCache()"
    arguments = {"input": "input", "lengths": values["lengths"], "cache": _if(o["again"], "cache")}
    for _ in range(1 + o["again"]):
        yield Call("result", "layer", dict(arguments))
    yield from _finish()


TARGETS: dict[str, Target] = {
    "raw_lstm": _raw("lstm", _lstm),
    "raw_lstm_cells": _raw("lstm_cells", _lstm),
    "raw_rel_lstm": _raw("rel_lstm", _rel_lstm),
    "raw_relevancy": _raw("relevancy", lambda s, o: _attention(s, o, _prefix(s, o))),
    "raw_gpu": _raw_gpu,
    "functional_lstm": functional_lstm,
    "functional_rel_lstm": functional_rel_lstm,
    "functional_attention": functional_attention,
    "functional_attention_varlen": functional_attention_varlen,
    "module_lstm": _module("LSTM", packed=False),
    "module_lstm_packed": _module("LSTM", packed=True),
    "module_rel_lstm": _module("RelLSTM", packed=False),
    "module_rel_lstm_packed": _module("RelLSTM", packed=True),
    "module_attention": module_attention,
    "module_cell": module_cell,
}
