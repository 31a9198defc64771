"""How a key/value cache lies in memory: its dimensions, which parts of it are contiguous, and FP8 storage.

A layout is the order of the stored dimensions, one letter each: b batch, h heads, l length, d head_dim. The rows
[a, b) of the length dimension are contiguous, so that they can be sent to another rank as they lie, exactly if every
dimension before length has size 1:

| layout | shape                              | a piece of the length is contiguous |
|--------|------------------------------------|-------------------------------------|
| bhld   | [batch, heads, length, head_dim]   | for batch = heads = 1               |
| blhd   | [batch, length, heads, head_dim]   | for batch = 1                       |
| lbhd   | [length, batch, heads, head_dim]   | always                              |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LAYOUTS = ("bhld", "blhd", "lbhd")
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest finite e4m3 value
SMALLEST_SCALE = 1e-12


def length_dim(layout: str) -> int:
    """Where the length stands in ``layout``. ValueError for a layout that there is none of."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    return layout.index("l")


def piece_is_contiguous(data: torch.Tensor, dim: int) -> bool:
    """Whether any run of rows of dimension ``dim`` of ``data`` is contiguous memory."""
    return data.is_contiguous() and math.prod(data.shape[:dim]) == 1


def permutation(layout: str, wanted: str) -> tuple[int, ...]:
    """The argument of ``Tensor.permute`` that turns ``layout`` into ``wanted``."""
    return tuple(layout.index(letter) for letter in wanted)


@dataclass(frozen=True)
class CacheShape:
    """What a cache for all layers of a model holds. ``dtype`` is that of the rows given and returned; with ``fp8`` they
    are stored as float8_e4m3fn codes with one float32 scale per token and head. ValueError for sizes below 1, an unknown
    layout, or a dtype that is not floating point."""

    layers: int
    batch: int
    heads: int
    max_length: int
    head_dim: int
    layout: str = "bhld"
    dtype: torch.dtype = torch.bfloat16
    device: str | torch.device = "cpu"
    fp8: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "batch", "heads", "max_length", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a cache needs at least 1")
        length_dim(self.layout)
        if not self.dtype.is_floating_point:
            raise ValueError(f"a cache of {self.dtype}: keys and values are floating point")

    def stored(self, length: int | None = None) -> tuple[int, ...]:
        """Shape of one layer's keys (or values) with ``length`` tokens, ``max_length`` if not given."""
        length = self.max_length if length is None else length
        sizes = {"b": self.batch, "h": self.heads, "l": length, "d": self.head_dim}
        return tuple(sizes[letter] for letter in self.layout)

    @property
    def length_dim(self) -> int:
        """Where the length stands in the stored shape."""
        return length_dim(self.layout)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in one layer: key and value, with their FP8 scales."""
        per_head = self.head_dim * FP8.itemsize + 4 if self.fp8 else self.head_dim * self.dtype.itemsize
        return 2 * self.batch * self.heads * per_head

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return self.layers * self.max_length * self.token_bytes

    @property
    def prefix_is_contiguous(self) -> bool:
        """Whether the valid part of a cache, and any other piece of its length, is contiguous."""
        return math.prod(self.stored()[: self.length_dim]) == 1


def encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., head_dim] as e4m3 codes of the same shape and float32 scales [..., 1], one per token and head.

    A scale of its own for every token and head needs no calibration, and what is stored is never scaled anew.
    """
    wide = rows.float()
    scales = wide.abs().amax(-1, keepdim=True).div_(FP8_MAX).clamp_(min=SMALLEST_SCALE)
    return wide.div(scales).to(FP8), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The rows that ``encode`` stored, in ``out``'s dtype, written into ``out`` without another allocation on a GPU."""
    return out.copy_(codes).mul_(scales)


def as_bytes(data: torch.Tensor) -> torch.Tensor:
    """FP8 codes as uint8 over the same memory: indexing and collectives know few float8 operations."""
    return data.view(torch.uint8) if data.dtype == FP8 else data


def move_left(data: torch.Tensor, dim: int, source: int, target: int, rows: int) -> None:
    """Move ``rows`` rows of dimension ``dim`` from ``source`` to ``target`` < ``source``, in place.

    Pieces of at most the distance never overlap themselves, so that no temporary as large as the range is needed.
    """
    step = source - target
    for at in range(0, rows, step):
        count = min(step, rows - at)
        data.narrow(dim, target + at, count).copy_(data.narrow(dim, source + at, count))
