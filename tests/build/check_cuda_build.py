"""Whether an installation with the CUDA kernels loads, without a GPU: `make test-cuda-build`."""

from __future__ import annotations

import torch

import throughtime
from throughtime import _build_info, _ext, env
from throughtime.backends import Request, can_run

assert _ext.why_missing("cuda") is None, _ext.why_missing("cuda")
assert set(_build_info.built) == {"cpu", "cuda"}, _build_info.left_out
for name in ("forward", "backward"):
    operator = f"throughtime::lstm_recurrence_{name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"), operator
request = Request("lstm", 128, 0, torch.device("cuda"), torch.bfloat16)
reason = can_run("cuda", request)
if torch.cuda.is_available():
    assert reason is None, reason
else:
    assert reason is not None and "torch sees no GPU here" in reason, reason
layer = throughtime.LSTM(3, 8, backend="cuda")  # its device may come later
assert "resident" in str(throughtime.explain(layer, dtype=torch.half, gpu="H100"))
print(env.report())
