"""The VRAM limit: how much of it is left for torch, and how it is held while a model runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from .memory import MemorySnapshot, snapshot
from .units import MIB

AUTOMATIC_SHARE = 0.8
# Left free of what the card has. Windows does not refuse what the card cannot hold but moves it into shared memory, which is
# many times slower: there ComfyUI leaves 600 MB (comfy/model_management.py, EXTRA_RESERVED_VRAM), and so does this.
SAFETY = (600 if sys.platform == "win32" else 128) * MIB
SPILLS = SAFETY if sys.platform == "win32" else SAFETY // 2  # what torch may not reserve of that at any moment


def automatic_limit(now: MemorySnapshot) -> int:
    """The limit for a user who gave none: 80% of the device, or what is free of it less ``SAFETY`` if that is less."""
    total = now.device_total or now.host_total
    reachable = now.reachable if now.device.type == "cuda" else now.host_available
    limit = int(total * AUTOMATIC_SHARE)
    return limit if reachable is None else min(limit, max(0, reachable + now.outside_torch - SAFETY))


def torch_budget(limit: int, now: MemorySnapshot) -> int:
    """Bytes that torch's allocator may reserve under ``limit`` for the whole process: less what the process holds
    outside torch, and no more than the card has left beside other programs."""
    return _within_card(limit - now.outside_torch, now.reachable if now.device.type == "cuda" else None)


def budget_now(device: torch.device, limit: int, outside_torch: int) -> int:
    """``torch_budget`` at this moment, cheap enough for every forward: what the process holds outside torch is given."""
    if device.type != "cuda":
        return _within_card(limit - outside_torch, None)
    free, _ = torch.cuda.mem_get_info(device)
    return _within_card(limit - outside_torch, free + reserved(device))


def taken_by_others(device: torch.device, limit: int, outside_torch: int) -> int:
    """Bytes of what ``limit`` leaves to this process that it cannot reach now, because other programs hold them."""
    return max(0, limit - outside_torch - budget_now(device, limit, outside_torch)) if device.type == "cuda" else 0


def _within_card(budget: int, reachable: int | None) -> int:
    """``budget``, or a little less than what the process can reach on the card where that is less."""
    return budget if reachable is None else min(budget, reachable - SPILLS)


def reserved(device: torch.device) -> int:
    """Bytes that torch's allocator holds on a CUDA device."""
    return torch.cuda.memory_stats_as_nested_dict(device)["reserved_bytes"]["all"]["current"]


@contextlib.contextmanager
def held(device: torch.device, budget: int) -> Iterator[None]:
    """While inside, torch's allocator does not reserve more than ``budget`` bytes on ``device``: it gives back cached
    memory first and then raises torch.OutOfMemoryError. Nothing happens on a CPU."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    # torch before 2.8 cannot tell the fraction that was set, and cudaMallocAsync tells nonsense when none was
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    before = before if 0.0 < before <= 1.0 else 1.0
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, budget / total)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def now_free(device: torch.device) -> MemorySnapshot:
    """A snapshot after cached memory was given back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return snapshot(device)
