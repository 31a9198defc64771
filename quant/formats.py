"""Ways to store a weight in one byte an element, and what ComfyUI has to be told of each.

ComfyUI's quantized checkpoints (comfy/quant_ops.py, comfy/ops.py) hold for each quantized layer ``weight``, ``weight_scale``
(float32) and ``comfy_quant``: the UTF-8 bytes of a JSON object, here called its settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..vram.inspect_weights import FP8_MULTIPLE as MULTIPLE  # INT8 products want it too

GROUP = 256  # columns that ConvRot rotates together, for which comfy-kitchen has fused kernels


@dataclass(frozen=True)
class Format:
    """One way to store a weight [out, in].

    name: what users choose. comfy: what ComfyUI calls it. storage: dtype of the stored elements. per_row: one float32 scale
    a row, shape [out, 1]; otherwise one a weight, shape []. convrot: 0, or the number of columns that are rotated together
    by a Hadamard matrix before they are rounded; a weight whose columns it does not divide is stored without that.
    """

    name: str
    comfy: str
    storage: torch.dtype
    per_row: bool
    convrot: int = 0

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape has to stay as it is, in words; None where it can be quantized."""
        if len(shape) != 2:
            return f"it has {len(shape)} dimension{'' if len(shape) == 1 else 's'}, not 2"
        if not all(shape) or any(size % MULTIPLE for size in shape):
            return f"its {shape[0]} rows and {shape[1]} columns are not both multiples of {MULTIPLE}"
        return None

    def group(self, columns: int) -> int:
        """Columns of a weight with so many that are rotated together; 0: none are."""
        return self.convrot if self.convrot and columns % self.convrot == 0 else 0

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the scale of a weight with so many rows."""
        return (rows, 1) if self.per_row else ()

    def settings(self, columns: int, tensor_cores: bool) -> dict[str, Any]:
        """What ``comfy_quant`` says of a weight with so many columns.

        tensor_cores: whether the layer multiplies in this format where the card can; otherwise its weight is dequantized.
        Weights in e5m2 always are: no FP8 product takes e5m2 for both operands. ComfyUI 0.33 multiplies INT8 in INT8
        whatever is said here.
        """
        settings: dict[str, Any] = {"format": self.comfy}
        if not tensor_cores or self.storage is torch.float8_e5m2:
            settings["full_precision_matrix_mult"] = True
        if group := self.group(columns):
            settings |= {"convrot": True, "convrot_groupsize": group}
        return settings


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("fp8_e4m3fn", "float8_e4m3fn", torch.float8_e4m3fn, per_row=False),
        Format("fp8_e5m2", "float8_e5m2", torch.float8_e5m2, per_row=False),
        Format("int8", "int8_tensorwise", torch.int8, per_row=True),
        Format("int8_convrot", "int8_tensorwise", torch.int8, per_row=True, convrot=GROUP),
    )
}
