"""Which quantization is written for a ComfyUI that reads these formats. Imports nothing of a host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COMFY_QUANT, SCALED_FP8 = "comfy_quant", "scaled_fp8"  # layouts
E4M3, E5M2, INT8 = "float8_e4m3fn", "float8_e5m2", "int8_tensorwise"
INSTEAD = {"int8_convrot": "int8", "int8": "fp8_e4m3fn", "fp8_e5m2": "fp8_e4m3fn"}


@dataclass(frozen=True)
class Reads:
    """What a ComfyUI reads: names of its ``algorithms``; whether INT8 may be rotated (``convrot``); and whether it reads FP8
    in the older layout, ``scaled``."""

    algorithms: frozenset[str]
    convrot: bool
    scaled: bool


@dataclass(frozen=True)
class Choice:
    """The quantization and the layout to write, and in words why it is not what was asked for."""

    quantization: str
    layout: str
    reason: str | None = None


def choose(quantization: str, algorithms: Mapping[str, str], known: Reads) -> Choice:
    """``quantization`` in the layout that a host reads, or the nearest that it does. ``algorithms``: ComfyUI's name of the
    format of each quantization. Raises ValueError when there is none."""
    if not known.algorithms and not known.scaled:
        raise ValueError("this ComfyUI reads no quantized weights; update ComfyUI")
    if not known.algorithms:
        if quantization == "fp8_e4m3fn":
            return Choice(quantization, SCALED_FP8)
        return Choice(
            "fp8_e4m3fn",
            SCALED_FP8,
            f"this ComfyUI is too old for {quantization}: fp8_e4m3fn is used instead; update ComfyUI for the other formats",
        )
    chosen = quantization
    while (
        algorithms[chosen] not in known.algorithms or (chosen == "int8_convrot" and not known.convrot)
    ) and chosen in INSTEAD:
        chosen = INSTEAD[chosen]
    if algorithms[chosen] not in known.algorithms:
        raise ValueError(f"this ComfyUI reads neither {quantization} nor {chosen}; update ComfyUI")
    reason = None
    if chosen != quantization:
        reason = f"this ComfyUI does not read {quantization}: {chosen} is used instead; update ComfyUI"
    return Choice(chosen, COMFY_QUANT, reason)
