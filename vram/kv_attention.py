"""Exact attention over keys and values that come in chunks, one after the other.

Each chunk gives its own attention output and the logarithm of the sum of its exponentiated scores; two such pairs merge
into the one that both chunks together would have given (the online softmax of Milakov and Gimelshein, arXiv 1805.02867,
as ring attention and FlashAttention use it). Nothing is approximated: only the order of the additions differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

SCORE_BYTES = 256 << 20  # scores that the plain path holds at once


def attend(
    query: torch.Tensor, chunks: Iterable[tuple[torch.Tensor, torch.Tensor]], scale: float | None = None
) -> torch.Tensor:
    """Attention of ``query`` [batch, heads, queries, head_dim] over all ``chunks`` of (key, value) [batch, kv_heads,
    length, head_dim] together, without a mask: as ``scaled_dot_product_attention`` over their concatenation.

    Chunks may be views with any strides and any lengths, and are used up one by one. ``heads`` must be a multiple of
    ``kv_heads``. ``scale``: 1 / sqrt(head_dim) unless given. Returns ``query``'s shape and dtype; sums are float32 (float64
    for float64). ValueError for no keys at all, or shapes that do not fit together.
    """
    batch, heads, queries, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for key, value in chunks:
        kv_heads = key.shape[1]
        if key.shape[0] != batch or key.shape[3] != head_dim or heads % kv_heads or key.shape[:3] != value.shape[:3]:
            raise ValueError(f"query {list(query.shape)} over key {list(key.shape)} and value {list(value.shape)}")
        if not key.shape[2]:
            continue
        # query heads that share a key head are further queries to it: without a mask, queries do not see each other
        grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
        output, weight = _one_chunk(grouped, key, value, scale)
        merged = (output, weight) if merged is None else _merge(*merged, output, weight)
    if merged is None:
        raise ValueError("attention over no keys")
    return merged[0].reshape(batch, heads, queries, -1).to(query.dtype)


def _merge(
    output: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two chunks' outputs [..., head_dim] and log-sums [...] as one: into the first ones' memory."""
    share = torch.sigmoid(other_weight - weight)  # exp(b) / (exp(a) + exp(b))
    output.lerp_(other.to(output.dtype), share.unsqueeze(-1))
    return output, torch.logaddexp(weight, other_weight)


def _one_chunk(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one chunk: (output, log of the sum of exponentiated scores), both float32 or float64."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    # FlashAttention gives the log-sum as well; torch's own call for it is used by context parallelism in the same way
    if query.is_cuda and half and query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
        return found[0].float(), found[1][..., : query.shape[2]]
    return _plain(query, key, value, scale)


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_one_chunk`` by matrix products, for so many queries at a time that the scores stay small."""
    batch, heads, queries, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = torch.empty((batch, heads, queries, value.shape[-1]), dtype=dtype, device=query.device)
    weight = torch.empty((batch, heads, queries), dtype=dtype, device=query.device)
    key, value = key.to(dtype).transpose(-1, -2), value.to(dtype)
    step = max(1, SCORE_BYTES // (batch * heads * key.shape[-1] * dtype.itemsize))
    for at in range(0, queries, step):
        scores = query[:, :, at : at + step].to(dtype).mul(scale) @ key
        # not by subtracting the log-sum: for large scores its rounding would scale the output
        highest = scores.amax(-1, keepdim=True)
        total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
        weight[:, :, at : at + step] = total.log().add_(highest).squeeze(-1)
        output[:, :, at : at + step] = (scores @ value).div_(total)
    return output, weight
