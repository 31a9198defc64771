"""BlockSwapWrapper: stream a model's blocks inside a VRAM limit, for ComfyUI's models and for WanVideoWrapper's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..vram.hosts import panel

if TYPE_CHECKING:
    from ..vram.config import SwapConfig

panel.serve()


def swap_inputs() -> dict[str, Any]:
    """The settings of block swap, as the inputs of a node."""
    from ..vram.plan import MODES

    return {
        "max_vram_gb": (
            "FLOAT",
            {
                "default": 0.0,
                "min": 0.0,
                "max": 1024.0,
                "step": 0.1,
                "tooltip": "All the VRAM that ComfyUI may use while this model samples, in GiB: weights, slots and "
                "activations. 0 is automatic: 80% of the card, or what other programs leave of it.",
            },
        ),
        "block_size_mb": (
            "INT",
            {
                "default": 300,
                "min": 1,
                "max": 65536,
                "tooltip": "How much is moved at once, in MiB. Smaller needs less VRAM, larger has fewer copies. "
                "300 suits most cards, 200 small ones, 500 large ones. layerwise does not use it.",
            },
        ),
        "swap_mode": (
            list(MODES),
            {
                "default": "adaptive",
                "tooltip": "adaptive: measures the first step, then keeps as many blocks in VRAM as the limit holds "
                "and chooses sizes by itself. chunkwise: the same with units of block_size_mb, decided once. "
                "layerwise: one layer at a time and nothing kept, the least VRAM.",
            },
        ),
        "empty_cache_freq": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 10000,
                "tooltip": "Return cached VRAM to the driver after every so many steps. 0 is never, which is "
                "fastest; use 1 when another program on this card needs every bit.",
            },
        ),
    }


RAM = "cpu"  # where weights wait, unless the user names another card
CARDS = 8  # that can be named; which there are is known when the model is loaded
PLAN = "INTELLIGENT_VRAM_PLAN"
PLAN_INPUT = (
    PLAN,
    {
        "tooltip": "From Intelligent VRAM: used instead of the numbers here, but for empty_cache_freq and offload_device."
    },
)


def lossless_input() -> tuple[list[str], dict[str, str]]:
    """Whether weights are kept encoded. The last input of a node that has it: workflows of older versions lack it."""
    from ..vram.config import LOSSLESS

    return (
        list(LOSSLESS),
        {
            "default": "auto",
            "tooltip": "Keep the weights encoded without loss in RAM and on the link, and decode them on the GPU: a third fewer "
            "bytes of bf16 weights, an eighth of float16 and FP8. auto: after a few steps, where these wait for copies and would "
            "be shorter (not in layerwise), or at once where plain weights do not fit the RAM; needs nvCOMP (pip install "
            "nvidia-libnvcomp-cu13). on: always; off: never. The result is the same to the bit.",
        },
    )


def offload_device_input() -> tuple[list[str], dict[str, str]]:
    """Where the weights wait. After ``lossless``, for the same reason."""
    return (
        [RAM, *(f"cuda:{index}" for index in range(CARDS))],
        {
            "default": RAM,
            "tooltip": "Where the streamed weights wait: cpu is RAM; cuda:0, cuda:1, ... is the memory of another card than the "
            "one that computes, as far as it has room, with the rest in RAM. Weights there are not encoded.",
        },
    )


def chosen(
    plan: Any,
    max_vram_gb: float,
    block_size_mb: int,
    swap_mode: str,
    empty_cache_freq: int,
    lossless: str = "auto",
    offload_device: str = RAM,
) -> SwapConfig:
    """The configuration of a connected plan, else of the node's own numbers; a plan says nothing of ``offload_device``."""
    from ..vram.config import SwapConfig

    own = {"lossless": lossless, "offload_device": None if offload_device == RAM else offload_device}
    config = SwapConfig.from_user(max_vram_gb, block_size_mb, swap_mode, empty_cache_freq, **own)
    if plan is None:
        return config
    return replace(plan.config, empty_cache_every=config.empty_cache_every, offload_device=config.offload_device)


class BlockSwapWrapper:
    """MODEL in, the same MODEL out with its transformer blocks streamed from RAM while it samples."""

    DESCRIPTION = (
        "Runs a model whose weights do not fit your card. Its transformer blocks stay in RAM and pass through the GPU while "
        "it computes, so that the whole of ComfyUI stays below max_vram_gb while this model samples. The result is the "
        "same to the bit. Put it between the model loader (or its LoRAs) and the sampler."
    )
    CATEGORY = "Intelligent VRAM"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model, streamed. LoRAs may be added before or after.",)
    FUNCTION = "wrap"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = (
            "MODEL",
            {"tooltip": "A model with transformer blocks: Wan, Flux, HunyuanVideo, Qwen-Image, ..."},
        )
        return {
            "required": {"model": model, **swap_inputs()},
            "optional": {
                "plan": PLAN_INPUT,
                "lossless": lossless_input(),
                "offload_device": offload_device_input(),
            },
        }

    def wrap(
        self,
        model: Any,
        max_vram_gb: float,
        block_size_mb: int,
        swap_mode: str,
        empty_cache_freq: int,
        plan: Any = None,
        lossless: str = "auto",
        offload_device: str = "cpu",
    ) -> tuple[Any]:
        from ..vram.hosts import comfy

        config = chosen(plan, max_vram_gb, block_size_mb, swap_mode, empty_cache_freq, lossless, offload_device)
        return (comfy.wrap(model, config),)
