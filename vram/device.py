"""What the card is: name, compute capability, link, and its page-locked bandwidth, measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from . import nvml
from .units import MIB


@dataclass(frozen=True)
class DeviceFacts:
    """A device as found. ``pcie`` is (generation, lanes) of the link now, None where NVML does not tell."""

    device: torch.device
    name: str
    capability: tuple[int, int] | None
    total_bytes: int
    pcie: tuple[int, int] | None


def facts(device: torch.device | str) -> DeviceFacts:
    """Name, compute capability, memory and link of ``device``."""
    device = torch.device(device)
    if device.type != "cuda":
        from .memory import snapshot

        return DeviceFacts(device, "CPU", None, snapshot(device).host_total, None)
    properties = torch.cuda.get_device_properties(device)
    generation, _ = nvml.ask(device, "nvmlDeviceGetCurrPcieLinkGeneration")
    lanes, _ = nvml.ask(device, "nvmlDeviceGetCurrPcieLinkWidth")
    return DeviceFacts(
        device,
        properties.name,
        (properties.major, properties.minor),
        properties.total_memory,
        (generation, lanes) if generation and lanes else None,
    )


@lru_cache(maxsize=8)
def host_to_device_bandwidth(device: torch.device, size: int = 256 * MIB, repeats: int = 7) -> float:
    """Bytes per second of a copy from page-locked host memory to ``device``: the median of ``repeats`` copies of
    ``size`` bytes. Takes ``2 * size`` bytes for a moment and, on PCIe 3 and better, under a fifth of a second;
    measured once a process. On a CPU device it is the speed of a copy in RAM."""
    source = torch.ones(size, dtype=torch.uint8)
    if device.type == "cpu":
        target = torch.empty_like(source)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)
        return size / statistics.median(seconds)
    source = source.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        for event in events[:-1]:
            event.record(stream)
            target.copy_(source, non_blocking=True)
        events[-1].record(stream)
    stream.synchronize()
    milliseconds = [before.elapsed_time(after) for before, after in pairwise(events)]
    return size / (statistics.median(milliseconds) / 1000)
