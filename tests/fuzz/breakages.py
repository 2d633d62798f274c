"""What can be wrong with one argument: sources in which ``{}`` is the valid one."""

from __future__ import annotations

_DTYPES = tuple(
    f"{{}}.to(torch.{name})"
    for name in ("float64", "float32", "bfloat16", "float16", "complex64", "int64", "int32", "bool",
                 "uint8", "float8_e4m3fn")
)  # fmt: skip
_LAYOUTS = (
    "{}.to('meta')",
    "{}.to_sparse()",
    "{}.float().to_mkldnn()",
    "torch.quantize_per_tensor({}.float(), 0.1, 0, torch.qint8)",
    "torch.nested.nested_tensor([{}])",
    "torch.complex({}.float(), {}.float()).conj().imag",
    "torch._efficientzerotensor({}.shape, dtype={}.dtype)",
    "torch.nn.Parameter({}, requires_grad={}.is_floating_point())",
    "{}.requires_grad_()",
)
_DIMENSIONS = (
    "{}.unsqueeze(0)",
    "{}.unsqueeze(-1)",
    "{}[0]",
    "{}[..., 0]",
    "{}.flatten()",
    "{}.sum()",
    "{}.transpose(0, -1)",
)
_SIZES = (
    "{}[:0]",
    "{}[1:]",
    "{}[..., :0]",
    "{}[..., 1:]",
    "{}.narrow({}.dim() // 2, 0, 0)",
    "torch.cat([{}, {}])",
    "torch.cat([{}, {}], -1)",
    "torch.empty(0, dtype={}.dtype)",
)
_HUGE = tuple(
    text.replace("HUGE", size)
    for size in ("2**62", "2**40", "2**31")
    for text in (
        "{}[:1].expand(HUGE, *{}.shape[1:])",
        "{}[..., :1].expand(*{}.shape[:-1], HUGE)",
        "{}.movedim({}.dim() // 2, 0)[:1].expand(HUGE, *[-1] * ({}.dim() - 1)).movedim(0, -1)",
        "{}.expand(HUGE, *{}.shape)",
        "{}.flatten()[:1].expand(HUGE, *{}.shape[1:-1], 1, 0)",
    )
)
_MEMORY = (  # all but the last are valid
    "{}.transpose(0, -1).contiguous().transpose(0, -1)",
    "{}[:1].expand({}.shape)",
    "{}[..., :1].expand({}.shape)",
    "{}.flip(0)",
    "torch.cat([{}, {}])[::2]",
    "torch.empty({}.numel() + 1, dtype={}.dtype)[1:].view({}.shape).copy_({})",
    "[x := {}.clone(), setattr(x, 'data', torch.empty(0, dtype=x.dtype))][0]",
)
_CONTENTS = (
    "{} + 1000",
    "{} - 1000",
    "{} * 0",
    "{} * 0 - 1",
    "{} * 0 + 1",
    "{} * 3 - 2",
    "torch.full_like({}, -2**63)",
    "torch.full_like({}, 2**63 - 1)",
    "torch.full_like({}, float('nan'))",
    "torch.full_like({}, float('inf'))",
    "torch.randint(-2, 20, {}.shape)",
    "torch.randint(-1, 4, {}.shape)",
    "{}.index_fill(0, torch.tensor([0]), 7)",
    "{}.clamp(max=0)",
    "{}.clamp(min=2)",
    "{}.roll(1)",
)
SCALARS = ("None", "-1", "0", "1", "2", "100", "2**31", "2**62", "2**63 - 1", "-2**63", "2**63",
           "0.5", "True", "'text'", "float('nan')", "float('inf')", "[1]", "torch.ones(3)",
           "torch.tensor(2)", "object()")  # fmt: skip
# Contents and memory are what kernels trust most: they come more often.
TENSORS = (
    *_DTYPES, *_LAYOUTS, *_DIMENSIONS, *_SIZES, *_HUGE, *2 * _MEMORY, *3 * _CONTENTS,
    "None", "1", "'text'", "[{}]", "({}, {})", "{}.tolist()", "{}.numpy()", "object()",
)  # fmt: skip
# A storage that is smaller than its tensor ends the process in many of torch's own operators. So
# only operators of ours are given one, and backward passes, which hold on to tensors.
_SHRUNK = (
    "[x := {}.clone(), x.untyped_storage().resize_(0)][0]",
    "[x := {}.clone(), x.untyped_storage().resize_(8)][0]",
)
CHANGES_BEFORE_BACKWARD = ("{}.untyped_storage().resize_(0)",)
CHANGES = (
    "{}.data.fill_(99)",
    "{}.data.fill_(-7)",
    "{}.data.mul_(2)",
    "{}.data = torch.empty(0, dtype={}.dtype)",
    "{}.data = {}.data.to('meta')",
)
_TUPLES = (
    "{}[0]", "({}[0],)", "(*{}, {}[0])", "[*{}]", "({}[0], None)", "(None, {}[1])",
    "torch.stack(list({}))", "({}[1], {}[0])", "({}[0].to('meta'), {}[1])",
    "({}[0].double(), {}[1])", "({}[0][:0], {}[1])", "({}[0], {}[1].unsqueeze(0))",
    "({}[0][..., :1].expand(*{}[0].shape[:-1], 2**62), {}[1])", "None", "1", "'text'",
)  # fmt: skip


def kinds_for(name: str, valid: str, raw: bool) -> tuple[str, ...]:
    """What can be wrong with the argument of that source; ``raw``: of an operator itself."""
    if valid.startswith("("):
        return _TUPLES
    if valid not in ("None", "True", "False") and valid[0].isalpha():
        return (*TENSORS, *3 * _SHRUNK) if raw else TENSORS
    # So many layers are made one by one, as many as there is time for.
    return tuple(kind for kind in SCALARS if name != "num_layers" or "2**" not in kind)
