"""The backend: moves a model's weights between host memory and a device. Knows no host program outside ``hosts/``.

What it offers is imported when it is asked for: a host program that only lists our nodes does not wait for the engine.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SwapConfig
    from .discover import NoBlocks
    from .memory import MemorySnapshot, snapshot
    from .packing import PackedModel
    from .patches import Patches
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

_HOMES = {
    "config": ("SwapConfig",),
    "discover": ("NoBlocks",),
    "memory": ("MemorySnapshot", "snapshot"),
    "packing": ("PackedModel",),
    "patches": ("Patches",),
    "plan": ("LimitTooSmall", "Plan"),
    "swap": ("Swap", "attach"),
    "telemetry": ("ForwardRecord",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    return value
