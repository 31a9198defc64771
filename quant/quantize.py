"""One weight in and out of a format, a slice of rows at a time.

All arithmetic is in float32: in bf16 comfy-kitchen's INT8 loses 6 to 8% of accuracy. Its kernels do the rounding where it is
installed; the same formulas in torch (comfy_kitchen/backends/eager/quantization.py) where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from ..vram.inspect_weights import KITCHEN_CUDA
from .formats import Format

SLICE = 4 << 20  # elements that are in float32 at once: with the temporaries of the kernels below 128 MiB
FP8_SMALLEST = 2.0**-126  # scale: zeros would have none, and a smaller one no finite inverse
INT8_SMALLEST = 1e-30
INT8_MOST = 127.0


class Unquantizable(ValueError):
    """The values of a weight cannot be quantized; the message says why."""


def quantize(weight: torch.Tensor, format: Format, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [out, in], of any float dtype and device, in ``format``: (stored [out, in], scale), both on ``device``.

    stored has the dtype ``format.storage``; scale is float32 [out, 1] or []. ``stored * scale`` is the weight again, but for
    rounding and for ConvRot's rotation. Beside input and output it takes less than 256 MiB of the device.

    Raises Unquantizable for values that are not finite, and ValueError for a shape that the format refuses to store.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"a weight of shape {list(weight.shape)} is no matrix")
    weight = weight.detach().to(device)
    with torch.cuda.device_of(weight):
        return _quantized(weight, format)


def _quantized(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    group = format.group(weight.shape[1])
    largest = _largest(weight, max(1, group))
    stored = torch.empty(weight.shape, dtype=format.storage, device=weight.device)
    scale = torch.empty(format.scale_shape(len(weight)), dtype=torch.float32, device=weight.device)
    if not format.per_row:
        scale.copy_(_fp8_scale(largest, format.storage))
    for rows in _slices(weight):
        part = weight[rows].to(torch.float32)
        if format.per_row:
            stored[rows], scale[rows] = _to_int8(part, group)
        else:
            stored[rows] = _to_fp8(part, scale, format.storage)
    return stored, scale


def dequantize(stored: torch.Tensor, scale: torch.Tensor, format: Format, settings: Mapping[str, Any]) -> torch.Tensor:
    """The weight, float32 [out, in], that ``stored`` and ``scale`` of ``format`` stand for. ``settings``: its JSON."""
    if stored.dtype is not format.storage:
        raise ValueError(f"{format.name} stores {format.storage}, not {stored.dtype}")
    weight = stored.to(torch.float32) * scale
    if settings.get("convrot"):
        weight = _rotated(weight, int(settings["convrot_groupsize"]))
    return weight


def _slices(weight: torch.Tensor) -> list[slice]:
    rows = max(1, SLICE // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _largest(weight: torch.Tensor, added: int) -> torch.Tensor:
    """The largest magnitude, float32 []. Raises Unquantizable when a sum of so many would not be finite: kernels differ in what
    they make of NaN and infinity, and none of them says so."""
    parts = [torch.stack(torch.aminmax(weight[rows])) for rows in _slices(weight)]
    largest = torch.stack(parts).to(torch.float32).abs().amax()
    if not math.isfinite((largest * added).item()):
        raise Unquantizable("it has values that are NaN or infinite")
    return largest


def _fp8_scale(largest: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """The scale that maps ``largest`` to the largest value of an FP8 dtype.

    That of e4m3 is rounded up to what bf16 can represent, for hosts that multiply by it in bf16. In e5m2 a larger scale
    would take the largest weights beyond the range of fp16.
    """
    scale = (largest / torch.finfo(storage).max).clamp(min=FP8_SMALLEST)
    if storage is torch.float8_e4m3fn:
        scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    return scale


def _to_fp8(part: torch.Tensor, scale: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    if kitchen := _kitchen(part.device.type):
        return kitchen.quantize_per_tensor_fp8(part, scale, storage)
    limit = torch.finfo(storage).max
    return (part * (1.0 / scale)).clamp_(-limit, limit).to(storage)


def _to_int8(part: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    if kitchen := _kitchen(part.device.type):
        layout = kitchen.tensor.TensorWiseINT8Layout
        options = {"convrot": True, "convrot_groupsize": group} if group else {}
        stored, params = layout.quantize(part, per_channel=True, **options)
        return stored, params.scale
    if group:
        part = _rotated(part, group)
    scale = (part.abs().amax(dim=-1, keepdim=True) / INT8_MOST).clamp(min=INT8_SMALLEST)
    return (part / scale).round_().clamp_(-128.0, 127.0).to(torch.int8), scale


def _rotated(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Each ``group`` columns of a weight times a Hadamard matrix, which is its own inverse."""
    return torch.matmul(weight.unflatten(1, (-1, group)), _hadamard(group, weight.device).T).flatten(1)


def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The regular Hadamard matrix of a size that is a power of 4, divided by its root (ConvRot, arXiv 2512.03673)."""
    four = torch.tensor(
        [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32, device=device
    )
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    if len(matrix) != size:
        raise ValueError(f"{size} columns cannot be rotated together: it is no power of 4")
    return matrix / size**0.5


@lru_cache
def _kitchen(device_type: str) -> ModuleType | None:
    """comfy-kitchen, where it is installed and its kernels run; only imported when a weight is quantized."""
    if device_type == "cuda" and int((torch.version.cuda or "0").partition(".")[0]) < KITCHEN_CUDA:
        return None
    try:
        import comfy_kitchen
        import comfy_kitchen.tensor
    except ImportError:
        return None
    return comfy_kitchen
