"""BlockSwapWrapper for ComfyUI-WanVideoWrapper: its models, and the arguments that its own nodes take."""

from __future__ import annotations

import logging
from typing import Any

from .block_swap import PLAN_INPUT, chosen, lossless_input, offload_device_input, swap_inputs

log = logging.getLogger(__name__)


class BlockSwapWrapperWanVideo:
    """WANVIDEOMODEL in, the same out with its blocks streamed; or BLOCKSWAPARGS alone, in place of WanVideoBlockSwap."""

    DESCRIPTION = (
        "Block swap for ComfyUI-WanVideoWrapper, faster than its own and inside a VRAM limit. Use one of two "
        "ways: put it between WanVideoModelLoader and WanVideoSampler, or connect block_swap_args to the loader in place of "
        "WanVideoBlockSwap and leave model unconnected. The result is the same to the bit."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = ("WANVIDEOMODEL", "BLOCKSWAPARGS")
    RETURN_NAMES = ("model", "block_swap_args")
    OUTPUT_TOOLTIPS = (
        "The model, streamed. Nothing if no model is connected.",
        "For WanVideoModelLoader or WanVideoSetBlockSwap, in place of WanVideoBlockSwap.",
    )
    FUNCTION = "wrap"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        blocks = {"default": 0, "min": 0, "max": 1000}
        return {
            "required": {
                **swap_inputs(),
                "blocks_to_swap": (
                    "INT",
                    {
                        **blocks,
                        "tooltip": "Stream exactly so many transformer blocks, spread evenly over the model; the others "
                        "stay in VRAM. 0 and vace_blocks_to_swap 0: as many as max_vram_gb asks for, which is best. The 14B "
                        "models have 40, the 1.3B and 5B models 30; more than there are is all.",
                    },
                ),
                "vace_blocks_to_swap": (
                    "INT",
                    {
                        **blocks,
                        "tooltip": "So many more streamed blocks for the VACE blocks of a VACE model. Both numbers are added, and "
                        "spread evenly over all blocks.",
                    },
                ),
                "offload_img_emb": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Keep the image embedding in RAM between steps, as WanVideoWrapper does.",
                    },
                ),
                "offload_txt_emb": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Keep the text embedding in RAM between steps, as WanVideoWrapper does.",
                    },
                ),
                "block_swap_debug": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Write a line to the log for each forward: its time, how long it waited for copies, "
                        "bytes streamed, peak memory.",
                    },
                ),
            },
            "optional": {
                "plan": PLAN_INPUT,
                "model": ("WANVIDEOMODEL", {"tooltip": "From WanVideoModelLoader; LoRAs may be set before or after."}),
                "lossless": lossless_input(),
                "offload_device": offload_device_input(),
            },
        }

    def wrap(
        self,
        max_vram_gb: float,
        block_size_mb: int,
        swap_mode: str,
        empty_cache_freq: int,
        blocks_to_swap: int,
        vace_blocks_to_swap: int,
        offload_img_emb: bool,
        offload_txt_emb: bool,
        block_swap_debug: bool,
        model: Any = None,
        plan: Any = None,
        lossless: str = "auto",
        offload_device: str = "cpu",
    ) -> tuple[Any, dict[str, Any]]:
        from comfy_execution.graph_utils import ExecutionBlocker

        from ..vram.hosts import wanvideo

        config = chosen(plan, max_vram_gb, block_size_mb, swap_mode, empty_cache_freq, lossless, offload_device)
        args = wanvideo.arguments(
            config,
            blocks_to_swap=blocks_to_swap if plan is None else 0,
            vace_blocks_to_swap=vace_blocks_to_swap if plan is None else 0,
            offload_txt_emb=offload_txt_emb,
            offload_img_emb=offload_img_emb,
            debug=block_swap_debug,
        )
        missing = wanvideo.watch(args)
        if missing is not None:
            log.warning("block swap: block_swap_args will not stream: %s", missing)
        if model is None:
            return ExecutionBlocker("Connect a WANVIDEOMODEL to this node, or use its block_swap_args only."), args
        return wanvideo.wrap(model, args), args
