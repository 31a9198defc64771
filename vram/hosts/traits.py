"""What planning has to know of a host before anything is loaded: which part of a model the engine gets, and what the host's
implementation takes beside the weights. Imports nothing of a host.

The constants were measured on Wan 14B's blocks on one H200 with PyTorch 2.11, ComfyUI 0.33 and WanVideoWrapper 1.4.7, at
1,024, 7,800 and 32,760 tokens (benchmarks/README.md). For families that are not in ``MEASURED`` they are what is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch

from ..config import SwapConfig
from ..discover import NoBlocks, Scope
from ..model_facts import ModelFacts, PackedSizes
from ..predict import Costs, Shape
from ..units import MIB

COMFY, WANVIDEO = "ComfyUI", "WanVideoWrapper"
HOSTS = (COMFY, WANVIDEO)
WAN_BLOCKS = BLOCKS, VACE_BLOCKS = "blocks", "vace_blocks"
WAN_SCOPE = Scope(
    outside=False,
    # an index into a list, which on the device would cost a synchronisation
    leave=frozenset({"block_id"}),
    # called by the model's loop beside the block itself
    called_alone=frozenset(
        {"before_proj", "after_proj", "fuser_block", "control_blocks_dense", "control_blocks_sparse"}
        | {"control_combine_linears"}
    ),
)
# parts of a block whose INT8 weights ComfyUI hands to a fused kernel without calling their layers
FUSED_INT8 = {"Wan": frozenset({"ffn"}), "LTX-Video": frozenset({"ff"}), "LTX-Video 2": frozenset({"ff", "audio_ff"})}
MEASURED = ("Wan",)
WAN_TEXT = 512  # tokens that Wan's text is padded to
CAST = 20.0  # bytes moved for each parameter that is cast and scaled at each use

_PLAIN = {
    COMFY: Costs(activation=33.8, least=27.5, fixed=55 * MIB, passes=170, calls=105),
    WANVIDEO: Costs(activation=31.2, least=25.5, fixed=55 * MIB, passes=185, calls=140),
}
_FP8 = {
    COMFY: Costs(activation=40.6, least=33.5, fixed=50 * MIB, passes=220, calls=230, fp8_products=True),
    WANVIDEO: Costs(activation=22.3, least=20.5, fixed=300 * MIB, passes=185, calls=165, weight_bytes=CAST),
}


def config_in(host: str, config: SwapConfig, lists: Collection[str]) -> SwapConfig:
    """``config`` as ``host`` uses it for a model with these block lists. Raises NoBlocks for a model that is not ``host``'s."""
    if host != WANVIDEO:
        return config
    names = tuple(f".{name}" for name in WAN_BLOCKS if name in lists)
    if not names:
        raise NoBlocks(f"WanVideoWrapper runs Wan models only, and this one has no list of blocks named {BLOCKS}")
    return replace(config, block_names=names)


def sizes_in(host: str, facts: ModelFacts, config: SwapConfig) -> tuple[PackedSizes, int]:
    """The layers that the engine will pack in ``host``, and the bytes of all other weights of the transformer, whoever
    places them. WanVideoWrapper is taken to load in bf16, its default."""
    if host != WANVIDEO:
        fused = FUSED_INT8.get(facts.family, frozenset()) if facts.quantization == "INT8" else frozenset()
        sizes = facts.layers(config, scope=Scope(whole=fused))
        return sizes, sizes.beside_bytes
    scope = replace(WAN_SCOPE, leave=WAN_SCOPE.leave | {"scale_weight"})  # it keeps scales as plain attributes
    sizes = facts.layers(config, scope=scope, compute_dtype=torch.bfloat16, first=(VACE_BLOCKS,))
    return sizes, sizes.beside_bytes


def costs_of(host: str, facts: ModelFacts) -> Costs:
    """The constants for a model in ``host``. GGUF and INT8 weights count as such that are cast at each use."""
    if facts.quantization is None:
        return _PLAIN[host]
    return _FP8[host] if "FP8" in facts.quantization else _FP8[WANVIDEO]


def shape_of(facts: ModelFacts) -> Shape | None:
    """What compute follows from, None where the model's family does not tell its width."""
    width = facts.sizes.dim
    if width is None:
        return None
    if facts.family == "Wan":
        return Shape(width, WAN_TEXT, 2 * width * width)  # keys and values of cross-attention
    return Shape(width)


def tokens_of(facts: ModelFacts, width: int, height: int, frames: int) -> int:
    """Tokens of a video (``frames`` 1: an image) of so many pixels. Raises ValueError for sizes below one token."""
    in_time, in_space = _shrink(facts)
    patch = facts.sizes.patch_size or (1, 2, 2)
    depth, rows, columns = (1, *patch)[-3:] if len(patch) == 2 else patch
    counts = ((frames - 1) // in_time // depth + 1, height // in_space // rows, width // in_space // columns)
    if frames < 1 or min(counts) < 1:
        raise ValueError(f"{width}x{height} pixels and {frames} frames are less than one token of this model")
    return math.prod(counts)


def _shrink(facts: ModelFacts) -> tuple[int, int]:
    """How many times the VAE of a model shrinks a video in time and in each direction of space, as ComfyUI's
    ``comfy/latent_formats.py`` states it; for families that are not there 4 and 8."""
    family, channels = facts.family, facts.sizes.out_channels
    if family in ("LTX-Video", "LTX-Video 2"):
        return 8, 32
    if family == "Flux 2":
        return 1, 16
    if family == "HunyuanVideo":
        return {32: (4, 16), 64: (1, 32)}.get(channels, (4, 8))  # 1.5, and HunyuanImage 2.1
    if family == "Wan" and facts.sizes.in_channels == channels == 48:  # 2.2 5B
        return 4, 16
    return 4, 8
