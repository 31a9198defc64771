"""The nodes of this pack, as ComfyUI lists them."""

from .block_swap import BlockSwapWrapper
from .block_swap_wanvideo import BlockSwapWrapperWanVideo
from .intelligent_vram import IntelligentVRAMNode

NODE_CLASS_MAPPINGS = {
    "BlockSwapWrapper": BlockSwapWrapper,
    "BlockSwapWrapperWanVideo": BlockSwapWrapperWanVideo,
    "IntelligentVRAMNode": IntelligentVRAMNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "BlockSwapWrapper": "Block Swap Wrapper (Intelligent VRAM)",
    "BlockSwapWrapperWanVideo": "Block Swap Wrapper for WanVideo (Intelligent VRAM)",
    "IntelligentVRAMNode": "Intelligent VRAM",
}
