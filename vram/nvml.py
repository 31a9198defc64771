"""The NVIDIA Management Library, asked through nvidia-ml-py; every answer may be missing and says why."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch

try:
    import pynvml
except ImportError:  # a host may run the pack without its optional driver binding
    pynvml = None


@lru_cache(maxsize=1)
def _initialise() -> str | None:
    """Start NVML once in this process. Returns None, or in words why it cannot be used."""
    if pynvml is None:
        return "nvidia-ml-py is not installed"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and NVML knows NVIDIA's cards only"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML cannot be used ({error})"
    return None


@lru_cache(maxsize=16)
def _handle(uuid: str) -> Any:
    """The handle of a card, or of the MIG slice that torch names by the slice's own UUID."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError_NotFound:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def ask(device: torch.device, question: str, *arguments: Any) -> tuple[Any, str | None]:
    """Call ``pynvml.<question>(handle, *arguments)`` for a CUDA device, found by its UUID, so that CUDA_VISIBLE_DEVICES and
    reordering do not matter.

    Returns (answer, None), or (None, reason in words) where NVML, the device or the answer is missing.
    """
    reason = _initialise()
    if reason is not None:
        return None, reason
    try:
        return getattr(pynvml, question)(_handle(str(torch.cuda.get_device_properties(device).uuid)), *arguments), None
    except (pynvml.NVMLError, AttributeError, RuntimeError) as error:  # an old driver or torch; a lost device
        return None, f"NVML does not answer {question} ({error})"


def process_memory(device: torch.device) -> tuple[int | None, str | None]:
    """Bytes of device memory that NVML counts for this process, or None and why (containers often hide it)."""
    processes, reason = ask(device, "nvmlDeviceGetComputeRunningProcesses")
    if reason is not None:
        return None, reason
    for process in processes:
        if process.pid == os.getpid():
            if process.usedGpuMemory is None:
                return None, "the driver does not tell memory by process"
            return int(process.usedGpuMemory), None
    return None, "NVML does not list this process (a container's process numbers differ from the host's)"
