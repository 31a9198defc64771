"""The backend: moves a model's weights between host memory and a device. Knows no host program outside ``hosts/``."""

from .config import SwapConfig
from .discover import NoBlocks
from .memory import MemorySnapshot, snapshot
from .packing import PackedModel, Patches
from .plan import LimitTooSmall, Plan
from .swap import Swap, attach
from .telemetry import ForwardRecord

__all__ = [
    "ForwardRecord",
    "LimitTooSmall",
    "MemorySnapshot",
    "NoBlocks",
    "PackedModel",
    "Patches",
    "Plan",
    "Swap",
    "SwapConfig",
    "attach",
    "snapshot",
]
