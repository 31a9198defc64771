"""What the nodes Free Memory and Growth Watch ask of ComfyUI."""

from __future__ import annotations

import gc
import logging

import comfy.model_management

from ..growth import Growth, GrowthWatch, signed
from ..memory import MemorySnapshot, snapshot
from ..units import format_bytes

log = logging.getLogger(__name__)

MOST_WATCHES = 32
_watches: dict[str, GrowthWatch] = {}


def free(*, unload: bool, empty_cache: bool, collect: bool) -> list[str]:
    """Unload ComfyUI's models, collect garbage, return cached VRAM to the driver, as chosen and in this order.

    Returns lines that say what was done. Outputs that ComfyUI caches for the next run stay, and so do models that other
    packs move themselves.
    """
    device = comfy.model_management.get_torch_device()
    before = snapshot(device)
    lines = []
    if unload:
        loaded = _loaded()
        comfy.model_management.unload_all_models()
        lines.append(f"Unloaded: {', '.join(loaded)}" if loaded else "No model was loaded")
        remaining = _loaded()
        if remaining:
            lines.append(f"Still loaded: {', '.join(remaining)}")
    if collect:
        comfy.model_management.cleanup_models_gc()
        gc.collect()
    if empty_cache:
        comfy.model_management.soft_empty_cache()
    lines += _changes(before, snapshot(device))
    log.info("[VRAM] Free Memory: %s", "; ".join(lines))
    return lines


def mark(label: str) -> Growth:
    """The end of a run, and the growth over all runs with this label. Of more than MOST_WATCHES labels the one that was used
    longest ago is forgotten."""
    device = comfy.model_management.get_torch_device()
    watch = _watches.pop(label, None) or GrowthWatch(device if device.type == "cuda" else "cpu")
    _watches[label] = watch
    if len(_watches) > MOST_WATCHES:
        del _watches[next(iter(_watches))]
    watch.mark()
    growth = watch.growth()
    log.info("[VRAM] Growth Watch, %s, run %d: %s", label, watch.count, growth.verdict())
    return growth


def _loaded() -> list[str]:
    """Class names of the models that the host has loaded."""
    return [type(patcher.model).__name__ for patcher in comfy.model_management.loaded_models()]


def _changes(before: MemorySnapshot, after: MemorySnapshot) -> list[str]:
    """Lines for what is free on the device, held by torch there, and held in RAM."""

    def line(name: str, then: int | None, now: int | None) -> list[str]:
        if then is None or now is None:
            return []
        return [f"{name}: {format_bytes(then)} before, {format_bytes(now)} after ({signed(now - then)})"]

    on_card = before.reserved is not None
    return [
        *(line("VRAM free", before.device_free, after.device_free) if on_card else ()),
        *line("VRAM in use by ComfyUI", before.allocated, after.allocated),
        *line("VRAM reserved by ComfyUI", before.reserved, after.reserved),
        *line("RAM of ComfyUI", before.process_rss, after.process_rss),
    ]
