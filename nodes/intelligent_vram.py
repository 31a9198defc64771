"""IntelligentVRAMNode: a plan that needs no numbers, and says beforehand what will happen."""

from __future__ import annotations

import logging
from typing import Any

from .block_swap import PLAN, lossless_input
from .image import image_of

log = logging.getLogger(__name__)

NO_NAME = "(the connected model)"
SIZE, LAST_RUN = "the size below", "the last run"
CUSTOM = "custom"


class IntelligentVRAMNode:
    """Model or file in; arguments, plan, report and picture out."""

    DESCRIPTION = (
        "Computes how a model is best run on this machine, from its file and from what the card was measured to do, and "
        "predicts VRAM and step time before anything is loaded. Connect plan to a Block Swap Wrapper, or block_swap_args to "
        "WanVideoModelLoader in place of WanVideoBlockSwap."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = ("BLOCKSWAPARGS", PLAN, "STRING", "IMAGE")
    RETURN_NAMES = ("block_swap_args", "plan", "report", "picture")
    OUTPUT_TOOLTIPS = (
        "For WanVideoModelLoader or WanVideoSetBlockSwap, in place of WanVideoBlockSwap.",
        "For Block Swap Wrapper, instead of its own numbers.",
        "What is there, what was chosen, and what it will do.",
        "The plan: which blocks stay in VRAM, VRAM by use, time against the floor.",
    )
    FUNCTION = "plan"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..vram.advise import PRESETS
        from ..vram.hosts.planning import model_names

        def number(kind: str, default: float, low: float, high: float, tooltip: str, **more: Any) -> tuple[str, dict]:
            return kind, {"default": default, "min": low, "max": high, "tooltip": tooltip, **more}

        def switch(default: bool, tooltip: str) -> tuple[str, dict]:
            return "BOOLEAN", {"default": default, "tooltip": tooltip}

        return {
            "required": {
                "preset": (
                    [CUSTOM, *PRESETS],
                    {
                        "default": CUSTOM,
                        "tooltip": "custom: the inputs below. The others set auto_hardware_tuning and "
                        "vram_threshold_percent: fast preview, standard and high quality 50%; memory optimized 40%, and never "
                        "more; speed optimized 60%.",
                    },
                ),
                "auto_hardware_tuning": switch(
                    True,
                    "Choose by what was measured on this machine how far to copy ahead, and take more VRAM than "
                    "vram_threshold_percent where that makes a step faster. num_cuda_streams and bandwidth_target are then "
                    "not used.",
                ),
                "vram_threshold_percent": number(
                    "FLOAT",
                    50.0,
                    30.0,
                    90.0,
                    "How much of the card ComfyUI may use while the model samples. With auto_hardware_tuning it is where "
                    "the plan begins; it takes more, up to 90% less other programs, only if that is faster by 1% or more.",
                    step=1.0,
                ),
                "blocks_to_swap": number(
                    "INT",
                    0,
                    0,
                    48,
                    "Stream exactly so many blocks, spread evenly, the others stay in VRAM. 0 is automatic, and best.",
                ),
                "enable_cuda_optimization": switch(
                    True, "Adapt the plan to measured times after the first step. Off: decide once (chunkwise)."
                ),
                "enable_dram_optimization": switch(
                    True,
                    "Page-lock the streamed weights, up to 80% of free RAM, so that they cross the link at full speed. Off: "
                    "they pass through a small page-locked ring, which is slower: the CPU copies everything once more.",
                ),
                "num_cuda_streams": number(
                    "INT",
                    8,
                    1,
                    16,
                    "How far to copy ahead: one slot in VRAM for every two, 2 to 8 slots. A card has one copy engine each "
                    "way, so more streams do not make the link faster. Used when auto_hardware_tuning is off.",
                ),
                "bandwidth_target": number(
                    "FLOAT",
                    0.8,
                    0.1,
                    1.0,
                    "Which share of the link's measured speed the plan counts on; less when another program uses it too. Used "
                    "when auto_hardware_tuning is off.",
                    step=0.05,
                ),
                "offload_txt_emb": switch(
                    False,
                    "WanVideoWrapper, by block_swap_args: keep the text embedding in RAM between steps. Other models "
                    "do not use it.",
                ),
                "offload_img_emb": switch(
                    False,
                    "WanVideoWrapper, by block_swap_args: keep the image embedding in RAM between steps. Other models "
                    "do not use it.",
                ),
                "vace_blocks_to_swap": number(
                    "INT",
                    0,
                    0,
                    15,
                    "So many more streamed blocks for the VACE blocks of a VACE model; see blocks_to_swap.",
                ),
                "debug_mode": switch(
                    False, "Write the report, and for WanVideoWrapper a line for each forward, to the log."
                ),
                "predict_for": (
                    [SIZE, LAST_RUN],
                    {
                        "default": SIZE,
                        "tooltip": "the size below: from what this card does in a second. the last run: from what this model's "
                        "last run in this session took, through a Block Swap Wrapper or block_swap_args; for the same again.",
                    },
                ),
                "width": number(
                    "INT", 832, 16, 16384, "Of the video or image that is predicted for, in pixels.", step=16
                ),
                "height": number(
                    "INT", 480, 16, 16384, "Of the video or image that is predicted for, in pixels.", step=16
                ),
                "num_frames": number("INT", 81, 1, 10000, "Of the video that is predicted for; 1 is an image.", step=1),
                "model_name": (
                    [NO_NAME, *model_names()],
                    {
                        "default": NO_NAME,
                        "tooltip": "The model to plan for, where none is connected: only the header of its file is read.",
                    },
                ),
            },
            "optional": {
                "model": ("MODEL,WANVIDEOMODEL", {"tooltip": "The model to plan for. It is not changed."}),
                "lossless": lossless_input(),
            },
        }

    @classmethod
    def IS_CHANGED(cls, predict_for: str = SIZE, **_: Any) -> int:
        from ..vram import last_runs

        return last_runs.number() if predict_for == LAST_RUN else 0

    def plan(
        self,
        preset: str,
        auto_hardware_tuning: bool,
        vram_threshold_percent: float,
        blocks_to_swap: int,
        enable_cuda_optimization: bool,
        enable_dram_optimization: bool,
        num_cuda_streams: int,
        bandwidth_target: float,
        offload_txt_emb: bool,
        offload_img_emb: bool,
        vace_blocks_to_swap: int,
        debug_mode: bool,
        predict_for: str,
        width: int,
        height: int,
        num_frames: int,
        model_name: str,
        model: Any = None,
        lossless: str = "auto",
    ) -> dict[str, Any]:
        from ..vram.advice_report import picture, report
        from ..vram.advise import PRESETS, Wishes, advise
        from ..vram.hosts import panel, planning, traits, wanvideo

        wishes = Wishes(
            blocks_to_swap=blocks_to_swap,
            vace_blocks_to_swap=vace_blocks_to_swap,
            cuda=enable_cuda_optimization,
            dram=enable_dram_optimization,
            streams=num_cuda_streams,
            bandwidth=bandwidth_target,
            lossless=lossless,
            **PRESETS.get(preset, {"auto": auto_hardware_tuning, "threshold": vram_threshold_percent / 100}),
        )
        facts = planning.choose_facts(model, None if model_name == NO_NAME else model_name)
        host = planning.choose_host(model, facts)
        card, attention = planning.measure(host)
        tokens = traits.tokens_of(facts, width, height, num_frames) if facts is not None else 0
        advice = advise(facts, card, wishes, tokens, host, attention, as_last_run=predict_for == LAST_RUN)
        lines = report(facts, card, wishes, advice, tokens, host)
        for line in lines if debug_mode else ():
            log.info("[VRAM] %s", line)
        arguments = wanvideo.arguments(
            advice.config, offload_txt_emb=offload_txt_emb, offload_img_emb=offload_img_emb, debug=debug_mode
        )
        missing = wanvideo.watch(arguments)
        if missing is not None:
            log.debug("block_swap_args will not stream: %s", missing)
        image = image_of(picture(facts, card, advice))
        shown = {"intelligent_vram": [panel.planned(advice)]}
        return {"ui": shown, "result": (arguments, advice, "\n".join(lines), image)}
