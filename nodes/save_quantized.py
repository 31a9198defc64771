"""SaveQuantizedModel: a checkpoint converted into an FP8 or INT8 file that ComfyUI loads without this pack."""

from __future__ import annotations

import logging
import time
from typing import Any

from .quantized_loader import conversion_inputs, planned, told

log = logging.getLogger(__name__)


class SaveQuantizedModel:
    """Model file in; a smaller model file, its name and a report out."""

    DESCRIPTION = (
        "Converts a model to weights of one byte and saves it beside your diffusion models. The file needs nothing of this "
        "pack: Load Diffusion Model reads it, and WanVideoWrapper reads it too where it is FP8. It appears under its name "
        "only once it is whole."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("report", "file_name")
    OUTPUT_TOOLTIPS = (
        "What was quantized and what was kept, sizes, time, and what this ComfyUI can do with the file.",
        "Name of the new file, as model loaders list it.",
    )
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..quant.formats import FORMATS

        return {
            "required": {
                **conversion_inputs([*FORMATS]),
                "filename": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Name of the new file, which goes into ComfyUI's folder diffusion_models. Empty: the "
                        "model's name with the quantization behind it.",
                    },
                ),
                "overwrite": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Replace a file of that name. The old one stays until the new one is whole. The model "
                        "that is read is never replaced.",
                    },
                ),
            }
        }

    def save(
        self,
        model_name: str,
        quantization: str,
        compute: str,
        keep_high_precision: str,
        filename: str,
        overwrite: bool,
    ) -> dict[str, Any]:
        from ..quant.convert import into_file
        from ..quant.write import check_writable
        from ..vram.hosts import comfy_quant, planning, quant_choice
        from ..vram.hosts.comfy_state import HostProgress

        conversion, lines = planned(planning.file_of(model_name), quantization, compute, keep_high_precision)
        default = comfy_quant.default_name(conversion.paths[0], conversion.format.name)
        target = comfy_quant.new_file(filename or default)
        check_writable(target, overwrite)  # before models are unloaded to make room
        device = comfy_quant.conversion_device()
        start = time.perf_counter()
        with comfy_quant.room_on(device):
            into_file(conversion, target, device, overwrite=overwrite, progress=HostProgress())
        lines += told(conversion, device, time.perf_counter() - start)
        lines += comfy_quant.remarks({conversion.format.comfy}, compute)
        if compute == comfy_quant.DEQUANTIZE and conversion.format.comfy == quant_choice.INT8:
            lines.append(
                "compute: only this pack's loader dequantizes INT8 files; ComfyUI's own multiplies them in INT8"
            )
        lines.append(f"saved as {target}")
        for line in lines:
            log.info("[quantize] %s", line)
        report = "\n".join(lines)
        return {"ui": {"text": (report, target.name)}, "result": (report, target.name)}
