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
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML cannot be used ({error})"
    return None


@lru_cache(maxsize=16)
def _handle(device_uuid: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByUUID(device_uuid)


def device_uuid(device: torch.device) -> str:
    """NVML's name of a torch CUDA device, so that CUDA_VISIBLE_DEVICES and reordering do not matter."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def ask(device: torch.device, question: str, *arguments: Any) -> tuple[Any, str | None]:
    """Call ``pynvml.<question>(handle, *arguments)`` for a CUDA device.

    Returns (answer, None), or (None, reason in words) where NVML, the device or the answer is missing.
    """
    reason = _initialise()
    if reason is not None:
        return None, reason
    try:
        return getattr(pynvml, question)(_handle(device_uuid(device)), *arguments), None
    except (pynvml.NVMLError, AttributeError) as error:
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
