"""The nodes of this pack, as ComfyUI lists them."""

from .accuracy_report import ModelAccuracyReport
from .block_swap import BlockSwapWrapper
from .block_swap_wanvideo import BlockSwapWrapperWanVideo
from .free_memory import FreeMemory
from .growth_watch import GrowthWatchNode
from .intelligent_vram import IntelligentVRAMNode
from .quantized_loader import QuantizedModelLoader
from .save_quantized import SaveQuantizedModel

NODE_CLASS_MAPPINGS = {
    "FreeMemory": FreeMemory,
    "GrowthWatchNode": GrowthWatchNode,
    "BlockSwapWrapper": BlockSwapWrapper,
    "BlockSwapWrapperWanVideo": BlockSwapWrapperWanVideo,
    "IntelligentVRAMNode": IntelligentVRAMNode,
    "QuantizedModelLoader": QuantizedModelLoader,
    "SaveQuantizedModel": SaveQuantizedModel,
    "ModelAccuracyReport": ModelAccuracyReport,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FreeMemory": "Free Memory (Intelligent VRAM)",
    "GrowthWatchNode": "Growth Watch (Intelligent VRAM)",
    "BlockSwapWrapper": "Block Swap Wrapper (Intelligent VRAM)",
    "BlockSwapWrapperWanVideo": "Block Swap Wrapper for WanVideo (Intelligent VRAM)",
    "IntelligentVRAMNode": "Intelligent VRAM",
    "QuantizedModelLoader": "FP8/INT8 Model Loader (Intelligent VRAM)",
    "SaveQuantizedModel": "Save Quantized Model (Intelligent VRAM)",
    "ModelAccuracyReport": "Model Accuracy Report (Intelligent VRAM)",
}
