"""QuantizedModelLoader: any checkpoint as an FP8 or INT8 model, converted while it is read."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .block_swap import PLAN_INPUT, chosen, swap_inputs

if TYPE_CHECKING:
    from ..quant.convert import Conversion

log = logging.getLogger(__name__)

NONE, BLOCK_SWAP = "none", "block_swap"


def conversion_inputs(quantizations: list[str]) -> dict[str, Any]:
    """What is converted and how, as the inputs of a node."""
    from ..quant.select import DEFAULT_KEEP
    from ..vram.hosts.comfy_quant import COMPUTE, model_names

    return {
        "model_name": (
            model_names(),
            {
                "tooltip": "A model in the folders diffusion_models and checkpoints, in bf16, fp16 or fp32. Of a model in "
                "several files choose any of them. One that is quantized already is loaded as it is."
            },
        ),
        "quantization": (
            quantizations,
            {
                "default": "fp8_e4m3fn",
                "tooltip": "fp8_e4m3fn: half the size, for cards of compute capability 8.9 and newer, which multiply in it. "
                "int8: half the size with a scale for each row, for cards from 7.5 on; int8_convrot: the same with weights "
                "rotated first, for models with outliers. fp8_e5m2: coarser than e4m3 and never multiplied in FP8. What each "
                "loses depends on the model: Model Accuracy Report tells. WanVideoWrapper's loader reads saved FP8 files, not "
                "INT8.",
            },
        ),
        "compute": (
            list(COMPUTE),
            {
                "default": COMPUTE[0],
                "tooltip": "tensor cores: multiply in FP8 or INT8, which is fast, where the card can. dequantize: turn each "
                "layer's weights back to 16 bits before they are used: slower, but what they are multiplied with is not "
                "rounded. A saved INT8 file is only dequantized by this pack's loader.",
            },
        ),
        "keep_high_precision": (
            "STRING",
            {
                "default": DEFAULT_KEEP,
                "tooltip": "Layers of the transformer's blocks whose name this regular expression finds keep the file's "
                "precision. What is outside of the blocks, such as embeddings and head, always does. Empty: quantize all "
                r"linear layers of the blocks. Example, to keep the first and the last of 40 blocks too: |blocks\.(0|39)\.",
            },
        ),
    }


def planned(path: str, quantization: str, compute: str, keep: str) -> tuple[Conversion, list[str]]:
    """The conversion of a file into what the running ComfyUI reads, and in words what of that is not as it was asked for."""
    from ..quant.convert import plan_conversion
    from ..quant.formats import FORMATS
    from ..vram.hosts import comfy_quant, quant_choice

    if quantization == NONE:
        return plan_conversion(path, NONE), []
    algorithms = {name: format.comfy for name, format in FORMATS.items()}
    choice = quant_choice.choose(quantization, algorithms, comfy_quant.reads())
    tensor_cores = compute != comfy_quant.DEQUANTIZE
    conversion = plan_conversion(path, choice.quantization, keep=keep, tensor_cores=tensor_cores, layout=choice.layout)
    lines = [choice.reason] if choice.reason else []
    if choice.layout == quant_choice.SCALED_FP8:
        lines.append("in ComfyUI's older layout for FP8 all linear layers are FP8; keep_high_precision is not used")
    return conversion, lines


def told(conversion: Conversion, device: Any, seconds: float) -> list[str]:
    """What a conversion made of a model, and how fast it was."""
    from ..vram.units import format_bytes

    if conversion.format is None:
        made = f"{len(conversion.paths)} files, nothing quantized"
    else:
        kept = f"{len(conversion.kept)} weights kept"
        made = f"{len(conversion.quantized)} layers as {conversion.format.name}, {kept}"
    share = conversion.nbytes / max(1, conversion.source_nbytes)
    speed = conversion.source_nbytes / max(seconds, 1e-9) / 1e9
    return [
        f"{conversion.paths[0].name}: {made}",
        *(f"kept {format_bytes(nbytes)}: {reason}" for reason, nbytes in conversion.kept_nbytes.items()),
        f"size: {format_bytes(conversion.source_nbytes)} before, {format_bytes(conversion.nbytes)} after ({share:.0%})",
        f"time: {seconds:.1f} s on {device}, {speed:.2f} GB/s of the file",
    ]


def load_model(path: str, quantization: str, compute: str, keep: str) -> tuple[Any, list[str]]:
    """The MODEL of a file, and the report on its conversion."""
    from ..quant.convert import into_memory, plan_conversion
    from ..quant.source import AlreadyQuantized
    from ..vram.hosts import comfy_quant
    from ..vram.hosts.comfy_state import HostProgress

    if comfy_quant.is_encoded_file(Path(path)):
        kept = (
            "" if quantization == NONE else "; to quantize it, decode it first (intelligent-vram compress --decompress)"
        )
        model = comfy_quant.load_file(Path(path), compute)
        return model, [f"{Path(path).name}: its weights are encoded without loss, and loaded as they are{kept}"]
    try:
        conversion, lines = planned(path, quantization, compute, keep)
    except AlreadyQuantized:
        conversion = plan_conversion(path, NONE)
        lines = ["it is quantized already; for another format choose its 16-bit original"]
    first = conversion.paths[0]
    if conversion.format is None and len(conversion.paths) == 1:
        return comfy_quant.load_file(first, compute), [f"{first.name}: loaded as ComfyUI loads it", *lines]
    device = comfy_quant.conversion_device()

    def convert() -> dict[str, Any]:
        with comfy_quant.room_on(device):
            return into_memory(conversion, device, HostProgress())

    start = time.perf_counter()
    model = comfy_quant.load_state(
        convert, conversion.metadata, first.name, compute, static=conversion.format is not None
    )
    return model, [*lines, *told(conversion, device, time.perf_counter() - start)]


class QuantizedModelLoader:
    """Model file in; MODEL and report out."""

    DESCRIPTION = (
        "Loads a model with weights of one byte, from any checkpoint, without ever holding the whole of it in 16 bits: it is "
        "converted layer by layer while it is read. ComfyUI's own kernels compute with it, LoRAs work, and block swap moves "
        "half as much. To convert once instead of at each start, use Save Quantized Model."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The quantized model, streamed where offload_mode says so.",
        "What was quantized and what was kept, sizes, time, and what this ComfyUI and this card can do with it.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..quant.formats import FORMATS

        swap = swap_inputs()
        del swap["empty_cache_freq"]
        offload = (
            [NONE, BLOCK_SWAP],
            {
                "default": NONE,
                "tooltip": "none: ComfyUI places the weights. block_swap: stream them inside max_vram_gb, as Block Swap "
                "Wrapper does; the three inputs below are for it.",
            },
        )
        plan = (PLAN_INPUT[0], {"tooltip": "From Intelligent VRAM, for block_swap: used instead of the numbers here."})
        return {
            "required": {**conversion_inputs([*FORMATS, NONE]), "offload_mode": offload, **swap},
            "optional": {"plan": plan},
        }

    def load(
        self,
        model_name: str,
        quantization: str,
        compute: str,
        keep_high_precision: str,
        offload_mode: str,
        max_vram_gb: float,
        block_size_mb: int,
        swap_mode: str,
        plan: Any = None,
    ) -> tuple[Any, str]:
        from ..vram.hosts import comfy, comfy_quant, planning

        config = chosen(plan, max_vram_gb, block_size_mb, swap_mode, 0) if offload_mode == BLOCK_SWAP else None
        path = planning.file_of(model_name)
        model, lines = load_model(path, quantization, compute, keep_high_precision)
        lines += comfy_quant.remarks(comfy_quant.formats_of(model), compute)
        if config is not None:
            reason = comfy.reason_to_pass(model.load_device)
            lines.append(f"block swap: {reason or 'its blocks are streamed'}")
            model = comfy.wrap(model, config)
        elif plan is not None:
            lines.append("block swap: off, for offload_mode is none; the plan is not used")
        for line in lines:
            log.info("[quantize] %s", line)
        return model, "\n".join(lines)
