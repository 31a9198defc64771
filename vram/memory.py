"""What is free: one snapshot of the device, this process and the host, each source optional and its absence named."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import psutil
import torch

from . import nvml
from .units import format_bytes


@dataclass(frozen=True)
class MemorySnapshot:
    """Memory at one moment. All sizes in bytes; None where the source named in ``missing`` did not answer.

    ``device_total`` and ``device_free`` are the card's, as the driver sees it: other programs are counted.
    ``allocated``, ``reserved`` and their peaks are torch's allocator in this process.
    ``process_device_used`` is what NVML counts for this process: torch's memory and the CUDA context.
    On a CPU device the card's figures are the host's memory and the allocator's figures are None.
    """

    device: torch.device
    device_total: int | None
    device_free: int | None
    allocated: int | None
    reserved: int | None
    peak_allocated: int | None
    peak_reserved: int | None
    process_device_used: int | None
    host_total: int
    host_available: int
    process_rss: int
    missing: tuple[str, ...] = field(default=())

    @property
    def outside_torch(self) -> int:
        """Bytes of device memory that this process holds outside torch's allocator (the CUDA context); 0 if unknown."""
        if self.process_device_used is None or self.reserved is None:
            return 0
        return max(0, self.process_device_used - self.reserved)

    @property
    def reachable(self) -> int | None:
        """Bytes that this process can use on the device at most: what is free, and what torch holds already."""
        if self.device_free is None:
            return None
        return self.device_free + (self.reserved or 0)

    def describe(self) -> str:
        """One line in plain words."""
        parts = [f"{self.device}:"]
        if self.device_total is not None and self.device_free is not None:
            parts.append(f"{format_bytes(self.device_free)} free of {format_bytes(self.device_total)},")
        if self.reserved is not None and self.allocated is not None:
            parts.append(f"torch holds {format_bytes(self.reserved)} ({format_bytes(self.allocated)} in use);")
        parts.append(
            f"RAM: {format_bytes(self.host_available)} free of {format_bytes(self.host_total)}, "
            f"this process {format_bytes(self.process_rss)}"
        )
        if self.missing:
            parts.append(f"(not known: {'; '.join(self.missing)})")
        return " ".join(parts)


def snapshot(device: torch.device | str) -> MemorySnapshot:
    """Read all sources for ``device`` ("cuda", "cuda:1", "cpu"). Takes well under a millisecond; never raises
    for a source that is missing."""
    device = torch.device(device)
    host = psutil.virtual_memory()
    rss = psutil.Process(os.getpid()).memory_info().rss
    if device.type != "cuda":
        return MemorySnapshot(
            device, host.total, host.available, None, None, None, None, None, host.total, host.available, rss
        )
    missing: list[str] = []
    torch.cuda.init()
    free = total = None
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        missing.append(f"the driver's free memory ({error})")
    statistics = torch.cuda.memory_stats_as_nested_dict(device)
    allocated, reserved = statistics["allocated_bytes"]["all"], statistics["reserved_bytes"]["all"]
    process_used, reason = nvml.process_memory(device)
    if reason is not None:
        missing.append(f"this process' memory by NVML: {reason}")
    return MemorySnapshot(
        device=device,
        device_total=total,
        device_free=free,
        allocated=allocated["current"],
        reserved=reserved["current"],
        peak_allocated=allocated["peak"],
        peak_reserved=reserved["peak"],
        process_device_used=process_used,
        host_total=host.total,
        host_available=host.available,
        process_rss=rss,
        missing=tuple(missing),
    )
