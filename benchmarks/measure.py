"""Measuring a forward on a device: medians over groups of forwards that run back to back, and memory peaks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """Seconds of one forward (the median over groups), and peaks in bytes over all forwards since ``reset``."""

    seconds: float
    spread: float
    peak_allocated: int
    peak_reserved: int


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peaks(device: torch.device) -> None:
    """Begin a new measurement of peaks, with cached memory given back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def forwards(run: Callable[[], object], device: torch.device, groups: int, per_group: int) -> Measured:
    """Run ``groups`` groups of ``per_group`` forwards, back to back within a group, after one unmeasured group.

    Back to back is what sampling steps are: a copy that one forward leaves to the pause before it, the next pays for.
    """
    seconds = []
    peak = [0, 0]
    for group in range(groups + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(per_group):
            run()
        synchronize(device)
        if group:
            seconds.append((time.perf_counter() - start) / per_group)
    if device.type == "cuda":
        peak = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    return Measured(statistics.median(seconds), max(seconds) - min(seconds), *peak)


def copy_bandwidth(device: torch.device, size: int, repeats: int = 9) -> float:
    """Bytes per second of page-locked copies of ``size`` bytes to the device: the median of ``repeats``."""
    source = torch.ones(size, dtype=torch.uint8)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds[2:])
