"""``throughtime.RelevancyAttention``: multi-head self-attention at linear cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from throughtime import functional
from throughtime.backends.backend import BackendName, Request
from throughtime.functional.checks import check_choice, check_flag, check_size
from throughtime.functional.relevancy_call import Retain, Score, beyond_paper
from throughtime.nn.backend import BackendChoice
from throughtime.states import RelevancyCache


class RelevancyAttention(BackendChoice, nn.Module):
    r"""Causal self-attention over a short window and the most relevant keys before it.

    The layer runs :func:`throughtime.functional.relevancy_attention` between the projections of
    ``nn.MultiheadAttention`` and has its parameter names: ``in_proj_weight``, ``in_proj_bias``,
    ``out_proj``. The input is batch-first by default. A model that generates has one cache for each
    layer, as the example shows.

    Args:
        embed_dim: E, features of input and output, divisible by ``num_heads``.
        num_heads: number of heads.
        window_size: number of queries that attend a key before it competes for the retained set,
            >= 1.
        top_k: size of the retained set, >= 0.
        bias: False leaves out the biases of the projections.
        batch_first: input and output are ``[B, T, E]``; otherwise ``[T, B, E]``.
        device: device of the parameters.
        dtype: floating point type of the parameters.
        score: ``"dot"``, or ``"additive"``, which adds the parameter ``score_weight [heads, D]``.
        retain: ``"relevant"``, or the baseline ``"first"``, which keeps the first ``top_k`` keys.
        screen_every: queries from one change of the retained set to the next, >= 1; on a CPU no
            choice of it is faster. What it does to accuracy: see
            :func:`throughtime.functional.relevancy_attention`.
        normalize: True counts the attention of a query as often as the query attends keys.
        num_key_value_heads: heads of keys and values, which divide ``num_heads``; None: as many.
            ``num_heads / num_key_value_heads`` consecutive heads of queries share the keys and the
            retained set of one (grouped-query attention); not with ``"triton"``.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        RuntimeError: if the chosen backend can never run this layer.
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Example:
        >>> import torch, throughtime
        >>> attention = throughtime.RelevancyAttention(16, 4, window_size=8, top_k=4)
        >>> x = torch.randn(2, 50, 16)
        >>> assert attention(x).shape == (2, 50, 16)
        >>> layers = torch.nn.ModuleList([attention, throughtime.RelevancyAttention(16, 4, 8, 4)])
        >>> caches = [throughtime.RelevancyCache() for _ in layers]  # one cache for each layer
        >>> def run(x):
        ...     for layer, cache in zip(layers, caches):
        ...         x = x + layer(x, cache=cache)
        ...     return x
        >>> parts = torch.cat([run(part) for part in x.split([40] + [1] * 10, dim=1)], dim=1)
        >>> caches = [None, None]
        >>> assert torch.allclose(parts, run(x), atol=1e-5)

    Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: int,
        top_k: int,
        bias: bool = True,
        batch_first: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        score: Score = "dot",
        retain: Retain = "relevant",
        screen_every: int = 1,
        normalize: bool = False,
        num_key_value_heads: int | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        name = "RelevancyAttention"
        if num_key_value_heads is None:
            num_key_value_heads = num_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
        sizes["num_key_value_heads"] = num_key_value_heads
        for argument, value in sizes.items():
            check_size(name, argument, value, least=1)
        check_size(name, "window_size", window_size, least=1)
        check_size(name, "top_k", top_k, least=0)
        check_size(name, "screen_every", screen_every, least=1)
        flags = {"bias": bias, "batch_first": batch_first, "normalize": normalize}
        for argument, flag in flags.items():
            check_flag(f"{name}: {argument}", flag)
        if embed_dim % num_heads:
            raise ValueError(
                f"{name}: embed_dim should be divisible by num_heads, got {embed_dim} and "
                f"{num_heads}"
            )
        if num_heads % num_key_value_heads:
            raise ValueError(
                f"{name}: num_heads should be divisible by num_key_value_heads, got {num_heads} "
                f"and {num_key_value_heads}"
            )
        check_choice(name, "score", score, ("dot", "additive"))
        check_choice(name, "retain", retain, ("relevant", "first"))
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.num_key_value_heads = num_key_value_heads
        self.window_size, self.top_k, self.screen_every = window_size, top_k, screen_every
        self.batch_first, self.score, self.retain = batch_first, score, retain
        self.normalize = normalize

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        rows = (num_heads + 2 * num_key_value_heads) * self.head_dim
        self.in_proj_weight = parameter(rows, embed_dim)
        self.in_proj_bias = parameter(rows) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        weight = parameter(num_heads, self.head_dim) if score == "additive" else None
        self.score_weight = weight
        self.backend = backend
        self.reset_parameters()

    def backend_request(self) -> Request:
        weight = self.in_proj_weight
        return Request(
            "relevancy_attention",
            self.head_dim,
            device=weight.device,
            dtype=weight.dtype,
            beyond_paper=beyond_paper(
                self.screen_every, self.normalize, self.num_heads // self.num_key_value_heads
            ),
        )

    def reset_parameters(self) -> None:
        """Draw new weights as ``nn.MultiheadAttention`` does, and a normal ``score_weight``."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.score_weight is not None:
            nn.init.normal_(self.score_weight, std=1 / math.sqrt(self.head_dim))

    def forward(
        self,
        input: Tensor,
        *,
        lengths: Tensor | None = None,
        cache: RelevancyCache | None = None,
        relevance: Tensor | None = None,
    ) -> Tensor:
        """Attend every position to its window and to the retained positions before it.

        Args:
            input: ``[B, T, E]``, or ``[T, B, E]`` with ``batch_first=False``.
            lengths: int64 ``[B]``, 0 <= length <= T.
            cache: state of earlier calls of this layer on the same sequences; this call updates it.
                One cache for each layer; a copy of a cache may go on in a copy of the layer.
            relevance: ``[B, num_key_value_heads, T]``, >= 0: what a key competes with, in place of
                the attention that it has received.

        Returns:
            A tensor shaped like the input. Past a sample's length it holds the bias of the output
            projection.

        Raises:
            RuntimeError: if a shape or a device does not fit, or the chosen backend cannot run.
            TypeError: if an argument has the wrong type.
            ValueError: if a dtype, a length or the cache is wrong, or is that of another layer.
        """
        if not isinstance(input, Tensor):
            raise TypeError(
                f"RelevancyAttention: input should be a Tensor, got {type(input).__name__}"
            )
        if input.dim() != 3 or input.size(2) != self.embed_dim:
            letters = "[B, T, E]" if self.batch_first else "[T, B, E]"
            raise RuntimeError(
                f"RelevancyAttention: input should have shape {letters} with E = "
                f"{self.embed_dim}, got {list(input.shape)}"
            )
        weight = self.in_proj_weight
        if input.dtype != weight.dtype and functional.autocast_dtype(input) is None:
            raise ValueError(
                f"RelevancyAttention: input should have the weights' dtype {weight.dtype}, got "
                f"{input.dtype}; convert it: input.to({weight.dtype})"
            )
        self._check_owner(cache)
        if not self.batch_first:
            input = input.transpose(0, 1)
        batch, length, _ = input.shape
        projected = F.linear(input, weight, self.in_proj_bias)
        heads = [self.num_heads, self.num_key_value_heads, self.num_key_value_heads]
        rows = projected.view(batch, length, sum(heads), self.head_dim).transpose(1, 2)
        query, key, value = torch.split(rows, heads, 1)
        output = functional.relevancy_attention(
            query,
            key,
            value,
            self.window_size,
            self.top_k,
            score=self.score,
            score_weight=self.score_weight,
            lengths=lengths,
            cache=cache,
            retain=self.retain,
            screen_every=self.screen_every,
            relevance=relevance,
            normalize=self.normalize,
            backend=self.backend,
        )
        if cache is not None and not torch.compiler.is_compiling():
            _owners[cache] = ref(self)
        output = F.linear(
            output.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias
        )
        return output if self.batch_first else output.transpose(0, 1)

    if TYPE_CHECKING:  # a call has forward's types; nn.Module declares Any
        __call__ = forward

    def _check_owner(self, cache: RelevancyCache | None) -> None:
        """Raise if another layer, which is still there, went on with this very cache."""
        if not isinstance(cache, RelevancyCache) or torch.compiler.is_compiling():
            return
        owner = _owners.get(cache, ref(self))()
        if owner is not self and owner is not None:
            raise ValueError(
                "RelevancyAttention: cache should be of this layer alone, got that of another "
                "layer; make one cache for each layer: [RelevancyCache() for _ in layers]; in a "
                "copy of the layer go on with a copy: copy.copy(cache)"
            )

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}, {self.window_size}, {self.top_k}"
        text += "" if self.in_proj_bias is not None else ", bias=False"
        text += "" if self.batch_first else ", batch_first=False"
        text += "" if self.score == "dot" else f", score={self.score!r}"
        text += "" if self.retain == "relevant" else f", retain={self.retain!r}"
        text += ", normalize=True" if self.normalize else ""
        heads = self.num_key_value_heads
        text += "" if heads == self.num_heads else f", num_key_value_heads={heads}"
        text += "" if self.screen_every == 1 else f", screen_every={self.screen_every}"
        return text + ("" if self.backend == "auto" else f", backend={self.backend!r}")


# The layer that each cache belongs to. A copy, and what pickle makes, belongs to none yet.
_owners: WeakKeyDictionary[RelevancyCache, ref[RelevancyAttention]] = WeakKeyDictionary()
