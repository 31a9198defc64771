"""The nodes of this pack, as ComfyUI lists them."""

from .block_swap import BlockSwapWrapper

NODE_CLASS_MAPPINGS = {"BlockSwapWrapper": BlockSwapWrapper}
NODE_DISPLAY_NAME_MAPPINGS = {"BlockSwapWrapper": "Block Swap Wrapper (Intelligent VRAM)"}
