"""The guard for weights that others move: contiguous and aligned whenever a block arrives on CUDA.

What this pack's engine moves is contiguous by construction (see layout.py). Where a host moves blocks itself, a weight may
arrive as a strided or misaligned view of something larger, and FP8 or FP4 kernels then fail with "misaligned address", at
some later and unrelated line. The guard looks at a block's tensors each time the block was moved and copies those, and only
those, that such kernels cannot take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .gates import InstancePatches
from .layout import is_dense, plain_tensors

ALIGNMENT = 16
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ONE_BYTE = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Finding:
    """A tensor that kernels may stumble over: ``problem`` in words."""

    path: str
    problem: str


def strides_are_deliberate(tensor: torch.Tensor) -> bool:
    """Whether a tensor's strides are so on purpose: a quantized operand of one-byte elements that is column-major and
    dense, as cuBLASLt wants the second FP8 operand (see torch._scaled_mm), or the weight of a convolution in
    channels_last."""
    if tensor.dim() == 2:
        return tensor.dtype in ONE_BYTE and tensor.stride(0) == 1 and is_dense(tensor)
    format_of = CHANNELS_LAST.get(tensor.dim())
    return format_of is not None and tensor.is_contiguous(memory_format=format_of)


def problem_of(tensor: torch.Tensor) -> str | None:
    """What is wrong with a plain tensor, in words; None when kernels can take it, or when it is sparse."""
    if tensor.layout is not torch.strided:
        return None
    if not tensor.is_contiguous() and not strides_are_deliberate(tensor):
        return f"strides {tuple(tensor.stride())} of shape {tuple(tensor.shape)} are not contiguous"
    if tensor.data_ptr() % ALIGNMENT:
        return f"its address is {tensor.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}"
    return None


def mended(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own: aligned, and row-major unless its strides are deliberate."""
    deliberate = strides_are_deliberate(tensor)
    return tensor.clone(memory_format=torch.preserve_format if deliberate else torch.contiguous_format)


def find(module: nn.Module) -> list[Finding]:
    """All parameters and buffers below ``module`` that kernels may stumble over, wherever they are."""
    return [
        Finding(path, problem)
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]
        for inner in plain_tensors(tensor)
        if not inner.is_meta and (problem := problem_of(inner)) is not None
    ]


def mend(module: nn.Module, device_types: tuple[str, ...] = ("cuda",)) -> int:
    """Copy each parameter and buffer below ``module`` on a device of those types that is not contiguous and aligned.
    Tensor objects stay the same. Returns how many were mended."""
    count = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        for inner in plain_tensors(tensor):
            if inner.device.type in device_types and problem_of(inner) is not None:
                inner.data = mended(inner.data)
                count += 1
    return count


class Guard:
    """Mends blocks whenever they were moved, until ``remove``. ``mended`` counts tensors."""

    def __init__(self, device_types: tuple[str, ...] = ("cuda",)) -> None:
        self.device_types = device_types
        self.mended = 0
        self._instance = InstancePatches()

    def add(self, block: nn.Module) -> None:
        """Guard a block: each ``to``, ``cuda`` and the like of it, or of a module around it, is followed by a look."""
        original = block._apply

        def _apply(fn: Callable, recurse: bool = True) -> nn.Module:
            result = original(fn, recurse)
            self.look(block)
            return result

        self._instance.set(block, "_apply", _apply)

    def look(self, block: nn.Module) -> None:
        """Mend a block now, whoever moved it."""
        self.mended += mend(block, self.device_types)

    def remove(self) -> None:
        """Take the guard off all blocks; their instances are as they were."""
        self._instance.restore()
